"""Run MMLU through a model while a recorder watches, and score it as lm-evaluation-harness does.

One row per question. Subjects run one after the other in alphabetical order, the questions of a
subject from the longest prompt to the shortest (ties by row number), so that a batch holds rows of
similar length; that is the recorded order. The prefix that all questions of a subject share is a
sequence of its own, without a question, run and counted once. With the prefix cache its keys and
values serve all the questions; without, every prompt runs whole and the prefix's positions are not
counted again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from equipoise.capture.encode import context_length, encode_prompts
from equipoise.capture.mmlu import LETTERS, Question, QuestionSet
from equipoise.capture.prefix import PrefixCache, allowed_difference, difference, shared_length
from equipoise.capture.prompts import render, template_digest
from equipoise.capture.rows import Head, Progress, Row, batches, clip, digest, make_row
from equipoise.capture.scoring import Forward, columns, score
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass
class MmluRun:
    """What one call of `run_mmlu` did; accuracy by subject and category is in the trace."""

    questions: int = 0
    correct: int = 0
    truncated: int = 0
    tokens: int = 0
    """Tokens counted: padding and repeats of the shared prefix left out."""
    prefix_cache: bool = True
    notes: list[str] = field(default_factory=list)
    """What the user should know: a fall-back, truncated prompts."""


def run_mmlu(
    model: Any,
    tokenizer: Any,
    recorder: Any,
    questions: QuestionSet,
    shots: int = 5,
    batch_size: int = 8,
    *,
    prefix_cache: bool = True,
    count_repeats: bool = False,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> MmluRun:
    """Answer every question that the recorder has not done yet; labels and results go to the
    recorder.

    `count_repeats` counts the shared prefix in every question, and so runs it in every question.
    Prompts longer than `max_length` tokens (by default the model's own limit) lose their beginning,
    as in lm-evaluation-harness; how many is in `truncated`. An interrupt passes through: what was
    completed before it stays completed. Raises EquipoiseError for NaN logits.
    """
    if batch_size < 1:
        raise EquipoiseError(f"batch size is {batch_size}; it must be at least 1")
    questions.require_shots(shots)
    limit = context_length(model.config, tokenizer) if max_length is None else max_length
    runner = _Runner(Forward(model), tokenizer, recorder, questions, shots, batch_size, limit)
    runner.count_repeats = count_repeats
    runner.run.prefix_cache = prefix_cache and not count_repeats
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            runner.all_subjects(progress)
    finally:
        model.train(training)
        recorder.manifest.meta.update(runner.meta())
    return runner.run


@dataclass(frozen=True)
class _Asked:
    """How a batch is run: as which sequences, with which heads, from which cache."""

    sequences: Sequence[int]
    heads: Sequence[Head]
    cache: PrefixCache | None = None
    counted_from: int | None = None
    """First position that is load; None where the pass is not to be counted."""


@dataclass
class _Runner:
    """One run: reads questions, drives the model, tells the recorder what each row is."""

    forward: Forward
    tokenizer: Any
    recorder: Any
    questions: QuestionSet
    shots: int
    batch_size: int
    limit: int
    count_repeats: bool = False
    run: MmluRun = field(default_factory=MmluRun)
    trusted: bool = False
    """The prefix cache has been held against full runs."""

    def meta(self) -> dict[str, Any]:
        """How the questions were put, for the trace's metadata."""
        return {
            "task": "mmlu",
            "split": self.questions.split,
            "shots": self.shots,
            "taxonomy": self.questions.taxonomy,
            "data": self.questions.source,
            "questions": len(self.questions),
            "questions_digest": digest(self.questions),
            "prompt_template": template_digest(),
            "prefix_cache": self.run.prefix_cache,
            "count_repeats": self.count_repeats,
            "max_length": self.limit,
            "batch_size": self.batch_size,
            "truncated": self.run.truncated,
            "notes": list(self.run.notes),
        }

    def all_subjects(self, progress: Progress | None) -> None:
        """Run what is left of every subject, telling `progress` after each batch."""
        begin, total = time.monotonic(), len(self.questions)
        subjects = self.questions.questions
        done = sum(self._done(subject, q.index) for subject, qs in subjects.items() for q in qs)
        for subject, questions in subjects.items():
            if all(self._done(subject, question.index) for question in questions):
                continue
            for answered in self._subject(subject, questions):
                done += answered
                if progress is not None:
                    progress(done, total, self.run.tokens, time.monotonic() - begin)
        if self.run.truncated:
            self._say(
                f"{self.run.truncated} of {self.run.questions} prompts were longer than the context of "
                f"{self.limit} tokens and lost their beginning; use fewer --shots to keep them whole"
            )

    def _done(self, subject: str, index: int | None) -> bool:
        return (self.questions.split, subject, index) in self.recorder.done

    def _say(self, note: str) -> None:
        self.run.notes.append(note)
        warnings.warn(note, stacklevel=2)

    def _subject(self, subject: str, questions: Sequence[Question]) -> Iterator[int]:
        """Run what is left of a subject; yields the number of questions of each batch.

        The prefix is taken over all its questions, so that a resumed run has the same one.
        """
        prompts = [render(q, self.questions.shots(q, self.shots)) for q in questions]
        encoded = encode_prompts(self.tokenizer, prompts)
        rows = [make_row(q, e, self.limit) for q, e in zip(questions, encoded, strict=True)]
        whole = [row for row in rows if not row.cut]
        shared = shared_length(whole) if whole and not self.count_repeats else 0
        waiting = [row for row in rows if not self._done(subject, row.question.index)]
        usable = [row for row in waiting if not row.cut]
        cache = self._prefix(usable, shared) if usable and shared else None
        for batch in batches(usable, self.batch_size):
            yield self._batch(batch, shared, cache)
        for batch in batches([row for row in waiting if row.cut], self.batch_size):
            self.run.truncated += len(batch)
            yield self._batch(batch, 0, None)

    def _prefix(self, rows: Sequence[Row], shared: int) -> PrefixCache | None:
        """Run a subject's prefix; its cache, or None where every prompt is to run whole."""
        first = rows[0]
        known = self._done(first.question.subject, None)
        if known and not self.run.prefix_cache:
            return None
        sequence = self._add(first, 0 if known else shared, None)
        with self.recorder.batch([sequence], [0], [shared], [shared if known else 0]):
            kept = self.forward.prefill(first.ids[:shared])
        self.recorder.complete(sequence)
        self.run.tokens += 0 if known else shared
        if not self.run.prefix_cache:
            return None
        cache = PrefixCache(kept, shared)
        if not self.trusted and (reason := self._distrust(rows, cache, sequence)):
            self.run.prefix_cache = False
            self._say(f"every prompt runs in full, the prefix cache does not serve: {reason}")
            return None
        self.trusted = True
        return cache

    def _distrust(self, rows: Sequence[Row], cache: PrefixCache, sequence: int) -> str | None:
        """Why the cache cannot be used, found out on the two shortest rows; None where it can.

        Both run in full and from the cache, under the prefix's sequence and not counted.
        """
        if reason := cache.unusable():
            return reason
        pair = sorted(rows, key=lambda row: len(row.ids))[:2]
        asked = _Asked([sequence] * len(pair), [()] * len(pair))
        full = self._logits(pair, asked)
        try:
            short = self._logits(pair, replace(asked, cache=cache))
        except (EquipoiseError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a cache of another kind fails in its own way
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        gap = difference(short, full)
        if gap <= allowed_difference(full):
            return None
        return f"its logits differ from a full run's by {gap:.2g} of their spread"

    def _batch(self, rows: Sequence[Row], shared: int, cache: PrefixCache | None) -> int:
        """Answer one batch of questions and complete them; its size.

        Letters that need another token fed before them take a pass of their own, not counted.
        """
        sequences = [self._add(row, len(row.ids), row.question.index) for row in rows]
        asked = _Asked(sequences, [row.heads[0] for row in rows], cache, counted_from=shared)
        scores = self._scores(rows, asked)
        for turn in range(1, max(len(row.heads) for row in rows)):
            more = [b for b, row in enumerate(rows) if len(row.heads) > turn]
            extra = [rows[b] for b in more]
            heads = [row.heads[turn] for row in extra]
            found = self._scores(extra, _Asked([sequences[b] for b in more], heads, cache))
            scores[more] = np.where(np.isnan(scores[more]), found, scores[more])
        for row, sequence, likelihoods in zip(rows, sequences, scores.tolist(), strict=True):
            self._complete(row.question, sequence, likelihoods)
        self.run.tokens += sum(len(row.ids) - shared for row in rows)
        return len(rows)

    def _scores(self, rows: Sequence[Row], asked: _Asked) -> NDArray[np.float64]:
        return score(self._logits(rows, asked), asked.heads, [row.letters for row in rows])

    def _logits(self, rows: Sequence[Row], asked: _Asked) -> Tensor:
        """Logits [B, M, V] where the continuations of rows are predicted, their heads fed behind.

        A head lies beyond the row's length: it is not part of the prompt, and never counted.
        """
        start = asked.cache.length if asked.cache else 0
        fed = [row.fed(head, start) for row, head in zip(rows, asked.heads, strict=True)]
        lengths = [len(row.ids) - start for row in rows]
        width = 1 + max(map(len, asked.heads))
        at = [columns(n, head, width) for n, head in zip(lengths, asked.heads, strict=True)]
        skip = [len(r.ids) if asked.counted_from is None else asked.counted_from for r in rows]
        with self.recorder.batch(asked.sequences, [start] * len(rows), lengths, skip):
            kept = asked.cache.repeat(len(rows)) if asked.cache else None
            return self.forward(fed, at, kept, start)

    def _add(self, row: Row, tokens: int, index: int | None) -> int:
        """Announce a question, or with no index the prefix of its subject."""
        subject = row.question.subject
        number: int = self.recorder.add_sequence(
            subject=subject,
            category=self.questions.category(subject),
            split=self.questions.split,
            name=f"{subject}: shared prefix" if index is None else None,
            question=index,
            tokens=tokens,
            roles=clip(row.spans, tokens),
        )
        return number

    def _complete(self, question: Question, sequence: int, likelihoods: list[float]) -> None:
        if np.isnan(likelihoods).any():
            raise EquipoiseError(
                f"NaN log-likelihoods at {question.subject} question {question.index + 1}: the model's "
                "logits are not numbers. Try --dtype float32, or check the checkpoint."
            )
        choice = LETTERS[int(np.argmax(likelihoods))]
        self.recorder.complete(
            sequence,
            answer=question.answer,
            choice=choice,
            correct=choice == question.answer,
            loglikelihoods=likelihoods,
        )
        self.run.questions += 1
        self.run.correct += choice == question.answer

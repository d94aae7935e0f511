"""Rows to run: a question's ids as they are fed, its roles, and how rows are batched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from equipoise.capture.encode import Encoded
from equipoise.capture.mmlu import Question, QuestionSet
from equipoise.capture.prompts import Span
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Continuations = tuple[tuple[int, ...], ...]
Head = tuple[int, ...]
Progress = Callable[[int, int, int, float], None]
"""Called after every batch with what is done, of how many, tokens counted, seconds."""


@dataclass(frozen=True, slots=True)
class Row:
    """A question ready to run: ids int32 [n] of its context, its roles in tokens, its
    continuations.

    `heads` is what must be fed after the context to score the letters: all but the last token of
    each. Where every letter is one token, the usual case, that is one empty head; each head is one
    row.
    """

    question: Question
    ids: NDArray[np.int32]
    spans: tuple[Span, ...]
    letters: Continuations
    heads: tuple[Head, ...]
    cut: int
    """Tokens cut off on the left, because the prompt was longer than the model's context."""

    def fed(self, head: Head, start: int) -> NDArray[np.int32]:
        """Ids from position `start` on, the head behind them."""
        return np.concatenate([self.ids[start:], np.array(head, dtype=np.int32)])


def make_row(question: Question, encoded: Encoded, limit: int) -> Row:
    """A row of at most `limit` tokens, longest head included; the rest is cut off on the left."""
    heads = tuple(dict.fromkeys(letter[:-1] for letter in encoded.continuations))
    cut = max(0, len(encoded.ids) + max(map(len, heads)) - limit)
    if cut >= len(encoded.ids):
        raise EquipoiseError(f"a context of {limit} tokens holds no prompt; it must be longer")
    spans = tuple((r, max(a - cut, 0), b - cut) for r, a, b in encoded.spans if b > cut)
    return Row(question, encoded.ids[cut:], spans, encoded.continuations, heads, cut)


def batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Rows from the longest to the shortest, ties by question number, `size` at a time."""
    ordered = sorted(rows, key=lambda row: (-len(row.ids), row.question.index))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def clip(spans: Sequence[Span], stop: int) -> list[Span]:
    """The part of role spans before position `stop`."""
    return [(role, a, min(b, stop)) for role, a, b in spans if a < stop]


def digest(questions: QuestionSet) -> str:
    """First 16 hex digits of the SHA-256 over every question, its choices and its answer."""
    whole = hashlib.sha256()
    for subject in questions.questions.values():
        for q in subject:
            fields = (q.subject, str(q.index), q.question, *q.choices, q.answer)
            whole.update("\0".join(fields).encode() + b"\1")
    return whole.hexdigest()[:16]

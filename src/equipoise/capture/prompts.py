"""MMLU prompts as lm-evaluation-harness renders them, with the role of every character.

Source: lm_eval 0.4.13, tasks/mmlu/default/_default_template_yaml and api/task.py::fewshot_context.
A parity test compares whole prompts. Each line, its line break included, belongs to one role; the
cue "Answer:" of the question itself is the role "answer".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from equipoise.capture.mmlu import LETTERS, Question

Span = tuple[str, int, int]
"""(role, start, stop): half-open, in characters or in tokens."""

DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"
QUESTION = "{question}\n"
CHOICES = "A. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}\n"
CUE = "Answer:"
BETWEEN = "\n\n"
CONTINUATIONS = tuple(f" {letter}" for letter in LETTERS)
"""What is scored after the cue; the cue ends without a blank, so no blank moves between the two."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt; `spans` are in characters, adjoin, and cover the whole text."""

    text: str
    spans: tuple[Span, ...]


def template_digest() -> str:
    """First 16 hex digits of the SHA-256 of the templates: two traces asked alike have the same."""
    parts = (DESCRIPTION, QUESTION, CHOICES, CUE, BETWEEN, *CONTINUATIONS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def render(question: Question, shots: Iterable[Question] = ()) -> Prompt:
    """The prompt of one question after its worked examples, up to and with "Answer:"."""
    pieces = [
        ("description", DESCRIPTION.format(subject=question.subject.replace("_", " "))),
        ("few-shot", "".join(map(_example, shots))),
        ("question", QUESTION.format(question=question.question.strip())),
        ("choices", CHOICES.format(choices=question.choices)),
        ("answer", CUE),
    ]
    spans, position = [], 0
    for role, piece in pieces:
        if piece:
            spans.append((role, position, position + len(piece)))
        position += len(piece)
    return Prompt("".join(piece for _, piece in pieces), tuple(spans))


def _example(question: Question) -> str:
    asked = QUESTION.format(question=question.question.strip())
    choices = CHOICES.format(choices=question.choices)
    return f"{asked}{choices}{CUE} {question.answer}{BETWEEN}"

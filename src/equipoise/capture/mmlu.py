"""MMLU as data: 57 subjects, four categories in two taxonomies, and the questions from wherever
they are.

Questions come from a folder of the original CSVs, from the hub's `cais/mmlu`, or from the set that
is shipped with the package. All three arrive as one `QuestionSet`; every fault of the data is found
here, before a model is loaded.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError, nearest

LETTERS = ("A", "B", "C", "D")
SPLITS = ("test", "val", "dev")
BUNDLED = "bundled"
HUB_NAME = "cais/mmlu"
_HUB_SPLITS = {"test": "test", "val": "validation", "dev": "dev"}
_COLUMNS = "question, A, B, C, D, answer"

_LISTS = {
    "STEM": (
        "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics "
        "electrical_engineering elementary_mathematics high_school_biology high_school_chemistry "
        "high_school_computer_science high_school_mathematics high_school_physics "
        "high_school_statistics machine_learning"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history "
        "high_school_world_history international_law jurisprudence logical_fallacies "
        "moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"
    ),
    "social sciences": (
        "econometrics high_school_geography high_school_government_and_politics "
        "high_school_macroeconomics high_school_microeconomics high_school_psychology "
        "human_sexuality professional_psychology public_relations security_studies sociology "
        "us_foreign_policy"
    ),
    "other": (
        "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging "
        "management marketing medical_genetics miscellaneous nutrition professional_accounting "
        "professional_medicine virology"
    ),
}
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    category: tuple(names.split()) for category, names in _LISTS.items()
}
"""Hendrycks' four categories and their subjects (hendrycks/test, categories.py)."""

SUBJECTS: tuple[str, ...] = tuple(sorted(s for names in CATEGORIES.values() for s in names))
"""The 57 subjects, in alphabetical order: the order in which they are run."""

TAXONOMIES: Mapping[str, Mapping[str, str]] = {
    "hendrycks": {s: category for category, names in CATEGORIES.items() for s in names},
    "lm-eval": {s: category for category, names in CATEGORIES.items() for s in names}
    | {"anatomy": "STEM"},
}
"""Subject to category. lm-evaluation-harness files anatomy under STEM, Hendrycks under other."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question: its row number in its split's file (from 0), four choices, the right letter."""

    subject: str
    index: int
    question: str
    choices: tuple[str, str, str, str]
    answer: str


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one split by subject, and the dev questions that serve as examples."""

    split: str
    taxonomy: str
    source: str
    """The folder's name, "cais/mmlu" or "bundled"."""
    questions: Mapping[str, tuple[Question, ...]]
    examples: Mapping[str, tuple[Question, ...]]

    def __len__(self) -> int:
        return sum(map(len, self.questions.values()))

    def category(self, subject: str) -> str:
        """Category of a subject under this set's taxonomy."""
        return TAXONOMIES[self.taxonomy][subject]

    def shots(self, question: Question, count: int) -> tuple[Question, ...]:
        """The first `count` dev questions; a dev question is never an example of itself."""
        pool = self.examples[question.subject]
        if self.split == "dev":
            pool = tuple(example for example in pool if example.index != question.index)
        return pool[:count]

    def require_shots(self, count: int) -> None:
        """Raise EquipoiseError where a subject has fewer than `count` examples to show."""
        for subject in self.questions if count else ():
            usable = len(self.examples.get(subject, ())) - (self.split == "dev")
            if usable < count:
                reason = (
                    " (on the dev split a question is left out of its own examples)"
                    if self.split == "dev"
                    else ""
                )
                raise EquipoiseError(
                    f"{subject} has {max(usable, 0)} dev questions to show, {count} were asked "
                    f"for{reason}. Use --shots {max(usable, 0)} or fewer."
                )


def load_questions(
    data: str | Path | None,
    split: str = "test",
    subjects: Iterable[str] | None = None,
    limit: int | None = None,
    *,
    shots: int = 5,
    taxonomy: str = "hendrycks",
) -> QuestionSet:
    """Read the questions of a split, and its examples when `shots` > 0.

    `data` is a folder of the original CSVs ({dev,val,test}/<subject>_<split>.csv, no header),
    "bundled", or None for the hub. `limit` is the number of questions per subject. Raises
    EquipoiseError, naming file and row, for anything that is not as it should be.
    """
    _one_of("split", split, SPLITS)
    _one_of("taxonomy", taxonomy, tuple(TAXONOMIES))
    if shots < 0:
        raise EquipoiseError(f"shots is {shots}; it must be 0 or more")
    if limit is not None and limit < 1:
        raise EquipoiseError(f"limit is {limit}; it must be at least 1 question per subject")
    names = _check_subjects(subjects)
    reader = _reader(data)
    found = QuestionSet(
        split=split,
        taxonomy=taxonomy,
        source=HUB_NAME if data is None else BUNDLED if data == BUNDLED else Path(data).name,
        questions={name: tuple(reader(name, split)[:limit]) for name in names},
        examples={name: tuple(reader(name, "dev")) for name in names} if shots else {},
    )
    found.require_shots(shots)
    return found


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise EquipoiseError(
            f"{what} {value!r} is not one of {', '.join(allowed)}.{nearest(value, allowed)}"
        )


def _check_subjects(subjects: Iterable[str] | None) -> tuple[str, ...]:
    """The asked subjects in running order; blanks and dashes may stand for underscores."""
    if subjects is None:
        return SUBJECTS
    asked = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in subjects]
    for name in asked:
        if name not in SUBJECTS:
            raise EquipoiseError(
                f"no MMLU subject {name!r} among the 57.{nearest(name, SUBJECTS)}"
                " See docs/trace.md for the list."
            )
    if not asked:
        raise EquipoiseError("an empty list of subjects; leave it out to run all 57")
    return tuple(name for name in SUBJECTS if name in set(asked))


class _Folder:
    """Reads `<split>/<subject>_<split>.csv` below a folder, real or inside the package."""

    def __init__(self, root: Traversable, name: str) -> None:
        self.root, self.name = root, name

    def __call__(self, subject: str, split: str) -> list[Question]:
        relative = f"{split}/{subject}_{split}.csv"
        path, shown = self.root.joinpath(relative), f"{self.name}/{relative}"
        if not path.is_file():
            raise EquipoiseError(
                f"{shown} is missing. The folder must hold {{dev,val,test}}/<subject>_<split>.csv as "
                "in the original MMLU; name the subjects that are there with --subjects."
            )
        try:
            text = path.read_bytes().decode("utf-8-sig")
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error, OSError) as error:
            raise EquipoiseError(f"{shown} cannot be read as UTF-8 CSV: {error}") from error
        return list(_checked(subject, shown, rows))


def _checked(subject: str, shown: str, rows: list[list[str]]) -> Iterator[Question]:
    if not rows:
        raise EquipoiseError(f"{shown} has no rows; expected {_COLUMNS}")
    for index, row in enumerate(rows):
        where = f"{shown} row {index + 1}"
        if len(row) != 6:
            raise EquipoiseError(f"{where} has {len(row)} columns; expected 6: {_COLUMNS}")
        yield _question(subject, index, row[0], row[1:5], row[5].strip(), where)


def _question(
    subject: str, index: int, question: str, choices: Sequence[str], answer: str, where: str
) -> Question:
    if answer not in LETTERS:
        raise EquipoiseError(f"{where}: the answer is {answer!r}; expected A, B, C or D")
    if not question.strip():
        raise EquipoiseError(f"{where}: the question is empty")
    first, second, third, fourth = choices
    return Question(subject, index, question, (first, second, third, fourth), answer)


class _Hub:
    """Reads `cais/mmlu` subject by subject, into the cache that lm-evaluation-harness uses."""

    def __init__(self) -> None:
        try:
            import datasets
        except ImportError as error:
            raise EquipoiseError(
                f"reading {HUB_NAME} needs the extra: pip install 'equipoise[datasets]'. "
                "Or name a folder of the MMLU CSVs with --data DIR, or use --data bundled."
            ) from error
        self.datasets: Any = datasets

    def __call__(self, subject: str, split: str) -> list[Question]:
        try:
            rows = self.datasets.load_dataset(HUB_NAME, subject, split=_HUB_SPLITS[split])
        except Exception as error:  # every hub, network and cache fault arrives as its own type
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EquipoiseError(
                f"{HUB_NAME} ({subject}, {split}) cannot be had from the hub: {first_line[:200]} "
                "Name a folder of the MMLU CSVs with --data DIR, or use --data bundled."
            ) from error
        return [self._row(subject, split, index, row) for index, row in enumerate(rows)]

    @staticmethod
    def _row(subject: str, split: str, index: int, row: Mapping[str, Any]) -> Question:
        where = f"{HUB_NAME} {subject} {split} row {index + 1}"
        choices, answer = row["choices"], row["answer"]
        if len(choices) != 4 or answer not in range(4):
            raise EquipoiseError(
                f"{where}: {len(choices)} choices and answer {answer!r}; expected 4 and 0-3"
            )
        return _question(subject, index, row["question"], choices, LETTERS[answer], where)


def _reader(data: str | Path | None) -> _Folder | _Hub:
    if data is None:
        return _Hub()
    if data == BUNDLED:
        return _Folder(resources.files("equipoise").joinpath("data/questions"), BUNDLED)
    root = Path(data).expanduser()
    if not root.is_dir():
        raise EquipoiseError(
            f"{data} is not a folder. --data takes a folder of the MMLU CSVs or {BUNDLED!r}; "
            f"without it {HUB_NAME} is read from the hub.{nearest(str(data), [BUNDLED])}"
        )
    return _Folder(root, str(data))

"""MMLU as data: what is read, from where, and what a fault of the data says."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from equipoise.capture.mmlu import (
    CATEGORIES,
    LETTERS,
    SUBJECTS,
    TAXONOMIES,
    load_questions,
)
from equipoise.errors import EquipoiseError

ROW = ["What is 1+1?", "1", "2", "3", "4", "B"]


def write(root: Path, split: str, subject: str, rows: list[list[str]]) -> Path:
    path = root / split / f"{subject}_{split}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("dev", 5), ("test", 4), ("val", 2)):
        for subject in ("anatomy", "sociology"):
            rows = [[f"{subject} {i}", "a", "b", "c", "d", LETTERS[i % 4]] for i in range(count)]
            write(tmp_path, split, subject, rows)
    return tmp_path


def test_there_are_57_subjects_in_four_categories_of_two_taxonomies() -> None:
    assert len(SUBJECTS) == 57 == len(set(SUBJECTS))
    assert {name: len(subjects) for name, subjects in CATEGORIES.items()} == {
        "STEM": 18,
        "humanities": 13,
        "social sciences": 12,
        "other": 14,
    }
    assert Counter(TAXONOMIES["lm-eval"].values())["STEM"] == 19
    differing = [s for s in SUBJECTS if len({t[s] for t in TAXONOMIES.values()}) > 1]
    assert differing == ["anatomy"]


def test_a_folder_is_read_in_subject_order_with_its_examples(folder: Path) -> None:
    found = load_questions(folder, subjects=["Sociology", "anatomy"], limit=3)
    assert list(found.questions) == ["anatomy", "sociology"]
    assert len(found) == 6
    first = found.questions["anatomy"][1]
    assert (first.index, first.question, first.choices, first.answer) == (
        1,
        "anatomy 1",
        ("a", "b", "c", "d"),
        "B",
    )
    assert [q.question for q in found.shots(first, 2)] == ["anatomy 0", "anatomy 1"]
    assert found.category("anatomy") == "other"
    assert load_questions(folder, subjects=["anatomy"], taxonomy="lm-eval").category("anatomy") == (
        "STEM"
    )


def test_other_splits(folder: Path) -> None:
    assert len(load_questions(folder, "val", ["anatomy"])) == 2
    with pytest.raises(EquipoiseError, match="--shots 4 or fewer"):
        load_questions(folder, "dev", ["anatomy"])
    dev = load_questions(folder, "dev", ["anatomy"], shots=4)
    question = dev.questions["anatomy"][2]
    assert [q.index for q in dev.shots(question, 4)] == [0, 1, 3, 4]


def test_without_shots_no_dev_file_is_needed(tmp_path: Path) -> None:
    write(tmp_path, "test", "anatomy", [ROW])
    assert len(load_questions(tmp_path, subjects=["anatomy"], shots=0)) == 1
    with pytest.raises(EquipoiseError, match=r"dev/anatomy_dev\.csv is missing"):
        load_questions(tmp_path, subjects=["anatomy"], shots=1)


def test_cells_keep_line_breaks_quotes_and_odd_separators(tmp_path: Path) -> None:
    row = ['two\nlines, "quoted"', "\u2028x", "\x0b", " c ", "é", "D"]
    path = write(tmp_path, "test", "anatomy", [row])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark, as Excel writes
    (question,) = load_questions(tmp_path, subjects=["anatomy"], shots=0).questions["anatomy"]
    assert [question.question, *question.choices, question.answer] == row


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW[:5]], r"test/anatomy_test\.csv row 2 has 5 columns; expected 6"),
        ([ROW, ROW, [*ROW[:5], "E"]], r"row 3: the answer is 'E'; expected A, B, C or D"),
        ([[" ", *ROW[1:]]], r"row 1: the question is empty"),
        ([], r"has no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: list[list[str]], message: str) -> None:
    write(tmp_path, "test", "anatomy", rows)
    with pytest.raises(EquipoiseError, match=message):
        load_questions(tmp_path, subjects=["anatomy"], shots=0)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "test", "anatomy", [ROW])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EquipoiseError, match=r"anatomy_test\.csv cannot be read as UTF-8"):
        load_questions(tmp_path, subjects=["anatomy"], shots=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subjects": ["anatomi"]}, "Did you mean 'anatomy'"),
        ({"subjects": []}, "empty list of subjects"),
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"taxonomy": "lm_eval"}, "Did you mean 'lm-eval'"),
        ({"limit": 0}, "limit is 0"),
        ({"shots": -1}, "shots is -1"),
        ({"shots": 6}, "has 5 dev questions to show, 6 were asked"),
        ({"data": "no/such/folder"}, "is not a folder"),
        ({"data": "bundeld"}, "Did you mean 'bundled'"),
    ],
)
def test_a_wrong_option_names_what_is_allowed(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"data": folder, "subjects": ["anatomy"]} | changes
    with pytest.raises(EquipoiseError, match=message):
        load_questions(**options)


def hub_table(count: int) -> Any:
    """A table with the schema of cais/mmlu."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        question=datasets.Value("string"),
        subject=datasets.Value("string"),
        choices=datasets.Sequence(datasets.Value("string")),
        answer=datasets.ClassLabel(names=list(LETTERS)),
    )
    rows = {
        "question": [f"q{i}" for i in range(count)],
        "subject": ["anatomy"] * count,
        "choices": [["w", "x", "y", "z"]] * count,
        "answer": [i % 4 for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_the_hub_gives_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((*args, kwargs["split"]))
        return hub_table(5)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_questions(None, "val", ["anatomy"], limit=3)
    assert asked == [("cais/mmlu", "anatomy", "validation"), ("cais/mmlu", "anatomy", "dev")]
    assert found.source == "cais/mmlu"
    assert [(q.question, q.choices, q.answer) for q in found.questions["anatomy"]] == [
        (f"q{i}", ("w", "x", "y", "z"), LETTERS[i]) for i in range(3)
    ]


def test_an_unreachable_hub_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EquipoiseError, match=r"reach 'cais/mmlu'.*--data DIR.*--data bundled") as e:
        load_questions(None, subjects=["anatomy"])
    assert "\n" not in str(e.value)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EquipoiseError, match=r"equipoise\[datasets\].*--data DIR"):
        load_questions(None, subjects=["anatomy"])


def test_reading_questions_loads_neither_torch_nor_transformers() -> None:
    script = "import sys, equipoise.capture.mmlu, equipoise.capture.load; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "equipoise.capture.mmlu" in loaded
    assert not {"torch", "transformers", "datasets"} & set(loaded)


def test_the_original_files_are_whole(shared_data: Any) -> None:
    data = shared_data("mmlu")
    assert len(load_questions(data)) == 14_042
    assert len(load_questions(data, "val")) == 1_531
    assert len(load_questions(data, "dev", shots=4)) == 285

"""The text task: documents from files, folders and JSONL, run window by window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import equipoise
from equipoise.capture.text import Document, load_text, run_text
from equipoise.errors import EquipoiseError
from tests.capture.mmlu_tools import make_model, make_tokenizer

TEXT = "the cell of a naïve river\nhas 42 bones"
DOCUMENTS = [
    Document(domain, f"{domain}.txt:{number}", f"{TEXT} " * (1 + 3 * number))
    for domain in ("law", "river")
    for number in range(3)
]


def run(path: Path, model: Any, resume: bool = False, **options: Any) -> tuple[Any, Any]:
    with equipoise.record(model, path, resume=resume) as recorder:
        result = run_text(model, make_tokenizer("byte_bpe"), recorder, DOCUMENTS, 4, **options)
    return result, equipoise.open(path)


def test_a_file_is_one_domain_and_separator_lines_part_its_documents(tmp_path: Path) -> None:
    path = tmp_path / "law.txt"
    path.write_text("one\n<|doc|>\n<|doc|>\n\ntwo <|doc|> still\ntwo\n<|doc|>\n")
    assert load_text(path) == [
        Document("law", "law.txt:0", "one"),
        Document("law", "law.txt:1", "two <|doc|> still\ntwo"),
    ]


def test_a_folder_s_domains_are_its_sub_folders_or_its_files(tmp_path: Path) -> None:
    for name in ("a/x.txt", "a/deep/y.md", "b/z.txt", "flat.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in ("a/LICENSE.txt", "a/PROVENANCE.txt", "README.md", "a/.hidden.txt", "a/x.bin"):
        (tmp_path / name).write_text("not a document")
    found = {(d.domain, d.name): d.text for d in load_text(tmp_path)}
    assert found == {
        ("a", "x.txt:0"): "a/x.txt",
        ("a", "deep/y.md:0"): "a/deep/y.md",
        ("b", "z.txt:0"): "b/z.txt",
        ("flat", "flat.txt:0"): "flat.txt",
    }


def test_json_lines_name_their_text_and_domain(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    rows = [{"body": "one", "topic": "a"}, {"body": "two", "topic": "b", "domain": "c"}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert [d.domain for d in load_text(path, "body", "topic")] == ["a", "b"]
    assert [d.domain for d in load_text(path, "body")] == ["all", "c"]


def test_limit_is_per_domain(tmp_path: Path) -> None:
    rows = [json.dumps({"text": str(i), "domain": "ab"[i % 2]}) for i in range(9)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    assert [d.text for d in load_text(tmp_path / "x.jsonl", limit=2)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "\n<|doc|>\n\n", r"x\.txt is empty"),
        ("x.jsonl", "", r"x\.jsonl is empty"),
        ("x.jsonl", '{"text": "a"}\n{"text": ', r"x\.jsonl line 2 is not JSON"),
        ("x.jsonl", '{"text": "a"}\n[1]', r"line 2 is not a JSON object but a list"),
        ("x.jsonl", '{"txt": "a"}', r"line 1 has no field 'text'; it has txt. Did you mean 'txt'"),
        ("x.jsonl", '{"text": 3}', r"line 1: 'text' must be a text that is not empty, not 3"),
        ("x.bin", "text", r"holds no text"),
    ],
)
def test_a_fault_names_file_and_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(EquipoiseError, match=message):
        load_text(tmp_path)


def test_a_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(EquipoiseError, match=r"does not exist.*Did you mean 'corpus.txt'"):
        load_text(tmp_path / "corpsu.txt")
    (tmp_path / "corpus.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(EquipoiseError, match="cannot be read as UTF-8"):
        load_text(tmp_path / "corpus.txt")


def test_every_token_of_every_window_is_counted_under_its_domain(tmp_path: Path) -> None:
    result, trace = run(tmp_path / "t", make_model(), max_length=16)
    tokenizer = make_tokenizer("byte_bpe")
    lengths = {d.name: len(tokenizer.encode(d.text)) for d in DOCUMENTS}
    assert result.tokens == trace.tokens == sum(lengths.values())
    assert result.documents == len(DOCUMENTS)
    assert result.windows == trace.sequences.num_rows == sum(-(-n // 16) for n in lengths.values())
    for domain in ("law", "river"):
        of_domain = sum(n for name, n in lengths.items() if name.startswith(domain))
        assert trace.select(domain=domain).tokens == of_domain
    assert trace.select(role="none").tokens == len(DOCUMENTS)  # the first special token of each
    names = [row["name"] for row in trace.sequences.to_pylist()]
    assert len(set(names)) == len(names)
    assert {"law.txt:2#0", "law.txt:2#1"} <= set(names)


def test_batches_change_nothing_but_the_order(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer("byte_bpe")
    _, together = run(tmp_path / "a", model, max_length=24)
    with equipoise.record(model, tmp_path / "b") as recorder:
        run_text(model, tokenizer, recorder, DOCUMENTS, 1, 24)
    alone = equipoise.open(tmp_path / "b")
    np.testing.assert_array_equal(together.counts_LE, alone.counts_LE)


def test_resume_goes_on_after_the_last_whole_batch(tmp_path: Path) -> None:
    model, told = make_model(), []
    _, expected = run(tmp_path / "whole", model, max_length=8)

    def interrupt(*args: Any) -> None:
        told.append(args)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "t", model, max_length=8, progress=interrupt)
    result, trace = run(tmp_path / "t", model, resume=True, max_length=8)
    assert 0 < result.tokens < expected.tokens
    assert result.documents == len(DOCUMENTS)
    np.testing.assert_array_equal(trace.counts_LE, expected.counts_LE)


def test_windows_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EquipoiseError, match="do not fit the model's 2048"):
        run(tmp_path / "t", make_model(), max_length=4096)
    with pytest.raises(EquipoiseError, match="at least 1"):
        run(tmp_path / "u", make_model(), max_length=0)

"""From text to tokens: nothing lost, nothing held out is trained on, nothing made twice."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.errors import EquipoiseError
from equipoise.lab import Config, load_corpus
from equipoise.lab.corpus import BEGIN, END, digest_of
from tests.lab.made_up import ALPHABETS, documents

Configure = Callable[..., Config]


def split(corpus: Any, ids: np.ndarray) -> list[str]:
    """Documents of a stream."""
    tokenizer = corpus.tokenizer()
    marks = np.flatnonzero(ids == tokenizer.token_to_id(END))
    parts = np.split(ids, marks + 1)
    return [tokenizer.decode(part[part != tokenizer.token_to_id(END)].tolist()) for part in parts]


def test_the_tokens_are_the_text_and_the_held_out_part_is_trained_on_nowhere(
    configure: Configure,
) -> None:
    config = configure()
    corpus = load_corpus(config.data)
    assert corpus.names == tuple(sorted(ALPHABETS))
    for domain in corpus.domains:
        # The part that is held out ends in a document of which the other part has the rest.
        whole = split(corpus, np.concatenate([domain.held_out, domain.train]))
        assert sorted(filter(None, whole)) == sorted(documents(ALPHABETS[domain.name]))
        held_out, train = split(corpus, domain.held_out), split(corpus, domain.train)
        assert not set(train) & set(held_out) - {""}
        assert len(domain.held_out) >= config.data.held_out_tokens
        # A letter that is cut in two decodes to a sign of its own.
        size = sum(len(text.encode()) for text in held_out)
        assert corpus.token_bytes()[domain.held_out].sum() == pytest.approx(size, abs=3)


def write(folder: Path, name: str, texts: list[str]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "a.txt").write_text("\n<|doc|>\n".join(texts), encoding="utf-8")


def test_copies_of_held_out_documents_are_not_trained_on(
    configure: Configure, tmp_path: Path
) -> None:
    texts = documents("abcdefgh")
    write(tmp_path / "t", "twice", texts + texts)
    corpus = load_corpus(configure(data__source=str(tmp_path / "t")).data)
    (domain,) = corpus.domains
    assert not set(split(corpus, domain.train)) & set(split(corpus, domain.held_out)) - {""}


def test_a_book_is_cut_its_beginning_held_out(configure: Configure, tmp_path: Path) -> None:
    (book,) = documents("abcdefgh", count=1, words=5000)
    write(tmp_path / "t", "book", [book])
    config = configure(data__source=str(tmp_path / "t")).data
    corpus = load_corpus(config)
    (domain,) = corpus.domains
    assert len(domain.held_out) == config.held_out_tokens
    tokenizer = corpus.tokenizer()
    held_out = tokenizer.decode(domain.held_out.tolist())
    assert held_out + tokenizer.decode(domain.train[:-1].tolist()) == book


@pytest.mark.parametrize("count", [1, 3])
def test_text_that_is_hardly_more_than_what_is_held_out_leaves_the_rest(
    configure: Configure, tmp_path: Path, count: int
) -> None:
    write(tmp_path / "t", "little", documents("abcdefgh", count=count, words=600))
    config = configure(data__source=str(tmp_path / "t")).data
    (domain,) = load_corpus(replace(config, held_out_tokens=100)).domains
    stream = np.concatenate([domain.held_out, domain.train])
    (domain,) = load_corpus(replace(config, held_out_tokens=len(stream) - 20)).domains
    assert domain.held_out.tolist() == stream[:-20].tolist()
    assert domain.train.tolist() == stream[-20:].tolist()


def test_long_work_says_how_far_it_is(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.lab import corpus as module

    monkeypatch.setattr(module, "EVERY", -1.0)
    said: list[str] = []
    names = load_corpus(configure(data__cache=str(tmp_path)).data, said.append).names
    count = len(documents(ALPHABETS[names[0]]))
    lines = [line for line in said if "documents tokenized" in line]
    assert lines[:2] == [f"  {names[0]}: {n} of {count:,} documents tokenized" for n in range(2)]
    assert len(lines) == sum(len(documents(ALPHABETS[name])) for name in names)


def test_a_corpus_is_made_once(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    from equipoise.lab import corpus as module

    config = configure()
    first = load_corpus(config.data)
    monkeypatch.setattr(module, "train_tokenizer", None)  # would fail, were it called
    again = load_corpus(replace(config.data, row_length=8, block=4))
    assert again.digest == first.digest
    assert isinstance(again.domains[0].train, np.memmap)


def test_the_digest_is_of_the_text_and_of_what_tokens_depend_on(
    configure: Configure, tmp_path: Path
) -> None:
    write(tmp_path / "t", "a", documents("abcdefgh"))
    config = configure(data__source=str(tmp_path / "t")).data
    found = {load_corpus(config).digest, load_corpus(replace(config, vocab_size=290)).digest}
    write(tmp_path / "t", "a", documents("abcdefgh", seed=1))
    found.add(load_corpus(config).digest)
    assert len(found) == 3


def test_files_that_are_not_read_do_not_make_another_text(
    configure: Configure, tmp_path: Path, text: Path
) -> None:
    copied = tmp_path / "text"
    shutil.copytree(text, copied)
    some = configure(data__source=str(copied), data__domains="abc,digits").data
    every = replace(some, domains=())
    before = digest_of(some), digest_of(every)
    for name in (".DS_Store", "abc/.words.txt.swp", "LICENSE.txt", "abc/notes.pdf"):
        (copied / name).write_text("aside")
    assert (digest_of(some), digest_of(every)) == before
    (copied / "greek" / "words.txt").write_text("other")
    assert digest_of(some) == before[0]
    assert digest_of(every) != before[1]
    (copied / "abc" / "more.txt").write_text("more")
    assert digest_of(some) != before[0]
    (copied / "rows.jsonl").write_text('{"text": "a", "domain": "abc"}')  # may be of any domain
    assert digest_of(some) not in (before[0], digest_of(every))


@pytest.mark.parametrize(
    ("file", "content"),
    [("meta.json", "{"), ("meta.json", "{}"), ("abc.train.npy", ""), ("abc.train.npy", None)],
)
def test_damaged_tokens_say_so(
    configure: Configure, tmp_path: Path, file: str, content: str | None
) -> None:
    config = configure(data__cache=str(tmp_path / "cache")).data
    folder = load_corpus(config).folder
    damaged = folder / file
    if content is None:
        damaged.write_bytes(damaged.read_bytes()[:200])
    else:
        damaged.write_text(content)
    with pytest.raises(EquipoiseError, match=r"cannot be read .*: remove it, and they are made ag"):
        load_corpus(config)
    (folder / "meta.json").unlink()  # as where making them was killed: that begins anew
    assert load_corpus(config).folder == folder


def test_the_slower_of_two_that_make_the_same_tokens_takes_the_other_s(tmp_path: Path) -> None:
    from equipoise.lab.corpus import _put

    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "meta.json").write_text(folder.name)
    _put(mine, theirs)
    assert (theirs / "meta.json").read_text() == "theirs"
    (theirs / "meta.json").unlink()
    _put(mine, theirs)
    assert (theirs / "meta.json").read_text() == "mine"


def test_marks_that_stand_in_the_text_are_text(configure: Configure, tmp_path: Path) -> None:
    texts = [f"{BEGIN} {text} {END} {END}" for text in documents("abcdefgh")]
    write(tmp_path / "t", "marked", texts)
    corpus = load_corpus(configure(data__source=str(tmp_path / "t")).data)
    (domain,) = corpus.domains
    stream = np.concatenate([domain.held_out, domain.train])
    assert sorted(filter(None, split(corpus, stream))) == sorted(texts)
    size = sum(len(text.encode()) for text in texts)
    assert corpus.token_bytes()[stream].sum() == size


def test_domains_are_those_named_in_their_order(configure: Configure) -> None:
    corpus = load_corpus(configure(data__domains=("greek", "abc")).data)
    assert corpus.names == ("greek", "abc")


def test_a_domain_may_be_called_anything(configure: Configure, tmp_path: Path) -> None:
    import json

    rows = [{"text": t, "source": "owner/name: x"} for t in documents("abcdefgh")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    corpus = load_corpus(
        configure(data__source=str(tmp_path / "a.jsonl"), data__domain_field="source").data
    )
    assert corpus.names == ("owner/name: x",)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data__domains": "abc,greec"}, "'greec'.*there are abc, digits, greek. Did you mean"),
        ({"data__vocab_size": 5000}, r"data.vocab_size=5000: the text gives only \d+ tokens"),
        ({"data__held_out_tokens": 10**6}, r"domain 'abc' has [\d,]+ tokens; .*leaves nothing"),
    ],
    ids=["no such domain", "vocabulary too large", "too little text"],
)
def test_text_that_does_not_do_is_refused(
    configure: Configure, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(EquipoiseError, match=said):
        load_corpus(configure(**values).data)


def test_empty_and_tiny_text_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EquipoiseError, match="holds no text"):
        load_corpus(configure(data__source=str(tmp_path / "empty")).data)
    texts = documents("abcdefgh", count=3)
    write(tmp_path / "t", "tiny", texts)
    config = configure(data__source=str(tmp_path / "t")).data
    with pytest.raises(EquipoiseError, match=r"not one row of data\.row_length=1024"):
        load_corpus(replace(config, row_length=1024))


def test_a_full_disk_while_preparing_is_said_and_leaves_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    config = configure(data__cache=str(tmp_path / "cache")).data
    with pytest.raises(EquipoiseError, match="cannot be written"):
        load_corpus(config)
    assert not list((tmp_path / "cache").iterdir())


# -- data sets of the hub ---------------------------------------------------------------------


@pytest.fixture
def data_set(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the hub: what was asked for, and the rows that come back."""
    datasets = pytest.importorskip("datasets")
    asked: dict[str, Any] = {}
    rows = {
        "body": [*documents("abcdefgh"), *documents("0123456789"), None],
        "kind": ["a"] * 20 + ["n"] * 20 + ["n"],
        "number": list(range(41)),
    }

    def load(name: str, part: Any, split: str) -> Any:
        asked.update(name=name, part=part, split=split)
        if name != "owner/set":
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub\nand more lines")
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_data_set_of_the_hub_is_read_by_name(
    configure: Configure, data_set: dict[str, Any], tmp_path: Path
) -> None:
    config = configure(
        data__source="owner/set:part",
        data__text_field="body",
        data__domain_field="kind",
        data__split="validation",
        data__cache=str(tmp_path),
    )
    corpus = load_corpus(config.data)
    assert data_set == {"name": "owner/set", "part": "part", "split": "validation"}
    assert corpus.names == ("a", "n")
    texts = [t for d in corpus.domains for s in (d.train, d.held_out) for t in split(corpus, s)]
    assert sorted(filter(None, texts)) == sorted(documents("abcdefgh") + documents("0123456789"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data__source": "owner/sett"}, "owner/sett.*no file or folder here.*doesn't exist"),
        ({}, "no field 'text': there are body, kind, number"),
        ({"data__text_field": "number"}, "'number' is a int, not a text"),
    ],
    ids=["no such set", "no such field", "no text"],
)
def test_a_data_set_that_does_not_do_is_refused(
    configure: Configure,
    data_set: dict[str, Any],
    tmp_path: Path,
    values: dict[str, Any],
    said: str,
) -> None:
    config = configure(**{"data__source": "owner/set", "data__cache": str(tmp_path), **values})
    with pytest.raises(EquipoiseError, match=said) as stop:
        load_corpus(config.data)
    assert "\n" not in str(stop.value)

"""Text to tokens: a byte-level BPE, packed token streams by domain on disk, a held-out part of each.

Prepared once for a source and its settings, under `DataConfig.cache`, and memory-mapped from there.
A stream is document, end mark, document, end mark, ..., in an order drawn once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from equipoise.capture.text import Document, load_text, sources
from equipoise.errors import EquipoiseError, counted, nearest
from equipoise.lab.checks import SMALLEST_VOCABULARY
from equipoise.lab.config import DataConfig
from equipoise.lab.saving import saving

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = NDArray[np.uint16]
Say = Callable[[str], None]
BEGIN, END = "<|begin|>", "<|end|>"
SAMPLE = 1_000_000
"""Characters of each domain that the vocabulary is made from."""
EVERY = 20.0
"""Seconds between lines of progress."""
_FORMAT = 1
_MEANING = ("domains", "split", "text_field", "domain_field", "vocab_size", "held_out_tokens")


@dataclass(frozen=True)
class Domain:
    """One domain's tokens, memory-mapped: those trained on, and those held out."""

    name: str
    train: Ids
    held_out: Ids


@dataclass(frozen=True)
class Corpus:
    """Tokenized text by domain."""

    domains: tuple[Domain, ...]
    folder: Path
    digest: str
    """Of the text and all that its tokens depend on."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains, in order."""
        return tuple(domain.name for domain in self.domains)

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each token stands for, by its id; marks stand for none."""
        # A byte-level token has a letter for every byte.
        found = self.tokenizer().get_vocab().items()
        sizes = {number: 0 if token in (BEGIN, END) else len(token) for token, number in found}
        return np.array([sizes[number] for number in range(len(sizes))])


def load_corpus(config: DataConfig, say: Say = lambda _: None) -> Corpus:
    """The corpus of a config: from the cache, or read, tokenized and kept there.

    Raises EquipoiseError for a source that is not there, a domain that it does not have, and text
    that is too little for the vocabulary, the held-out part or one row.
    """
    digest = digest_of(config)
    folder = Path(config.cache) / digest
    if not (folder / "meta.json").exists():
        _prepare(config, folder, say)
    domains = _read(folder)
    for domain in domains:
        if len(domain.train) <= config.row_length:
            raise EquipoiseError(
                f"domain {domain.name!r} has {len(domain.train)} tokens to train on, not one row "
                f"of data.row_length={config.row_length}; give it more text or leave it out."
            )
    return Corpus(domains, folder, digest)


def _read(folder: Path) -> tuple[Domain, ...]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return tuple(
            Domain(
                entry["name"],
                np.load(_file(folder, entry["name"], "train"), mmap_mode="r"),
                np.load(_file(folder, entry["name"], "held-out"), mmap_mode="r"),
            )
            for entry in meta["domains"]
        )
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise EquipoiseError(
            f"{folder} holds tokens that cannot be read ({type(error).__name__}: {error}): remove it, "
            "and they are made again."
        ) from error


def digest_of(config: DataConfig) -> str:
    """Of the settings that tokens depend on, and of the text itself where it is in files.

    Of those files only that are read for the domains wanted: others may come and go.
    """
    hashed = hashlib.sha256()
    settings = {name: getattr(config, name) for name in _MEANING}
    hashed.update(json.dumps([_FORMAT, settings]).encode())
    root = Path(config.source).expanduser()
    if not root.exists():
        hashed.update(config.source.encode())
        return hashed.hexdigest()[:16]
    for domain, path, _ in sources(root):
        if config.domains and domain not in config.domains and path.suffix.lower() != ".jsonl":
            continue
        hashed.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        hashed.update(hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()[:16]


def _file(folder: Path, domain: str, part: str) -> Path:
    """A domain's name may hold what a file's may not, such as a slash."""
    return folder / f"{quote(domain, safe=' ')}.{part}.npy"


def _prepare(config: DataConfig, folder: Path, say: Say) -> None:
    texts = _by_domain(config)
    say(f"Making a vocabulary of {config.vocab_size} from {counted(len(texts), 'domain')}")
    tokenizer = train_tokenizer(texts, config.vocab_size)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        with saving(unfinished):
            unfinished.mkdir(parents=True, exist_ok=True)
            entries = [
                _write_domain(unfinished, name, documents, tokenizer, config, say)
                for name, documents in texts.items()
            ]
            tokenizer.save(str(unfinished / "tokenizer.json"))
            meta = {"settings": asdict(config), "domains": entries}
            (unfinished / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            _put(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _put(unfinished: Path, folder: Path) -> None:
    """Give a folder its name; another process may have been faster, or left half of one."""
    if folder.exists() and not (folder / "meta.json").exists():
        shutil.rmtree(folder)
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / "meta.json").exists():
            raise


def _write_domain(
    folder: Path,
    name: str,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    config: DataConfig,
    say: Say,
) -> dict[str, Any]:
    train, held_out = _streams(name, documents, tokenizer, config, say)
    np.save(_file(folder, name, "train"), train)
    np.save(_file(folder, name, "held-out"), held_out)
    say(f"  {name}: {len(train):,} tokens to train on, {len(held_out):,} held out")
    return {"name": name}


def _by_domain(config: DataConfig) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for document in _documents(config):
        texts.setdefault(document.domain, []).append(document.text)
    if not config.domains:
        return dict(sorted(texts.items()))
    for name in config.domains:
        if name not in texts:
            raise EquipoiseError(
                f"data.domains names {name!r}, which data.source={config.source!r} does not have: "
                f"there are {', '.join(sorted(texts))}.{nearest(name, texts)} An empty data.domains "
                "takes all."
            )
    return {name: texts[name] for name in config.domains}


def _documents(config: DataConfig) -> Sequence[Document]:
    if Path(config.source).expanduser().exists():
        return load_text(config.source, config.text_field, config.domain_field)
    from equipoise.lab.hub import load_dataset_text

    return load_dataset_text(config)


def train_tokenizer(texts: Mapping[str, Sequence[str]], vocab_size: int) -> Tokenizer:
    """Byte-level BPE from equally much of each domain; single digits are tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise EquipoiseError(
            f"data.vocab_size={vocab_size}: the text gives only {tokenizer.get_vocab_size()} tokens. "
            f"Give more text, or a vocabulary of {SMALLEST_VOCABULARY} to "
            f"{tokenizer.get_vocab_size()}."
        )
    return tokenizer


def _sample(texts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The beginning of every document, so that every file takes part."""
    for documents in texts.values():
        total = sum(len(text) for text in documents)
        share = min(1.0, SAMPLE / max(total, 1))
        for text in documents:
            if part := text[: max(1, round(len(text) * share))]:
                yield part


def _streams(
    name: str, documents: Sequence[str], tokenizer: Tokenizer, config: DataConfig, say: Say
) -> tuple[Ids, Ids]:
    """Tokens to train on, and tokens held out.

    Documents are shuffled; the first ones are held out until there are enough tokens, the last of
    them cut where it is far too long for that (a book) or nothing would be left to train on; what is
    cut off is trained on. Another copy of a document that is held out is dropped.
    """
    order = np.random.default_rng(0).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    held: list[Ids] = []
    train: list[Ids] = []
    seen: set[str] = set()
    missing = config.held_out_tokens
    told = time.monotonic()
    for done, (text, ids) in enumerate(zip(shuffled, _encoded(shuffled, tokenizer), strict=True)):
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            say(f"  {name}: {done:,} of {len(shuffled):,} documents tokenized")
        if missing <= 0 or text in seen:
            train += [ids] if text not in seen else []
            continue
        seen.add(text)
        cut = missing if len(ids) > 2 * missing else len(ids)
        held.append(ids[:cut])
        train.append(ids[cut:])
        missing -= cut
    if missing < 0 and not any(map(len, train)):
        train.append(held[-1][missing:])
        held[-1] = held[-1][:missing]
    rest = sum(map(len, train))
    if missing > 0 or rest == 0:
        raise EquipoiseError(
            f"domain {name!r} has {config.held_out_tokens - missing + rest:,} tokens; "
            f"data.held_out_tokens={config.held_out_tokens:,} leaves nothing to train on. Lower "
            "it, or leave the domain out with data.domains."
        )
    return np.concatenate(train), np.concatenate(held)


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Ids]:
    end = tokenizer.token_to_id(END)
    tokenizer.encode_special_tokens = True  # marks that stand in the text are text
    for start in range(0, len(texts), 64):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + 64])):
            yield np.array([*encoding.ids, end], dtype=np.uint16)


def tokenizer_for_transformers(corpus: Corpus, max_positions: int) -> Any:
    """The tokenizer as transformers saves and loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer(),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=max_positions,
    )

"""The text task: any documents, each with a domain, run through a model window by window.

A source is a file, a folder or a JSONL file. In text files a line `<|doc|>` stands between
documents.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.capture.encode import Encoded, context_length, encode_texts
from equipoise.capture.prompts import Span
from equipoise.capture.rows import Progress
from equipoise.errors import EquipoiseError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from equipoise.capture.scoring import Forward

SEPARATOR = "<|doc|>"
_SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}$", re.MULTILINE)
SUFFIXES = (".txt", ".text", ".md", ".jsonl")
_ASIDE = ("license", "licence", "notice", "provenance", "readme")
DEFAULT_WINDOW = 2048
_POOL = 64  # batches sorted by length together: bounds memory, keeps rows of like length together


@dataclass(frozen=True, slots=True)
class Document:
    """One text, its domain, and a name that is unique in its domain."""

    domain: str
    name: str
    text: str


def load_text(
    data: str | Path,
    field: str = "text",
    domain_field: str | None = None,
    *,
    limit: int | None = None,
) -> list[Document]:
    """Read documents; `limit` is the number per domain.

    A file is one domain, its stem. A folder's domains are its sub-folders, or the stems of its
    files where it has none; licence, provenance and readme files are left out. In JSONL each line
    is a document: its text in `field`, its domain in `domain_field` ("domain" when a line has it).
    Raises EquipoiseError, with the line number, for what cannot be read and for a source without a
    document.
    """
    if limit is not None and limit < 1:
        raise EquipoiseError(f"limit is {limit}; it must be at least 1 document per domain")
    root = Path(data).expanduser()
    seen: Counter[str] = Counter()
    documents = []
    for domain, path, prefix in sources(root):
        if limit is not None and path.suffix != ".jsonl" and seen[domain] >= limit:
            continue
        for document in _read(path, domain, prefix, field, domain_field):
            seen[document.domain] += 1
            if limit is None or seen[document.domain] <= limit:
                documents.append(document)
    return documents


def sources(root: Path) -> Iterator[tuple[str, Path, str]]:
    """Domain, file, and what the names of its documents begin with: all that `load_text` reads.

    A line of a JSONL file may name another domain than that of its file.
    """
    if root.is_file():
        yield root.stem, root, root.name
        return
    if not root.is_dir():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise EquipoiseError(
            f"{root} does not exist; --data takes a text file, a folder or a .jsonl file."
            f"{nearest(root.name, beside)}"
        )
    files = [path for path in sorted(root.rglob("*")) if _is_text(path)]
    if not files:
        raise EquipoiseError(f"{root} holds no text: no file ends in {', '.join(SUFFIXES)}")
    for path in files:
        domain, *below = path.relative_to(root).parts
        yield (domain, path, "/".join(below)) if below else (path.stem, path, path.name)


def _is_text(path: Path) -> bool:
    aside = path.name.startswith(".") or path.name.lower().startswith(_ASIDE)
    return path.is_file() and path.suffix.lower() in SUFFIXES and not aside


def _read(
    path: Path, domain: str, prefix: str, field: str, domain_field: str | None
) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EquipoiseError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix.lower() == ".jsonl":
        found = _json_lines(path, text, field, domain_field, domain)
    else:
        found = ((domain, part) for part in _split(text))
    empty = True
    for number, (its_domain, part) in enumerate(found):
        empty = False
        yield Document(its_domain, f"{prefix}:{number}", part)
    if empty:
        raise EquipoiseError(f"{path} is empty: it holds no document")


def _split(text: str) -> Iterator[str]:
    """Documents between separator lines, blank lines around them and empty ones left out."""
    for part in _SEPARATOR_LINE.split(text):
        if part := part.strip("\n"):
            yield part


def _json_lines(
    path: Path, text: str, field: str, domain_field: str | None, default: str
) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EquipoiseError(
                f"{where} is not JSON: {error.msg} (column {error.colno})"
            ) from error
        if not isinstance(row, dict):
            raise EquipoiseError(f"{where} is not a JSON object but a {type(row).__name__}")
        domain = _member(row, domain_field, where) if domain_field else row.get("domain", default)
        yield str(domain), _text_of(row, field, where)


def _member(row: dict[str, Any], field: str, where: str) -> Any:
    if field not in row:
        raise EquipoiseError(
            f"{where} has no field {field!r}; it has {', '.join(row) or 'none'}."
            f"{nearest(field, row)}"
        )
    return row[field]


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    text = _member(row, field, where)
    if not isinstance(text, str) or not text:
        raise EquipoiseError(f"{where}: {field!r} must be a text that is not empty, not {text!r}")
    return text


@dataclass
class TextRun:
    """What one call of `run_text` did."""

    documents: int = 0
    """Documents whose last window is done, those of the resumed trace counted."""
    windows: int = 0
    tokens: int = 0

    def add(self, windows: Sequence[_Window]) -> None:
        """Count a batch that has run."""
        self.documents += sum(window.last for window in windows)
        self.windows += len(windows)
        self.tokens += sum(len(window.ids) for window in windows)


@dataclass(frozen=True, slots=True)
class _Window:
    """Ids int32 [n] of a stretch of a document; `last` when the document ends here."""

    domain: str
    name: str
    ids: NDArray[np.int32]
    spans: tuple[Span, ...]
    last: bool


def run_text(
    model: Any,
    tokenizer: Any,
    recorder: Any,
    documents: Sequence[Document],
    batch_size: int = 8,
    max_length: int | None = None,
    *,
    progress: Progress | None = None,
) -> TextRun:
    """Run documents through a model in windows of at most `max_length` tokens, each from position
    0.

    `max_length` is by default the model's context, at most 2048. A window is one sequence with its
    domain, named after its document (and `#k` for the k-th of several). `progress` is told after
    every batch how many documents are done, of how many, the tokens and the seconds. Windows that
    the recorder has already are left out.
    """
    if batch_size < 1 or (max_length is not None and max_length < 1):
        raise EquipoiseError(
            f"batch size {batch_size} and max length {max_length}: both must be at least 1"
        )
    import torch

    from equipoise.capture.scoring import Forward

    limit = context_length(model.config, tokenizer)
    length = min(limit, DEFAULT_WINDOW) if max_length is None else max_length
    if length > limit:
        raise EquipoiseError(f"windows of {length} tokens do not fit the model's {limit}")
    run, forward, training = TextRun(), Forward(model), model.training
    recorder.manifest.meta.update(
        {
            "task": "text",
            "max_length": length,
            "batch_size": batch_size,
            "documents": len(documents),
        }
    )
    begin = time.monotonic()
    model.eval()
    try:
        with torch.no_grad():
            for pool in _pools(tokenizer, documents, batch_size, length):
                waiting = [w for w in pool if (w.domain, w.name) not in recorder.done]
                run.documents += sum(w.last for w in pool) - sum(w.last for w in waiting)
                for batch in _batches(waiting, batch_size):
                    _run_batch(forward, recorder, batch)
                    run.add(batch)
                    if progress is not None:
                        seconds = time.monotonic() - begin
                        progress(run.documents, len(documents), run.tokens, seconds)
    finally:
        model.train(training)
    return run


def _pools(
    tokenizer: Any, documents: Sequence[Document], batch_size: int, length: int
) -> Iterator[list[_Window]]:
    """Windows in document order, enough at a time for batches of similar length."""
    pool: list[_Window] = []
    for start in range(0, len(documents), batch_size):
        part = documents[start : start + batch_size]
        spans = [(("text", 0, len(document.text)),) for document in part]
        encoded = encode_texts(tokenizer, [document.text for document in part], spans)
        for document, tokens in zip(part, encoded, strict=True):
            pool += _cut(document, tokens, length)
        if len(pool) >= batch_size * _POOL:
            yield pool
            pool = []
    if pool:
        yield pool


def _cut(document: Document, encoded: Encoded, length: int) -> Iterator[_Window]:
    total = len(encoded.ids)
    for number, start in enumerate(range(0, total, length)):
        stop = min(start + length, total)
        name = document.name if total <= length else f"{document.name}#{number}"
        spans = tuple(
            (role, max(a, start) - start, min(b, stop) - start)
            for role, a, b in encoded.spans
            if a < stop and b > start
        )
        yield _Window(document.domain, name, encoded.ids[start:stop], spans, stop == total)


def _batches(windows: Sequence[_Window], size: int) -> Iterator[list[_Window]]:
    ordered = sorted(windows, key=lambda window: -len(window.ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _run_batch(forward: Forward, recorder: Any, windows: Sequence[_Window]) -> None:
    lengths = [len(window.ids) for window in windows]
    sequences = [
        recorder.add_sequence(domain=w.domain, name=w.name, tokens=len(w.ids), roles=w.spans)
        for w in windows
    ]
    with recorder.batch(sequences, [0] * len(windows), lengths, [0] * len(windows)):
        forward([window.ids for window in windows], [[length - 1] for length in lengths])
    for sequence in sequences:
        recorder.complete(sequence)

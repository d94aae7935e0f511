"""Read the parts of a trace: from a folder, or from record batches in memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from equipoise.errors import TraceError
from equipoise.trace.schema import (
    SEQUENCES_SCHEMA,
    Manifest,
    counts_schema,
    tokens_schema,
)


class Part(Protocol):
    """What one process wrote in one session: aligned windows of counts, token rows, sequences."""

    manifest: Manifest

    def counts(self) -> Iterator[pa.RecordBatch]:
        """One batch per window: see `counts_schema`."""

    def sequences(self) -> Iterator[pa.RecordBatch]:
        """One batch per window: see `SEQUENCES_SCHEMA`."""

    def tokens(self, stack: int, whole: bool = True) -> Iterator[pa.RecordBatch]:
        """One batch per window: see `tokens_schema`. Use a batch before asking for the next.

        `whole` says that most columns will be read, so that they may be fetched at once.
        """


@dataclass
class MemoryPart:
    """A part whose batches are in memory."""

    manifest: Manifest
    counts_batches: list[pa.RecordBatch] = field(default_factory=list)
    sequences_batches: list[pa.RecordBatch] = field(default_factory=list)
    tokens_batches: list[list[pa.RecordBatch]] = field(default_factory=list)
    """One list per stack; empty at level "counts"."""

    def counts(self) -> Iterator[pa.RecordBatch]:
        """See `Part`."""
        return iter(self.counts_batches)

    def sequences(self) -> Iterator[pa.RecordBatch]:
        """See `Part`."""
        return iter(self.sequences_batches)

    def tokens(self, stack: int, whole: bool = True) -> Iterator[pa.RecordBatch]:
        """See `Part`."""
        return iter(self.tokens_batches[stack])


class FilePart:
    """A part in a trace folder. Opening it checks every file; nothing is loaded yet."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._windows = self._check()

    def _schemas(self) -> dict[str, pa.Schema]:
        part, layers = self.manifest.part, self.manifest.layers
        schemas = {
            f"counts-{part}.arrow": counts_schema(layers),
            f"sequences-{part}.arrow": SEQUENCES_SCHEMA,
        }
        if self.manifest.level != "counts":
            for index, stack in enumerate(self.manifest.stacks):
                columns = [layer for layer in layers if layer.stack == stack]
                schemas[self.manifest.tokens_file(index)] = tokens_schema(
                    columns, self.manifest.level
                )
        return schemas

    def _check(self) -> int | None:
        """Check files against the manifest; number of whole windows, None where all are whole."""
        closed = bool(self.manifest.files)
        for name, schema in self._schemas().items():
            path = self.folder / name
            if not path.exists():
                if closed or name.startswith("counts"):
                    raise TraceError(f"{path} is missing; the manifest names it.")
                return 0
            if closed:
                self._check_size(path, self.manifest.files.get(name, {}).get("bytes"))
            self._check_schema(path, schema)
        if closed:
            return None
        return min(_whole_batches(self.folder / name) for name in self._schemas())

    def _check_size(self, path: Path, expected: int | None) -> None:
        size = path.stat().st_size
        if size != expected:
            verb = "truncated" if expected and size < expected else "changed"
            raise TraceError(
                f"{path} has {size} bytes and the manifest says {expected}: it was {verb} after it"
                " was written. Copy the trace again, or record again."
            )

    def _check_schema(self, path: Path, schema: pa.Schema) -> None:
        try:
            with pa.OSFile(str(path)) as source:
                found = pa.ipc.open_stream(source).schema
        except (pa.ArrowInvalid, OSError) as error:
            if not self.manifest.files:
                return  # killed before the header was whole: no window is
            raise TraceError(f"{path} is not an Arrow stream ({error}).") from None
        if not found.equals(schema):
            raise TraceError(
                f"{path} does not have the columns that {self.manifest.file_name} describes."
                " It belongs to another trace, or was written by other software."
            )

    def counts(self) -> Iterator[pa.RecordBatch]:
        """See `Part`."""
        return self._stream(f"counts-{self.manifest.part}.arrow")

    def sequences(self) -> Iterator[pa.RecordBatch]:
        """See `Part`."""
        return self._stream(f"sequences-{self.manifest.part}.arrow")

    def tokens(self, stack: int, whole: bool = True) -> Iterator[pa.RecordBatch]:
        """See `Part`."""
        return self._stream(self.manifest.tokens_file(stack), whole)

    def _stream(self, name: str, whole: bool = True) -> Iterator[pa.RecordBatch]:
        if self._windows == 0:
            return
        path = self.folder / name
        try:
            yield from islice(_mapped_batches(path, whole), self._windows)
        except (pa.ArrowInvalid, OSError) as error:
            raise TraceError(f"{path} is damaged: {error}") from None


def _whole_batches(path: Path) -> int:
    count = 0
    try:
        for _ in _mapped_batches(path):
            count += 1
    except (pa.ArrowInvalid, OSError, ValueError):
        pass  # the process died in the middle of this batch
    return count


_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ, which Python's mmap does not name: map pages without a fault each."""


def _mapped_batches(path: Path, whole: bool = False) -> Iterator[pa.RecordBatch]:
    """Batches of a stream, memory-mapped; pages are given back once a batch was used.

    Without that, reading a trace larger than memory would push everything else out of it.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    source = pa.BufferReader(pa.py_buffer(mapped))
    reader = pa.ipc.open_stream(source)
    start = 0
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        stop = source.tell() // mmap.PAGESIZE * mmap.PAGESIZE
        if whole:
            _advise(mapped, _POPULATE_READ, start, stop)
        yield batch
        _advise(mapped, getattr(mmap, "MADV_DONTNEED", None), start, stop)
        start = stop


def _advise(mapped: mmap.mmap, advice: int | None, start: int, stop: int) -> None:
    """Tell the system what to do with pages; one that does not know the advice goes on without."""
    if advice is not None and stop > start and hasattr(mapped, "madvise"):
        with suppress(OSError):
            mapped.madvise(advice, start, stop - start)

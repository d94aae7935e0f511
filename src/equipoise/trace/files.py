"""Write one part of a trace: three kinds of Arrow stream, a manifest, and a lock against a second writer."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from equipoise.errors import TraceError
from equipoise.lock import HeldError, Lock
from equipoise.trace.schema import (
    SEQUENCES_SCHEMA,
    Manifest,
    counts_schema,
    tokens_schema,
)

_OURS = re.compile(
    r"(trace(-r\d{5}(-s\d{3})?)?\.json|(counts|sequences)-r\d{5}(-s\d{3})?\.arrow"
    r"|tokens-r\d{5}(-s\d{3})?(-\d+)?\.arrow|writer-r\d{5}\.lock)(\.tmp)?"
)


@contextmanager
def clear_errors(folder: Path) -> Iterator[None]:
    """Turn the system's errors on a trace folder into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            advice = "the disk is full. Windows written before are safe: free space and go on with resume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "the folder may not be written to. Choose another one"
        else:
            advice = f"{error.strerror or error}"
        raise TraceError(f"Cannot write the trace {folder}: {advice}.") from error


def prepare_folder(folder: Path, force: bool, rank: int = 0, world_size: int = 1) -> None:
    """Make the folder, or empty the trace in it with `force`; other people's files stay.

    Each rank looks after its own files; rank 0 also after those of ranks that are no more.
    """
    with clear_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise TraceError(f"{folder} is a file; a trace is a folder. Choose another name.")
        folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]
        foreign = sorted(name for name in names if not _OURS.fullmatch(name))
        if foreign:
            raise TraceError(
                f"{folder} holds files that are no trace ({foreign[0]}): choose another folder."
            )
        mine = [
            n for n in names if _rank_of(n) == rank or (rank == 0 and _rank_of(n) >= world_size)
        ]
        if mine and not force:
            raise TraceError(
                f"{folder} holds a trace already. Use force to overwrite it, resume to go on with"
                " an unfinished one, or choose another name."
            )
        for name in mine:
            (folder / name).unlink()


def _rank_of(name: str) -> int:
    found = re.search(r"r(\d{5})", name)
    return int(found.group(1)) if found else 0


def lock_part(folder: Path, rank: int) -> Lock:
    """Keep other writers of a rank's part out of a trace folder, which is made."""
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return Lock(folder / f"writer-r{rank:05d}.lock", folder)
        except HeldError as error:
            raise TraceError(str(error)) from None


class PartWriter:
    """Append windows to the files of one part. A window is one record batch in each of its files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._totals = _Totals(manifest)
        self._streams: dict[str, tuple[pa.OSFile, pa.RecordBatchStreamWriter]] = {}
        with clear_errors(folder):
            self.write_manifest()
            self._open(f"counts-{manifest.part}.arrow", counts_schema(manifest.layers))
            self._open(f"sequences-{manifest.part}.arrow", SEQUENCES_SCHEMA)
            if manifest.level != "counts":
                for index, stack in enumerate(manifest.stacks):
                    layers = [layer for layer in manifest.layers if layer.stack == stack]
                    schema = tokens_schema(layers, manifest.level)
                    self._open(manifest.tokens_file(index), schema)

    def _open(self, name: str, schema: pa.Schema) -> None:
        sink = pa.OSFile(str(self.folder / name), "wb")
        self._streams[name] = (sink, pa.ipc.new_stream(sink, schema))

    def write_window(
        self, counts: pa.RecordBatch, sequences: pa.RecordBatch, tokens: list[pa.RecordBatch]
    ) -> None:
        """Append one window; `tokens` has one batch per stack, none at level "counts".

        Counts go last: readers of an unfinished part take no more windows than every file holds.
        """
        part = self.manifest.part
        with clear_errors(self.folder):
            self._write(f"sequences-{part}.arrow", sequences)
            for index, batch in enumerate(tokens):
                self._write(self.manifest.tokens_file(index), batch)
            self._write(f"counts-{part}.arrow", counts)
        self._totals.add(counts, tokens)

    def _write(self, name: str, batch: pa.RecordBatch) -> None:
        sink, stream = self._streams[name]
        stream.write_batch(batch)
        sink.flush()

    def write_manifest(self) -> None:
        """Replace the manifest in one step, so that a reader sees the old one or the new one."""
        path = self.folder / self.manifest.file_name
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.manifest.to_json(), encoding="utf-8")
        temporary.replace(path)

    def close(self, status: str) -> None:
        """Close the files and write totals, sizes and `status` into the manifest."""
        with clear_errors(self.folder):
            for name, (sink, stream) in self._streams.items():
                stream.close()
                sink.close()
                size = (self.folder / name).stat().st_size
                self.manifest.files[name] = {"bytes": size, "batches": self._totals.windows}
            self.manifest.status = status
            self.manifest.totals = self._totals.as_dict()
            self.write_manifest()

    def abandon(self) -> None:
        """Close the files as they are, after an error; what was written stays readable."""
        for sink, _ in self._streams.values():
            sink.close()


class _Totals:
    def __init__(self, manifest: Manifest) -> None:
        layers = len(manifest.layers)
        self.windows = 0
        self.rows = 0
        self.tokens_L = np.zeros(layers, np.int64)
        self.unrouted_L = np.zeros(layers, np.int64)

    def add(self, counts: pa.RecordBatch, tokens: list[pa.RecordBatch]) -> None:
        self.windows += 1
        self.rows += tokens[0].num_rows if tokens else 0
        self.tokens_L += list_column(counts, "tokens").sum(0, dtype=np.int64)
        self.unrouted_L += list_column(counts, "unrouted").sum(0, dtype=np.int64)

    def as_dict(self) -> dict[str, Any]:
        return {
            "windows": self.windows,
            "rows": self.rows,
            "tokens": self.tokens_L.tolist(),
            "unrouted": self.unrouted_L.tolist(),
        }


def list_column(batch: pa.RecordBatch, name: str) -> np.ndarray[Any, Any]:
    """A fixed-size-list column as a 2-D array [rows, list size], without a copy."""
    column = batch.column(name)
    size, dtype = _list_type(column.type)
    rows = len(column)
    data = column.buffers()[-1]
    if data is None or not size:
        return np.empty((rows, size), dtype)
    offset = column.offset * size * dtype.itemsize
    return np.frombuffer(data, dtype, rows * size, offset).reshape(rows, size)


@cache
def _list_type(type_: pa.DataType) -> tuple[int, np.dtype[Any]]:
    return type_.list_size, np.dtype(type_.value_type.to_pandas_dtype())


def list_array(values: np.ndarray[Any, Any], type_: pa.DataType) -> pa.Array:
    """The reverse of `list_column`: a 2-D array as a fixed-size-list column, without a copy."""
    if type_.list_size == 0:  # a dense model's trace: rows without layers
        return pa.array([[]] * len(values), type=type_)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=type_)

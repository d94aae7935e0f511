"""Open a folder's parts as one trace, and write a trace or a view of it as one part."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from equipoise.errors import TraceError
from equipoise.trace.batches import Rows, tokens_batch
from equipoise.trace.files import Lock, PartWriter, list_array, list_column, prepare_folder
from equipoise.trace.parts import FilePart, Part
from equipoise.trace.schema import Layer, Manifest, counts_schema
from equipoise.trace.trace import TokenBatch, Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MANIFEST = re.compile(r"trace(-r\d{5}(-s\d{3})?)?\.json")


def read_manifests(folder: Path) -> list[Manifest]:
    """Every manifest of a trace folder, by rank and session. Raises TraceError if there is none."""
    if not folder.exists():
        raise TraceError(f"No trace at {folder}: the folder does not exist.")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    manifests = [
        Manifest.from_json(_read(folder / name), str(folder / name))
        for name in names
        if _MANIFEST.fullmatch(name)
    ]
    if not manifests:
        raise TraceError(f"{folder} is not a trace: it holds no trace.json.")
    return sorted(manifests, key=lambda m: (m.rank, m.session))


def open_trace(path: str | Path) -> Trace:
    """Read the trace at `path`, all its parts merged. A killed run opens up to its last window.

    Raises:
        TraceError: not a trace, damaged, of another version, or parts of different runs.
    """
    folder = Path(path)
    manifests = read_manifests(folder)
    first = manifests[0]
    for other in manifests[1:]:
        for what in ("layers", "level", "run", "world_size"):
            repeats = what == "level" and other.data_rank != other.rank
            if getattr(other, what) != getattr(first, what) and not repeats:
                raise TraceError(
                    f"{folder}: {first.file_name} and {other.file_name} differ in {what}, so they"
                    " are not of one run. Keep each run in its own folder."
                )
    parts = [FilePart(folder, manifest) for manifest in manifests]
    _check_replicas(folder, parts)
    trace = Trace(parts, folder)
    _check_totals(folder, parts)
    return trace


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from None


def _check_totals(folder: Path, parts: list[FilePart]) -> None:
    for part in parts:
        totals = part.manifest.totals
        if not totals:
            continue
        tokens_L = np.zeros(len(part.manifest.layers), np.int64)
        for batch in part.counts():
            tokens_L += list_column(batch, "tokens").sum(0, dtype=np.int64)
        if tokens_L.tolist() != totals["tokens"]:
            raise TraceError(
                f"{folder}: the counts of part {part.manifest.part} do not add up to the totals in"
                f" {part.manifest.file_name}: one of them was changed."
            )


def _check_replicas(folder: Path, parts: list[FilePart]) -> None:
    """Ranks that saw the same tokens must have counted the same."""
    leaders = {(p.manifest.rank, p.manifest.session): p for p in parts}
    for part in parts:
        manifest = part.manifest
        if manifest.data_rank == manifest.rank or manifest.status != "complete":
            continue
        leader = leaders.get((manifest.data_rank, manifest.session))
        if leader is None:
            raise TraceError(
                f"{folder}: the files of rank {manifest.data_rank} are missing; rank"
                f" {manifest.rank} only repeats them."
            )
        if leader.manifest.status == "complete" and not np.array_equal(
            _cells(part), _cells(leader)
        ):
            raise TraceError(
                f"{folder}: ranks {manifest.data_rank} and {manifest.rank} are said to see the same"
                " tokens (tensor parallel) but counted different experts: they did not see the"
                " same, or the model is out of step."
            )


def _cells(part: Part) -> NDArray[np.int64]:
    cells = np.zeros(sum(layer.experts for layer in part.manifest.layers), np.int64)
    for batch in part.counts():
        cells += list_column(batch, "counts").sum(0, dtype=np.int64)
    return cells


def save(trace: Trace, folder: Path, force: bool) -> Path:
    """Write a trace or a view as one part; `Trace.save`."""
    if trace.path is not None and folder.resolve() == Path(trace.path).resolve():
        raise TraceError(f"{folder} is the trace being read: save under another name.")
    layers = trace.layers
    first = trace._parts[0].manifest
    hidden = {
        "level",
        "every",
        "status",
        "missing_ranks",
        "window_tokens",
        "world_size",
        "sessions",
    }
    meta = {key: value for key, value in trace.meta.items() if key not in hidden}
    manifest = Manifest(
        layers, first.level, first.every, first.window_tokens, meta=meta, run=first.run
    )
    lock = Lock(folder, 0)
    try:
        prepare_folder(folder, force)
        writer = PartWriter(folder, manifest)
        sequences = trace.sequences.combine_chunks()
        table = sequences.to_batches()[0] if sequences.num_rows else _no_rows(sequences.schema)
        for counts, tokens in _windows(trace, layers):
            writer.write_window(counts, table, tokens)
            table = table.slice(0, 0)
        writer.close(trace.meta["status"])
    finally:
        lock.release()
    return folder


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)


def _windows(
    trace: Trace, layers: tuple[Layer, ...]
) -> Iterator[tuple[pa.RecordBatch, list[pa.RecordBatch]]]:
    """Counts and token rows of each window, narrowed to the view."""
    schema = counts_schema(layers)
    pick = list(trace._view.layers)
    stacks = list(dict.fromkeys(layer.stack for layer in layers))
    sources = [_aligned(trace, stack) for stack in stacks] if trace.has_rows else []
    for window, (part, batch) in enumerate(trace._filtered_counts()):
        stored = part.manifest.layers
        edges = np.cumsum([0, *(layer.experts for layer in stored)])
        cells = list_column(batch, "counts")
        kept = [cells[:, edges[i] : edges[i + 1]] for i in pick]
        columns = {
            "window": pa.array(np.full(batch.num_rows, window, np.int32)),
            "counts": list_array(
                np.concatenate(kept, 1) if kept else cells[:, :0], schema.field("counts").type
            ),
        }
        for name in ("tokens", "unrouted"):
            columns[name] = list_array(list_column(batch, name)[:, pick], schema.field(name).type)
        arrays = [columns.get(f.name, batch.column(f.name)) for f in schema]
        counts = pa.RecordBatch.from_arrays(arrays, schema=schema)
        yield counts, [next(source) for source in sources]


def _aligned(trace: Trace, stack: str) -> Iterator[pa.RecordBatch]:
    """One tokens batch per window, empty ones included, which `Trace.batches` leaves out."""
    layers = [layer for layer in trace.layers if layer.stack == stack]
    indices = [i for i, layer in enumerate(trace.layers) if layer.stack == stack]
    level = trace.meta["level"]
    for _, reader in trace._readers():
        for found in reader.batches(stack):
            yield tokens_batch(_rows(found, indices), layers, level)


def _rows(batch: TokenBatch, indices: list[int]) -> Rows:
    return Rows(
        batch.sequence_T,
        batch.position_T,
        batch.phase_T,
        batch.role_T,
        np.zeros(len(batch.sequence_T), np.int64),
        [batch.ids[i] for i in indices],
        [batch.weights[i] for i in indices] if batch.weights else None,
        [batch.margins[i] for i in indices] if batch.margins else None,
    )

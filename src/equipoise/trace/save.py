"""Write a trace, or a view of it, as one part into a new folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from equipoise.errors import TraceError
from equipoise.trace.batches import Rows, tokens_batch
from equipoise.trace.files import PartWriter, list_array, list_column, lock_part, prepare_folder
from equipoise.trace.schema import Layer, Manifest, counts_schema

if TYPE_CHECKING:
    from equipoise.trace.rows import TokenBatch
    from equipoise.trace.trace import Trace


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
    lock = lock_part(folder, 0)
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

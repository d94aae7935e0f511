"""Count the stored token rows of a part again: all layers of a record batch in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from equipoise.metrics.counting import count_columns, count_ids
from equipoise.trace.files import list_column
from equipoise.trace.schema import Layer, tokens_schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equipoise.trace.parts import Part

    Array = NDArray[Any]


def recount(part: Part, layers: Sequence[Layer], counts_LE: Array) -> None:
    """Add the selections of all stored rows of the part to counts_LE, a row for each of `layers`.

    Raises EquipoiseError for an impossible id.
    """
    for index, stack in enumerate(part.manifest.stacks):
        here = [row for row, layer in enumerate(layers) if layer.stack == stack]
        if here:
            stored = [layer for layer in part.manifest.layers if layer.stack == stack]
            schema = tokens_schema(stored, part.manifest.level)
            columns = _Columns(schema, [layers[row] for row in here])
            found_LE = np.zeros((len(here), counts_LE.shape[1]), np.int64)
            whole = 2 * len(here) > len(stored) and part.manifest.level != "full"
            for batch in part.tokens(index, whole):
                columns.count(batch, found_LE)
            counts_LE[here] += found_LE


class _Columns:
    """The columns of some layers in the batches of a stack."""

    def __init__(self, schema: pa.Schema, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._positions = [schema.get_field_index(layer.name) for layer in layers]
        self._experts_L = np.array([layer.experts for layer in layers], np.int64)
        self._top_k_L = np.array([layer.top_k for layer in layers], np.int64)
        self._dtypes = {np.dtype(layer.id_dtype) for layer in layers}

    def count(self, batch: pa.RecordBatch, counts_LE: Array) -> None:
        """Add the selections of one batch to counts_LE."""
        rows: Sequence[int] = range(len(self._layers))
        stretch = self._stretch(batch)
        if stretch is not None:
            memory, start_L = stretch
            size_L = batch.num_rows * self._top_k_L
            wrong = count_columns(memory, start_L, size_L, self._experts_L, counts_LE)
            rows = [] if wrong is None else [wrong]  # counted again below, to say what is wrong
        for row in rows:
            layer = self._layers[row]
            ids_TK = list_column(batch, layer.name)
            count_ids(ids_TK, layer.experts, counts_LE[row, : layer.experts])

    def _stretch(self, batch: pa.RecordBatch) -> tuple[Array, Array] | None:
        """The memory that all columns lie in and where they start in it, in ids.

        So it is where a batch was read from a file; None where columns were made one by one, or
        differ in width.
        """
        columns = [batch.column(position) for position in self._positions]
        buffers = [column.buffers()[-1] for column in columns]
        body = buffers[0].parent if buffers[0] else None
        if body is None or len(self._dtypes) > 1:
            return None
        (dtype,) = self._dtypes
        parents = [buffer.parent if buffer else None for buffer in buffers]
        if any(parent is None or parent.address != body.address for parent in parents):
            return None
        offset_L = np.array([column.offset for column in columns], np.int64) * self._top_k_L
        byte_L = np.array([buffer.address - body.address for buffer in buffers], np.int64)
        if (byte_L % dtype.itemsize).any():
            return None
        memory = np.frombuffer(body, dtype, body.size // dtype.itemsize)
        return memory, byte_L // dtype.itemsize + offset_L

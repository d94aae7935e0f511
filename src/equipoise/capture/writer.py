"""The writer thread: takes full arenas, counts and stores them, and gives them back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from equipoise.capture._kernels import narrow
from equipoise.capture.buffers import Arena, Block, Pass
from equipoise.capture.passes import RowInfo, RunSequence, unknown_rows
from equipoise.errors import RoutingError
from equipoise.trace.batches import Labels, Rows, counts_batch, tokens_batch
from equipoise.trace.files import PartWriter
from equipoise.trace.schema import SEQUENCES_SCHEMA, Layer, Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ARENAS = 3
"""One being filled, one being written, one between them: memory is bounded whatever the run."""


class WriterThread:
    """Writes windows in order, behind the model's back; its first error is raised in the model's."""

    def __init__(self, part: PartWriter, pinned: bool) -> None:
        self._part, self.manifest = part, part.manifest
        self._full: queue.Queue[Arena | None] = queue.Queue(ARENAS + 1)
        self._free: queue.Queue[Arena] = queue.Queue(ARENAS)
        self.arena = Arena(pinned)
        """The window that is being filled."""
        for _ in range(ARENAS - 1):
            self._free.put(Arena(pinned))
        self._error: BaseException | None = None
        self._windows = _Windows(part.manifest)
        self.tokens = 0
        self._thread = threading.Thread(target=self._run, name="equipoise-writer", daemon=True)
        self._thread.start()

    def rotate(self) -> list[RunSequence]:
        """Hand over the window if it has enough rows; returns the sequences that went with it.

        Called between passes. Waits while the disk is behind; raises the writer's error, if any.
        """
        self.check()
        if self.arena.rows < self.manifest.window_tokens:
            return []
        gone = self.arena.sequences
        self._full.put(self.arena)
        self.arena = self._free.get()
        self.check()
        return gone

    def check(self) -> None:
        """Raise the writer's error, if it has one."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Hand over the last window and wait until all is written. Raises the writer's error."""
        self._full.put(self.arena)
        self._full.put(None)
        self._thread.join()
        self.check()

    def _run(self) -> None:
        while (arena := self._full.get()) is not None:
            try:
                if self._error is None:
                    self._write(arena)
            except BaseException as error:
                self._error = error
            arena.clear()
            self._free.put(arena)

    def _write(self, arena: Arena) -> None:
        counts, sequences, tokens, rows = self._windows.build(arena)
        self._part.write_window(counts, sequences, tokens)
        self.tokens += rows


class _Windows:
    """From an arena to record batches."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._layers = manifest.layers
        stacks = manifest.stacks or ("",)
        self._stacks = [
            [i for i, layer in enumerate(self._layers) if layer.stack == stack] for stack in stacks
        ]
        self._index = 0

    def build(
        self, arena: Arena
    ) -> tuple[pa.RecordBatch, pa.RecordBatch, list[pa.RecordBatch], int]:
        """Counts, sequences, token rows by stack, and the number of rows counted."""
        for one in arena.passes:
            one.wait()
        labels: dict[Labels, int] = {(None, None, None): 0}
        stacks = [self._rows(arena.passes, indices, labels) for indices in self._stacks]
        counts = counts_batch(self._index, stacks, self._layers, list(labels))
        tokens = []
        if self._manifest.level != "counts" and self._layers:
            for rows, indices in zip(stacks, self._stacks, strict=True):
                kept = rows.take(rows.sequence_T % self._manifest.every == 0)
                layers = [self._layers[i] for i in indices]
                tokens.append(tokens_batch(kept, layers, self._manifest.level))
        self._index += 1
        return counts, sequences_batch(arena.sequences), tokens, len(stacks[0])

    def _rows(self, passes: Sequence[Pass], indices: list[int], labels: dict[Labels, int]) -> Rows:
        """The kept rows of one stack (these layers) in all passes of the window."""
        taken = []
        for one in passes:
            blocks = [one.blocks[i] for i in indices if i in one.blocks]
            if blocks or not indices:
                stack = self._layers[indices[0]].stack if indices else ""
                info = _describe(one, blocks[0].rows if blocks else None, stack)
                label_T = _labels_of(info, one.describe.sequences, labels)
                taken.append((info, label_T, blocks))
        kept = [int(info.keep_T.sum()) for info, _, _ in taken]
        edges = np.cumsum([0, *kept])
        full = self._manifest.level == "full"
        rows = _empty_rows(int(edges[-1]), [self._layers[i] for i in indices], full)
        for (info, label_T, blocks), start, stop in zip(taken, edges[:-1], edges[1:], strict=True):
            keep_T, here = info.keep_T, slice(start, stop)
            for name in ("sequence_T", "position_T", "phase_T", "role_T"):
                getattr(rows, name)[here] = getattr(info, name)[keep_T]
            rows.label_T[here] = label_T[keep_T]
            for position, (index, block) in enumerate(zip(indices, blocks, strict=True)):
                self._fill(rows, position, self._layers[index], block, keep_T, here)
        return rows

    def _fill(
        self, rows: Rows, position: int, layer: Layer, block: Block, keep_T: Array, here: slice
    ) -> None:
        ids_TK = block.ids.numpy()
        if len(ids_TK) != len(keep_T):
            raise RoutingError(
                f"Layer {layer.layer} ({layer.path}) routed {len(ids_TK)} rows in a pass in which its"
                f" stack routed {len(keep_T)}: its rows cannot be told apart, so nothing more is"
                " recorded."
            )
        wrong = narrow(ids_TK, keep_T, layer.experts, rows.ids[position][here])
        if wrong >= 0:
            raise RoutingError(
                f"Layer {layer.layer} ({layer.path}) routed to expert {_impossible(ids_TK[wrong], layer)};"
                f" it has experts 0 to {layer.experts - 1}. The model, or the code that runs it, is"
                " not what its config says: nothing more is recorded."
            )
        if block.floats is None:
            return
        floats = block.floats.numpy()[keep_T]
        width = 1 if rows.weights is None else layer.top_k
        if np.isnan(floats[:, :width]).any():
            raise RoutingError(
                f"NaN in the routing weights of layer {layer.layer} ({layer.path}): the model's"
                " numbers are broken there or in a layer before (dtype overflow, bad weights), and"
                " its choices mean nothing. Try another dtype."
            )
        if rows.weights is not None:
            assert rows.margins is not None
            rows.weights[position][here] = floats[:, :width]
            rows.margins[position][here] = floats[:, width]


def _impossible(ids_K: Array, layer: Layer) -> int:
    return int(ids_K[(ids_K < -1) | (ids_K >= layer.experts)][0])


def _describe(one: Pass, rows: int | None, stack: str) -> RowInfo:
    describe, shape = one.describe, one.shape
    if "decoder" in stack and one.decoder is not None:
        describe, shape = one.decoder
    if shape is not None and rows in (None, shape[0] * shape[1]):
        return describe.rows(shape)
    sequences = describe.sequences
    return unknown_rows(rows or 0, sequences[0].number if len(sequences) == 1 else None)


def _labels_of(info: RowInfo, sequences: Sequence[RunSequence], labels: dict[Labels, int]) -> Array:
    """The label number of each row; new labels are added to `labels`."""
    number_of = {s.number: labels.setdefault(s.labels, len(labels)) for s in sequences}
    label_T = np.zeros(len(info.sequence_T), np.int64)
    if not any(number_of.values()):
        return label_T
    if len(set(number_of.values())) == 1:
        known = np.isin(info.sequence_T, list(number_of))
        label_T[known] = next(iter(number_of.values()))
        return label_T
    for number, label in number_of.items():
        label_T[info.sequence_T == number] = label
    return label_T


def _empty_rows(count: int, layers: Sequence[Layer], full: bool) -> Rows:
    return Rows(
        np.empty(count, np.uint32),
        np.empty(count, np.uint32),
        np.empty(count, np.uint8),
        np.empty(count, np.uint8),
        np.empty(count, np.int64),
        [np.empty((count, layer.top_k), layer.id_dtype) for layer in layers],
        [np.empty((count, layer.top_k), np.float32) for layer in layers] if full else None,
        [np.empty(count, np.float32) for _ in layers] if full else None,
    )


def sequences_batch(sequences: Sequence[RunSequence]) -> pa.RecordBatch:
    """Sequences as a record batch of SEQUENCES_SCHEMA."""
    columns = []
    values: list[Any]
    for column in SEQUENCES_SCHEMA:
        if column.name == "sequence":
            values = [s.number for s in sequences]
        else:
            values = [s.values.get(column.name) for s in sequences]
        columns.append(pa.array(values, column.type))
    return pa.RecordBatch.from_arrays(columns, schema=SEQUENCES_SCHEMA)

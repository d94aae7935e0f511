"""Preallocated memory between the hooks and the writer thread, and what lies in it.

A hook copies ids (as int32, so that no id wraps) straight into host memory when the model runs
there, else into device memory that travels to the host once per forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from equipoise.capture.passes import RowInfo, RunSequence

_FIRST_SIZE = 1 << 20


class Describes(Protocol):
    """Says what the rows of a pass are: a runner's `Batch`, or what was `Inferred`."""

    @property
    def sequences(self) -> Sequence[RunSequence]:
        """The sequence of each row of the batch."""

    def rows(self, shape: tuple[int, int]) -> RowInfo:
        """The rows of a pass of `shape` [B, S]."""


@dataclass
class Slot:
    """A piece of memory: `size` numbers from `start` of a chunk."""

    chunk: int
    start: int
    size: int


class Memory:
    """Numbers of one type on one device, given out piece by piece and emptied all at once."""

    def __init__(self, dtype: torch.dtype, device: torch.device, pinned: bool = False) -> None:
        self._options: dict[str, Any] = {"dtype": dtype, "device": device, "pin_memory": pinned}
        self.chunks: list[Tensor] = []
        self._used = 0

    def take(self, size: int) -> Slot:
        """Room for `size` numbers; earlier pieces stay where they are."""
        if not self.chunks or self._used + size > len(self.chunks[-1]):
            grown = 2 * len(self.chunks[-1]) if self.chunks else _FIRST_SIZE
            self.chunks.append(torch.empty(max(grown, 2 * size), **self._options))
            self._used = 0
        slot = Slot(len(self.chunks) - 1, self._used, size)
        self._used += size
        return slot

    def view(self, slot: Slot) -> Tensor:
        """The numbers of a piece, flat."""
        return self.chunks[slot.chunk][slot.start : slot.start + slot.size]

    def filled(self) -> list[Slot]:
        """What was given out, chunk by chunk."""
        sizes = [len(chunk) for chunk in self.chunks[:-1]] + [self._used]
        return [Slot(i, 0, size) for i, size in enumerate(sizes[: len(self.chunks)])]

    def clear(self) -> None:
        """Take everything back; keeps the largest chunk, so that sizes settle."""
        self.chunks = self.chunks[-1:]
        self._used = 0


@dataclass
class Block:
    """What one router decided in one pass: ids [rows, K] and, by level, floats."""

    rows: int
    ids: Tensor
    """int32 [rows, K]."""
    floats: Tensor | None = None
    """float32: level "full" [rows, K + 1], weights and margin; the check of a stack's last layer
    [rows, 1], its sum of weights, which is NaN where anything before it was; else None."""


@dataclass
class Pass:
    """One forward pass: what each router decided, and how to tell what its rows are."""

    describe: Describes
    shape: tuple[int, int] | None
    blocks: dict[int, Block] = field(default_factory=dict)
    """Position in the trace's layers -> block."""
    decoder: tuple[Describes, tuple[int, int]] | None = None
    """How to tell the rows of a decoder that has tokens of its own, beside an encoder's."""
    events: list[Any] = field(default_factory=list)
    prepared: dict[int, Block] = field(default_factory=dict)
    """Blocks of routers that are expected on the same device, with the same rows."""

    def wait(self) -> None:
        """Until the copies to the host are done."""
        for event in self.events:
            event.synchronize()


class Arena:
    """Host memory of one window, and the passes and sequences in it."""

    def __init__(self, pinned: bool) -> None:
        host = torch.device("cpu")
        self.ids = Memory(torch.int32, host, pinned)
        self.floats = Memory(torch.float32, host, pinned)
        self.clear()

    def blocks(self, rows: int, top_k: Sequence[int]) -> list[Block]:
        """Blocks in host memory for routers that run there and see the same rows."""
        return [Block(rows, ids) for _, ids in _pieces(self.ids, rows, top_k)]

    def add_floats(self, block: Block, width: int) -> None:
        """Room for `width` floats per row in a block."""
        flat = self.floats.view(self.floats.take(block.rows * width))
        block.floats = flat.view(block.rows, width)

    def clear(self) -> None:
        """Empty the arena for its next window."""
        self.passes: list[Pass] = []
        self.sequences: list[RunSequence] = []
        self.numbers: set[int] = set()
        """Of the sequences."""
        self.rows = 0
        self.ids.clear()
        self.floats.clear()


class Staging:
    """Memory on one accelerator for the pass that runs, and its one copy to the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ids = Memory(torch.int32, device)
        self.floats = Memory(torch.float32, device)
        self._pending: list[tuple[Block, Slot]] = []
        self._extra: list[tuple[Block, Slot]] = []

    def blocks(self, rows: int, top_k: Sequence[int]) -> list[Block]:
        """Blocks in device memory for routers that see the same rows; `send` moves them."""
        found = []
        for slot, ids in _pieces(self.ids, rows, top_k):
            found.append(Block(rows, ids))
            self._pending.append((found[-1], slot))
        return found

    def add_floats(self, block: Block, width: int) -> None:
        """Room for `width` floats per row in a block."""
        slot = self.floats.take(block.rows * width)
        block.floats = self.floats.view(slot).view(block.rows, width)
        self._extra.append((block, slot))

    def send(self, arena: Arena) -> Any:
        """Start the copy of this pass to the host; returns an event, or None if it is done.

        The next pass may write over the device memory at once: the stream keeps the order.
        """
        ids = _send(self.ids, arena.ids)
        floats = _send(self.floats, arena.floats)
        for block, slot in self._pending:
            host = ids[slot.chunk][slot.start : slot.start + slot.size]
            block.ids = host.view(block.ids.shape)
        for block, slot in self._extra:
            assert block.floats is not None
            host = floats[slot.chunk][slot.start : slot.start + slot.size]
            block.floats = host.view(block.floats.shape)
        self._extra = []
        self._pending = []
        self.ids.clear()
        self.floats.clear()
        return _event(self.device)


def _send(source: Memory, target: Memory) -> list[Tensor]:
    hosts = []
    for slot in source.filled():
        host = target.view(target.take(slot.size))
        host.copy_(source.view(slot), non_blocking=True)
        hosts.append(host)
    return hosts


def _event(device: torch.device) -> Any:
    if device.type == "cuda":
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event
    module = getattr(torch, device.type, None)
    if module is not None and hasattr(module, "synchronize"):
        module.synchronize()
    return None


def _pieces(memory: Memory, rows: int, top_k: Sequence[int]) -> list[tuple[Slot, Tensor]]:
    """A piece [rows, K] for each router, from one stretch of memory."""
    whole = memory.take(rows * sum(top_k))
    sizes = [rows * k for k in top_k]
    starts = accumulate(sizes, initial=whole.start)
    slots = [Slot(whole.chunk, at, size) for at, size in zip(starts, sizes, strict=False)]
    flat = memory.view(whole)
    if len(set(top_k)) == 1:
        views = flat.view(len(top_k), rows, top_k[0]).unbind(0)
    else:
        views = tuple(v.view(rows, k) for v, k in zip(torch.split(flat, sizes), top_k, strict=True))
    return list(zip(slots, views, strict=True))

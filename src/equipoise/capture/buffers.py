"""Preallocated memory between the hooks and the writer thread, and what lies in it.

A hook copies ids (as int32, so that no id wraps) straight into host memory when the model runs
there, else into device memory that travels to the host once per forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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

    def clear(self) -> None:
        """Empty the arena for its next window."""
        self.passes: list[Pass] = []
        self.sequences: list[RunSequence] = []
        self.rows = 0
        self.ids.clear()
        self.floats.clear()


class Staging:
    """Memory on one accelerator for the pass that runs, and its one copy to the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ids = Memory(torch.int32, device)
        self.floats = Memory(torch.float32, device)
        self._pending: list[tuple[Block, Slot, Slot | None]] = []

    def block(self, rows: int, top_k: int, floats: int) -> Block:
        """A block in device memory; `send` moves it."""
        ids = self.ids.take(rows * top_k)
        extra = self.floats.take(rows * floats) if floats else None
        block = Block(rows, self.ids.view(ids).view(rows, top_k))
        if extra is not None:
            block.floats = self.floats.view(extra).view(rows, floats)
        self._pending.append((block, ids, extra))
        return block

    def send(self, arena: Arena) -> Any:
        """Start the copy of this pass to the host; returns an event, or None if it is done.

        The next pass may write over the device memory at once: the stream keeps the order.
        """
        ids = _send(self.ids, arena.ids)
        floats = _send(self.floats, arena.floats)
        for block, slot, extra in self._pending:
            host = ids[slot.chunk][slot.start : slot.start + slot.size]
            block.ids = host.view(block.ids.shape)
            if extra is not None:
                assert block.floats is not None
                host = floats[extra.chunk][extra.start : extra.start + extra.size]
                block.floats = host.view(block.floats.shape)
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


def host_block(arena: Arena, rows: int, top_k: int, floats: int) -> Block:
    """A block in host memory, for a router that runs there."""
    block = Block(rows, arena.ids.view(arena.ids.take(rows * top_k)).view(rows, top_k))
    if floats:
        flat = arena.floats.view(arena.floats.take(rows * floats))
        block.floats = flat.view(rows, floats)
    return block

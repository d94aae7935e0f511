"""Preallocated host memory between the hooks and the writer thread, and what lies in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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


class Divides(Protocol):
    """Knows which part of a piece of memory is whose: a `Lane`."""

    def decisions(self, memory: Tensor) -> dict[int, Block]:
        """Each router's part, by its position in the trace's layers."""


@dataclass(slots=True)
class Block:
    """What one router decided in one pass: ids [rows, K] and, by level, floats."""

    rows: int
    ids: Tensor
    """int32 [rows, K]."""
    floats: Tensor | None = None
    """float32: level "full" [rows, K + 1], weights and margin; the check of a stack's last layer
    [rows, 1], its sum of weights, which is NaN where anything before it was; else None."""


@dataclass(slots=True)
class Decisions:
    """What the routers of one lane decided in one pass, in host memory."""

    lane: Divides
    memory: Tensor
    heard: Collection[int] | None
    """Positions of the routers that decided, the rest of the memory means nothing; None: all."""

    def blocks(self) -> dict[int, Block]:
        """By position in the trace's layers."""
        found = self.lane.decisions(self.memory)
        if self.heard is None:
            return found
        return {index: block for index, block in found.items() if index in self.heard}


@dataclass
class Pass:
    """One forward pass: what each router decided, and how to tell what its rows are."""

    describe: Describes
    shape: tuple[int, int] | None
    decisions: list[Decisions] = field(default_factory=list)
    decoder: tuple[Describes, tuple[int, int]] | None = None
    """How to tell the rows of a decoder that has tokens of its own, beside an encoder's."""
    events: list[Any] = field(default_factory=list)

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """Position in the trace's layers -> block; the writer asks, hooks have no time for it."""
        return {i: block for one in self.decisions for i, block in one.blocks().items()}

    def wait(self) -> None:
        """Until the copies to the host are done."""
        for event in self.events:
            if event is not None:
                event.synchronize()


class Arena:
    """Host memory of one window, and the passes and sequences in it."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._chunks: list[Tensor] = []
        self.clear()

    def take(self, size: int) -> Tensor:
        """Room for `size` numbers, int32; earlier pieces stay where they are."""
        if not self._chunks or self._used + size > len(self._chunks[-1]):
            self._grow(size)
        start = self._used
        self._used += size
        return self._chunks[-1][start : self._used]

    def _grow(self, size: int) -> None:
        grown = 2 * len(self._chunks[-1]) if self._chunks else _FIRST_SIZE
        with torch.inference_mode(False):  # else it could not be written outside of that mode
            chunk = torch.empty(max(grown, 2 * size), dtype=torch.int32, pin_memory=self._pinned)
        self._chunks.append(chunk)
        self._used = 0

    def clear(self) -> None:
        """Empty the arena for its next window; the largest chunk stays, so that sizes settle."""
        self.passes: list[Pass] = []
        self.sequences: list[RunSequence] = []
        self.numbers: set[int] = set()
        """Of the sequences."""
        self.kept: Sequence[RunSequence] = ()
        """Those last kept: passes of one generation bring the same."""
        self.rows = 0
        self._chunks = self._chunks[-1:]
        self._used = 0

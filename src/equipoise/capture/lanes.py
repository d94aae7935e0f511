"""Where hooks put what they hear: room laid out before a pass, emptied in one copy behind it.

Routers of one stack on one device share a lane, one piece of memory there. A hook copies its ids
(as int32, so that no id wraps) to its router's seat; the end of the pass copies the lane to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from equipoise.capture.buffers import Arena, Block, Decisions, Pass
from equipoise.trace.schema import Layer


@dataclass(frozen=True, slots=True)
class Width:
    """Numbers that one router gives for each row: ids, and floats behind them."""

    ids: int
    floats: int
    """K + 1 for weights and margin; K for weights of which only the sum is wanted; or 0."""


class Lane:
    """Room for what routers that see the same rows on one device decide in one pass.

    All ids first, then all floats, whose bits are kept in the same int32 memory.
    """

    def __init__(self, widths: Mapping[int, Width], rows: int, device: torch.device) -> None:
        self.widths, self.rows, self.device = widths, rows, device
        self.members = set(widths)
        """Positions of the routers that have a seat here; others have left for another lane."""
        self.size = rows * sum(width.ids + width.floats for width in widths.values())
        self.memory = torch.empty(self.size, dtype=torch.int32, device=device)

    def blocks(self, memory: Tensor) -> dict[int, Block]:
        """Each router's part of this memory, or of its copy."""
        ids = _pieces(memory, self.rows, [width.ids for width in self.widths.values()])
        blocks = {i: Block(self.rows, part) for i, part in zip(self.widths, ids, strict=True)}
        wide = {i: width.floats for i, width in self.widths.items() if width.floats}
        if wide:
            start = self.size - self.rows * sum(wide.values())
            floats = _pieces(memory[start:].view(torch.float32), self.rows, list(wide.values()))
            for index, part in zip(wide, floats, strict=True):
                blocks[index].floats = part
        return blocks

    def decisions(self, memory: Tensor) -> dict[int, Block]:
        """The same of a copy on the host, for the writer: weights that are only checked, summed."""
        blocks = self.blocks(memory)
        for index, block in blocks.items():
            if block.floats is not None and self.widths[index].floats == self.widths[index].ids:
                block.floats = block.floats.sum(1, keepdim=True)
        return blocks


class Seat:
    """One router's place in a lane, and the layout of ids that were checked for it."""

    __slots__ = ("device", "dtype", "floats", "ids", "lane", "shape")

    def __init__(self, lane: Lane, block: Block, dtype: torch.dtype) -> None:
        self.lane, self.ids, self.floats = lane, block.ids, block.floats
        self.shape, self.device, self.dtype = block.ids.shape, block.ids.device, dtype


class Seating:
    """The seats of all routers: kept from pass to pass, laid out anew where rows or devices change."""

    def __init__(self, layers: Sequence[Layer], widths: Sequence[Width]) -> None:
        self._stacks, self._widths = [layer.stack for layer in layers], widths
        self._seats: list[Seat | None] = [None] * len(layers)
        self._lanes: list[Lane] = []
        self._settled = False
        """Every router has a seat, and no lane has room that nobody uses."""
        self.free: list[Seat | None] = list(self._seats)
        """Seats that wait for their router in the pass that runs; a hook empties its own."""

    def open(self) -> None:
        """A pass begins: every seat is free."""
        self.free[:] = self._seats

    def close(self) -> None:
        """A pass is over: no seat is free."""
        self.free[:] = [None] * len(self._seats)

    def taken(self, index: int) -> bool:
        """This router was heard in the pass that runs."""
        return self.free[index] is None and self._seats[index] is not None

    def all_taken(self) -> bool:
        """All routers were heard in the pass that runs, without a change of seats."""
        return self._settled and not any(self.free)

    def heard(self) -> set[int]:
        """Routers that were heard in the pass that runs."""
        return {index for index in range(len(self._seats)) if self.taken(index)}

    def seat(self, index: int, ids_TK: Tensor) -> Seat:
        """The seat for these ids; laid out, with those of routers expected to follow, if need be."""
        seat = self.free[index]
        if seat is None or seat.shape != ids_TK.shape or seat.device != ids_TK.device:
            with torch.inference_mode(False):  # else no seat could be filled outside of that mode
                seat = self._lay(index, ids_TK)
        seat.dtype = ids_TK.dtype
        return seat

    def _lay(self, index: int, ids_TK: Tensor) -> Seat:
        beside = self._together(index)
        for lane in self._lanes:
            lane.members.difference_update(beside)
        self._lanes = [lane for lane in self._lanes if lane.members]
        self._settled = False
        new = Lane({i: self._widths[i] for i in beside}, len(ids_TK), ids_TK.device)
        self._lanes.append(new)
        seats = {i: Seat(new, block, ids_TK.dtype) for i, block in new.blocks(new.memory).items()}
        for i, seat in seats.items():
            self._seats[i] = self.free[i] = seat
        return seats[index]

    def _together(self, index: int) -> list[int]:
        """Routers of one stack that shared a lane, or have none yet, but for those heard by now."""
        mine = self._lane_of(index)
        return [
            i
            for i, stack in enumerate(self._stacks)
            if stack == self._stacks[index] and self._lane_of(i) is mine and not self.taken(i)
        ]

    def _lane_of(self, index: int) -> Lane | None:
        seat = self._seats[index]
        return None if seat is None else seat.lane

    def send(self, arena: Arena, current: Pass) -> None:
        """Start the copies of this pass to the host; the next may write over the lanes at once.

        On an accelerator the stream keeps that order; the pass gets an event to wait for.
        """
        heard = None if self.all_taken() else self.heard()
        for lane in self._lanes:
            members = None if heard is None else lane.members & heard
            if members is None or members:
                host = arena.take(lane.size)
                host.copy_(lane.memory, True)
                current.decisions.append(Decisions(lane, host, members))
                if lane.device.type != "cpu":
                    current.events.append(_event(lane.device))
        if not self._settled:
            self._settle()

    def _settle(self) -> None:
        """Take up lanes that some routers left: the next pass lays out what it needs."""
        for lane in self._lanes:
            if len(lane.members) < len(lane.widths):
                for index in lane.members:
                    self._seats[index] = None
        self._lanes = [lane for lane in self._lanes if len(lane.members) == len(lane.widths)]
        self._settled = None not in self._seats


def _pieces(memory: Tensor, rows: int, widths: Sequence[int]) -> Sequence[Tensor]:
    """Pieces [rows, width], one behind the other from the start of `memory`."""
    if len(widths) == 1:
        return [memory[: rows * widths[0]].view(rows, widths[0])]
    if len(set(widths)) == 1:
        whole = memory[: len(widths) * rows * widths[0]]
        return whole.view(len(widths), rows, widths[0]).unbind(0)
    edges = accumulate((rows * width for width in widths), initial=0)
    return [
        memory[start:stop].view(rows, width)
        for (start, stop), width in zip(pairwise(edges), widths, strict=True)
    ]


def _event(device: torch.device) -> Any:
    """What the writer waits for before it reads a copy; a wait of its own where there is none."""
    if device.type == "cuda":
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event
    module = getattr(torch, device.type, None)
    if module is not None and hasattr(module, "synchronize"):
        module.synchronize()
    return None

"""Seats keep every decision apart, whatever rows, stacks and passes bring."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from equipoise.capture.buffers import Arena, Block, Pass
from equipoise.capture.lanes import Seating, Width
from equipoise.capture.passes import Inferred
from equipoise.trace.schema import Layer

WIDTHS = [Width(2, 0), Width(2, 2), Width(1, 0), Width(3, 4), Width(3, 0)]
STACKS = ["text", "text", "text", "vision", "vision"]
LAYERS = [
    Layer(number, f"m.{number}", 9, width.ids, stack=stack)
    for number, (width, stack) in enumerate(zip(WIDTHS, STACKS, strict=True))
]

Decision = tuple[Tensor, Tensor]


def _decide(index: int, rows: int, seed: int) -> Decision:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1, 9, (rows, WIDTHS[index].ids), generator=generator)
    return ids_TK, torch.randn(rows, WIDTHS[index].floats, generator=generator)


def _one_pass(seating: Seating, arena: Arena, decisions: dict[int, Decision]) -> Pass:
    seating.open()
    for index, (ids_TK, floats) in decisions.items():
        seat = seating.seat(index, ids_TK)
        seat.ids.copy_(ids_TK)
        if seat.floats is not None:
            seat.floats.copy_(floats)
        seating.free[index] = None
    current = Pass(Inferred([], 0, None), None)
    seating.send(arena, current)
    seating.close()
    return current


def _check(block: Block, index: int, decision: Decision) -> None:
    ids_TK, floats = decision
    assert block.rows == len(ids_TK)
    assert torch.equal(block.ids, ids_TK.int())
    width = WIDTHS[index]
    if not width.floats:
        assert block.floats is None
        return
    assert block.floats is not None
    only_checked = width.floats == width.ids
    assert torch.equal(block.floats, floats.sum(1, keepdim=True) if only_checked else floats)


rows_by_router = st.dictionaries(st.integers(0, 4), st.integers(0, 4))


@settings(deadline=None)
@given(st.lists(rows_by_router, max_size=5))
def test_what_seats_took_comes_out_of_every_pass(passes: list[dict[int, int]]) -> None:
    seating, arena = Seating(LAYERS, WIDTHS), Arena(pinned=False)
    sent: list[tuple[Pass, dict[int, Decision]]] = []
    for number, rows in enumerate(passes):
        decisions = {i: _decide(i, count, 10 * number + i) for i, count in rows.items()}
        sent.append((_one_pass(seating, arena, decisions), decisions))
    for current, decisions in sent:
        assert current.blocks.keys() == decisions.keys()
        for index, decision in decisions.items():
            _check(current.blocks[index], index, decision)


def test_a_stack_moves_in_together_and_stays() -> None:
    seating, arena = Seating(LAYERS, WIDTHS), Arena(pinned=False)
    whole = {index: _decide(index, 4, index) for index in range(5)}
    first = _one_pass(seating, arena, whole)
    assert [set(one.lane.decisions(one.memory)) for one in first.decisions] == [{0, 1, 2}, {3, 4}]
    again = _one_pass(seating, arena, whole)
    assert [one.lane for one in again.decisions] == [one.lane for one in first.decisions]


def test_routers_that_left_a_lane_leave_no_room_behind() -> None:
    seating, arena = Seating(LAYERS, WIDTHS), Arena(pinned=False)
    apart = {index: _decide(index, 4 if index < 1 else 2, index) for index in range(3)}
    for _ in range(2):
        last = _one_pass(seating, arena, apart)
    lanes = [set(one.lane.decisions(one.memory)) for one in last.decisions]
    assert sorted(lanes, key=min) == [{0}, {1, 2}]

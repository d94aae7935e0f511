"""Spread and combine: each other's transpose, whatever slots are empty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.nn import dispatch
from equipoise.routing import NO_EXPERT

PLANS = {
    "shapes from data": lambda ids: dispatch.plan(ids, 6, static=False),
    "fixed shapes": lambda ids: dispatch.plan(ids, 6, static=True),
    "padded": lambda ids: dispatch.padded_plan(ids, 6, 4),
}


def some_ids(tokens=9, k=3, empty=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, 6, generator=generator).argsort(dim=1)[:, :k]
    return ids.masked_fill(torch.rand(tokens, k, generator=generator) < empty, NO_EXPERT)


@pytest.mark.parametrize("name", PLANS)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, 6), st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 99))
def test_spread_and_combine_are_transposes(name, tokens, k, empty, seed) -> None:
    plan = PLANS[name](some_ids(tokens, k, empty, seed))
    x = torch.randn(tokens, 4, dtype=torch.float64)
    y = torch.randn(len(plan.slot_R), 4, dtype=torch.float64)
    there, back = dispatch.spread(x, plan) * y, x * dispatch.combine(y, plan)
    torch.testing.assert_close(there.sum(), back.sum())


@pytest.mark.parametrize("name", PLANS)
def test_gradients_to_the_second_order(name: str) -> None:
    plan = PLANS[name](some_ids(5))
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(plan.slot_R), 2, dtype=torch.float64, requires_grad=True)
    for function, argument in ((dispatch.spread, x), (dispatch.combine, y)):
        assert torch.autograd.gradcheck(lambda a, f=function: f(a, plan), argument)
        assert torch.autograd.gradgradcheck(lambda a, f=function: f(a, plan).square(), argument)


@pytest.mark.parametrize("static", [False, True])
def test_rows_are_sorted_by_expert_and_then_by_token(static: bool) -> None:
    ids = some_ids(40, 3)
    plan = dispatch.plan(ids, 6, static=static)
    begin = 0
    for expert, end in enumerate(plan.ends_E.tolist()):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        assert plan.token_R[begin:end].tolist() == tokens.tolist()
        assert plan.slot_R[begin:end].tolist() == (tokens * 3 + slots).tolist()
        begin = end
    assert begin == int((ids != NO_EXPERT).sum())
    assert len(plan.slot_R) == (120 if static else begin)


def test_an_undefined_row_reaches_nothing() -> None:
    plan = dispatch.plan(some_ids(), 6, static=True)
    rows = torch.ones(27, 4)
    clean = dispatch.combine(rows, plan)
    rows[int(plan.ends_E[-1]) :] = torch.nan
    assert torch.equal(dispatch.combine(rows, plan), clean)
    weights = torch.ones(9, 3, requires_grad=True)
    dispatch.slot_weights(weights, plan).mul(rows[:, 0]).sum().backward()
    assert weights.grad.isfinite().all()


def test_bfloat16_sums_are_accumulated_wider() -> None:
    ids = torch.arange(300).view(1, 300)
    plan = dispatch.plan(ids, 300)
    assert dispatch.combine(torch.ones(300, 8, dtype=torch.bfloat16), plan)[0, 0] == 300

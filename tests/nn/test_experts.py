"""Experts: equal to the loop, in value and gradient, for every shape and type it has to take."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from equipoise.nn import dispatch, experts, naive
from equipoise.nn.experts import Experts
from equipoise.nn.grouped import (
    batched_linear,
    can_group,
    grouped_dtype,
    grouped_linear,
    linear_dtype,
)
from equipoise.routing import NO_EXPERT

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def problem(
    tokens=11, experts=5, k=3, width=8, inner=8, dtype=torch.float32, empty=0.0, seed=0, **o
):
    """Experts, and (hidden, ids, weights) for them; a share `empty` of the slots has no expert."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module = Experts(experts, width, inner, **o).to(dtype)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64).to(dtype)
    gone = torch.rand(tokens, k, generator=generator) < empty
    ids = order[:, :k].masked_fill(gone, NO_EXPERT)
    return module, (hidden, ids, weights.masked_fill(gone, 0.0))


def leaves(module, hidden, weights):
    return [hidden, weights, module.inner_proj, module.down_proj]


def value_and_gradients(call, hidden, weights, module):
    """Output, and gradients of a fixed random functional in hidden, weights and both projections."""
    hidden, weights = (x.detach().requires_grad_() for x in (hidden, weights))
    out = call(hidden, weights)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    found = torch.autograd.grad(out, leaves(module, hidden, weights), probe)
    return [out.detach(), *found]


def by_loop(module, ids):
    def call(hidden, weights):
        # Where no slot has an expert, the loop touches no parameter: their gradients are 0.
        nothing = sum(0 * x.sum() for x in leaves(module, hidden, weights))
        return nothing + naive.experts(
            hidden,
            ids,
            weights,
            module.inner_proj,
            module.down_proj,
            module.activation,
            module.gated,
        )

    return call


def assert_close(found, wanted, dtype):
    for one, other in zip(found, wanted, strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        tolerance = TOLERANCE[dtype] * max(scale, 1e-3)
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def assert_equals_the_loop(module, inputs, dtype, **options):
    hidden, ids, weights = inputs
    fast = value_and_gradients(lambda h, w: module(h, ids, w, **options), hidden, weights, module)
    assert_close(fast, value_and_gradients(by_loop(module, ids), hidden, weights, module), dtype)


def test_the_loop_passes_gradcheck() -> None:
    for gated in (True, False):
        module, (hidden, ids, weights) = problem(
            tokens=4, width=3, inner=2, dtype=torch.float64, empty=0.3, gated=gated
        )
        parts = [x.detach().requires_grad_() for x in leaves(module, hidden, weights)]
        assert torch.autograd.gradcheck(
            lambda h, w, inner, down, ids=ids, gated=gated: naive.experts(
                h, ids, w, inner, down, gated=gated
            ),
            parts,
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0], ids=["dropless", "some dropped", "all dropped"])
@pytest.mark.parametrize("width", [8, 7], ids=["aligned", "odd width"])
def test_experts_equal_the_loop(dtype: torch.dtype, empty: float, width: int) -> None:
    module, inputs = problem(width=width, dtype=dtype, empty=empty)
    assert_equals_the_loop(module, inputs, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_every_activation_equals_the_loop(activation: str, gated: bool) -> None:
    module, inputs = problem(activation=activation, gated=gated, dtype=torch.float64)
    assert_equals_the_loop(module, inputs, torch.float64)
    module, inputs = problem(activation=activation, gated=gated)
    assert_equals_the_loop(module, inputs, torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 9),
    k=st.integers(1, 9),
    empty=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_loop(tokens, experts, k, empty, seed) -> None:
    module, inputs = problem(tokens, experts, min(k, experts), empty=empty, seed=seed)
    assert_equals_the_loop(module, inputs, torch.float32)


def test_the_cases_above_take_both_ways() -> None:
    aligned, (hidden, _, _) = problem()
    assert can_group(hidden, aligned.inner_proj)
    for options in ({"width": 7}, {"inner": 5}, {"dtype": torch.float64}, {"tokens": 0}):
        module, (hidden, _, _) = problem(**options)
        assert not can_group(hidden, module.down_proj.transpose(1, 2).contiguous())


def test_all_tokens_to_one_expert_leave_the_others_a_gradient_of_zero() -> None:
    module, (hidden, ids, _) = problem(k=1)
    ids = torch.full_like(ids, 2)
    module(hidden, ids, torch.ones(ids.shape)).square().sum().backward()
    used = module.down_proj.grad.abs().sum(dim=(1, 2))
    assert used[2] > 0
    assert (used[[0, 1, 3, 4]] == 0).all()


def test_an_expanded_gradient_is_taken() -> None:
    module, (hidden, ids, weights) = problem()
    module(hidden.requires_grad_(), ids, weights).sum().backward()
    assert hidden.grad.isfinite().all()


def test_a_token_without_expert_gives_zero_whatever_other_rows_hold() -> None:
    module, (hidden, ids, weights) = problem(empty=0.0)
    ids[0], weights[0] = NO_EXPERT, 0.0
    hidden[0] = torch.nan
    out = module(hidden, ids, weights)
    assert (out[0] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
def test_fixed_shapes_give_what_shapes_from_data_give(
    empty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way taken on a GPU: rows past the last expert's are there and undefined."""
    module, (hidden, ids, weights) = problem(tokens=40, empty=empty)

    def call(h, w):
        return module(h, ids, w)

    usual, real, seen = value_and_gradients(call, hidden, weights, module), dispatch.plan, []

    def static(ids_TK, num_experts):
        seen.append(real(ids_TK, num_experts, static=True))
        return seen[-1]

    monkeypatch.setattr(dispatch, "plan", static)
    torch.empty(40 * 3 * 16).fill_(torch.nan)  # what undefined rows may find in memory
    fixed = value_and_gradients(call, hidden, weights, module)
    assert seen[0].slot_R.shape == (120,)
    assert_close(fixed, usual, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padded_buffers_give_the_same_where_capacity_suffices(dtype: torch.dtype) -> None:
    module, inputs = problem(dtype=dtype, empty=0.3)
    assert_equals_the_loop(module, inputs, dtype, capacity=11)


def test_padded_buffers_leave_out_what_comes_late() -> None:
    module, (hidden, ids, weights) = problem(tokens=6, k=1)
    ids = torch.tensor([[0], [1], [0], [0], [1], [0]])
    first = ids.clone()
    first[3], first[5] = NO_EXPERT, NO_EXPERT
    found = module(hidden, ids, weights, capacity=2)
    torch.testing.assert_close(found, module(hidden, first, weights))
    assert (found[[3, 5]] == 0).all()


def test_batched_and_grouped_products_agree() -> None:
    rows, weight = torch.randn(12, 8), torch.randn(3, 4, 8)
    ends = torch.tensor([4, 8, 12], dtype=torch.int32)
    torch.testing.assert_close(batched_linear(rows, weight), grouped_linear(rows, weight, ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_experts_equal_eager_ones(dtype: torch.dtype) -> None:
    module, (hidden, ids, weights) = problem(tokens=16, dtype=dtype, empty=0.2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager = value_and_gradients(lambda h, w: module(h, ids, w), hidden, weights, module)
    found = value_and_gradients(lambda h, w: compiled(h, ids, w), hidden, weights, module)
    assert_close(found, eager, dtype)


def test_weights_in_float32_beside_states_in_bfloat16() -> None:
    module, (hidden, ids, weights) = problem(dtype=torch.bfloat16)
    wide = weights.float().requires_grad_()
    out = module(hidden, ids, wide)
    out.square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert wide.grad.dtype == torch.float32
    torch.testing.assert_close(out, module(hidden, ids, weights), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_a_cpu_autocast_casts_to_the_weights(dtype: torch.dtype, capacity: int | None) -> None:
    module, (hidden, ids, weights) = problem(width=7, dtype=dtype)
    wanted = module(hidden, ids, weights, capacity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(hidden, ids, weights, capacity), wanted)
        out = module(hidden.bfloat16(), ids, weights, capacity)
    torch.testing.assert_close(out.to(dtype), wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("width", [8, 7], ids=["grouped", "loop"])
@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("options", [{}, {"gated": False, "activation": "gelu"}], ids=str)
def test_in_autocasts_type_experts_are_those_cast_to_it(
    options: dict[str, object], capacity: int | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, (hidden, ids, weights) = problem(width=width, empty=0.2, **options)
    half = copy.deepcopy(module).bfloat16()
    wanted = value_and_gradients(
        lambda h, w: half(h, ids, w, capacity), hidden.bfloat16(), weights, half
    )
    monkeypatch.setattr(experts, "grouped_dtype", lambda _: torch.bfloat16)
    found = value_and_gradients(lambda h, w: module(h, ids, w, capacity), hidden, weights, module)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_grouped_products_follow_autocast_but_on_a_cpu() -> None:
    with FakeTensorMode():
        here, there = torch.empty(2, 8, 8), torch.empty(2, 8, 8, device="cuda")
    with autocast("cpu"), autocast("cuda"):
        found = [(linear_dtype(x), grouped_dtype(x)) for x in (here, there, there.double())]
    assert found == [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ]
    assert grouped_dtype(there) == torch.float32


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """As torch.autocast, where there is no such device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def test_transformers_weights_move_over() -> None:
    modeling = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    from transformers import OlmoeConfig

    config = OlmoeConfig(hidden_size=8, intermediate_size=8, num_experts=5, num_experts_per_tok=3)
    config._experts_implementation = "grouped_mm"
    theirs = modeling.OlmoeExperts(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    module, (hidden, ids, weights) = problem()
    module.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(module(hidden, ids, weights), theirs(hidden, ids, weights))


def test_bad_input_is_named() -> None:
    module, (hidden, ids, weights) = problem()
    with pytest.raises(ValueError, match=r"expert id 5 among 5 experts"):
        module(hidden, ids.masked_fill(ids == 1, 5), weights)
    with pytest.raises(ValueError, match=r"expert id -2 among 5"):
        module(hidden, ids.masked_fill(ids == 1, -2), weights)
    with pytest.raises(ValueError, match=r"top_k_weights \[11, 2\]"):
        module(hidden, ids, weights[:, :2])
    with pytest.raises(ValueError, match="allowed are silu, gelu"):
        Experts(2, 4, 4, activation="tanh")

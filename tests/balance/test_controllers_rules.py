"""Rules that move the bias by counts alone, against loops over experts, by hand and in a simulation."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.balance.controllers import (
    PID,
    Controller,
    MomentumTanh,
    Multiplicative,
    Proportional,
    QuantileHistogram,
    RMSNormalised,
    Sign,
    cosine,
    linear,
)
from tests.balance.controlled import floor, run

RULES = [
    Sign(1e-2),
    Sign(1e-2, centred=True),
    Proportional(1e-2),
    RMSNormalised(1e-2),
    MomentumTanh(1e-2),
    Multiplicative(1e-2),
    Multiplicative(1e-2, centred=True),
    PID(1e-1),
    PID(1e-1, integral=0.1, derivative=0.5),
    PID(1e-1, null_experts=1, computing_share=0.5),
]
by_name = pytest.mark.parametrize("rule", RULES, ids=repr)


def begin(rule: Any, layers: int, experts: int) -> tuple[Tensor, dict[str, Tensor]]:
    bias_LE = torch.full((layers, experts), rule.start)
    return bias_LE, rule.initial(num_layers=layers, num_experts=experts)


def once(rule: Any, counts: list[float], bias: list[float] | None = None) -> list[float]:
    bias_LE, state = begin(rule, 1, len(counts))
    if bias is not None:
        bias_LE = torch.tensor([bias])
    new_LE = rule.update(bias_LE=bias_LE, counts_LE=torch.tensor([counts]), step=0, state=state)
    return new_LE[0].tolist()


def naive(rule: Any, bias: list[float], counts: list[float]) -> list[float]:
    """One first step, expert by expert, in Python."""
    mean = sum(counts) / len(counts)
    v = [(mean - c) / mean for c in counts]
    if isinstance(rule, PID):
        computing = len(counts) - rule.null_experts
        e = [rule.computing_share / computing - c / sum(counts) for c in counts[:computing]]
        e = [x * (1 + rule.integral) for x in e] + [0.0] * rule.null_experts
        return [b + rule.rate * x for b, x in zip(bias, e, strict=True)]
    if isinstance(rule, Proportional):
        d = v
    elif isinstance(rule, RMSNormalised):
        rms = math.sqrt(sum(x * x for x in v) / len(v))
        d = [x / rms if rms else 0.0 for x in v]
    elif isinstance(rule, MomentumTanh):
        d = [math.tanh(rule.sharpness * x) * (1 - rule.momentum) for x in v]
    else:
        d = [(x > 0) - (x < 0) for x in v]
    if rule.centred and not isinstance(rule, Multiplicative):
        d = [x - sum(d) / len(d) for x in d]
    new = [b + rule.rate * x for b, x in zip(bias, d, strict=True)]
    if isinstance(rule, Multiplicative) and rule.centred:
        new = [b / (sum(new) / len(new)) for b in new]
    return new


@by_name
def test_a_step_equals_the_loop_over_experts(rule: Any) -> None:
    random = torch.Generator().manual_seed(1)
    bias_LE, state = begin(rule, 3, 7)
    bias_LE = bias_LE + 0.1 * torch.rand(3, 7, generator=random)
    counts_LE = torch.randint(0, 500, (3, 7), generator=random)
    new_LE = rule.update(bias_LE=bias_LE, counts_LE=counts_LE, step=0, state=state)
    for layer in range(3):
        wanted = naive(rule, bias_LE[layer].tolist(), counts_LE[layer].tolist())
        assert new_LE[layer].tolist() == pytest.approx(wanted, abs=1e-6)


def test_by_hand() -> None:
    assert once(Sign(0.5), [4, 0, 1, 3]) == [-0.5, 0.5, 0.5, -0.5]
    assert once(Sign(0.5), [2, 2, 1, 3]) == [0, 0, 0.5, -0.5]
    assert once(Sign(0.5, centred=True), [8, 0, 0, 0]) == [-0.75, 0.25, 0.25, 0.25]
    assert once(Proportional(0.5), [4, 0, 1, 3]) == [-0.5, 0.5, 0.25, -0.25]
    assert once(RMSNormalised(0.5), [4, 0]) == [-0.5, 0.5]
    assert once(Multiplicative(0.5), [4, 0]) == [0.5, 1.5]
    assert once(PID(0.5), [3, 1]) == [-0.125, 0.125]
    assert once(MomentumTanh(1.0), [4, 0]) == pytest.approx(
        [-math.tanh(2) / 2, math.tanh(2) / 2], abs=1e-6
    )


def test_momentum_carries_the_step_on() -> None:
    rule = MomentumTanh(1.0)
    bias_LE, state = begin(rule, 1, 2)
    bias_LE = rule.update(bias_LE=bias_LE, counts_LE=torch.tensor([[4, 0]]), step=0, state=state)
    new_LE = rule.update(bias_LE=bias_LE, counts_LE=torch.tensor([[2, 2]]), step=1, state=state)
    first = math.tanh(2) / 2
    assert (new_LE - bias_LE)[0].tolist() == pytest.approx([-first / 2, first / 2], abs=1e-6)


def test_pid_adds_the_sum_and_the_change_of_the_error() -> None:
    rule = PID(1.0, integral=0.5, derivative=2.0, integral_limit=0.3)
    bias_LE, state = begin(rule, 1, 2)
    bias_LE = rule.update(bias_LE=bias_LE, counts_LE=torch.tensor([[3, 1]]), step=0, state=state)
    assert bias_LE[0].tolist() == [-0.375, 0.375]  # 0.25 + 0.5 x 0.25, no change yet
    new_LE = rule.update(bias_LE=bias_LE, counts_LE=torch.tensor([[5, 3]]), step=1, state=state)
    # error 0.125, its sum 0.375 held at 0.3, its change -0.125
    assert (new_LE - bias_LE)[0, 1].item() == pytest.approx(0.125 + 0.15 - 0.25)


def test_pid_of_e_times_the_rate_is_proportional() -> None:
    counts = [7.0, 1, 0, 4]
    assert once(PID(4 * 0.03), counts) == pytest.approx(once(Proportional(0.03), counts))


def test_null_experts_never_move_and_the_others_share_what_computes() -> None:
    rule = PID(1.0, null_experts=2, computing_share=0.5)
    assert once(rule, [25, 25, 30, 20], [0, 0, 0.25, 0]) == [0, 0, 0.25, 0]
    assert once(rule, [10, 20, 70, 0]) == pytest.approx([0.15, 0.05, 0, 0])
    clipped = PID(1.0, null_experts=1, computing_share=0.5, clip=0.1)
    assert once(clipped, [0, 9], [0, 0.25]) == pytest.approx([0.1, 0.25])


def test_the_share_that_computes_is_reached_with_null_experts() -> None:
    rule = PID(linear(2.0, 0.2, 60), null_experts=4, computing_share=0.75)
    random = torch.Generator().manual_seed(0)
    bias_LE, state = begin(rule, 1, 12)
    shares = []
    for step in range(80):
        scores_TE = (torch.randn(1024, 12, generator=random) + torch.arange(12) / 6).sigmoid()
        ids_TK = (scores_TE + bias_LE[0]).topk(3).indices
        counts_LE = torch.bincount(ids_TK.flatten(), minlength=12)[None]
        shares.append((counts_LE[0, :8].sum() / counts_LE.sum()).item())
        bias_LE = rule.update(bias_LE=bias_LE, counts_LE=counts_LE, step=step, state=state)
    assert shares[0] < 0.5
    assert sum(shares[70:]) / 10 == pytest.approx(0.75, abs=0.01)
    computing_E = counts_LE[0, :8].double()
    assert computing_E.std() / computing_E.mean() < 0.15


@pytest.mark.parametrize(
    ("rule", "updates"),
    [
        (Sign(1e-2), 60),
        (Sign(1e-2, centred=True), 60),
        (Proportional(3e-2), 20),
        (RMSNormalised(linear(2e-2, 1e-3, 40)), 30),
        (MomentumTanh(1e-2), 50),
        (Multiplicative(linear(5e-2, 5e-3, 50)), 60),
        (PID(0.5), 20),
        (PID(0.5, integral=0.02, derivative=0.2), 30),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
@pytest.mark.parametrize("seed", [0, 1])
def test_balance_comes_near_its_floor_within_so_many_updates(
    rule: Any, updates: int, seed: int
) -> None:
    course, bias_LE = run(rule, steps=updates + 10, seed=seed)
    assert course[0] > 2
    chance = floor(tokens=2048, experts=16, top_k=2)
    assert sum(course[updates:]) / 10 < 1.6 * chance
    assert bias_LE.dtype == torch.float32


def test_the_uncentred_sign_drifts_and_the_centred_one_does_not() -> None:
    counts_LE = torch.full((1, 64), 10)
    counts_LE[0, :4] = 100
    plain_LE = centred_LE = torch.zeros(1, 64)
    for step in range(1000):
        plain_LE = Sign(1e-3).update(bias_LE=plain_LE, counts_LE=counts_LE, step=step, state={})
        centred_LE = Sign(1e-3, centred=True).update(
            bias_LE=centred_LE, counts_LE=counts_LE, step=step, state={}
        )
    assert plain_LE.mean() == pytest.approx(0.875, abs=1e-3)  # (60 - 4) / 64 of 1000 steps
    assert centred_LE.mean() == pytest.approx(0, abs=1e-4)
    assert torch.allclose(plain_LE - plain_LE.mean(), centred_LE, atol=1e-3)


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_centred_and_proportional_steps_sum_to_zero(counts: list[int]) -> None:
    counts_LE = torch.tensor([counts])
    for rule in (Sign(1.0, centred=True), MomentumTanh(1.0), Proportional(1.0), RMSNormalised(1.0)):
        bias_LE, state = begin(rule, 1, len(counts))
        new_LE = rule.update(bias_LE=bias_LE, counts_LE=counts_LE, step=0, state=state)
        assert new_LE.sum().item() == pytest.approx(0, abs=1e-5 * len(counts))


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12), st.integers(2, 10**12))
@settings(max_examples=60, deadline=None)
def test_a_larger_batch_of_the_same_shares_takes_the_same_step(
    counts: list[int], times: int
) -> None:
    for rule in RULES:
        new = []
        for counts_LE in (torch.tensor([counts]), torch.tensor([counts]) * times):
            bias_LE, state = begin(rule, 1, len(counts))
            new.append(rule.update(bias_LE=bias_LE, counts_LE=counts_LE, step=0, state=state))
        assert torch.allclose(*new, atol=1e-7)


def test_counts_beyond_float32_keep_their_sign() -> None:
    large = 2**25
    assert once(Sign(1.0), [large + 1, large, large - 1]) == [-1, 0, 1]


@by_name
def test_an_idle_layer_keeps_bias_and_state(rule: Any) -> None:
    bias_LE, state = begin(rule, 2, 4)
    first_LE = torch.tensor([[5, 1, 0, 2], [0, 3, 3, 9]])
    bias_LE = rule.update(bias_LE=bias_LE, counts_LE=first_LE, step=0, state=state)
    before = {name: tensor.clone() for name, tensor in state.items()}
    second_LE = torch.tensor([[5, 1, 0, 2], [0, 0, 0, 0]])
    new_LE = rule.update(bias_LE=bias_LE, counts_LE=second_LE, step=1, state=state)
    assert torch.equal(new_LE[1], bias_LE[1])
    assert not torch.equal(new_LE[0], bias_LE[0])
    assert all(torch.equal(state[name][1], before[name][1]) for name in state)


@by_name
def test_resumed_equals_never_stopped(rule: Any, tmp_path: Any) -> None:
    random = torch.Generator().manual_seed(2)
    counts = [torch.randint(0, 99, (2, 5), generator=random) for _ in range(6)]
    bias_LE, state = begin(rule, 2, 5)
    for step, counts_LE in enumerate(counts):
        if step == 3:
            torch.save({"bias": bias_LE, "state": state}, tmp_path / "half.pt")
        bias_LE = rule.update(bias_LE=bias_LE, counts_LE=counts_LE, step=step, state=state)
    half = torch.load(tmp_path / "half.pt")
    again_LE, rule = half["bias"], pickle.loads(pickle.dumps(rule))
    for step, counts_LE in enumerate(counts[3:], start=3):
        again_LE = rule.update(
            bias_LE=again_LE, counts_LE=counts_LE, step=step, state=half["state"]
        )
    assert torch.equal(again_LE, bias_LE)


@by_name
def test_float32_out_and_the_input_untouched(rule: Any) -> None:
    bias_LE, state = begin(rule, 1, 3)
    before_LE = bias_LE.clone()
    for dtype in (torch.int64, torch.int32, torch.float64):
        counts_LE = torch.tensor([[9, 1, 2]], dtype=dtype)
        new_LE = rule.update(bias_LE=bias_LE, counts_LE=counts_LE, step=0, state=state)
        assert new_LE.dtype == torch.float32
        assert torch.equal(bias_LE, before_LE)
    assert isinstance(rule, Controller)
    assert hash(rule) == hash(pickle.loads(pickle.dumps(rule)))


@by_name
def test_no_graph_grows_through_a_bias_that_is_a_parameter(rule: Any) -> None:
    bias_LE, state = begin(rule, 1, 3)
    counts_LE = torch.tensor([[9, 1, 2]])
    new_LE = rule.update(bias_LE=bias_LE.requires_grad_(), counts_LE=counts_LE, step=0, state=state)
    assert not any(tensor.requires_grad for tensor in (new_LE, *state.values()))


def test_a_thousandth_is_added_where_bfloat16_would_stall() -> None:
    bias_LE = torch.full((1, 2), 7.0)
    for step in range(500):
        bias_LE = Sign(1e-3).update(
            bias_LE=bias_LE, counts_LE=torch.tensor([[9, 1]]), step=step, state={}
        )
    assert bias_LE[0].tolist() == pytest.approx([6.5, 7.5], abs=1e-3)
    with pytest.raises(ValueError, match=r"bfloat16.*keep it in torch\.float32"):
        Sign().update(
            bias_LE=bias_LE.bfloat16(), counts_LE=torch.tensor([[9, 1]]), step=0, state={}
        )


def test_rates_by_layer_and_by_step() -> None:
    counts_LE = torch.tensor([[3, 1], [3, 1]])
    for rate in ([0.5, 0.0], torch.tensor([0.5, 0.0])):
        new_LE = Sign(rate).update(bias_LE=torch.zeros(2, 2), counts_LE=counts_LE, step=0, state={})
        assert new_LE.tolist() == [[-0.5, 0.5], [0, 0]]
    falling = Sign(cosine(1.0, 0.0, 10))
    steps = [
        falling.update(bias_LE=torch.zeros(2, 2), counts_LE=counts_LE, step=s, state={})[
            0, 1
        ].item()
        for s in (0, 5, 10, 99)
    ]
    assert steps == pytest.approx([1, 0.5, 0, 0])


def test_clipping_bounds_the_bias() -> None:
    assert once(Sign(0.5, clip=0.3), [3, 1]) == pytest.approx([-0.3, 0.3])
    assert once(Multiplicative(5.0, clip=2.0, lower=0.25), [3, 1]) == [0.25, 2.0]
    assert once(PID(10.0, clip=0.3), [3, 1]) == pytest.approx([-0.3, 0.3])


@pytest.mark.parametrize(
    ("counts_LE", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "nan for expert 1 of the layer at position 0"),
        (torch.tensor([[float("inf"), 1.0]]), "inf for expert 0"),
        (torch.tensor([[1, -3]]), r"-3\.0 for expert 1.*overflow"),
        (torch.tensor([1, 2]), r"\(2,\).*stack the layers"),
        (torch.tensor([[1, 2, 3]]), r"\(1, 2\) and counts of shape \(1, 3\)"),
    ],
)
@pytest.mark.parametrize("rule", [Sign(), Multiplicative(), PID(), QuantileHistogram()], ids=repr)
def test_bad_counts_are_named(rule: Any, counts_LE: Tensor, message: str) -> None:
    bias_LE, state = begin(rule, 1, 2)
    with pytest.raises(ValueError, match=message):
        rule.update(bias_LE=bias_LE, counts_LE=counts_LE, step=0, state=state)


def test_a_bias_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        once(Sign(), [1, 2], [0.0, float("nan")])


def test_a_state_of_another_model_is_refused() -> None:
    rule = MomentumTanh()
    arguments = {"bias_LE": torch.zeros(1, 3), "counts_LE": torch.tensor([[1, 2, 3]]), "step": 0}
    with pytest.raises(ValueError, match=r"'momentum' holds nothing.*initial\(\)"):
        rule.update(**arguments, state={})
    with pytest.raises(ValueError, match=r"holds shape \(1, 4\), wanted shape \(1, 3\)"):
        rule.update(**arguments, state=rule.initial(num_layers=1, num_experts=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sign(-1e-3), r"rate -0\.001; allowed"),
        (lambda: Sign(float("nan")), "rate nan"),
        (lambda: Sign([1e-3, -1.0]), "rate -1.0 of the layer at position 1"),
        (lambda: Sign("fast"), "rate='fast'; give a number"),
        (lambda: Sign(torch.ones(2, 2)), "one number per layer"),
        (lambda: Sign(clip=0.0), "clip=0.0"),
        (lambda: MomentumTanh(momentum=1.0), "momentum=1.0"),
        (lambda: MomentumTanh(sharpness=-1), "sharpness=-1"),
        (lambda: Multiplicative(lower=0), "lower=0"),
        (lambda: Multiplicative(lower=0.5, clip=0.1), "below lower"),
        (lambda: PID(integral=-1), "integral=-1"),
        (lambda: PID(null_experts=2), r"computing_share=1\.0 with null_experts=2"),
        (lambda: PID(computing_share=0.5), r"computing_share=0\.5 with null_experts=0"),
        (lambda: PID(null_experts=-1, computing_share=0.5), "null_experts=-1"),
    ],
)
def test_bad_settings_are_refused_when_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_that_do_not_fit_the_model_are_refused_when_used() -> None:
    with pytest.raises(ValueError, match="3 rates for 1 layers"):
        once(Sign([1e-3] * 3), [1, 2])
    with pytest.raises(ValueError, match=r"rate -1\.0 at step 0"):
        once(Sign(lambda step: -1.0), [1, 2])
    with pytest.raises(ValueError, match="null_experts=2 of 2 experts"):
        once(PID(null_experts=2, computing_share=0.5), [1, 2])

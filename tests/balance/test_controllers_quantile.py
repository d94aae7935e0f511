"""Quantile balancing: by hand, against loops, the histogram against the exact form, and in simulation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from equipoise.balance.controllers import GroupLimit, Observer, Quantile, QuantileHistogram, Sign
from equipoise.balance.controllers.histogram import quantile_bin
from equipoise.balance.controllers.margins import needed_bias
from tests.balance.controlled import floor, run, select

EXACT, HISTOGRAM = Quantile(), QuantileHistogram()
FORMS = [EXACT, HISTOGRAM, QuantileHistogram(adaptive=True)]
by_form = pytest.mark.parametrize("form", FORMS, ids=["exact", "histogram", "adaptive"])


def look(form: Any, state: Any, scores_TE: Tensor, bias_E: Tensor, top_k: int, **more: Any) -> None:
    more = {"layer": 0, "valid_T": None, **more}
    form.observe(scores_TE=scores_TE, bias_E=bias_E, top_k=top_k, state=state, **more)


def solve(
    form: Any, passes: list[Tensor], bias_E: Tensor, top_k: int, valid: list[Tensor] | None = None
) -> Tensor:
    """The new bias [E] after one step of these passes."""
    state = form.initial(num_layers=1, num_experts=len(bias_E))
    for i, scores_TE in enumerate(passes):
        look(form, state, scores_TE, bias_E, top_k, valid_T=valid[i] if valid else None)
    counts_LE = torch.ones(1, len(bias_E), dtype=torch.int64)
    return form.update(bias_LE=bias_E[None], counts_LE=counts_LE, step=0, state=state)[0]


def naive(scores_TE: Tensor, bias_E: Tensor, top_k: int, cutoff_TE: Tensor | None = None) -> Tensor:
    """The same in Python: sort what each token needs, take the fair share, subtract the mean."""
    rows, experts = scores_TE.shape
    if cutoff_TE is None:
        biased = (scores_TE + bias_E).tolist()
        cutoff_TE = torch.tensor([[sorted(row)[-top_k - 1]] * experts for row in biased])
    new = []
    for e in range(experts):
        inside = [t for t in range(rows) if scores_TE[t, e] > -math.inf]
        need = sorted(float(cutoff_TE[t, e] - scores_TE[t, e]) for t in inside)
        share, rest = divmod(min(rows * top_k, len(need) * experts), experts)
        if not need:
            new.append(float(bias_E[e]))
        elif rest:
            new.append(need[share])
        else:
            new.append((need[share - 1] + need[min(share, len(need) - 1)]) / 2)
    return torch.tensor(new) - sum(new) / experts


@by_form
def test_the_published_example_is_balanced_in_one_round(form: Any) -> None:
    scores_TE = torch.tensor([[0.9, 0.5], [0.8, 0.7], [0.7, 0.2], [0.6, 0.45]])
    before_TK = select(scores_TE, torch.zeros(2), 1, "add", None)
    assert torch.bincount(before_TK.flatten(), minlength=2).tolist() == [4, 0]
    bias_E = solve(form, [scores_TE], torch.zeros(2), 1)
    after_TK = select(scores_TE, bias_E, 1, "add", None)
    assert torch.bincount(after_TK.flatten(), minlength=2).tolist() == [2, 2]
    total = scores_TE.gather(1, after_TK).sum().item()
    slots_TE = scores_TE.repeat_interleave(2, dim=1)  # two places with each expert
    best = slots_TE[linear_sum_assignment(slots_TE, maximize=True)].sum().item()
    assert total == pytest.approx(2.75) == pytest.approx(best)
    # the published price, 0.15, is the upper end of the gap [0.15, 0.4] whose middle is taken
    assert (bias_E[1] - bias_E[0]).item() == pytest.approx(0.275, abs=2e-3)


@pytest.mark.parametrize(
    ("rows", "experts", "top_k"), [(12, 4, 2), (13, 4, 1), (50, 7, 3), (3, 8, 2)]
)
def test_exact_equals_the_loop_divisible_or_not(rows: int, experts: int, top_k: int) -> None:
    random = torch.Generator().manual_seed(rows)
    scores_TE = torch.rand(rows, experts, generator=random)
    bias_E = torch.randn(experts, generator=random) / 10
    new_E = solve(EXACT, [scores_TE], bias_E, top_k)
    assert torch.allclose(new_E, naive(scores_TE, bias_E, top_k), atol=1e-6)


@given(
    rows=st.integers(1, 60),
    experts=st.integers(2, 9),
    seed=st.integers(0, 10**6),
    bins=st.sampled_from([50, 1000]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_the_histogram_is_within_a_bin_of_the_exact_quantile(
    rows: int, experts: int, seed: int, bins: int, data: Any
) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    random = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(rows, experts, generator=random)
    bias_E = torch.randn(experts, generator=random) / 3
    exact_E = solve(Quantile(centred=False), [scores_TE], bias_E, top_k)
    binned_E = solve(QuantileHistogram(centred=False, bins=bins), [scores_TE], bias_E, top_k)
    width = (bias_E.max() - bias_E.min() + 2).item() / bins
    assert (exact_E - binned_E).abs().max().item() <= width + 1e-5


def test_a_place_in_the_bins_by_hand() -> None:
    histogram_LEB = torch.tensor([[[0, 4, 0, 0, 2], [3, 3, 0, 0, 0], [0, 0, 0, 0, 0]]])
    place_LE, known_LE = quantile_bin(histogram_LEB, torch.tensor([[12]]))
    # 4 of each expert: the gap from the end of bin 1 to bin 4; a third into bin 1; nothing
    assert place_LE[0, :2].tolist() == pytest.approx([3.0, 1 + 1 / 3])
    assert known_LE.tolist() == [[True, True, False]]


def test_bins_reach_one_beyond_the_biases() -> None:
    scores_TE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    bias_E = torch.tensor([-0.5, 0.5, 0.0])
    form = QuantileHistogram(bins=30)
    state = form.initial(num_layers=1, num_experts=3)
    look(form, state, scores_TE, bias_E, 1)
    # cutoffs 0.5 and 0; needed [-0.5, 0.5, 0.5] and [0, -1, 0]; bins of 0.1 from -1.5 on
    filled = [b // 3 for b in (state["histogram"][0] > 0).nonzero()[:, 1].tolist()]
    assert filled == [3, 5, 1, 6, 5, 6]  # thirds of the way, away from rounding at bin edges
    assert state["histogram"].dtype == torch.int32
    assert int(state["histogram"].sum()) == 6


def test_two_halves_make_the_histogram_and_the_bias_of_the_whole() -> None:
    scores_TE = torch.rand(101, 6, generator=torch.Generator().manual_seed(3))
    bias_E = torch.linspace(-0.2, 0.2, 6)
    whole, left, right = (HISTOGRAM.initial(num_layers=1, num_experts=6) for _ in range(3))
    look(HISTOGRAM, whole, scores_TE, bias_E, 2)
    look(HISTOGRAM, left, scores_TE[:40], bias_E, 2)
    look(HISTOGRAM, right, scores_TE[40:90], bias_E, 2)
    look(HISTOGRAM, right, scores_TE[90:], bias_E, 2)
    for name in HISTOGRAM.reduce:  # what a process group does
        assert not whole[name].is_floating_point()
        left[name] += right[name]
        assert torch.equal(left[name], whole[name])
    counts_LE = torch.ones(1, 6)
    new = [
        HISTOGRAM.update(bias_LE=bias_E[None], counts_LE=counts_LE, step=0, state=state)
        for state in (whole, left)
    ]
    assert torch.equal(*new)
    assert not any(left[name].any() for name in HISTOGRAM.reduce)


def test_exact_averages_passes_by_their_tokens() -> None:
    random = torch.Generator().manual_seed(4)
    parts = [torch.rand(rows, 4, generator=random) for rows in (8, 24)]
    bias_E = torch.zeros(4)
    both_E = solve(EXACT, parts, bias_E, 2)
    alone = [solve(EXACT, [part], bias_E, 2) for part in parts]
    assert torch.allclose(both_E, (alone[0] + 3 * alone[1]) / 4, atol=1e-6)
    assert not torch.allclose(both_E, solve(EXACT, [torch.cat(parts)], bias_E, 2), atol=1e-4)


@by_form
def test_padding_does_not_enter(form: Any) -> None:
    random = torch.Generator().manual_seed(5)
    scores_TE = torch.rand(30, 4, generator=random)
    valid_T = torch.rand(30, generator=random) < 0.5
    bias_E = torch.zeros(4)
    padded_E = solve(form, [scores_TE], bias_E, 2, valid=[valid_T])
    assert torch.equal(padded_E, solve(form, [scores_TE[valid_T]], bias_E, 2))
    assert not torch.equal(padded_E, solve(form, [scores_TE], bias_E, 2))
    scores_TE[~valid_T] = torch.nan
    assert torch.equal(padded_E, solve(form, [scores_TE], bias_E, 2, valid=[valid_T]))


@by_form
def test_a_pass_of_padding_only_and_an_empty_one_change_nothing(form: Any) -> None:
    scores_TE = torch.rand(9, 3, generator=torch.Generator().manual_seed(6))
    passes = [scores_TE, scores_TE, scores_TE[:0]]
    valid = [
        torch.ones(9, dtype=torch.bool),
        torch.zeros(9, dtype=torch.bool),
        torch.ones(0).bool(),
    ]
    both_E = solve(form, passes, torch.zeros(3), 1, valid=valid)
    assert torch.equal(both_E, solve(form, [scores_TE], torch.zeros(3), 1))


def naive_cutoff(biased_TE: Tensor, top_k: int, limit: GroupLimit) -> Tensor:
    """By the definition, in Python: above the first expert left out, and bringing the group in."""
    size = biased_TE.shape[1] // limit.num_groups
    rows = []
    for row in biased_TE.tolist():
        groups = [row[g * size : (g + 1) * size] for g in range(limit.num_groups)]
        score = [sum(sorted(group)[-limit.best :]) for group in groups]
        order = sorted(range(limit.num_groups), key=lambda g: -score[g])
        within = sorted(x for g in order[: limit.top_groups] for x in groups[g])
        first_out = score[order[limit.top_groups]]
        needs = []
        for group in groups:
            for e in range(size):
                others = sorted(group[:e] + group[e + 1 :], reverse=True)[: limit.best - 1]
                enough = within[-top_k - 1] if len(within) > top_k else -math.inf
                needs.append(max(enough, first_out - sum(others)))
        rows.append(needs)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("limit", "top_k"),
    [
        (GroupLimit(4, 2, best=1), 3),
        (GroupLimit(4, 2, best=2), 5),
        (GroupLimit(3, 1, best=2), 2),
        (GroupLimit(3, 2, best=3), 7),
        (GroupLimit(4, 1, best=2), 3),  # a whole group is selected
    ],
)
def test_an_expert_is_above_the_first_left_out_and_brings_its_group(
    limit: GroupLimit, top_k: int
) -> None:
    random = torch.Generator().manual_seed(7)
    scores_TE, bias_E = torch.rand(40, 12, generator=random), torch.randn(12, generator=random) / 10
    cutoff_TE = naive_cutoff(scores_TE + bias_E, top_k, limit)
    need_TE, seen_2 = needed_bias(scores_TE, bias_E, top_k, None, limit)
    assert torch.allclose(need_TE, cutoff_TE - scores_TE, atol=1e-6)
    assert seen_2.tolist() == [40 * top_k, 0]
    wanted_E = naive(scores_TE, bias_E, top_k, cutoff_TE)
    exact_E = solve(Quantile(groups=limit), [scores_TE], bias_E, top_k)
    assert torch.allclose(exact_E, wanted_E, atol=1e-6)
    binned_E = solve(QuantileHistogram(groups=limit), [scores_TE], bias_E, top_k)
    assert torch.allclose(binned_E, wanted_E, atol=2 * 3e-3)
    assert not torch.allclose(solve(EXACT, [scores_TE], bias_E, top_k), wanted_E, atol=1e-2)


@by_form
def test_only_experts_that_a_token_can_take_enter(form: Any) -> None:
    random = torch.Generator().manual_seed(7)
    scores_TE, bias_E = torch.rand(40, 8, generator=random), torch.randn(8, generator=random) / 10
    allowed_TE = GroupLimit(num_groups=4, top_groups=2).allowed(scores_TE + bias_E, 2)
    masked_TE = scores_TE.masked_fill(~allowed_TE, -torch.inf)
    wanted_E = naive(masked_TE, bias_E, 2)
    assert torch.allclose(solve(form, [masked_TE], bias_E, 2), wanted_E, atol=2 * 3e-3)
    assert torch.allclose(solve(EXACT, [masked_TE], bias_E, 2), wanted_E, atol=1e-6)
    assert not torch.allclose(solve(EXACT, [scores_TE], bias_E, 2), wanted_E, atol=1e-2)


def test_a_limit_to_all_groups_is_none() -> None:
    scores_TE = torch.rand(40, 8, generator=torch.Generator().manual_seed(7))
    unlimited_E = solve(EXACT, [scores_TE], torch.zeros(8), 2)
    limited_E = solve(Quantile(groups=GroupLimit(4, 4)), [scores_TE], torch.zeros(8), 2)
    assert torch.equal(limited_E, unlimited_E)


def test_under_a_group_limit_experts_without_scores_do_not_enter() -> None:
    scores_TE = torch.rand(30, 6, generator=torch.Generator().manual_seed(7))
    scores_TE[:, 1] = -torch.inf
    need_TE, _ = needed_bias(scores_TE, torch.zeros(6), 1, None, GroupLimit(3, 1))
    assert need_TE[:, :2].isinf().all()  # alone in its group, the first cannot bring it in
    assert need_TE[:, 2:].isfinite().all()


@by_form
def test_an_expert_out_of_every_tokens_reach_keeps_its_bias(form: Any) -> None:
    scores_TE = torch.rand(20, 4, generator=torch.Generator().manual_seed(8))
    scores_TE[:, 3] = -torch.inf
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.25])
    new_E = solve(type(form)(centred=False), [scores_TE], bias_E, 2)
    assert new_E[3] == 0.25
    assert (new_E[:3] != 0).all()


def test_tokens_without_a_choice_do_not_enter() -> None:
    scores_TE = torch.tensor([[0.5, 0.2, -torch.inf], [0.1, 0.2, 0.3]])
    need_TE, seen_2 = needed_bias(scores_TE, torch.zeros(3), 2, None, None)
    assert need_TE[0].isinf().all()
    assert need_TE[1].tolist() == pytest.approx([0.0, -0.1, -0.2])
    assert seen_2.tolist() == [4, 0]


@by_form
@pytest.mark.parametrize("seed", [0, 1])
def test_balance_comes_near_its_floor_in_a_few_updates(form: Any, seed: int) -> None:
    course, bias_LE = run(form, steps=15, seed=seed)
    chance = floor(tokens=2048, experts=16, top_k=2)
    assert course[0] > 2
    assert course[1] < course[0] / 5
    assert sum(course[5:]) / 10 < 1.6 * chance
    assert bias_LE.mean().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_on_fixed_scores_rounds_lead_to_even_loads(function: str) -> None:
    logits_TE = (
        torch.randn(512, 8, generator=torch.Generator().manual_seed(9)) + torch.arange(8) / 3
    )
    scores_TE = logits_TE.sigmoid() if function == "sigmoid" else logits_TE.softmax(-1)
    bias_E = torch.zeros(8)
    for _ in range(30):
        bias_E = solve(EXACT, [scores_TE], bias_E, 2)
    counts_E = torch.bincount(select(scores_TE, bias_E, 2, "add", None).flatten(), minlength=8)
    assert (counts_E - 128).abs().max() <= 6


def test_an_ema_moves_by_its_part_and_is_slower_and_smoother() -> None:
    scores_TE = torch.rand(32, 4, generator=torch.Generator().manual_seed(10))
    bias_E = torch.tensor([0.3, -0.1, -0.1, -0.1])
    new_E = solve(EXACT, [scores_TE], bias_E, 1)
    smoothed_E = solve(Quantile(ema=0.75), [scores_TE], bias_E, 1)
    assert torch.allclose(smoothed_E, 0.75 * bias_E + 0.25 * new_E, atol=1e-6)
    plain, smooth = (run(Quantile(ema=ema), steps=50, tokens=512)[0] for ema in (0.0, 0.8))
    assert smooth[3] > 2 * plain[3]
    assert sum(smooth[30:]) < sum(plain[30:])


def test_group_limited_routing_is_balanced_within_ten_steps() -> None:
    limit = GroupLimit(num_groups=8, top_groups=4)
    shape = {"steps": 15, "experts": 32, "top_k": 4, "tokens": 1024, "groups": limit}
    course, _ = run(Quantile(groups=limit), **shape)
    chance = floor(tokens=1024, experts=32, top_k=4)
    assert course[0] > 2
    assert sum(course[10:]) / 5 < 1.6 * chance


@pytest.mark.parametrize("form", [Quantile, QuantileHistogram], ids=["exact", "histogram"])
@pytest.mark.parametrize(
    ("limit", "experts", "top_k"),
    [
        (GroupLimit(8, 4), 32, 4),
        (GroupLimit(8, 4), 64, 8),
        (GroupLimit(8, 3, best=1), 32, 4),
        (GroupLimit(8, 2), 32, 4),
        (GroupLimit(4, 1), 16, 2),
        (GroupLimit(4, 1), 8, 2),  # whole groups
    ],
)
@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_group_limits_of_any_tightness_are_balanced(
    form: Any, limit: GroupLimit, experts: int, top_k: int, function: str
) -> None:
    shape = {"steps": 35, "experts": experts, "top_k": top_k, "tokens": 1024, "groups": limit}
    # Softmax scores near 1 / 64 are a few bins of the histogram's fixed range.
    adaptive = {"adaptive": True} if form is QuantileHistogram and function == "softmax" else {}
    course, _ = run(form(groups=limit, **adaptive), function=function, **shape)
    chance = floor(tokens=1024, experts=experts, top_k=top_k)
    assert course[0] > 1
    whole = top_k == experts // limit.num_groups * limit.top_groups  # all of a group move together
    assert sum(course[25:]) / 10 < (2 if whole else 1.6) * chance


def test_adaptive_bins_resolve_softmax_scores_over_many_experts() -> None:
    """Scores near 1 / 64 are a few bins of the fixed range."""
    logits_TE = torch.randn(1024, 64, generator=torch.Generator().manual_seed(14))
    scores_TE, counts_LE = logits_TE.softmax(-1), torch.ones(1, 64)
    bias_E = solve(EXACT, [scores_TE], torch.zeros(64), 4)
    exact_E = solve(EXACT, [scores_TE], bias_E, 4)
    fixed_E = solve(HISTOGRAM, [scores_TE], bias_E, 4)
    form = QuantileHistogram(adaptive=True)
    state = form.initial(num_layers=1, num_experts=64)
    for step in range(4):  # the range closes in, and then has the exact form's accuracy
        look(form, state, scores_TE, bias_E, 4)
        adaptive_LE = form.update(bias_LE=bias_E[None], counts_LE=counts_LE, step=step, state=state)
    fixed, adaptive = ((new - exact_E).abs().max() for new in (fixed_E, adaptive_LE[0]))
    assert adaptive < fixed / 10


@pytest.mark.parametrize("score_range", [(0, 3), (0.0, 0.05), (-4.0, 4.0)])
def test_the_adaptive_range_finds_its_way_from_too_wide_or_too_narrow(score_range: Any) -> None:
    form = QuantileHistogram(adaptive=True, score_range=score_range)
    course, _ = run(form, steps=35)
    assert sum(course[25:]) / 10 < 1.6 * floor(tokens=2048, experts=16, top_k=2)


def test_the_adaptive_range_opens_when_the_scores_jump() -> None:
    random = torch.Generator().manual_seed(15)
    form, bias_E = QuantileHistogram(adaptive=True), torch.zeros(8)
    state = form.initial(num_layers=1, num_experts=8)
    offset_E = torch.linspace(0, 1, 8)
    reaches, errors = [], []
    for step in range(24):
        scores_TE = (torch.randn(512, 8, generator=random) + offset_E).sigmoid()
        wanted_E = solve(EXACT, [scores_TE], bias_E, 2)
        look(form, state, scores_TE, bias_E, 2)
        bias_E = form.update(
            bias_LE=bias_E[None], counts_LE=torch.ones(1, 8), step=step, state=state
        )[0]
        reaches.append(state["reach"].item())
        errors.append((bias_E - wanted_E).abs().max().item())
        offset_E = offset_E.flip(0) if step == 15 else offset_E
    assert reaches[15] < 0.25 < reaches[16]
    assert max(errors[:16]) < 5e-3
    assert max(errors[20:]) < 5e-3


@by_form
def test_an_idle_layer_keeps_its_bias_and_the_others_move(form: Any) -> None:
    state = form.initial(num_layers=2, num_experts=3)
    scores_TE = torch.rand(20, 3, generator=torch.Generator().manual_seed(11))
    bias_LE = torch.tensor([[0.1, 0.0, -0.1], [0.3, 0.2, 0.1]])
    look(form, state, scores_TE, bias_LE[0], 1)
    counts_LE = torch.tensor([[9, 1, 2], [0, 0, 0]])
    new_LE = form.update(bias_LE=bias_LE, counts_LE=counts_LE, step=0, state=state)
    assert torch.equal(new_LE[1], bias_LE[1])
    assert torch.allclose(new_LE[0], solve(form, [scores_TE], bias_LE[0], 1), atol=1e-6)
    assert new_LE.dtype == torch.float32
    if "reach" in state:
        assert state["reach"][1] == 1


@by_form
def test_resumed_in_the_middle_of_a_step_equals_never_stopped(form: Any, tmp_path: Any) -> None:
    random = torch.Generator().manual_seed(12)
    steps = [[torch.rand(20, 4, generator=random) for _ in range(2)] for _ in range(3)]

    def go(resume: bool) -> Tensor:
        state, bias_LE = form.initial(num_layers=1, num_experts=4), torch.zeros(1, 4)
        for step, (first_TE, second_TE) in enumerate(steps):
            look(form, state, first_TE, bias_LE[0], 1)
            if resume:
                torch.save((bias_LE, state), tmp_path / "state.pt")
                bias_LE, state = torch.load(tmp_path / "state.pt")
            look(form, state, second_TE, bias_LE[0], 1)
            bias_LE = form.update(
                bias_LE=bias_LE, counts_LE=torch.ones(1, 4), step=step, state=state
            )
        return bias_LE

    assert torch.equal(go(True), go(False))


def test_bfloat16_scores_are_taken_up_in_float32_and_no_gradient_flows() -> None:
    scores_TE = torch.rand(16, 4, generator=torch.Generator().manual_seed(13)).bfloat16()
    new_E = solve(EXACT, [scores_TE.requires_grad_()], torch.zeros(4), 2)
    assert not new_E.requires_grad
    assert torch.equal(new_E, solve(EXACT, [scores_TE.detach().float()], torch.zeros(4), 2))


@by_form
def test_clipping_bounds_the_bias(form: Any) -> None:
    scores_TE = torch.rand(16, 2) + torch.tensor([0.9, 0.0])
    clipped = type(form)(clip=0.05)
    assert solve(clipped, [scores_TE], torch.zeros(2), 1).tolist() == pytest.approx([-0.05, 0.05])


def test_which_controllers_want_scores() -> None:
    assert all(isinstance(form, Observer) for form in FORMS)
    assert not isinstance(Sign(), Observer)


@by_form
def test_bad_scores_and_missing_ones_are_named(form: Any) -> None:
    state, counts_LE = form.initial(num_layers=1, num_experts=3), torch.ones(1, 3)
    arguments = {"bias_LE": torch.zeros(1, 3), "counts_LE": counts_LE, "step": 0, "state": state}
    with pytest.raises(ValueError, match=r"position 0 counted selections.*observe\(\)"):
        form.update(**arguments)
    scores_TE = torch.rand(5, 3)
    scores_TE[1, 2], scores_TE[4, 0] = torch.nan, torch.inf
    look(form, state, scores_TE, torch.zeros(3), 1)
    with pytest.raises(ValueError, match="2 tokens of the layer at position 0 had NaN"):
        form.update(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_TE": torch.rand(4)}, r"\(4,\)"),
        ({"bias_E": torch.zeros(4)}, r"\(5, 3\) and bias of shape \(4,\)"),
        ({"bias_E": torch.zeros(3).bfloat16()}, "bfloat16"),
        ({"top_k": 3}, "top_k=3 of 3 experts"),
        ({"top_k": 0}, "top_k=0"),
        ({"valid_T": torch.ones(5)}, r"torch.float32.*give torch\.bool"),
        ({"valid_T": torch.ones(4).bool()}, r"\(4,\) for 5 tokens"),
        ({"layer": 1}, "position 1"),
        ({"state": {}}, r"initial\(\)"),
    ],
)
def test_a_pass_of_the_wrong_shape_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "layer": 0,
        "scores_TE": torch.rand(5, 3),
        "bias_E": torch.zeros(3),
        "top_k": 1,
        "valid_T": None,
        "state": EXACT.initial(num_layers=1, num_experts=3),
    }
    with pytest.raises(ValueError, match=message):
        EXACT.observe(**(arguments | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantile(ema=1.0), "ema=1.0"),
        (lambda: Quantile(clip=-1), "clip=-1"),
        (lambda: QuantileHistogram(bins=2), "bins=2"),
        (lambda: QuantileHistogram(score_range=(1.0, 1.0)), "score_range"),
        (lambda: GroupLimit(4, 5), "top_groups"),
        (lambda: GroupLimit(4, 2).allowed(torch.rand(3, 6), 1), "num_groups must divide"),
        (lambda: GroupLimit(4, 1, best=1).allowed(torch.rand(3, 8), 3), "raise top_groups"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

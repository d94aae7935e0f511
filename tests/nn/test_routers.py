"""The top-k router against its naive twin, its options, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from equipoise.nn import (
    FixedNoise,
    GroupLimited,
    LearnedNoise,
    Random,
    Sinkhorn,
    TopKRouter,
    naive_routers,
)
from equipoise.nn.base import scores_of
from equipoise.routing import NO_EXPERT
from tests.nn.routing import D, E, T, dense, gradients, loads, sharpened, states

CASES = {
    "switch": {"top_k": 1},
    "olmoe": {"top_k": 3},
    "qwen3": {"top_k": 3, "weighting": "renormalized"},
    "mixtral": {"top_k": 2, "weighting": "softmax"},
    "equal": {"top_k": 2, "weighting": "equal"},
    "all": {"top_k": E},
    "deepseek-v2": {"top_k": 2, "groups": (4, 2, 1)},
    "deepseek-v3": {
        "top_k": 3,
        "function": "sigmoid",
        "weighting": "renormalized",
        "route_scale": 2.5,
        "groups": (4, 2, 2),
    },
    "deepseek-v4": {"top_k": 3, "function": "sqrtsoftplus", "weighting": "renormalized"},
    "skywork": {"top_k": 2, "logit_norm": 1.5},
    "temperature": {"top_k": 2, "temperature": 0.3},
}
BIASES = {"free": None, "biased": [0.3, -0.4, 0.0, 0.2, -0.1, 0.5, -0.5, 0.1]}


def make(top_k, function="softmax", groups=None, bias=None, **options):
    router = TopKRouter(
        D,
        E,
        top_k,
        score_function=function,
        selection=GroupLimited(*groups) if groups else None,
        selection_bias=bias is not None,
        **options,
    )
    if bias is not None:
        router.selection_bias.copy_(torch.tensor(bias))
    return sharpened(router).double()


def naive_of(hidden, weight, bias, top_k, **case):
    # The bias as the router holds it, in float32.
    bias = None if bias is None else torch.tensor(bias).tolist()
    return naive_routers.top_k(hidden, weight, top_k, bias=bias, **case)


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ids_weights_and_gradients_are_those_of_the_naive_twin(case, bias) -> None:
    router, hidden = make(**case, bias=bias), states().requires_grad_()
    _, weights_TK, ids_TK = router(hidden)
    expected, selected = naive_of(hidden, router.weight, bias, **case)
    assert ids_TK.tolist() == selected
    table = dense(weights_TK, ids_TK, E)
    torch.testing.assert_close(table, expected, rtol=1e-12, atol=1e-12)
    if case.get("weighting") != "equal":
        inputs = (hidden, router.weight)
        for mine, theirs in zip(gradients(table, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"equal", "all"}))
def test_the_naive_twin_passes_gradcheck(name) -> None:
    hidden, weight = states(3).requires_grad_(), sharpened(make(1)).weight
    assert torch.autograd.gradcheck(
        lambda h, w: naive_of(h, w, BIASES["biased"], **CASES[name])[0], (hidden, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_gives_the_same_experts_and_weights_to_rounding(dtype) -> None:
    case = CASES["deepseek-v3"]
    router = make(**case, bias=BIASES["biased"]).to(dtype)
    hidden = states(40, dtype=dtype)
    scores, weights, ids = router(hidden)
    expected, selected = naive_of(hidden.double(), router.weight.double(), BIASES["biased"], **case)
    assert (scores.dtype, weights.dtype, ids.dtype) == (torch.float32, dtype, torch.int64)
    assert ids.tolist() == selected
    table = dense(weights, ids, E).double()
    torch.testing.assert_close(table, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_logits_stay_in_float32_under_autocast() -> None:
    router, hidden = make(2).float(), states(dtype=torch.float32)
    expected = router(hidden)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(hidden)[0], expected)


def test_the_returned_scores_are_the_logits_with_their_graph_to_the_weight() -> None:
    router, hidden = make(**CASES["deepseek-v3"], bias=BIASES["biased"]), states()
    scores = router(hidden)[0]
    torch.testing.assert_close(scores, hidden @ router.weight.T)
    (gradient,) = torch.autograd.grad(scores.sum(), router.weight)
    torch.testing.assert_close(gradient, hidden.sum(0).expand(E, D))


def test_the_bias_changes_the_selection_and_not_the_weights_of_the_selected() -> None:
    free, hidden = make(2, "sigmoid"), states()
    biased = make(2, "sigmoid", bias=[10.0] + [0.0] * (E - 1))
    (scores, *_), (_, weights, ids) = free(hidden), biased(hidden)
    assert (ids[:, 0] == 0).all()
    assert (free(hidden)[2] != ids).any()
    torch.testing.assert_close(weights, scores.sigmoid().gather(1, ids))


def test_a_lower_temperature_is_sharper() -> None:
    tops = [make(1, temperature=t)(states())[1].mean().item() for t in (0.25, 1.0, 4.0)]
    assert tops == sorted(tops, reverse=True)
    assert tops[0] - tops[2] > 0.1


def test_logit_normalisation_makes_the_scale_of_the_weight_irrelevant() -> None:
    router, hidden = make(2, logit_norm=2.0), states()
    before = router(hidden)
    with torch.no_grad():
        router.weight.mul_(100.0)
    after = router(hidden)
    torch.testing.assert_close(before[1], after[1])
    torch.testing.assert_close(after[0].std(dim=1, correction=0), torch.full((T,), 2.0).double())


def test_sqrtsoftplus_has_finite_gradients_where_softplus_underflows() -> None:
    logits = torch.tensor([[-200.0, -104.0, 0.0, 200.0]], requires_grad=True)
    scores_of(logits, "sqrtsoftplus").sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "options",
    [
        {"jitter": 0.3},
        {"noise": FixedNoise(1.0)},
        {"noise": LearnedNoise(D, E)},
        {"random_second": True},
        {"selection": Sinkhorn()},
    ],
    ids=["jitter", "fixed-noise", "learned-noise", "random-second", "sinkhorn"],
)
def test_noise_acts_in_training_only(options) -> None:
    router, hidden = sharpened(TopKRouter(D, E, 2, **options)).double(), states(200)
    plain = make(2)(hidden)
    torch.manual_seed(0)
    trained = router.train()(hidden)
    assert (trained[2] != plain[2]).any()
    for mine, theirs in zip(router.eval()(hidden), plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_noise_does_not_enter_the_returned_logits_and_shows_at_its_module() -> None:
    router, hidden, heard = sharpened(TopKRouter(D, E, 2, noise=LearnedNoise(D, E))), states(), []
    router.double()
    router.noise.register_forward_hook(lambda _, args, out: heard.append((args[0], *out)))
    scores, _, ids = router(hidden)
    ((clean, noisy, std),) = heard
    torch.testing.assert_close(scores, hidden @ router.weight.T)
    assert torch.equal(clean, scores)
    assert torch.equal(ids, noisy.topk(2).indices)
    # At weight 0 the scale is softplus(0) + floor everywhere.
    torch.testing.assert_close(std, torch.full((T, E), 2.0).double().log() + 0.01)


def test_learned_noise_has_the_standard_deviation_that_it_says() -> None:
    torch.manual_seed(0)
    noise, hidden = LearnedNoise(D, E), states(1, dtype=torch.float32).expand(20_000, D)
    with torch.no_grad():
        noise.weight.normal_()
    noisy, std = noise(torch.zeros(20_000, E), hidden)
    torch.testing.assert_close(noisy.std(dim=0), std[0], rtol=0.03, atol=0)
    noisy.square().sum().backward()
    assert (noise.weight.grad.abs().sum(dim=1) > 0).all()


def test_jitter_stays_within_its_width() -> None:
    torch.manual_seed(0)
    router = TopKRouter(1, 2, 1, jitter=0.25)
    with torch.no_grad():
        router.weight.fill_(1.0)
    factors = router(torch.ones(2000, 1))[0][:, 0]
    assert 0.75 <= factors.min() < 0.76
    assert 1.24 < factors.max() <= 1.25


def test_the_random_second_expert_is_kept_at_twice_its_share() -> None:
    torch.manual_seed(0)
    router = TopKRouter(2, 3, 2, weighting="renormalized", random_second=True)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[2.0, 0], [0, 0], [-2.0, 0]]))
    _, weights, ids = router(torch.tensor([[0.5, 0.0]]).expand(20_000, 2))
    share = 1 / (1 + torch.e)  # the logits of the two are 1 and 0
    kept = ids[:, 1] != NO_EXPERT
    assert (ids[:, 0] == 0).all()
    assert kept.double().mean().item() == pytest.approx(2 * share, abs=0.015)
    torch.testing.assert_close(weights[:, 0], torch.full((20_000,), 1 - share))
    torch.testing.assert_close(weights[:, 1], kept * share)


def test_random_selection_takes_each_expert_equally_often() -> None:
    torch.manual_seed(0)
    router = sharpened(TopKRouter(D, E, 3, selection=Random()))
    ids = router(states(8000, dtype=torch.float32))[2]
    dense(torch.ones(ids.shape), ids, E)  # no expert twice
    assert (loads(ids, E) / (8000 * 3 / E) - 1).abs().max() < 0.06


def test_null_experts_are_chosen_under_the_ids_after_the_computing_ones() -> None:
    router = sharpened(TopKRouter(D, E, 2, null_experts=3, selection_bias=True))
    router.selection_bias[E + 1] = 5.0
    scores, weights, ids = router(states(dtype=torch.float32))
    assert scores.shape == (T, E + 3)
    assert (ids[:, 0] == E + 1).all()
    torch.testing.assert_close(weights, scores.softmax(1).gather(1, ids))

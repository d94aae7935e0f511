"""Expert choice, expert threshold and ReLU routing, against their twins and by their promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equipoise.nn import (
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    ReLURouter,
    future_leak,
    naive_routers,
)
from equipoise.routing import NO_EXPERT
from tests.nn.routing import D, E, dense, gradients, loads, sharpened, states


def choice(top_k=2, **options):
    return sharpened(ExpertChoiceRouter(D, E, top_k, **options)).double()


def threshold(top_k=2, **options):
    router = sharpened(ExpertThresholdRouter(D, E, top_k, **options)).double()
    router.threshold_E.copy_(torch.linspace(0.2, 0.9, E))
    return router


def relu(top_k=2, **options):
    return sharpened(ReLURouter(D, E, top_k, **options)).double().eval()


TWINS = {
    "choice": (
        choice,
        lambda h, r: naive_routers.expert_choice(h, r.weight, 2, function="softmax"),
    ),
    "choice-sigmoid-chunks": (
        lambda: choice(3, score_function="sigmoid", chunk=4),
        lambda h, r: naive_routers.expert_choice(h, r.weight, 3, function="sigmoid", chunk=4),
    ),
    "threshold": (
        threshold,
        lambda h, r: naive_routers.expert_threshold(
            h, r.weight, r.threshold_E.tolist(), function="sigmoid"
        ),
    ),
    "threshold-sqrtsoftplus": (
        lambda: threshold(score_function="sqrtsoftplus"),
        lambda h, r: naive_routers.expert_threshold(
            h, r.weight, r.threshold_E.tolist(), function="sqrtsoftplus"
        ),
    ),
    "relu": (relu, lambda h, r: naive_routers.relu(h, r.weight)),
}


@pytest.mark.parametrize(("make", "naive"), TWINS.values(), ids=TWINS)
def test_weights_and_gradients_are_those_of_the_naive_twin(make, naive) -> None:
    router, hidden = make(), states().requires_grad_()
    _, weights, ids = router(hidden)
    table, expected = dense(weights, ids, E), naive(hidden, router)
    torch.testing.assert_close(table, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ids != NO_EXPERT, weights != 0)
    assert ids.shape[1] == max(1, (expected != 0).sum(1).max())
    inputs = (hidden, router.weight)
    for mine, theirs in zip(gradients(table, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("make", "naive"), TWINS.values(), ids=TWINS)
def test_the_naive_twin_passes_gradcheck(make, naive) -> None:
    router, hidden = make(), states(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, _: naive(h, router), (hidden, router.weight))


@pytest.mark.parametrize(("make", "naive"), TWINS.values(), ids=TWINS)
def test_no_tokens_and_tokens_without_experts_give_one_empty_slot(make, naive) -> None:
    router = make().train()
    scores, weights, ids = router(states(0))
    assert (scores.shape, weights.shape, ids.shape) == ((0, E), (0, 1), (0, 1))
    if not isinstance(router, ExpertChoiceRouter):
        with torch.no_grad():
            router.weight.fill_(1.0)
        _, weights, ids = router(torch.full((3, D), -2.0).double())
        assert (ids == NO_EXPERT).all()
        assert (weights == 0).all()
        assert ids.shape == (3, 1)


def test_expert_choice_gives_every_expert_the_same_load_in_every_chunk() -> None:
    ids = choice(chunk=16)(states(64) + 1.0)[2]
    for part in ids.split(16):
        assert loads(part, E).tolist() == [16 * 2 // E] * E
    whole = choice()(states(64) + 1.0)[2]
    assert loads(whole, E).tolist() == [64 * 2 // E] * E


def selections(router, hidden):
    _, _, ids = router(hidden)
    return [set(row) - {NO_EXPERT} for row in ids.tolist()]


def test_expert_choice_tells_an_earlier_token_of_a_later_one_and_the_threshold_does_not() -> None:
    hidden = states(16)
    changed = hidden.clone()
    changed[-1] = 3 * states(1, seed=9)
    leaky, causal = choice(), threshold()
    assert selections(leaky, hidden)[:-1] != selections(leaky, changed)[:-1]
    assert selections(causal, hidden)[:-1] == selections(causal, changed)[:-1]
    # Chunks bound the leak: nothing outside the last one hears of the change.
    chunked = choice(chunk=8)
    assert selections(chunked, hidden)[:8] == selections(chunked, changed)[:8]
    assert selections(chunked, hidden)[8:-1] != selections(chunked, changed)[8:-1]


def test_shuffled_chunks_are_chunks_of_a_random_order_with_the_same_load() -> None:
    router, hidden = choice(chunk=16, shuffle=True), states(60)
    torch.manual_seed(3)
    _, weights, ids = router(hidden)
    torch.manual_seed(3)
    order = torch.randperm(60)
    naive = naive_routers.expert_choice(
        hidden[order], router.weight, 2, function="softmax", chunk=16
    )
    torch.testing.assert_close(dense(weights, ids, E)[order], naive)
    assert loads(ids, E).tolist() == [3 * 16 * 2 // E + 12 * 2 // E] * E


def told(router, draws=200):
    """How often a token's experts change with a later token of its sequence, and with another's.

    Two sequences of 8; token 0 is asked, token 5 and token 13 are changed.
    """
    hidden, changes = states(16), [0, 0]
    for seed in range(draws):
        for number, token in enumerate((5, 13)):
            other = hidden.clone()
            other[token] = 3 * states(1, seed=seed + 50)
            found = []
            for given in (hidden, other):
                torch.manual_seed(seed)
                found.append(selections(router, given)[0])
            changes[number] += found[0] != found[1]
    return [change / draws for change in changes]


def test_shuffling_tells_a_token_no_more_of_its_own_future_than_of_other_sequences() -> None:
    own, other = told(choice(chunk=8))
    assert own > 0.1
    assert other == 0
    own, other = told(choice(chunk=8, shuffle=True))
    assert own == pytest.approx(other, abs=0.06)
    assert own > 0


def test_causal_expert_choice_routes_each_token_by_itself_in_evaluation_only() -> None:
    router, hidden = choice(chunk=8).train(), states(400) + 0.5
    picked = router(hidden)[2]
    router.step()
    router.causal = True
    assert torch.equal(router(hidden)[2], picked)
    router.eval()
    changed = hidden.clone()
    changed[-1] = 3 * states(1, seed=9)
    assert selections(router, hidden)[:-1] == selections(router, changed)[:-1]
    expected = naive_routers.expert_threshold(
        hidden, router.weight, router.threshold_E.tolist(), function="softmax"
    )
    torch.testing.assert_close(dense(*router(hidden)[1:], E), expected)
    # On the tokens that set them, thresholds give every expert its share of all, to rounding.
    assert (loads(router(hidden)[2], E) - 400 * 2 // E).abs().max() <= 1


def test_the_leak_bound_reproduces_the_papers_example() -> None:
    # arXiv 2408.15664: 9 layers, 16 experts, top-2: more than 50 bits a token.
    assert 9 * future_leak(2, 16) == pytest.approx(18 * math.log2(7))
    assert 9 * future_leak(2, 16) > 50
    with pytest.raises(ValueError, match="top_k=4 of 8 experts; the bound is for under half"):
        future_leak(4, 8)


def test_the_first_step_sets_thresholds_that_k_of_e_tokens_exceed() -> None:
    # In float32, as the thresholds are: a token at the edge would else fall on either side.
    router, hidden = threshold().float(), states(400, dtype=torch.float32) + 0.5
    router(hidden)
    router.step()
    assert loads(router(hidden)[2], E).tolist() == [400 * 2 // E] * E
    # On fresh tokens of the same kind the average holds, but for chance.
    fresh = router.eval()(states(4000, seed=5, dtype=torch.float32) + 0.5)[2]
    assert (loads(fresh, E) / 4000 - 2 / E).abs().max() < 0.07


def test_the_start_guesses_the_load_for_hidden_states_of_unit_square() -> None:
    torch.manual_seed(0)
    router = ExpertThresholdRouter(256, 64, 4)
    share = loads(router(torch.randn(2000, 256))[2], 64) / 2000
    assert share.mean().item() == pytest.approx(4 / 64, rel=0.2)


def test_micro_batches_weigh_by_their_tokens_and_steps_by_the_decay() -> None:
    router = threshold(decay=0.5)
    whole, parts = states(60), states(60).split([20, 20, 20])
    scores = (whole @ router.weight.T).sigmoid()

    def edge(s):
        return s.sort(dim=0, descending=True).values[round(len(s) * 2 / E)]

    for part in parts[:2]:
        router(part)
    router.step()
    first = (edge(scores[:20]) + edge(scores[20:40])) / 2
    torch.testing.assert_close(router.threshold_E, first.float())
    router(parts[2])
    router(whole)
    router.step()
    second = (20 * edge(scores[40:]) + 60 * edge(scores)) / 80
    torch.testing.assert_close(router.threshold_E, ((first + second) / 2).float())
    router.step()
    torch.testing.assert_close(router.threshold_E, ((first + second) / 2).float())


@pytest.mark.parametrize("make", [threshold, choice, relu], ids=["threshold", "choice", "relu"])
def test_a_step_over_a_group_is_the_step_of_one_process_that_saw_all_tokens(
    make, monkeypatch
) -> None:
    whole, ranks, parts = make().train(), [make().train() for _ in range(3)], states(50).split(20)
    for rank, part in zip(ranks, parts[:2], strict=False):  # the third rank has no token
        rank(part)
        whole(part)
    whole.step()
    everything, sent = sum(rank._noted for rank in ranks[:2]), []

    def all_reduce(tensor, group):
        sent.append(tensor.clone())
        tensor.copy_(everything)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    for rank in ranks:
        rank.step(group="all ranks")
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(rank.state_dict()[name], value)
    torch.testing.assert_close(sum(sent), everything)
    assert any((value != make().state_dict()[k]).any() for k, value in whole.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [threshold, relu], ids=["threshold", "relu"])
def test_evaluation_and_recomputation_are_not_noted(make, reentrant) -> None:
    hidden, plain, recomputed = states(32).requires_grad_(), make().train(), make()
    plain(hidden)
    recomputed.eval()(states(50, seed=3))
    assert recomputed._noted is None
    checkpoint(recomputed.train(), hidden, use_reentrant=reentrant)[1].sum().backward()
    assert recomputed.weight.grad.abs().sum() > 0
    assert torch.equal(recomputed._noted, plain._noted)
    plain(hidden)
    assert not torch.equal(recomputed._noted, plain._noted)


def test_the_l1_gradient_is_added_once_and_the_loss_is_untouched() -> None:
    hidden, router = states(20), relu(l1_weight=0.7).train()
    router.loss_scale = 0.5
    plain = relu(l1_weight=0.7)
    plain.load_state_dict(router.state_dict())
    trained, still = router(hidden), plain(hidden)
    for mine, theirs in zip(trained, still, strict=True):
        assert torch.equal(mine, theirs)
    trained[1].square().sum().backward()
    term = naive_routers.relu_l1(hidden, plain.weight, 2)
    weight = router.l1_weight.double()
    (still[1].square().sum() + 0.5 * weight * term).backward()
    torch.testing.assert_close(router.weight.grad, plain.weight.grad)


def test_the_l1_term_passes_gradcheck_and_is_the_l1_norm_times_load() -> None:
    hidden, weight = states(4), relu().weight
    assert torch.autograd.gradcheck(lambda w: naive_routers.relu_l1(hidden, w, 2), weight)
    active = naive_routers.relu(hidden, weight)
    load = (active > 0).double().sum(0) * E / (2 * 4)
    expected = (active.sum(0) * load).sum() / 4
    torch.testing.assert_close(naive_routers.relu_l1(hidden, weight, 2), expected)


def test_the_l1_strength_goes_up_when_too_many_are_active_and_down_when_too_few() -> None:
    router, hidden = relu(top_k=1, l1_weight=0.1, rate=2.0).train(), states(50)
    router(hidden)
    router.step()
    assert router.l1_weight.item() == pytest.approx(0.2)
    router.step()  # nothing was noted
    assert router.l1_weight.item() == pytest.approx(0.2)
    full = relu(top_k=E, l1_weight=0.1, rate=2.0).train()
    full(hidden)
    full.step()
    assert full.l1_weight.item() == pytest.approx(0.05)


def mean_active(adaptive):
    """Experts per token over the second half of 400 training steps of a task that wants all."""
    torch.manual_seed(0)
    router = ReLURouter(16, 16, 2, l1_weight=1e-2 if adaptive else 1e-30, rate=1.05)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    course = []
    for seed in range(400):
        scores, weights, _ = router(states(256, 16, seed, torch.float32) + 1.0)
        optimizer.zero_grad()
        (scores - 0.5).square().mean().backward()
        optimizer.step()
        if adaptive:
            router.step()
        course.append((weights > 0).sum(1).float().mean().item())
    return sum(course[200:]) / 200


def test_the_adaptive_l1_term_brings_the_mean_number_of_experts_near_k() -> None:
    assert mean_active(adaptive=False) > 12
    assert mean_active(adaptive=True) == pytest.approx(2, abs=0.8)


def test_the_l1_strength_stays_finite_where_activity_cannot_fall() -> None:
    router, hidden = relu(top_k=1).train(), states(20).requires_grad_()
    for _ in range(1000):
        router(hidden.detach())
        router.step()
    assert torch.isfinite(router.l1_weight)
    router(hidden)[1].sum().backward()
    assert torch.isfinite(router.weight.grad).all()


def test_impossible_configurations_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        ExpertChoiceRouter(D, E, 2, chunk=0)
    with pytest.raises(ValueError, match="shuffle=True changes nothing without chunk"):
        ExpertChoiceRouter(D, E, 2, shuffle=True)
    with pytest.raises(ValueError, match="top_k=9 of 8 experts"):
        ExpertChoiceRouter(D, E, 9)
    with pytest.raises(ValueError, match="score_function='softmax'; allowed are 'sigmoid'"):
        ExpertThresholdRouter(D, E, 2, score_function="softmax")
    with pytest.raises(ValueError, match="decay=1"):
        ExpertThresholdRouter(D, E, 2, decay=1.0)
    with pytest.raises(ValueError, match="leaves nothing to choose"):
        ExpertThresholdRouter(D, E, E)
    with pytest.raises(ValueError, match="l1_weight=0"):
        ReLURouter(D, E, 2, l1_weight=0.0)
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        ReLURouter(D, E, 2, rate=1.0)

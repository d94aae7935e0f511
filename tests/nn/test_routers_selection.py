"""Group limits, Sinkhorn, assignment and hash tables: the properties that give them their names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.nn import (
    Assignment,
    GroupLimited,
    HashRouter,
    Sinkhorn,
    TopKRouter,
    hash_table,
    naive_routers,
    node_limited,
    token_ids,
)
from equipoise.nn.assignment import assign, sinkhorn
from tests.nn.routing import D, E, T, dense, loads, sharpened, states


@given(
    seed=st.integers(0, 10_000),
    groups=st.sampled_from([1, 2, 4, 8]),
    shift=st.sampled_from([-5.0, 0.0, 5.0]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_group_limits_agree_with_the_loop_and_hold_for_negative_scores(
    seed, groups, shift, data
) -> None:
    limit = data.draw(st.integers(1, groups))
    per_group = data.draw(st.integers(1, E // groups))
    top_k = data.draw(st.integers(1, limit * (E // groups)))
    scores = states(5, E, seed) + shift
    ids = GroupLimited(groups, limit, per_group)(scores, top_k, training=True)
    for row, values in zip(ids.tolist(), scores.tolist(), strict=True):
        allowed = naive_routers.in_best_groups(values, groups, limit, per_group)
        assert row == sorted(allowed, key=lambda e: -values[e])[:top_k]


def test_node_limits_are_worth_the_best_k_over_m_scores_of_a_node() -> None:
    assert node_limited(8, 4, 8) == GroupLimited(8, 4, per_group=2)
    with pytest.raises(ValueError, match="limit=3 nodes do not divide top_k=8"):
        node_limited(8, 3, 8)


def test_sinkhorn_is_the_plain_scaling_and_its_plan_is_balanced() -> None:
    logits = 2 * states(12, E)
    naive = torch.tensor(naive_routers.sinkhorn(logits.tolist(), 3), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits, 3).exp(), naive)
    plan = sinkhorn(logits, 200).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 12 / E).double())
    torch.testing.assert_close(plan.sum(1), torch.ones(12).double())
    assert torch.isfinite(sinkhorn(1000 * logits, 5)).all()


def test_sinkhorn_levels_a_skewed_load_and_leaves_weights_to_the_scores() -> None:
    router = sharpened(TopKRouter(D, E, 2, selection=Sinkhorn(20)))
    hidden = states(400, dtype=torch.float32) + 2.0
    free, (scores, weights, ids) = router.eval()(hidden), router.train()(hidden)
    worst_free, worst = loads(free[2], E).max(), loads(ids, E).max()
    assert worst_free > 2.5 * 100
    assert worst < 1.3 * 100
    torch.testing.assert_close(weights, scores.softmax(1).gather(1, ids))


@pytest.mark.parametrize(("tokens", "experts"), [(6, 3), (6, 2), (5, 3), (7, 2), (2, 4), (1, 3)])
def test_assignment_reaches_the_best_total_that_capacity_allows(tokens, experts) -> None:
    for seed in range(5):
        logits = states(tokens, experts, seed)
        ids = assign(logits)
        assert loads(ids, experts).max() <= -(-tokens // experts)
        total = logits.gather(1, ids.unsqueeze(1)).sum().item()
        assert total == pytest.approx(naive_routers.best_assignment(logits.tolist()))


def test_base_is_balanced_in_training_and_greedy_in_evaluation() -> None:
    router = TopKRouter(D, E, 1, score_function="sigmoid", selection=Assignment())
    sharpened(router)
    scores, weights, ids = router(states(64, dtype=torch.float32) + 1.0)
    assert loads(ids, E).tolist() == [64 // E] * E
    torch.testing.assert_close(weights, scores.sigmoid().gather(1, ids))
    scores, _, ids = router.eval()(states(64, dtype=torch.float32) + 1.0)
    assert torch.equal(ids[:, 0], scores.argmax(1))
    assert loads(ids, E).max() > 64 // E


def test_a_hash_router_follows_the_table_whatever_the_hidden_states_say() -> None:
    table = hash_table(20, E, 2, seed=3)
    router, tokens = sharpened(HashRouter(D, E, table)), torch.tensor([4, 19, 4, 0, 7, 7, 1])
    _, weights, ids = router(states(dtype=torch.float32), tokens)
    assert torch.equal(ids, table[tokens])
    assert (weights == 0.5).all()
    assert not router.weight.requires_grad
    assert torch.equal(router(states(seed=9, dtype=torch.float32), tokens)[2], ids)


def test_a_hash_router_may_weigh_by_score() -> None:
    options = {"score_function": "sqrtsoftplus", "weighting": "renormalized", "route_scale": 2.0}
    router = sharpened(HashRouter(D, E, hash_table(20, E, 3), **options)).double()
    scores, weights, ids = router(states(), torch.arange(T))
    for row, picked, got in zip(scores, ids, weights, strict=True):
        values = naive_routers.scores([row[e] for e in picked], "sqrtsoftplus")
        expected = [2 * w for w in naive_routers.weighed(values, "renormalized")]
        torch.testing.assert_close(got, torch.stack(expected))
    weights[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_token_ids_reach_the_router_by_context_and_end_with_it() -> None:
    router, hidden = HashRouter(D, E, hash_table(20, E)), states(6, dtype=torch.float32)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with token_ids(tokens):
        ids = router(hidden)[2]
        with token_ids(tokens + 1):
            assert torch.equal(router(hidden)[2], router.tid2eid[tokens.flatten() + 1])
    assert torch.equal(ids, router.tid2eid[tokens.flatten()])
    with pytest.raises(ValueError, match="a HashRouter needs token ids"):
        router(hidden)
    with pytest.raises(ValueError, match="5 token ids for 6 rows"):
        router(hidden, torch.arange(5))


def test_a_balanced_table_levels_the_load_that_a_random_one_leaves_uneven() -> None:
    counts = (10_000 / torch.arange(1, 1001)).round()

    def load(table):
        weights = counts.unsqueeze(1).expand(table.shape).flatten()
        return torch.zeros(E).scatter_add(0, table.flatten(), weights)

    balanced, random = hash_table(1000, E, 2, counts_V=counts), hash_table(1000, E, 2)
    for table in (balanced, random):
        dense(torch.ones(table.shape), table, E)
    assert load(balanced).max() / load(balanced).mean() < 1.1
    assert load(random).max() / load(random).mean() > 1.2
    assert torch.equal(random, hash_table(1000, E, 2))
    assert not torch.equal(random, hash_table(1000, E, 2, seed=1))


def test_a_table_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="names experts 0 to 8; there are 8"):
        HashRouter(D, E, torch.tensor([[0], [8]]))
    with pytest.raises(ValueError, match="integers of shape"):
        HashRouter(D, E, torch.zeros(4, 1))
    with pytest.raises(ValueError, match="selection_bias: not for a router that reads a table"):
        HashRouter(D, E, hash_table(4, E), selection_bias=True)
    with pytest.raises(ValueError, match="top_k=9 of 8 experts"):
        hash_table(4, E, 9)
    with pytest.raises(ValueError, match="3 token ids"):
        hash_table(3, E, counts_V=torch.ones(4))

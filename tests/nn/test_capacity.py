"""Capacity: who is kept, what becomes of the rest; equal to a loop over Python lists."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.nn import naive
from equipoise.nn.capacity import BY, capacity, limit
from equipoise.nn.limiter import Capacity, Limiter
from equipoise.routing import NO_EXPERT

E = 6


def routing(tokens=14, k=3, seed=0, crowd=2.0, empty=0.1, null=0):
    """Scores that crowd on the first experts, and their top-k with softmax weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, E, generator=generator, dtype=torch.float64)
    scores -= crowd * torch.arange(E) / E
    weights, ids = scores.softmax(dim=1).topk(k, dim=1)
    gone = torch.rand(tokens, k, generator=generator) < empty
    ids = ids.masked_fill(gone, NO_EXPERT)
    if null:
        ids[::4, 0] = E + null - 1
    valid = torch.rand(tokens, generator=generator) < 0.8
    return ids, weights.masked_fill(gone, 0.0), scores, valid


def loads(ids, groups=None):
    per = E // groups if groups else 1
    return torch.bincount(ids[(ids >= 0) & (ids < E)] // per, minlength=E // per)


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
@pytest.mark.parametrize("by", BY)
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 16),
    k=st.integers(1, 6),
    room=st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=E, max_size=E)),
    groups=st.sampled_from([None, 2, 3]),
    null=st.sampled_from([0, 2]),
    seed=st.integers(0, 999),
)
def test_limits_equal_the_loop(by, overflow, tokens, k, room, groups, null, seed) -> None:
    ids, weights, scores, valid = routing(tokens, k, seed, null=null)
    buckets = groups or E
    rooms = [room] * buckets if isinstance(room, int) else room[:buckets]
    found = limit(
        ids,
        weights,
        scores,
        valid,
        num_experts=E,
        capacity=room if isinstance(room, int) else torch.tensor(rooms),
        by=by,
        overflow=overflow,
        groups=groups,
    )
    wanted, share = naive.limit(
        *(x.tolist() for x in (ids, weights, scores, valid)),
        num_experts=E,
        room=rooms,
        by=by,
        overflow=overflow,
        groups=groups,
    )
    assert found.expert_ids_TK.tolist() == wanted
    assert found.dropped_share.item() == pytest.approx(share)
    kept = found.expert_ids_TK
    assert (loads(kept, groups) <= torch.tensor(rooms)).all()
    assert (found.weights_TK[kept == NO_EXPERT] == 0).all()
    same = kept == ids
    assert torch.equal(found.weights_TK[same], weights[same])
    for row in kept.tolist():
        experts = [e for e in row if 0 <= e < E]
        assert len(set(experts)) == len(experts)


def test_by_position_serves_who_comes_first() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 1]])
    weights = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.9, 0.9], [0.8, 0.8]])
    options = {"num_experts": 3, "capacity": 1}
    by_token = limit(ids, weights, by="position", **options).expert_ids_TK
    assert by_token.tolist() == [[0, 1], [-1, -1], [-1, 2], [-1, -1]]
    by_choice = limit(ids, weights, by="choice", **options).expert_ids_TK
    assert by_choice.tolist() == [[0, -1], [1, -1], [-1, -1], [2, -1]]
    by_weight = limit(ids, weights, by="probability", **options)
    assert by_weight.expert_ids_TK.tolist() == [[-1, -1], [-1, -1], [0, 2], [-1, 1]]
    assert by_weight.dropped_share == 5 / 8


def test_a_later_token_never_takes_room_from_an_earlier_one() -> None:
    ids, weights, *_ = routing(tokens=30)
    full = limit(ids, weights, num_experts=E, capacity=5).expert_ids_TK
    for tokens in range(30):
        part = limit(ids[:tokens], weights[:tokens], num_experts=E, capacity=5).expert_ids_TK
        assert torch.equal(part, full[:tokens])


def test_padding_takes_no_room_and_is_no_drop() -> None:
    ids, weights = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1)
    valid = torch.tensor([False, False, True, True, False, True])
    found = limit(ids, weights, None, valid, num_experts=2, capacity=2)
    assert found.expert_ids_TK[:, 0].tolist() == [-1, -1, 0, 0, -1, -1]
    assert found.dropped_share == pytest.approx(1 / 3)


def test_enough_room_changes_nothing() -> None:
    ids, weights, scores, _ = routing()
    for overflow, by in itertools.product(("drop", "reroute"), BY):
        found = limit(ids, weights, scores, num_experts=E, capacity=14, by=by, overflow=overflow)
        assert torch.equal(found.expert_ids_TK, ids)
        assert torch.equal(found.weights_TK, weights)
        assert found.dropped_share == 0


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_a_moved_slot_weighs_what_its_new_expert_scores(function: str) -> None:
    _, _, logits, _ = routing(empty=0.0)
    scores = {
        "softmax": logits.softmax(dim=1),
        "sigmoid": logits.sigmoid(),
        "sqrtsoftplus": torch.nn.functional.softplus(logits).sqrt(),
    }[function]
    ids = logits.topk(3, dim=1).indices
    weights = 2.5 * scores.gather(1, ids)
    found = limit(
        ids,
        weights,
        logits,
        num_experts=E,
        capacity=6,
        overflow="reroute",
        score_function=function,
    )
    kept = found.expert_ids_TK != NO_EXPERT
    assert (found.expert_ids_TK != ids)[kept].any()
    wanted = 2.5 * scores.gather(1, found.expert_ids_TK.clamp_min(0))
    torch.testing.assert_close(found.weights_TK[kept], wanted[kept])


def test_gradients_reach_scores_of_moved_slots_only_through_their_new_weight() -> None:
    ids, weights, scores, _ = routing(empty=0.0)
    weights, scores = weights.requires_grad_(), scores.requires_grad_()

    def kept(w, s):
        return limit(ids, w, s, num_experts=E, capacity=6, overflow="reroute").weights_TK

    assert torch.autograd.gradcheck(kept, (weights, scores))
    dropped = limit(ids, weights, scores, num_experts=E, capacity=6)
    dropped.weights_TK.sum().backward()
    assert torch.equal(weights.grad == 0, dropped.expert_ids_TK == NO_EXPERT)


def test_rerouting_fills_all_room_before_it_drops() -> None:
    ids = torch.zeros(12, 1, dtype=torch.int64)
    scores = torch.randn(12, E)
    found = limit(ids, torch.ones(12, 1), scores, num_experts=E, capacity=2, overflow="reroute")
    assert loads(found.expert_ids_TK).tolist() == [2] * E
    assert found.dropped_share == 0


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "factor", "wanted"),
    [(10, 1, 1, 1.1, 11), (100, 2, 8, 1.25, 32), (7, 2, 4, 1.0, 4), (0, 2, 4, 1.0, 0)],
)
def test_capacity_is_the_ceiling_of_t_k_over_e_times_factor(
    tokens: int, k: int, experts: int, factor: float, wanted: int
) -> None:
    assert capacity(tokens, k, experts, factor) == wanted


def test_rerouting_asks_for_scores_it_can_use() -> None:
    ids, weights, scores, _ = routing()
    with pytest.raises(ValueError, match="needs scores_TE"):
        limit(ids, weights, num_experts=E, capacity=1, overflow="reroute")
    with pytest.raises(ValueError, match="score_function='hash'"):
        limit(
            ids,
            weights,
            scores,
            num_experts=E,
            capacity=1,
            overflow="reroute",
            score_function="hash",
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "luck"}, "by='luck'; allowed are 'position', 'choice', 'probability'"),
        ({"overflow": "spill"}, "allowed are 'drop', 'reroute', 'pad'"),
        ({"factor": 0}, "factor=0; it has to be above 0"),
        ({"recent": 1.0}, "recent=1.0"),
        ({"overflow": "pad", "groups": 2}, "no groups, no recent"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Capacity(**options)


def test_groups_have_to_divide_the_experts() -> None:
    with pytest.raises(ValueError, match="groups=4 for 6 experts"):
        Limiter(Capacity(groups=4), E)


def test_bad_options_of_a_limit_are_named() -> None:
    ids, weights, *_ = routing()
    for options, message in (
        ({"by": "luck"}, "by='luck'"),
        ({"overflow": "spill"}, "overflow='spill'"),
        ({"groups": 4}, "groups=4 for 6 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            limit(ids, weights, num_experts=E, capacity=1, **options)


def test_a_capacity_that_follows_the_load() -> None:
    limiter = Limiter(Capacity(factor=1.0, recent=0.5), num_experts=2)
    ids = torch.tensor([[0], [0], [0], [1]])
    weights = torch.ones(4, 1)
    assert limiter(ids, weights, count=True).dropped_share == 1 / 4
    assert limiter.capacity(ids) == 2
    limiter(ids, weights)
    limiter.step()
    assert limiter.share_E.tolist() == [0.75, 0.25]
    assert limiter.capacity(ids).tolist() == [3, 2]
    assert limiter(ids, weights, count=True).dropped_share == 0
    limiter(ids.flip(0) * 0, weights, count=True)
    limiter.step()
    assert limiter.share_E.tolist() == [0.5 * 0.75 + 0.5 * 7 / 8, 0.5 * 0.25 + 0.5 * 1 / 8]


def test_the_recent_load_is_saved_and_loaded() -> None:
    limiter, other = (Limiter(Capacity(recent=0.5), E) for _ in range(2))
    ids, weights, _, valid = routing()
    limiter(ids, weights, None, valid, count=True)
    limiter.step()
    limiter(ids, weights, count=True)
    other.load_state_dict(limiter.state_dict())
    for each in (limiter, other):
        each(ids, weights, count=True)
        each.step()
    assert torch.equal(limiter.share_E, other.share_E)
    wanted = torch.bincount(ids[valid][ids[valid] >= 0], minlength=E).double()
    fresh = Limiter(Capacity(recent=0.5), E)
    fresh(ids, weights, None, valid, count=True)
    assert torch.equal(fresh.counts_E.double(), wanted)
    with pytest.raises(ValueError, match=r"share_E of \[6\]; wanted is \[4\]"):
        Limiter(Capacity(recent=0.5), 4).load_state_dict(limiter.state_dict())


def test_capacity_counts_valid_tokens_only() -> None:
    ids, _, _, valid = routing()
    limiter = Limiter(Capacity(factor=1.5), E)
    assert limiter.capacity(ids, valid) == capacity(int(valid.sum()), 3, E, 1.5)
    per_device = Limiter(Capacity(factor=1.5, groups=2), E)
    assert per_device.capacity(ids) == capacity(14, 3, 2, 1.5)

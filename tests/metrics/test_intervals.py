"""Block bootstrap and design effect: repeatable, within range, and near the coverage they claim."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.metrics import load
from equipoise.metrics.blocks import MAX_BLOCKS, deal, span_length
from equipoise.metrics.intervals import design_effect, layer_intervals, share_intervals
from tests.metrics import naive


def documents(p, count, strength=200, tokens=400, seed=0):
    """Counts [S, E] of documents with their own tastes around p."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(rng.lognormal(np.log(tokens), 0.5, count), 20).astype(int)
    return rng.multinomial(sizes, rng.dirichlet(strength * p, count))


def skewed(experts, spread):
    p = np.exp(spread * np.random.default_rng(3).standard_normal(experts))
    return p / p.sum()


@pytest.mark.parametrize(
    ("p", "count"),
    [
        (np.full(16, 1 / 16), 40),
        (skewed(16, 0.15), 40),
        (skewed(64, 0.15), 60),
        (skewed(32, 0.8), 100),
    ],
    ids=["uniform", "mild, 16 experts", "mild, 64 experts", "skewed"],
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(p, count):
    repeats = 100
    hits = dict.fromkeys(("max_vio", "gini", "cv", "entropy", "share"), 0)
    for seed in range(repeats):
        counts = documents(p, count, seed=seed)
        found = layer_intervals(counts, 300)
        for name in ("max_vio", "gini", "cv", "entropy"):
            low, high = found[name]
            hits[name] += low - 1e-9 <= load.MEASURES[name](p) <= high + 1e-9
        low_E, high_E = share_intervals(counts, counts.sum(1), 1)
        hits["share"] += np.mean((low_E <= p) & (p <= high_E))
    for name, held in hits.items():
        assert held / repeats >= 0.85, name


def test_max_vio_lies_in_its_interval_and_intervals_in_their_range():
    for seed in range(20):
        counts = documents(skewed(12, 0.3), 10, seed=seed)
        found = layer_intervals(counts, 200)
        low, high = found["max_vio"]
        assert low <= load.max_vio(counts.sum(0)) <= high <= 11
        assert all(0 <= a <= b for a, b in found.values())
        assert found["entropy"][1] <= 1
        assert found["effective_experts"][1] <= 12 + 1e-9


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_intervals_end_where_every_token_selects_the_same_experts(top_k):
    counts = np.zeros((9, 12), int)
    counts[:7, :top_k] = 300
    counts[7:, top_k : 2 * top_k] = 300  # two of nine blocks want others: as uncertain as it gets
    found = layer_intervals(counts, 200, top_k=top_k)
    beyond = layer_intervals(counts, 200)
    same = np.zeros(12)
    same[:top_k] = 300
    assert found["max_vio"][1] == 12 / top_k - 1
    assert (beyond["max_vio"][1] > 12 / top_k - 1) == (top_k > 1)
    assert found["max_vio"][0] == beyond["max_vio"][0]
    for name in ("gini", "cv"):
        assert found[name][1] <= naive.measures(same.tolist())[name] + 1e-12
    for name in ("entropy", "effective_experts"):
        assert found[name][0] >= naive.measures(same.tolist())[name] - 1e-12


def test_same_blocks_same_interval():
    counts = documents(skewed(8, 0.3), 20)
    assert layer_intervals(counts) == layer_intervals(counts.copy())


def test_intervals_shrink_with_documents():
    p = skewed(16, 0.5)
    widths = []
    for count in (20, 200):
        low, high = layer_intervals(documents(p, count))["max_vio"]
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_fewer_than_eight_blocks_give_none_and_empty_blocks_do_not_count():
    counts = documents(skewed(8, 0.3), 7)
    assert layer_intervals(counts) is None
    assert layer_intervals(np.vstack([counts, np.zeros((20, 8), int)])) is None
    assert np.isnan(design_effect(counts, counts.sum(1), 1).layer)
    more = documents(skewed(8, 0.3), 8)
    padded = np.vstack([more, np.zeros((3, 8), int)])
    assert layer_intervals(padded) == layer_intervals(more)


def test_design_effect_equals_its_definition():
    counts = documents(np.full(6, 1 / 6), 30, strength=40)
    expected = naive.design_effect(counts.tolist(), counts.sum(1).tolist(), 1)
    found = design_effect(counts, counts.sum(1), 1)
    ratio = counts.sum(0) * 6 / counts.sum()
    hot = ratio >= 1
    assert found.expert_E[hot] == pytest.approx(np.array(expected)[hot])
    assert found.expert_E[~hot] == pytest.approx(np.maximum(expected, found.layer)[~hot])
    assert found.layer == pytest.approx(np.mean(expected), rel=0.02)


def test_independent_tokens_have_design_effect_one_and_alike_tokens_more():
    rng = np.random.default_rng(0)
    p = np.full(16, 1 / 16)
    alone = rng.multinomial(np.full(200, 500), np.tile(p, (200, 1)))
    assert design_effect(alone, alone.sum(1), 1).layer == pytest.approx(1, abs=0.05)
    repeated = alone * 7  # every token said seven times
    assert design_effect(repeated, repeated.sum(1), 1).layer == pytest.approx(7, rel=0.05)
    together = documents(p, 200, strength=100, tokens=500)
    size = together.sum(1)
    expected = 1 + ((size**2).sum() / size.sum() - 1) / 101  # of a Dirichlet-multinomial
    assert design_effect(together, size, 1).layer == pytest.approx(expected, rel=0.1)


def test_documents_are_dealt_evenly_and_whole():
    assert deal(5).tolist() == [0, 1, 2, 3, 4]
    hands = np.bincount(deal(1000))
    assert len(hands) == MAX_BLOCKS
    assert hands.max() - hands.min() == 1
    assert (deal(1000) == deal(1000)).all()
    neighbours = np.abs(np.diff(deal(1000)))
    assert np.median(neighbours) > 20


def test_spans_are_few_and_not_short():
    assert span_length(100) == 64
    assert -(-1_000_000 // span_length(1_000_000)) == 64

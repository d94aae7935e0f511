"""Floors: exact moments, the published figures, and both ways of simulating agree."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import EquipoiseError
from equipoise.metrics import load
from equipoise.metrics.floors import exact_counts, floor, normal_counts, uniform_counts

# (tokens, experts, top-k): MaxVio, Gini, CV as simulated with few draws in the project's facts.
PUBLISHED = {
    (512, 64, 6): (0.33, 0.077, 0.137),
    (512, 256, 8): (0.78, 0.135, 0.241),
    (4096, 16, 2): (0.087, 0.023, 0.042),
    (4096, 64, 8): (0.09, 0.024, 0.042),
    (5120, 256, 8): (0.23, 0.044, 0.078),
    (32768, 64, 8): (0.032, 0.008, 0.014),
    (32768, 256, 8): (0.091, 0.017, 0.031),
    (100_000, 128, 8): (0.038, 0.007, 0.013),
}


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_floors_reproduce_the_published_figures(case):
    """MaxVio of so few draws is good to a fifth or so; Gini and CV are printed with 2 digits."""
    found = floor(*case).mean
    max_vio, gini, cv = PUBLISHED[case]
    assert found["max_vio"] == pytest.approx(max_vio, rel=0.2)
    assert found["gini"] == pytest.approx(gini, rel=0.05, abs=0.0006)
    assert found["cv"] == pytest.approx(cv, rel=0.05, abs=0.0011)


@pytest.mark.parametrize("case", [(300, 12, 3), (4096, 64, 8), (100_000, 128, 8)], ids=str)
def test_mean_square_of_cv_is_exact(case):
    """E[CV^2] = (1 - K/E) E / (T K), whatever the distribution of the largest."""
    tokens, experts, top_k = case
    squares = load.cv(uniform_counts(tokens, experts, top_k, 4000, seed=5)) ** 2
    exact = (1 - top_k / experts) * experts / (tokens * top_k)
    assert squares.mean() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("case", [(2048, 256, 8), (8192, 8, 2), (2048, 64, 8)], ids=str)
def test_exact_and_normal_agree_at_the_switch(case):
    exact, normal = exact_counts(*case, 4000, 1), normal_counts(*case, 4000, 2)
    for name, measure in load.MEASURES.items():
        a, b = measure(exact), measure(normal)
        assert a.mean() == pytest.approx(b.mean(), rel=0.03), name
        assert np.quantile(a, 0.95) == pytest.approx(np.quantile(b, 0.95), rel=0.05), name


def test_exact_draws_are_of_distinct_experts_and_even():
    assert (exact_counts(9, 4, 4, 3, 0) == 9).all()
    assert exact_counts(1, 5, 3, 200, 0).max() == 1
    counts = exact_counts(50, 5, 2, 4000, 0)
    assert (counts.sum(1) == 100).all()
    assert counts.mean(0) == pytest.approx([20] * 5, rel=0.01)


def test_limit_lies_on_the_side_of_imbalance():
    found = floor(2000, 32, 4)
    for name in load.MEASURES:
        worse = found.limit[name] < found.mean[name]
        if name == "coverage":
            assert found.limit[name] == found.mean[name] == 1
        else:
            assert worse == (name in load.LOWER_IS_WORSE), name


def test_layers_of_one_shape_cost_one_simulation():
    floor.cache_clear()
    for _ in range(58):
        floor(3000, 64, 6)
    assert floor.cache_info().misses == 1


def test_same_seed_same_floor():
    floor.cache_clear()
    first = floor(1000, 16, 2)
    floor.cache_clear()
    assert floor(1000, 16, 2) == first
    assert floor(1000, 16, 2, seed=1).mean["max_vio"] != first.mean["max_vio"]


def test_routing_to_all_experts_has_no_chance_in_it():
    for tokens in (10, 10**6):
        assert floor(tokens, 4, 4).mean["max_vio"] == 0


def test_no_tokens_no_floor_and_bad_top_k_is_refused():
    assert np.isnan(floor(0, 8, 2).mean["max_vio"])
    with pytest.raises(EquipoiseError, match=r"top-k is 1..8"):
        floor(10, 8, 9)

"""What is computed from finished runs, against hand-made and naive values."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from scipy import stats

from equipoise.lab import Config
from equipoise.lab.evaluate import Evaluation
from equipoise.lab.results import (
    Result,
    equivalence,
    identity,
    largest_domain_share,
    mean_interval,
    settled,
    smooth,
    specialisation,
    starved,
)


def evaluation(counts: object) -> Evaluation:
    """An evaluation with these counts [D, L, E]."""
    found = np.array(counts)
    domains = tuple(f"domain {i}" for i in range(len(found)))
    ones = np.ones(len(found))
    return Evaluation(domains, ones, ones.astype(int), ones, found, np.ones(found.shape[:2]))


def test_a_run_is_known_by_what_its_figures_depend_on(configure: Callable[..., Config]) -> None:
    config = configure()
    for label in ({"name": "other"}, {"data.source": "elsewhere"}, {"threads": 2}):
        assert identity(config.change(label)) == identity(config)
    others = [{"seed": 1}, {"balance": "sign"}, {"model.experts": 8}, {"data.block": 1}]
    assert len({identity(config.change(other)) for other in others} | {identity(config)}) == 5


def test_specialisation_is_0_for_domains_alike_and_ln_of_their_number_for_disjoint_ones() -> None:
    alike = evaluation([[[1, 2, 5]], [[10, 20, 50]]])
    assert specialisation(alike) == pytest.approx(0, abs=1e-12)
    disjoint = evaluation([[[4, 0, 0]], [[0, 9, 0]], [[0, 0, 1]]])
    assert specialisation(disjoint) == pytest.approx(math.log(3))


def test_specialisation_is_the_jensen_shannon_divergence_of_scipy() -> None:
    from scipy.spatial.distance import jensenshannon

    counts = np.random.default_rng(0).integers(1, 90, (2, 3, 8))
    shares = counts / counts.sum(-1, keepdims=True)
    each = [jensenshannon(shares[0, layer], shares[1, layer]) ** 2 for layer in range(3)]
    assert specialisation(evaluation(counts)) == pytest.approx(np.mean(each))


def test_the_largest_share_is_taken_in_each_layer() -> None:
    found = evaluation([[[8, 1, 1], [1, 1, 8]], [[1, 1, 0], [9, 1, 0]]])
    assert largest_domain_share(found) == pytest.approx((0.8 + 0.9) / 2)


def test_starved_cells_are_counted_window_by_window() -> None:
    counts = np.full((6, 1, 4), 100)
    counts[2:4, 0, 1] = 0  # the second window of two steps
    counts[4, 0, 2] = 0  # half of a window is not the window
    assert starved(counts, 0.01, window=2).tolist() == [0, 0.25, 0]


def test_smoothing_is_the_mean_of_what_is_there_so_far() -> None:
    values = np.random.default_rng(0).random(9)
    naive = [values[max(0, i - 3) : i + 1].mean() for i in range(9)]
    assert smooth(values, 4) == pytest.approx(naive)


def test_intervals_are_students() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(mean_interval([1.0])[1])


def test_equivalence_is_an_interval_of_90_percent_inside_the_margin() -> None:
    differences = [0.004, -0.002, 0.009, 0.001, 0.003]
    sem, mean = stats.sem(differences), np.mean(differences)
    _, high = stats.t.interval(0.9, 4, loc=mean, scale=sem)
    assert equivalence(differences, high) == pytest.approx(0.05)
    assert equivalence(differences, high * 1.01) < 0.05 < equivalence(differences, high * 0.99)
    assert equivalence([-d for d in differences], high) == pytest.approx(0.05)
    assert math.isnan(equivalence([0.0], 0.1))


@pytest.mark.parametrize(
    ("loads", "expected"),
    [([2, 2, 0.1, 0.9, 0.1, 0.1], 4), ([0.1] * 6, 0), ([0.1] * 5 + [0.9], None)],
)
def test_a_run_has_settled_when_it_stays_below(loads: list[float], expected: int | None) -> None:
    run = SimpleNamespace(max_vio_batch=np.array(loads))
    assert settled(cast(Result, run), 0.5, window=1) == expected

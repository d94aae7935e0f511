"""Measures of load: against their definitions, at known cases, and the laws they obey."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError
from equipoise.metrics import load
from tests.metrics import naive

COUNTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=12).filter(any)


@given(COUNTS)
@settings(max_examples=150, deadline=None)
def test_every_measure_equals_its_definition(counts):
    expected = naive.measures(counts)
    assert set(expected) == set(load.MEASURES)
    for name, measure in load.MEASURES.items():
        assert measure(counts) == pytest.approx(expected[name], abs=1e-9), name


@given(COUNTS, st.randoms(use_true_random=False), st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_order_and_scale_of_counts_do_not_matter(counts, random, factor):
    shuffled = [factor * c for c in counts]
    random.shuffle(shuffled)
    for name, measure in load.MEASURES.items():
        assert measure(shuffled) == pytest.approx(measure(counts), abs=1e-9), name


@given(COUNTS)
@settings(max_examples=80, deadline=None)
def test_measures_stay_in_their_range(counts):
    e = len(counts)
    ranges = {
        "max_vio": (0, e - 1),
        "min_vio": (-1, 0),
        "avg_vio": (0, 2 * (1 - 1 / e)),
        "cv": (0, np.sqrt(e - 1)),
        "gini": (0, 1 - 1 / e),
        "entropy": (0, 1),
        "effective_experts": (1, e),
        "min_max": (0, 1),
        "coverage": (1 / e, 1),
    }
    for name, (low, high) in ranges.items():
        assert low - 1e-9 <= load.MEASURES[name](counts) <= high + 1e-9, name


@given(COUNTS, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_padding_is_not_an_expert(counts, padding):
    padded = np.array([counts + [0] * padding])
    for name, measure in load.MEASURES.items():
        assert measure(padded, [len(counts)])[0] == pytest.approx(measure(counts), abs=1e-9), name


def test_uniform_load_is_perfect_in_every_measure():
    perfect = {"entropy": 1, "effective_experts": 8, "min_max": 1, "coverage": 1}
    for name, measure in load.MEASURES.items():
        assert measure([7] * 8) == pytest.approx(perfect.get(name, 0), abs=1e-12), name
    assert load.max_vio([7] * 8) == 0


def test_one_hot_expert_takes_every_measure_to_its_end():
    counts = [0, 0, 12, 0]
    ends = [3, -1, 1.5, np.sqrt(3), 0.75, 0, 1, 0, 0.25]
    for (name, measure), end in zip(load.MEASURES.items(), ends, strict=True):
        assert measure(counts) == pytest.approx(end), name


def test_one_dead_expert_shows_where_it_should():
    counts = [0] + [5] * 9
    assert load.min_vio(counts) == -1
    assert load.coverage(counts) == 0.9
    assert load.effective_experts(counts) == pytest.approx(9)
    assert load.ratio(counts).tolist() == pytest.approx([0] + [10 / 9] * 9)


def test_max_vio_has_no_absolute_value():
    assert load.max_vio([0, 10, 10, 10]) == pytest.approx(1 / 3)  # the idle expert is 1 off


def test_nothing_counted_is_nan_not_a_number():
    for name, measure in load.MEASURES.items():
        values = measure([[0, 0, 0], [1, 1, 1]])
        assert np.isnan(values[0]), name
        assert not np.isnan(values[1]), name
    assert np.isnan(load.share([0, 0])).all()


def test_leading_axes_are_kept():
    counts = np.random.default_rng(0).integers(0, 9, (2, 3, 5))
    for name, measure in load.MEASURES.items():
        values = measure(counts)
        assert values.shape == (2, 3), name
        assert values[1, 2] == pytest.approx(float(measure(counts[1, 2])), nan_ok=True)
    assert load.share(counts).shape == (2, 3, 5)


def test_bad_counts_are_refused_in_words():
    with pytest.raises(EquipoiseError, match="cannot be negative: -1"):
        load.gini([1, -1])
    with pytest.raises(EquipoiseError, match=r"experts are 1..2 .* not 3..3"):
        load.gini([1, 1], 3)
    with pytest.raises(EquipoiseError, match="last axis"):
        load.gini(3)

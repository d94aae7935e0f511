"""Bounds of a proportion and many comparisons, against the definitions and scipy's own tests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control

from equipoise.metrics.bounds import (
    benjamini_hochberg,
    lower_bound,
    p_above,
    two_sided,
    upper_bound,
)
from tests.metrics import naive


@given(st.integers(1, 200), st.data())
@settings(max_examples=60, deadline=None)
def test_interval_is_clopper_and_pearsons(trials, data):
    hits = data.draw(st.integers(0, trials))
    expected = binomtest(hits, trials).proportion_ci(0.95, "exact")
    low, high = two_sided(hits, trials)
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_no_hit_in_n_is_the_rule_of_three():
    assert upper_bound(0, 1000) == pytest.approx(3 / 1000, rel=0.01)
    assert upper_bound(0, 50) == pytest.approx(1 - 0.05 ** (1 / 50))
    assert lower_bound(0, 1000) == 0


def test_knowing_nothing_bounds_nothing():
    assert upper_bound(0, 0) == 1
    assert lower_bound(0, 0) == 0
    assert p_above(0, 0, 0.5) == 1
    assert upper_bound(5, 5) == 1


def test_fractional_trials_lie_between_whole_ones():
    assert upper_bound(0, 11) < upper_bound(0, 10.5) < upper_bound(0, 10)


@given(st.integers(1, 60), st.floats(0.01, 0.9), st.data())
@settings(max_examples=60, deadline=None)
def test_p_above_is_the_binomial_tail(trials, rate, data):
    hits = data.draw(st.integers(0, trials))
    assert p_above(hits, trials, rate) == pytest.approx(
        naive.binomial_tail(hits, trials, rate), abs=1e-9
    )


P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(P_VALUES)
@settings(max_examples=80, deadline=None)
def test_q_values_reject_what_the_step_up_procedure_rejects(p_values):
    q = benjamini_hochberg(p_values)
    assert q == pytest.approx(false_discovery_control(p_values))
    for alpha in (0.0501, 0.2003):
        rejected = naive.benjamini_hochberg(p_values, alpha)
        assert {i for i, value in enumerate(q) if value <= alpha} == rejected


def test_unknown_p_values_are_not_counted():
    q = benjamini_hochberg([[0.01, np.nan], [0.02, 0.5]])
    assert np.isnan(q[0, 1])
    assert q[0, 0] == pytest.approx(0.03)
    assert benjamini_hochberg([]).shape == (0,)

from __future__ import annotations

import math

import pytest

from equipoise.report import words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_600, "1.00M"),
        (1_234_567, "1.23M"),
        (456e9, "456G"),
        (None, "-"),
        (math.nan, "-"),
    ],
)
def test_counts_are_compact(value: float | None, text: str) -> None:
    assert words.compact(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1.00"), (1 / 32, "0.0312"), (0.000417, "0.000417"), (3.14e-6, "3.1e-06")],
)
def test_shares_keep_three_digits_and_never_round_to_zero(value: float, text: str) -> None:
    assert words.share(value) == text


@pytest.mark.parametrize("value", [10.0**power * 1.2345 for power in range(-4, 5)])
def test_measures_take_five_characters_at_most(value: float) -> None:
    text = words.measure(value)
    assert len(text) <= 5
    assert float(text) == pytest.approx(value, rel=0.01, abs=5e-4)


def test_an_interval_with_an_unknown_end_is_no_interval() -> None:
    assert words.interval([0.5, 1.25]) == "0.500..1.25"
    assert words.interval([0.5, None]) == words.interval(None) == "-"
    assert words.interval([0.5, 1.0], words.percent) == "50.0%..100.0%"


def test_durations_and_sizes_have_units() -> None:
    assert words.duration(12.34) == "12.3 s"
    assert words.duration(125) == "2 min 05 s"
    assert words.duration(7500) == "2 h 05 min"
    assert words.size(4_100_000) == "4.1 MB"
    assert words.size(12) == "12 bytes"


def test_long_lists_of_experts_say_how_many_more() -> None:
    assert words.ids([3, 7]) == "3, 7"
    assert words.ids(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7 and 4 more"
    assert words.ids([]) == "none"

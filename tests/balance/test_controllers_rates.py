"""Schedules of a rate, by their values at the joints."""

from __future__ import annotations

import pickle

import pytest

from equipoise.balance.controllers import (
    Schedule,
    constant_then_zero,
    cosine,
    linear,
    warmup,
    zero_then_constant,
)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (linear(1.0, 0.2, 4), {0: 1.0, 1: 0.8, 2: 0.6, 4: 0.2, 9: 0.2}),
        (cosine(1.0, 0.2, 4), {0: 1.0, 1: 0.2 + 0.4 * (1 + 0.5**0.5), 2: 0.6, 4: 0.2, 9: 0.2}),
        (warmup(0.4, 4), {0: 0.1, 1: 0.2, 3: 0.4, 4: 0.4, 9: 0.4}),
        (warmup(linear(1.0, 0.0, 8), 2), {0: 0.5, 1: 0.875, 4: 0.5, 8: 0.0}),
        (constant_then_zero(0.001, 3), {0: 0.001, 2: 0.001, 3: 0.0, 9: 0.0}),
        (zero_then_constant(0.001, 3), {0: 0.0, 2: 0.0, 3: 0.001, 9: 0.001}),
    ],
)
def test_values(schedule: Schedule, values: dict[int, float]) -> None:
    printed = eval(repr(schedule))  # prints as the call that makes it
    for copy in (schedule, printed, pickle.loads(pickle.dumps(schedule))):
        assert {step: copy(step) for step in values} == pytest.approx(values)


@pytest.mark.parametrize("make", [lambda: linear(1, 0, 0), lambda: warmup(1, -1)])
def test_a_schedule_without_steps_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        make()  # type: ignore[operator]

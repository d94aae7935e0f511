"""Controllers of a loss weight: by hand, and steering a layer whose MaxVio answers to the weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from equipoise.balance.controllers import DropRate, TargetMaxVio


def once(controller: Any, weight: float, measured: float) -> float:
    new_L = controller.update(
        weight_L=torch.tensor([weight]), measure_L=torch.tensor([measured]), step=0, state={}
    )
    assert new_L.dtype == torch.float32
    return float(new_L)


def test_steering_by_hand() -> None:
    steer = TargetMaxVio(0.5, rate=math.log(2))
    assert once(steer, 0.01, 5.0) == pytest.approx(0.02)  # the most: doubled
    assert once(steer, 0.01, 0.5) == pytest.approx(0.01)
    assert once(steer, 0.01, 0.0) == pytest.approx(0.005)
    assert once(steer, 0.01, 0.75) == pytest.approx(0.01 * math.sqrt(2))


def test_the_weight_stays_within_its_bounds_and_comes_back_from_the_lower() -> None:
    steer = TargetMaxVio(0.5, rate=1.0, lower=1e-4, upper=1e-2)
    assert once(steer, 9e-3, 9.0) == pytest.approx(1e-2)
    assert once(steer, 1e-4, 0.0) == pytest.approx(1e-4)
    assert once(steer, 1e-4, 9.0) > 2e-4


@pytest.mark.parametrize("target", [0.1, 0.5, 3.0])
def test_the_wanted_violation_is_reached(target: float) -> None:
    weight_L = torch.tensor([1e-3, 5e-2])
    steer = TargetMaxVio(target, rate=0.1)
    for step in range(200):  # two layers that give way to the weight, one more readily
        max_vio_L = torch.tensor([1e-3, 4e-3]) / weight_L
        weight_L = steer.update(weight_L=weight_L, measure_L=max_vio_L, step=step, state={})
    assert (torch.tensor([1e-3, 4e-3]) / weight_L).tolist() == pytest.approx([target] * 2, rel=1e-3)


def test_a_target_below_the_floor_drives_the_weight_to_its_upper_bound() -> None:
    weight_L = torch.tensor([1e-3])
    for step in range(300):
        weight_L = TargetMaxVio(0.01).update(
            weight_L=weight_L, measure_L=torch.tensor([0.2]), step=step, state={}
        )
    assert weight_L.item() == pytest.approx(0.1)


def test_drop_rate_by_hand_and_its_limits() -> None:
    assert once(DropRate(), 0.0, 0.03) == pytest.approx(0.01 * 0.2 * 0.03)
    assert once(DropRate(beta=0), 1.0, 0.03) == pytest.approx(0.006)
    assert once(DropRate(beta=0), 1.0, 0.8) == pytest.approx(0.01)
    weight = 0.01
    for _ in range(1000):
        weight = once(DropRate(), weight, 0.0)
    assert weight == pytest.approx(0.01 * 0.99**1000, rel=1e-3)


def test_a_layer_that_measured_nothing_keeps_its_weight() -> None:
    for controller in (TargetMaxVio(0.5), DropRate()):
        assert once(controller, 0.003, float("nan")) == pytest.approx(0.003)
        assert once(controller, 0.003, 0.9) != pytest.approx(0.003)


def test_rates_by_layer() -> None:
    new_L = TargetMaxVio(0.5, rate=[0.0, math.log(2)]).update(
        weight_L=torch.tensor([0.01, 0.01]), measure_L=torch.tensor([2.0, 2.0]), step=0, state={}
    )
    assert new_L.tolist() == pytest.approx([0.01, 0.02])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetMaxVio(0.0), "target=0.0"),
        (lambda: TargetMaxVio(0.5, lower=0.0), "lower=0.0"),
        (lambda: TargetMaxVio(0.5, lower=1.0, upper=0.1), "below lower"),
        (lambda: TargetMaxVio(0.5, rate=-1), "rate -1.0"),
        (lambda: DropRate(xi=-1), "xi=-1"),
        (lambda: DropRate(beta=1.0), "beta=1.0"),
        (lambda: once(DropRate(), 0.01, 1.5), "dropped share from 0 to 1"),
        (lambda: once(DropRate(), -1.0, 0.5), "finite weights from 0"),
        (lambda: once(TargetMaxVio(0.5), 0.01, float("inf")), "MaxVio inf at the layer"),
        (
            lambda: DropRate().update(
                weight_L=torch.ones(2), measure_L=torch.ones(3), step=0, state={}
            ),
            r"\(2,\).*\(3,\)",
        ),
    ],
)
def test_bad_settings_and_measures_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

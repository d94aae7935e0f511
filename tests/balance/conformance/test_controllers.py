"""Every controller: the bias or weight of its rule, and the same one however a step is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.balance.conformance.controllers import (
    CONTROLLERS,
    Tried,
    expected,
    follows,
    run_bias,
    run_weights,
    tried_in,
)
from tests.balance.conformance.models import FAMILIES
from tests.balance.conformance.settings import COMPILED, SINGLE, TESTED_PARALLEL, Setting

pytestmark = pytest.mark.slow


def held_by(name: str, family: str, setting: Setting) -> list[Tensor]:
    tried = CONTROLLERS[name]
    return (run_bias if tried.is_bias else run_weights)(tried, family, setting)


def follows_its_rule(tried: Tried, family: str, setting: Setting, held: list[Tensor]) -> None:
    assert follows(tried, held, expected(tried, family, setting, held))
    assert not torch.equal(held[0], held[-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", SINGLE, ids=lambda s: s.name)
def test_bias_is_that_of_the_rule(setting: Setting, family: str) -> None:
    for name, tried in tried_in(setting).items():
        held = held_by(name, family, setting)
        follows_its_rule(tried, family, setting, held)


@pytest.mark.parametrize("setting", COMPILED[:1], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["Sign", "QuantileHistogram"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_bias_is_that_of_the_rule(setting: Setting, name: str, family: str) -> None:
    follows_its_rule(CONTROLLERS[name], family, setting, held_by(name, family, setting))


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", TESTED_PARALLEL, ids=lambda s: s.name)
def test_parallel_bias_is_that_of_the_rule(
    setting: Setting, family: str, ranks: list[dict[str, Any]]
) -> None:
    for name, tried in tried_in(setting).items():
        one, other = (r["controllers"][setting.name, family, name] for r in ranks)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), name
        follows_its_rule(tried, family, setting, one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [n for n, tried in CONTROLLERS.items() if tried.splits])
def test_bias_is_equal_for_every_number_of_micro_batches(name: str, family: str) -> None:
    whole, *split = (
        held_by(name, family, s) for s in (Setting("one"), SINGLE[1], SINGLE[2], SINGLE[9])
    )
    for other in split:
        for one, two in zip(whole, other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6 * float(one.abs().max()))


def test_mean_of_quantiles_and_mean_of_signs_feel_the_split() -> None:
    for name in ("Quantile", "Sign, scope=micro"):
        one, two = held_by(name, "mixtral", Setting("one")), held_by(name, "mixtral", SINGLE[2])
        assert not torch.allclose(one[1], two[1], atol=1e-4), name

"""What a line of balancing stands for, and what has changed of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from equipoise.lab.experiments import EXPERIMENTS
from equipoise.lab.spelt import changed, spelt
from equipoise.lab.terms import RECOMMENDED, balancing

TERMS = spelt(balancing("pid + switch(scope=running, weight=0.1) + capacity(factor=1.25)"))


def other(*path: Any, value: Any) -> Any:
    terms = json.loads(json.dumps(TERMS))
    held = terms
    for key in path[:-1]:
        held = held[key]
    held[path[-1]] = value
    return terms


def test_every_field_is_kept_defaults_too() -> None:
    bias, loss, capacity = TERMS
    assert bias["controller"] | {"is": "PID", "rate": 0.1, "integral": 0.0} == bias["controller"]
    assert (loss["objective"], loss["scope"]) == ("switch", {"is": "Running", "decay": 0.9})
    assert capacity["overflow"] == "drop"


@pytest.mark.parametrize(
    ("before", "told"),
    [
        (TERMS, ""),
        (
            other(0, "controller", "rate", value=0.2),
            "Bias.controller.PID.rate: 0.2 before, 0.1 now",
        ),
        (other(1, "scope", "decay", value=0.5), "Loss.scope.Running.decay: 0.5 before, 0.9 now"),
        (other(1, "scope", "is", value="Past"), "Loss.scope: Past before, Running now"),
        (other(2, "gone", value=True), "Capacity.gone: True before, None now"),
        (
            other(1, "options", value={"groups": [1, 2]}),
            "Loss.options.groups: 1 + 2 before, None now",
        ),
        (TERMS[:2], "the terms: Bias + Loss before, Bias + Loss + Capacity now"),
        ([], "the terms: none before, Bias + Loss + Capacity now"),
    ],
)
def test_what_changed_is_told(before: Any, told: str) -> None:
    assert changed(before, TERMS) == told


def test_a_field_that_there_was_not_yet_changes_nothing() -> None:
    before = json.loads(json.dumps(TERMS))
    del before[0]["controller"]["clip"]
    assert changed(before, TERMS) == ""


def test_all_that_the_experiments_set_survives_json() -> None:
    lines = {c.balance for e in EXPERIMENTS.values() for c in e.configs("cpu", 1)} - {RECOMMENDED}
    assert len(lines) > 50
    for line in lines:
        terms = spelt(balancing(line))
        assert "0x" not in json.dumps(terms)  # the address of something without a form of its own
        assert changed(json.loads(json.dumps(terms)), spelt(balancing(line))) == ""

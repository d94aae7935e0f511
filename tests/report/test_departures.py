from __future__ import annotations

import numpy as np
import pytest

from equipoise.report.departures import FEW, departures


def row(counts: list[int], effect: float | None = 1.0) -> dict[str, object]:
    return {"experts": len(counts), "top_k": 1, "counts": counts, "design_effect": effect}


def test_an_expert_that_one_group_uses_more_is_found_first() -> None:
    layers = [row([1000, 1000, 1000, 1000])]
    groups = {"a": [[700, 100, 100, 100]], "b": [[300, 900, 900, 900]]}
    found = departures(groups, layers)
    assert (found[0].group, found[0].expert) == ("a", 0)
    assert found[0].times == pytest.approx(0.7 / 0.25)
    assert (found[0].share, found[0].overall, found[0].count) == (0.7, 0.25, 700)
    assert all(d.times < d.chance[0] or d.times > d.chance[1] for d in found)


def test_chance_alone_gives_no_departure() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(20_000, np.full(64, 1 / 64), size=5)
    groups = {str(g): [c.tolist()] for g, c in enumerate(counts)}
    assert departures(groups, [row(counts.sum(0).tolist())]) == []


def test_a_large_design_effect_widens_what_chance_gives() -> None:
    groups = {"a": [[450, 550]], "b": [[550, 450]]}
    assert departures(groups, [row([1000, 1000])])
    assert not departures(groups, [row([1000, 1000], effect=50.0)])
    assert not departures(groups, [row([1000, 1000], effect=None)])


def test_few_expected_selections_are_not_compared() -> None:
    assert departures({"a": [[0, 2 * FEW - 2]]}, [row([5000, 5000])]) == []


def test_an_expert_missing_in_a_group_is_a_departure() -> None:
    found = departures({"a": [[0, 1000]], "b": [[1000, 0]]}, [row([1000, 1000])])
    assert {(d.group, d.expert, d.times) for d in found} >= {("a", 0, 0.0), ("b", 1, 0.0)}

"""Which experts a group of tokens uses more, or less, than all tokens do, beyond chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FEW = 30
"""Expected selections below which a share in a group is not compared at all."""


@dataclass(frozen=True)
class Departure:
    """One expert in one group of tokens; `times` = share in the group / share in all tokens."""

    group: str
    place: int
    """Position of the layer among the layers of the trace."""
    expert: int
    count: int
    share: float
    overall: float
    times: float
    chance: tuple[float, float]
    """Where `times` lies by chance, for all cells at once (95 %, Bonferroni)."""


def departures(
    groups: Mapping[str, Sequence[Sequence[int]]], layers: Sequence[Mapping[str, Any]]
) -> list[Departure]:
    """Departures beyond chance, largest factor first.

    `groups` holds counts [layer][expert] of each group, `layers` the rows of `stats` for all
    tokens. The standard error is that of a share p among n selections of K distinct experts,
    sqrt(deff p (1 - K p) / n); layers without a design effect are left out.
    """
    cells = len(groups) * sum(row["experts"] for row in layers)
    limit = _normal_quantile(1 - 0.025 / max(cells, 1))
    found = [
        departure
        for name, counts in groups.items()
        for place, row in enumerate(layers)
        for departure in _of_layer(name, place, row, counts[place], limit)
    ]
    return sorted(found, key=lambda d: -abs(math.log(max(d.times, 1 / d.overall / 1e9))))


def _of_layer(
    group: str, place: int, row: Mapping[str, Any], counts: Sequence[int], limit: float
) -> Iterator[Departure]:
    total, here, effect = sum(row["counts"]), sum(counts), row["design_effect"]
    if not total or not here or effect is None:
        return
    for expert, (count, whole) in enumerate(zip(counts, row["counts"], strict=True)):
        overall = whole / total
        if here * overall < FEW:
            continue
        error = math.sqrt(effect * max(1 - row["top_k"] * overall, 0) / (here * overall))
        chance = (max(1 - limit * error, 0.0), 1 + limit * error)
        times = count / here / overall
        if not chance[0] <= times <= chance[1]:
            yield Departure(group, place, expert, count, count / here, overall, times, chance)


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)

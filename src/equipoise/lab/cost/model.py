"""The model of what imbalance costs: time and memory as lines over the busiest device's load.

Under expert parallelism a layer's all-to-all ends when the last device has computed its experts.
Shapes: E experts, P devices with E / P neighbouring experts each, R rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.errors import EquipoiseError
from equipoise.metrics.floors import uniform_counts

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]
RESAMPLES = 2000


@dataclass(frozen=True)
class Line:
    """base + slope x."""

    base: float
    slope: float

    @classmethod
    def fit(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        """Least squares; EquipoiseError where all x are the same."""
        if len(set(x)) < 2:
            raise EquipoiseError(f"a line takes two different loads, not {sorted(set(x))}.")
        base, slope = fitted(x, y)
        return cls(float(base), float(slope))

    def at(self, x: float) -> float:
        """Its value there."""
        return self.base + self.slope * x


def fitted(x: ArrayLike, y_BX: ArrayLike) -> tuple[Values, Values]:
    """Base and slope by least squares, [B] each of [B, X], or numbers of [X]."""
    x, y_BX = np.asarray(x, dtype=np.float64), np.asarray(y_BX, dtype=np.float64)
    away = x - x.mean()
    slope = (away * y_BX).sum(-1) / (away**2).sum()
    return y_BX.mean(-1) - slope * x.mean(), slope


def device_loads(counts: ArrayLike, devices: int) -> Values:
    """Selections of each device's experts, [..., P] from [..., E].

    Raises EquipoiseError where the devices do not divide the experts.
    """
    counts = np.asarray(counts, dtype=np.float64)
    experts = counts.shape[-1]
    if devices < 1 or experts % devices:
        raise EquipoiseError(f"devices={devices} cannot hold equal parts of {experts} experts.")
    loads: Values = counts.reshape(*counts.shape[:-1], devices, experts // devices).sum(-1)
    return loads


def busiest(counts: ArrayLike, devices: int) -> Values:
    """The busiest device's load over a fair share, [...] from [..., E]: 1 to `devices`.

    It is 1 + MaxVio of the devices; with one expert a device, of the experts.
    """
    loads = device_loads(counts, devices)
    ratios: Values = loads.max(-1) * devices / loads.sum(-1)
    return ratios


@lru_cache(maxsize=256)
def busiest_by_chance(tokens: int, experts: int, top_k: int, devices: int) -> float:
    """`busiest` where every token visits K experts at random: mean of 1000 simulated steps."""
    return float(busiest(uniform_counts(tokens, experts, top_k), devices).mean())


def one_hot(max_vio: float, experts: int) -> Values:
    """Ratios of experts of which one has this MaxVio and the others share the rest alike, [E]."""
    if not 0 <= max_vio <= experts - 1:
        raise EquipoiseError(f"MaxVio of {experts} experts is 0 to {experts - 1}, not {max_vio:g}.")
    ratios_E = np.full(experts, 1 - max_vio / (experts - 1)) if experts > 1 else np.ones(1)
    ratios_E[0] = 1 + max_vio
    return ratios_E


def interval(
    values_RX: ArrayLike, statistic: Statistic | None = None, level: float = 0.95
) -> tuple[float, float, float]:
    """Median over rounds [R], or a statistic of medians; and the percentile interval of its bootstrap.

    Whole rounds are drawn, B = 2000 times, seeded. `statistic`: [B] of the medians [B, X] of values
    [R, X].
    """
    values_RX = np.asarray(values_RX, dtype=np.float64)
    rounds = len(values_RX)
    drawn = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds))
    found_B, middle = np.median(values_RX[drawn], axis=1), np.median(values_RX, axis=0)
    if statistic is not None:
        found_B, middle = statistic(found_B), statistic(middle)
    low, high = np.quantile(found_B, [(1 - level) / 2, (1 + level) / 2])
    return float(middle), float(low), float(high)

"""The lines of the cost experiment: step time and memory over the rows of the busier device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.lab.cost.model import Line, device_loads, fitted, interval
from equipoise.lab.cost.points import DEVICES, Points

FITTED = ("50 %, even", "75 %, even", "100 %, even")
"""Profiles that lines are fitted to; the others check them."""
BALANCED = FITTED[0]


@dataclass(frozen=True)
class Lines:
    """Points, and the lines through three of them."""

    points: Points
    rows: dict[str, float]
    """Of the busiest device in a step, all layers, by profile."""
    time: Line
    """Seconds over rows."""
    memory: Line
    """Bytes over rows."""

    @classmethod
    def of(cls, points: Points) -> Lines:
        """Fitted to the points named in FITTED."""
        rows = {name: float(device_rows(points, name).max()) for name in points.profiles}
        x = [rows[name] for name in FITTED]
        seconds = [float(np.median(points.seconds(name))) for name in FITTED]
        peaks = [float(max(points.sizes[name].peak_bytes)) for name in FITTED]
        return cls(points, rows, Line.fit(x, seconds), Line.fit(x, peaks))

    @property
    def fair(self) -> float:
        """Rows of each device where they are loaded alike."""
        return float(device_rows(self.points, BALANCED).mean())

    @property
    def checked(self) -> list[str]:
        """Profiles that no line was fitted to."""
        return [name for name in self.points.profiles if name not in FITTED]

    def seconds(self, name: str) -> float:
        """Median over rounds."""
        return float(np.median(self.points.seconds(name)))

    def share(self, *, worked: bool = False) -> tuple[float, float, float]:
        """What scales with the busiest device's rows, of a balanced step; 95 % interval.

        `worked`: of the busiest process's processor time, in place of the time that passes.
        """
        points = self.points
        of_rounds = (lambda name: points.worked(name).max(1)) if worked else points.seconds
        times_RX = np.stack([of_rounds(name) for name in FITTED], axis=1)
        x = [self.rows[name] for name in FITTED]

        def of(medians_BX: NDArray[np.float64]) -> NDArray[np.float64]:
            base_B, slope_B = fitted(x, medians_BX)
            return slope_B * self.fair / (base_B + slope_B * self.fair)

        return interval(times_RX, of)


def device_rows(points: Points, profile: str) -> NDArray[np.float64]:
    """Rows that each device's experts compute in a step, all layers, [P]."""
    model = points.settings.model
    return device_loads(points.counts(profile), DEVICES) * (model.layers - model.dense_layers)

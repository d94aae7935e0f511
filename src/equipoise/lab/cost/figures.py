"""Figures of the cost experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.lab import figures
from equipoise.lab.cost.model import busiest, interval
from equipoise.lab.cost.points import DEVICES

if TYPE_CHECKING:
    from equipoise.lab.cost.lines import Lines
    from equipoise.lab.experiments.cost_devices import Load

APART = 0.02
"""Between points of equal load, so that both are seen."""
KINDS = {"even": "evenly over its experts", "one hot": "one expert hot"}


def draw_points(found: Lines, path: Path) -> None:
    """Time and memory against the busier device's load, and time against MaxVio."""
    points = found.points
    load = {n: float(busiest(points.counts(n), DEVICES)) for n in points.profiles}
    vio = {n: points.max_vio(n) for n in points.profiles}
    ms = {n: 1e3 * np.array(interval(points.seconds(n))) for n in points.profiles}
    peaks = {n: np.full(3, max(points.sizes[n].peak_bytes) / 1e6) for n in points.profiles}
    ends = np.array([1.0, float(DEVICES)])
    figure, axes = figures.canvas(3, width=10.0)
    rows = ends * found.fair
    _panel(axes[0, 0], load, ms, (ends, [1e3 * found.time.at(x) for x in rows]), found.checked)
    _panel(axes[0, 1], vio, ms, None, found.checked)
    _panel(axes[0, 2], load, peaks, (ends, [found.memory.at(x) / 1e6 for x in rows]), found.checked)
    x = "busier device, fair shares"
    axes[0, 0].set(title="step time by load of the device", xlabel=x, ylabel="ms a step")
    axes[0, 1].set(
        title="by load of the experts", xlabel="MaxVio of the experts", ylabel="ms a step"
    )
    axes[0, 2].set(title="peak of a step", xlabel=x, ylabel="MB above weights and optimizer")
    for axis in axes[0]:
        axis.set_ylim(bottom=0)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, path)


def _panel(
    axis: Any, x: dict[str, float], values: dict[str, Any], line: Any, open_names: Sequence[str]
) -> None:
    """Points with their intervals, filled but for the open ones, and a line."""
    for number, (kind, told) in enumerate(KINDS.items()):
        colour = figures.COLOURS[number]
        names = [name for name in x if name.endswith(kind)]
        middle, low, high = np.stack([values[name] for name in names], axis=1)
        at = [x[name] + APART * number for name in names]
        bars = np.stack([middle - low, high - middle]).clip(min=0)
        axis.errorbar(at, middle, bars, fmt="none", color=colour)
        for name, place, y in zip(names, at, middle, strict=True):
            face = "white" if name in open_names else colour
            axis.plot(place, y, "o", color=colour, markerfacecolor=face)
        axis.plot([], [], "o", color=colour, markerfacecolor="white", label=told)
    if line is not None:
        axis.plot(*line, color="#888888", linewidth=1.0, label="line fitted to the filled points")


def draw_devices(found: Sequence[Load], share: float, path: Path) -> None:
    """Times the balanced step over the number of devices, a line for each load."""
    curves = {
        f"{entry.name}, MaxVio {entry.max_vio:.2f}": (
            list(entry.ratios),
            [1 + share * (ratio - 1) for ratio in entry.ratios.values()],
        )
        for entry in found
    }
    figure, axes = figures.canvas(1, width=7.0, height=4.0)
    axis = axes[0, 0]
    title = "step time of N devices, of balance"
    figures.lines(axis, curves, title=title, x="devices", y="times")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    figures.legend(figure, axis, columns=2)
    figures.save(figure, path)

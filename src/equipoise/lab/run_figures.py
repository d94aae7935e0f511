"""The figures of one run: its loss and load over training, and every expert's share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equipoise.lab import figures
from equipoise.lab.folder import RunFolder
from equipoise.lab.results import Result, smooth
from equipoise.metrics import load

SMOOTHING = 10
"""Steps of the running means."""
POINTS = 50
"""Windows that shares are summed over."""


def draw_run(path: Path) -> list[Path]:
    """Draw `path`/figures/training.svg and, where experts are selected, shares.svg."""
    run = Result(RunFolder(path).config(), path)
    drawn = [path / "figures" / "training.svg"]
    _training(run, drawn[0])
    if run.counts.shape[1]:
        drawn.append(path / "figures" / "shares.svg")
        _shares(run, drawn[1])
    return drawn


def _training(run: Result, path: Path) -> None:
    figure, axes = figures.canvas(2, height=3.0)
    million = run.tokens / 1e6
    loss = {"of a step": (million, run.column("loss"))}
    held_out = [(step, found.loss) for step, found in run.evaluations]
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        loss["held out"] = (np.array(steps) * run.config.step_tokens / 1e6, np.array(losses))
    x = "million tokens"
    figures.lines(axes[0, 0], loss, title="loss", x=x, y="nats per token")
    axes[0, 0].lines[-1].set_marker("o")
    if run.counts.shape[1]:
        layers, dense = np.asarray(load.max_vio(run.counts)), run.config.model.dense_layers
        curves = {
            f"layer {dense + index}": (million, smooth(layers[:, index], SMOOTHING))
            for index in range(layers.shape[1])
        }
        title = f"MaxVio, mean of {SMOOTHING} steps"
        figures.lines(axes[0, 1], curves, title=title, x=x, y="MaxVio", floor=run.step_floor)
        axes[0, 1].legend(fontsize=7)
    axes[0, 0].legend(fontsize=7)
    figures.save(figure, path)


def _shares(run: Result, path: Path) -> None:
    layers = run.counts.shape[1]
    figure, axes = figures.canvas(min(layers, 4), -(-layers // 4), width=10.0, height=2.4)
    window = max(1, len(run.counts) // POINTS)
    steps = len(run.counts) // window * window
    summed = run.counts[:steps].reshape(-1, window, *run.counts.shape[1:]).sum(1)
    shares_WLE = np.asarray(load.share(summed))
    million = run.tokens[window - 1 : steps : window] / 1e6
    for index, axis in enumerate(axes.ravel()):
        if index < layers:
            title = f"layer {run.config.model.dense_layers + index}"
            figures.shares(axis, million, shares_WLE[:, index], title=title)
        else:
            axis.axis("off")
    figures.save(figure, path)

"""What a run notes of every step: the rows of its metrics, its sinks, and how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.lab.config import Config
from equipoise.metrics import floors, load

Sink = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    steps: int
    loss: float
    """Of the step, nats per token."""
    tokens_per_second: float
    """Since this process began."""
    max_vio: float
    """Of the step's tokens, mean over layers; NaN where nothing is selected."""
    floor: float
    """What chance alone gives."""
    seconds_left: float


@dataclass(frozen=True)
class Step:
    """What one step came to, on all processes."""

    number: int
    loss: float
    gradient_norm: float
    rate: float
    """Learning rate as a share of the highest."""
    seconds: float
    counts_LE: NDArray[np.int64]
    dropped_share: float | None
    """None where nothing limits the load."""
    unchosen_share: float | None
    """Of the tokens, those without an expert, mean over layers; None where each has as many as another."""


class Journal:
    """The rows and evaluations of a run so far, and who is told of each step."""

    def __init__(
        self,
        config: Config,
        sinks: Sequence[Sink] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.config, self.sinks, self.progress = config, sinks, progress
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """The steps of this process begin after `step`."""
        self._first, self._began = step, time.perf_counter()

    def note(self, step: Step, balance: Callable[[], Mapping[str, float]]) -> None:
        """Keep a step, and tell of it; `balance` gives what balancing measured.

        Of that, rows hold what is of the whole model; sinks get the layers' figures, too.
        """
        counts_LE = step.counts_LE
        max_vio = float(np.mean(load.max_vio(counts_LE))) if counts_LE.size else math.nan
        row = {
            "step": step.number,
            "tokens": step.number * self.config.step_tokens,
            "loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "learning_rate": step.rate * self.config.optimizer.lr,
            "seconds": step.seconds,
            "max_vio": max_vio,
            "max_vio_floor": step_floor(self.config) if counts_LE.size else math.nan,
            "counts": counts_LE.ravel().astype(np.int64),
        }
        shares = {
            "dropped_share": step.dropped_share,
            "unchosen_share": step.unchosen_share,
        }
        row |= {name: share for name, share in shares.items() if share is not None}
        measured = balance()
        self.rows.append(row | {n: x for n, x in measured.items() if _of_the_model(n)})
        for sink in self.sinks:
            sink({**self._scalars(row), **measured}, step.number)
        if self.progress is not None:
            self.progress(self._progress(step, max_vio))

    def _scalars(self, row: Mapping[str, Any]) -> dict[str, float]:
        names = ("loss", "gradient_norm", "learning_rate", "seconds", "max_vio", "max_vio_floor")
        found = {f"train/{name}": float(row[name]) for name in names}
        found["train/tokens_per_second"] = self.config.step_tokens / row["seconds"]
        return found

    def _progress(self, step: Step, max_vio: float) -> Progress:
        done = step.number - self._first
        spent = time.perf_counter() - self._began
        left = spent / done * (self.config.steps - step.number)
        speed = done * self.config.step_tokens / spent
        return Progress(
            step.number, self.config.steps, step.loss, speed, max_vio, step_floor(self.config), left
        )


def _of_the_model(name: str) -> bool:
    return "/layer_" not in name and name != "balance/step"


def step_floor(config: Config) -> float:
    """MaxVio of a step's tokens by chance alone."""
    model = config.model
    return floors.floor(config.step_tokens, model.experts, model.top_k).mean["max_vio"]

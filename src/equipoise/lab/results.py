"""Finished runs, read back from their folders. Shapes: N steps, D domains, L layers, E experts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config, differences, flat
from equipoise.lab.evaluate import Evaluation
from equipoise.lab.folder import LABELS, RunFolder
from equipoise.lab.journal import step_floor
from equipoise.metrics import load

Values = NDArray[np.float64]


def identity(config: Config) -> str:
    """Twelve letters of a digest of all settings that a run's figures depend on.

    Of those that are not at their default, so that a new setting leaves old runs what they are.
    """
    usual = dict(flat(asdict(Config())))
    values = {k: v for k, v in flat(asdict(config)) if k not in LABELS and v != usual[k]}
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def folder_of(pool: Path, config: Config) -> Path:
    """Where a config's run is kept: one place, whichever experiment asked for it."""
    return pool / identity(config)


@dataclass(frozen=True)
class Result:
    """One finished run."""

    config: Config
    path: Path

    @classmethod
    def find(cls, pool: Path, config: Config) -> Result | None:
        """The finished run of a config, or None."""
        folder = RunFolder(folder_of(pool, config))
        return cls(config, folder.path) if folder.finished else None

    def check_config(self) -> None:
        """Raise EquipoiseError where the run was made of another config: one of older defaults."""
        found = differences(self.config, RunFolder(self.path).config())
        other = {key: values for key, values in found.items() if key not in LABELS}
        if other:
            key, (ours, theirs) = next(iter(other.items()))
            raise EquipoiseError(
                f"{self.path} is a run with {key}={theirs}, not {ours}, which was not the default when it "
                "was made: remove it, and it will be run again."
            )

    def check(self) -> None:
        """Raise EquipoiseError where what a page reads of the folder is not whole, or of another config."""
        self.check_config()
        try:
            self.summary["parameters"], self.environment["tokens"], self.final.loss
            if len(self.counts) != self.summary["steps"]:
                raise ValueError(f"{len(self.counts)} of {self.summary['steps']} steps")
        except (LookupError, TypeError, ValueError) as error:
            raise EquipoiseError(
                f"{self.path} is no whole run ({type(error).__name__}: {error}): remove it, and it will "
                "be run again."
            ) from error

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `result.json` holds."""
        return RunFolder(self.path).result()

    @cached_property
    def source(self) -> str:
        """Of the text, as it was given."""
        return RunFolder(self.path).config().data.source

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, commit and machine of its beginning, and the digest of its tokens."""
        return dict(RunFolder(self.path).read("environment.json"))

    @property
    def environments(self) -> list[dict[str, Any]]:
        """That of its beginning, and others that went on with it."""
        return [self.environment, *self.environment.get("later", [])]

    @cached_property
    def evaluations(self) -> list[tuple[int, Evaluation]]:
        """(step, what it found), in order."""
        kept = RunFolder(self.path).read("evaluations.json")
        return [(entry["step"], Evaluation.from_dict(entry)) for entry in kept]

    @property
    def final(self) -> Evaluation:
        """The last evaluation."""
        return self.evaluations[-1][1]

    @cached_property
    def _metrics(self) -> Any:
        return RunFolder(self.path).metrics()

    def column(self, name: str) -> Values:
        """A column of the metrics, [N]."""
        return np.asarray(self._metrics[name].to_numpy(), dtype=np.float64)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Selections of every step, layer and expert, [N, L, E]."""
        rows = np.stack(self._metrics["counts"].to_numpy(zero_copy_only=False))
        experts = self.config.model.experts
        return rows.reshape(len(rows), -1, experts)

    @property
    def tokens(self) -> Values:
        """Tokens trained on after every step, [N]."""
        return self.column("tokens")

    @cached_property
    def max_vio_batch(self) -> Values:
        """MaxVio of every step's tokens, mean over layers, [N]."""
        found: Values = np.asarray(load.max_vio(self.counts), dtype=np.float64).mean(1)
        return found

    @property
    def dropped_share(self) -> float:
        """Of the selections of the last tenth of training; NaN where nothing limits the load."""
        return self._at_the_end("dropped_share")

    @property
    def unchosen_share(self) -> float:
        """Tokens without an expert in the last tenth of training; NaN where all have as many."""
        return self._at_the_end("unchosen_share")

    def _at_the_end(self, column: str) -> float:
        if column not in self._metrics.column_names:
            return float("nan")
        values = self.column(column)
        return float(values[-max(1, len(values) // 10) :].mean())

    @property
    def max_vio_end(self) -> float:
        """MaxVio_batch, mean of the last tenth of the steps."""
        return float(self.max_vio_batch[-max(1, len(self.max_vio_batch) // 10) :].mean())

    @property
    def step_floor(self) -> float:
        """MaxVio of a step's tokens by chance alone."""
        return step_floor(self.config)

    @property
    def seed(self) -> int:
        """Of weights and data order."""
        return self.config.seed


def specialisation(evaluation: Evaluation) -> float:
    """Generalised Jensen-Shannon divergence of the domains' shares, mean over layers, in nats.

    Entropy of the mean share less the mean of the entropies; 0 where all domains load the experts
    alike, at most ln(domains).
    """
    shares_DLE = np.asarray(load.share(evaluation.counts), dtype=np.float64)
    return float((_entropy(shares_DLE.mean(0)) - _entropy(shares_DLE).mean(0)).mean())


def _entropy(shares: Values) -> Values:
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    found: Values = -(shares * logs).sum(-1)
    return found


def largest_domain_share(evaluation: Evaluation) -> float:
    """The largest share that an expert has of one domain's selections, mean over layers."""
    return float(np.asarray(load.share(evaluation.counts)).max((0, 2)).mean())


def windows(counts_NLE: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Counts summed over windows of steps, without an unfinished last one, [N / window, L, E]."""
    steps = len(counts_NLE) // window * window
    summed: NDArray[np.int64] = counts_NLE[:steps].reshape(-1, window, *counts_NLE.shape[1:]).sum(1)
    return summed


def starved(counts_NLE: NDArray[np.int64], below: float = 0.01, window: int = 10) -> Values:
    """Share of the L x E cells below `below` of a fair share, in windows of steps, [N / window]."""
    summed = windows(counts_NLE, window)
    found: Values = (np.asarray(load.ratio(summed)) < below).mean((1, 2))
    return found


def settled(run: Result, below: float = 0.5, window: int = 5) -> int | None:
    """Steps until MaxVio_batch, as a mean of `window` steps, stays below `below`; None if it does not."""
    high = np.flatnonzero(smooth(run.max_vio_batch, window) >= below)
    first = int(high[-1]) + 1 if len(high) else 0
    return first if first < len(run.max_vio_batch) else None


def smooth(values: Values, window: int) -> Values:
    """Running mean over the last `window` values (fewer at the beginning)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    found: Values = (sums[ends] - sums[starts]) / (ends - starts)
    return found


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its interval by Student's t; NaN for fewer than two values."""
    from scipy import stats

    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2:
        return float(found.mean()), float("nan")
    quantile = float(stats.t.ppf((1 + level) / 2, len(found) - 1))
    return float(found.mean()), quantile * float(found.std(ddof=1)) / len(found) ** 0.5


def equivalence(differences: Sequence[float], margin: float) -> float:
    """P-value of two one-sided t-tests (Schuirmann 1987) that paired differences reach the margin.

    The larger of the p-values of "the mean is -margin or less" and "it is margin or more": below
    0.05, the 90 % interval of the mean lies within the margin. NaN for fewer than two values.
    """
    from scipy import stats

    found = np.asarray(differences, dtype=np.float64)
    if len(found) < 2:
        return float("nan")
    above = stats.ttest_1samp(found, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(found, margin, alternative="less").pvalue
    return float(max(above, below))

"""Intervals by the block bootstrap, and the design effect, of one layer's counts by block.

All of these measures are biased upward: noise makes the largest count larger. The bootstrap adds
the same bias once more, so its percentiles lie above the truth (coverage 0-20 % near balance).
What is used instead, each by its measured coverage (`benchmarks/interval_coverage.py`, docs/concepts.md):

| measure | interval |
|---|---|
| MaxVio | largest lower bound of the shares (all at once) to largest upper bound (each) |
| Gini, CV | basic bootstrap of the square, which is the scale on which the bias is additive |
| entropy, effective experts | basic bootstrap of the entropy |
| share of an expert | exact binomial on effective tokens (Korn and Graubard 1998) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.metrics import bounds, load
from equipoise.metrics.blocks import MIN_BLOCKS

Values = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 1000


@dataclass(frozen=True)
class DesignEffect:
    """How many times larger the variance of shares is than for independent tokens."""

    layer: float
    """Rao-Scott mean over experts, at least 1; nan with fewer than MIN_BLOCKS blocks."""
    expert_E: Values
    """Of each expert, at least the layer's where it was selected less than a fair share."""

    def trials(self, tokens: int, blocks: int, level: float = 0.95) -> Values:
        """Effective tokens behind each expert's share, [E], less the price of few blocks.

        tokens / design effect, times (z/t)^2 for a variance known from `blocks` blocks only
        (Korn and Graubard 1998).
        """
        return tokens / self.expert_E / _t_over_z(blocks, level) ** 2


def layer_intervals(
    counts_BE: NDArray[Any],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
    *,
    top_k: int = 1,
) -> dict[str, Interval] | None:
    """Intervals of a layer's max_vio, gini, cv, entropy and effective_experts from block counts.

    top_k: distinct experts that every token selects; no share can then be above 1 / top_k, and the
    intervals end at what K equally used experts would give (MaxVio: E / K - 1).
    Blocks without selections are left out; None with fewer than MIN_BLOCKS others. Seeded.
    """
    counts_BE = _filled(counts_BE)
    blocks, experts = counts_BE.shape
    if blocks < MIN_BLOCKS:
        return None
    total_E = counts_BE.sum(0)
    weights_RB = resampling_weights(blocks, resamples, seed)
    drawn_RE = weights_RB @ counts_BE
    stretch = _t_over_z(blocks, level) * np.sqrt(blocks / (blocks - 1))

    def basic(
        measure: Callable[..., Values], power: int, top: float, bottom: float = 0.0
    ) -> Interval:
        here, drawn_R = float(measure(total_E)) ** power, measure(drawn_RE) ** power
        centre = drawn_R.mean()
        noise_R = centre - here + stretch * (drawn_R - centre)
        low, high = here - np.quantile(noise_R, [(1 + level) / 2, (1 - level) / 2])
        ends = np.clip([_root(low, power), _root(high, power)], bottom, top)
        return float(ends[0]), float(ends[1])

    # As uneven as it can be: every token selects the same K experts.
    worst_E = np.arange(experts) < top_k
    entropy = basic(load.entropy, 1, 1.0, float(load.entropy(worst_E)))
    return {
        "max_vio": _max_vio_interval(counts_BE, drawn_RE, stretch, level, experts / top_k - 1),
        "gini": basic(load.gini, 2, float(load.gini(worst_E))),
        "cv": basic(load.cv, 2, float(load.cv(worst_E))),
        "entropy": entropy,
        "effective_experts": (experts ** entropy[0], experts ** entropy[1]),
    }


def share_intervals(
    counts_BE: NDArray[Any], tokens_B: NDArray[Any], top_k: int, level: float = 0.95
) -> tuple[Values, Values]:
    """Lower and upper bound of each expert's share, [E] each; nan with too few blocks."""
    effect = design_effect(counts_BE, tokens_B, top_k)
    tokens, blocks = int(tokens_B.sum()), len(_filled(counts_BE))
    trials_E = effect.trials(tokens, blocks, level)
    hits_E = counts_BE.sum(0) * trials_E / max(tokens, 1)
    low_E, high_E = bounds.two_sided(hits_E, trials_E, level)
    unknown = np.isnan(trials_E)
    return np.where(unknown, np.nan, low_E / top_k), np.where(unknown, np.nan, high_E / top_k)


def design_effect(counts_BE: NDArray[Any], tokens_B: NDArray[Any], top_k: int) -> DesignEffect:
    """Variance of the shares between blocks over that of independent tokens (Rao and Scott 1981).

    The variance of a share is that of a ratio over blocks, linearised; of independent tokens that
    each select K distinct experts it is p (1 - K p) / (T K).
    """
    experts = counts_BE.shape[1]
    variance_E = share_variance(counts_BE)
    if np.isnan(variance_E).any():
        return DesignEffect(float("nan"), np.full(experts, np.nan))
    share_E = load.share(counts_BE.sum(0))
    alone_E = share_E * np.maximum(1 - top_k * share_E, 0) / max(int(tokens_B.sum()) * top_k, 1)
    seen = (share_E > 0) & (alone_E > 0)
    if not seen.any():
        return DesignEffect(1.0, np.ones(experts))
    safe_E = np.where(seen, share_E, 1)
    chi_E = np.where(seen, variance_E / safe_E, 0)
    layer = max(float(chi_E.sum() / np.where(seen, alone_E / safe_E, 0).sum()), 1.0)
    own_E = np.where(seen, variance_E / np.where(seen, alone_E, 1), layer)
    cool = share_E * experts < 1
    return DesignEffect(layer, np.maximum(own_E, np.where(cool, layer, 1.0)))


def share_variance(counts_BE: NDArray[Any]) -> Values:
    """Variance of each expert's share by the spread between blocks, [E]; nan with too few."""
    counts_BE = _filled(counts_BE)
    blocks, experts = counts_BE.shape
    if blocks < MIN_BLOCKS:
        return np.full(experts, np.nan)
    total = counts_BE.sum()
    share_E = counts_BE.sum(0) / total
    residual_BE = counts_BE - share_E * counts_BE.sum(1, keepdims=True)
    variance_E: Values = blocks / (blocks - 1) * (residual_BE**2).sum(0) / total**2
    return variance_E


@lru_cache(maxsize=8)
def resampling_weights(blocks: int, resamples: int = RESAMPLES, seed: int = 0) -> Values:
    """How often each block is drawn, float64 [R, B]: blocks drawn with replacement, seeded."""
    chances = np.full(blocks, 1 / blocks)
    drawn = np.random.default_rng(seed).multinomial(blocks, chances, resamples)
    return drawn.astype(np.float64)


def _max_vio_interval(
    counts_BE: Values, drawn_RE: Values, stretch: float, level: float, top: float
) -> Interval:
    blocks, experts = counts_BE.shape
    share_E = load.share(counts_BE.sum(0))
    error_E = np.sqrt(share_variance(counts_BE))
    scale_E = np.where(error_E > 0, error_E, np.inf)
    excess_R = ((load.share(drawn_RE) - share_E) / scale_E).max(1)
    together = float(np.quantile(excess_R, (1 + level) / 2)) * stretch
    single = _z(level) * _t_over_z(blocks, level)
    low = float((share_E - together * error_E).max()) * experts - 1
    high = float((share_E + single * error_E).max()) * experts - 1
    return min(max(low, 0.0), top), min(max(high, 0.0), top)


def _filled(counts_BE: NDArray[Any]) -> Values:
    """The blocks with any selection, as float64."""
    counts = np.asarray(counts_BE, np.float64)
    kept: Values = counts[counts.sum(1) > 0]
    return kept


def _root(value: float, power: int) -> float:
    """Back from the scale of the bootstrap."""
    return float(max(value, 0.0) ** (1 / power))


def _z(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


@lru_cache(maxsize=512)
def _t_over_z(blocks: int, level: float) -> float:
    """Student's quantile over the normal one: the price of a variance from few blocks."""
    from scipy.special import stdtrit

    return float(stdtrit(max(blocks - 1, 1), (1 + level) / 2)) / _z(level)

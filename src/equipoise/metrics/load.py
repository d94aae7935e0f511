"""Measures of the load of E experts, from their selection counts [..., E]; pure functions.

All take counts with the experts on the last axis and work over any leading axes (layers,
bootstrap replicates). `experts` says how many of the last axis are real, a number or an array
over the leading axes, for layers of different size in one padded array; padding counts as zero
and is not an expert. Where nothing was counted, the answer is nan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.errors import EquipoiseError

Values = NDArray[np.float64]


def share(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """Part of the layer's selections that went to each expert, [..., E]; sums to 1."""
    c, _, _ = _prepared(counts, experts)
    return _ratio_of(c, c.sum(-1, keepdims=True))


def ratio(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """Share times the number of experts, [..., E]: 1 is a fair share. Zero on padding."""
    c, _, n = _prepared(counts, experts)
    return _ratio_of(c * n[..., None], c.sum(-1, keepdims=True))


def max_vio(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """MaxVio = max/mean - 1, in [0, E-1], no absolute value (arXiv 2408.15664, section 4.1).

    Where each token selects K distinct experts, at most E/K-1: an expert is in every token once.
    """
    c, _, n = _prepared(counts, experts)
    return _ratio_of(c.max(-1) * n, c.sum(-1)) - 1


def min_vio(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """min/mean - 1, in [-1, 0]: -1 when some expert was never selected."""
    c, real, n = _prepared(counts, experts)
    return _ratio_of(np.where(real, c, np.inf).min(-1) * n, c.sum(-1)) - 1


def avg_vio(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """Mean over experts of |count/mean - 1|, in [0, 2(1 - 1/E)]."""
    c, real, n = _prepared(counts, experts)
    fair = c.sum(-1, keepdims=True) / n[..., None]
    return _ratio_of(np.where(real, np.abs(c - fair), 0).sum(-1), c.sum(-1))


def cv(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """Coefficient of variation, population std/mean, in [0, sqrt(E-1)]; Shazeer 2017 squares it."""
    c, real, n = _prepared(counts, experts)
    total = c.sum(-1)
    fair = (total / n)[..., None]
    variance = np.where(real, (c - fair) ** 2, 0).sum(-1) / n
    return _ratio_of(np.sqrt(variance) * n, total)


def gini(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """Gini coefficient, sum (2i-E-1) c_(i) / (E sum c) over ascending counts, in [0, 1 - 1/E]."""
    c, _, n = _prepared(counts, experts)
    ordered = np.sort(c, -1)  # padding is zero and comes first: rank i among the real is later
    rank = np.arange(1, c.shape[-1] + 1) - (c.shape[-1] - n[..., None])
    weighted = ((2 * rank - n[..., None] - 1) * ordered).sum(-1)
    return _ratio_of(weighted, n * c.sum(-1))


def entropy(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """Shannon entropy of the shares over its maximum, H / ln E, in [0, 1]; 1 for one expert."""
    c, _, n = _prepared(counts, experts)
    nats = _nats(c)
    return np.where(n > 1, nats / np.log(np.maximum(n, 2)), nats + 1)


def effective_experts(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """exp(H), in [1, E]: how many equally used experts would have the same entropy."""
    c, _, _ = _prepared(counts, experts)
    return np.exp(_nats(c))


def min_max_ratio(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """Smallest count over largest, in [0, 1]."""
    c, real, _ = _prepared(counts, experts)
    return _ratio_of(np.where(real, c, np.inf).min(-1), c.max(-1))


def coverage(counts: ArrayLike, experts: ArrayLike | None = None) -> Values:
    """Part of the experts that were selected at least once, in (0, 1]."""
    c, _, n = _prepared(counts, experts)
    return np.where(c.sum(-1) > 0, (c > 0).sum(-1) / n, np.nan)


MEASURES = {
    "max_vio": max_vio,
    "min_vio": min_vio,
    "avg_vio": avg_vio,
    "cv": cv,
    "gini": gini,
    "entropy": entropy,
    "effective_experts": effective_experts,
    "min_max": min_max_ratio,
    "coverage": coverage,
}
"""Every measure of a whole layer, by the name it has in JSON."""

LOWER_IS_WORSE = frozenset({"min_vio", "entropy", "effective_experts", "min_max", "coverage"})
"""Measures whose small values mean imbalance."""


def _prepared(
    counts: ArrayLike, experts: ArrayLike | None
) -> tuple[Values, NDArray[np.bool_], Values]:
    """Counts as float64 with padding at zero, which entries are experts, and their number."""
    c: NDArray[Any] = np.asarray(counts)
    if c.ndim == 0 or c.shape[-1] == 0:
        raise EquipoiseError(f"counts need the experts on their last axis, not shape {c.shape}")
    if c.size and c.min() < 0:
        raise EquipoiseError(f"counts cannot be negative: {c.min()}")
    n = np.broadcast_to(c.shape[-1] if experts is None else np.asarray(experts), c.shape[:-1])
    if n.size and (n.min() < 1 or n.max() > c.shape[-1]):
        raise EquipoiseError(
            f"experts are 1..{c.shape[-1]} (the last axis of counts), not {n.min()}..{n.max()}"
        )
    real = np.arange(c.shape[-1]) < n[..., None]
    return np.where(real, c, 0).astype(np.float64), real, n.astype(np.float64)


def _ratio_of(part: Values, whole: Values) -> Values:
    """part / whole, nan where the whole is zero, without a warning."""
    whole = np.asarray(whole, np.float64)
    return np.asarray(part / np.where(whole > 0, whole, np.nan), np.float64)


def _nats(c: Values) -> Values:
    total = c.sum(-1)
    p = _ratio_of(c, total[..., None])
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    return np.where(total > 0, np.maximum(-terms.sum(-1), 0), np.nan)

"""What a count says of the true share: exact binomial bounds, and many comparisons at once.

The counts of tokens are not independent trials: pass the *effective* tokens, that is the tokens
divided by the design effect (`intervals.design_effect`), and counts divided likewise (Korn and
Graubard 1998, Survey Methodology 24).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]


def upper_bound(hits: ArrayLike, trials: ArrayLike, level: float = 0.95) -> Values:
    """One-sided exact upper bound of a proportion after `hits` in `trials`; both may be fractional.

    With no hit it is 1 - (1-level)^(1/trials), close to 3/trials at 95 % ("rule of three").
    1 where there are no trials.
    """
    from scipy.special import betaincinv

    x, n = np.broadcast_arrays(np.asarray(hits, np.float64), np.asarray(trials, np.float64))
    left = np.maximum(n - x, 0)
    known = (n > 0) & (left > 0)
    found = betaincinv(x + 1, np.where(known, left, 1), level)
    return np.where(known, found, 1.0)


def lower_bound(hits: ArrayLike, trials: ArrayLike, level: float = 0.95) -> Values:
    """One-sided exact lower bound of a proportion; 0 without a hit or without trials."""
    from scipy.special import betaincinv

    x, n = np.broadcast_arrays(np.asarray(hits, np.float64), np.asarray(trials, np.float64))
    known = (n > 0) & (x > 0)
    found = betaincinv(np.where(known, x, 1), np.maximum(n - x, 0) + 1, 1 - level)
    return np.where(known, found, 0.0)


def two_sided(hits: ArrayLike, trials: ArrayLike, level: float = 0.95) -> tuple[Values, Values]:
    """Clopper-Pearson interval of a proportion; both tails hold half of 1 - level."""
    one_sided = (1 + level) / 2
    return lower_bound(hits, trials, one_sided), upper_bound(hits, trials, one_sided)


def p_above(hits: ArrayLike, trials: ArrayLike, rate: ArrayLike) -> Values:
    """p-value of "the true proportion is at most `rate`": P(as many hits or more | rate)."""
    from scipy.special import betainc

    x, n, r = np.broadcast_arrays(
        np.asarray(hits, np.float64), np.asarray(trials, np.float64), np.asarray(rate, np.float64)
    )
    known = (n > 0) & (x > 0) & (r < 1)
    found = betainc(np.where(known, x, 1), np.maximum(n - x, 0) + 1, np.clip(r, 0, 1))
    return np.where(known, found, 1.0)


def benjamini_hochberg(p_values: ArrayLike) -> Values:
    """q-values: reject where <= alpha to keep the expected part of false finds at alpha.

    Benjamini and Hochberg 1995, step-up; same shape as given; nan stays nan and is not counted.
    """
    p = np.asarray(p_values, np.float64)
    flat = p.reshape(-1)
    known = np.flatnonzero(~np.isnan(flat))
    order = known[np.argsort(flat[known], kind="stable")]
    scaled = flat[order] * len(order) / np.arange(1, len(order) + 1)
    q = np.full(flat.shape, np.nan)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q.reshape(p.shape)

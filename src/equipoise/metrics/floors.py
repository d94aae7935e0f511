"""Floors: what chance alone makes of each measure when routing is perfectly uniform.

T tokens that each pick K distinct of E experts at random do not give equal counts. A measured
imbalance means something only above that. No formula in the literature is exact (the usual
sqrt(2 ln E (1-K/E) E/(TK)) is 5-30 % high for MaxVio), so the floors are simulated, seeded and
cached: equal (T, E, K) cost one simulation, whatever the number of layers.

Small cases (T K <= max(2^14, 64 E)) are drawn token by token. Larger ones draw the counts from
their normal limit with the true covariance T q (1-q) E/(E-1) (I - 11'/E), q = K/E, corrected for
the skewness of the binomial (Cornish-Fisher); at the switch the expectations agree within 1 % and
the limits within 2 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.metrics.load import LOWER_IS_WORSE, MEASURES

EXACT_SELECTIONS = 1 << 14
"""Selections up to which every token is drawn ..."""

EXACT_PER_EXPERT = 64
"""... or so many per expert, where that is more."""

SIMULATIONS = 1000
"""Simulated runs per floor: the expectation is then known to about 0.5 % of itself."""


@dataclass(frozen=True)
class Floor:
    """Each measure of `load.MEASURES` under uniform routing of `tokens`, K of E."""

    tokens: int
    experts: int
    top_k: int
    mean: Mapping[str, float]
    """Expectation: the value that chance gives."""
    limit: Mapping[str, float]
    """The value that chance passes, on the side of imbalance, in one run of twenty."""


@lru_cache(maxsize=4096)
def floor(
    tokens: int, experts: int, top_k: int, simulations: int = SIMULATIONS, seed: int = 0
) -> Floor:
    """Simulated floor of every measure; the same arguments always give the same numbers.

    With no tokens every value is nan. Raises EquipoiseError unless 1 <= top_k <= experts.
    """
    if not 1 <= top_k <= experts:
        raise EquipoiseError(f"top-k is 1..{experts} (the number of experts), not {top_k}")
    nothing = dict.fromkeys(MEASURES, float("nan"))
    if tokens < 1:
        return Floor(tokens, experts, top_k, MappingProxyType(nothing), MappingProxyType(nothing))
    counts_RE = uniform_counts(tokens, experts, top_k, simulations, seed)
    mean, limit = {}, {}
    for name, measure in MEASURES.items():
        values_R = measure(counts_RE)
        mean[name] = float(values_R.mean())
        limit[name] = float(np.quantile(values_R, 0.05 if name in LOWER_IS_WORSE else 0.95))
    return Floor(tokens, experts, top_k, MappingProxyType(mean), MappingProxyType(limit))


def uniform_counts(
    tokens: int, experts: int, top_k: int, simulations: int = SIMULATIONS, seed: int = 0
) -> NDArray[np.float64]:
    """Simulated counts under uniform routing, [R, E]; exact or normal by the size of the case."""
    if tokens * top_k <= max(EXACT_SELECTIONS, EXACT_PER_EXPERT * experts):
        return exact_counts(tokens, experts, top_k, simulations, seed).astype(np.float64)
    return normal_counts(tokens, experts, top_k, simulations, seed)


def exact_counts(
    tokens: int, experts: int, top_k: int, simulations: int, seed: int
) -> NDArray[np.int64]:
    """Counts [R, E] drawn token by token."""
    from equipoise.metrics import _kernels

    counts_RE = np.zeros((simulations, experts), np.int64)
    _kernels.uniform_counts(seed, tokens, top_k, counts_RE)
    return counts_RE


def normal_counts(
    tokens: int, experts: int, top_k: int, simulations: int, seed: int
) -> NDArray[np.float64]:
    """Counts [R, E] from the normal limit with the right covariance and binomial skewness."""
    fair = tokens * top_k / experts
    if top_k == experts:
        return np.full((simulations, experts), fair)
    q = top_k / experts
    spread = np.sqrt(tokens * q * (1 - q))
    z_RE = np.random.default_rng(seed).standard_normal((simulations, experts))
    z_RE += (1 - 2 * q) / (6 * spread) * (z_RE**2 - 1)
    z_RE -= z_RE.mean(-1, keepdims=True)
    counts_RE: NDArray[np.float64] = fair + spread * np.sqrt(experts / (experts - 1)) * z_RE
    return np.maximum(counts_RE, 0)

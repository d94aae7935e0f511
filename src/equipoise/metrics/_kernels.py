"""The compiled loops behind `counting` and `idle`; imported late, since numba takes half a second.

Every loop takes checked, contiguous arrays. Signed ids arrive viewed as unsigned, so that the
largest value of the type means "no expert" in every type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint64

from equipoise.metrics._compile import kernel


@kernel
def count_grouped(ids_TK: Any, group_T: Any, out_GE: Any, none: Any) -> tuple[int, int]:
    """Add to out_GE [G, E]; returns (row, group) of the first fault, or (-1, 0).

    Rows of a negative group are left out, ids and all.
    """
    groups, experts = out_GE.shape
    limit = uint64(experts)
    for t in range(ids_TK.shape[0]):
        g = group_T[t]
        if g < 0:
            continue
        if g >= groups:
            return t, g
        row = out_GE[g]
        for k in range(ids_TK.shape[1]):
            e = uint64(ids_TK[t, k])
            if e < limit:
                row[e] += 1
            elif e != none:
                return t, -1
    return -1, 0


@kernel
def scan_runs(ids_TK: Any, start: int, first_E: Any, last_E: Any, inner_E: Any) -> None:
    """Where each expert was first and last selected, and its longest run without between two.

    first_E and last_E are token numbers, -1 before the first selection. Ids that are not an
    expert are passed over.
    """
    limit = uint64(first_E.shape[0])
    for t in range(ids_TK.shape[0]):
        now = start + t
        for k in range(ids_TK.shape[1]):
            e = uint64(ids_TK[t, k])
            if e >= limit:
                continue
            before = last_E[e]
            if before < 0:
                first_E[e] = now
            elif now - before - 1 > inner_E[e]:
                inner_E[e] = now - before - 1
            last_E[e] = now


@kernel
def uniform_counts(seed: int, tokens: int, top_k: int, out_RE: Any) -> None:
    """Counts of `tokens` tokens that each pick `top_k` distinct experts at random, R times.

    Random numbers are SplitMix64 (Steele et al. 2014): five times faster here than numpy's, and
    the same on every machine and version.
    """
    experts = out_RE.shape[1]
    order = np.arange(experts)
    state = uint64(seed) * uint64(0xD1342543DE82EF95) + uint64(0x2545F4914F6CDD1D)
    for r in range(out_RE.shape[0]):
        row = out_RE[r]
        for _ in range(tokens):
            # The first K steps of a Fisher-Yates shuffle; any starting order will do.
            for k in range(top_k):
                state += uint64(0x9E3779B97F4A7C15)
                x = state
                x = (x ^ (x >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
                x = (x ^ (x >> uint64(27))) * uint64(0x94D049BB133111EB)
                x ^= x >> uint64(31)
                j = k + ((x >> uint64(32)) * uint64(experts - k) >> uint64(32))
                chosen = order[j]
                order[j] = order[k]
                order[k] = chosen
                row[chosen] += 1

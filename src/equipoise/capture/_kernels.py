"""Compiled loop from the ids of one layer, as the model passed them, to stored rows."""

from __future__ import annotations

from typing import Any

from equipoise.metrics._compile import kernel


@kernel
def narrow(ids_TK: Any, keep_T: Any, experts: int, out_TK: Any) -> int:
    """Copy the kept rows into `out_TK`, unsigned and narrow; -1 becomes the largest value.

    Returns the row of the first id outside [-1, experts), which a cast would have wrapped, or -1.
    """
    n = 0
    none = out_TK.dtype.type(-1)
    for t in range(ids_TK.shape[0]):
        if keep_T[t]:
            for k in range(ids_TK.shape[1]):
                e = ids_TK[t, k]
                if e < -1 or e >= experts:
                    return t
                out_TK[n, k] = none if e < 0 else e
            n += 1
    return -1

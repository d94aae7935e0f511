"""How the loops are compiled: cached on disk where possible, without the lock of Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit, nogil and cached; without the cache where no cache folder can be written.

    numba looks for a writable folder when it decorates (RuntimeError where there is none), and
    again when it stores a compiled loop (OSError on a full disk): neither may stop a measurement.
    """
    try:
        fast = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]
    _forgive_unwritable(fast)
    return fast  # type: ignore[no-any-return]


def _forgive_unwritable(dispatcher: Any) -> None:
    """Let a failed write to the cache pass: the loop is compiled and in memory by then."""
    cache: Any = getattr(dispatcher, "_cache", None)
    store = getattr(cache, "save_overload", None)
    if store is None:
        return

    def save_overload(signature: Any, compiled: Any) -> None:
        try:
            store(signature, compiled)
        except OSError:
            return

    cache.save_overload = save_overload

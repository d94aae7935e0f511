"""Counting of expert ids: selections per expert, at memory speed, every id checked.

Ids are integers of any type: [0, num_experts) is an expert, -1 (or, in an unsigned type, its
largest value) is a slot that went to no expert. Everything else raises.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError

Ids = NDArray[np.integer]
Counts = NDArray[np.int64]

_scratch = threading.local()


@cache
def _compiled() -> Any:
    """The compiled loops; loaded at the first count, since numba takes half a second."""
    from equipoise.metrics import _kernels

    return _kernels


def count_ids(
    ids_TK: Ids,
    num_experts: int,
    out_E: Counts | None = None,
    mask_T: NDArray[np.bool_] | None = None,
) -> Counts:
    """Selections of each expert, int64 [E], over ids of any shape; added to `out_E` when given.

    `mask_T` keeps the rows where it is True. Raises EquipoiseError, and leaves `out_E` as it was,
    for an id outside [0, num_experts) that is not the "no expert" value.
    """
    if mask_T is not None:
        group_T = np.where(mask_T, 0, -1)
        out_GE = None if out_E is None else _checked_out(out_E, (num_experts,))[None]
        counts_E: Counts = count_grouped(ids_TK, group_T, 1, num_experts, out_GE)[0]
        return counts_E
    ids = unsigned(ids_TK, num_experts)
    if ids.itemsize == 1:
        return _count_bytes(np.asarray(ids_TK), ids, num_experts, out_E)
    if ids.itemsize > 2:
        found_E = _count_wide(np.asarray(ids_TK), num_experts)
    else:
        found_E, complete = _count_narrow(ids.reshape(-1), num_experts)
        if not complete:
            raise_impossible(np.asarray(ids_TK), num_experts)
    if out_E is None:
        return found_E
    out_E = _checked_out(out_E, (num_experts,))
    out_E += found_E
    return out_E


def count_grouped(
    ids_TK: Ids,
    group_T: NDArray[np.integer],
    num_groups: int,
    num_experts: int,
    out_GE: Counts | None = None,
) -> Counts:
    """Selections of each expert by the rows of each group, int64 [G, E]; one pass.

    `group_T` is the group of each row, in [0, num_groups); rows with a negative group are left
    out. Raises EquipoiseError for an impossible id or group.
    """
    ids = unsigned(ids_TK, num_experts)
    ids = ids.reshape(len(ids), -1) if len(ids) else ids.reshape(0, 1)
    if np.shape(group_T) != (len(ids),):
        raise EquipoiseError(
            f"one group (or mask value) per row is needed: {len(ids)} rows of ids, "
            f"groups of shape {np.shape(group_T)}"
        )
    found_GE = np.zeros((num_groups, num_experts), np.int64)
    group_T = np.ascontiguousarray(group_T, np.int64)
    row, fault = _compiled().count_grouped(ids, group_T, found_GE, none_value(ids))
    if row >= 0 and fault >= 0:
        raise EquipoiseError(f"group {fault} at row {row}: groups are 0..{num_groups - 1}")
    if row >= 0:
        raise_impossible(np.atleast_2d(ids_TK)[row], num_experts)
    if out_GE is None:
        return found_GE
    out_GE = _checked_out(out_GE, (num_groups, num_experts))
    out_GE += found_GE
    return out_GE


def unsigned(ids: Ids, num_experts: int) -> NDArray[np.unsignedinteger]:
    """The ids, contiguous and viewed as unsigned: -1 becomes the largest value of the type."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise EquipoiseError(f"expert ids must be integers, not {ids.dtype}: pass the ids of top-k")
    if num_experts < 1:
        raise EquipoiseError(f"a layer has at least one expert, not {num_experts}")
    if ids.dtype.kind == "u" and num_experts >= 1 << (8 * ids.itemsize):
        raise EquipoiseError(
            f"{ids.dtype} ids cannot name {num_experts} experts: the largest value stands for "
            f"'no expert'. Use a wider type"
        )
    plain: NDArray[Any] = np.ascontiguousarray(ids)
    return plain if plain.dtype.kind == "u" else plain.view(f"u{plain.itemsize}")


def none_value(ids: NDArray[np.unsignedinteger]) -> np.uint64:
    """The value that stands for "no expert" among these unsigned ids."""
    return np.uint64(np.iinfo(ids.dtype).max)


def raise_impossible(ids: Ids, num_experts: int) -> None:
    """Raise EquipoiseError naming the first impossible id, when there is one."""
    none = np.iinfo(ids.dtype).max if ids.dtype.kind == "u" else -1
    wrong = ids[((ids < 0) | (ids >= num_experts)) & (ids != none)]
    if wrong.size:
        raise EquipoiseError(
            f"expert id {wrong[0]} in a layer of {num_experts} experts: ids are "
            f"0..{num_experts - 1}, or {none} for no expert"
        )


def _count_bytes(
    given: Ids, ids: NDArray[np.unsignedinteger], experts: int, out_E: Counts | None
) -> Counts:
    """One-byte ids, eight at a time; `given` is how they came, for the error."""
    out_E = np.zeros(experts, np.int64) if out_E is None else _checked_out(out_E, (experts,))
    if not _compiled().count_bytes(ids.reshape(-1), out_E):
        raise_impossible(given, experts)
    return out_E


def _count_narrow(ids: NDArray[np.unsignedinteger], num_experts: int) -> tuple[Counts, bool]:
    """Two-byte ids: a table entry for every value of the type, so nothing can overflow.

    The entries outside [0, E) prove the range afterwards, at no cost per id; with the counts comes
    whether every id was possible.
    """
    tables = _tables()
    head = min(-ids.ctypes.data % 8 // 2, ids.size)
    body = (ids.size - head) // 4 * 4
    _compiled().count_words16(ids[head : head + body].view(np.uint64), *tables)
    for edge in (ids[:head], ids[head + body :]):
        np.add.at(tables[0], edge, 1)
    found_E = tables[:, :num_experts].sum(0).astype(np.int64)
    none = int(tables[:, -1].sum())
    complete = int(found_E.sum()) + none == ids.size
    tables[:, : num_experts if complete else None] = 0
    tables[:, -1] = 0
    return found_E, complete


def _tables() -> NDArray[np.uint64]:
    """Four zeroed tables of this thread, [4, 65536]; users leave them zeroed."""
    tables: NDArray[np.uint64] | None = getattr(_scratch, "tables", None)
    if tables is None:
        tables = np.zeros((4, 1 << 16), np.uint64)
        _scratch.tables = tables
    return tables


def _count_wide(ids: Ids, num_experts: int) -> Counts:
    """Four- and eight-byte ids, as they come out of frameworks: the simple loop."""
    flat = ids.reshape(-1, 1)
    counts_E: Counts = count_grouped(flat, np.zeros(len(flat), np.int64), 1, num_experts)[0]
    return counts_E


def _checked_out(out: Counts, shape: tuple[int, ...]) -> Counts:
    if out.shape != shape or out.dtype != np.int64:
        raise EquipoiseError(
            f"counts to add to must be int64 of shape {shape}, not {out.dtype} {out.shape}"
        )
    return out

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


@cache
def _columns() -> Any:
    """The compiled loops over columns, as late."""
    from equipoise.metrics import _columns

    return _columns


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
    found_E = np.zeros(num_experts, np.int64) if out_E is None else out_E
    found_E = _checked_out(found_E, (num_experts,))
    if ids.itemsize > 2:
        found_E += _count_wide(np.asarray(ids_TK), num_experts)
    else:
        _count_narrow(np.asarray(ids_TK), ids, found_E)
    return found_E


def count_columns(
    memory: NDArray[np.unsignedinteger],
    start_L: NDArray[np.int64],
    size_L: NDArray[np.int64],
    experts_L: NDArray[np.int64],
    counts_LE: Counts,
) -> int | None:
    """Count columns of uint8 or uint16 ids in one stretch of memory, added to counts_LE.

    One call for all layers, since a call costs as much as thousands of ids. Column l is
    memory[start_L[l] : start_L[l] + size_L[l]]. Stops before the first column with an impossible id
    and returns its number, else None. Raises EquipoiseError for a column outside the memory.
    """
    stop_L = start_L + size_L
    if len(start_L) and (start_L.min() < 0 or stop_L.max() > len(memory)):
        raise EquipoiseError(
            f"columns of ids reach from {start_L.min():,} to {stop_L.max():,} in {len(memory):,} ids"
        )
    loops = _columns()
    count = loops.count_byte_columns if memory.itemsize == 1 else loops.count_word_columns
    wrong = int(count(memory, start_L, size_L, experts_L, counts_LE, _scratch_memory()))
    return None if wrong < 0 else wrong


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


def _count_narrow(given: Ids, ids: NDArray[np.unsignedinteger], out_E: Counts) -> None:
    """One- and two-byte ids; `given` is how they came, for the error."""
    loops = _columns()
    count = loops.count_bytes if ids.itemsize == 1 else loops.count_words
    if not count(ids.reshape(-1), out_E, _scratch_memory()):
        raise_impossible(given, len(out_E))


def _scratch_memory() -> tuple[NDArray[Any], ...]:
    """This thread's scratch memory for the loops over columns, who leave it as they find it."""
    memory: tuple[NDArray[Any], ...] | None = getattr(_scratch, "memory", None)
    if memory is None:
        loops = _columns()
        tables = np.zeros((4, 1 << 16), np.uint64)
        cells = np.zeros(4**loops.MOST_BITS, np.uint16)
        memory = _scratch.memory = (tables, cells, np.zeros(loops.BLOCK // 8, np.uint64))
    return memory


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

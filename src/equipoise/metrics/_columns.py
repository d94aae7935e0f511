"""The compiled loops over whole columns of one- and two-byte ids; imported late, as `_kernels`.

Counting costs its additions to memory. Where a layer has at most 128 experts and a column is long
enough, two ids share one: a table has a cell for every pair of ids, and its rows and columns are
summed at the end. (With more experts the table outgrows the nearest cache and nothing is won.)
What remains is counted one by one, in tables with an entry for every value of the type: nothing can
overflow, and the entries of possible values prove the range at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint16, uint64

from equipoise.metrics._compile import kernel

MOST_BITS = 7
"""Bits of the largest id that is counted in pairs."""

BLOCK = 4096
"""Ids whose pairs are formed at once, so that they stay in the nearest cache."""

_FOLD = 31 * BLOCK
"""Ids after which the table of pairs is summed: a cell of two bytes holds no more pairs."""


@kernel
def count_byte_columns(
    memory: Any, start_L: Any, size_L: Any, experts_L: Any, out_LE: Any, scratch: Any
) -> int:
    """Add columns of one-byte ids to rows of out_LE; the first with an impossible id, or -1.

    Column l is memory[start_L[l] : start_L[l] + size_L[l]].
    """
    for row in range(start_L.size):
        ids = memory[start_L[row] : start_L[row] + size_L[row]]
        if not count_bytes(ids, out_LE[row, : experts_L[row]], scratch):
            return row
    return -1


@kernel
def count_word_columns(
    memory: Any, start_L: Any, size_L: Any, experts_L: Any, out_LE: Any, scratch: Any
) -> int:
    """Add columns of two-byte ids, as `count_byte_columns`."""
    for row in range(start_L.size):
        ids = memory[start_L[row] : start_L[row] + size_L[row]]
        if not count_words(ids, out_LE[row, : experts_L[row]], scratch):
            return row
    return -1


@kernel
def count_words(ids: Any, out_E: Any, scratch: Any) -> Any:
    """Add two-byte ids, flat, to out_E [E]; False, and out_E as it was, where one is impossible.

    Scratch memory is (tables, cells, packed): uint64 [4, 65536], uint16 [4 ** MOST_BITS] and uint64
    [BLOCK / 8]; the first two are zero before and after.
    """
    _add_singles(ids, scratch[0])
    return _collect(scratch[0], 65535, ids.size, out_E)


@kernel
def count_bytes(ids: Any, out_E: Any, scratch: Any) -> Any:
    """Add one-byte ids, as `count_words`."""
    tables, cells, packed = scratch
    bits = 1
    while (out_E.size - 1) >> bits:
        bits += 1
    paired = bits <= MOST_BITS and ids.size >> (2 * bits) > 0
    head = min(-ids.ctypes.data % 8, ids.size)
    stop = head + (ids.size - head) // 8 * 8
    for i in range(head):
        tables[0, ids[i]] += uint64(1)
    for i in range(stop, ids.size):
        tables[0, ids[i]] += uint64(1)
    pairs = packed.view(np.uint16)
    for first in range(head, stop, _FOLD):
        last = min(first + _FOLD, stop)
        for start in range(first, last, BLOCK):
            block = ids[start : min(start + BLOCK, last)]
            if paired and _pack(block.view(np.uint64), bits, packed):
                _add_pairs(pairs[: block.size // 2], cells)
            else:
                _add_singles(block, tables)
        if paired:
            _fold(cells, 1 << bits, tables[0])
    return _collect(tables, 255, ids.size, out_E)


@kernel
def _collect(tables: Any, none: int, size: int, out_E: Any) -> Any:
    """Add the counts in the tables to out_E if no id was impossible, and clear the tables."""
    experts = out_E.size
    b0, b1, b2, b3 = tables[0], tables[1], tables[2], tables[3]
    total = b0[none] + b1[none] + b2[none] + b3[none]
    for e in range(experts):
        total += b0[e] + b1[e] + b2[e] + b3[e]
    possible = total == uint64(size)
    if possible:
        for e in range(experts):
            out_E[e] += np.int64(b0[e] + b1[e] + b2[e] + b3[e])
    end = experts if possible else none
    for b in (b0, b1, b2, b3):
        for e in range(end):
            b[e] = uint64(0)
        b[none] = uint64(0)
    return possible


@kernel
def _add_singles(ids: Any, tables: Any) -> None:
    """Neighbours go to different tables: additions in a row to one address wait for each other."""
    one = uint64(1)
    b0, b1, b2, b3 = tables[0], tables[1], tables[2], tables[3]
    whole = ids.size // 8 * 8
    for i in range(0, whole, 8):
        b0[ids[i]] += one
        b1[ids[i + 1]] += one
        b2[ids[i + 2]] += one
        b3[ids[i + 3]] += one
        b0[ids[i + 4]] += one
        b1[ids[i + 5]] += one
        b2[ids[i + 6]] += one
        b3[ids[i + 7]] += one
    for i in range(whole, ids.size):
        b0[ids[i]] += one


@kernel
def _pack(words: Any, bits: int, packed: Any) -> Any:
    """Bring the two ids of each pair together, to a number of 2 * bits bits; False if one has more."""
    low, shift = uint64(0x00FF00FF00FF00FF), uint64(8 - bits)
    seen = uint64(0)
    for i in range(words.size):
        w = words[i]
        seen |= w
        packed[i] = (w & low) | ((w & ~low) >> shift)
    return seen & (uint64(0x0101010101010101) * uint64(256 - (1 << bits))) == uint64(0)


@kernel
def _add_pairs(pairs: Any, cells: Any) -> None:
    """Two ids an addition. Blocks are whole words, so pairs come in fours."""
    one = uint16(1)
    whole = pairs.size // 8 * 8
    for i in range(0, whole, 8):
        cells[pairs[i]] += one
        cells[pairs[i + 1]] += one
        cells[pairs[i + 2]] += one
        cells[pairs[i + 3]] += one
        cells[pairs[i + 4]] += one
        cells[pairs[i + 5]] += one
        cells[pairs[i + 6]] += one
        cells[pairs[i + 7]] += one
    for i in range(whole, pairs.size):
        cells[pairs[i]] += one


@kernel
def _fold(cells: Any, side: int, counts: Any) -> None:
    """Add the sums of the rows and of the columns to the counts of the values, and clear.

    Two bytes hold any of these sums, since they hold the sum of all cells.
    """
    columns = np.zeros(side, np.uint16)
    for high in range(side):
        row = cells[high * side : (high + 1) * side]
        total = uint16(0)
        for c in range(side):
            total = uint16(total + row[c])
        counts[high] += uint64(total)
        for c in range(side):
            columns[c] = uint16(columns[c] + row[c])
            row[c] = uint16(0)
    for c in range(side):
        counts[c] += uint64(columns[c])

"""The sequence tables of a trace: one row per document or question, and what was answered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from equipoise.trace.schema import SEQUENCES_SCHEMA

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equipoise.trace.parts import Part


def sequence_table(part: Part) -> pa.Table:
    """The sequences of a part; of several rows for one, the last: results replace labels."""
    table = pa.Table.from_batches(part.sequences(), SEQUENCES_SCHEMA)
    numbers = table["sequence"].to_numpy()
    _, from_end = np.unique(numbers[::-1], return_index=True)
    return table.take(pa.array(np.sort(len(numbers) - 1 - from_end)))


def next_number(table: pa.Table) -> int:
    """One more than the largest sequence number."""
    return int(pc.max(table["sequence"]).as_py() or 0) + 1 if table.num_rows else 0


def is_in(column: pa.Array, allowed: Iterable[str | None]) -> pa.Array:
    """Where a column of strings has one of these values; null is none of them."""
    return pc.is_in(column, value_set=pa.array(sorted(v for v in allowed if v), pa.string()))


def accuracy(table: pa.Table) -> dict[str, Any] | None:
    """Right answers over all questions, by subject and by category; None without questions."""
    table = table.filter(pc.is_valid(table["correct"]))
    if not table.num_rows:
        return None
    right = np.asarray(table["correct"].to_pylist(), bool)
    result: dict[str, Any] = {"overall": _score(right)}
    for key in ("subject", "category"):
        names = np.asarray(table[key].to_pylist(), object)
        known = [name for name in dict.fromkeys(names) if name is not None]
        result[key] = {name: _score(right[names == name]) for name in known}
    return result


def _score(right: NDArray[np.bool_]) -> dict[str, Any]:
    correct, questions = int(right.sum()), len(right)
    return {"correct": correct, "questions": questions, "accuracy": correct / questions}

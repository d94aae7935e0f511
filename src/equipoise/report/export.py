"""Rows as JSON and CSV: strict JSON (no NaN), plain CSV with one row per layer or expert."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def to_json(rows: Any, *, indent: int | None = 2) -> str:
    """Strict JSON of rows, dataclasses and numpy values; NaN and infinity become null."""
    return json.dumps(plain(rows), indent=indent, allow_nan=False, ensure_ascii=False)


def to_csv(rows: Iterable[Row]) -> str:
    """CSV with a header; the columns are the keys of all rows, by first appearance.

    Intervals take two columns (`_low`, `_high`), lists of numbers one, with spaces between.
    """
    flat = [_flat(plain(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def stats_csv(stats: Row) -> str:
    """`stats` as CSV, one row per layer, without its lists of every expert."""
    return to_csv(_light(row) for row in stats["layers"])


def by_csv(groups: Mapping[str, Row], by: str) -> str:
    """`stats_by` as CSV, one row per group and layer."""
    rows = []
    for name, stats in groups.items():
        rows += [{by: name, **_light(row)} for row in stats["layers"]]
    return to_csv(rows)


def _light(row: Row) -> dict[str, Any]:
    """A layer's row without its lists of every expert; of the least used, the first."""
    light = {key: value for key, value in row.items() if key != "counts"}
    return {**light, "least_used": row["least_used"][:1]}


def dead_csv(dead: Row) -> str:
    """`dead` as CSV, one row per expert."""
    return to_csv(dead["experts"])


def plain(value: Any) -> Any:
    """Python's own types only: numpy scalars and arrays, tuples and dataclasses are converted."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return str(value)


def _flat(row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith("interval") and key != "no_interval":
            cells[f"{key}_low"], cells[f"{key}_high"] = value or (None, None)
        elif isinstance(value, list):
            cells[key] = " ".join(map(str, value))
        else:
            cells[key] = value
    return cells

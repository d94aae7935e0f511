"""Plain rows, looked at: what the renderers share about layers, verdicts and findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

ATTENTION = {"dead": "alarm", "cold": "notice", "specialist": "notice", "idle": "notice"}
"""Verdicts of `dead` that ask for attention, and how much; the others are in order or untold."""


def attention(row: Row) -> str:
    """How much a row of `dead` asks for attention, "" if not; never selected always does."""
    level = ATTENTION.get(row["verdict"], "")
    return level or ("notice" if row["count"] == 0 else "")


def as_row(item: Any) -> dict[str, Any]:
    """A dataclass or a mapping as a plain dict."""
    return dict(item) if isinstance(item, Mapping) else dataclasses.asdict(item)


def stack_of(row: Row) -> str:
    """The module path before the layer number: "model.layers" of "model.layers.7.mlp"."""
    head, found, _ = f"{row.get('path', '')}.".partition(f".{row['layer']}.")
    return head if found else ""


def stacks(layers: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by stack where two rows have the same layer number, else all under ""."""
    numbers = [row["layer"] for row in layers]
    if len(set(numbers)) == len(numbers):
        return {"": list(layers)}
    found: dict[str, list[Row]] = {}
    for row in layers:
        found.setdefault(stack_of(row), []).append(row)
    return found


def labels(rows: Sequence[Row]) -> list[str]:
    """The layer of each row as a reader sees it: its number, after its stack where numbers repeat.

    Rows are of layers or of experts; what tells layers apart is their path.
    """
    paths: dict[int, set[str]] = {}
    for row in rows:
        paths.setdefault(row["layer"], set()).add(str(row.get("path", "")))
    repeated = any(len(found) > 1 for found in paths.values())
    return [f"{stack_of(r)} {r['layer']}".strip() if repeated else str(r["layer"]) for r in rows]

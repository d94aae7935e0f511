from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.report.export import dead_csv, stats_csv, to_csv, to_json
from equipoise.trace import Trace


@dataclass
class Point:
    x: float


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict_and_takes_numpy_and_dataclasses() -> None:
    rows = {
        "nan": float("nan"),
        "inf": np.float64("inf"),
        "array": np.array([1.5, np.nan]),
        "count": np.int64(3),
        "point": Point(2.0),
        "pair": (1, None),
        "name": "é",
    }
    assert strict(to_json(rows)) == {
        "nan": None,
        "inf": None,
        "array": [1.5, None],
        "count": 3,
        "point": {"x": 2.0},
        "pair": [1, None],
        "name": "é",
    }


def test_json_of_stats_has_the_promised_shape(stats: dict[str, Any], trace: Trace) -> None:
    found = strict(to_json(stats))
    assert found["tokens"] == trace.tokens
    row = found["layers"][2]
    assert row["counts"] == trace.counts_LE[2].tolist()
    assert sum(row["counts"]) == row["tokens"] * row["top_k"]
    assert row["never_selected"] == [7]
    assert row["least_used"][0] == 7


def test_json_of_an_empty_trace_is_strict(empty: Trace) -> None:
    from equipoise.diagnose.dead import dead
    from equipoise.diagnose.stats import stats

    assert strict(to_json(stats(empty)))["tokens"] == 0
    assert strict(to_json(dead(empty)))["experts"][0]["count"] == 0


def test_csv_of_stats_has_one_row_per_layer(stats: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(stats_csv(stats))))
    assert [row["layer"] for row in rows] == ["3", "4", "5", "60"]
    assert float(rows[2]["max_vio"]) == stats["layers"][2]["max_vio"]
    assert float(rows[2]["max_vio_interval_low"]) == stats["layers"][2]["max_vio_interval"][0]
    assert rows[2]["never_selected"] == rows[2]["least_used"] == "7"
    assert "counts" not in rows[0]


def test_csv_of_dead_has_one_row_per_expert(dead: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(dead_csv(dead))))
    assert len(rows) == len(dead["experts"])
    assert [int(row["count"]) for row in rows] == [row["count"] for row in dead["experts"]]


def test_csv_quotes_what_needs_it_and_leaves_the_unknown_empty() -> None:
    text = to_csv(
        [{"name": 'a,"b"', "interval": None, "x": None}, {"name": "c", "interval": [1, 2]}]
    )
    assert list(csv.reader(io.StringIO(text))) == [
        ["name", "interval_low", "interval_high", "x"],
        ['a,"b"', "", "", ""],
        ["c", "1", "2", ""],
    ]

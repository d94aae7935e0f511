"""Tables of load: layers, the experts of a layer, groups of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from equipoise.report import words
from equipoise.report.rows import stacks
from equipoise.report.terminal.grid import Row, add, grid, legend

_BAR = 16
"""Width of the load bars; their middle mark is a fair share."""

LAYERS_LEGEND = (
    "MaxVio: busiest expert's count / mean - 1. Floor: what uniform routing of as many tokens"
    " gives by chance. Interval: 95 %, over {blocks}. Effective: experts that, equally"
    " used, would be as mixed. Least used: expert and its share of the layer's selections."
)

BY_LEGEND = (
    "MaxVio: busiest expert's count / mean - 1. Floor: what uniform routing of as many tokens"
    " gives by chance. Never: experts without a selection. Least used: expert and its share of the"
    " layer's selections."
)

EXPERTS_LEGEND = (
    "Ratio: share x experts, 1 is a fair share. Interval: 95 % of the ratio, over documents."
    " Idle: longest run of tokens without a selection. Bar: ratio from 0 to 2, | is a fair share."
)


def layers_table(stats: Row) -> RenderableType:
    """One row per MoE layer of `stats`; one table per stack where layer numbers repeat."""
    layers = stats["layers"]
    if not layers:
        return Text("No MoE layers: this trace is of a dense model.")
    groups = stacks(layers)
    tables: list[RenderableType] = []
    for name, rows in groups.items():
        tables.append(_layers_table(rows, name if len(groups) > 1 else None))
    words_below = LAYERS_LEGEND.format(blocks=_blocks([stats]))
    return Group(*tables, legend(words_below + _no_interval([stats])))


def _no_interval(stats: Iterable[Row]) -> str:
    """Why intervals are missing: the first reason, and in how many groups, where not in all."""
    groups = list(stats)
    reasons = [
        next((row["no_interval"] for row in group["layers"] if row.get("no_interval")), None)
        for group in groups
    ]
    found = [why for why in reasons if why]
    if not found:
        return ""
    some = f" in {len(found)} of {len(groups)} groups" if len(found) < len(groups) else ""
    example = ", for example" if len(set(found)) > 1 else ""
    return f" No interval{some}{example}: {found[0]}."


def _blocks(stats: Iterable[Row]) -> str:
    """What the intervals are over; windows are named with their number, and what it means."""
    groups = list(stats)
    kind = next((group["block"] for group in groups if group.get("block")), None) or "document"
    if kind != "window":
        return f"{kind}s"
    counts = [row["blocks"] for group in groups for row in group["layers"] if row.get("blocks")]
    few, many = min(counts, default=0), max(counts, default=0)
    number = f"{few}" if few == many else f"{few} to {many}"
    return f"{number} windows of the record, wide where they are few or of different text"


def _layers_table(rows: Sequence[Row], title: str | None) -> Table:
    table = grid(
        [
            "layer",
            "ex-\nperts",
            "top\n-k",
            "tokens",
            "MaxVio",
            "floor",
            "interval",
            "Gini",
            "effec-\ntive",
            "never\nsel.",
            "least used",
        ],
        title=title,
    )
    for row in rows:
        never = len(row["never_selected"])
        add(
            table,
            str(row["layer"]),
            str(row["experts"]),
            str(row["top_k"]),
            words.compact(row["tokens"]),
            Text(words.measure(row["max_vio"]), style="bold"),
            Text(words.measure(row.get("max_vio_floor")), style="dim"),
            words.interval(row.get("max_vio_interval")),
            words.measure(row.get("gini")),
            words.measure(row.get("effective_experts")),
            Text(str(never), style="bold magenta" if never else ""),
            _least_used(row),
        )
    return table


def _least_used(row: Row) -> str:
    counts, order = row.get("counts"), row["least_used"]
    total = sum(counts) if counts else 0
    if not order or not total or counts is None:
        return words.NOTHING
    return f"{order[0]} {words.share(counts[order[0]] / total)}"


def experts_table(rows: Sequence[Row]) -> RenderableType:
    """Every expert of one layer, in the order given."""
    if not rows:
        return Text("No experts: this trace is of a dense model.")
    table = grid(
        ["expert", "share", "count/total", "ratio", "interval", "longest\nidle", "load"],
        left=("load",),
    )
    for row in rows:
        add(
            table,
            str(row["expert"]),
            words.share(row["share"]),
            f"{row['count']}/{row['total']}",
            words.measure(row["ratio"]),
            words.interval(row.get("ratio_interval") or row.get("interval")),
            words.grouped(row.get("longest_idle")),
            _bar(row["ratio"]),
        )
    return Group(table, legend(EXPERTS_LEGEND))


def _bar(ratio: float | None) -> Text:
    """'#' up to the ratio, '|' at a fair share, '>' where it goes on beyond twice that."""
    if ratio is None or ratio != ratio:
        return Text(words.NOTHING)
    half = _BAR // 2
    length = min(round(ratio * half), _BAR)
    cells = ["#" if place < length else " " for place in range(_BAR)]
    cells[half] = "|" if length <= half else "#"
    if ratio > 2:
        cells[-1] = ">"
    return Text("".join(cells).rstrip(), style="magenta" if not length else "")


_ANY = 10**6

_BY = {
    "layer": _ANY,
    "tokens": _ANY,
    "MaxVio": _ANY,
    "floor": _ANY,
    "interval": 16,
    "Gini": 29,
    "never": _ANY,
    "least used": _ANY,
}
"""Columns of `by_table`, each shown up to this length of the longest name: 80 columns in all."""


def by_table(by: Row | Mapping[str, Row], key: str = "group") -> RenderableType:
    """One row per group and layer of `stats_by`; Gini and interval where the names leave room.

    Below it, what intervals are over, or why there are none.
    """
    groups = by.get("groups", by)
    longest = max((len(name) for name in [key, *groups]), default=0)
    columns = [column for column, until in _BY.items() if longest <= until]
    table = grid([key, *columns], left=(key,))
    for name, stats in groups.items():
        for row in stats["layers"]:
            cells = {
                "layer": str(row["layer"]),
                "tokens": words.compact(row["tokens"]),
                "MaxVio": words.measure(row["max_vio"]),
                "floor": words.measure(row.get("max_vio_floor")),
                "interval": words.interval(row.get("max_vio_interval")),
                "Gini": words.measure(row.get("gini")),
                "never": str(len(row["never_selected"])),
                "least used": _least_used(row),
            }
            add(table, words.line(name), *(cells[column] for column in columns))
        table.add_section()
    return Group(table, legend(BY_LEGEND + _by_intervals(groups, "interval" in columns)))


def _by_intervals(groups: Mapping[str, Row], shown: bool) -> str:
    """What is said of the intervals below `by_table`."""
    rows = [row for stats in groups.values() for row in stats["layers"]]
    known = any(row.get("max_vio_interval") for row in rows)
    why = _no_interval(groups.values())
    if not known:
        return why
    if not shown:
        return f" Intervals do not fit beside these names: --json and --csv have them.{why}"
    return f" Interval: 95 %, over {_blocks(groups.values())}.{why}"

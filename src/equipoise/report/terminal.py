"""Tables for the terminal: plain rows in, rich renderables out; nothing is computed here.

Plain ASCII and at most 80 columns, so that a pipe, a log and a narrow window show every number
whole; colour is rich's to add where there is a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import Box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from equipoise.report import words
from equipoise.report.rows import as_row, attention, labels, stacks

Row = Mapping[str, Any]

_BOX = Box("    \n    \n -  \n    \n    \n -  \n    \n    \n", ascii=True)
_BAR = 16
"""Width of the load bars; their middle mark is a fair share."""

LAYERS_LEGEND = (
    "MaxVio: busiest expert's count / mean - 1. Floor: what uniform routing of as many tokens"
    " gives by chance. Interval: 95 %, over {block}s. Effective: experts that, equally"
    " used, would be as mixed. Least used: expert and its share of the layer's selections."
)
EXPERTS_LEGEND = (
    "Ratio: share x experts, 1 is a fair share. Interval: 95 % of the ratio, over documents."
    " Idle: longest run of tokens without a selection. Bar: ratio from 0 to 2, | is a fair share."
)


DEAD_LEGEND = (
    "Dead: never selected, and surely below 1 % of a fair share. Cold: surely below 10 %."
    " Specialist: cold, but not for some subject or domain. Idle: a long run of tokens without a"
    " selection. Undetermined: too few tokens to tell. True share at most: 95 % bound."
)
DIFF_LEGEND = (
    "JS dist.: Jensen-Shannon distance of the loads, 0 alike, 1 disjoint; by chance: between two"
    " runs of one model on other documents. Least alike: part of the least-used tenth that both"
    " share. Most changed: expert and change of its share."
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
    legend = LAYERS_LEGEND.format(block=stats.get("block") or "document")
    return Group(*tables, _legend(legend + _no_interval(layers)))


def _no_interval(layers: Sequence[Row]) -> str:
    why = next((row["no_interval"] for row in layers if row.get("no_interval")), None)
    return f" No interval: {why}." if why else ""


def _layers_table(rows: Sequence[Row], title: str | None) -> Table:
    table = _table(
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
        _add(
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
    table = _table(
        ["expert", "share", "count/total", "ratio", "interval", "longest\nidle", "load"],
        left=("load",),
    )
    for row in rows:
        _add(
            table,
            str(row["expert"]),
            words.share(row["share"]),
            f"{row['count']}/{row['total']}",
            words.measure(row["ratio"]),
            words.interval(row.get("ratio_interval") or row.get("interval")),
            words.grouped(row.get("longest_idle")),
            _bar(row["ratio"]),
        )
    return Group(table, _legend(EXPERTS_LEGEND))


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


def by_table(by: Row | Mapping[str, Row], key: str = "group") -> RenderableType:
    """One row per group and layer of `stats_by`; Gini and interval where the names leave room."""
    groups = by.get("groups", by)
    longest = max((len(name) for name in [key, *groups]), default=0)
    columns = [column for column, until in _BY.items() if longest <= until]
    table = _table([key, *columns], left=(key,))
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
            _add(table, words.line(name), *(cells[column] for column in columns))
        table.add_section()
    return table


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


def dead_table(dead: Row, *, every: bool = False) -> RenderableType:
    """Experts whose verdict asks for attention (or every one), under a count of all verdicts."""
    named = list(zip(labels(dead["experts"]), dead["experts"], strict=True))
    shown = [(name, row) for name, row in named if every or attention(row)]
    if not shown:
        return verdict_counts(dead)
    table = _table(
        [
            "layer",
            "expert",
            "verdict",
            "count",
            "share",
            "true share\nat most",
            "longest\nidle",
            "idle at\nthe end",
        ],
        left=("verdict",),
    )
    for name, row in shown:
        _add(
            table,
            words.line(name),
            str(row["expert"]),
            Text(words.line(row["verdict"]), style=_STYLES.get(attention(row), "")),
            words.grouped(row["count"]),
            words.share(row["share"]),
            words.share(row.get("share_upper")),
            words.grouped(row.get("longest_idle")),
            words.grouped(row.get("current_idle")),
        )
    return Group(verdict_counts(dead), Text(), table, *_specialists(shown), _legend(DEAD_LEGEND))


def _specialists(named: Sequence[tuple[str, Row]]) -> list[Text]:
    lines = []
    for name, row in named:
        if row.get("where"):
            serves = [
                f"{x['by']} {x['name']} (ratio {words.measure(x['ratio'])})" for x in row["where"]
            ]
            lines.append(
                Text(words.line(f"layer {name} expert {row['expert']} serves {', '.join(serves)}"))
            )
    return [Text(), *lines] if lines else []


def verdict_counts(dead: Row) -> Text:
    """How many experts have each verdict, on one line."""
    counts: dict[str, int] = {}
    for row in dead["experts"]:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    order = [name for name in dead.get("verdicts", counts) if counts.get(name)]
    listed = ", ".join(f"{counts[name]:,} {words.line(name)}" for name in order)
    return Text(f"{len(dead['experts']):,} experts: {listed or 'none'}.")


def diff_table(diff: Row) -> RenderableType:
    """Two runs side by side: the whole, then one row per layer."""
    whole = _table(["", "first", "second"], left=("",))
    _add(whole, "tokens", *(words.grouped(x) for x in diff["tokens"]))
    _add(whole, "accuracy", *(words.percent(x) for x in diff["accuracy"]))
    _add(whole, "tokens/s", *(words.grouped(x and round(x)) for x in diff["tokens_per_second"]))
    if not diff["layers"]:
        return Group(whole, Text("\nOne of the runs is of a dense model: no experts to compare."))
    table = _table(
        [
            "layer",
            "JS\ndist.",
            "by\nchance",
            "MaxVio\nfirst",
            "MaxVio\nsecond",
            "floor\nfirst",
            "floor\nsecond",
            "least\nalike",
            "by\nchance",
            "most changed",
        ]
    )
    for name, row in zip(labels(diff["layers"]), diff["layers"], strict=True):
        _add(
            table,
            words.line(name),
            Text(words.measure(row["js_distance"]), style="bold"),
            Text(words.measure(row["js_floor"]), style="dim"),
            *(words.measure(x) for x in row["max_vio"]),
            *(Text(words.measure(x), style="dim") for x in row["max_vio_floor"]),
            words.measure(row["least_overlap"]),
            Text(words.measure(row["least_overlap_floor"]), style="dim"),
            _most_changed(row),
        )
    return Group(whole, Text(), table, _legend(DIFF_LEGEND))


def _most_changed(row: Row) -> str:
    expert = row["most_changed"]
    if expert is None:
        return words.NOTHING
    change = row["share_change"][expert]
    return f"{expert} {'-' if change < 0 else '+'}{words.share(abs(change))}"


def accuracy_table(accuracy: Row | None, by: str = "subject") -> RenderableType:
    """Right answers, questions and accuracy by subject or category, the whole at the end."""
    if not accuracy:
        return Text("No questions were answered in this trace.")
    table = _table([by, "correct", "questions", "accuracy", "interval"], left=(by,))
    groups = [*accuracy.get(by, {}).items(), ("all", accuracy["overall"])]
    for name, row in groups:
        if name == "all":
            table.add_section()
        _add(
            table,
            words.line(name),
            words.grouped(row["correct"]),
            words.grouped(row["questions"]),
            words.percent(row["accuracy"]),
            words.interval(row.get("interval"), words.percent),
        )
    return table


def accuracy_line(accuracy: Row) -> Text:
    """Accuracy over all questions, in one line."""
    whole = accuracy["overall"]
    return Text(
        f"Accuracy: {words.percent(whole['accuracy'])} of {whole['questions']:,} questions."
    )


def info_table(facts: Iterable[tuple[str, str]]) -> RenderableType:
    """Label and value of each fact (`report.facts.facts`), long values folded."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for label, value in facts:
        _add(table, words.line(label), words.line(value))
    return table


def findings_lines(findings: Iterable[Any]) -> list[Text]:
    """One paragraph per finding, severity first, worst first as given."""
    lines = []
    for finding in findings:
        row = as_row(finding)
        severity = str(row["severity"])
        line = Text.assemble(
            (f"{severity}: ", _SEVERITY.get(severity, "bold")), words.line(row["message"])
        )
        if row.get("advice"):
            line.append(f" {words.line(row['advice'])}", style="dim")
        lines.append(line)
    return lines


_STYLES = {"alarm": "bold magenta", "notice": "yellow"}
_SEVERITY = {
    "error": "bold red",
    "warning": "bold yellow",
    "note": "bold blue",
    "good": "bold green",
}


def _table(columns: Sequence[str], *, left: Sequence[str] = (), title: str | None = None) -> Table:
    table = Table(
        box=_BOX,
        padding=0,
        show_edge=False,
        title=Text(words.line(title)) if title else None,
        title_justify="left",
        title_style="bold",
    )
    for name in columns:
        table.add_column(
            Text(name if "\n" in name else words.line(name)),
            justify="left" if name in left else "right",
            vertical="top",
            no_wrap=name not in left,
            overflow="fold",
        )
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """A row of plain text: square brackets are not rich's markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _legend(text: str) -> RenderableType:
    return Group(Text(), Text(text, style="dim"))

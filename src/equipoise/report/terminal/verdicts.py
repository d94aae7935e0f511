"""Verdicts on experts, and findings in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from equipoise.report import words
from equipoise.report.rows import as_row, attention, labels
from equipoise.report.terminal.grid import STYLES, Row, add, grid, legend

DEAD_LEGEND = (
    "Dead: never selected, and surely below 1 % of a fair share. Cold: surely below 10 %."
    " Specialist: cold, but not for some subject or domain. Idle: a long run of tokens without a"
    " selection. Undetermined: too few tokens to tell. True share at most: 95 % bound."
)

_SEVERITY = {
    "error": "bold red",
    "warning": "bold yellow",
    "note": "bold blue",
    "good": "bold green",
}


def dead_table(dead: Row, *, every: bool = False) -> RenderableType:
    """Experts whose verdict asks for attention (or every one), under a count of all verdicts."""
    named = list(zip(labels(dead["experts"]), dead["experts"], strict=True))
    shown = [(name, row) for name, row in named if every or attention(row)]
    if not shown:
        return verdict_counts(dead)
    table = grid(
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
        add(
            table,
            words.line(name),
            str(row["expert"]),
            Text(words.line(row["verdict"]), style=STYLES.get(attention(row), "")),
            words.grouped(row["count"]),
            words.share(row["share"]),
            words.share(row.get("share_upper")),
            words.grouped(row.get("longest_idle")),
            words.grouped(row.get("current_idle")),
        )
    return Group(verdict_counts(dead), Text(), table, *_specialists(shown), legend(DEAD_LEGEND))


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

"""Everything that the page and the figures show of a trace, gathered once as plain rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise.report import words
from equipoise.report.facts import Facts, facts
from equipoise.report.rows import as_row, labels
from equipoise.trace import Trace

Row = Mapping[str, Any]

CHANCE = 0.25
"""Accuracy of guessing among four choices."""

GROUP_KEYS = ("category", "domain", "subject", "role", "phase")
GROUP_CELLS = 400_000
"""Counts by group that the page may hold, as numbers; larger groupings are left out."""


@dataclass(frozen=True)
class Content:
    """Plain rows of one trace, ready to be laid out."""

    name: str
    stats: Row
    labels: list[str]
    """A name for each layer: its number, with its stack where numbers repeat."""
    experts: list[list[Row]]
    """Rows of every expert of each layer, by expert number."""
    verdicts: list[list[Row]]
    """Rows of `dead` in the same order."""
    findings: list[Row]
    idle_threshold: int | None
    accuracy: list[Row]
    facts: Facts
    meta: Row
    groups: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    """Counts [layer][expert] by value of category, domain, subject, role, phase."""
    left_out: list[str] = field(default_factory=list)
    """Groupings with too many values for the page."""

    @property
    def layers(self) -> Sequence[Row]:
        """The rows of `stats`, one per MoE layer."""
        rows: Sequence[Row] = self.stats["layers"]
        return rows


def gather(trace: Trace, *, idle: int | None = None) -> Content:
    """Ask diagnose for all that a report shows; `idle` is the threshold of `dead` in tokens."""
    from equipoise.diagnose.dead import dead
    from equipoise.diagnose.findings import findings
    from equipoise.diagnose.stats import stats

    layers = stats(trace)
    verdicts = dead(trace) if idle is None else dead(trace, idle=idle)
    groups, left_out = _groups(trace)
    return Content(
        name=words.line(trace.meta.get("model") or (trace.path.name if trace.path else "trace")),
        stats=layers,
        labels=labels(layers["layers"]),
        experts=_experts(trace),
        verdicts=_by_layer(trace, verdicts["experts"]),
        findings=[
            as_row(finding) for finding in findings(trace, measured=layers, verdicts=verdicts)
        ],
        idle_threshold=verdicts.get("idle_threshold"),
        accuracy=accuracy_rows(layers["accuracy"]),
        facts=facts(trace),
        meta=trace.meta,
        groups=groups,
        left_out=left_out,
    )


def accuracy_rows(accuracy: Row | None) -> list[Row]:
    """Overall, categories, then subjects, each with its exact binomial 95 % interval."""
    if not accuracy:
        return []
    from equipoise.metrics.bounds import two_sided

    rows = [{"kind": "overall", "name": "all questions", **accuracy["overall"]}]
    for kind in ("category", "subject"):
        found = [{"kind": kind, "name": name, **row} for name, row in accuracy[kind].items()]
        rows += sorted(found, key=lambda row: -row["accuracy"])
    for row in rows:
        low, high = two_sided(row["correct"], row["questions"])
        row.setdefault("interval", [float(low), float(high)])
    return list(rows)


def _experts(trace: Trace) -> list[list[Row]]:
    from equipoise.diagnose.stats import layer_rows

    return [
        sorted(layer_rows(trace, layer.path), key=lambda row: int(row["expert"]))
        for layer in trace.layers
    ]


def _by_layer(trace: Trace, rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of `dead` as one list per layer, by expert number."""
    found: list[list[Row]] = []
    for layer in trace.layers:
        mine = [row for row in rows if (row["layer"], row["path"]) == (layer.layer, layer.path)]
        found.append(sorted(mine, key=lambda row: int(row["expert"])))
    return found


def _groups(trace: Trace) -> tuple[dict[str, dict[str, list[list[int]]]], list[str]]:
    """Counts by group for every key with two values or more, as far as they fit the page."""
    kept: dict[str, dict[str, list[list[int]]]] = {}
    left_out: list[str] = []
    room = GROUP_CELLS
    for key in GROUP_KEYS if trace.layers else ():
        values = trace.values(key)
        cells = len(values) * sum(layer.experts for layer in trace.layers)
        if len(values) < 2:
            continue
        if cells > room:
            left_out.append(key)
            continue
        room -= cells
        kept[key] = {
            name: [
                counts_E[: layer.experts].tolist()
                for layer, counts_E in zip(view.layers, view.counts_LE, strict=True)
            ]
            for name, view in trace.groups(key).items()
        }
    return kept, left_out

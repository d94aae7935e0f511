"""The report as one HTML file that needs no network: data, style and script are all inside it.

Charts are drawn by a small script of our own (templates/report.js) from the JSON in the file.
Text from outside reaches the page escaped by jinja2, or as JSON whose angle brackets are escaped
and which the script inserts as text nodes; a content security policy allows that one script only.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise import __version__
from equipoise.report import words
from equipoise.report.content import CHANCE, Content, gather
from equipoise.report.definitions import DEFINITIONS
from equipoise.report.departures import FEW, Departure, departures
from equipoise.report.export import to_json
from equipoise.report.rows import ATTENTION

if TYPE_CHECKING:
    from jinja2 import Environment

    from equipoise.trace import Trace

Row = Mapping[str, Any]

TEMPLATES = Path(__file__).with_name("templates")
SHOWN_DEPARTURES = 15


def write_html(trace: Trace, path: str | Path, *, idle: int | None = None) -> Path:
    """Write the report of a trace as one HTML file; `idle` as in `diagnose.dead`. Returns the path.

    An existing file is replaced: ask before calling.
    """
    target = Path(path)
    target.write_text(render(gather(trace, idle=idle)), encoding="utf-8")
    return target


def render(content: Content) -> str:
    """The page as text."""
    from markupsafe import Markup

    environment = _environment()
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    text: str = environment.get_template("report.html.j2").render(
        **_words_of(content),
        **_departures(content),
        version=__version__,
        css=Markup(environment.get_template("report.css.j2").render()),
        script=Markup(script),
        script_hash=_hash(script),
        data=Markup(embedded(page_data(content))),
        definitions=DEFINITIONS if content.layers else DEFINITIONS[-1:],
        few=FEW,
    )
    return text


def embedded(rows: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end or open one."""
    text = to_json(rows, indent=None)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page_data(content: Content) -> dict[str, Any]:
    """What the script of the page draws from; numbers rounded to four significant digits."""
    from equipoise.diagnose.dead import VERDICTS

    layers = [
        _layer_data(*rows, VERDICTS)
        for rows in zip(
            content.labels, content.layers, content.experts, content.verdicts, strict=True
        )
    ]
    first = _main_departures(content)
    return {
        "layers": layers,
        "verdicts": VERDICTS,
        "attention": list(ATTENTION),
        "groups": {
            key: {"names": list(found), "counts": list(found.values())}
            for key, found in content.groups.items()
        },
        "group_layer": first[0].place if first else 0,
        "accuracy": content.accuracy,
        "chance": CHANCE,
        "few": FEW,
    }


def _layer_data(
    label: str, row: Row, experts: list[Row], verdicts: list[Row], names: tuple[str, ...]
) -> dict[str, Any]:
    bounds = [expert["ratio_interval"] or (None, None) for expert in experts]
    return {
        "label": label,
        "experts": row["experts"],
        "counts": row["counts"],
        "max_vio": _short(row["max_vio"]),
        "floor": _short(row["max_vio_floor"]),
        "floor95": _short(row["max_vio_floor_95"]),
        "interval": row["max_vio_interval"] and [_short(x) for x in row["max_vio_interval"]],
        "gini": _short(row["gini"]),
        "effective": _short(row["effective_experts"]),
        "low": [_short(low) for low, _ in bounds],
        "high": [_short(high) for _, high in bounds],
        "upper": [_short(verdict["share_upper"]) for verdict in verdicts],
        "idle": [verdict["longest_idle"] for verdict in verdicts],
        "now": [verdict["current_idle"] for verdict in verdicts],
        "verdict": [names.index(verdict["verdict"]) for verdict in verdicts],
        "serves": {
            verdict["expert"]: ", ".join(x["name"] for x in verdict["where"])
            for verdict in verdicts
            if verdict.get("where")
        },
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _words_of(content: Content) -> dict[str, Any]:
    """What the template prints: names, sentences, rows of the tables that need no script."""
    findings = content.findings
    layers = [
        {**row, "label": label, **_least(row)}
        for label, row in zip(content.labels, content.layers, strict=True)
    ]
    why = next((row["no_interval"] for row in layers if row["no_interval"]), None)
    return {
        "name": content.name,
        "subtitle": _subtitle(content),
        "partial": _partial(content),
        "verdict": findings[0],
        "findings": findings[1:],
        "keys": key_figures(content),
        "layers": layers,
        "interval_note": f"No interval: {why}." if why else "Bars are 95 % intervals.",
        "group_keys": list(content.groups) if layers else [],
        "left_out": content.left_out,
        "accuracy": content.accuracy,
        "facts": content.facts,
        "sections": _sections(content),
    }


def _subtitle(content: Content) -> str:
    known = dict(content.facts)
    return ", ".join(
        filter(
            None,
            [
                known.get("task"),
                f"{content.stats['tokens']:,} tokens",
                f"MoE layers: {known['MoE layers']}",
                str(content.meta.get("ended") or "")[:10],
            ],
        )
    )


def _partial(content: Content) -> str:
    if content.meta.get("status") != "partial":
        return ""
    return (
        f"The recording stopped before its end; every figure is of the {content.stats['tokens']:,}"
        " tokens that were kept."
    )


def _sections(content: Content) -> list[tuple[str, str]]:
    moe = bool(content.layers)
    listed = [
        ("load", "Experts", moe),
        ("balance", "Imbalance", moe),
        ("groups", "By group", moe and bool(content.groups)),
        ("accuracy", "Accuracy", bool(content.accuracy)),
        ("layers", "Layers", moe),
        ("experts", "Every expert", moe),
        ("provenance", "Provenance", True),
        ("definitions", "Definitions", True),
    ]
    return [(name, label) for name, label, shown in listed if shown]


def key_figures(content: Content) -> list[dict[str, str]]:
    """The few numbers that stand large at the top, each with what it is to be compared with."""
    tokens, sequences = content.stats["tokens"], content.stats["sequences"]
    keys = [_key("tokens counted", words.compact(tokens), f"of {sequences:,} sequences")]
    counted = [row for row in content.layers if row["max_vio"] is not None]
    if counted:
        names = {id(row): name for row, name in zip(content.layers, content.labels, strict=True)}
        worst = max(counted, key=lambda row: float(row["max_vio"]))
        fewest = min(counted, key=lambda row: float(row["effective_experts"]) / row["experts"])
        never = sum(len(row["never_selected"]) for row in counted)
        total = sum(row["experts"] for row in counted)
        keys += [
            _key(
                "largest MaxVio",
                words.measure(worst["max_vio"]),
                f"layer {names[id(worst)]}; {words.measure(worst['max_vio_floor'])} by chance",
            ),
            _key(
                "fewest effective experts",
                words.measure(fewest["effective_experts"]),
                f"of {fewest['experts']}, in layer {names[id(fewest)]}",
            ),
            _key("never selected", f"{never:,}", f"of {total:,} experts"),
        ]
    if content.accuracy:
        row = content.accuracy[0]
        low, high = (words.percent(x) for x in row["interval"])
        keys.append(
            _key("accuracy", words.percent(row["accuracy"]), f"{low} to {high}; chance 25%")
        )
    speed = content.meta.get("tokens_per_second")
    if speed:
        keys.append(_key("speed", words.compact(speed), "tokens/s, recording on"))
    return keys


def _key(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _least(row: Row) -> Row:
    total = sum(row["counts"])
    if not total:
        return {"least": words.NOTHING, "least_share": None}
    least = row["least_used"][0]
    return {"least": least, "least_share": row["counts"][least] / total}


def _main_departures(content: Content) -> list[Departure]:
    """Of the first grouping that the page shows."""
    for found in content.groups.values():
        return departures(found, content.layers)[:SHOWN_DEPARTURES]
    return []


def _departures(content: Content) -> dict[str, Any]:
    return {
        "departures_by": next(iter(content.groups), ""),
        "departures": [
            {**vars(found), "label": content.labels[found.place]}
            for found in _main_departures(content)
        ],
    }


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(
        share=words.share,
        measure=words.measure,
        interval=words.interval,
        percent=words.percent,
        percents=lambda bounds: words.interval(bounds, words.percent),
        grouped=words.grouped,
    )
    return environment

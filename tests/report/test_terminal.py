"""The rows stand in the tables with their numbers, whole, within 80 columns of plain ASCII."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType

from equipoise.report import terminal
from equipoise.report.facts import facts
from equipoise.trace import Trace
from tests.report.conftest import EXPERTS, NEVER


def printed(*renderables: RenderableType, width: int = 80) -> list[str]:
    """Lines as they go into a pipe."""
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, force_terminal=False).print(*renderables)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def cells(lines: list[str], layer: int) -> list[str]:
    return next(line.split() for line in lines if line.split()[:1] == [str(layer)])


def big_row(number: int, path: str | None = None) -> dict[str, Any]:
    """A row with the longest numbers that are to be expected."""
    counts = np.random.default_rng(number).integers(1, 10**9, 1024)
    counts[1023] = 1
    return {
        "layer": number,
        "path": path or f"model.layers.{number}.mlp",
        "experts": 1024,
        "top_k": 128,
        "tokens": 999_949_999,
        "counts": counts.tolist(),
        "max_vio": 999.94,
        "max_vio_floor": 0.12345,
        "max_vio_interval": [0.12345, 0.98765],
        "gini": 0.98765,
        "effective_experts": 1023.96,
        "never_selected": list(range(1000)),
        "least_used": np.argsort(counts).tolist(),
        "no_interval": None,
    }


def test_layers_table_shows_every_figure_of_the_row(stats: dict[str, Any]) -> None:
    lines = printed(terminal.layers_table(stats))
    row = stats["layers"][2]
    shown = cells(lines, row["layer"])
    assert shown[:4] == ["5", str(EXPERTS), "2", "2.00k"]
    assert float(shown[4]) == pytest.approx(row["max_vio"], abs=0.005)
    assert float(shown[5]) == pytest.approx(row["max_vio_floor"], abs=0.0005)
    low, high = map(float, shown[6].split(".."))
    assert [low, high] == pytest.approx(row["max_vio_interval"], abs=0.005)
    assert float(shown[7]) == pytest.approx(row["gini"], abs=0.0005)
    assert float(shown[8]) == pytest.approx(row["effective_experts"], abs=0.05)
    assert shown[9:] == ["1", str(NEVER[1]), "0"]


def test_layers_stand_in_numeric_order(stats: dict[str, Any]) -> None:
    numbers = [line.split()[0] for line in printed(terminal.layers_table(stats))[3:7]]
    assert numbers == ["3", "4", "5", "60"]


def test_the_longest_numbers_fit_80_columns_uncut() -> None:
    rows = [big_row(number) for number in (60, 99_999)]
    lines = printed(terminal.layers_table({"layers": rows, "block": "document"}))
    shown = cells(lines, 99_999)
    assert max(map(len, lines)) <= 80
    assert "".join(lines).isascii()
    assert shown[1:7] == ["1024", "128", "1000M", "1000", "0.123", "0.123..0.988"] or shown[
        3:5
    ] == [
        "1.00G",
        "1000",
    ]
    assert shown[-2] == "1023"


def test_stacks_with_equal_layer_numbers_get_tables_of_their_own() -> None:
    rows = [big_row(0, "text.layers.0.mlp"), big_row(0, "visual.blocks.0.mlp")]
    lines = printed(terminal.layers_table({"layers": rows}))
    assert [line for line in lines if line in ("text.layers", "visual.blocks")] == [
        "text.layers",
        "visual.blocks",
    ]


def test_experts_table_shows_count_total_and_share_as_fraction(trace: Trace) -> None:
    from equipoise.diagnose.stats import layer_rows

    rows = layer_rows(trace, 5)
    lines = printed(terminal.experts_table(rows))
    assert max(map(len, lines)) <= 80
    body = [line.split() for line in lines[3 : 3 + EXPERTS]]
    assert [int(line[0]) for line in body] == [row["expert"] for row in rows]
    for line, row in zip(body, rows, strict=True):
        assert line[2] == f"{row['count']}/{row['total']}"
        assert float(line[1]) == pytest.approx(row["share"], rel=0.01)
        assert float(line[3]) == pytest.approx(row["ratio"], abs=0.005)
        assert line[5] == f"{row['longest_idle']:,}"


def test_by_table_keeps_the_longest_subject_on_one_line(stats: dict[str, Any]) -> None:
    name = "high_school_government_and_politics"
    lines = printed(terminal.by_table({name: stats, "x": stats}, "subject"))
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith(name + " ") for line in lines) == len(stats["layers"])


def test_by_table_says_what_its_intervals_are_over_or_why_there_are_none(
    stats: dict[str, Any],
) -> None:
    def below(**groups: dict[str, Any]) -> str:
        return " ".join(printed(terminal.by_table(groups, "domain")))

    def without(blocks: int) -> dict[str, Any]:
        why = {"max_vio_interval": None, "no_interval": f"only {blocks} windows, 8 are needed"}
        return {**stats, "block": "window", "layers": [{**r, **why} for r in stats["layers"]]}

    rows = [{**row, "blocks": 9 + row["layer"] % 2} for row in stats["layers"]]
    assert "Interval: 95 %, over documents." in below(a=stats)
    assert "over 9 to 10 windows of the record" in below(
        a={**stats, "block": "window", "layers": rows}
    )
    assert below(a=without(2), b=without(2)).endswith("No interval: only 2 windows, 8 are needed.")
    assert below(a=without(1), b=without(2)).endswith(
        "interval, for example: only 1 windows, 8 are needed."
    )
    assert "No interval in 1 of 2 groups: only 2" in below(a=stats, b=without(2))
    assert "--json and --csv have them" in below(a_name_of_twenty_char=stats)


def test_dead_table_names_never_selected_experts_and_counts_the_rest(dead: dict[str, Any]) -> None:
    lines = printed(terminal.dead_table(dead))
    assert lines[0].startswith(f"{4 * EXPERTS} experts: ")
    row = next(line.split() for line in lines if line.split()[:2] == ["5", str(NEVER[1])])
    found = next(r for r in dead["experts"] if (r["layer"], r["expert"]) == (5, NEVER[1]))
    assert row[2:5] == [found["verdict"], "0", "0"]
    assert float(row[5]) == pytest.approx(found["share_upper"], rel=0.05)
    assert row[6:] == ["2,000", "2,000"]


def test_dead_table_can_show_every_expert(dead: dict[str, Any]) -> None:
    lines = printed(terminal.dead_table(dead, every=True))
    assert sum(line.split()[:1] in (["3"], ["4"], ["5"], ["60"]) for line in lines) == 4 * EXPERTS
    assert max(map(len, lines)) <= 80


def test_specialists_say_whom_they_serve() -> None:
    row = {
        "layer": 1,
        "path": "layers.1",
        "expert": 2,
        "verdict": "specialist",
        "count": 9,
        "share": 0.001,
        "share_upper": 0.002,
        "longest_idle": None,
        "current_idle": None,
        "where": [{"by": "subject", "name": "anatomy", "ratio": 1.234}],
    }
    text = "\n".join(printed(terminal.dead_table({"experts": [row]})))
    assert "layer 1 expert 2 serves subject anatomy (ratio 1.23)" in text


def test_diff_table_shows_both_runs_beside_their_floors(trace: Trace) -> None:
    from equipoise.diagnose.diff import diff

    found = diff(trace.select(category="stem"), trace.select(category="other"))
    lines = printed(terminal.diff_table(found))
    assert max(map(len, lines)) <= 80
    shown, row = cells(lines, 60), found["layers"][3]
    assert float(shown[1]) == pytest.approx(row["js_distance"], abs=0.0005)
    assert [float(x) for x in shown[3:5]] == pytest.approx(row["max_vio"], abs=0.005)
    assert shown[9] == str(row["most_changed"])


def test_accuracy_table_ends_with_all_questions(trace: Trace) -> None:
    lines = printed(terminal.accuracy_table(trace.accuracy()))
    assert lines[-1].split()[:4] == ["all", "26", "40", "65.0%"]
    assert "No questions" in printed(terminal.accuracy_table(None))[0]


def test_facts_fold_instead_of_being_cut(trace: Trace) -> None:
    lines = printed(terminal.info_table([("model", "x" * 200), *facts(trace)]))
    assert max(map(len, lines)) <= 80
    assert "".join(lines).count("x") >= 200


def test_control_characters_and_markup_from_outside_stay_text(trace: Trace) -> None:
    text = "\n".join(printed(terminal.info_table([*facts(trace), ("note", "[red]not red[/red]")])))
    assert "\x1b" not in text
    assert "[red]not red[/red]" in text


def test_findings_lead_with_their_severity(trace: Trace) -> None:
    from equipoise.diagnose.findings import findings

    found = findings(trace)
    lines = terminal.findings_lines(found)
    assert [line.plain.split(":")[0] for line in lines] == [f.severity for f in found]
    assert found[0].message in lines[0].plain


def test_dense_and_empty_traces_have_tables_too(dense: Trace, empty: Trace) -> None:
    from equipoise.diagnose.stats import stats

    assert "dense" in printed(terminal.layers_table(stats(dense)))[0]
    assert cells(printed(terminal.layers_table(stats(empty))), 1)[3:6] == ["0", "-", "-"]

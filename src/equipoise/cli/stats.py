"""`equipoise stats`: the load of the experts, layer by layer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from equipoise.cli.common import (
    Category,
    Csv,
    Domain,
    Json,
    Phase,
    Role,
    Subject,
    TracePath,
    console,
    one_of,
    open_selected,
    print_json,
    say_next,
)


def stats(
    path: TracePath,
    layer: Annotated[
        int | None, typer.Option(help="Every expert of this layer.", show_default=False)
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="Split by subject, category, domain, role or phase.", show_default=False),
    ] = None,
    subject: Subject = None,
    category: Category = None,
    domain: Domain = None,
    role: Role = None,
    phase: Phase = None,
    intervals: Annotated[bool, typer.Option(help="95 % bootstrap intervals.")] = True,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """Show how evenly each layer uses its experts, beside what chance alone would give.

    Examples:

      equipoise stats run.trace

      equipoise stats run.trace --layer 7

      equipoise stats run.trace --by category --json
    """
    one_of({"--json": json, "--csv": csv})
    one_of({"--layer": layer is not None, "--by": by is not None})
    trace = open_selected(
        path, subject=subject, category=category, domain=domain, role=role, phase=phase
    )
    from equipoise.diagnose import stats as diagnose
    from equipoise.report import export, terminal

    rows: Any
    if layer is not None:
        experts = diagnose.layer_rows(trace, layer, intervals=intervals)
        rows, table = experts, terminal.experts_table(experts)
        flat = export.to_csv(experts)
    elif by is not None:
        groups = diagnose.stats_by(trace, by, intervals=intervals)
        rows, table = groups, terminal.by_table(groups, by)
        flat = export.by_csv(groups, by)
    else:
        found = diagnose.stats(trace, intervals=intervals)
        rows, table, flat = found, terminal.layers_table(found), export.stats_csv(found)
    if json:
        print_json(rows)
    elif csv:
        print(flat, end="")
    else:
        screen = console()
        screen.print(table)
        if layer is None and by is None and rows["accuracy"]:
            screen.print(terminal.accuracy_line(rows["accuracy"]))
        say_next(["equipoise", "dead", path], ["equipoise", "report", path])

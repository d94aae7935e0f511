"""`equipoise dead`: experts that are never or hardly ever chosen, and how sure that is."""

from __future__ import annotations

from typing import Annotated

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


def dead(
    path: TracePath,
    idle: Annotated[
        int, typer.Option(help="Tokens without a selection after which an expert is idle.", min=1)
    ] = 10_000,
    everything: Annotated[
        bool, typer.Option("--all", help="Print the active experts as well.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 when an expert is dead, for scripts.")
    ] = False,
    subject: Subject = None,
    category: Category = None,
    domain: Domain = None,
    role: Role = None,
    phase: Phase = None,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """List dead, cold, idle and specialised experts; "undetermined" is not dead.

    --json and --csv hold every expert of every layer.
    """
    one_of({"--json": json, "--csv": csv})
    trace = open_selected(
        path, subject=subject, category=category, domain=domain, role=role, phase=phase
    )
    from equipoise.diagnose import dead as diagnose
    from equipoise.report import export, terminal

    rows = diagnose.dead(trace, idle=idle)
    if json:
        print_json(rows)
    elif csv:
        print(export.dead_csv(rows), end="")
    else:
        console().print(terminal.dead_table(rows, every=everything))
        say_next(["equipoise", "report", path])
    if check and any(row["verdict"] == "dead" for row in rows["experts"]):
        raise typer.Exit(1)

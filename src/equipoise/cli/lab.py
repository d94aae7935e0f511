"""`equipoise lab`: run an experiment's grid, and write its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli.common import say
from equipoise.errors import EquipoiseError


def lab(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERIMENT",
            help="Which, one after the other; see --list.",
            show_default=False,
        ),
    ] = None,
    tier: Annotated[str, typer.Option(help="Sizes for a cpu, or for one gpu.")] = "cpu",
    seeds: Annotated[int, typer.Option(help="Seeds of every run, at least.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder of pages, figures and runs.")] = Path(
        "docs/lab"
    ),
    data: Annotated[
        str | None,
        typer.Option(help="Folder of the text, a sub-folder per domain.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Runs at a time; one per core, on a GPU 1.", min=1, show_default=False),
    ] = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Run nothing: the page from the runs there are.")
    ] = False,
    names: Annotated[
        bool, typer.Option("--list", help="List the experiments, and how much is run.")
    ] = False,
) -> None:
    """Run what is missing of experiments, and write their pages with tables and figures.

    Stopped, it goes on where it was: finished runs are kept in the out folder, and are shared by
    experiments.
    """
    if redraw and not experiments:
        raise EquipoiseError("--redraw which? Name experiments; --list lists them.")
    if names or not experiments:
        from equipoise.lab.pages import overview

        for line in overview(out, tier=tier, seeds=seeds, data=data):
            print(line)
        return
    from equipoise.lab.pages import check, run_experiment

    for experiment in experiments:
        check(experiment, tier=tier, seeds=seeds, workers=workers, data=data, redraw=redraw)
    for experiment in experiments:
        page = run_experiment(
            experiment,
            out,
            tier=tier,
            seeds=seeds,
            workers=workers,
            redraw=redraw,
            data=data,
            say=say,
        )
        say(f"Wrote {page} and its figures. Runs are in {out / 'runs'}.")

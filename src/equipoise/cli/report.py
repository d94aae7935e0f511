"""`equipoise report`: a trace as one HTML file, and as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli.common import TracePath, open_selected, say, size_of


def report(
    path: TracePath,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path(
        "report.html"
    ),
    figures: Annotated[
        Path | None,
        typer.Option(help="Write the main figures here as PNG and SVG.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write the report: one file that works without a network."""
    from equipoise.errors import EquipoiseError

    if output.exists() and not force:
        raise EquipoiseError(f"{output} exists. Use --force to overwrite it, or another -o.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise EquipoiseError(f"{output} cannot be written: give the name of a file in a folder.")
    trace = open_selected(path)
    from equipoise.report.html import write_html

    if figures is not None:
        from equipoise.report.figures import write_figures

        written = write_figures(trace, figures)
        for figure in written:
            say(f"Wrote {figure} ({size_of(figure)})")
        if not written:
            say("No figures: this trace has neither layers nor answers.")
    write_html(trace, output)
    say(f"Wrote {output} ({size_of(output)}). Open it in a browser.")

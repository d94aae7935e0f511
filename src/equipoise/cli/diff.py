"""`equipoise diff`: two traces side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli.common import Json, console, open_selected, print_json


def diff(
    a: Annotated[Path, typer.Argument(help="Folder of a trace.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Folder of another.", show_default=False)],
    json: Json = False,
) -> None:
    """Compare the load, the least-used experts and the accuracy of two runs.

    The models may differ but must have the same MoE layers; a dense model compares by accuracy and
    speed only.
    """
    first, second = open_selected(a), open_selected(b)
    from equipoise.diagnose.diff import diff as compare
    from equipoise.report.terminal import diff_table

    rows = compare(first, second)
    if json:
        print_json(rows)
    else:
        console().print(diff_table(rows))

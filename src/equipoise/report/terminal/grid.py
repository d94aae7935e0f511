"""The look of all tables: plain ASCII columns under a rule, within 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import Box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from equipoise.report import words

Row = Mapping[str, Any]

_BOX = Box("    \n    \n -  \n    \n    \n -  \n    \n    \n", ascii=True)

STYLES = {"alarm": "bold magenta", "notice": "yellow"}
"""Of verdicts, by how much they ask for attention."""


def grid(columns: Sequence[str], *, left: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table with these columns: numbers right and never wrapped, `left` ones folded."""
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


def add(table: Table, *cells: str | Text) -> None:
    """A row of plain text: square brackets are not rich's markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def legend(text: str) -> RenderableType:
    """An empty line and the words that explain a table."""
    return Group(Text(), Text(text, style="dim"))

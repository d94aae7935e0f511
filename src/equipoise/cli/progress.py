"""How far a long command is: a bar on a terminal, a line now and then off it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from equipoise.cli.common import say

Update = Callable[[int, int, str, float], None]
"""Takes what is done, of how many, a note, and the seconds left."""
EVERY = 10.0
"""Seconds between lines."""


@contextmanager
def progress(what: str, *, quiet: bool, bar_width: int = 40) -> Iterator[Update | None]:
    """Progress on standard error, counted in `what`; None where it is to be quiet."""
    if quiet:
        yield None
        return
    from rich.console import Console

    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield _lines(what)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(what),
        BarColumn(bar_width),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=terminal) as bar:
        job = bar.add_task(what, total=None, note="")

        def update(done: int, total: int, note: str, left: float) -> None:
            bar.update(job, completed=done, total=total, note=note)

        yield update


def _lines(what: str) -> Update:
    """Progress for a log file: a line at most every ten seconds, and one at the end."""
    last = [time.monotonic()]

    def update(done: int, total: int, note: str, left: float) -> None:
        if time.monotonic() - last[0] < EVERY and done < total:
            return
        last[0] = time.monotonic()
        say(f"{done:,} of {total:,} {what}, {note}, {left:,.0f} s left")

    return update

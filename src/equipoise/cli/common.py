"""What the commands share: arguments, opening and selecting a trace, output."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from equipoise.trace import Trace

TracePath = Annotated[Path, typer.Argument(help="Folder of a trace.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Subject = Annotated[
    str | None, typer.Option(help="Only these subjects (comma between).", show_default=False)
]
Category = Annotated[
    str | None, typer.Option(help="Only these categories (comma between).", show_default=False)
]
Domain = Annotated[
    str | None, typer.Option(help="Only these domains (comma between).", show_default=False)
]
Role = Annotated[
    str | None,
    typer.Option(
        help="Only these roles: description, few-shot, question, choices, answer, text, none.",
        show_default=False,
    ),
]
Phase = Annotated[
    str | None, typer.Option(help="Only this phase: prefill or decode.", show_default=False)
]


def open_selected(path: Path, **wanted: str | None) -> Trace:
    """Open a trace and select by comma-separated subject, category, domain, role, phase."""
    from equipoise.trace import open_trace

    trace = open_trace(path)
    if trace.meta["status"] == "partial":
        say(f"note: {path} is partial: its run was stopped, or is still going on.")
    chosen = {k: [x.strip() for x in v.split(",") if x.strip()] for k, v in wanted.items() if v}
    return trace.select(**chosen) if chosen else trace  # type: ignore[arg-type]


def console() -> Console:
    """The terminal for results; off a terminal without colour, and nothing is cut."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


def say(text: str) -> None:
    """Talk, on standard error; standard output is for results."""
    print(text, file=sys.stderr)


WIDTH = 80
"""Of a line of talk that is meant to be copied."""


def say_next(*commands: Sequence[object], after: str = "") -> None:
    """Say which commands may come next, their words quoted for the shell, `after` what was done.

    One line if it is not longer than WIDTH, else a line for each command.
    """
    quoted = [shlex.join(map(str, command)) for command in commands]
    line = f"{after} Next: {', or '.join(quoted)}".strip()
    if len(line) <= WIDTH:
        say(line)
        return
    if after:
        say(after)
    for lead, command in zip(["Next: ", *["  or: "] * len(quoted)], quoted, strict=False):
        say(lead + command)


def print_json(value: Any) -> None:
    """Strict JSON on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def one_of(options: dict[str, bool]) -> None:
    """Raise EquipoiseError when more than one of these flags is set."""
    from equipoise.errors import EquipoiseError

    chosen = [name for name, on in options.items() if on]
    if len(chosen) > 1:
        raise EquipoiseError(f"{' and '.join(chosen)} exclude each other: choose one.")


def size_of(path: Path) -> str:
    """Size of a file or folder, for people."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"

"""The command `equipoise`: one small file per command, which parses, calls and prints.

Exit codes: 0 fine, 1 findings (only where a command checks), 2 usage or unreadable input,
130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from equipoise.cli.dead import dead
from equipoise.cli.diff import diff
from equipoise.cli.info import info
from equipoise.cli.lab import lab
from equipoise.cli.report import report
from equipoise.cli.stats import stats
from equipoise.cli.trace import trace
from equipoise.cli.train import train
from equipoise.errors import EquipoiseError, nearest


class _Commands(TyperGroup):
    """Commands in the order of a user's work; an unknown one names the nearest."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.commands:
            allowed = ", ".join(self.commands)
            raise EquipoiseError(
                f"No command {name!r}: there are {allowed}." + nearest(name, self.commands)
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    name="equipoise",
    help="Record which experts of a Mixture-of-Experts model carry the load, read the record, and train "
    "small models to see what balancing does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (trace, info, stats, dead, diff, report, train, lab):
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from equipoise import __version__

        print(f"equipoise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


_USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""The parser's own errors: typer carries its own copy of click, and shows them only so."""


def main() -> None:
    """Run the command line; errors that a user can mend are one line."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        code = app(standalone_mode=False)
    except EquipoiseError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # the parser takes it for Ctrl-D
            _fail("a file ends too early (run again with --debug for the traceback)", 2)
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe left, which is its right
        sys.exit(0)
    except Exception as error:
        if isinstance(error, _USAGE):
            said = " ".join(error.format_message().split())
            if not said:
                sys.exit(2)  # no arguments: help was printed
            _fail(said.rstrip(".") + ". Try --help.", 2)
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"equipoise: {message}", file=sys.stderr)
    sys.exit(code)

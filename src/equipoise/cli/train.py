"""`equipoise train`: train a small language model by a recipe."""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.cli.common import console, print_json, say, say_next, size_of
from equipoise.cli.loggers import loggers
from equipoise.cli.progress import progress
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.lab.config import Config
    from equipoise.lab.evaluate import Evaluation


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Which one; see --list.", show_default=False)
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change a setting, key=value, as often as wanted; --show lists them."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; runs/RECIPE if left out.", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Throw away the run in that folder.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Share every step out over so many processes on this machine.", show_default=False
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write OUT/tensorboard too.")
    ] = False,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Log to W&B; offline unless WANDB_MODE says otherwise.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print all settings, and train nothing.")
    ] = False,
    names: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Train a small Mixture-of-Experts model, its load beside its loss; a stopped run goes on.

    Examples:

      equipoise train tiny

      equipoise train small --set balance="switch(weight=0.01)" --out runs/switch

      equipoise train small --set model.router=sigmoid --set data.source=texts/ --show

      equipoise train small --processes 2
    """
    if names:
        _list()
        return
    if processes is not None:
        values = [*(values or []), f"processes={processes}"]
    if show:
        _show(recipe, values or [])
        return
    from equipoise.lab.launch import launch, leave

    if "WORLD_SIZE" not in os.environ and (count := _config(recipe, values or []).processes) > 1:
        launch([sys.executable, "-m", "equipoise", *sys.argv[1:]], count)
        return
    try:
        _train(recipe, values or [], out, force, tensorboard, wandb, quiet or not _first(), json)
    except EquipoiseError as error:
        _tell_launcher(str(error))
        if _first():
            raise
        time.sleep(SECONDS_TO_TELL)  # the launcher stops all as soon as one has ended
        leave(2)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave()


def _tell_launcher(message: str) -> None:
    """Under torchrun: let its long report of failed processes end with the message.

    The file and its form are those of torch.distributed.elastic's error handler, whose own report
    would be the traceback.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        said = {"message": f"equipoise: {message}", "extraInfo": {"timestamp": int(time.time())}}
        Path(file).write_text(dumps({"message": said}), encoding="utf-8")


SECONDS_TO_TELL = 5
"""Of an error that all processes have, for the first one to say it."""


def _first() -> bool:
    """Of several processes the first one talks."""
    return os.environ.get("RANK", "0") == "0"


def _list() -> None:
    from equipoise.lab.recipes import RECIPES

    for name, made in RECIPES.items():
        told = (made.__doc__ or "").partition("\n")[0]
        print(textwrap.fill(told, 79, initial_indent=f"{name:16} ", subsequent_indent=" " * 17))


def _show(recipe: str | None, values: list[str]) -> None:
    from dataclasses import asdict

    from equipoise.lab.config import flat

    for key, value in flat(asdict(_config(recipe, values))):
        print(f"{key}={_as_set(value)}")


def _as_set(value: Any) -> str:
    """A value as --set takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _config(recipe: str | None, values: list[str]) -> Config:
    from equipoise.lab import recipes

    if recipe is None:
        raise EquipoiseError(f"Which recipe? There are {', '.join(recipes.RECIPES)}; try --list.")
    return recipes.recipe(recipe, _settings(values))


def _train(
    recipe: str | None,
    values: list[str],
    out: Path | None,
    force: bool,
    tensorboard: bool,
    wandb: bool,
    quiet: bool,
    json: bool,
) -> None:
    config = _config(recipe, values)
    path = out or Path("runs") / str(recipe)
    logging_to = loggers(path, config, tensorboard=tensorboard, wandb=wandb, first=_first())
    tell: Callable[[str], None] = say if _first() else _silent
    from equipoise.lab.folder import RunFolder
    from equipoise.lab.trainer import train

    count = int(os.environ.get("WORLD_SIZE", "1"))
    on = f" on {count} processes" if count > 1 else ""
    tell(f"Training {config.name}{on}: {config.steps:,} steps of {config.step_tokens:,} tokens.")
    if count == 1 and not (path / "config.json").exists() and (hint := _idle_cores(config)):
        tell(hint)
    with _stopped(path, tell), ExitStack() as stack:
        sinks = [stack.enter_context(logger) for logger in logging_to]
        update = stack.enter_context(progress("steps", quiet=quiet, bar_width=5))

        def show(now: Any) -> None:
            assert update is not None
            update(now.step, now.steps, _note(now), now.seconds_left)

        new = force or not RunFolder(path).finished
        shown = None if update is None else show
        result = train(config, path, force=force, sinks=sinks, progress=shown, say=tell)
    if _first():
        _report(path, result, json, new=new)


def _idle_cores(config: Config) -> str:
    """How one process on a CPU could share its steps with the cores that it leaves idle, if it can."""
    import torch

    from equipoise.lab.launch import cores

    most = cores() // config.threads
    parts = config.batch_rows // config.micro_rows
    count = max((n for n in range(1, most + 1) if parts % n == 0), default=1)
    if torch.cuda.is_available() or count == 1:
        return ""
    return (
        f"Cores in use: {config.threads} of {cores()}. --processes {count} shares each step out over "
        f"{config.threads * count}."
    )


def _settings(values: list[str]) -> dict[str, str]:
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key.strip():
            raise EquipoiseError(f"--set {value!r}: write key=value, such as tokens=1000000.")
        found[key.strip()] = text.strip()
    return found


def _silent(text: str) -> None:
    pass


def _note(now: Any) -> str:
    load = f" MaxVio {now.max_vio:.2f} (chance {now.floor:.2f})"
    return (
        f"loss {now.loss:.3f}{'' if math.isnan(now.max_vio) else load} "
        f"{now.tokens_per_second:,.0f} tok/s"
    )


@contextmanager
def _stopped(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Say what is left of a run that is stopped; take leave of the other processes."""
    try:
        yield
    except KeyboardInterrupt:
        kept = any(path.glob("checkpoint-*.pt"))
        tell(
            f"\nStopped. {path} holds a checkpoint: the same command goes on from it."
            if kept
            else f"\nStopped before the first checkpoint of {path}: it will begin anew."
        )
        raise
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# -- the end ----------------------------------------------------------------------------------


def _report(path: Path, result: Mapping[str, Any], json: bool, *, new: bool) -> None:
    from equipoise.lab.evaluate import Evaluation
    from equipoise.lab.folder import RunFolder, without_nan

    last = RunFolder(path).read("evaluations.json")[-1]
    if json:
        print_json(without_nan({**result, "evaluation": last}))
    else:
        _table(result, Evaluation.from_dict(last))
    saved = result["saved"] or {}
    model = f", model for transformers ({saved['architecture']})" if saved.get("model") else ""
    say(f"{'Wrote' if new else 'There is'} {path} ({size_of(path)}): metrics.parquet{model}.")
    following: list[list[object]] = []
    if (path / "trace").exists():
        following.append(["equipoise", "stats", path / "trace"])
    if model:
        task = ["--task", "text", "--data", "TEXT"]
        following.append(["equipoise", "trace", path / "model", *task])
    if following:
        say_next(*following)
    else:
        say(f"Next: equipoise.lab.load({str(path)!r})")


def _table(result: Mapping[str, Any], last: Evaluation) -> None:
    from rich.table import Table

    table = Table("domain", box=None, title="Held-out text", title_justify="left")
    for column in ("tokens", "loss, nats", "bits per byte"):
        table.add_column(column, justify="right")
    columns = zip(last.domains, last.tokens, last.losses, last.bits_per_byte, strict=True)
    for domain, tokens, loss, bits in columns:
        table.add_row(domain, f"{tokens:,}", f"{loss:.3f}", f"{bits:.3f}")
    screen = console()
    screen.print(table)
    each = result["experts_per_token"]
    chosen = "" if math.isnan(each) else f", {each:.2f} experts a token"
    load = f", MaxVio {result['max_vio']:.3f} (chance alone {result['max_vio_floor']:.3f})"
    screen.print(
        f"Mean loss {result['loss']:.3f}{'' if math.isnan(result['max_vio']) else load}.\n"
        f"Trained on {result['tokens']:,} tokens in {result['seconds']:,.0f} s; "
        f"{result['parameters']['total']:,} parameters, {result['parameters']['active']:,} active{chosen}."
    )

"""Sinks of `equipoise train`: TensorBoard and W&B, made at the first step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.cli.common import say
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.lab.config import Config


def loggers(
    path: Path, config: Config, *, tensorboard: bool, wandb: bool, first: bool
) -> list[Any]:
    """Context managers of the sinks that were asked for; EquipoiseError where a package is missing."""
    from importlib.util import find_spec

    wanted = {"tensorboard": tensorboard, "wandb": wandb}
    for package, on in wanted.items():
        if on and find_spec(package) is None:
            raise EquipoiseError(f"--{package} needs: pip install 'equipoise[{package}]'.")
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [_late(makers[kind], path, config) for kind, on in wanted.items() if on and first]


@contextmanager
def _late(
    make: Callable[[Path, Config], tuple[Any, Callable[[], None]]], path: Path, config: Config
) -> Iterator[Any]:
    """A sink that is made at the first step: before it, the folder has to be the run's alone."""
    made: list[Any] = []

    def sink(metrics: Mapping[str, float], step: int) -> None:
        if not made:
            made.append(make(path, config))
        made[0][0](metrics, step)

    try:
        yield sink
    finally:
        if made:
            made[0][1]()


def _tensorboard(path: Path, config: Config) -> tuple[Any, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    from equipoise.balance import sinks

    writer = SummaryWriter(str(path / "tensorboard"))
    return sinks.tensorboard(writer), writer.close


def _wandb(path: Path, config: Config) -> tuple[Any, Callable[[], None]]:
    import wandb

    from equipoise.balance import sinks
    from equipoise.lab.config import flat

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    number, again = _wandb_id(path / "wandb" / "run-id.txt")
    if mode in ("offline", "dryrun"):
        # Offline runs cannot be resumed, and of two with one id the later upload may replace the
        # earlier: each stretch of training gets a run, and all of them one group.
        more: dict[str, Any] = {"group": f"{config.name}-{number}"}
        if again:
            say(f"W&B is offline: these steps are a run of their own, of group {more['group']}.")
    else:
        more = {"id": number, "resume": "allow"}
    settings = dict(flat(asdict(config)))
    run = wandb.init(
        project="equipoise", name=config.name, dir=str(path), mode=mode, config=settings, **more
    )
    return sinks.wandb(run), run.finish


def _wandb_id(file: Path) -> tuple[str, bool]:
    """The id that a run folder goes by at W&B, and whether it had one already."""
    if file.exists():
        return file.read_text(encoding="utf-8").strip(), True
    file.parent.mkdir(parents=True, exist_ok=True)
    number = secrets.token_hex(4)
    file.write_text(number + "\n", encoding="utf-8")
    return number, False

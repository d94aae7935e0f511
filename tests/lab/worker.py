"""One of two processes that `test_processes` starts with torchrun: all its runs, one after the other."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from equipoise.errors import EquipoiseError
from equipoise.lab import Config, train
from tests.torchrun import leave


def interrupted(now: Any) -> None:
    """Ctrl-C that reaches the first process alone."""
    if now.step == 3:
        signal.raise_signal(signal.SIGINT)


def left(config: Config, out: Path) -> list[str]:
    """Run until step 3; the checkpoints that there are then."""
    try:
        train(config, out, progress=interrupted)
    except KeyboardInterrupt:
        return sorted(path.name for path in out.glob("checkpoint*"))
    return []


def stopped(config: Config, out: Path) -> list[str]:
    """Run until step 3, then on to the end."""
    kept = left(config, out)
    dist.barrier()
    train(config, out)
    return kept


def refused(config: Config, out: Path, **options: Any) -> str:
    """What a run that cannot be is told."""
    try:
        train(config, out, **options)
    except EquipoiseError as error:
        return str(error)
    return "was not refused"


def poisoned(config: Config, out: Path) -> str:
    """NaN in a weight of the second process alone."""
    from equipoise.lab import trainer

    taken = trainer.Run.advance

    def step(run: Any) -> None:
        if run.step == 2 and run.processes.rank == 1:
            run.plain.blocks[1].mlp.gate.weight.data.fill_(float("nan"))
        taken(run)

    trainer.Run.advance = step  # type: ignore[method-assign]
    try:
        return refused(config, out)
    finally:
        trainer.Run.advance = taken  # type: ignore[method-assign]


def no_room(config: Config, out: Path) -> str:
    """A disk that is full for the second process alone."""
    import errno

    import torch

    saved = torch.save

    def save(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        if dist.is_initialized() and dist.get_rank() == 1:
            torch.save = save  # type: ignore[assignment]
        return refused(config, out)
    finally:
        torch.save = saved


def poisoned_without_room(config: Config, out: Path) -> str:
    """NaN as before, and no room for the metrics that the first process writes of it."""
    import errno

    import pyarrow.parquet as pq

    written = pq.write_table

    def write(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pq.write_table = write
    try:
        return poisoned(config, out)
    finally:
        pq.write_table = written


WAYS = {
    "train": lambda config, out: train(config, out)["parameters"],
    "left": left,
    "stopped": stopped,
    "refused": refused,
    "poisoned": poisoned,
    "poisoned_without_room": poisoned_without_room,
    "no_room": no_room,
}


def main() -> None:
    """Run the cases of the file that is named, and write what each came to, by rank."""
    file = Path(sys.argv[1])
    found = {}
    for name, way, text in json.loads(file.read_text()):
        found[name] = WAYS[way](Config.from_json(text), file.parent / name)
    (file.parent / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()

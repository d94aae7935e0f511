"""Train one config into a run folder; stopped and run again, it goes on as if never stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config
from equipoise.lab.corpus import Corpus, load_corpus
from equipoise.lab.folder import RunFolder
from equipoise.lab.journal import Progress, Sink
from equipoise.lab.processes import Processes
from equipoise.lab.run import Run

__all__ = ["Progress", "Run", "Sink", "train"]


def train(
    config: Config,
    out: str | Path,
    *,
    force: bool = False,
    save: bool = True,
    sinks: Sequence[Sink] = (),
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train `config` in folder `out`, or go on with it there; returns what `result.json` holds.

    force: throw away what is in the folder. save: keep weights and trace, not only the figures.
    sinks: each takes the metrics of every step, as those of `equipoise.balance.sinks` do.
    progress: called after every step. say: for messages.
    Raises EquipoiseError for a folder of another config or text, or that another process is training
    in (HeldError), for a loss that is not finite (weights and the last checkpoint stay), and where
    the disk is full.
    """
    if not isinstance(config, Config):
        raise EquipoiseError(
            f"train() takes a Config, not {config!r}; equipoise.lab.recipe(name) gives one."
        )
    folder = RunFolder(out)
    processes = Processes(config)
    run = Run(config, folder, processes, sinks=sinks, progress=progress, say=say)
    lock = None
    try:
        with processes.together():
            if processes.first:
                folder.check(config, force=force)  # before text is read, which takes longer
        corpus = _corpus(config, processes, say)
        with processes.together():
            if processes.first:
                lock = folder.hold()
                folder.begin(config, corpus.digest, terms=run.terms, force=force)
        if folder.finished:
            run.say(f"{folder.path} is finished: nothing to do.")
            return folder.result()
        run.begin(corpus)
        run.train()
        return run.finish(save)
    finally:
        run.close()
        if lock is not None:
            lock.release()


def _corpus(config: Config, processes: Processes, say: Callable[[str], None]) -> Corpus:
    """Made by one process, read by all."""
    with processes.together():
        if processes.first:
            load_corpus(config.data, say)
    return load_corpus(config.data)

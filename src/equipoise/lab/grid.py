"""Run many configs, several at a time, each in a folder of its own; stopped, it goes on."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config, DataConfig
from equipoise.lab.corpus import digest_of
from equipoise.lab.folder import RunFolder
from equipoise.lab.launch import meetings
from equipoise.lab.model import LanguageModel
from equipoise.lab.results import Result, folder_of
from equipoise.lab.spelt import spelt
from equipoise.lab.terms import RECOMMENDED, balancing

Say = Callable[[str], None]
EVERY = 20.0
"""Seconds between lines of progress."""
LOOK = 1.0
"""Seconds between looks for processes that have ended."""
TO_SAVE = 60.0
"""Seconds that the other processes of a stopped run have to end by themselves."""


@dataclass
class _Job:
    """A run under way."""

    config: Config
    process: Any
    said: Any = None
    """Its last `Progress`."""
    first: int | None = None
    """Steps that it had made before."""
    gone: bool = False
    """Its process has ended, and no news of it has come."""


@dataclass
class Grid:
    """The runs of an experiment that are not finished, and those that run now."""

    configs: Sequence[Config]
    pool: Path
    workers: int
    say: Say = lambda _: None
    failures: list[str] = field(default_factory=list)
    begun: list[Any] = field(default_factory=list)
    """Processes, for an interruption between the start of one and the note of it."""

    def run(self) -> None:
        """Run all that is not finished; EquipoiseError, after the others, where some failed.

        Ctrl-C and SIGTERM stop it (KeyboardInterrupt) when its runs have saved.
        """
        with interrupted_by(signal.SIGTERM):
            self._run()

    def _run(self) -> None:
        waiting = missing(self.configs, self.pool)
        self.say(f"{len(self.configs)} runs, {len(self.configs) - len(waiting)} finished before.")
        for config in self.configs:
            if (result := Result.find(self.pool, config)) is not None:
                result.check_config()
        check_text(self.configs, self.pool)
        check_terms(self.configs, self.pool)
        if waiting:
            self._prepare(waiting)
        context = mp.get_context("spawn")
        news = context.Queue()
        jobs: dict[int, _Job] = {}
        begin = told = looked = time.monotonic()
        total, number = len(waiting), 0
        try:
            while waiting or jobs:
                while waiting and self._room(jobs, waiting[0]):
                    number += 1
                    jobs[number] = self._start(context, number, waiting.pop(0), news)
                self._listen(news, jobs)
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    self._bury(jobs)
                if time.monotonic() - told > EVERY:
                    told = time.monotonic()
                    self._report(jobs, total - len(waiting) - len(jobs), total, begin)
        finally:
            _end([process for process in self.begun if process.pid is not None])
        if self.failures:
            raise EquipoiseError(
                f"{len(self.failures)} of {total} runs failed; the first, {self.failures[0]}"
            )

    def _prepare(self, waiting: Sequence[Config]) -> None:
        """Make each corpus once, before several processes ask for it."""
        from equipoise.lab.corpus import load_corpus

        for data in dict.fromkeys(config.data for config in waiting):
            load_corpus(data, self.say)

    def _room(self, jobs: dict[int, _Job], config: Config) -> bool:
        """For another run: one of several processes takes the place of as many, or of all."""
        taken = sum(job.config.processes for job in jobs.values())
        return not jobs or taken + config.processes <= self.workers

    def _start(self, context: Any, number: int, config: Config, news: Any) -> _Job:
        folder = folder_of(self.pool, config)
        process = context.Process(
            target=work, args=(number, config.to_json(), str(folder), news), daemon=False
        )
        self.begun.append(process)
        # Processes keep ignoring what was ignored when they began: a run is deaf to Ctrl-C while it
        # imports torch, too. It saves on the grid's SIGTERM.
        with _handled(signal.SIGINT, signal.SIG_IGN):
            process.start()
        self.say(f"  {_name(config)}: begins ({config.steps} steps, {folder.name})")
        return _Job(config, process)

    def _listen(self, news: Any, jobs: dict[int, _Job]) -> None:
        try:
            number, kind, value = news.get(timeout=LOOK)
        except queue.Empty:
            return
        job = jobs.get(number)
        if job is None:
            return
        if kind == "progress":
            job.said = value
            job.first = value.step - 1 if job.first is None else job.first
            return
        job.process.join()
        del jobs[number]
        if kind == "failed":
            self._failed(job, value)
        else:
            self.say(
                f"  {_name(job.config)}: loss {value['loss']:.3f}, MaxVio {value['max_vio']:.2f}, "
                f"{value['tokens'] / value['seconds']:,.0f} tokens/s"
            )

    def _failed(self, job: _Job, why: str) -> None:
        self.failures.append(f"{_name(job.config)}: {why}")
        self.say(f"  {_name(job.config)}: FAILED: {why}")

    def _bury(self, jobs: dict[int, _Job]) -> None:
        """Take note of processes that ended without a word: killed, or out of memory."""
        for number, job in list(jobs.items()):
            if job.gone:
                del jobs[number]
                self._failed(job, f"ended with {job.process.exitcode}")
            # What it said last may still be on its way: buried if it has not come by the next look.
            job.gone = not job.process.is_alive()

    def _report(self, jobs: dict[int, _Job], done: int, total: int, begin: float) -> None:
        parts = []
        made, under_way = float(done), 0.0
        for job in jobs.values():
            p = job.said
            if p is not None and job.first is not None:
                made += (p.step - job.first) / p.steps
                under_way += p.step / p.steps
                parts.append(
                    f"{_name(job.config)} {p.step}/{p.steps} loss {p.loss:.2f} "
                    f"MaxVio {p.max_vio:.2f} (chance {p.floor:.2f}) {p.tokens_per_second:,.0f} tok/s"
                )
        spent = time.monotonic() - begin
        missing = total - done - under_way
        left = f", about {spent * missing / made / 60:.0f} min left" if made > 0.02 * total else ""
        self.say(f"{done} of {total} done{left} | " + " | ".join(parts))


def _end(processes: Sequence[Any]) -> None:
    """Let all save and stop; asked again, at once."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.join()
        raise


def missing(configs: Sequence[Config], pool: Path) -> list[Config]:
    """Configs without a finished run; equal ones once."""
    found: dict[Path, Config] = {}
    for config in configs:
        if Result.find(pool, config) is None:
            found.setdefault(folder_of(pool, config), config)
    return list(found.values())


@contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """A signal's handler inside; off the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def interrupted_by(number: signal.Signals) -> AbstractContextManager[None]:
    """Inside, a signal does what Ctrl-C does."""
    return _handled(number, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def check_text(configs: Sequence[Config], pool: Path) -> None:
    """Raise EquipoiseError for finished runs of another text than is there now."""
    digests: dict[DataConfig, str] = {}
    other = []
    for config in configs:
        data, result = config.data, Result.find(pool, config)
        if result is None or _not_here(data.source, result.source):
            continue
        if data not in digests:
            digests[data] = digest_of(data)
        if result.environment["tokens"] != digests[data]:
            other.append(result.path)
    if other:
        raise EquipoiseError(
            f"{len(other)} finished runs in {pool}, such as {other[0].name}, are of another text than "
            f"{configs[0].data.source} holds: give the text that they are of with --data, or choose "
            "another folder with --out."
        )


def check_terms(configs: Sequence[Config], pool: Path) -> None:
    """Raise EquipoiseError for runs begun where their setting of balance stood for other terms than today."""
    for config in configs:
        folder = RunFolder(folder_of(pool, config))
        if not folder.path.exists():
            continue
        asked = config.balance.strip() == RECOMMENDED
        model = LanguageModel(config.model, config.data.vocab_size) if asked else None
        if other := folder.other_terms(spelt(balancing(config.balance, model))):
            raise EquipoiseError(
                f"{folder.path} is of {_name(config)}, begun where balance={config.balance} stood for "
                f"something else ({other}): remove it, and it will be run again."
            )


def _not_here(source: str, before: str) -> bool:
    """Whether a text is on another machine: no path of this one, and no other data set's name."""
    if Path(source).expanduser().exists():
        return False
    return source == before or source.startswith(("/", ".", "~"))


def _name(config: Config) -> str:
    return config.name if config.seed == 0 else f"{config.name}, seed {config.seed}"


def work(number: int, text: str, folder: str, news: Any) -> None:
    """One run, in a process of its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the grid, which asks its runs once to save and stop
    from equipoise.lab.trainer import train

    config = Config.from_json(text)
    last, grid = [0.0], mp.parent_process()
    assert grid is not None

    def orphaned() -> bool:
        return os.getppid() != grid.pid

    def progress(now: Any) -> None:
        if orphaned():
            signal.raise_signal(signal.SIGTERM)  # the grid was killed: save, and stop
        if time.monotonic() - last[0] > EVERY / 4 or now.step == now.steps:
            last[0] = time.monotonic()
            news.put((number, "progress", now))

    if orphaned():
        return
    others = _others(text, folder, config.processes)
    wait = 0.0  # one that waits for this process in a collective hears no signal
    try:
        result = train(config, folder, save=False, progress=progress)
        wait = TO_SAVE
        news.put((number, "done", result))
    except KeyboardInterrupt:
        wait = TO_SAVE
        news.put((number, "failed", "stopped; the same command goes on with it"))
    except (EquipoiseError, RuntimeError, ValueError, OSError) as error:
        news.put((number, "failed", f"{type(error).__name__}: {error}"))
    finally:
        for other in others:
            other.join(wait)
            other.kill()


def _others(text: str, folder: str, processes: int) -> list[Any]:
    """The other processes of a run, begun; this one is the first. They go with it."""
    if processes == 1:
        return []
    context, places = mp.get_context("spawn"), meetings(processes)
    os.environ.update(places[0])
    begun = [
        context.Process(target=_member, args=(text, folder, p), daemon=True) for p in places[1:]
    ]
    for process in begun:
        process.start()
    return begun


def _end_with(process: Any) -> None:
    """End this process when another does, whatever it waits for."""
    process.join()
    os._exit(1)


def _member(text: str, folder: str, place: dict[str, str]) -> None:
    """One of the other processes of a run; what goes wrong the first one says."""
    os.environ.update(place)
    from equipoise.lab.trainer import train

    first = mp.parent_process()
    assert first is not None
    threading.Thread(target=_end_with, args=(first,), daemon=True).start()
    with suppress(EquipoiseError, RuntimeError, ValueError, OSError, KeyboardInterrupt):
        train(Config.from_json(text), folder, save=False)

"""Steps of expert parallelism under imposed loads, timed in two processes; memory and bytes sent.

Profiles take turns within each round, in an order drawn for the round, so that what else the machine
does falls on all of them.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config
from equipoise.lab.cost.imposed import impose
from equipoise.lab.cost.points import DEVICES, Points, Sizes
from equipoise.lab.model import LanguageModel
from equipoise.lab.optim import make_optimizer
from equipoise.lab.processes import Processes

Say = Callable[[str], None]
WARM, TIMED = 1, 3
"""Steps of a profile's turn that are not timed, and that are."""
PEAKS = 3
"""Steps whose memory is watched: messages are let go of sooner or later."""


@dataclass(frozen=True)
class Task:
    """What the processes are to measure."""

    meeting: str
    """File by which they find each other."""
    device: str
    config: str
    profiles: Mapping[str, Sequence[float]]
    sizes: bool
    rounds: range


def measure(points: Points, path: Path, rounds: int, say: Say = lambda _: None) -> None:
    """Measure what is missing of the sizes and of so many rounds, written to `path` one by one.

    Raises EquipoiseError where a process fails.
    """
    if len(points.rounds) >= rounds:
        say(f"{path} has its {rounds} rounds: nothing to do.")
        return
    if hasattr(os, "getloadavg"):
        points.load_averages.append(round(os.getloadavg()[0], 2))
    context = mp.get_context("spawn")
    news = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            str(Path(folder) / "meeting"),
            points.device,
            points.settings.to_json(),
            points.profiles,
            sizes=not points.sizes,
            rounds=range(len(points.rounds), rounds),
        )
        workers = [
            context.Process(target=work, args=(rank, task, news), daemon=True)
            for rank in range(DEVICES)
        ]
        for worker in workers:
            worker.start()
        try:
            while (told := _next(news, workers)) is not None:
                _note(points, told, rounds, say)
                points.write(path)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()


def _next(news: Any, workers: Sequence[Any]) -> tuple[str, Any] | None:
    """What the first process says next; None at its end."""
    while True:
        alive = [worker.exitcode is None for worker in workers]
        try:
            kind, value = news.get(timeout=1.0)
        except queue.Empty:
            if not all(alive):
                codes = [worker.exitcode for worker in workers]
                raise EquipoiseError(
                    f"a process of the measurement ended early (exit codes {codes}): killed, or out "
                    "of memory. Rounds so far are kept; run the same command again."
                ) from None
            continue
        if kind == "failed":
            raise EquipoiseError(f"a process of the measurement failed: {value}")
        return None if kind == "done" else (kind, value)


def _note(points: Points, told: tuple[str, Any], rounds: int, say: Say) -> None:
    kind, value = told
    if kind == "sizes":
        points.sizes = {name: Sizes(**size) for name, size in value.items()}
        say(f"Memory and bytes of {len(value)} profiles are measured.")
        return
    points.rounds.append(value)
    steps = [step[0] for turn in value.values() for step in turn]
    spent = sum(steps) * (WARM + TIMED) / TIMED
    left = (rounds - len(points.rounds)) * spent
    say(
        f"{len(points.rounds)} of {rounds} rounds, {1e3 * min(steps):.0f} to {1e3 * max(steps):.0f} "
        f"ms a step, about {left / 60:.1f} min left"
    )


def work(rank: int, task: Task, news: Any) -> None:
    """One of the processes: sizes if wanted, then the rounds."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the process that keeps the points
    parent = os.getppid()
    try:
        _meet(rank, task)
        bench = Bench(Config.from_json(task.config))
        bench.step()
        if task.sizes:
            found = {name: asdict(bench.sizes(p)) for name, p in task.profiles.items()}
            _tell(news, rank, "sizes", found)
        for number in task.rounds:
            if os.getppid() != parent:
                return  # killed; its next start goes on from the last round
            _tell(news, rank, "round", bench.round(task.profiles, number))
        bench.processes.wait()
        _tell(news, rank, "done", None)
        dist.destroy_process_group()
    except (EquipoiseError, RuntimeError, ValueError, OSError) as error:
        news.put(("failed", f"{type(error).__name__}: {error}"))


def _tell(news: Any, rank: int, kind: str, value: Any) -> None:
    if rank == 0:
        news.put((kind, value))


def _meet(rank: int, task: Task) -> None:
    """Join the process group, as torchrun's environment would have Accelerate do it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": DEVICES, "LOCAL_WORLD_SIZE": DEVICES}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler tells stderr of its begin and end
    if task.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        torch.cuda.set_device(rank)
    backend = "gloo" if task.device == "cpu" else "nccl"
    dist.init_process_group(backend, f"file://{task.meeting}", rank=rank, world_size=DEVICES)


class Bench:
    """A model whose experts are shared out over the processes, and steps on tokens drawn at random."""

    def __init__(self, config: Config) -> None:
        self.config, self.processes = config, Processes(config)
        self.device = self.processes.device
        torch.manual_seed(config.seed)
        group = self.processes.expert_group
        self.plain = LanguageModel(config.model, config.data.vocab_size, group)
        self.model = self.processes.wrap(self.plain)
        self.optimizer = make_optimizer(self.model, self.plain, config.optimizer)
        torch.manual_seed(config.seed + 1 + self.processes.rank)

    def step(self) -> None:
        """Forward, backward and optimizer, of one micro-batch on each process."""
        config = self.config
        shape = (config.micro_rows, config.data.row_length + 1)
        ids = torch.randint(config.data.vocab_size, shape, device=self.device)
        with self.processes.autocast():
            loss = self.model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        self.processes.clip(self.model, config.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def round(
        self, profiles: Mapping[str, Sequence[float]], number: int
    ) -> dict[str, list[list[float]]]:
        """Seconds of each timed step by profile: as `Points.rounds` has them."""
        names = list(profiles)
        times = {}
        for index in np.random.default_rng(number).permutation(len(names)):
            impose(self.plain, profiles[names[index]])
            for _ in range(WARM):
                self.step()
            times[names[index]] = [self._timed() for _ in range(TIMED)]
        all_times = self.processes.told(times)
        turns = {name: zip(*(told[name] for told in all_times), strict=True) for name in names}
        return {
            name: [[max(wall for wall, _ in step), *(work for _, work in step)] for step in steps]
            for name, steps in turns.items()
        }

    def _timed(self) -> tuple[float, float]:
        """Seconds of a step, and of processor time in it."""
        self.processes.wait()
        self._settle()
        begin, work = time.perf_counter(), time.process_time()
        self.step()
        self._settle()
        return time.perf_counter() - begin, time.process_time() - work

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sizes(self, ratios_E: Sequence[float]) -> Sizes:
        """Memory and bytes sent, of a step of this profile."""
        impose(self.plain, ratios_E)
        self.step()
        self.processes.wait()
        peak = max(self._peak() for _ in range(PEAKS))
        with Sent(self.processes.rank) as sent:
            self.step()
        told = self.processes.told((peak, sent.bytes_P, sent.largest, self._held()))
        return Sizes(*(list(values) for values in zip(*told, strict=True)))

    def _peak(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as seen:
            self.step()
        assert seen.profiler is not None
        events = seen.profiler.kineto_results.events()
        return highest((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")

    def _held(self) -> int:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.plain.parameters(), *(s for s in states if isinstance(s, torch.Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def highest(changes: Iterable[tuple[int, int]]) -> int:
    """Largest sum of bytes on the way, from (time, bytes taken or given back)."""
    ordered = [size for _, size in sorted(changes, key=lambda change: change[0])]
    return int(max(0, *np.cumsum(ordered))) if ordered else 0


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what this process sends to each by all-to-all, in bytes: `bytes_P`, and the `largest`
    message.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rank, self.bytes_P, self.largest = rank, [0] * DEVICES, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; take note of it if it is an all-to-all."""
        if func is torch.ops.c10d.alltoall_base_.default:
            rows, splits = args[1], args[4] or [len(args[1]) // DEVICES] * DEVICES
            width = rows[:1].numel() * rows.element_size() if len(rows) else 0
            for other, count in enumerate(splits):
                if other != self.rank:
                    self.bytes_P[other] += width * count
                    self.largest = max(self.largest, width * count)
        return func(*args, **(kwargs or {}))

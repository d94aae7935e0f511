"""Train one config into a run folder; stopped and run again, it goes on as if never stopped."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.balance import attach
from equipoise.errors import EquipoiseError
from equipoise.lab.batches import Batches
from equipoise.lab.config import Config
from equipoise.lab.corpus import Corpus, load_corpus
from equipoise.lab.evaluate import Evaluation, evaluate
from equipoise.lab.folder import RunFolder
from equipoise.lab.meter import Meter
from equipoise.lab.model import LanguageModel, parameters_of
from equipoise.lab.optim import make_optimizer, rate_at, set_rate
from equipoise.lab.processes import Processes
from equipoise.lab.states import load_state, state_of
from equipoise.lab.terms import balancing
from equipoise.lab.weights import save_model
from equipoise.metrics import floors, load

Sink = Callable[[Mapping[str, float], int], None]
QUICK_TOKENS = 20_000
"""Of each domain, in evaluations on the way."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    steps: int
    loss: float
    """Of the step, nats per token."""
    tokens_per_second: float
    """Since this process began."""
    max_vio: float
    """Of the step's tokens, mean over layers; NaN where nothing is selected."""
    floor: float
    """What chance alone gives."""
    seconds_left: float


@dataclass
class State:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0
    """Of training alone: evaluation and saving left out."""


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
    Raises EquipoiseError for a folder of another config or text, for a loss that is not finite
    (weights and the last checkpoint stay), and where the disk is full.
    """
    folder = RunFolder(out)
    if force and folder.path.exists():
        if not (folder.path / "config.json").exists():
            raise EquipoiseError(f"--force: {folder.path} is no run's folder, and is left alone.")
        shutil.rmtree(folder.path)
    processes = Processes(config)
    corpus = _corpus(config, processes, say)
    if processes.first:
        folder.begin(config, corpus.digest)
    processes.wait()
    if folder.finished:
        say(f"{folder.path} is finished: nothing to do.")
        return dict(folder.read("result.json"))
    run = Run(config, folder, processes, corpus, sinks=sinks, progress=progress, say=say)
    try:
        run.train()
        return run.finish(save)
    finally:
        run.close()


def _corpus(config: Config, processes: Processes, say: Callable[[str], None]) -> Corpus:
    """Made by one process, read by all."""
    if processes.first:
        load_corpus(config.data, say)
    processes.wait()
    return load_corpus(config.data)


class Run:
    """A run under way: model, optimizer, balancing, data, and the rows of its metrics."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        processes: Processes,
        corpus: Corpus,
        *,
        sinks: Sequence[Sink] = (),
        progress: Callable[[Progress], None] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.folder, self.processes, self.corpus = config, folder, processes, corpus
        self.sinks, self.progress, self.say = sinks, progress, say
        torch.manual_seed(config.seed)
        group = processes.expert_group
        self.plain = LanguageModel(config.model, config.data.vocab_size, group)
        self.model = processes.wrap(self.plain)
        self.optimizer = make_optimizer(self.model, self.plain, config.optimizer)
        self.meter = Meter(self.plain)
        terms = balancing(config.balance)
        self.handle = None
        if terms:
            self.handle = attach(
                self.model,
                *terms,
                optimizer=self.optimizer,
                accumulation=processes.micro_batches,
                group=_group(processes),
            )
        self.looks_ahead = self.handle is not None and any(
            scope.late for scope in self.handle.book.scopes
        )
        self.batches = Batches(corpus, config, rank=processes.rank, ranks=processes.count)
        self.state = State()
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        for layer in self.plain.moe_layers():
            if hasattr(layer.gate, "loss_scale"):
                layer.gate.loss_scale = 1 / processes.micro_batches
        if processes.count > 1:
            torch.manual_seed(config.seed + 1 + processes.rank)
        self._go_on()
        self._began = time.perf_counter()
        self._first = self.state.step
        self._saved = time.monotonic()

    # -- training -----------------------------------------------------------------------------

    def train(self) -> None:
        """All steps that are left."""
        self.model.train()
        try:
            while self.state.step < self.config.steps:
                self._step()
                self._after_step()
        except KeyboardInterrupt:
            if self.processes.count == 1:
                self.save()
            raise

    def _step(self) -> None:
        begin = time.perf_counter()
        micro_batches = self.batches.step(self.state.step)
        if self.looks_ahead:
            self._look_ahead(micro_batches)
        set_rate(
            self.optimizer,
            rate := rate_at(self.state.step, self.config.steps, self.config.optimizer),
        )
        total = torch.zeros((), device=self.processes.device)
        for index, (ids, targets, _) in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            total += self._backward(ids, targets, last=last) / len(micro_batches)
        loss = float(self.processes.total(total)) / self.processes.count
        norm = self.processes.clip(self.model, self.config.optimizer.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop_at_nan(loss, norm, micro_batches)
        self.optimizer.step()
        self.plain.step(None if self.processes.count == 1 else torch.distributed.group.WORLD)
        self.optimizer.zero_grad(set_to_none=True)
        counts_LE = self.processes.total(self.meter.take()[0]).cpu().numpy()
        seconds = time.perf_counter() - begin
        self.state.step += 1
        self.state.seconds += seconds
        self._note(loss, norm, rate, seconds, counts_LE)

    def _backward(self, ids: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        device = self.processes.device
        count = self.processes.micro_batches
        if self.config.parallel == "fsdp2" and self.processes.count > 1:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with self.processes.waiting(self.model, last):
            loss: Tensor = self.model(ids.to(device), targets.to(device))
            self.processes.accelerator.backward(loss / count)
        return loss.detach()

    def _look_ahead(self, micro_batches: Sequence[tuple[Tensor, Tensor, Any]]) -> None:
        assert self.handle is not None
        device = self.processes.device
        with self.handle.preview(), torch.no_grad():
            for ids, targets, _ in micro_batches:
                self.model(ids.to(device), targets.to(device))
        self.meter.take()

    def _stop_at_nan(self, loss: float, norm: float, micro_batches: Sequence[Any]) -> None:
        from equipoise.lab.diagnosis import first_not_finite

        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        if self.handle is not None:
            self.handle.discard()
        where = first_not_finite(self.model, self.plain, micro_batches, self.processes.device)
        kept = RunFolder(self.folder.path).load_checkpoint(self.processes.rank)
        step = kept["step"] if kept else 0
        raise EquipoiseError(
            f"step {self.state.step + 1}: {what}; {where}. The run is stopped; its checkpoint is "
            f"of step {step}. Lower optimizer.lr, raise optimizer.warmup_share, or use "
            "precision=float32, in a folder of its own."
        )

    def _note(
        self, loss: float, norm: float, rate: float, seconds: float, counts_LE: np.ndarray
    ) -> None:
        row = {
            "step": self.state.step,
            "tokens": self.state.step * self.config.step_tokens,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate * self.config.optimizer.lr,
            "seconds": seconds,
            "counts": counts_LE.ravel().astype(np.int64),
        }
        dropped = [
            float(layer.dropped_share)
            for layer in self.plain.moe_layers()
            if layer.limiter is not None
        ]
        if dropped:
            row["dropped_share"] = float(np.mean(dropped))
        self.rows.append(row)
        max_vio = float(np.mean(load.max_vio(counts_LE))) if counts_LE.size else math.nan
        for sink in self.sinks if self.processes.first else ():
            sink(self._scalars(row, max_vio), self.state.step)
        if self.progress is not None and self.processes.first:
            self.progress(self._progress(loss, max_vio))

    def _scalars(self, row: Mapping[str, Any], max_vio: float) -> dict[str, float]:
        names = ("loss", "gradient_norm", "learning_rate", "seconds")
        found = {f"train/{name}": float(row[name]) for name in names}
        found["train/max_vio"], found["train/max_vio_floor"] = max_vio, self.floor
        return found | (self.handle.metrics() if self.handle is not None else {})

    @property
    def floor(self) -> float:
        """MaxVio of a step's tokens by chance alone."""
        model = self.config.model
        return floors.floor(self.config.step_tokens, model.experts, model.top_k).mean["max_vio"]

    def _progress(self, loss: float, max_vio: float) -> Progress:
        done = self.state.step - self._first
        spent = time.perf_counter() - self._began
        left = spent / done * (self.config.steps - self.state.step)
        speed = done * self.config.step_tokens / spent
        return Progress(self.state.step, self.config.steps, loss, speed, max_vio, self.floor, left)

    # -- on the way ---------------------------------------------------------------------------

    def _after_step(self) -> None:
        every = self.config.evaluate_every
        if every and self.state.step % every == 0 and self.state.step < self.config.steps:
            self.evaluate(QUICK_TOKENS)
        if self._due():
            self.save()

    def _due(self) -> bool:
        """Whether to save: as the first process says, as all have to do it together."""
        due = time.monotonic() - self._saved > self.config.checkpoint_seconds
        if self.processes.count > 1:
            told = torch.tensor(float(due and self.processes.first), device=self.processes.device)
            due = float(self.processes.total(told)) > 0
        return due

    def evaluate(self, tokens: int, trace: Path | None = None) -> Evaluation:
        """Held-out losses and counts, noted under the step."""
        with self._whole():
            found = evaluate(
                self.plain, self.corpus, self.config.data.row_length, tokens=tokens, trace=trace
            )
        self.meter.take()
        self.evaluations.append({"step": self.state.step, **found.to_dict()})
        self.model.train()
        return found

    def _whole(self) -> Any:
        """The parameters of a sharded model are put together where they are used, by its hooks."""
        return torch.no_grad()

    def save(self) -> None:
        """Write what a resumed run needs, and the figures so far."""
        state = {
            "step": self.state.step,
            "seconds": self.state.seconds,
            "rows": self.rows,
            "evaluations": self.evaluations,
            "processes": self.processes.count,
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.processes.device.type == "cuda" else None,
            "balance": None if self.handle is None else self.handle.state_dict(),
            **state_of(self.model, self.optimizer, self.processes),
        }
        self.folder.save_checkpoint(state, self.processes.rank)
        if self.processes.first and self.rows:
            self.folder.write_metrics(self.rows)
        self.processes.wait()
        self._saved = time.monotonic()

    def _go_on(self) -> None:
        kept = self.folder.load_checkpoint(self.processes.rank)
        if kept is None:
            return
        if kept["processes"] != self.processes.count:
            raise EquipoiseError(
                f"{self.folder.path} was begun with {kept['processes']} processes, and this is "
                f"{self.processes.count}: start it with as many."
            )
        load_state(kept, self.model, self.optimizer, self.processes)
        if self.handle is not None:
            self.handle.load_state_dict(kept["balance"])
        self.state = State(kept["step"], kept["seconds"])
        self.rows, self.evaluations = kept["rows"], kept["evaluations"]
        torch.set_rng_state(kept["random"])
        if kept["cuda"] is not None:
            torch.cuda.set_rng_state(kept["cuda"])
        self.say(f"Going on after step {self.state.step} of {self.config.steps}.")

    # -- the end ------------------------------------------------------------------------------

    def finish(self, save: bool) -> dict[str, Any]:
        """Evaluate, save the model, and write the result."""
        wants_trace = save and self.config.trace and self.processes.count == 1
        trace = self.folder.path / "trace" if wants_trace else None
        found = self.evaluate(self.config.evaluation_tokens, trace)
        result = {
            "name": self.config.name,
            "steps": self.state.step,
            "tokens": self.state.step * self.config.step_tokens,
            "seconds": self.state.seconds,
            "processes": self.processes.count,
            "parameters": parameters_of(self.plain),
            "loss": found.loss,
            "max_vio": found.max_vio,
            "max_vio_floor": found.max_vio_floor(self.config.model.top_k),
        }
        result["saved"] = save_model(self, self.folder.path) if save else None
        if self.processes.first:
            self.folder.write_metrics(self.rows)
            self.folder.write("evaluations.json", self.evaluations)
            self.folder.write("result.json", result)
        self.processes.wait()
        if self.processes.first:
            self.folder.remove_checkpoints()
        return result

    def close(self) -> None:
        """Take hooks off."""
        self.meter.remove()
        if self.handle is not None:
            self.handle.detach()


def _group(processes: Processes) -> Any:
    if processes.count == 1:
        return False
    return torch.distributed.group.WORLD

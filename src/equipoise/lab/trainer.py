"""Train one config into a run folder; stopped and run again, it goes on as if never stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.balance import Handle, attach
from equipoise.errors import EquipoiseError
from equipoise.lab.batches import Batches
from equipoise.lab.config import Config
from equipoise.lab.corpus import Corpus, load_corpus
from equipoise.lab.diagnosis import bad_weight, first_not_finite
from equipoise.lab.evaluate import Evaluation, evaluate
from equipoise.lab.folder import RunFolder
from equipoise.lab.meter import Meter
from equipoise.lab.model import LanguageModel, parameters_of
from equipoise.lab.optim import make_optimizer, rate_at, set_rate
from equipoise.lab.processes import Processes
from equipoise.lab.run_figures import draw_run
from equipoise.lab.states import load_state, state_of
from equipoise.lab.stopping import Stop
from equipoise.lab.terms import balancing, parse
from equipoise.lab.weights import save_model
from equipoise.metrics import floors, load
from equipoise.nn.limiter import Limiter

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
    processes = Processes(config)
    run = Run(config, folder, processes, sinks=sinks, progress=progress, say=say)
    try:
        corpus = _corpus(config, processes, say)
        with processes.together():
            if processes.first:
                folder.begin(config, corpus.digest, force=force)
        if folder.finished:
            say(f"{folder.path} is finished: nothing to do.")
            return dict(folder.read("result.json"))
        run.begin(corpus)
        run.train()
        return run.finish(save)
    finally:
        run.close()


def _corpus(config: Config, processes: Processes, say: Callable[[str], None]) -> Corpus:
    """Made by one process, read by all."""
    with processes.together():
        if processes.first:
            load_corpus(config.data, say)
    return load_corpus(config.data)


class Run:
    """A run under way: model, optimizer, balancing, data, and the rows of its metrics.

    Making one refuses settings that do not go together, before text is read or a folder touched.
    """

    corpus: Corpus
    batches: Batches

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        processes: Processes,
        *,
        sinks: Sequence[Sink] = (),
        progress: Callable[[Progress], None] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        self.sinks, self.progress, self.say = sinks, progress, say
        torch.manual_seed(config.seed)
        self.plain = LanguageModel(config.model, config.data.vocab_size, processes.expert_group)
        self.model = processes.wrap(self.plain)
        self.optimizer = make_optimizer(self.model, self.plain, config.optimizer)
        self.meter = Meter(self.plain)
        self.balanced = [call.name for call in parse(config.balance)]
        self.handle = self._balanced()
        self.looks_ahead = self.handle is not None and any(
            scope.late for scope in self.handle.book.scopes
        )
        self.state = State()
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        for layer in self.plain.moe_layers():
            if hasattr(layer.gate, "loss_scale"):
                layer.gate.loss_scale = 1 / processes.micro_batches
        if processes.count > 1:
            torch.manual_seed(config.seed + 1 + processes.rank)

    def _balanced(self) -> Handle | None:
        terms = balancing(self.config.balance)
        if not terms:
            return None
        try:
            return attach(
                self.model,
                *terms,
                optimizer=self.optimizer,
                accumulation=self.processes.micro_batches,
                group=self.processes.group or False,
            )
        except EquipoiseError as error:
            raise EquipoiseError(
                f"balance={self.config.balance!r} with model.router={self.config.model.router!r}: "
                f"{error}"
            ) from error

    def begin(self, corpus: Corpus) -> None:
        """Take the data, and what the folder holds of this run."""
        self.corpus = corpus
        processes = self.processes
        self.batches = Batches(corpus, self.config, rank=processes.rank, ranks=processes.count)
        with processes.together():
            kept = self.folder.load_checkpoint(processes.rank, processes.count)
        if kept is not None:
            self._go_on(kept)
        self._began = time.perf_counter()
        self._first = self.state.step
        self._saved, self._saved_step = time.monotonic(), self.state.step

    # -- training -----------------------------------------------------------------------------

    def train(self) -> None:
        """All steps that are left; KeyboardInterrupt, after saving, where a signal asks to stop."""
        self.model.train()
        with Stop() as stop:
            while self.state.step < self.config.steps:
                self._step()
                if self._agreed(stop.asked):
                    self.save()
                    raise KeyboardInterrupt
                self._after_step()
        if self._saved_step < self.state.step:
            self.save()  # evaluation takes long, and may be stopped too

    def _step(self) -> None:
        begin = time.perf_counter()
        micro_batches = self.batches.step(self.state.step)
        if self.looks_ahead:
            self._look_ahead(micro_batches)
        set_rate(
            self.optimizer,
            rate := rate_at(self.state.step, self.config.steps, self.config.optimizer),
        )
        sums_2 = torch.zeros(2, device=self.processes.device)
        for index, (ids, targets, _) in enumerate(micro_batches):
            sums_2 += self._backward(ids, targets, last=index == len(micro_batches) - 1)
        passes = len(micro_batches) * self.processes.count
        loss, dropped = (self.processes.total(sums_2) / passes).tolist()
        norm = self.processes.clip(self.model, self.config.optimizer.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop_at_nan(loss, norm, micro_batches)
        self.optimizer.step()
        self.plain.step(self.processes.group)
        self.optimizer.zero_grad(set_to_none=True)
        counts_LE = self.processes.total(self.meter.take()[0]).cpu().numpy()
        seconds = time.perf_counter() - begin
        self.state.step += 1
        self.state.seconds += seconds
        self._note(loss, norm, rate, seconds, dropped, counts_LE)

    def _backward(self, ids: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """Gradients of a micro-batch; its loss, and the share of its selections that is dropped."""
        with self.processes.micro_batch(self.model, last):
            loss = self._loss(ids, targets)
            (loss / self.processes.micro_batches).backward()  # type: ignore[no-untyped-call]
        dropped = [layer.dropped_share for layer in self.plain.moe_layers() if layer.limiter]
        share = torch.stack(dropped).mean() if dropped else torch.zeros_like(loss)
        return torch.stack([loss.detach().float(), share.to(loss)])

    def _loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        device = self.processes.device
        with self.processes.autocast():
            loss: Tensor = self.model(ids.to(device), targets.to(device))
        return loss

    def _look_ahead(self, micro_batches: Sequence[tuple[Tensor, Tensor, Any]]) -> None:
        """Count the step's selections before it, with the noise that it will have."""
        assert self.handle is not None
        with self.handle.preview(), torch.no_grad(), self._same_noise():
            for ids, targets, _ in micro_batches:
                self._loss(ids, targets)
        self.meter.take()

    def _same_noise(self) -> AbstractContextManager[Any]:
        """Random numbers drawn inside are drawn again after it."""
        device = self.processes.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def _stop_at_nan(self, loss: float, norm: float, micro_batches: Sequence[Any]) -> None:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        if self.handle is not None:
            self.handle.discard()
        where = first_not_finite(self.model, self.plain, micro_batches, self.processes)
        raise self._stopped(self.state.step + 1, f"{what}; {where}")

    def _stopped(self, step: int, what: str) -> EquipoiseError:
        kept = f"of step {self._saved_step}" if self._saved_step else "none yet"
        return EquipoiseError(
            f"step {step}: {what}. The run is stopped; its last checkpoint is {kept}. Lower "
            "optimizer.lr, raise optimizer.warmup_share, or use precision=float32, in a folder of "
            "its own."
        )

    def _note(
        self,
        loss: float,
        norm: float,
        rate: float,
        seconds: float,
        dropped: float,
        counts_LE: NDArray[np.int64],
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
        if self.config.model.capacity != "none":
            row["dropped_share"] = dropped
        elif self.handle is not None and "capacity" in self.balanced:
            row["dropped_share"] = self.handle.metrics()["balance/dropped_share"]
        self.rows.append(row)
        max_vio = float(np.mean(load.max_vio(counts_LE))) if counts_LE.size else math.nan
        for sink in self.sinks if self.processes.first else ():
            sink(self._scalars(row, max_vio), self.state.step)
        if self.progress is not None and self.processes.first:
            self.progress(self._progress(loss, max_vio))

    def _scalars(self, row: Mapping[str, Any], max_vio: float) -> dict[str, float]:
        names = ("loss", "gradient_norm", "learning_rate", "seconds")
        found = {f"train/{name}": float(row[name]) for name in names}
        found["train/tokens_per_second"] = self.config.step_tokens / row["seconds"]
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
        if self._agreed(time.monotonic() - self._saved > self.config.checkpoint_seconds):
            self.save()

    def _agreed(self, wanted: bool) -> bool:
        """Whether any process wants it: what is then done, all have to do together."""
        told = torch.tensor(float(wanted), device=self.processes.device)
        return float(self.processes.total(told)) > 0

    def evaluate(self, tokens: int, trace: Path | None = None) -> Evaluation:
        """Held-out losses and counts, noted under the step; each of several processes does it all.

        With sharded parameters or experts they have to run each pass together.
        """
        with self._same_noise(), self.processes.autocast():
            found = evaluate(
                self.plain, self.corpus, self.config.data.row_length, tokens=tokens, trace=trace
            )
        self.meter.take()
        self.evaluations.append({"step": self.state.step, **found.to_dict()})
        self.model.train()
        return found

    def save(self) -> None:
        """Write what a resumed run needs, and the figures so far; weights have to be finite."""
        processes = self.processes
        with processes.together():
            if (bad := bad_weight(self.plain)) is not None:
                raise self._stopped(self.state.step, bad)
        state = {
            "step": self.state.step,
            "seconds": self.state.seconds,
            "rows": self.rows,
            "evaluations": self.evaluations,
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if processes.device.type == "cuda" else None,
            "balance": None if self.handle is None else self.handle.state_dict(),
            "limits": [limiter.state_dict() for limiter in self._limiters()],
            **state_of(self.model, self.optimizer, processes),
        }
        with processes.together():
            self.folder.save_checkpoint(state, processes.rank, processes.count)
            if processes.first and self.rows:
                self.folder.write_metrics(self.rows)
        self.folder.keep_checkpoint(self.state.step, processes.rank, processes.count)
        self._saved, self._saved_step = time.monotonic(), self.state.step

    def _limiters(self) -> list[Limiter]:
        return [layer.limiter for layer in self.plain.moe_layers() if layer.limiter is not None]

    def _go_on(self, kept: dict[str, Any]) -> None:
        load_state(kept, self.model, self.optimizer, self.processes)
        if self.handle is not None:
            self.handle.load_state_dict(kept["balance"])
        for limiter, state in zip(self._limiters(), kept["limits"], strict=True):
            limiter.load_state_dict(state)
        self.state = State(kept["step"], kept["seconds"])
        self.rows, self.evaluations = kept["rows"], kept["evaluations"]
        torch.set_rng_state(kept["random"])
        if kept["cuda"] is not None:
            torch.cuda.set_rng_state(kept["cuda"])
        if self.processes.first:
            self.say(f"Going on after step {self.state.step} of {self.config.steps}.")

    # -- the end ------------------------------------------------------------------------------

    def finish(self, save: bool) -> dict[str, Any]:
        """Evaluate, save the model, and write the result."""
        found = self.evaluate(self.config.evaluation_tokens, self._trace() if save else None)
        saved = save_model(self, self.folder.path) if save else None
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
            "saved": saved,
        }
        with self.processes.together():
            if self.processes.first:
                self.folder.write_metrics(self.rows)
                self.folder.write("evaluations.json", self.evaluations)
                if save:
                    draw_run(self.folder.path)
                self.folder.write("result.json", result)
                self.folder.remove_checkpoints()
        return result

    def _trace(self) -> Path | None:
        """Where to record the last evaluation; None where routing is not to be, or cannot be."""
        if not self.config.trace:
            return None
        layers = list(self.plain.moe_layers())
        if not layers or any(getattr(layer.gate, "variable_top_k", False) for layer in layers):
            if self.processes.first:
                self.say(
                    f"No trace: model.router={self.config.model.router} does not select a fixed "
                    "number of experts for each token."
                )
            return None
        return self.folder.path / "trace"

    def close(self) -> None:
        """Take hooks off."""
        self.meter.remove()
        if self.handle is not None:
            self.handle.detach()

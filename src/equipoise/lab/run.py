"""A run under way: its parts, its steps, its checkpoints, its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.balance import Handle, attach
from equipoise.errors import EquipoiseError
from equipoise.lab.batches import Batches
from equipoise.lab.config import Config
from equipoise.lab.corpus import Corpus
from equipoise.lab.diagnosis import bad_weight, first_not_finite
from equipoise.lab.evaluate import Evaluation, evaluate
from equipoise.lab.folder import RunFolder
from equipoise.lab.journal import Journal, Progress, Sink, Step
from equipoise.lab.meter import Meter
from equipoise.lab.model import LanguageModel, least_parameters, parameters_of
from equipoise.lab.optim import make_optimizer, rate_at, set_rate
from equipoise.lab.processes import Processes
from equipoise.lab.run_figures import draw_run
from equipoise.lab.saving import saving
from equipoise.lab.spelt import spelt
from equipoise.lab.states import restore, snapshot
from equipoise.lab.stopping import Stop
from equipoise.lab.terms import balancing, parse
from equipoise.lab.weights import save_model

QUICK_TOKENS = 20_000
"""Of each domain, in evaluations on the way."""
EVERY = 10.0
"""Seconds between words on how far an evaluation is."""


class Run:
    """A run under way: model, optimizer, balancing, data, and the rows of its metrics.

    Making one refuses settings that do not go together, before text is read or a folder touched.
    """

    corpus: Corpus
    batches: Batches
    terms: Any = ()
    """What `config.balance` stands for, `spelt`."""

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
        self.say = say if processes.first else _silent
        told = (sinks, progress) if processes.first else ((), None)
        self.journal = Journal(config, *told)
        self.step, self.seconds = 0, 0.0
        processes.check_memory(least_parameters(config.model, config.data.vocab_size))
        torch.manual_seed(config.seed)
        self.plain = LanguageModel(config.model, config.data.vocab_size, processes.expert_group)
        self.model = processes.wrap(self.plain)
        self.optimizer = make_optimizer(self.model, self.plain, config.optimizer)
        self.meter = Meter(self.plain)
        self.handle = self._balanced()
        self.looks_ahead = self.handle is not None and any(
            scope.late for scope in self.handle.book.scopes
        )
        for layer in self.plain.moe_layers():
            if hasattr(layer.gate, "loss_scale"):
                layer.gate.loss_scale = 1 / processes.micro_batches
        if processes.count > 1:
            torch.manual_seed(config.seed + 1 + processes.rank)

    def _balanced(self) -> Handle | None:
        try:
            terms = balancing(self.config.balance, self.model)
            self.terms = spelt(terms)
            if not terms:
                return None
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
            restore(self, kept)
            self.say(f"Going on after step {self.step} of {self.config.steps}.")
        self.journal.begin(self.step)
        if self.step == 0:
            self._tell_passes()
        self._saved, self._saved_step = time.monotonic(), self.step

    def _tell_passes(self) -> None:
        """Say which domains the run reads more than once."""
        told = [f"{name} {n:.1f} times" for name, n in self.batches.passes().items() if n > 1]
        if told:
            self.say(f"Text that is read more than once: {', '.join(told)}.")

    # -- training -----------------------------------------------------------------------------

    def train(self) -> None:
        """All steps that are left; KeyboardInterrupt, after saving, where a signal asks to stop."""
        self.model.train()
        with Stop(self.say) as stop:
            while self.step < self.config.steps:
                self.advance()
                self._evaluate_on_the_way()
                if self._agreed(stop.asked):
                    self.save()
                    raise KeyboardInterrupt
                if self._agreed(time.monotonic() - self._saved > self.config.checkpoint_seconds):
                    self.save()
        if self._saved_step < self.step:
            self.save()  # evaluation takes long, and may be stopped too

    def advance(self) -> None:
        """The next optimizer step, noted in the journal."""
        begin = time.perf_counter()
        micro_batches = self.batches.step(self.step)
        if self.looks_ahead:
            self._look_ahead(micro_batches)
        set_rate(
            self.optimizer,
            rate := rate_at(self.step, self.config.steps, self.config.optimizer),
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
        taken = self.meter.take()
        counts_LE = self.processes.total(taken.counts_LE).cpu().numpy()
        unchosen = self._unchosen(taken.unchosen_L)
        seconds = time.perf_counter() - begin
        self.step += 1
        self.seconds += seconds
        share = self._dropped(dropped)
        self.journal.note(
            Step(self.step, loss, norm, rate, seconds, counts_LE, share, unchosen), self._measured
        )

    def _measured(self) -> dict[str, float]:
        return self.handle.metrics() if self.handle is not None else {}

    def _dropped(self, by_layers: float) -> float | None:
        """The share of selections that a capacity drops, the layers' own or that of balancing."""
        if self.config.model.capacity != "none":
            return by_layers
        if any(call.name == "capacity" for call in parse(self.config.balance)):
            return self._measured()["balance/dropped_share"]
        return None

    def _unchosen(self, tokens_L: Tensor) -> float | None:
        """The share of the step's tokens without an expert, where routers decide how many they have."""
        if not any(layer.gate.variable_top_k for layer in self.plain.moe_layers()):
            return None
        return float(self.processes.total(tokens_L).double().mean()) / self.config.step_tokens

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
        with self.processes.together():
            self._write_journal()  # how it came to this
        where = first_not_finite(self.model, self.plain, micro_batches, self.processes)
        raise self._stopped(self.step + 1, f"{what}; {where}")

    def _stopped(self, step: int, what: str) -> EquipoiseError:
        saved = f"its last checkpoint is of step {self._saved_step}"
        kept = saved if self._saved_step else "no checkpoint was due before it"
        ways = ["lower optimizer.lr", "raise optimizer.warmup_share"]
        if self.config.precision != "float32":
            ways.append("use precision=float32")
        return EquipoiseError(
            f"step {step}: {what}. The run is stopped; {kept}. In a folder of its "
            f"own, {' or '.join(ways)}."
        )

    # -- on the way ---------------------------------------------------------------------------

    def _evaluate_on_the_way(self) -> None:
        every = self.config.evaluate_every
        if every and self.step % every == 0 and self.step < self.config.steps:
            self.evaluate(QUICK_TOKENS)

    def _agreed(self, wanted: bool) -> bool:
        """Whether any process wants it: what is then done, all have to do together."""
        if self.processes.count == 1:
            return wanted
        told = torch.tensor(float(wanted), device=self.processes.device)
        return float(self.processes.total(told)) > 0

    def evaluate(self, tokens: int, trace: Path | None = None) -> Evaluation:
        """Held-out losses and counts, noted under the step; several processes share the passes."""
        with self._same_noise(), self.processes.autocast():
            found = evaluate(
                self.plain,
                self.corpus,
                self.config.data.row_length,
                tokens=tokens,
                trace=trace,
                leak_rows=self.config.micro_rows if self.step == self.config.steps else 0,
                processes=self.processes,
                told=self._now_and_then(),
            )
        self.meter.take()
        self.journal.evaluations.append({"step": self.step, **found.to_dict()})
        self.model.train()
        return found

    def _now_and_then(self) -> Callable[[int, int], None]:
        """Says how far an evaluation is, where it takes long."""
        begin = last = time.monotonic()

        def told(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if self.journal.progress is not None and now - last > EVERY and done < total:
                last = now
                left = (now - begin) / done * (total - done)
                self.say(f"Evaluated {done:,} of {total:,} passes, {left:,.0f} s left.")

        return told

    def save(self) -> None:
        """Write what a resumed run needs, and the figures so far; weights have to be finite."""
        processes = self.processes
        with processes.together():
            if (bad := bad_weight(self.plain)) is not None:
                raise self._stopped(self.step, bad)
        state = snapshot(self)
        with processes.together():
            self.folder.save_checkpoint(state, processes.rank, processes.count)
            self._write_journal()
        self.folder.keep_checkpoint(self.step, processes.rank, processes.count)
        self._saved, self._saved_step = time.monotonic(), self.step

    def _write_journal(self) -> None:
        """The figures so far, by the first process."""
        if self.processes.first and self.journal.rows:
            self.folder.write_metrics(self.journal.rows)
            self.folder.write("evaluations.json", self.journal.evaluations)

    # -- the end ------------------------------------------------------------------------------

    def finish(self, save: bool) -> dict[str, Any]:
        """Evaluate, save the model, and write the result."""
        self.say("Evaluating on the held-out text.")
        found = self.evaluate(self.config.evaluation_tokens, self._trace() if save else None)
        saved = save_model(self, self.folder.path) if save else None
        result = {
            "name": self.config.name,
            "steps": self.step,
            "tokens": self.step * self.config.step_tokens,
            "seconds": self.seconds,
            "processes": self.processes.count,
            "parameters": parameters_of(self.plain),
            "loss": found.loss,
            "experts_per_token": found.experts_per_token,
            "max_vio": found.max_vio,
            "max_vio_floor": found.max_vio_floor(self.config.model.top_k),
            "saved": saved,
        }
        if self.handle is not None and self.handle.courses is not None:
            result["events"] = [asdict(event) for event in self.handle.events]
        with self.processes.together():
            self._write_journal()
            if self.processes.first:
                if save:
                    with saving(self.folder.path / "figures"):
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
            self.say(
                f"No trace: model.router={self.config.model.router} does not select a fixed number "
                "of experts for each token."
            )
            return None
        return self.folder.path / "trace"

    def close(self) -> None:
        """Take hooks off."""
        self.meter.remove()
        if self.handle is not None:
            self.handle.detach()


def _silent(text: str) -> None:
    """Of several processes the first one talks."""

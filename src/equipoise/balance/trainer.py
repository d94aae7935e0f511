"""`BalanceCallback`: balancing in transformers' Trainer, and in the trainers of TRL built on it.

    handle = equipoise.balance.attach(model, Loss("switch", weight=1e-3), Bias(Sign(rate=1e-3)))
    Trainer(model, args, callbacks=[equipoise.balance.BalanceCallback(handle)], ...)

The Trainer's loss, its loop and its checkpoints stay what they are; the callback drives the handle.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_callback import TrainerCallback

from equipoise.balance.attach import Handle
from equipoise.balance.places import sharded_over
from equipoise.balance.sinks import Sink, TraceSink
from equipoise.errors import EquipoiseError

FILE = "balance.pt"
"""In each checkpoint; ranks after the first write `balance_<rank>.pt`."""
KEY = "equipoise.balance"
"""Where trainer_state.json names the run that the balance state belongs to."""


class BalanceCallback(TrainerCallback):  # type: ignore[misc]
    """Ends a balancing step before each optimizer step; logs, saves and resumes with the Trainer.

    sinks: where metrics go besides the Trainer's log, at each log; a trace takes every step.
    detach: take everything off the model when training ends.
    resume_from: the checkpoint folder that train(resume_from_checkpoint=...) is given, where it is
        not in output_dir.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        sinks: Sequence[Sink] = (),
        detach: bool = False,
        resume_from: str | Path | None = None,
    ) -> None:
        self.handle, self.sinks, self.detach = handle, tuple(sinks), detach
        self.resume_from = resume_from
        self._run = secrets.token_hex(8)
        self._per_epoch: int | None = None
        self._steps_begun = 0
        self._resumed = False
        self._step = 0

    # -- before the first step ------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any, **_: Any
    ) -> None:
        """Bind what attach() could not know: process group, loss scaler; go on from a checkpoint."""
        _refuse_what_is_not_balanced(self.handle, args, model)
        self.handle.discard()
        scaler = getattr(optimizer, "scaler", None)
        self.handle.bind(group=_group(self.handle, args), scaler=scaler)
        inner = self.handle.trained_by = _inner(optimizer)
        if scaler is not None and self.handle.optimizer is not inner:
            # A step that the scaler skips is no step: the optimizer itself has to say.
            self.handle.drive_with(inner)
        self._resumed = state.global_step > 0
        if self._resumed:
            self._resume(args, state)
        self._step = self.handle.book.step
        names = {"run": self._run, "output_dir": str(Path(args.output_dir).resolve())}
        state.stateful_callbacks[KEY] = {"args": {}, "attributes": names}

    def _resume(self, args: Any, state: Any) -> None:
        saved = state.stateful_callbacks.get(KEY)
        if saved is None:
            return  # trained without balance before
        run, before = saved["attributes"]["run"], saved["attributes"]["output_dir"]
        name = f"checkpoint-{state.global_step}"
        looked = [self.resume_from, args.resume_from_checkpoint, Path(args.output_dir, name)]
        for folder in [*looked, Path(before, name)]:
            found = _load(Path(folder)) if isinstance(folder, str | Path) else None
            if found is not None and (found["run"], found["step"]) == (run, state.global_step):
                self.handle.load_state_dict(found["state"])
                self._run = run
                return
        raise EquipoiseError(
            f"BalanceCallback: training resumes at step {state.global_step}, but the {FILE} of that "
            f"checkpoint is neither in {args.output_dir} nor in {before}. Name the folder: "
            "BalanceCallback(handle, resume_from=...)."
        )

    # -- steps ----------------------------------------------------------------------------------

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Find how many micro-batches the epoch has, and where in it a resumed run begins."""
        self._per_epoch, self._steps_begun = _length(train_dataloader, args), 0
        if self._resumed and self._per_epoch and not args.ignore_data_skip:
            steps = math.ceil(self._per_epoch / args.gradient_accumulation_steps)
            self._steps_begun = state.global_step % steps
        self._resumed = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how many micro-batches this step has: the last one of an epoch may have fewer."""
        wanted = args.gradient_accumulation_steps
        if self._per_epoch:
            left = self._per_epoch - self._steps_begun * wanted
            wanted = max(1, min(wanted, left))
        self._steps_begun += 1
        self.handle.accumulation = wanted

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any
    ) -> None:
        """End the balancing step, unless the optimizer does so itself or the terms were taken off."""
        if not self.handle.attached:
            return
        if self.handle.optimizer is None or self.handle.optimizer is not _inner(optimizer):
            self.handle.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget a step that the loss scaler skipped; write the counts of others to traces."""
        if self.handle.book.passes:
            self.handle.discard()
        seen, self._step = self._step, self.handle.book.step
        if state.is_world_process_zero and self._step != seen:
            for sink in self.sinks:
                if isinstance(sink, TraceSink):
                    sink.write(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the micro-batches that a loader of unknown length left without a step."""
        if self.handle.book.passes:
            self.handle.discard()

    # -- logs and checkpoints -------------------------------------------------------------------

    def on_log(
        self, args: Any, state: Any, control: Any, *, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Metrics into state.log_history; their means over layers also into the printed log."""
        if logs is None or "loss" not in logs or not self.handle.attached:
            return  # of an evaluation, the summary, or steps that were not balanced
        metrics = self.handle.metrics()
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)
        layers = {name for site in self.handle.sites for name in (f"layer_{site.layer}", site.path)}
        logs.update({k: v for k, v in metrics.items() if k.split("/")[1] not in layers})
        if state.is_world_process_zero and metrics:
            for sink in self.sinks:
                if not isinstance(sink, TraceSink):
                    sink(metrics, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the balance state beside the model's in the checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_hyper_param_search or not folder.is_dir():
            return
        saved = {"run": self._run, "step": state.global_step, "state": self.handle.state_dict()}
        path = folder / _file(_rank())
        temporary = path.with_suffix(".tmp")
        torch.save(saved, temporary)
        temporary.replace(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Follow the Trainer to its best checkpoint; close traces; detach if that was asked."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = _load(Path(state.best_model_checkpoint))
            if best is not None:
                self.handle.load_state_dict(best["state"])
        for sink in self.sinks:
            if isinstance(sink, TraceSink):
                sink.close()
        if self.detach:
            self.handle.detach()


def _refuse_what_is_not_balanced(handle: Handle, args: Any, model: Any) -> None:
    """EquipoiseError where the Trainer runs another model than the handle acts on."""
    if not handle.attached:
        raise EquipoiseError(
            "BalanceCallback: the handle is detached, so nothing would be balanced. attach() again, "
            "and give the callback the new handle."
        )
    if getattr(args, "n_gpu", 1) > 1:
        raise EquipoiseError(
            f"BalanceCallback: nn.DataParallel copies the model to {args.n_gpu} GPUs at every step, "
            "and copies are not balanced. Start with torchrun (DistributedDataParallel), or show "
            "one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    trained = set(model.modules()) if model is not None else set()
    missing = [site.path for site in handle.sites if site.module not in trained]
    if missing:
        raise EquipoiseError(
            f"BalanceCallback: {missing[0]} of the attached model is not in the model that the "
            "Trainer trains. Attach to trainer.model (with model_init or an adapter, the Trainer "
            "makes another one than yours)."
        )


def _group(handle: Handle, args: Any) -> Any:
    """The process group to count over, where attach() could not know it yet; else None."""
    if handle.book.group is not None or handle.book.alone or not dist.is_initialized():
        return None
    if dist.get_world_size() == 1:
        return None
    plan = getattr(args, "parallelism_config", None)
    if plan is not None and plan.non_data_parallel_size > 1:
        raise EquipoiseError(
            "BalanceCallback: with tensor, context or sequence parallelism say which ranks share "
            "a batch: attach(..., group=<the data-parallel group>)."
        )
    mesh = sharded_over(handle.model)
    if mesh is None:
        return dist.group.WORLD
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def _length(loader: Any, args: Any) -> int | None:
    """Micro-batches of an epoch, None where the loader cannot say."""
    try:
        length = len(loader)
    except TypeError:
        return None
    # Sequence parallelism hands out each batch in as many pieces as there are ranks.
    return length * int(getattr(getattr(args, "parallelism_config", None), "sp_size", 1))


def _inner(optimizer: Any) -> Any:
    """The optimizer in Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _file(rank: int) -> str:
    return f"balance_{rank}.pt" if rank else FILE


def _load(folder: Path) -> dict[str, Any] | None:
    """This rank's file of a checkpoint, else the first rank's, else None."""
    for path in (folder / _file(_rank()), folder / FILE):
        if path.is_file():
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return found
    return None

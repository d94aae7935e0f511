"""Checkpoints of a run: weights and optimizer in one process or several, and all that moves beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.lab.model import LanguageModel
from equipoise.lab.processes import Processes
from equipoise.nn import ParallelExperts
from equipoise.nn.limiter import Limiter

if TYPE_CHECKING:
    from equipoise.lab.run import Run


def snapshot(run: Run) -> dict[str, Any]:
    """All that a process needs to go on as if never stopped."""
    cuda = run.processes.device.type == "cuda"
    return {
        "step": run.step,
        "seconds": run.seconds,
        "rows": run.journal.rows,
        "evaluations": run.journal.evaluations,
        "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
        "balance": None if run.handle is None else run.handle.state_dict(),
        "limits": [limiter.state_dict() for limiter in _limiters(run)],
        **state_of(run.model, run.optimizer, run.processes),
    }


def restore(run: Run, kept: dict[str, Any]) -> None:
    """Put a run where `snapshot` found it."""
    load_state(kept, run.model, run.optimizer, run.processes)
    if run.handle is not None:
        run.handle.load_state_dict(kept["balance"])
    for limiter, state in zip(_limiters(run), kept["limits"], strict=True):
        limiter.load_state_dict(state)
    run.step, run.seconds = kept["step"], kept["seconds"]
    run.journal.rows, run.journal.evaluations = kept["rows"], kept["evaluations"]
    torch.set_rng_state(kept["random"])
    if kept["cuda"] is not None:
        torch.cuda.set_rng_state(kept["cuda"])


def _limiters(run: Run) -> list[Limiter]:
    return [layer.limiter for layer in run.plain.moe_layers() if layer.limiter is not None]


def state_of(model: nn.Module, optimizer: Any, processes: Processes) -> dict[str, Any]:
    """What this process keeps: its own weights, or its part of those that are sharded."""
    if not processes.sharded:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": _local(weights), "optimizer": _local(moments)}


def load_state(
    kept: dict[str, Any], model: nn.Module, optimizer: Any, processes: Processes
) -> None:
    """Put back what `state_of` gave this process."""
    if not processes.sharded:
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        return
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=_placed(weights, kept["model"]),
        optim_state_dict=_placed(moments, kept["optimizer"]),
    )


def _local(values: Any) -> Any:
    """Sharded tensors as this process's part."""
    if isinstance(values, dict):
        return {key: _local(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_local(value) for value in values]
    return values.to_local().clone() if hasattr(values, "to_local") else values


def _placed(like: Any, kept: Any) -> Any:
    """The parts as sharded tensors again, laid out as those of `like`."""
    if isinstance(kept, dict):
        return {key: _placed(like.get(key) if like else None, kept[key]) for key in kept}
    if isinstance(kept, list):
        return [
            _placed(like[i] if like and i < len(like) else None, value)
            for i, value in enumerate(kept)
        ]
    if hasattr(like, "device_mesh"):
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            kept, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    return kept


def whole_state(model: nn.Module, plain: LanguageModel, processes: Processes) -> dict[str, Tensor]:
    """All weights, on every process; `plain` is the model inside its wrapper."""
    state = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    if processes.sharded:
        return {name: _whole(value) for name, value in state.items()}
    if processes.config.expert_parallel:
        for path, module in plain.named_modules():
            if isinstance(module, ParallelExperts):
                for name, share in module.named_parameters():
                    state[f"{path}.{name}"] = _gathered(share.detach(), processes)
    return state


def _whole(value: Any) -> Tensor:
    tensor: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return tensor


def _gathered(share: Tensor, processes: Processes) -> Tensor:
    """The experts of all processes, in order."""
    parts = [torch.empty_like(share) for _ in range(processes.count)]
    dist.all_gather(parts, share.contiguous(), group=processes.expert_group)
    return torch.cat(parts)

"""Where a number stopped being finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from equipoise.lab.model import LanguageModel
from equipoise.lab.processes import Processes


def bad_weight(plain: LanguageModel) -> str | None:
    """The first weight with NaN or infinity in this process's part of it."""
    for name, parameter in plain.named_parameters():
        if not _finite(parameter.detach()):
            return f"the weight {name} is not finite"
    return None


def first_not_finite(
    model: nn.Module, plain: LanguageModel, micro_batches: Sequence[Any], processes: Processes
) -> str:
    """Which weight, which layer's output on these micro-batches, or which gradient went first.

    Every process runs all its micro-batches, and all say what the first of them found.
    """
    outputs = _bad_output(model, plain, micro_batches, processes)
    for kind in (bad_weight(plain), outputs, _bad_gradient(plain)):
        found = [said for said in processes.told(kind) if said is not None]
        if found:
            return str(found[0])
    return "no weight, no layer's output and no gradient shows it on its own"


def _bad_output(
    model: nn.Module, plain: LanguageModel, micro_batches: Sequence[Any], processes: Processes
) -> str | None:
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_looks(name, found))
        for name, module in plain.named_modules()
        if name
    ]
    try:
        with torch.no_grad(), processes.autocast():
            for ids, targets, _ in micro_batches:
                model(ids.to(processes.device), targets.to(processes.device))
    finally:
        for hook in hooks:
            hook.remove()
    return f"{found[0]} went first" if found else None


def _bad_gradient(plain: LanguageModel) -> str | None:
    """The backward pass runs from the last parameter to the first."""
    grads = [(name, p.grad) for name, p in plain.named_parameters() if p.grad is not None]
    bad = [name for name, grad in grads if not _finite(grad)]
    return f"all layers are finite forward, the gradient of {bad[-1]} went first" if bad else None


def _finite(tensor: Any) -> bool:
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(part.isfinite().all())


def _looks(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, _: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        floats = [p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point()]
        if not found and not all(_finite(p) for p in floats):
            found.append(f"{name} ({type(module).__name__})")

    return hook

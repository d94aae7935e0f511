"""Where a number stopped being finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from equipoise.lab.model import LanguageModel


def first_not_finite(
    model: nn.Module, plain: LanguageModel, micro_batches: Sequence[Any], device: Any
) -> str:
    """Which weight, or which layer's output on these micro-batches, is the first with NaN or infinity."""
    for name, parameter in plain.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the weight {name} is not finite"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_looks(name, found))
        for name, module in plain.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            for ids, targets, _ in micro_batches:
                model(ids.to(device), targets.to(device))
                if found:
                    return f"{found[0]} went first"
    finally:
        for hook in hooks:
            hook.remove()
    bad = [
        n for n, p in plain.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    if bad:
        return f"all layers are finite forward, the gradient of {bad[-1]} went first"
    return "no weight and no layer's output shows it on its own"


def _looks(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, _: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        floats = [p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point()]
        if not found and any(not bool(p.isfinite().all()) for p in floats):
            found.append(f"{name} ({type(module).__name__})")

    return hook

"""Models that torch.compile has already compiled: they have to be traced again to be heard."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from equipoise.models.scan import Scan


def is_compiled(module: nn.Module) -> bool:
    """Whether any of the ways to compile a module was used on this one."""
    inside = vars(module)
    return (
        type(module).__name__ == "OptimizedModule"
        or inside.get("_compiled_call_impl") is not None
        or inside.get("_compiled_call") is not None
        or hasattr(inside.get("forward"), "_torchdynamo_orig_callable")
    )


def refresher(scan: Scan) -> Callable[[], None]:
    """A function that drops compiled code, if there is any, so that new hooks are traced.

    Compiled code does not look at hooks added later. Dropping it costs a compilation at the next
    forward pass, never a result.
    """

    def refresh() -> None:
        if any(is_compiled(module) for module in scan.model.modules()):
            torch.compiler.reset()

    return refresh

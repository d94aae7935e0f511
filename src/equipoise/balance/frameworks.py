"""The model's own balancing terms: switched off while a balancer is attached, then restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

SWITCHES = ("output_router_logits",)
"""Config flags that make a model compute a balancing loss and add it to its own."""
COEFFICIENTS = (
    "router_aux_loss_coef",
    "aux_loss_coef",
    "aux_loss_alpha",
    "moe_loss_weight",
    "router_z_loss_coef",
    "z_loss_coef",
)
"""What the weight of such a loss is called, in configs and on modules."""


def switch_off(model: nn.Module) -> Callable[[], None]:
    """Set flags to False and weights to 0, wherever a module or config has them; returns the undo.

    The weights too, because a caller may ask for router logits in the call itself.
    """
    changed: list[tuple[Any, str, Any]] = []
    for owner in _owners(model):
        for name in (*SWITCHES, *COEFFICIENTS):
            value = vars(owner).get(name)
            if isinstance(value, bool | int | float) and value:
                changed.append((owner, name, value))
                setattr(owner, name, type(value)(0))

    def undo() -> None:
        for owner, name, value in changed:
            setattr(owner, name, value)

    return undo


def _owners(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        yield module
        config = getattr(module, "config", None)
        for part in _configs(config):
            if id(part) not in seen:
                seen.add(id(part))
                yield part


def _configs(config: Any) -> Iterator[Any]:
    if config is None or not hasattr(config, "__dict__"):
        return
    yield config
    for name, part in list(vars(config).items()):
        if name.endswith("_config") and hasattr(part, "__dict__"):
            yield from _configs(part)

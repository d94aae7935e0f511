"""The model's own balancing terms: switched off while a balancer is attached, then restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

SWITCH = "output_router_logits"
"""The flag that makes a model compute a balancing loss and add it to its own."""
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
    """Set the weights of the model's own balancing losses to 0; returns the undo.

    On its modules, which take them from the config when they are made; in the config itself, which
    checkpoints hold, only where no module has one. The flag is left to callers: it only costs time.
    """
    changed: list[tuple[Any, str, Any]] = []

    def zero(owners: Iterable[Any]) -> None:
        for owner in owners:
            for name in COEFFICIENTS:
                value = vars(owner).get(name)
                if isinstance(value, int | float) and not isinstance(value, bool) and value:
                    changed.append((owner, name, value))
                    setattr(owner, name, type(value)(0))

    zero(model.modules())
    if not changed:
        zero(_configs_of(model))

    def undo() -> None:
        for owner, name, value in changed:
            setattr(owner, name, value)

    return undo


def _configs_of(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        for part in _configs(getattr(module, "config", None)):
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

"""The model's own balancing terms: switched off while a balancer is attached, then restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


class OwnTerms:
    """The weights of a model's own balancing losses, put to 0 and back.

    Modules take them from the config when they are made: those stay 0 until `restore`. Some families
    read the config at every call: it says 0 during a forward pass only (`hide`, `show`), so that a
    checkpoint saved while attached keeps what the config said. Passes may be nested, and models may
    share a config: each `show` puts back what its `hide` found.
    """

    def __init__(self, model: nn.Module) -> None:
        self._configs = _named(_configs_of(model))
        self._of_modules = _set_zero(_named(model.modules()))
        self._hidden: list[list[Kept]] = []

    def hide(self) -> None:
        """A forward pass begins."""
        self._hidden.append(_set_zero(self._configs))

    def show(self) -> None:
        """The forward pass that began last ended, however it did."""
        _set_back(self._hidden.pop())

    def restore(self) -> None:
        """Leave the model as it was found."""
        while self._hidden:
            self.show()
        _set_back(self._of_modules)


Named = tuple[Any, str]
Kept = tuple[Any, str, float]


def _named(owners: Iterable[Any]) -> list[Named]:
    """Where such weights stand: owner and name."""
    return [
        (owner, name)
        for owner in owners
        for name in COEFFICIENTS
        if isinstance(value := vars(owner).get(name), int | float) and not isinstance(value, bool)
    ]


def _set_zero(named: Iterable[Named]) -> list[Kept]:
    kept = [(owner, name, getattr(owner, name)) for owner, name in named]
    kept = [(owner, name, value) for owner, name, value in kept if value]
    for owner, name, value in kept:
        setattr(owner, name, type(value)(0))
    return kept


def _set_back(kept: Iterable[Kept]) -> None:
    for owner, name, value in kept:
        setattr(owner, name, value)


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

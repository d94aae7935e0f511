"""What is asked for: `Loss(objective, scope, weight)` and `Bias(controller, scope)`, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from torch import Tensor

from equipoise.balance import catalogue
from equipoise.balance.catalogue import Objective
from equipoise.balance.conventions import CONVENTIONS, convert
from equipoise.balance.scopes import Scope, named
from equipoise.errors import EquipoiseError, nearest

Count = Literal["selected", "unbiased", "kept"]
"""Which selections make the load: those that were made, those of the scores without the selection
bias, or those that were left after capacity."""
COUNTS = ("selected", "unbiased", "kept")
Weight = float | Callable[[int], float]


class WeightController(Protocol):
    """Sets the weight of a loss, layer by layer, from what the last step measured."""

    measure: str
    """The measure that `update` is given: "max_vio" or "dropped_share"."""

    def update(
        self, *, weight_L: Tensor, measure_L: Tensor, step: int, state: dict[str, Tensor]
    ) -> Tensor:
        """The new weights."""
        ...


@dataclass(frozen=True, repr=False)
class Loss:
    """A balancing loss: its gradient is added to the routers', the model's own loss is untouched.

    The value is 1 at perfect balance (z and others say what theirs is), per layer, then averaged
    over layers. `weight` is a number or a schedule from step to number; `controller` steers it.
    """

    objective: str | Objective
    scope: str | Scope = "global"
    weight: Weight = 1e-3
    count: Count = "selected"
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the objective needs besides: `groups=` of the group and communication losses, ..."""
    controller: WeightController | None = None
    convention: str = "equipoise"
    """Whose normalisation `weight` is given in: see `conventions.CONVENTIONS`."""
    name: str = ""
    """In metrics and checkpoints; by default objective and scope."""

    def __post_init__(self) -> None:
        objective = catalogue.find(self.objective, dict(self.options))
        scope = named(self.scope)
        object.__setattr__(self, "objective", objective)
        object.__setattr__(self, "scope", scope)
        if not callable(self.weight) and not isinstance(self.weight, int | float):
            raise EquipoiseError(
                f"Loss({objective.name!r}): weight={self.weight!r} is neither a number nor a "
                "schedule (a function of the step)."
            )
        if self.controller is not None and not hasattr(self.controller, "measure"):
            raise EquipoiseError(
                f"Loss({objective.name!r}): controller={self.controller!r} steers a bias; the "
                "weight of a loss is steered by TargetMaxVio or DropRate."
            )
        if not callable(self.weight) and not (
            math.isfinite(self.weight) and (self.weight >= 0 or objective.signed)
        ):
            raise EquipoiseError(
                f"Loss({objective.name!r}): weight={self.weight} has to be a finite number of at "
                "least 0."
            )
        if self.count not in COUNTS:
            raise EquipoiseError(
                f"Loss({objective.name!r}): count={self.count!r} is not one of {', '.join(COUNTS)}."
                f"{nearest(str(self.count), COUNTS)}"
            )
        if self.count != "selected" and (
            objective.name == "communication" or scope.name == "subset"
        ):
            raise EquipoiseError(
                f"Loss({objective.name!r}, {scope.name!r}): count={self.count!r} is not to be had "
                "with the communication loss or scope='subset'; they count what was selected."
            )
        if self.convention not in CONVENTIONS:
            raise EquipoiseError(
                f"Loss({objective.name!r}): convention={self.convention!r} is not one of "
                f"{', '.join(CONVENTIONS)}.{nearest(self.convention, CONVENTIONS)}"
            )
        if self.convention != "equipoise" and objective.name != "switch":
            raise EquipoiseError(
                f"Loss({objective.name!r}): convention={self.convention!r} converts weights of the "
                "switch loss only; give this one in ours."
            )
        if not self.name:
            object.__setattr__(self, "name", self._usual_name())

    def __repr__(self) -> str:
        scope = scope_of(self)
        shown: dict[str, Any] = {"scope": scope if fields(scope) else scope.name}
        shown["weight"] = self.weight
        usual: dict[str, Any] = {
            "count": "selected",
            "options": {},
            "controller": None,
            "convention": "equipoise",
            "name": self._usual_name(),
        }
        shown |= {key: getattr(self, key) for key in usual if getattr(self, key) != usual[key]}
        told = (f"{key}={value!r}" for key, value in shown.items())
        return f"Loss({', '.join([repr(objective_of(self).name), *told])})"

    def _usual_name(self) -> str:
        kind = "" if self.count == "selected" else f"_{self.count}"
        return f"{objective_of(self).name}_{scope_of(self).name}{kind}"

    def factor(self, *, top_k: int, num_layers: int, num_experts: int, ranks: int) -> float:
        """What turns `weight` into ours, for a model of this shape."""
        return convert(
            1.0,
            self.convention,
            top_k=top_k,
            num_layers=num_layers,
            num_experts=num_experts,
            world_size=ranks,
        )

    def weight_at(self, step: int) -> float:
        """The weight of one optimizer step."""
        return float(self.weight(step)) if callable(self.weight) else float(self.weight)


def objective_of(loss: Loss) -> Objective:
    """The objective that a loss names."""
    assert isinstance(loss.objective, Objective)
    return loss.objective


def scope_of(loss: Loss) -> Scope:
    """The scope that a loss names."""
    assert isinstance(loss.scope, Scope)
    return loss.scope


@dataclass(frozen=True)
class Bias:
    """A selection bias that `controller` moves without gradient, once per optimizer step.

    scope="global": from the selections of the whole step, all ranks and micro-batches.
    scope="micro": each rank and micro-batch gives an update of its own, and their mean is taken
    (what trainers do that forget to add up; kept for comparison).
    """

    controller: Any
    scope: Literal["global", "micro"] = "global"

    def __post_init__(self) -> None:
        if isinstance(self.controller, type) or not callable(
            getattr(self.controller, "update", None)
        ):
            raise EquipoiseError(
                f"Bias({self.controller!r}): a controller with update() is needed, such as "
                "Sign(rate=1e-3)."
            )
        if self.scope not in ("global", "micro"):
            raise EquipoiseError(f"Bias: scope={self.scope!r} is not one of global, micro.")
        if self.scope == "micro" and hasattr(self.controller, "observe"):
            raise EquipoiseError(
                f"Bias: {type(self.controller).__name__} gathers scores over the whole step; "
                'it knows no scope="micro".'
            )

"""The objectives by name: which statistics each needs, and how its gradient reaches the scores.

Four kinds. "load": a function of load f and mean probability P of a scope; a token's gradient
follows from dL/dP. "token": a mean over tokens, of scores or of what the selected experts put out.
"batch": a function of all probabilities of this rank's micro-batch. "weight": a function of the
router's weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from equipoise.balance import objectives
from equipoise.errors import EquipoiseError, nearest

Kind = Literal["load", "token", "batch", "weight"]


@dataclass(frozen=True, repr=False)
class Objective:
    """A loss and what it is computed from.

    `value` takes, by keyword: load_E and prob_E ("load", leading dimensions allowed), probs_TE,
    logits_TE or outputs_TKD ("token", one value per token), probs_TE and valid_T ("batch"),
    weight_ED ("weight").
    """

    name: str
    kind: Kind
    value: Callable[..., Tensor]
    slope: Callable[[Tensor], Tensor] | None = None
    """dL/dP as a function of the load alone, where it does not depend on P."""
    reads: Literal["probs", "logits", "outputs"] = "probs"
    """What "token" and "batch" are functions of; "outputs" are those of single experts."""
    signed: bool = False
    """A negative weight makes sense."""
    ideal: float | None = 1.0
    """The value at perfect balance, None where there is no such value."""
    groups: tuple[int, ...] = ()
    """The group of each expert, of objectives that count tokens sent to groups."""
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        return f"Objective({self.name!r}, {self.kind!r})"

    @property
    def argument(self) -> str:
        """The keyword by which `value` takes what it reads."""
        return "outputs_TKD" if self.reads == "outputs" else f"{self.reads}_TE"

    @property
    def needs_prob(self) -> bool:
        """The gradient depends on the mean probability of the scope, not only on the load."""
        return self.kind == "load" and self.slope is None

    def dP(self, load_E: Tensor, prob_E: Tensor | None) -> Tensor:
        """The gradient with respect to the mean probabilities, in the shape of the load."""
        if self.slope is not None:
            return self.slope(load_E)
        assert prob_E is not None
        with torch.enable_grad():
            prob = prob_E.detach().requires_grad_()
            value = self.value(load_E=load_E.detach(), prob_E=prob)
            return torch.autograd.grad(value.sum(), prob)[0]


def _switch_slope(load_E: Tensor) -> Tensor:
    return load_E * load_E.shape[-1]


def _squared_slope(load_E: Tensor) -> Tensor:
    return 2 * load_E * load_E.shape[-1]


def _communication(
    *, load_E: Tensor, prob_E: Tensor, group_of_E: Tensor, num_groups: int
) -> Tensor:
    return objectives.communication(
        sent_G=load_E, prob_E=prob_E, group_of_E=group_of_E, num_groups=num_groups
    )


def _group_slope(load_E: Tensor, *, group_of_E: Tensor, num_groups: int) -> Tensor:
    load_G = load_E.new_zeros(*load_E.shape[:-1], num_groups)
    group_of_E = group_of_E.to(load_E.device)
    index = group_of_E.expand_as(load_E)
    size_E = torch.bincount(group_of_E, minlength=num_groups)[group_of_E]
    load_E = load_G.scatter_add_(-1, index, load_E).gather(-1, index)
    return load_E * len(group_of_E) / size_E


CATALOGUE: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("switch", "load", objectives.switch, slope=_switch_slope),
        Objective("squared", "load", objectives.squared, slope=_squared_slope),
        Objective("importance", "load", objectives.importance),
        Objective("load_cv", "load", objectives.load_cv, slope=_squared_slope),
        Objective("group", "load", objectives.group, required=("groups",)),
        Objective("communication", "load", _communication, required=("groups",)),
        Objective("z", "token", objectives.z, reads="logits", ideal=None),
        Objective("entropy", "token", objectives.entropy, signed=True, ideal=None),
        Objective("score_variance", "batch", objectives.score_variance, ideal=None),
        Objective(
            "output_orthogonality",
            "token",
            objectives.output_orthogonality,
            reads="outputs",
            ideal=None,
        ),
        Objective(
            "router_orthogonality",
            "weight",
            objectives.router_orthogonality,
            options=("kind",),
            ideal=None,
        ),
    )
}


def find(objective: str | Objective, options: dict[str, Any]) -> Objective:
    """The objective of a name with its options, or the given one; EquipoiseError if unknown."""
    if isinstance(objective, Objective):
        return objective
    if objective not in CATALOGUE:
        raise EquipoiseError(
            f"Loss({objective!r}): not one of {', '.join(CATALOGUE)}."
            f"{nearest(str(objective), CATALOGUE)} A function of load_E and prob_E goes in as"
            ' Objective(name, "load", function).'
        )
    found = CATALOGUE[objective]
    allowed = {*found.options, *found.required}
    for name in options:
        if name not in allowed:
            raise EquipoiseError(
                f"Loss({objective!r}): no option {name!r}; it takes "
                f"{', '.join(sorted(allowed)) or 'none'}."
            )
    for name in found.required:
        if name not in options:
            raise EquipoiseError(f"Loss({objective!r}) needs options={{{name!r}: ...}}.")
    if options.get("kind") not in (None, "ernie", "simbal"):
        raise EquipoiseError(
            f"Loss({objective!r}): kind={options['kind']!r} is not one of ernie, simbal."
        )
    if "groups" in options:
        return _grouped(found, options["groups"])
    return replace(found, value=partial(found.value, **options)) if options else found


def _grouped(objective: Objective, groups: Any) -> Objective:
    """`groups` is the number of equal groups, or the group of each expert."""
    if isinstance(groups, int):
        return replace(objective, groups=(-groups,))
    return replace(objective, groups=tuple(int(g) for g in groups))


def fitted(objective: Objective, num_experts: int, path: str) -> Objective:
    """An objective for a layer of `num_experts`; EquipoiseError where its groups do not fit."""
    if not objective.groups:
        return objective
    if objective.groups[0] < 0:
        number = -objective.groups[0]
        if number == 0 or num_experts % number:
            raise EquipoiseError(
                f"Loss({objective.name!r}): {num_experts} experts of {path} do not divide into "
                f"{number} equal groups. Give the group of each expert as a list."
            )
        group_of_E = torch.arange(num_experts) // (num_experts // number)
    else:
        group_of_E = torch.tensor(objective.groups)
        if len(group_of_E) != num_experts:
            raise EquipoiseError(
                f"Loss({objective.name!r}): groups names {len(group_of_E)} experts, but {path} has "
                f"{num_experts}."
            )
    number = int(group_of_E.max()) + 1
    value = partial(objective.value, group_of_E=group_of_E, num_groups=number)
    slope = None
    if objective.name == "group":
        slope = partial(_group_slope, group_of_E=group_of_E, num_groups=number)
    return replace(objective, value=value, slope=slope, groups=tuple(group_of_E.tolist()))


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes a keyword of this name."""
    return name in inspect.signature(function).parameters

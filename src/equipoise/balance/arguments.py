"""What `attach` is given, checked before anything is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from equipoise.balance.adversary import Adversarial
from equipoise.balance.lifecycle import Lifecycle
from equipoise.balance.terms import Bias, Loss
from equipoise.errors import EquipoiseError
from equipoise.nn.limiter import Capacity as Settings

Term = Loss | Bias | Settings | Lifecycle | Adversarial
Kind = TypeVar("Kind")


def check_arguments(model: Any, optimizer: Any, accumulation: Any, layers: Any) -> None:
    """EquipoiseError for what is of the wrong kind, before anything is looked at."""
    if not isinstance(model, nn.Module):
        raise EquipoiseError(f"attach: {type(model).__name__} is no model (torch.nn.Module).")
    check_accumulation(accumulation)
    if layers is not None and not callable(layers):
        raise EquipoiseError(
            f"attach: layers={layers!r} is not callable; give a function of a site that says "
            "whether to balance it, such as layers=lambda site: site.layer > 0."
        )
    if optimizer is None:
        return
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise EquipoiseError(f"attach: optimizer={optimizer!r} is no torch.optim.Optimizer.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise EquipoiseError(
            "attach: the optimizer holds no parameter of this model, so its step() would end steps "
            "of another. Make it of model.parameters(), after wrapping the model."
        )


def check_accumulation(value: Any) -> None:
    """EquipoiseError for what is no number of micro-batches."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EquipoiseError(
            f"accumulation={value!r}: at least one micro-batch a step, as a whole number."
        )


def sorted_terms(terms: Sequence[Term]) -> tuple[list[Loss], Bias | None]:
    """The losses and the bias among the terms; EquipoiseError for terms that do not go together."""
    losses = [term for term in terms if isinstance(term, Loss)]
    biases = [term for term in terms if isinstance(term, Bias)]
    for term in terms:
        if not isinstance(term, Term):
            raise EquipoiseError(
                f"attach: {term!r} is none of Loss, Bias, Capacity, Lifecycle, Adversarial; a "
                "controller goes into Bias(...)."
            )
    if len(biases) > 1:
        raise EquipoiseError(
            f"attach: {len(biases)} biases would move one selection bias. Give one, or a "
            "controller of your own that combines them."
        )
    names = [loss.name for loss in losses]
    for name in names:
        if names.count(name) > 1:
            raise EquipoiseError(
                f"attach: two losses are called {name!r}. Give each its own Loss(..., name=...)."
            )
    return losses, biases[0] if biases else None


def only(terms: Sequence[Any], kind: type[Kind]) -> Kind | None:
    """The one term of a kind."""
    found = [term for term in terms if isinstance(term, kind)]
    if len(found) > 1:
        raise EquipoiseError(f"attach: {len(found)} terms of one kind: {found!r}. Give one.")
    return found[0] if found else None

"""Where the weights of single experts and router rows lie, and the optimizer's memory of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite
from equipoise.models.describe import BIAS_NAMES
from equipoise.nn.free import FreeExperts

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""The optimizer's averages of gradients, by the names that PyTorch gives them."""
_NO_EXPERTS_HERE = ("Llama4Router", "JetMoeTopKGating", "DogeCDMoE")


@dataclass(frozen=True, eq=False)
class Row:
    """One expert's part of a parameter: rows [start, end) of its first dimension."""

    parameter: nn.Parameter
    start: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor that is shaped as the parameter in its first dimension."""
        return tensor[self.start : self.end]


Rows = Sequence[Row]
"""One per expert, alike in shape."""


def expert_rows(site: RouterSite) -> list[Rows]:
    """The weights of each expert of a site; EquipoiseError where any of them cannot be told.

    Stacked parameters [E, ...], parameters [E F, D] of DBRX, and one module per expert are known.
    A norm's weight that all experts share is left alone.
    """
    module = site.module.experts if isinstance(site.module, FreeExperts) else site.module
    if type(module).__name__ in _NO_EXPERTS_HERE:
        raise EquipoiseError(f"{_where(site)}its experts' weights are not known to Lifecycle.")
    several = _one_module_each(module, site.num_experts)
    if several:
        return several
    found: list[Rows] = []
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and name.endswith("norm.weight"):
            continue
        found.append(_stacked(site, name, parameter))
    if not found:
        raise EquipoiseError(f"{_where(site)}{type(module).__name__} holds no parameters.")
    return found


def _stacked(site: RouterSite, name: str, parameter: nn.Parameter) -> Rows:
    experts, length = site.num_experts, parameter.shape[0] if parameter.ndim else 0
    each = 0
    if length in (experts, experts + site.null_experts):
        each = 1
    elif type(site.module).__name__ == "DbrxExperts" and length % experts == 0:
        each = length // experts
    if not each:
        raise EquipoiseError(
            f"{_where(site)}{name} {list(parameter.shape)} is not stacked over {experts} experts "
            "(experts spread over processes cannot be revived)."
        )
    return [Row(parameter, e * each, (e + 1) * each) for e in range(experts)]


def _one_module_each(module: nn.Module, experts: int) -> list[Rows]:
    children = list(module.children())
    if len(children) != experts or any(True for _ in module.parameters(recurse=False)):
        return []
    held = [list(child.parameters()) for child in children]
    if len({tuple(p.shape for p in parameters) for parameters in held}) != 1:
        return []
    alike = zip(*held, strict=True)
    return [[Row(p, 0, len(p)) for p in parameters] for parameters in alike]


def router_rows(site: RouterSite, router: nn.Module) -> list[Rows]:
    """What the router holds for each expert: rows of its weight [E, D], entries of its bias [E]."""
    width = site.num_experts + site.null_experts
    found: list[Rows] = [
        [Row(parameter, e, e + 1) for e in range(site.num_experts)]
        for name, parameter in router.named_parameters()
        if parameter.ndim in (1, 2)
        and parameter.shape[0] == width
        and not re.search(BIAS_NAMES, name)
        and parameter.requires_grad
    ]
    if not any(rows[0].parameter.ndim == 2 for rows in found):
        raise EquipoiseError(
            f"{_where(site)}{type(router).__name__} holds no trainable weight [{width}, D]."
        )
    return found


def check_rows(site: RouterSite, rows: Sequence[Rows]) -> None:
    """EquipoiseError where rows cannot be written: sharded, or not in training."""
    for row in _distinct(rows):
        if hasattr(row.parameter, "full_tensor"):
            raise EquipoiseError(
                f"{_where(site)}its weights are sharded (FSDP2, DTensor), and an expert cannot be "
                "copied across shards. Lifecycle(dead='freeze') and dead='retire' work there, and "
                "a reserve with woken='own'."
            )
        if not row.parameter.requires_grad:
            raise EquipoiseError(
                f"{_where(site)}a weight {list(row.parameter.shape)} of its experts does not train: "
                "nothing would set a copy apart from what it was copied from."
            )


def _distinct(rows: Sequence[Rows]) -> Iterator[Row]:
    seen: set[int] = set()
    for several in rows:
        for row in several:
            if id(row.parameter) not in seen:
                seen.add(id(row.parameter))
                yield row


def check_optimizer(rows: Sequence[Rows], optimizer: torch.optim.Optimizer | None) -> None:
    """EquipoiseError unless the optimizer is known and holds all the parameters."""
    if optimizer is None:
        raise EquipoiseError(
            "Lifecycle: an expert is to be revived, and its optimizer state with it, but no "
            "optimizer is known. Give attach() optimizer=, or set handle.trained_by = optimizer."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for row in _distinct(rows):
        if id(row.parameter) not in held:
            raise EquipoiseError(
                f"Lifecycle: the optimizer does not hold the expert's parameter "
                f"{list(row.parameter.shape)} (does it keep master weights of its own?)."
            )


@torch.no_grad()
def copy_row(to: Row, source: Row, noise: float, generator: torch.Generator) -> None:
    """The parameter's rows of one expert become another's plus noise of `noise` standard deviations.

    Noise is drawn on the CPU, so that every rank and every device draws the same. The gradient of
    the step under way is of the old rows: it is set to zero.
    """
    was = source.of(source.parameter.data)
    drawn = torch.randn(was.shape, generator=generator).to(was.device)
    spread = was.float().std(correction=0) if was.numel() > 1 else was.float().abs()
    to.of(to.parameter.data).copy_(was.float() + noise * spread * drawn)
    clear_gradient(to)


def clear_gradient(row: Row) -> None:
    """Set the gradient of the step under way to zero."""
    if row.parameter.grad is not None:
        row.of(row.parameter.grad).zero_()


@torch.no_grad()
def copy_moments(to: Row, source: Row, optimizer: torch.optim.Optimizer, how: str) -> None:
    """What the optimizer remembers of the rows: "fresh", "zero" or "copy" (see `Lifecycle`)."""
    state: dict[str, Any] = optimizer.state.get(to.parameter, {})
    theirs: dict[str, Any] = optimizer.state.get(source.parameter, {})
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.ndim:
            continue
        if tensor.shape[0] != to.parameter.shape[0]:
            continue  # a factored second moment over another dimension, which all experts share
        zeroed = how == "zero" or (how == "fresh" and name in FIRST_MOMENTS)
        if zeroed or name not in theirs:
            to.of(tensor).zero_()
        else:
            to.of(tensor).copy_(source.of(theirs[name]))


def _where(site: RouterSite) -> str:
    return f"{site.path} ({site.family}): Lifecycle cannot revive experts here: "

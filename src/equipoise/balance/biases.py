"""Where the selection biases of a model live, and how they stay float32.

A family with a selection bias of its own keeps it there (and in its checkpoints); for the others
the router's top-k is answered with a bias (models/selection.py), which `handle.state_dict()` saves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.balance.controllers.margins import GroupLimit
from equipoise.balance.controllers.protocol import Acts
from equipoise.balance.places import holders, selecting, sites_of
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite
from equipoise.models.describe import BIAS_NAMES
from equipoise.models.scan import Scan
from equipoise.models.selection import BiasedSelection, refuse_without_selection
from equipoise.nn.selection import GroupLimited


class LayerBias:
    """The selection bias of one layer [E], float32, wherever the model has it.

    `acts`: it is "add"ed to the scores, or they "multiply" by it. `own`: the model holds it itself.
    """

    def __init__(
        self,
        site: RouterSite,
        holders: Iterable[nn.Module],
        selecting: nn.Module,
        device: torch.device,
        *,
        acts: Acts = "add",
    ) -> None:
        self.site, self.acts = site, acts
        self._undo: list[Callable[[], None]] = []
        multiply = acts == "multiply"
        found = None if multiply else own_bias(site, holders)
        if found is None:
            refuse_without_selection(site, selecting)
            self.own = False
            width = site.num_experts + site.null_experts
            self.value_E = torch.full((width,), float(multiply), device=device)
            placed = BiasedSelection(site, selecting, self.value_E, multiply=multiply)
            self._undo.append(placed.remove)
            return
        self.own = True
        self._holder, self._name = found
        self._tensor().data = _local(self._tensor()).data.float()
        self.value_E = self._tensor().data.view(-1)
        self._guard()

    def _tensor(self) -> Tensor:
        tensor: Tensor = getattr(self._holder, self._name)
        return tensor

    def _guard(self) -> None:
        """Keep the bias float32 when the model is cast: other tensors follow, this one does not."""
        holder: Any = self._holder
        before, inner = vars(holder).get("_apply"), holder._apply

        def apply(*args: Any, **kwargs: Any) -> Any:
            kept = self.value_E.clone()
            done = inner(*args, **kwargs)
            tensor = self._tensor()
            tensor.data = kept.view(tensor.shape).to(tensor.device)
            self.value_E = tensor.data.view(-1)
            return done

        holder._apply = apply

        def undo() -> None:
            if before is not None:
                holder._apply = before
            else:
                vars(holder).pop("_apply", None)

        self._undo.append(undo)

    def refresh(self) -> None:
        """Find the bias again where the model replaced its tensor (load_state_dict(assign=True))."""
        if not self.own:
            return
        tensor = self._tensor()
        if tensor.dtype != torch.float32:
            tensor.data = tensor.data.float()
        if tensor.data.data_ptr() != self.value_E.data_ptr():
            self.value_E = tensor.data.view(-1)

    def read(self) -> Tensor:
        """The bias of the experts that compute [E]."""
        self.refresh()
        return self.value_E[: self.site.num_experts]

    def write(self, bias_E: Tensor) -> None:
        """Set it, in place: compiled code and the model's state dict hold this very tensor."""
        self.refresh()
        self.value_E[: self.site.num_experts].copy_(bias_E)

    def remove(self) -> None:
        """Take off what was put on the model; a bias of its own stays as it is."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


def put_back(model: nn.Module, biases: Mapping[int, tuple[Acts, Tensor]]) -> None:
    """Let routers, by number, select with biases [E] that the model has no place for, as in training."""
    scan, sites = Scan(model), sites_of(model, None)
    for number, (acts, bias_E) in biases.items():
        site = sites[number]
        where = selecting(scan, site)
        LayerBias(site, holders(scan, site), where, bias_E.device, acts=acts).write(bias_E)


def own_bias(site: RouterSite, holders: Iterable[nn.Module]) -> tuple[nn.Module, str] | None:
    """The module and name of a selection bias that one of the modules holds itself."""
    width = site.num_experts + site.null_experts
    for module in holders:
        for name, tensor in [
            *module.named_buffers(recurse=False),
            *module.named_parameters(recurse=False),
        ]:
            if re.search(BIAS_NAMES, name) and tensor.numel() == width:
                return module, name
    return None


def group_limit(site: RouterSite, holders: Iterable[nn.Module]) -> GroupLimit | None:
    """The limit on groups under which a router selects, as `equipoise.nn`'s and DeepSeek-V3's tell it."""
    for module in holders:
        selection = getattr(module, "selection", None)
        if isinstance(selection, GroupLimited):
            return GroupLimit(selection.groups, selection.limit, selection.per_group)
        groups = getattr(module, "num_group", getattr(module, "n_group", None))
        limit = getattr(module, "topk_group", None)
        if isinstance(groups, int) and isinstance(limit, int):
            best = min(2, site.num_experts // groups)
            return GroupLimit(groups, limit, best) if limit < groups else None
    return None


def _local(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "to_local"):
        raise EquipoiseError(
            "The selection bias is a parameter that FSDP has sharded: attach before fully_shard(), "
            "or keep it out of it with ignored_params."
        )
    return tensor

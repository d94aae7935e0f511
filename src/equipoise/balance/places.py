"""Where things are: sites to balance, modules that select or hold a bias, ranks that share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite, discover
from equipoise.models.scan import Scan


def sites_of(model: nn.Module, wanted: Callable[[RouterSite], bool] | None) -> list[RouterSite]:
    """The routers to balance; EquipoiseError where there is none."""
    found = discover(model)
    chosen = [site for site in found if wanted is None or wanted(site)]
    # Layers that look experts up in a table have no router to balance.
    chosen = [site for site in chosen if site.score_function != "hash"]
    if not chosen:
        kind = type(model).__name__
        raise EquipoiseError(
            f"{kind}: no router to balance ({len(found)} found, none chosen). "
            + ("Its layers are dense." if not found else "layers= left none.")
        )
    return chosen


def router_of(scan: Scan, site: RouterSite) -> nn.Module:
    """The module that holds a site's router weight: the router, else the block."""
    path = next(p for p, module in scan.modules.items() if module is site.module)
    return scan.router_beside(path) or site.module


def holders(scan: Scan, site: RouterSite) -> list[nn.Module]:
    """Modules that may hold a site's selection bias: its router, its block, and around these."""
    path = next(p for p, module in scan.modules.items() if module is site.module)
    inside = [*scan.modules[site.path].modules(), *router_of(scan, site).modules()]
    return list(dict.fromkeys([*inside, scan.parent(path)[1]]))


def selecting(scan: Scan, site: RouterSite) -> nn.Module:
    """The module in whose forward a site selects: its router, or the block where the router only
    gives logits."""
    router = router_of(scan, site)
    return scan.modules[site.path] if site.selects_in_block else router


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    tensor = next(module.parameters(), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def group_of(model: nn.Module, group: Any) -> Any:
    """The process group to count over, None for one process."""
    if group is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise EquipoiseError("attach: group= was given, but torch.distributed is not running.")
        return None
    if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    if group is None:
        group = sharded_over(model)
    if hasattr(group, "get_group"):  # a DeviceMesh
        group = group.get_group() if group.ndim == 1 else group._flatten().get_group()
    if group is None and dist.get_world_size() > 1:
        raise EquipoiseError(
            f"attach: {dist.get_world_size()} processes run, and the model is wrapped by neither "
            "DistributedDataParallel nor FSDP2: say which ranks share a batch with group= "
            "(torch.distributed.group.WORLD, a process group, a DeviceMesh), or group=False."
        )
    return group


def sharded_over(model: nn.Module) -> Any:
    """The device mesh of FSDP2's sharded parameters."""
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            return mesh
    return None

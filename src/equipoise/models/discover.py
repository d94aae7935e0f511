"""Find every router of a model, or say which layers cannot be seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from equipoise.models import adapters, compiled, coverage, experts
from equipoise.models.scan import Scan
from equipoise.models.sites import RouterSite


def discover(model: nn.Module) -> list[RouterSite]:
    """Every router site of a model, stacks in the model's order, layers as numbers.

    A dense model gives []. Raises RoutingError for a model that has experts of which some cannot
    be heard, naming what was seen and what is configured; docs/architectures.md lists what is
    covered. Works on models wrapped by torch.compile, DistributedDataParallel or accelerate.
    """
    scan = Scan(model)
    adapters.refuse_by_name(scan)
    sites = list(_sites(scan))
    coverage.check(scan, sites)
    refresh = compiled.refresher(scan)
    order = {stack: at for at, stack in reversed(list(enumerate(site.stack for site in sites)))}
    for site in sites:
        site.family = scan.family
        site.refresh = refresh
    return sorted(sites, key=lambda site: (order[site.stack], site.layer))


def _sites(scan: Scan) -> Iterator[RouterSite]:
    for path, module in scan.modules.items():
        adapter: Any = adapters.adapter_of(module)
        if adapter is not None:
            yield adapter(scan, path, module)
        elif experts.argument_names(module) is not None and not _inside_experts(scan, path):
            yield experts.site(scan, path, module)


def _inside_experts(scan: Scan, path: str) -> bool:
    """Experts within experts (zero and copy experts around computing ones) are heard outside."""
    above = path.rpartition(".")[0]
    return above != path and experts.argument_names(scan.modules[above]) is not None

"""Hold the sites that were found against what the model holds and what its config says."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from equipoise.errors import RoutingError
from equipoise.models import configs
from equipoise.models.scan import Scan
from equipoise.models.sites import RouterSite

_LISTED = 6


def check(scan: Scan, sites: list[RouterSite]) -> None:
    """Raise RoutingError where experts exist, or are configured, that no site hears."""
    _refuse_bypass(scan, sites)
    heard = {site.path for site in sites}
    if len(heard) != len(sites):
        raise RoutingError(
            f"{scan.family}: {len(sites)} routers at {len(heard)} different paths; sites have to "
            "be told apart by path. Please report this model."
        )
    silent = [path for path in holders(scan) if not _covered(path, heard)]
    if silent:
        raise RoutingError(
            f"{scan.family}: {len(silent)} modules hold experts that no router site hears "
            f"({_some(silent)}), beside {len(sites)} that are heard. Their forward does not take "
            "(hidden_states, top_k_index, top_k_weights), and Equipoise has no adapter for them."
        )
    if not sites and scan.config is not None and configs.is_moe_config(scan.config):
        raise RoutingError(
            f"{scan.family}: no router found, although the config says "
            f"{_configured(scan.config)}. Load the model with transformers 5.17 or later, without "
            "remote code and without kernels that replace the MoE block."
        )
    _check_layers(scan, sites)


def holders(scan: Scan) -> list[str]:
    """Paths of modules that hold experts: stacked weights [E, ...], or lists of expert modules."""
    return [path for path, module in scan.modules.items() if _holds_experts(scan, path, module)]


def _holds_experts(scan: Scan, path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2].lower()
    called = name + type(module).__name__.lower()
    if "shared" in called or not ("expert" in called or "moe" in called):
        return False
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return "expert" in called and len(module) > 1
    count = configs.count(scan.config_of(path), *configs.EXPERT_KEYS)
    stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]
    return any(size > 1 and (count is None or size == count) for size in stacked)


def _covered(path: str, heard: set[str]) -> bool:
    return any(
        path == site or path.startswith(site + ".") or site.startswith(path + ".") for site in heard
    )


def _check_layers(scan: Scan, sites: list[RouterSite]) -> None:
    # Each stack has its own config; where that says which layers are MoE, all have to be heard.
    stacks = {site.stack: scan.config_of(site.path) for site in sites}
    for stack, config in stacks.items():
        wanted = {
            layer
            for layer in configs.moe_layers(config) or ()
            if f"{stack}.{layer}" in scan.modules
        }
        heard = {site.layer for site in sites if site.stack == stack}
        missing = sorted(wanted - heard)
        if missing:
            raise RoutingError(
                f"{scan.family}: {len(wanted & heard)} of {len(wanted)} MoE layers configured in "
                f"{stack} have a router site; none was found in layers {_some(missing)}. Their "
                "blocks were replaced by something that Equipoise cannot hear."
            )


def _refuse_bypass(scan: Scan, sites: list[RouterSite]) -> None:
    for site in sites:
        experts, block = site.module, scan.modules.get(site.path)
        if hasattr(experts, "forward_routed") and not getattr(experts, "_is_hooked", False):
            raise RoutingError(
                f"{site.path}: {type(experts).__name__} routes inside an MXFP4 kernel that no hook "
                "hears. Load the model dequantised: from_pretrained(..., "
                "quantization_config=Mxfp4Config(dequantize=True))."
            )
        kernel = _replacement(block) if block is not None and block is not experts else None
        if kernel is not None:
            raise RoutingError(
                f"{site.path}: the forward of {type(block).__name__} was replaced by the kernel "
                f"{kernel}, which bypasses the router. Load the model with use_kernels=False."
            )


def _replacement(block: nn.Module) -> str | None:
    # The kernels library binds another class's forward to the instance; accelerate keeps the old.
    inside = vars(block)
    forward = inside.get("_old_forward", inside.get("forward"))
    if isinstance(forward, MethodType) and forward.__func__ is not type(block).forward:
        return str(forward.__func__.__qualname__)
    return None


def _configured(config: Any) -> str:
    for part in configs.parts(config):
        if configs.has_experts(part):
            return f"{configs.count(part, *configs.EXPERT_KEYS)} experts in {type(part).__name__}"
    return "experts"


def _some(items: list[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:_LISTED])
    return shown + (f" and {len(items) - _LISTED} more" if len(items) > _LISTED else "")

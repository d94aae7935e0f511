"""What a router chooses from and how: read from modules and config, for the site's description."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

from equipoise.errors import RoutingError
from equipoise.models import configs
from equipoise.models.scan import Scan

BIAS_NAMES = r"correction_bias|expert_bias|balancing_bias|selection_bias"
"""What a bias that acts on selection only is called."""
_BIAS = re.compile(rf"{BIAS_NAMES}|moe_static")
_GIVES_PROBABILITIES = ("Gemma4TextRouter", "DiffusionGemmaTextRouter")
"""Routers that return probabilities where others return logits."""
_COMPARES_LOGITS = (
    "AriaTextTopKRouter",
    "Cohere2MoeTopKRouter",
    "GptOssTopKRouter",
    "GraniteMoeTopKRouter",
    "GraniteMoeSWATopKRouter",
    "GraniteMoeHybridTopKRouter",
    "GraniteMoeSharedTopKRouter",
    "JetMoeTopKGating",
    "Kolibri1TopKRouter",
    "Llama4Router",
    "OpenAIPrivacyFilterTopKRouter",
)
"""Routers whose top-k is taken over logits; others apply the score function first."""
_SELECTS_IN_BLOCK = ("DbrxRouter",)
_COUNT_NAMES = ("num_experts", "num_routed_experts", "n_routed_experts", "num_local_experts")
_TOP_K_NAMES = ("top_k", "num_experts_per_tok", "topk", "moe_topk", "moe_top_k", "k")


def _attribute(modules: list[nn.Module], names: tuple[str, ...]) -> int | None:
    for module in modules:
        for name in names:
            found = getattr(module, name, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None


def leading_dimensions(experts: nn.Module) -> set[int]:
    """First dimensions of the stacked expert weights [E, ...] that a module holds itself."""
    return {p.shape[0] for p in experts.parameters(recurse=False) if p.ndim == 3}


def num_experts(experts: nn.Module, config: Any, path: str) -> int:
    """Experts of a layer: as the module says, else the config; its weights have to agree.

    Expert parallelism leaves a share of the weights in each process: there the config decides.
    """
    stated = _attribute([experts], _COUNT_NAMES)
    configured = configs.count(config, *configs.EXPERT_KEYS)
    if getattr(experts, "_is_expert_parallel", False) and configured:
        return configured
    held = leading_dimensions(experts)
    found = stated or configured or next(iter(held), None)
    if found is None:
        raise RoutingError(
            f"{path}: neither the config nor {type(experts).__name__} says how many experts "
            "there are. Please report this model."
        )
    if held and found not in held:
        raise RoutingError(
            f"{path}: weights for {sorted(held)} experts are there, but {found} are configured. "
            "Load the model with a config that agrees with its weights."
        )
    return found


def top_k(modules: list[nn.Module], config: Any, path: str) -> int:
    """Experts selected for each token, from the router, its block or the config."""
    found = _attribute(modules, _TOP_K_NAMES) or configs.count(config, *configs.TOP_K_KEYS)
    if found is None:
        raise RoutingError(
            f"{path}: neither the config nor the router says how many experts a token gets. "
            "Please report this model."
        )
    return found


def score_function(router: nn.Module | None, block: nn.Module, config: Any) -> str:
    """The function that makes scores of the logits: as the router or config says, else its source."""
    stated = getattr(router, "score_function", None)
    if isinstance(stated, str):
        return stated
    if router is not None and hasattr(router, "tid2eid"):
        return "hash"
    configured = configs.value(
        config, "scoring_func", "score_function", "expert_selection_fn", "router_score_function"
    )
    if isinstance(configured, str):
        return configured
    for module in (router, block):
        name = _function_in_source(module) if module is not None else None
        if name:
            return name
    return "unknown"


def _function_in_source(module: nn.Module) -> str | None:
    kind: Any = type(module)
    return _named_function(kind)


@cache
def _named_function(kind: Any) -> str | None:
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return None
    names = ("sparsemixer", "sqrtsoftplus", "sigmoid", "softmax")
    return next((name for name in names if name in source), None)


def scores_are(router: nn.Module | None) -> str:
    """ "probabilities" or "logits": what the router returns as its scores."""
    return "probabilities" if type(router).__name__ in _GIVES_PROBABILITIES else "logits"


def selects_in_block(router: nn.Module | None) -> bool:
    """Whether the router gives logits only, of which the block around it takes the top-k."""
    return type(router).__name__ in _SELECTS_IN_BLOCK


def compares(router: nn.Module | None) -> str:
    """ "logits" or "scores": what the router's top-k compares."""
    stated = getattr(router, "compares", None)
    if isinstance(stated, str):
        return stated
    return "logits" if type(router).__name__ in _COMPARES_LOGITS else "scores"


def selection_bias(router: nn.Module | None, block: nn.Module) -> bool:
    """Whether a bias that acts on selection only is held by the router or its block."""
    for module in (router, block):
        if module is None:
            continue
        own = module is router
        held = [*module.named_parameters(recurse=own), *module.named_buffers(recurse=own)]
        if any(_BIAS.search(name) for name, _ in held):
            return True
    return False


def shared_experts(scan: Scan, path: str, config: Any) -> int:
    """Experts that every token visits: as configured, where block or layer holds any."""
    while path and not path.rpartition(".")[2].isdigit():
        path, holder = scan.parent(path)
        names = [name for name, _ in holder.named_children()]
        if any(name.startswith("shared") and "gate" not in name for name in names):
            return configs.count(config, *configs.SHARED_KEYS) or 1
    return 0

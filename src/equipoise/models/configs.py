"""What a transformers config says about experts; a config is an object, or a dict of its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

EXPERT_KEYS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_routed_experts",
    "n_experts",
)
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "num_selected_experts",
    "experts_per_token",
    "top_k",
)
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SWITCHES = ("enable_moe_block", "is_moe")


def value(config: Any, *names: str) -> Any:
    """The first of the named attributes (or keys) that is there and not None, else None."""
    for name in names:
        found = config.get(name) if isinstance(config, Mapping) else _attribute(config, name)
        if found is not None:
            return found
    return None


def _attribute(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # a heterogeneous config tells some values for single layers only
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def count(config: Any, *names: str) -> int | None:
    """`value` as an integer, the largest where it is a list with one number per kind or layer."""
    found = value(config, *names)
    numbers = found if isinstance(found, list | tuple) else [found]
    return max((n for n in numbers if isinstance(n, int) and not isinstance(n, bool)), default=None)


def parts(config: Any) -> Iterator[Any]:
    """A config and the configs nested in it (text, vision, thinker, ...)."""
    yield config
    inner = config if isinstance(config, Mapping) else vars(config)
    for name, part in inner.items():
        if name.endswith("_config") and (isinstance(part, Mapping) or hasattr(part, "to_dict")):
            yield from parts(part)


def has_experts(config: Any) -> bool:
    """Whether this config, nested ones apart, says that there are experts to choose from."""
    if any(value(config, switch) is False for switch in _SWITCHES):
        return False
    return (count(config, *EXPERT_KEYS) or 0) > 1


def is_moe_config(config: Any) -> bool:
    """Whether a config, or one nested in it, says that the model has experts."""
    return any(has_experts(part) and moe_layers(part) != frozenset() for part in parts(config))


def moe_layers(config: Any) -> frozenset[int] | None:
    """Numbers of the layers that a config makes MoE layers; None where it does not say."""
    total = count(config, "num_hidden_layers")
    if total is None:
        return None
    kinds = value(config, "mlp_layer_types")
    if isinstance(kinds, list | tuple):
        return frozenset(i for i, kind in enumerate(kinds[:total]) if kind != "dense")
    blocks = value(config, "layers_block_type")
    if isinstance(blocks, list | tuple) and "moe" in blocks:
        return frozenset(i for i, kind in enumerate(blocks) if kind == "moe")
    listed = value(config, "moe_layers")
    if isinstance(listed, list | tuple):
        return frozenset(int(i) for i in listed)
    return _by_rule(config, total)


def _by_rule(config: Any, total: int) -> frozenset[int] | None:
    only, step = value(config, "mlp_only_layers"), count(config, "decoder_sparse_step")
    if isinstance(only, list | tuple) and step:
        return frozenset(i for i in range(total) if i not in only and (i + 1) % step == 0)
    period, offset = count(config, "expert_layer_period"), count(config, "expert_layer_offset")
    if period and offset is not None:
        return frozenset(i for i in range(total) if i % period == offset)
    first = count(config, "first_k_dense_replace")
    if first is not None and value(config, "moe_layer_freq") in (None, 1):
        return frozenset(range(first, total))
    return None

"""A trained model as one of transformers': the same logits, selection bias and all.

| router | architecture |
|---|---|
| sigmoid | GLM-4 MoE |
| softmax or mixtral, weights renormalised | ERNIE 4.5 MoE |
| softmax, weights as they are, without a selection bias | Qwen2-MoE |

H heads, C head width, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.lab.config import ModelConfig
from equipoise.lab.model import Dense, LanguageModel
from equipoise.lab.terms import Call, one

Weights = dict[str, Tensor]
TRAINING_ONLY = {"jitter", "noise", "random_second", "selection_bias"}


@dataclass(frozen=True)
class Target:
    """Where a model goes: the class, its config's own values, and names of its parts."""

    name: str
    config: dict[str, Any]
    bias: str | None
    """Of the selection bias, below `mlp.gate.`; None where there is none."""
    shared: str
    """Of the shared expert, below `mlp.`."""
    interleaved: bool = False
    """Rotary pairs are neighbours, not halves."""


def target_of(model: LanguageModel) -> Target | str:
    """The architecture that computes the same, or why there is none."""
    config, call = model.config, one(model.config.router)
    if config.capacity != "none":
        return f"no architecture of transformers limits the load as {config.capacity}"
    if call.name not in ("softmax", "mixtral", "sigmoid"):
        return f"no architecture of transformers has the router {call}"
    options = dict(call.options)
    selection = options.pop("selection", None)
    unknown = (
        options.keys() - TRAINING_ONLY - {"weighting", "route_scale", "temperature", "precision"}
    )
    if unknown:
        return (
            f"no architecture of transformers has the router {call} ({', '.join(sorted(unknown))})"
        )
    if options.get("weighting") == "equal":
        return f"no architecture of transformers weighs as the router {call}"
    if options.get("precision", "float32") != "float32":
        return "routers of other precision than float32 would select otherwise there"
    if call.name == "sigmoid":
        return _glm(config, options, selection)
    if selection is not None or options.get("route_scale", 1.0) != 1.0:
        return f"no architecture of transformers has the router {call}"
    biased = any(
        layer.gate.selection_bias is not None and bool(layer.gate.selection_bias.any())
        for layer in model.moe_layers()
    )
    weighting = options.get("weighting", "renormalized" if call.name == "softmax" else "softmax")
    if weighting in ("renormalized", "softmax") and not (biased and weighting == "softmax"):
        return _ernie(config)
    if weighting == "scores" and not biased:
        return _qwen(config)
    return f"no architecture of transformers has the router {call} with a selection bias"


def _common(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.hidden_size // config.heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "moe_intermediate_size": config.expert_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _glm(config: ModelConfig, options: dict[str, Any], selection: Any) -> Target | str:
    limits = dict(selection.options) if isinstance(selection, Call) else {}
    named = selection.name if isinstance(selection, Call) else None
    if named not in (None, "group_limited") or limits.get("per_group", 2) != 2:
        return f"no architecture of transformers selects as {selection}"
    values = _common(config)
    values["rope_parameters"]["partial_rotary_factor"] = 1.0
    return Target(
        "Glm4Moe",
        {
            **values,
            "n_routed_experts": config.experts,
            "num_experts_per_tok": config.top_k,
            "n_shared_experts": max(1, config.shared_experts),
            "first_k_dense_replace": config.dense_layers,
            "n_group": limits.get("groups", 1),
            "topk_group": limits.get("limit", 1),
            "norm_topk_prob": options.get("weighting", "renormalized") == "renormalized",
            "routed_scaling_factor": float(options.get("route_scale", 1.0)),
            "num_mtp_layers": 0,
        },
        bias="e_score_correction_bias",
        shared="shared_experts",
    )


def _ernie(config: ModelConfig) -> Target:
    return Target(
        "Ernie4_5_Moe",
        {
            **_common(config),
            "moe_num_experts": config.experts,
            "moe_k": config.top_k,
            "moe_num_shared_experts": config.shared_experts,
            "moe_layer_start_index": config.dense_layers,
            "moe_norm_min": 1e-20,
        },
        bias="moe_statics.e_score_correction_bias",
        shared="shared_experts",
        interleaved=True,
    )


def _qwen(config: ModelConfig) -> Target:
    return Target(
        "Qwen2Moe",
        {
            **_common(config),
            "num_experts": config.experts,
            "num_experts_per_tok": config.top_k,
            "shared_expert_intermediate_size": config.expert_size * max(1, config.shared_experts),
            "mlp_only_layers": list(range(config.dense_layers)),
            "norm_topk_prob": False,
            "qkv_bias": False,
        },
        bias=None,
        shared="shared_expert",
    )


def to_transformers(model: LanguageModel, **special_tokens: int) -> Any:
    """A transformers model with the same logits; ValueError, saying why, where there is none."""
    import transformers

    target = target_of(model)
    if isinstance(target, str):
        raise ValueError(target)
    config_class = getattr(transformers, f"{target.name}Config")
    model_class = getattr(transformers, f"{target.name}ForCausalLM")
    config = config_class(
        vocab_size=model.vocab_size, use_cache=True, **special_tokens, **target.config
    )
    made = model_class(config)
    missing, unknown = made.load_state_dict(weights_of(model, target), strict=False)
    left = [
        name for name in missing if not name.endswith("lm_head.weight") or not model.config.tied
    ]
    if left or unknown:
        raise RuntimeError(
            f"{target.name}: weights without a place {unknown}, without a value {left}"
        )
    return made.eval()


def weights_of(model: LanguageModel, target: Target) -> Weights:
    """The weights under the names of `target`."""
    found = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
    }
    if not model.config.tied:
        found["lm_head.weight"] = model.head.weight
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        prefix = f"model.layers.{index}."
        found[f"{prefix}input_layernorm.weight"] = block.attention_norm.weight
        found[f"{prefix}post_attention_layernorm.weight"] = block.mlp_norm.weight
        parts = _attention(block.attention, target) | {
            f"mlp.{name}": value
            for name, value in (
                _dense(block.mlp) if isinstance(block.mlp, Dense) else _moe(block.mlp, target)
            ).items()
        }
        found |= {prefix + name: value for name, value in parts.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def _attention(attention: Any, target: Target) -> Weights:
    heads, kv_heads, width = attention.heads, attention.kv_heads, attention.width
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    query, key, value = attention.qkv_proj.weight.split(sizes)
    if target.interleaved:
        query, key = (neighbours(part, width) for part in (query, key))
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    parts = (query, key, value, attention.o_proj.weight)
    return {f"self_attn.{n}.weight": p for n, p in zip(names, parts, strict=True)}


def neighbours(weight_HCD: Tensor, width: int) -> Tensor:
    """Rows of each head in the order 0, C/2, 1, C/2 + 1, ...: rotary pairs become neighbours."""
    rows = torch.arange(width).view(2, -1).t().flatten()
    return weight_HCD.view(-1, width, weight_HCD.shape[1])[:, rows].flatten(0, 1)


def _halves(weight: Tensor, down: Tensor) -> Weights:
    gate, up = weight.chunk(2)
    return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}


def _dense(block: Dense) -> Weights:
    return _halves(block.gate_up_proj.weight, block.down_proj.weight)


def _moe(layer: Any, target: Target) -> Weights:
    gate = layer.gate
    found: Weights = {
        "gate.weight": gate.weight / gate.temperature,
        "experts.gate_up_proj": layer.experts.gate_up_proj,
        "experts.down_proj": layer.experts.down_proj,
    }
    if target.bias is not None:
        bias_E = (
            torch.zeros(layer.num_experts) if gate.selection_bias is None else gate.selection_bias
        )
        found[f"gate.{target.bias}"] = bias_E[None] if target.name == "Ernie4_5_Moe" else bias_E
    found |= {f"{target.shared}.{n}": v for n, v in _shared(layer, target).items()}
    if target.name == "Qwen2Moe":
        found["shared_expert_gate.weight"] = gate.weight.new_zeros(1, layer.hidden_size)
    return found


def _shared(layer: Any, target: Target) -> Weights:
    """The shared expert; one of zeros where there is none and the architecture has one always."""
    shared = layer.shared_experts
    if shared is None:
        if target.config.get("moe_num_shared_experts") == 0:
            return {}
        inner, hidden = layer.experts.intermediate_size, layer.hidden_size
        zeros: Callable[..., Tensor] = layer.gate.weight.new_zeros
        return _halves(zeros(2 * inner, hidden), zeros(hidden, inner))
    # Qwen2-MoE multiplies it by sigmoid of a gate, which is 1/2 for a gate of zeros.
    scale = 2.0 if target.name == "Qwen2Moe" else 1.0
    return _halves(shared.inner_proj.weight, shared.down_proj.weight * scale)

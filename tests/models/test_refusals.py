"""Models that cannot be recorded in full are refused, and the message says what was seen."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from tiny import build
from torch import Tensor, nn

from equipoise.errors import EquipoiseError, RoutingError
from equipoise.models import discover, is_moe_config


class Opaque(nn.Module):
    """A block that computes, but hands no ids to anything."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class ListedExperts(nn.Module):
    """The old style: a list of expert modules, called one by one inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 8)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.experts[0](hidden_states)


def test_no_router_although_experts_are_configured() -> None:
    model = build("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp = Opaque()
    with pytest.raises(EquipoiseError, match=r"no router found.*8 experts in Qwen3MoeConfig"):
        discover(model)


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3", "jamba", "exaone_moe"])
def test_a_layer_that_lost_its_router_is_named(arch: str) -> None:
    model = build(arch)
    layer = model.model.layers[3]
    setattr(layer, "feed_forward" if hasattr(layer, "feed_forward") else "mlp", Opaque())
    with pytest.raises(RoutingError, match=r"\d of \d MoE layers configured .* layers 3\."):
        discover(model)


def test_layers_cut_off_the_end_are_not_missed() -> None:
    model = build("qwen3_moe")
    model.model.layers = model.model.layers[:2]
    assert [site.layer for site in discover(model)] == [0, 1]


def test_experts_in_a_list_are_named_by_path() -> None:
    model = build("mixtral")
    model.model.layers[1].mlp = ListedExperts()
    with pytest.raises(
        RoutingError, match=r"1 modules hold experts.*model\.layers\.1\.mlp\.experts"
    ):
        discover(model)


def test_mxfp4_kernels_are_refused_with_the_way_out() -> None:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = build("gpt_oss")
    model.model.layers[2].mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(RoutingError, match=r"MXFP4.*Mxfp4Config\(dequantize=True\)"):
        discover(model)


def test_a_block_replaced_by_a_kernel_is_refused() -> None:
    class MegaBlocksMoeMLP(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    model = build("gpt_oss")
    block = model.model.layers[0].mlp
    block.forward = types.MethodType(MegaBlocksMoeMLP.forward, block)
    with pytest.raises(RoutingError, match=r"MegaBlocksMoeMLP.*use_kernels=False"):
        discover(model)


def test_weights_and_configuration_that_disagree_are_refused() -> None:
    model = build("mixtral")
    model.model.layers[0].mlp.experts.num_experts = 6
    with pytest.raises(RoutingError, match=r"weights for \[8\] experts .* 6 are configured"):
        discover(model)


@pytest.mark.parametrize(
    ("config", "moe"),
    [
        ({"num_local_experts": 8}, True),
        ({"text_config": {"n_routed_experts": 64}}, True),
        ({"num_local_experts": 0}, False),
        ({"num_experts": 128, "enable_moe_block": False}, False),
        ({"num_experts": None, "hidden_size": 64}, False),
        ({"num_experts": 4, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "dense"]}, False),
        ({"moe_num_experts": [64, 64]}, True),
    ],
)
def test_config_dicts_say_whether_there_are_experts(config: dict[str, Any], moe: bool) -> None:
    assert is_moe_config(config) is moe


def test_expert_parallel_shares_keep_the_global_number() -> None:
    model = build("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.num_experts, experts._is_expert_parallel = 4, True
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:4].clone())
    experts.down_proj = nn.Parameter(torch.clone(experts.down_proj[:4]))
    assert discover(model)[0].num_experts == 8

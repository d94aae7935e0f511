"""Two tiny model families, one with a selection bias of its own, and the batches that they see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

FAMILIES = ("mixtral", "deepseek_v3")
EXPERTS, TOP_K, LAYERS, GROUPS = 8, 2, 2, 4
ROWS, LENGTH, VOCABULARY = 8, 12, 64
ROUTER_STD = 0.4
MAIN = 1e-5
"""Scale of the user's loss: what it adds is seen, but its rounding does not hide balancing's."""
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "use_cache": False,
}


def build(family: str) -> Any:
    """A model in training mode whose routers decide by token; the same weights at every call."""
    torch.manual_seed(0)
    model: Any
    if family == "mixtral":
        model = MixtralForCausalLM(
            MixtralConfig(**SHARED, num_hidden_layers=LAYERS, num_local_experts=EXPERTS)
        )
    else:
        model = DeepseekV3ForCausalLM(_deepseek_v3())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("gate.weight"):
            nn.init.normal_(tensor, std=ROUTER_STD)
        elif name.endswith("correction_bias"):
            nn.init.uniform_(tensor, -0.2, 0.2)
    return model.train()


def _deepseek_v3() -> DeepseekV3Config:
    return DeepseekV3Config(
        **SHARED,
        moe_intermediate_size=8,
        num_hidden_layers=LAYERS + 1,
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        n_group=4,
        topk_group=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_shared_experts=1,
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of a global batch: what the model is given, and which rows are tokens of which sequence."""

    given: dict[str, Tensor]
    valid_BS: Tensor
    segment_BS: Tensor
    slope_BSV: Tensor
    """The user's loss is the sum of the logits times this: it splits exactly, whatever the split."""

    def rows(self, start: int, end: int) -> Batch:
        """A micro-batch."""
        return Batch(
            {name: tensor[start:end] for name, tensor in self.given.items()},
            *(t[start:end] for t in (self.valid_BS, self.segment_BS, self.slope_BSV)),
        )

    def main_loss(self, logits_BSV: Tensor) -> Tensor:
        """The user's own loss."""
        return (logits_BSV * self.slope_BSV).sum()


@cache
def batch(kind: str, number: int) -> Batch:
    """Batch `number` of a kind: "full", "padded" unevenly, "packed", or with an "empty" half."""
    draw = torch.Generator().manual_seed(100 + number)
    shape = (ROWS, LENGTH)
    given = {"input_ids": torch.randint(0, VOCABULARY, shape, generator=draw)}
    valid = torch.ones(shape, dtype=torch.bool)
    segment = torch.arange(ROWS).unsqueeze(1).expand(shape).clone()
    if kind == "padded":
        for row in range(ROWS):
            valid[row, LENGTH - (row * 5 + number) % 9 :] = False
    elif kind == "empty":
        valid[ROWS // 2 :] = False
    elif kind == "packed":
        cut = torch.tensor([(row * 3 + number) % 7 + 3 for row in range(ROWS)]).unsqueeze(1)
        place = torch.arange(LENGTH).expand(shape)
        given["position_ids"] = torch.where(place < cut, place, place - cut)
        segment = segment * 2 + (place >= cut).long()
    if kind in ("padded", "empty"):
        given["attention_mask"] = valid.long()
    slope = torch.randn(*shape, VOCABULARY, generator=draw) * MAIN * valid.unsqueeze(2)
    return Batch(given, valid, segment, slope)

"""Tiny models for recorder tests, and what they really chose by another route."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

EXPERTS, TOP_K, LAYERS, VOCABULARY = 8, 2, 3, 250


def olmoe(**changes: Any) -> OlmoeForCausalLM:
    """OLMoE with 3 MoE layers of 8 experts, top-2; softmax top-k, so logits tell the choice."""
    torch.manual_seed(3)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    model = OlmoeForCausalLM(OlmoeConfig(**(values | changes))).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    return model


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def chosen(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Experts of every row [T, L, K], from the router logits that OLMoE returns (plain top-k)."""
    output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    return torch.stack([logits.topk(TOP_K).indices for logits in output.router_logits], 1)


def counts(chosen_TLK: Tensor) -> Tensor:
    """Selections [L, E]."""
    return nn.functional.one_hot(chosen_TLK, EXPERTS).sum((0, 2))

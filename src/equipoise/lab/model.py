"""The language model that is trained: a decoder of rotary attention and `nn.MoELayer`s.

Shapes: B rows, S positions, H heads, C head width, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from equipoise.lab.config import ModelConfig
from equipoise.lab.fused import RMSNorm, Rotary, rotary_heads
from equipoise.lab.loss import linear_cross_entropy
from equipoise.lab.routers import make_capacity, make_router, soft_slots
from equipoise.lab.terms import one
from equipoise.nn import Experts, MoELayer, ParallelExperts, SoftMoE, token_ids


class Attention(nn.Module):
    """Causal attention with rotary positions (half of each head's width against the other half)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.width = config.hidden_size // config.heads
        rows = (self.heads + 2 * self.kv_heads) * self.width
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)

    def forward(self, hidden_BSD: Tensor, rotary: Rotary) -> Tensor:
        """Attention's output [B, S, D]."""
        query, key, value = rotary_heads(
            hidden_BSD, self.qkv_proj.weight, rotary, heads=self.heads, kv_heads=self.kv_heads
        )
        # On a CPU, torch's backward pass of attention takes several times longer in bfloat16.
        with torch.autocast("cpu", enabled=False):
            mixed_BHSC = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=self.kv_heads != self.heads
            )
        out: Tensor = self.o_proj(mixed_BHSC.transpose(1, 2).flatten(2))
        return out.to(hidden_BSD.dtype)


class Dense(nn.Module):
    """A gated feed-forward block, for layers without experts."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Output [B, S, D]."""
        gate, up = self.gate_up_proj(hidden_BSD).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """Attention, then a feed-forward block, each on the normalised residual."""

    def __init__(self, config: ModelConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = mlp

    def forward(self, hidden_BSD: Tensor, rotary: Rotary) -> Tensor:
        """The residual after the block, [B, S, D]."""
        hidden_BSD = hidden_BSD + self.attention(self.attention_norm(hidden_BSD), rotary)
        out: Tensor = hidden_BSD + self.mlp(self.mlp_norm(hidden_BSD))
        return out


class LanguageModel(nn.Module):
    """Tokens in, next-token losses or logits out.

    `group`: the processes that share out the experts; None keeps all here. Weights are drawn from
    `config`'s deviations by torch's generator.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, self._mlp(index, group)) for index in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._hashed = one(config.router).name == "hash"
        self._rotary: Rotary | None = None
        self._draw()

    def _mlp(self, index: int, group: ProcessGroup | None) -> nn.Module:
        config = self.config
        if index < config.dense_layers:
            return Dense(config.hidden_size, config.dense_size)
        if one(config.router).name == "soft":
            experts = Experts(config.experts, config.hidden_size, config.expert_size)
            return SoftMoE(config.hidden_size, experts, slots=soft_slots(config))
        return MoELayer(
            config.hidden_size,
            config.expert_size,
            config.experts,
            config.top_k,
            router=make_router(config, self.vocab_size),
            shared_experts=config.shared_experts,
            capacity=make_capacity(config),
            process_group=group,
        )

    def _draw(self) -> None:
        """Draw all matrices; a process that holds some of the experts draws all and keeps its own.

        But for what a router has beside its own: learned noise begins as it was made.
        """
        routers = {id(layer.gate.weight) for layer in self.moe_layers()}
        beside = {id(p) for layer in self.moe_layers() for p in layer.gate.parameters()} - routers
        shared = {
            id(parameter): layer.experts.held
            for layer in self.moe_layers()
            if isinstance(layer.experts, ParallelExperts)
            for parameter in layer.experts.parameters()
        }
        for parameter in self.parameters():
            if parameter.ndim < 2 or id(parameter) in beside:
                continue
            std = self.config.router_std if id(parameter) in routers else self.config.init_std
            held = shared.get(id(parameter))
            if held is None:
                nn.init.normal_(parameter, std=std)
            else:
                whole = torch.empty(self.config.experts, *parameter.shape[1:]).normal_(std=std)
                parameter.data.copy_(whole[held.start : held.stop])

    def moe_layers(self) -> Iterator[Any]:
        """The layers whose tokens are routed, in order."""
        return (block.mlp for block in self.blocks if isinstance(block.mlp, MoELayer))

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """The loss of `targets` [B, S], or logits [B, S, V] where none are given.

        ids and targets are int64; the loss in nats per token: their "mean", or "none", [B x S].
        """
        hidden_BSD = self._hidden(input_ids)
        if targets is None:
            logits: Tensor = self.head(hidden_BSD)
            return logits
        return linear_cross_entropy(
            hidden_BSD.flatten(0, 1), self.head.weight, targets.flatten(), reduction=reduction
        )

    def _hidden(self, input_ids: Tensor) -> Tensor:
        hidden_BSD = self.embedding(input_ids)
        rotary = self._positions(input_ids.shape[1], hidden_BSD.device)
        if self._hashed:
            with token_ids(input_ids):
                return self._run(hidden_BSD, rotary)
        return self._run(hidden_BSD, rotary)

    def _run(self, hidden_BSD: Tensor, rotary: Rotary) -> Tensor:
        for block in self.blocks:
            hidden_BSD = block(hidden_BSD, rotary)
        out: Tensor = self.norm(hidden_BSD)
        return out

    def _positions(self, length: int, device: torch.device) -> Rotary:
        if length > self.config.max_positions:
            raise ValueError(f"{length} positions; this model has {self.config.max_positions}")
        if self._rotary is None or self._rotary.cos_SC.device != device:
            angles_SC = _angles(self.config, device)
            self._rotary = Rotary.of(angles_SC, self.config.heads, self.config.kv_heads)
        return self._rotary.first(length)

    def step(self, group: ProcessGroup | None = None) -> None:
        """End of an optimizer step: routers and limits that adapt without gradient do it here."""
        for layer in self.moe_layers():
            layer.step(group)


def _angles(config: ModelConfig, device: torch.device) -> Tensor:
    width = config.hidden_size // config.heads
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    positions = torch.arange(config.max_positions, dtype=torch.float32, device=device)
    return torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)


def parameters_of(model: LanguageModel) -> dict[str, int]:
    """Parameters in all, on all processes, and those that a token uses (its top-k of the experts)."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in model.moe_layers():
        experts = here = sum(p.numel() for p in layer.experts.parameters())
        if isinstance(layer.experts, ParallelExperts):
            experts *= layer.num_experts // len(layer.experts.held)
        total += experts - here
        idle += experts * (layer.num_experts - layer.top_k) // layer.num_experts
    return {"total": total, "active": total - idle}


def least_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Of a model that is not made yet: its matrices, without those of routers."""
    width = model.hidden_size // model.heads
    attention = 2 * model.hidden_size**2 + 2 * model.hidden_size * model.kv_heads * width
    experts = (model.experts + model.shared_experts) * model.expert_size
    inner = (model.layers - model.dense_layers) * experts + model.dense_layers * model.dense_size
    tables = 1 if model.tied else 2
    return (
        model.layers * attention
        + 3 * inner * model.hidden_size
        + tables * vocab_size * model.hidden_size
    )

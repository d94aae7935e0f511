"""Experts that cost nothing, and soft routing: what stands around or in place of a router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.routing import NO_EXPERT


class FreeExperts(nn.Module):
    """Experts followed by zero, copy and constant experts (MoE++, arXiv 2410.07348; LongCat-Flash).

    The ids after those of `experts` (which has `num_experts`) are, in this order, `zero` experts,
    which give nothing, `copy` experts, which give the hidden state, and `constant` experts, which
    give a x + b v with a learned vector v and (a, b) = softmax(W x). For a router with
    null_experts = zero + copy + constant. The computing experts see NO_EXPERT in those slots.
    """

    def __init__(
        self,
        experts: nn.Module,
        hidden_size: int,
        *,
        zero: int = 0,
        copy: int = 0,
        constant: int = 0,
    ) -> None:
        super().__init__()
        if min(zero, copy, constant) < 0 or zero + copy + constant == 0:
            raise ValueError(
                f"zero={zero}, copy={copy}, constant={constant}; none may be negative, one has to "
                "be above 0"
            )
        count = getattr(experts, "num_experts", None)
        if not isinstance(count, int):
            raise ValueError(f"{type(experts).__name__} does not say num_experts")
        self.experts, self.num_experts = experts, count
        self.null_experts = zero + copy + constant
        self._copies = (count + zero, count + zero + copy)
        self.constant_ED = nn.Parameter(torch.empty(constant, hidden_size))
        self.mix_ED = nn.Parameter(torch.empty(constant * 2, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the constant experts anew."""
        nn.init.normal_(self.constant_ED, std=0.02)
        nn.init.normal_(self.mix_ED, std=0.02)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of all selected experts, [T, D]."""
        free_TK = top_k_index >= self.num_experts
        output_TD: Tensor = self.experts(
            hidden_states,
            top_k_index.masked_fill(free_TK, NO_EXPERT),
            top_k_weights.masked_fill(free_TK, 0.0),
        )
        first, last = self._copies
        copied_TK = (top_k_index >= first) & (top_k_index < last)
        share_T1 = (top_k_weights * copied_TK).sum(dim=1, keepdim=True)
        for at in range(len(self.constant_ED)):
            weight_T1 = (top_k_weights * (top_k_index == last + at)).sum(dim=1, keepdim=True)
            mix_T2 = F.linear(hidden_states, self.mix_ED[2 * at : 2 * at + 2]).softmax(dim=1)
            share_T1 = share_T1 + weight_T1 * mix_T2[:, :1]
            output_TD = output_TD + weight_T1 * mix_T2[:, 1:] * self.constant_ED[at]
        return output_TD + share_T1.to(hidden_states.dtype) * hidden_states


class SoftMoE(nn.Module):
    """Soft MoE (Puigcerver et al., arXiv 2308.00951): experts work on mixtures of all tokens.

    Each expert has `slots` inputs, each a weighted mean of the tokens of a sequence (softmax over
    tokens), and each token receives a weighted mean of all outputs (softmax over slots); tokens and
    slot vectors are compared at unit length, times a learned `scale`. No token is assigned to any
    expert, so there are no ids and no load. Not causal: every output depends on every token of its
    sequence, so it is not for autoregressive models.
    `experts` is any module of forward(hidden_states, top_k_index, top_k_weights) with num_experts.
    """

    def __init__(self, hidden_size: int, experts: nn.Module, slots: int = 1) -> None:
        super().__init__()
        count = getattr(experts, "num_experts", None)
        if not isinstance(count, int):
            raise ValueError(f"{type(experts).__name__} does not say num_experts")
        if slots < 1:
            raise ValueError(f"slots={slots}; each expert needs at least 1")
        self.experts, self.num_experts, self.slots = experts, count, slots
        self.weight_PD = nn.Parameter(torch.empty(count * slots, hidden_size))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the slot vectors anew and set the scale to 1."""
        nn.init.normal_(self.weight_PD, std=self.weight_PD.shape[1] ** -0.5)
        nn.init.ones_(self.scale)

    def forward(self, hidden_BSD: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """Outputs [B, S, D]; padding, False in `valid_BS`, enters no slot."""
        dispatch_BSP, combine_BSP = self.mixing(hidden_BSD, valid_BS)
        slots_BPD = dispatch_BSP.transpose(1, 2) @ hidden_BSD
        rows = slots_BPD.flatten(0, 1)
        ids = torch.arange(self.num_experts, device=rows.device).repeat_interleave(self.slots)
        ids = ids.repeat(len(hidden_BSD)).unsqueeze(1)
        outputs_BPD = self.experts(rows, ids, rows.new_ones(ids.shape)).view_as(slots_BPD)
        mixed_BSD: Tensor = combine_BSP @ outputs_BPD
        return mixed_BSD

    def mixing(self, hidden_BSD: Tensor, valid_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Dispatch weights, which sum to 1 over tokens, and combine weights, over slots: [B, S, P]."""
        wide = torch.promote_types(hidden_BSD.dtype, torch.float32)
        slots_PD = self.scale.to(wide) * F.normalize(self.weight_PD.to(wide), dim=1)
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            logits_BSP = F.linear(F.normalize(hidden_BSD.to(wide), dim=2), slots_PD)
        combine_BSP = logits_BSP.softmax(dim=2).to(hidden_BSD.dtype)
        if valid_BS is not None:
            lowest = torch.finfo(wide).min
            logits_BSP = logits_BSP.masked_fill(~valid_BS.unsqueeze(2), lowest)
        return logits_BSP.softmax(dim=1).to(hidden_BSD.dtype), combine_BSP

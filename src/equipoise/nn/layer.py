"""The reference MoE layer: router, capacity, experts, shared experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from equipoise.nn.base import first_pass
from equipoise.nn.experts import ACTIVATIONS, Experts
from equipoise.nn.limiter import Capacity, Limiter
from equipoise.nn.parallel import ParallelExperts
from equipoise.nn.routers import TopKRouter


class MoELayer(nn.Module):
    """A feed-forward layer of `num_experts` experts, of which each token visits `top_k`.

    `router`: a module of forward(hidden_TD) -> (scores_TE, weights_TK, expert_ids_TK), by default
    softmax over all experts, the weights renormalised. `shared_experts`: as many experts, as one,
    that every token visits. `capacity`: None (dropless), a factor, or `Capacity`. `process_group`:
    spread the experts over its processes. `experts`: in place of these, any module of
    forward(hidden_states, top_k_index, top_k_weights), for example `FreeExperts`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router: nn.Module | None = None,
        shared_experts: int = 0,
        capacity: Capacity | float | None = None,
        process_group: ProcessGroup | None = None,
        activation: str = "silu",
        gated: bool = True,
        experts: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if router is None:
            router = TopKRouter(hidden_size, num_experts, top_k, weighting="renormalized")
        for name, wanted in (("num_experts", num_experts), ("top_k", top_k)):
            if getattr(router, name, wanted) != wanted:
                raise ValueError(f"{name}={wanted}, but the router has {getattr(router, name)}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.gate = router
        shape = (num_experts, hidden_size, intermediate_size, activation, gated)
        if experts is not None:
            self.experts = experts
        elif process_group is not None:
            self.experts = ParallelExperts(*shape, process_group=process_group)
        else:
            self.experts = Experts(*shape)
        self.shared_experts: SharedExpert | None = None
        if shared_experts:
            width = shared_experts * intermediate_size
            self.shared_experts = SharedExpert(hidden_size, width, activation, gated)
        self.limiter = self._limiter(capacity)
        self.dropped_share = torch.zeros(())
        """Selections dropped in the last pass over all selections, a scalar on the device."""

    def _limiter(self, capacity: Capacity | float | None) -> Limiter | None:
        if capacity is None:
            return None
        settings = capacity if isinstance(capacity, Capacity) else Capacity(factor=capacity)
        if settings.overflow == "pad" and type(self.experts) is not Experts:
            raise ValueError(
                f"overflow='pad' is there for Experts, not for {type(self.experts).__name__}; "
                "use overflow='drop'"
            )
        function = getattr(self.gate, "score_function", "softmax")
        return Limiter(settings, self.num_experts, function)

    def forward(self, hidden_BSD: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """The layer's output, of the shape of its input [..., D]; padding is False in `valid_BS`.

        Padding takes no room under a capacity and is otherwise routed like any token.
        """
        if hidden_BSD.shape[-1] != self.hidden_size or not hidden_BSD.is_floating_point():
            raise ValueError(
                f"hidden states of shape {list(hidden_BSD.shape)}, {hidden_BSD.dtype}; this layer "
                f"takes floating numbers [..., {self.hidden_size}]"
            )
        hidden_TD = hidden_BSD.reshape(-1, self.hidden_size)
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        scores_TE, weights_TK, ids_TK = self.gate(hidden_TD)
        if self.limiter is None:
            output_TD = self.experts(hidden_TD, ids_TK, weights_TK)
        else:
            output_TD = self._limited(hidden_TD, ids_TK, weights_TK, scores_TE, valid_T)
        if self.shared_experts is not None:
            output_TD = output_TD + self.shared_experts(hidden_TD)
        output_BSD: Tensor = output_TD.view_as(hidden_BSD)
        return output_BSD

    def _limited(
        self,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        scores_TE: Tensor,
        valid_T: Tensor | None,
    ) -> Tensor:
        assert self.limiter is not None
        count = self.training and first_pass()
        capacity = self.limiter.capacity(ids_TK, valid_T)
        kept = self.limiter(ids_TK, weights_TK, scores_TE, valid_T, capacity=capacity, count=count)
        self.dropped_share = kept.dropped_share
        buffers: tuple[Any, ...] = (capacity,) if self.limiter.settings.overflow == "pad" else ()
        output_TD: Tensor = self.experts(hidden_TD, kept.expert_ids_TK, kept.weights_TK, *buffers)
        return output_TD

    def step(self, group: ProcessGroup | None = None) -> None:
        """End of an optimizer step, on every rank of `group`: what adapts without gradient does."""
        step = getattr(self.gate, "step", None)
        if callable(step):
            step(group)
        if self.limiter is not None:
            self.limiter.step(group)


class SharedExpert(nn.Module):
    """A feed-forward block that every token visits."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str = "silu", gated: bool = True
    ) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.inner_proj = nn.Linear(hidden_size, intermediate_size * (1 + gated), bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Output [T, D]."""
        inner = self.inner_proj(hidden_TD)
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate_TF, up_TF = inner.chunk(2, dim=-1)
            inner_TF = act(gate_TF) * up_TF
        else:
            inner_TF = act(inner)
        output_TD: Tensor = self.down_proj(inner_TF)
        return output_TD

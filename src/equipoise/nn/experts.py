"""The experts of a layer: stacked weights, computed for all experts in two grouped products.

R rows sorted by expert, F inner width of an expert. The routing weight is applied to the inner
activation [R, F] rather than to the output [R, D]: the same sum, for less memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from equipoise.nn import dispatch
from equipoise.nn.grouped import batched_linear, grouped_dtype, grouped_linear

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Experts(nn.Module):
    """E feed-forward experts with weights stacked as transformers stacks them.

    gate_up_proj [E, 2F, D] (up_proj [E, F, D] without gate) and down_proj [E, D, F]; expert e gives
    down (act(gate x) * up x). `activation` is one of "silu", "gelu", "relu", "relu2".
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        gated: bool = True,
    ) -> None:
        super().__init__()
        if min(num_experts, hidden_size, intermediate_size) < 1:
            raise ValueError(
                f"num_experts={num_experts}, hidden_size={hidden_size}, "
                f"intermediate_size={intermediate_size}; each has to be at least 1"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}; allowed are {', '.join(ACTIVATIONS)}")
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.intermediate_size, self.activation, self.gated = intermediate_size, activation, gated
        inner = nn.Parameter(torch.empty(num_experts, intermediate_size * (1 + gated), hidden_size))
        self.register_parameter("gate_up_proj" if gated else "up_proj", inner)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, uniform within 1 / sqrt(inputs), as nn.Linear does."""
        for weight_EOI in (self.inner_proj, self.down_proj):
            bound = weight_EOI.shape[2] ** -0.5
            nn.init.uniform_(weight_EOI, -bound, bound)

    @property
    def inner_proj(self) -> Tensor:
        """The first projection, by whichever name."""
        return self.get_parameter("gate_up_proj" if self.gated else "up_proj")

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        capacity: int | None = None,
    ) -> Tensor:
        """Weighted sum of each token's experts: [T, D] of [T, D], ids [T, K] and weights [T, K].

        Slots with NO_EXPERT are not computed and add nothing. With `capacity`, buffers of that many
        rows per expert, whatever the load, so that shapes are fixed; slots beyond are left out.
        """
        check_shapes(hidden_states, top_k_index, top_k_weights, self.hidden_size)
        return self._sum(hidden_states, top_k_index, top_k_weights, capacity)

    def _sum(
        self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, capacity: int | None = None
    ) -> Tensor:
        held = len(self.down_proj)
        if capacity is None:
            plan = dispatch.plan(ids_TK, held)
        else:
            plan = dispatch.padded_plan(ids_TK, held, capacity)
        rows_RD = dispatch.spread(hidden_TD.to(grouped_dtype(self.down_proj)), plan)
        rows_RD = self._rows(rows_RD, dispatch.slot_weights(weights_TK, plan), plan)
        return dispatch.combine(rows_RD, plan).to(hidden_TD.dtype)

    def _rows(self, rows_RD: Tensor, weights_R: Tensor, plan: dispatch.Plan) -> Tensor:
        inner = _product(rows_RD, self.inner_proj, plan)
        if self.gated and self.activation == "silu" and not torch.compiler.is_compiling():
            inner_RF = _SiluGate.apply(inner, weights_R)  # type: ignore[no-untyped-call]
        else:
            inner_RF = self._activate(inner) * weights_R.unsqueeze(1).to(inner.dtype)
        return _product(inner_RF, self.down_proj, plan)

    def _activate(self, inner: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return act(inner)
        gate_RF, up_RF = inner.chunk(2, dim=1)
        return act(gate_RF) * up_RF

    def extra_repr(self) -> str:
        """The line in print(model)."""
        return (
            f"{self.num_experts}, {self.hidden_size}, {self.intermediate_size}, "
            f"activation={self.activation!r}, gated={self.gated}"
        )


def check_shapes(hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, hidden_size: int) -> None:
    """Raise ValueError unless these are [T, D], [T, K] and [T, K]."""
    fits = hidden_TD.ndim == 2 and hidden_TD.shape[1] == hidden_size
    if not fits or ids_TK.shape != weights_TK.shape or ids_TK.shape[:-1] != hidden_TD.shape[:1]:
        raise ValueError(
            f"hidden_states {list(hidden_TD.shape)}, top_k_index {list(ids_TK.shape)}, "
            f"top_k_weights {list(weights_TK.shape)}; wanted are [T, {hidden_size}], [T, K], [T, K]"
        )


def _product(rows_RI: Tensor, weight_EOI: Tensor, plan: dispatch.Plan) -> Tensor:
    weight_EOI = weight_EOI.to(rows_RI.dtype)
    if plan.equal:
        return batched_linear(rows_RI, weight_EOI)
    return grouped_linear(rows_RI, weight_EOI, plan.ends_E)


class _SiluGate(torch.autograd.Function):
    """silu(gate) * up * weight: one new tensor forward, and only the input kept for backward."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weights_R: Tensor) -> Tensor:
        ctx.save_for_backward(inner, weights_R)
        gate_RF, up_RF = inner.chunk(2, dim=1)
        return F.silu(gate_RF).mul_(up_RF).mul_(weights_R[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        inner, weights_R = ctx.saved_tensors
        gate_RF, up_RF = inner.chunk(2, dim=1)
        grad_inner = torch.empty_like(inner)
        grad_gate_RF, grad_up_RF = grad_inner.chunk(2, dim=1)
        silu_RF = F.silu(gate_RF)
        work_RF = silu_RF * up_RF
        grad_weights_R = work_RF.mul_(grad_RF).sum(dim=1, dtype=weights_R.dtype)
        torch.mul(grad_RF, weights_R[:, None], out=work_RF)
        torch.mul(work_RF, silu_RF, out=grad_up_RF)
        work_RF.mul_(up_RF)
        torch.ops.aten.silu_backward.grad_input(work_RF, gate_RF, grad_input=grad_gate_RF)
        return grad_inner, grad_weights_R

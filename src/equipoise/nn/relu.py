"""ReLU routing (ReMoE): experts of positive logit, kept few by an L1 term of adaptive strength."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from equipoise.nn.base import Router, first_pass, padded

_STRONGEST = 1e6  # where activity cannot fall, growth has to end before inf x 0


class ReLURouter(Router):
    """Every expert whose logit is positive, weighted by it (ReMoE, arXiv 2412.14711).

    The L1 term is `l1_weight` x mean over tokens of sum_e f_e relu(logit_e), with the loads
    f_e = E / (K T) x tokens of expert e held constant. Its gradient is added to that of the logits
    in training passes; the loss itself is untouched. `step()`, once per optimizer step, multiplies
    `l1_weight` by `rate` when more than K of E experts were active on average, else divides.
    `loss_scale` is what the loss is multiplied with before backward: 1 / n for n micro-batches.
    The paper steers all layers by one sparsity; here each router has its own. There is no bias:
    over hidden states of mean zero, half of all logits are positive whatever the weight. Where all
    experts are off for all tokens, no gradient of the task turns one on again: start it weak.
    """

    variable_top_k = True

    float32_buffers: ClassVar[tuple[str, ...]] = ("selection_bias", "l1_weight")
    l1_weight: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        l1_weight: float = 1e-8,
        rate: float = 1.2,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, score_function="relu")
        self.compares = "logits"
        if not l1_weight > 0:
            raise ValueError(f"l1_weight={l1_weight}; it has to be above 0, or it can never grow")
        if not rate > 1:
            raise ValueError(f"rate={rate}; it has to be above 1")
        self._start, self.rate, self.loss_scale = l1_weight, rate, 1.0
        self.register_buffer("l1_weight", torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew and put the strength of the L1 term to its start."""
        super().reset_parameters()
        self.l1_weight.fill_(self._start)
        self._noted: Tensor | None = None

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, K], and ids [T, K] with K the most any token got."""
        logits_TE = self.logits(hidden_TD)
        active_TE = logits_TE.detach() > 0
        if self.training and len(hidden_TD):
            logits_TE = self._penalised(logits_TE, active_TE)
            if first_pass():
                noted = torch.stack([active_TE.sum().double(), _count(hidden_TD)])
                self._noted = noted if self._noted is None else self._noted + noted
        weights_TK, ids_TK = padded(active_TE, torch.relu(logits_TE))
        return logits_TE, weights_TK.to(hidden_TD.dtype), ids_TK

    def step(self, group: ProcessGroup | None = None) -> None:
        """Steer the strength by the activity noted since the last step, on all ranks of `group`."""
        noted, self._noted = self._noted, None
        if noted is None:
            noted = torch.zeros(2, dtype=torch.float64, device=self.l1_weight.device)
        if group is not None:
            dist.all_reduce(noted, group=group)
        active, tokens = noted.unbind()
        if tokens > 0:
            excess = torch.sign(active - tokens * self.top_k).float()
            self.l1_weight.mul_(self.rate**excess).clamp_(max=_STRONGEST)

    def _penalised(self, logits_TE: Tensor, active_TE: Tensor) -> Tensor:
        tokens = len(active_TE)
        load_E = active_TE.sum(dim=0) * (self.num_experts / (self.top_k * tokens))
        slope_TE = active_TE * load_E * (self.l1_weight * self.loss_scale / tokens)
        slope_TE = slope_TE.to(logits_TE.dtype)
        penalised: Tensor = _AddGradient.apply(logits_TE, slope_TE)  # type: ignore[no-untyped-call]
        return penalised


class _AddGradient(torch.autograd.Function):
    """The first tensor unchanged; in backward, the second is added to its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: Tensor) -> Tensor:
        """The tensor itself."""
        ctx.save_for_backward(gradient)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """The gradient that arrives, and the one that was given."""
        (gradient,) = ctx.saved_tensors
        return outer[0] + gradient, None


def _count(hidden_TD: Tensor) -> Tensor:
    return torch.tensor(len(hidden_TD), dtype=torch.float64, device=hidden_TD.device)

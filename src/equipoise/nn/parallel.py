"""Expert parallelism: each process of a group holds E / world experts; rows travel, weights stay."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.nn import dispatch
from equipoise.nn.experts import Experts, check_shapes
from equipoise.nn.grouped import grouped_dtype


class ParallelExperts(Experts):
    """Experts of which this process holds the `rank`-th share of num_experts / world.

    Takes and gives what `Experts` does, on the tokens of this process, of which there may be any
    number; every process of the group has to call it, forward and backward. The gradient of an
    expert's weights is the sum over the group's tokens, so data parallelism must not average these
    over the same group. Each forward waits for the device once, to know how many rows arrive.

    Under one seed in all processes each draws its share of the same experts; on a CPU, of those that
    `Experts` draws under that seed.
    """

    process_group: dist.ProcessGroup
    _is_expert_parallel = True  # what tells `equipoise.models` that the weights are a share

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        gated: bool = True,
        *,
        process_group: dist.ProcessGroup,
    ) -> None:
        world = dist.get_world_size(process_group)
        if num_experts % world:
            raise ValueError(
                f"num_experts={num_experts} over a group of {world} processes; it has to be a "
                f"multiple of {world}"
            )
        # The group before all else: the base class draws the weights, and a share is drawn by rank.
        object.__setattr__(self, "process_group", process_group)
        super().__init__(num_experts // world, hidden_size, intermediate_size, activation, gated)
        self.num_experts = num_experts
        self.config = {"num_experts": num_experts}

    def reset_parameters(self) -> None:
        """Draw the experts of all processes in their order, and keep the own ones."""
        held = self.held
        for weight_EOI in (self.inner_proj, self.down_proj):
            bound = weight_EOI.shape[2] ** -0.5
            drawn_OI = torch.empty_like(weight_EOI.data[0])
            for expert in range(len(weight_EOI) * dist.get_world_size(self.process_group)):
                drawn_OI.uniform_(-bound, bound)
                if expert in held:
                    weight_EOI.data[expert - held.start] = drawn_OI

    @property
    def held(self) -> range:
        """Numbers of the experts that this process holds."""
        count = len(self.down_proj)
        first = dist.get_rank(self.process_group) * count
        return range(first, first + count)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        capacity: int | None = None,
    ) -> Tensor:
        """Weighted sum of each token's experts, wherever they are; see `Experts.forward`."""
        check_shapes(hidden_states, top_k_index, top_k_weights, self.hidden_size)
        if capacity is not None:
            raise ValueError("buffers of a fixed capacity are not there across processes; use drop")
        plan = dispatch.plan(top_k_index, self.num_experts, static=False)
        sent, received, ids_R1 = self._agree(plan.ends_E)
        rows_RD = dispatch.spread(hidden_states.to(grouped_dtype(self.down_proj)), plan)
        weights_R = dispatch.slot_weights(top_k_weights, plan)
        rows_RD = exchange(rows_RD, sent, received, self.process_group)
        weights_R1 = exchange(weights_R.unsqueeze(1), sent, received, self.process_group)
        rows_RD = exchange(
            self._sum(rows_RD, ids_R1, weights_R1), received, sent, self.process_group
        )
        return dispatch.combine(rows_RD, plan).to(hidden_states.dtype)

    def _agree(self, ends_E: Tensor) -> tuple[list[int], list[int], Tensor]:
        # Rows to send to and to receive from each process, and the local expert of each received.
        count = len(self.down_proj)
        sent_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        received_E = torch.empty_like(sent_E)
        dist.all_to_all_single(received_E, sent_E, group=self.process_group)
        local_E = torch.arange(count, device=ends_E.device).repeat(self.num_experts // count)
        ids_R1 = local_E.repeat_interleave(received_E).unsqueeze(1)
        sums = [counts_E.view(-1, count).sum(dim=1).tolist() for counts_E in (sent_E, received_E)]
        return sums[0], sums[1], ids_R1


def exchange(
    rows_RX: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all of rows sorted by destination; backward sends the gradients back.

    `sent[r]` rows go to rank r of the group and `received[r]` come from it; any may be 0.
    """
    received_RX: Tensor = _Exchange.apply(rows_RX, sent, received, group)  # type: ignore[no-untyped-call]
    return received_RX


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RX: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        out_RX = rows_RX.new_empty(sum(received), *rows_RX.shape[1:])
        dist.all_to_all_single(out_RX, rows_RX.contiguous(), received, sent, group=group)
        return out_RX

    @staticmethod
    def backward(ctx: Any, grad_RX: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.splits
        return exchange(grad_RX, received, sent, ctx.group), None, None, None

"""From tokens to rows sorted by expert, and back.

R rows, one for each slot (token, k) that has an expert, sorted by expert; N = T K slots in token
order. `spread` and `combine` are each other's transpose, so each is the other's backward pass:
no scattered addition, which is what makes the usual indexing slow, and nothing saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.routing import NO_EXPERT


@dataclass(frozen=True, slots=True)
class Plan:
    """Which slot stands in which row."""

    slot_R: Tensor
    """Number t K + k of the slot in each row."""
    token_R: Tensor
    ends_E: Tensor
    """int32: the row after each expert's last."""
    bags_N: Tensor
    """Rows in token order; those of token t begin at starts_T[t]."""
    starts_T: Tensor
    live_R: Tensor | None = None
    """False on rows of no slot, where shapes must not depend on the data; their contents are undefined."""
    bag_weights_N: Tensor | None = None
    """0 where a bag entry stands for no row."""
    equal: bool = False
    """Whether every expert has the same number of rows."""


def plan(ids_TK: Tensor, num_experts: int, static: bool | None = None) -> Plan:
    """Sort the slots by expert, within an expert by token; NO_EXPERT gets no row.

    `static` keeps T K rows, those without expert last: no waiting for the device, no shape from
    data. By default so anywhere but on the CPU, and under torch.compile.
    """
    if static is None:
        static = ids_TK.device.type != "cpu" or torch.compiler.is_compiling()
    tokens, width = ids_TK.shape
    ids_N = ids_TK.reshape(-1)
    if not static:
        _check(ids_N, num_experts)
    order_N, row_N, ends_E = _sorted(ids_N, num_experts)
    every_T = torch.arange(tokens, device=ids_N.device)
    if static:
        live_R = torch.arange(len(ids_N), device=ids_N.device) < ends_E[-1]
        return Plan(order_N, order_N // width, ends_E, row_N, every_T * width, live_R)
    count = int(ends_E[-1])
    if count == len(ids_N):
        return Plan(order_N, order_N // width, ends_E, row_N, every_T * width)
    kept_TK = ids_TK != NO_EXPERT
    per_token_T = kept_TK.sum(dim=1)
    starts_T = per_token_T.cumsum(0) - per_token_T
    order_R = order_N[:count]
    return Plan(order_R, order_R // width, ends_E, row_N[kept_TK.reshape(-1)], starts_T)


def padded_plan(ids_TK: Tensor, num_experts: int, capacity: int) -> Plan:
    """Exactly `capacity` rows for each expert, [E, C]; slots beyond an expert's rows get none."""
    tokens, width = ids_TK.shape
    capacity = max(capacity, 1)
    if tokens == 0:
        return plan(ids_TK, num_experts, static=False)
    ids_N = ids_TK.reshape(-1)
    if not torch.compiler.is_compiling() and ids_N.device.type == "cpu":
        _check(ids_N, num_experts)
    _, row_N, ends_E = _sorted(ids_N, num_experts)
    begins_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    held_N = ids_N.clamp_min(0)
    rank_N = row_N - begins_E[held_N]
    kept_N = (ids_N != NO_EXPERT) & (rank_N < capacity)
    rows = num_experts * capacity
    place_N = torch.where(kept_N, held_N * capacity + rank_N, rows)
    slots_N = torch.arange(len(ids_N), device=ids_N.device)
    slot_R = ids_N.new_zeros(rows + 1).scatter_(0, place_N, slots_N)[:rows]
    live_R = kept_N.new_zeros(rows + 1).scatter_(0, place_N, kept_N)[:rows]
    ends_E = torch.arange(1, num_experts + 1, device=ids_N.device, dtype=torch.int32) * capacity
    bags_N = place_N.masked_fill(~kept_N, 0)
    starts_T = torch.arange(tokens, device=ids_N.device) * width
    return Plan(slot_R, slot_R // width, ends_E, bags_N, starts_T, live_R, kept_N, True)


def spread(rows_TD: Tensor, plan: Plan) -> Tensor:
    """Each token's row for each of its experts, [R, D], sorted by expert; undefined rows are 0."""
    if torch.compiler.is_compiling():
        return _spread(rows_TD, plan)
    spread_RD: Tensor = _Spread.apply(rows_TD, plan)  # type: ignore[no-untyped-call]
    return spread_RD


def combine(rows_RD: Tensor, plan: Plan) -> Tensor:
    """Sum of each token's rows, [T, D], accumulated in float32."""
    if torch.compiler.is_compiling():
        return _sum_of_gathered(rows_RD, plan)
    sum_TD: Tensor = _Combine.apply(rows_RD, plan)  # type: ignore[no-untyped-call]
    return sum_TD


def slot_weights(weights_TK: Tensor, plan: Plan) -> Tensor:
    """Routing weight of each row, 0 on rows of no slot."""
    weights_R = weights_TK.reshape(-1).index_select(0, plan.slot_R)
    # torch.where also stops the gradient that comes back from undefined contents.
    return weights_R if plan.live_R is None else torch.where(plan.live_R, weights_R, 0.0)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _spread(rows_TD, plan)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return combine(grad_RD, ctx.plan), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        weights_N = plan.bag_weights_N
        if weights_N is None and plan.live_R is not None:
            rows_RD = rows_RD.masked_fill(~plan.live_R.unsqueeze(1), 0.0)
        if weights_N is not None:
            weights_N = weights_N.to(rows_RD.dtype)
        return torch.embedding_bag(
            rows_RD, plan.bags_N, plan.starts_T, per_sample_weights=weights_N
        )[0]

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return spread(grad_TD, ctx.plan), None


def _spread(rows_TD: Tensor, plan: Plan) -> Tensor:
    rows_RD = rows_TD.index_select(0, plan.token_R)
    return rows_RD if plan.live_R is None else rows_RD.masked_fill_(~plan.live_R[:, None], 0.0)


def _sum_of_gathered(rows_RD: Tensor, plan: Plan) -> Tensor:
    # For the compiler, which fuses this, and only for plans of as many bag entries as slots.
    if plan.live_R is not None:
        rows_RD = torch.where(plan.live_R[:, None], rows_RD, 0.0)
    slots_ND = rows_RD.index_select(0, plan.bags_N)
    if plan.bag_weights_N is not None:
        slots_ND = slots_ND * plan.bag_weights_N[:, None]
    return slots_ND.view(len(plan.starts_T), -1, rows_RD.shape[1]).sum(dim=1)


def _sorted(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    # Slots in order of expert (NO_EXPERT last), the place of each slot therein, ends of experts.
    key_N = ids_N.masked_fill(ids_N == NO_EXPERT, num_experts)
    order_N = torch.argsort(key_N, stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_N.device)
    count_E.scatter_add_(0, key_N.long(), torch.ones_like(order_N))
    return order_N, place_N, count_E[:num_experts].cumsum(0, dtype=torch.int32)


def _check(ids_N: Tensor, num_experts: int) -> None:
    if len(ids_N) == 0:
        return
    lowest, highest = (int(x) for x in ids_N.aminmax())
    if lowest < NO_EXPERT or highest >= num_experts:
        wrong = lowest if lowest < NO_EXPERT else highest
        raise ValueError(
            f"expert id {wrong} among {num_experts} experts; allowed are 0 to {num_experts - 1}, "
            f"and {NO_EXPERT} for no expert"
        )

"""Capacity: how many selections an expert takes, which ones, and what becomes of the rest.

Pure functions on ids, weights, scores and the mask of valid tokens, so that they serve the layer
here and the experts' call of any other model. N = T K slots (token, k) in token order; a bucket is
what has a capacity: an expert, or a device with all its experts.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.nn.base import check_choice
from equipoise.routing import NO_EXPERT

By = Literal["position", "choice", "probability"]
Overflow = Literal["drop", "reroute", "pad"]
BY = ("position", "choice", "probability")
OVERFLOW = ("drop", "reroute", "pad")


class Limited(NamedTuple):
    """What is left of a routing under a capacity."""

    expert_ids_TK: Tensor
    weights_TK: Tensor
    dropped_share: Tensor
    """Dropped selections over all selections by valid tokens; a scalar on the device."""


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """ceil(T K / E x factor), the factor taken as the decimal number that was written."""
    return math.ceil(Fraction(str(factor)) * tokens * top_k / num_experts)


def limit(
    ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor | None = None,
    valid_T: Tensor | None = None,
    *,
    num_experts: int,
    capacity: int | Tensor,
    by: By = "position",
    overflow: Overflow = "drop",
    groups: int | None = None,
    score_function: str = "softmax",
) -> Limited:
    """Keep at most `capacity` (one number, or one per bucket) selections of each bucket.

    by: who is kept. "position": first come, first served, by token, and within a token by slot k.
    "choice": all tokens' first slots before any second slot (GShard, arXiv 2006.16668).
    "probability": by routing weight, ties by position.
    overflow: "drop" leaves the slot to the residual connection: NO_EXPERT, weight 0 ("pad" is the
    same here; fixed buffers are the experts' affair). "reroute" tries the token's next best expert
    by `scores_TE` that has room and that the token does not have, in rounds: each token offers its
    first overflowing slot, an expert takes the foremost of what is offered. Its weight is
    w f(new score) / f(old score) with f = `score_function`; nothing is renormalised.
    groups: buckets are E / groups consecutive experts each (per-device capacity).

    Slots of tokens that are not valid become NO_EXPERT, take no room and count as no drop. Ids from
    `num_experts` up are experts without cost: they pass. Rerouting waits for the device each round.
    """
    check_choice("by", by, BY)
    check_choice("overflow", overflow, OVERFLOW)
    check_groups(groups, num_experts)
    expert_E = torch.arange(num_experts, device=ids_TK.device)
    bucket_E = expert_E if groups is None else expert_E // (num_experts // groups)
    buckets = groups or num_experts
    room_B = torch.as_tensor(capacity, device=ids_TK.device).expand(buckets)
    wanted_TK = ids_TK != NO_EXPERT
    if valid_T is not None:
        wanted_TK = wanted_TK & valid_T.unsqueeze(1)
    bound_TK = wanted_TK & (ids_TK < num_experts)
    bucket_TK = torch.where(bound_TK, bucket_E[ids_TK.clamp(0, num_experts - 1)], buckets)
    order_N = _order(weights_TK, by)
    rank_TK = _ranks(bucket_TK.reshape(-1), order_N, buckets + 1).view_as(ids_TK)
    kept_TK = wanted_TK & ~(bound_TK & (rank_TK >= F.pad(room_B, (0, 1))[bucket_TK]))
    ids_now_TK = ids_TK.masked_fill(~kept_TK, NO_EXPERT)
    weights_now_TK = weights_TK.masked_fill(~kept_TK, 0.0)
    if overflow == "reroute":
        if scores_TE is None:
            raise ValueError("overflow='reroute' needs scores_TE, to know the next best expert")
        over_TK = wanted_TK & ~kept_TK
        held_B = _counts(bucket_TK[kept_TK], buckets + 1)[:buckets]
        _reroute(ids_now_TK, over_TK, room_B - held_B, bucket_E, scores_TE.detach(), order_N)
        moved_TK = over_TK & (ids_now_TK != NO_EXPERT)
        ratio_TK = _ratio(scores_TE, ids_TK, ids_now_TK, moved_TK, score_function)
        weights_now_TK = torch.where(
            moved_TK, weights_TK * ratio_TK.to(weights_TK.dtype), weights_now_TK
        )
    lost_TK = wanted_TK & (ids_now_TK == NO_EXPERT)
    share = lost_TK.sum() / wanted_TK.sum().clamp_min(1)
    return Limited(ids_now_TK, weights_now_TK, share)


def check_groups(groups: int | None, num_experts: int) -> None:
    """Raise ValueError unless the experts can be split into so many groups."""
    if groups is not None and (groups < 1 or num_experts % groups):
        raise ValueError(f"groups={groups} for {num_experts} experts; it has to divide them")


def _order(weights_TK: Tensor, by: By) -> Tensor:
    # Slots, foremost first.
    slots_TK = torch.arange(weights_TK.numel(), device=weights_TK.device).view_as(weights_TK)
    if by == "choice":
        return slots_TK.t().reshape(-1)
    if by == "probability":
        return torch.argsort(weights_TK.detach().reshape(-1), descending=True, stable=True)
    return slots_TK.view(-1)


def _ranks(bucket_N: Tensor, order_N: Tensor, buckets: int) -> Tensor:
    # How many slots of the same bucket stand before each, in `order_N`.
    ordered_N = bucket_N[order_N]
    by_bucket_N = torch.argsort(ordered_N, stable=True)
    count_B = _counts(ordered_N, buckets)
    begin_B = count_B.cumsum(0) - count_B
    place_N = torch.arange(len(bucket_N), device=bucket_N.device)
    rank_N = torch.empty_like(place_N)
    rank_N[order_N[by_bucket_N]] = place_N - begin_B[ordered_N[by_bucket_N]]
    return rank_N


def _counts(bucket_N: Tensor, buckets: int) -> Tensor:
    return bucket_N.new_zeros(buckets).scatter_add_(0, bucket_N, torch.ones_like(bucket_N))


def _reroute(
    ids_TK: Tensor,
    over_TK: Tensor,
    room_B: Tensor,
    bucket_E: Tensor,
    scores_TE: Tensor,
    order_N: Tensor,
) -> None:
    """Give overflowing slots the next best experts with room, in `ids_TK`.

    Each round some slot is placed or given up: what is offered goes to buckets that have room.
    """
    width, experts, buckets = ids_TK.shape[1], len(bucket_E), len(room_B)
    room_B, pending_TK = room_B.clone(), over_TK.clone()
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    while True:
        token_U = pending_TK.any(dim=1).nonzero().squeeze(1)
        if len(token_U) == 0:
            return
        slot_U = pending_TK[token_U].int().argmax(dim=1)
        has_UE = scores_TE.new_zeros(len(token_U), experts + 1, dtype=torch.bool)
        held_UK = ids_TK[token_U]
        held_UK = held_UK.masked_fill((held_UK < 0) | (held_UK > experts), experts)
        has_UE.scatter_(1, held_UK, True)
        barred_UE = has_UE[:, :experts] | (room_B[bucket_E] <= 0)
        best_U, choice_U = scores_TE[token_U].masked_fill(barred_UE, -torch.inf).max(dim=1)
        hopeless_U = best_U == -torch.inf
        pending_TK[token_U[hopeless_U]] = False
        token_U, slot_U, choice_U = (x[~hopeless_U] for x in (token_U, slot_U, choice_U))
        foremost_U = place_N[token_U * width + slot_U].argsort()
        bucket_U = bucket_E[choice_U]
        taken_U = _ranks(bucket_U, foremost_U, buckets) < room_B[bucket_U]
        token_U, slot_U, choice_U = (x[taken_U] for x in (token_U, slot_U, choice_U))
        ids_TK[token_U, slot_U] = choice_U
        pending_TK[token_U, slot_U] = False
        room_B -= _counts(bucket_E[choice_U], buckets)


def _ratio(
    scores_TE: Tensor, old_TK: Tensor, new_TK: Tensor, moved_TK: Tensor, function: str
) -> Tensor:
    # f(new score) / f(old score) where a slot moved, from logarithms; 1 elsewhere.
    if function == "sigmoid":
        logs_TE = F.logsigmoid(scores_TE)
    elif function == "sqrtsoftplus":
        tiny = torch.finfo(scores_TE.dtype).tiny
        logs_TE = F.softplus(scores_TE).clamp_min(tiny).log() / 2
    elif function == "softmax":
        logs_TE = scores_TE
    else:
        raise ValueError(
            f"score_function={function!r}; overflow='reroute' makes weights for softmax, sigmoid "
            "and sqrtsoftplus"
        )
    old_TK, new_TK = (ids.masked_fill(~moved_TK, 0) for ids in (old_TK, new_TK))
    difference_TK = logs_TE.gather(1, new_TK) - logs_TE.gather(1, old_TK)
    return torch.where(moved_TK, difference_TK, 0.0).exp()

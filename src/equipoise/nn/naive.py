"""Slow and obvious twins of the experts and of capacity: loops from the definitions.

They share no code with the fast ones. `experts` takes any floating type and is differentiable
(float64 for gradcheck); `limit` works on Python numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equipoise.routing import NO_EXPERT


def experts(
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    inner_EOD: Tensor,
    down_EDF: Tensor,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """Weighted sum of each token's experts, one token and one slot at a time."""
    outputs = []
    for x, ids, weights in zip(hidden_TD, ids_TK.tolist(), weights_TK, strict=True):
        total = torch.zeros_like(x)
        for expert, weight in zip(ids, weights, strict=True):
            if expert != NO_EXPERT:
                inner = _inner(inner_EOD[expert] @ x, activation, gated)
                total = total + weight * (down_EDF[expert] @ inner)
        outputs.append(total)
    return torch.stack(outputs) if outputs else torch.zeros_like(hidden_TD)


def _inner(inner: Tensor, activation: str, gated: bool) -> Tensor:
    half = len(inner) // 2
    gate = inner[:half] if gated else inner
    if activation == "silu":
        active = gate / (1 + torch.exp(-gate))
    elif activation == "gelu":
        active = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    else:
        active = torch.where(gate > 0, gate, torch.zeros_like(gate))
        active = active**2 if activation == "relu2" else active
    return active * inner[half:] if gated else active


def limit(
    ids: list[list[int]],
    weights: list[list[float]],
    scores: list[list[float]],
    valid: list[bool],
    *,
    num_experts: int,
    room: list[int],
    by: str = "position",
    overflow: str = "drop",
    groups: int | None = None,
) -> tuple[list[list[int]], float]:
    """Ids under a capacity of room[bucket], and the dropped share."""
    per_bucket = num_experts // groups if groups else 1
    wants = [
        (t, k)
        for t, row in enumerate(ids)
        for k, expert in enumerate(row)
        if expert != NO_EXPERT and valid[t]
    ]
    if by == "choice":
        wants.sort(key=lambda slot: (slot[1], slot[0]))
    if by == "probability":
        wants.sort(key=lambda slot: (-weights[slot[0]][slot[1]], slot))
    left, now = list(room), [[NO_EXPERT] * len(row) for row in ids]
    over = []
    for t, k in wants:
        expert = ids[t][k]
        if expert >= num_experts:
            now[t][k] = expert
        elif left[expert // per_bucket] > 0:
            left[expert // per_bucket] -= 1
            now[t][k] = expert
        else:
            over.append((t, k))
    if overflow == "reroute":
        over = _reroute(now, over, left, scores, per_bucket)
    return now, len(over) / max(len(wants), 1)


def _reroute(
    now: list[list[int]],
    over: list[tuple[int, int]],
    left: list[int],
    scores: list[list[float]],
    per_bucket: int,
) -> list[tuple[int, int]]:
    """Place slots, foremost first, by rounds of offers; returns those that found no expert."""
    order = {slot: at for at, slot in enumerate(over)}
    lost: list[tuple[int, int]] = []
    while order:
        offers = []
        for t in {t for t, _ in order}:
            pending = sorted(slot for slot in order if slot[0] == t)
            free = [
                e for e in range(len(scores[t])) if left[e // per_bucket] > 0 and e not in now[t]
            ]
            if free:
                best = max(free, key=lambda e, row=scores[t]: row[e])  # type: ignore[misc]
                offers.append((order[pending[0]], pending[0], best))
            else:
                lost += pending
                for slot in pending:
                    del order[slot]
        for _, slot, best in sorted(offers):
            if left[best // per_bucket] > 0:
                left[best // per_bucket] -= 1
                now[slot[0]][slot[1]] = best
                del order[slot]
    return lost

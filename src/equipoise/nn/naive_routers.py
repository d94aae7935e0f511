"""Slow and obvious twins of the routers: one token, one expert at a time, from the definitions.

They share no code with the fast ones, take any floating type (float64 for gradcheck), and give
weights as a dense [T, E] table, 0 where an expert was not selected, with the graph to their inputs.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor


def logits(hidden_TD: Tensor, weight_ED: Tensor) -> list[list[Tensor]]:
    """Products of each token with each expert's row."""
    return [
        [sum((a * b for a, b in zip(x, w, strict=True)), x.new_zeros(())) for w in weight_ED]
        for x in hidden_TD
    ]


def normalized(row: list[Tensor], scale: float) -> list[Tensor]:
    """A token's logits with mean 0 and standard deviation `scale`."""
    mean = total(row) / len(row)
    spread = torch.sqrt(total([(x - mean) ** 2 for x in row]) / len(row))
    return [scale * (x - mean) / spread for x in row]


def scores(row: list[Tensor], function: str) -> list[Tensor]:
    """Scores of one token's logits."""
    if function == "softmax":
        return softmax(row)
    if function == "sigmoid":
        return [1 / (1 + torch.exp(-x)) for x in row]
    return [torch.sqrt(torch.log(1 + torch.exp(x))) for x in row]


def top_k(
    hidden_TD: Tensor,
    weight_ED: Tensor,
    k: int,
    *,
    function: str = "softmax",
    weighting: str = "scores",
    bias: list[float] | None = None,
    groups: tuple[int, int, int] | None = None,
    temperature: float = 1.0,
    logit_norm: float | None = None,
    route_scale: float = 1.0,
) -> tuple[Tensor, list[list[int]]]:
    """Dense weights [T, E] and selected ids, best first; groups = (number, limit, per group)."""
    rows, selected = [], []
    for row in logits(hidden_TD, weight_ED):
        if logit_norm is not None:
            row = normalized(row, logit_norm)
        row = [x / temperature for x in row]
        values = row if weighting == "softmax" else scores(row, function)
        biased = [v.item() + (bias[e] if bias else 0.0) for e, v in enumerate(values)]
        allowed = in_best_groups(biased, *groups) if groups else list(range(len(biased)))
        ids = sorted(allowed, key=lambda e: -biased[e])[:k]
        weights = weighed([values[e] for e in ids], weighting)
        rows.append(dense(ids, [w * route_scale for w in weights], len(row), hidden_TD))
        selected.append(ids)
    return torch.stack(rows), selected


def weighed(selected: list[Tensor], weighting: str) -> list[Tensor]:
    """Routing weights of the selected scores."""
    if weighting == "renormalized":
        return [s / total(selected) for s in selected]
    if weighting == "softmax":
        return softmax(selected)
    if weighting == "equal":
        return [torch.ones_like(s) / len(selected) for s in selected]
    return selected


def in_best_groups(values: list[float], number: int, limit: int, per_group: int) -> list[int]:
    """Experts of the groups with the largest sum of their best values."""
    size = len(values) // number
    members = [list(range(g * size, (g + 1) * size)) for g in range(number)]
    worth = [sum(sorted((values[e] for e in m), reverse=True)[:per_group]) for m in members]
    best = sorted(range(number), key=lambda g: -worth[g])[:limit]
    return [e for g in sorted(best) for e in members[g]]


def sinkhorn(logits_TE: list[list[float]], iterations: int) -> list[list[float]]:
    """exp(logits) scaled in turn to columns of sum T / E and rows of sum 1."""
    plan = [[math.exp(x) for x in row] for row in logits_TE]
    tokens, experts = len(plan), len(plan[0])
    for _ in range(iterations):
        for e in range(experts):
            column = sum(row[e] for row in plan)
            for row in plan:
                row[e] *= tokens / experts / column
        plan = [[x / sum(row) for x in row] for row in plan]
    return plan


def best_assignment(logits_TE: list[list[float]]) -> float:
    """Highest total logit with at most ceil(T / E) tokens per expert, by trying everything."""
    tokens, experts = len(logits_TE), len(logits_TE[0])
    seats = -(-tokens // experts)
    return max(
        sum(row[e] for row, e in zip(logits_TE, ids, strict=True))
        for ids in product(range(experts), repeat=tokens)
        if max(ids.count(e) for e in range(experts)) <= seats
    )


def expert_choice(
    hidden_TD: Tensor, weight_ED: Tensor, k: int, *, function: str, chunk: int | None = None
) -> Tensor:
    """Dense weights [T, E] where each expert picks its best tokens of each chunk."""
    values = [scores(row, function) for row in logits(hidden_TD, weight_ED)]
    experts, size = len(weight_ED), chunk or len(values)
    chosen: list[list[int]] = [[] for _ in values]
    for start in range(0, len(values), size):
        rows = range(start, min(start + size, len(values)))
        picks = -(-len(rows) * k // experts)
        for e in range(experts):
            for t in sorted(rows, key=lambda t: -values[t][e].item())[:picks]:
                chosen[t].append(e)
    return torch.stack(
        [
            dense(ids, [v[e] for e in ids], experts, hidden_TD)
            for ids, v in zip(chosen, values, strict=True)
        ]
    )


def expert_threshold(
    hidden_TD: Tensor, weight_ED: Tensor, thresholds: list[float], *, function: str
) -> Tensor:
    """Dense weights [T, E] of the experts whose threshold a token's score exceeds."""
    rows = []
    for row in logits(hidden_TD, weight_ED):
        values = scores(row, function)
        ids = [e for e, v in enumerate(values) if v.item() > thresholds[e]]
        rows.append(dense(ids, [values[e] for e in ids], len(values), hidden_TD))
    return torch.stack(rows)


def relu(hidden_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Dense weights [T, E]: positive logits."""
    return torch.stack(
        [torch.stack([x.clamp(min=0) for x in row]) for row in logits(hidden_TD, weight_ED)]
    )


def relu_l1(hidden_TD: Tensor, weight_ED: Tensor, k: int) -> Tensor:
    """The L1 term of ReLU routing before its strength: mean over tokens of sum f_e relu_e."""
    weights_TE = relu(hidden_TD, weight_ED)
    tokens, experts = weights_TE.shape
    value = weights_TE.new_zeros(())
    for e in range(experts):
        load = experts / (k * tokens) * sum(w.item() > 0 for w in weights_TE[:, e])
        value = value + load * total(list(weights_TE[:, e])) / tokens
    return value


def soft_mixing(
    hidden_SD: Tensor, weight_PD: Tensor, scale: Tensor
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Dispatch and combine weights [S][P] of soft MoE for one sequence."""
    unit = [x / torch.sqrt(total(list(x * x))) for x in hidden_SD]
    slots = [w / torch.sqrt(total(list(w * w))) for w in weight_PD]
    table = [[scale * total(list(x * w)) for w in slots] for x in unit]
    columns = [softmax([row[p] for row in table]) for p in range(len(slots))]
    dispatch = [[column[t] for column in columns] for t in range(len(table))]
    return dispatch, [softmax(row) for row in table]


def softmax(row: list[Tensor]) -> list[Tensor]:
    """Exponentials over their sum."""
    powers = [torch.exp(x) for x in row]
    return [p / total(powers) for p in powers]


def total(values: list[Tensor]) -> Tensor:
    """Sum of 0-dimensional tensors."""
    return sum(values[1:], values[0])


def dense(ids: list[int], weights: list[Tensor], experts: int, like: Tensor) -> Tensor:
    """A row with each weight at its expert, 0 elsewhere."""
    at = dict(zip(ids, weights, strict=True))
    return torch.stack([at.get(e, like.new_zeros(())) for e in range(experts)])

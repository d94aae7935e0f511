"""A router without learning, under a controller: fresh scores of a fixed skew, step after step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from equipoise.balance.controllers import GroupLimit, Observer


def max_vio(counts_E: Tensor) -> float:
    return float(counts_E.max() / counts_E.double().mean() - 1)


def floor(*, tokens: int, experts: int, top_k: int) -> float:
    """MaxVio that uniform routing shows by chance."""
    per_expert = tokens * top_k / experts
    return math.sqrt(2 * math.log(experts) * (1 - top_k / experts) / per_expert)


def select(
    scores_TE: Tensor, bias_E: Tensor, top_k: int, acts: str, groups: GroupLimit | None
) -> Tensor:
    biased_TE = scores_TE + bias_E if acts == "add" else scores_TE * bias_E
    if groups is not None:
        biased_TE = biased_TE.where(groups.allowed(biased_TE, top_k), -torch.inf)
    return biased_TE.topk(top_k).indices


def run(
    controller: Any,
    *,
    steps: int,
    seed: int = 0,
    tokens: int = 2048,
    experts: int = 16,
    top_k: int = 2,
    function: str = "sigmoid",
    groups: GroupLimit | None = None,
) -> tuple[list[float], Tensor]:
    """MaxVio of each step before its update, and the last bias [1, E]."""
    random = torch.Generator().manual_seed(seed)
    offset_E = torch.randn(experts, generator=random)
    bias_LE = torch.full((1, experts), controller.start)
    state = controller.initial(num_layers=1, num_experts=experts)
    course = []
    for step in range(steps):
        logits_TE = torch.randn(tokens, experts, generator=random) + offset_E
        scores_TE = logits_TE.sigmoid() if function == "sigmoid" else logits_TE.softmax(-1)
        ids_TK = select(scores_TE, bias_LE[0], top_k, controller.acts, groups)
        counts_LE = torch.bincount(ids_TK.flatten(), minlength=experts)[None]
        course.append(max_vio(counts_LE[0]))
        if isinstance(controller, Observer):
            controller.observe(
                layer=0,
                scores_TE=scores_TE,
                bias_E=bias_LE[0],
                top_k=top_k,
                valid_T=None,
                state=state,
            )
        bias_LE = controller.update(bias_LE=bias_LE, counts_LE=counts_LE, step=step, state=state)
    return course, bias_LE

"""Selections that balance a batch as a whole while training; each token chooses freely in eval.

Both look at all tokens of the batch, later ones too, so their training selection is not causal;
and both take every row for a token: leave padding out of what they are given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sinkhorn:
    """Top-k of the logits after Sinkhorn's balancing of exp(logits) (S-BASE, arXiv 2202.01169).

    The matrix is scaled in turn until each expert gets T / E and each token gives 1. Works in the
    log domain, where large logits do not overflow. Weights come from the unscaled scores.
    """

    iterations: int = 10
    reads: ClassVar[Literal["scores", "logits"]] = "logits"

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError where there is nothing to iterate."""
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}; at least 1 is needed")

    def __call__(self, scores_TE: Tensor, top_k: int, *, training: bool) -> Tensor:
        """Ids [T, K], best first."""
        if training and len(scores_TE):
            scores_TE = sinkhorn(scores_TE, self.iterations)
        return scores_TE.topk(top_k, dim=1).indices


def sinkhorn(logits_TE: Tensor, iterations: int) -> Tensor:
    """Logarithm of exp(logits) scaled towards columns that sum to T / E and rows that sum to 1."""
    tokens, experts = logits_TE.shape
    plan_TE = logits_TE
    for _ in range(iterations):
        plan_TE = plan_TE - plan_TE.logsumexp(dim=0, keepdim=True) + math.log(tokens / experts)
        plan_TE = plan_TE - plan_TE.logsumexp(dim=1, keepdim=True)
    return plan_TE


@dataclass(frozen=True, slots=True)
class Assignment:
    """BASE (arXiv 2103.16716): the assignment of highest total logit, at most ceil(T / E) each.

    One expert per token. Solved exactly by scipy on the CPU, with memory T x T and time up to T^3:
    for small batches and as a yardstick. In evaluation each token takes its best expert.
    BASE also shuffles tokens among the workers before assigning; do that outside.
    """

    reads: ClassVar[Literal["scores", "logits"]] = "logits"

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError for more than one expert per token."""
        if top_k != 1:
            raise ValueError(f"top_k={top_k}; BASE assigns one expert to each token: use top_k=1")

    def __call__(self, scores_TE: Tensor, top_k: int, *, training: bool) -> Tensor:
        """Ids [T, 1]."""
        if training:
            return assign(scores_TE).unsqueeze(1)
        return scores_TE.argmax(dim=1, keepdim=True)


def assign(logits_TE: Tensor) -> Tensor:
    """Expert ids [T] of highest total logit with at most ceil(T / E) tokens for each expert."""
    from scipy.optimize import linear_sum_assignment

    tokens, experts = logits_TE.shape
    seats = math.ceil(tokens / experts)
    worth = logits_TE.detach().double().repeat_interleave(seats, dim=1).cpu().numpy()
    _, seat_of_T = linear_sum_assignment(worth, maximize=True)
    return torch.as_tensor(seat_of_T // max(seats, 1), dtype=torch.int64, device=logits_TE.device)

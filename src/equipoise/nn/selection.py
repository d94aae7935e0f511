"""How experts are picked once each token has a score for each: the parts of a TopKRouter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor


class Selection(Protocol):
    """Picks K different experts for each token; the weights are not its business."""

    reads: ClassVar[Literal["scores", "logits"]]
    """What it is called with: scores with the selection bias added, or bare logits."""

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError where it cannot pick top_k of num_experts."""
        ...

    def __call__(self, scores_TE: Tensor, top_k: int, *, training: bool) -> Tensor:
        """Ids [T, K], best first."""
        ...


@dataclass(frozen=True, slots=True)
class TopK:
    """The K experts of highest score."""

    reads: ClassVar[Literal["scores", "logits"]] = "scores"

    def check(self, num_experts: int, top_k: int) -> None:
        """Nothing beyond what every router checks."""

    def __call__(self, scores_TE: Tensor, top_k: int, *, training: bool) -> Tensor:
        """Ids [T, K], best first."""
        return scores_TE.topk(top_k, dim=1).indices


@dataclass(frozen=True, slots=True)
class GroupLimited:
    """Top-k within the best `limit` of `groups` equal groups of neighbouring experts.

    A group is worth the sum of its `per_group` best scores: 1 in DeepSeek-V2 (arXiv 2405.04434,
    device-limited routing), 2 in DeepSeek-V3's released code. Experts outside are masked with -inf;
    with 0.0, as some copies of that code have it, experts of negative biased score lose to them.
    """

    groups: int
    limit: int
    per_group: int = 2
    reads: ClassVar[Literal["scores", "logits"]] = "scores"

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError where groups do not divide the experts or leave too few of them."""
        if self.groups < 1 or num_experts % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide {num_experts} experts into equal groups"
            )
        if not 1 <= self.limit <= self.groups:
            raise ValueError(f"limit={self.limit} of {self.groups} groups; allowed is 1 to all")
        size = num_experts // self.groups
        if not 1 <= self.per_group <= size:
            raise ValueError(
                f"per_group={self.per_group}, but a group has {size} experts; allowed is 1 to "
                f"{size}"
            )
        if top_k > self.limit * size:
            raise ValueError(
                f"top_k={top_k}, but {self.limit} groups of {size} experts hold only "
                f"{self.limit * size}; raise limit or lower top_k"
            )

    def __call__(self, scores_TE: Tensor, top_k: int, *, training: bool) -> Tensor:
        """Ids [T, K], best first."""
        tokens, experts = scores_TE.shape
        grouped_TGE = scores_TE.view(tokens, self.groups, experts // self.groups)
        worth_TG = grouped_TGE.topk(self.per_group, dim=2).values.sum(dim=2)
        best = worth_TG.topk(self.limit, dim=1, sorted=False).indices
        closed_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter(1, best, False)
        open_TE = grouped_TGE.masked_fill(closed_TG.unsqueeze(2), -torch.inf).flatten(1)
        return open_TE.topk(top_k, dim=1).indices


def node_limited(nodes: int, limit: int, top_k: int) -> GroupLimited:
    """DeepSeek-V3's node-limited routing (arXiv 2412.19437 §2.1.2): a token visits `limit` nodes.

    A node is worth the sum of its K / limit best scores.
    """
    if limit < 1 or top_k % limit:
        raise ValueError(
            f"limit={limit} nodes do not divide top_k={top_k}; use GroupLimited with per_group"
        )
    return GroupLimited(nodes, limit, per_group=top_k // limit)


@dataclass(frozen=True, slots=True)
class Random:
    """K experts drawn uniformly without replacement, in evaluation too: the load of chance."""

    reads: ClassVar[Literal["scores", "logits"]] = "logits"

    def check(self, num_experts: int, top_k: int) -> None:
        """Nothing beyond what every router checks."""

    def __call__(self, scores_TE: Tensor, top_k: int, *, training: bool) -> Tensor:
        """Ids [T, K], in random order."""
        return torch.rand_like(scores_TE).topk(top_k, dim=1).indices

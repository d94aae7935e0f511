"""A capacity as a layer keeps it: its settings, and what it remembers of the recent load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.nn import capacity as rules
from equipoise.nn.base import check_choice
from equipoise.nn.capacity import By, Limited, Overflow


@dataclass(frozen=True)
class Capacity:
    """Settings: `factor` times the fair share for each expert; see `capacity.limit` for the rest.

    `recent`, a decay between 0 and 1, makes the capacity follow the load: once `Limiter.step` was
    called, a bucket gets `factor` times its recent share (moving average over steps) of this
    batch's selections, at least a fair share and at most one per token and expert.
    """

    factor: float = 1.25
    by: By = "position"
    overflow: Overflow = "drop"
    groups: int | None = None
    recent: float | None = None

    def __post_init__(self) -> None:
        check_choice("by", self.by, rules.BY)
        check_choice("overflow", self.overflow, rules.OVERFLOW)
        if not self.factor > 0:
            raise ValueError(f"factor={self.factor}; it has to be above 0")
        if self.recent is not None and not 0 <= self.recent < 1:
            raise ValueError(f"recent={self.recent}; a decay lies between 0 and 1, 1 excluded")
        if self.overflow == "pad" and (self.groups or self.recent is not None):
            raise ValueError("overflow='pad' needs one capacity per expert: no groups, no recent")


class Limiter:
    """Applies a `Capacity` to the routings of one layer.

    Counts are plain tensors outside the module's buffers, which DDP would overwrite; they change
    the capacity in `step` only, so that recomputation in the backward pass drops the same slots.
    """

    def __init__(
        self, settings: Capacity, num_experts: int, score_function: str = "softmax"
    ) -> None:
        rules.check_groups(settings.groups, num_experts)
        self.settings, self.num_experts = settings, num_experts
        self.score_function = score_function
        self.share_E: Tensor | None = None
        """Moving average of each expert's share of all selections; None before the first step."""
        self.counts_E: Tensor | None = None
        """Selections of each expert since the last step."""

    def __call__(
        self,
        ids_TK: Tensor,
        weights_TK: Tensor,
        scores_TE: Tensor | None = None,
        valid_T: Tensor | None = None,
        *,
        capacity: int | Tensor | None = None,
        count: bool = False,
    ) -> Limited:
        """The routing under this capacity, or the one given; `count` lets it enter the recent load."""
        if count and self.settings.recent is not None:
            self._count(ids_TK, valid_T)
        return rules.limit(
            ids_TK,
            weights_TK,
            scores_TE,
            valid_T,
            num_experts=self.num_experts,
            capacity=self.capacity(ids_TK, valid_T) if capacity is None else capacity,
            by=self.settings.by,
            overflow=self.settings.overflow,
            groups=self.settings.groups,
            score_function=self.score_function,
        )

    def capacity(self, ids_TK: Tensor, valid_T: Tensor | None = None) -> int | Tensor:
        """Of each bucket in this batch, of whose tokens only the valid ones count."""
        tokens, top_k = ids_TK.shape
        if valid_T is not None:
            tokens = int(valid_T.sum())
        buckets = self.settings.groups or self.num_experts
        if self.share_E is None:
            return rules.capacity(tokens, top_k, buckets, self.settings.factor)
        share_B = self.share_E.to(ids_TK.device).view(buckets, -1).sum(dim=1)
        wanted_B = (share_B * (self.settings.factor * tokens * top_k)).ceil().long()
        fair = rules.capacity(tokens, top_k, buckets, 1.0)
        most = tokens * min(top_k, self.num_experts // buckets)
        return wanted_B.clamp(min=fair, max=max(most, fair))

    def step(self, group: dist.ProcessGroup | None = None) -> None:
        """End of an optimizer step: take the counts since the last, summed over `group`, in."""
        decay = self.settings.recent
        if decay is None or self.counts_E is None:
            return
        if group is not None:
            dist.all_reduce(self.counts_E, group=group)
        share_E = self.counts_E / self.counts_E.sum().clamp_min(1)
        self.counts_E = None
        if self.share_E is not None:
            share_E = decay * self.share_E + (1 - decay) * share_E
        self.share_E = share_E

    def state_dict(self) -> dict[str, Tensor | None]:
        """What a resumed run needs."""
        return {"share_E": self.share_E, "counts_E": self.counts_E}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Take over what `state_dict` gave."""
        for name in ("share_E", "counts_E"):
            held_E = state[name]
            if held_E is not None and held_E.shape != (self.num_experts,):
                raise ValueError(f"{name} of {list(held_E.shape)}; wanted is [{self.num_experts}]")
            setattr(self, name, None if held_E is None else held_E.clone())

    @torch.no_grad()
    def _count(self, ids_TK: Tensor, valid_T: Tensor | None) -> None:
        ids_TK = ids_TK if valid_T is None else ids_TK[valid_T]
        ids_N = ids_TK[(ids_TK >= 0) & (ids_TK < self.num_experts)]
        if self.counts_E is None:
            self.counts_E = ids_N.new_zeros(self.num_experts)
        self.counts_E.scatter_add_(0, ids_N, torch.ones_like(ids_N))

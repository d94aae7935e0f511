"""Quantile balancing: set the bias to where each expert's fair share lies, instead of stepping there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.balance.controllers.checks import (
    active,
    check_positive,
    check_share,
    checked_counts,
    kept,
    settled,
    wide,
)
from equipoise.balance.controllers.margins import WANTED, GroupLimit, check_observed, needed_bias
from equipoise.balance.controllers.protocol import Acts, Device, State
from equipoise.errors import EquipoiseError


@dataclass(frozen=True)
class QuantileBase(ABC):
    """What both forms share: b <- ema b + (1 - ema) (quantile - its mean), one update per step.

    `ema` = 0 is the published rule, without memory: it reaches balance in one update and follows the
    sampling noise of the step; 0.9 smooths that. `centred` takes the mean out. `groups`, for a router
    with a group limit, makes the bias that a token needs one that also brings the expert's group among
    the token's (ours; Megatron refuses the two together): balance within groups and among them.
    An expert within reach of fewer tokens than its fair share takes all of those; one within reach of
    none keeps its bias. Tokens route with the bias of the step before, so that nothing of a token's
    future enters.
    """

    _: KW_ONLY
    ema: float = 0.0
    centred: bool = True
    clip: float | None = None
    groups: GroupLimit | None = None

    acts: ClassVar[Acts] = "add"
    start: ClassVar[float] = 0.0
    reduce: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_share("ema", self.ema)
        check_positive("clip", self.clip)

    def initial(self, *, num_layers: int, num_experts: int, device: Device = None) -> State:
        """`seen`: selections wanted and rows that were no numbers, int32 [L, 2]."""
        return {"seen": torch.zeros(num_layers, 2, dtype=torch.int32, device=device)}

    @torch.no_grad()
    def observe(
        self,
        *,
        layer: int,
        scores_TE: Tensor,
        bias_E: Tensor,
        top_k: int,
        valid_T: Tensor | None,
        state: State,
    ) -> None:
        """Add the scores of one counted pass (see `Observer`); `bias_E` as it was in that pass."""
        if "seen" not in state or not 0 <= layer < len(state["seen"]):
            raise EquipoiseError(
                f"no state for a layer at position {layer}; begin with initial() for all layers"
            )
        need_TE, seen_2 = needed_bias(scores_TE, bias_E, top_k, valid_T, self.groups)
        if len(need_TE):
            self._observe(layer, need_TE, bias_E, top_k, seen_2[WANTED], state)
            state["seen"][layer] += seen_2

    @torch.no_grad()
    def update(self, *, bias_LE: Tensor, counts_LE: Tensor, step: int, state: State) -> Tensor:
        """The bias of the next step, float32 [L, E]; what was observed is forgotten."""
        active_L1 = active(checked_counts(bias_LE, counts_LE))
        check_observed(state, active_L1)
        target_LE = self._solve(wide(bias_LE), active_L1, state)
        if self.centred:
            target_LE = target_LE - target_LE.mean(dim=-1, keepdim=True)
        new_LE = self.ema * bias_LE + (1 - self.ema) * target_LE
        for name in self.reduce:
            state[name].zero_()
        return settled(new_LE, bias_LE, active_L1=active_L1, clip=self.clip)

    @abstractmethod
    def _observe(
        self,
        layer: int,
        need_TE: Tensor,
        bias_E: Tensor,
        top_k: int,
        wanted: Tensor,
        state: State,
    ) -> None:
        """Take up the biases that one pass needs; `wanted` is its number of selections."""

    @abstractmethod
    def _solve(self, bias_LE: Tensor, active_L1: Tensor, state: State) -> Tensor:
        """The quantiles, before centring."""


@dataclass(frozen=True)
class Quantile(QuantileBase):
    """The exact quantile of each pass, averaged over passes and ranks by their tokens (Megatron's form).

    Exact for one pass per step; otherwise it depends on how the batch is split, as a mean of quantiles
    does: `QuantileHistogram` does not.
    """

    reduce: ClassVar[tuple[str, ...]] = ("total", "seen")

    def initial(self, *, num_layers: int, num_experts: int, device: Device = None) -> State:
        """`total`: the sum of quantile times selections, [L, E]; and `seen`."""
        state = super().initial(num_layers=num_layers, num_experts=num_experts, device=device)
        return state | {"total": wide(torch.zeros(num_layers, num_experts, device=device))}

    def _observe(
        self,
        layer: int,
        need_TE: Tensor,
        bias_E: Tensor,
        top_k: int,
        wanted: Tensor,
        state: State,
    ) -> None:
        total_LE = kept(state, "total", (len(state["seen"]), need_TE.shape[1]))
        total_LE[layer] += wide(fair_quantile(need_TE, wanted, top_k, bias_E)) * wanted

    def _solve(self, bias_LE: Tensor, active_L1: Tensor, state: State) -> Tensor:
        wanted_L1 = state["seen"][:, WANTED, None].clamp_min(1)
        return kept(state, "total", tuple(bias_LE.shape)) / wanted_L1


def fair_quantile(need_TE: Tensor, wanted: Tensor, top_k: int, otherwise_E: Tensor) -> Tensor:
    """The bias below which lie `wanted` / E of each expert's column; `otherwise_E` where it is empty.

    It minimises the dual of the assignment problem: the n-th smallest for n = wanted / E rounded up
    where E does not divide, the middle of the n-th and the next where it does, so that no token lies
    on the threshold. (Megatron takes the upper end of that gap, the same optimum.) `wanted` is at most
    `top_k` of each row, so that no more than the smallest T K / E + 2 are sorted.
    """
    rows, num_experts = need_TE.shape
    entering_E = need_TE.isfinite().sum(dim=0)
    target_E = torch.minimum(wanted, entering_E * num_experts)
    below_E = (target_E + num_experts - 1) // num_experts
    whole_E = (target_E % num_experts == 0).to(torch.int64)
    few = min(rows, rows * top_k // num_experts + 2)
    sorted_ER = need_TE.t().contiguous().topk(few, dim=-1, largest=False, sorted=True).values
    last_E = (entering_E - 1).clamp_min(0)
    lower_E1 = sorted_ER.gather(1, (below_E - 1).clamp_min(0)[:, None])
    upper_E1 = sorted_ER.gather(
        1, torch.minimum(below_E - 1 + whole_E, last_E).clamp_min(0)[:, None]
    )
    return torch.where(target_E > 0, (lower_E1 + upper_E1)[:, 0] / 2, otherwise_E)

"""Quantile balancing from a histogram that ranks and micro-batches add to: one integer all-reduce a step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.balance.controllers.checks import kept, wide, write
from equipoise.balance.controllers.margins import WANTED
from equipoise.balance.controllers.protocol import Device, State
from equipoise.balance.controllers.quantile import QuantileBase
from equipoise.errors import EquipoiseError

FOLLOW = 4.0  # the range of the next step, in moves of this one
FINEST = 1e-6  # the narrowest range, as a part of the full one


@dataclass(frozen=True)
class QuantileHistogram(QuantileBase):
    """Kimi K3's form (arXiv 2607.24653, appendix D): `bins` uniform bins of the needed bias per expert.

    The bins reach from min b - reach to max b + reach, where reach is the width of `score_range`: all
    values that can occur without `groups`, 1 for scores in [0, 1]. The quantile is interpolated in its
    bin, so it is within a bin width of the exact one of the whole step, and equal bit by bit for any
    split into ranks and micro-batches.

    Softmax scores lie in [0, 1] but near 1 / E, and sqrt-softplus scores or logits have no bound: with
    `adaptive` the reach is four times the last move of a quantile, up to the full one. Values beyond,
    such as those of experts whose group is far behind, are counted in the end bins; a quantile there has
    moved by the whole reach, so that it opens again.
    It is a function of reduced integers only, hence the same on all ranks.
    """

    _: KW_ONLY
    bins: int = 1000
    score_range: tuple[float, float] = (0.0, 1.0)
    adaptive: bool = False

    reduce: ClassVar[tuple[str, ...]] = ("histogram", "seen")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 3:
            raise EquipoiseError(
                f"bins={self.bins}; a histogram needs at least 3, published are 1000"
            )
        low, high = self.score_range
        if not 0 < high - low < float("inf"):
            raise EquipoiseError(
                f"score_range={self.score_range}; give (lowest, highest), both finite"
            )

    @property
    def full(self) -> float:
        """The reach that holds every value of scores within `score_range`."""
        return float(self.score_range[1] - self.score_range[0])

    def initial(self, *, num_layers: int, num_experts: int, device: Device = None) -> State:
        """`histogram` int32 [L, E, bins], `seen`, and the `reach` of the bins, [L, 1]."""
        state = super().initial(num_layers=num_layers, num_experts=num_experts, device=device)
        shape = (num_layers, num_experts, self.bins)
        state["histogram"] = torch.zeros(shape, dtype=torch.int32, device=device)
        state["reach"] = torch.full((num_layers, 1), self.full, dtype=torch.float32, device=device)
        return state

    def _observe(
        self,
        layer: int,
        need_TE: Tensor,
        bias_E: Tensor,
        top_k: int,
        wanted: Tensor,
        state: State,
    ) -> None:
        num_experts = need_TE.shape[1]
        shape = (len(state["seen"]), num_experts, self.bins)
        flat = kept(state, "histogram", shape)[layer].view(-1)
        low_1, width_1 = self._bins(bias_E[None], state["reach"][layer, None])
        bin_TE = ((need_TE - low_1) / width_1).floor().clamp(0, self.bins - 1).to(torch.int64)
        bin_TE += torch.arange(num_experts, device=bin_TE.device) * self.bins
        enters_TE = need_TE.isfinite().to(torch.int32)
        flat.scatter_add_(0, bin_TE.view(-1), enters_TE.view(-1))

    def _bins(self, bias_LE: Tensor, reach_L1: Tensor) -> tuple[Tensor, Tensor]:
        """Where the first bin begins and how wide bins are, [L, 1], in float32 on every way here."""
        bias_LE = bias_LE.to(torch.float32)
        low_L1 = bias_LE.amin(dim=-1, keepdim=True) - reach_L1
        high_L1 = bias_LE.amax(dim=-1, keepdim=True) + reach_L1
        return low_L1, (high_L1 - low_L1) / self.bins

    def _solve(self, bias_LE: Tensor, active_L1: Tensor, state: State) -> Tensor:
        num_layers, num_experts = bias_LE.shape
        histogram_LEB = kept(state, "histogram", (num_layers, num_experts, self.bins))
        low_L1, width_L1 = self._bins(bias_LE, kept(state, "reach", (num_layers, 1)))
        place_LE, known_LE = quantile_bin(histogram_LEB, state["seen"][:, WANTED, None])
        new_LE = torch.where(known_LE, wide(low_L1) + wide(width_L1) * place_LE, bias_LE)
        if self.adaptive:
            moved_L1 = (new_LE - bias_LE).abs().amax(dim=-1, keepdim=True)
            reach_L1 = torch.maximum(FOLLOW * moved_L1, 8 * wide(width_L1))
            write(state, "reach", reach_L1.clamp(FINEST * self.full, self.full), active_L1)
        return new_LE


def quantile_bin(histogram_LEB: Tensor, wanted_L1: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the bins (2.5: the middle of the third) `wanted` / E of each row is reached; and if known.

    Interpolated linearly in the bin; the middle of the gap where it is reached at a bin's end and
    the next bins are empty. Not known for a row without entries.
    """
    num_experts, bins = histogram_LEB.shape[1:]
    below_LEB = histogram_LEB.cumsum(dim=-1, dtype=torch.int64)
    target_LE = torch.minimum(wanted_L1.to(torch.int64), below_LEB[..., -1] * num_experts)
    need_LE = (target_LE + num_experts - 1) // num_experts
    bin_LE1 = torch.searchsorted(below_LEB, need_LE[..., None]).clamp_max(bins - 1)
    inside_LE = histogram_LEB.gather(-1, bin_LE1)[..., 0]
    before_LE = below_LEB.gather(-1, bin_LE1)[..., 0] - inside_LE
    part_LE = (wide(target_LE) / num_experts - before_LE) / inside_LE.clamp_min(1)
    left_LE = bin_LE1[..., 0] + part_LE
    next_LE = torch.searchsorted(below_LEB, need_LE[..., None] + 1)[..., 0]
    gap_LE = (target_LE == (before_LE + inside_LE) * num_experts) & (next_LE < bins)
    return torch.where(gap_LE, (left_LE + next_LE) / 2, left_LE), target_LE > 0

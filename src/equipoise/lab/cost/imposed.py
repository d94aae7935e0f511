"""Routing with a load that is asked for: the experts of a model loaded by a profile, not by scores.

A profile is each expert's ratio, its load over a fair share. Shapes: T tokens, E experts, K selected
per token, N slots (T x K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.lab.model import LanguageModel

SHARES = (0.5, 0.625, 0.75, 0.875, 1.0)
"""Of all selections, on the first of two devices."""
HOT = 0.875
"""Share of the tokens that visit the hot expert."""


@dataclass(frozen=True, slots=True)
class Imposed:
    """A selection for `nn.TopKRouter`: every pass loads the experts by `ratios_E`.

    Which token goes where is drawn anew in each pass; no token visits an expert twice.
    """

    ratios_E: tuple[float, ...]
    reads: ClassVar[Literal["scores", "logits"]] = "logits"

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError for a profile that so many experts cannot have."""
        ratios_E = np.asarray(self.ratios_E)
        if len(ratios_E) != num_experts or abs(ratios_E.sum() - num_experts) > 1e-6:
            raise ValueError(
                f"{len(ratios_E)} ratios of sum {ratios_E.sum():g}; {num_experts} experts have as "
                "many, of that sum"
            )
        if ratios_E.min() < 0 or ratios_E.max() > num_experts / top_k + 1e-6:
            raise ValueError(
                f"ratios from {ratios_E.min():g} to {ratios_E.max():g}; allowed are 0 to "
                f"{num_experts / top_k:g}, an expert that every token visits"
            )

    def __call__(self, scores_TE: Tensor, top_k: int, *, training: bool) -> Tensor:
        """Ids [T, K], in order of expert."""
        tokens, experts = scores_TE.shape
        counts_E = torch.from_numpy(counts_of(self.ratios_E, tokens, top_k)).to(scores_TE.device)
        expert_N = torch.arange(experts, device=counts_E.device).repeat_interleave(counts_E)
        # An expert fills at most T places in a row, and a token's places are T apart.
        ids_TK = expert_N.view(top_k, tokens).T
        return ids_TK[torch.randperm(tokens, device=ids_TK.device)]


def counts_of(ratios_E: Sequence[float], tokens: int, top_k: int) -> NDArray[np.int64]:
    """Selections of each expert, [E], of sum T x K: what is left by rounding down goes to those
    that lost most by it, as far as they have tokens left.
    """
    wanted_E = np.asarray(ratios_E, dtype=np.float64) * (tokens * top_k / len(ratios_E))
    counts_E = np.minimum(np.floor(wanted_E + 1e-6), tokens).astype(np.int64)
    left = tokens * top_k - int(counts_E.sum())
    lost_E = np.where(counts_E < tokens, wanted_E - counts_E, -np.inf)
    counts_E[np.argsort(-lost_E, kind="stable")[:left]] += 1
    return counts_E


def profiles(experts: int, top_k: int) -> dict[str, tuple[float, ...]]:
    """Ratios by name: each share of the first of two devices, evenly over its experts and with one
    of them hot. The device's share and MaxVio of the experts go their own ways.
    """
    half, hot = experts // 2, HOT * experts / top_k
    if experts % 2 or hot > half:
        raise ValueError(
            f"{experts} experts, top-{top_k}: two devices take an even number, and a hot expert of "
            f"{hot:g} fair shares on one of them takes top-2 or more"
        )
    found = {}
    for share in SHARES:
        on, off = share * experts, (1 - share) * experts
        rest_E = (off / half,) * half
        name = f"{100 * share:g} %"
        found[f"{name}, even"] = (on / half,) * half + rest_E
        found[f"{name}, one hot"] = (hot,) + ((on - hot) / (half - 1),) * (half - 1) + rest_E
    return found


def impose(model: LanguageModel, ratios_E: Sequence[float]) -> None:
    """Load every MoE layer by a profile from now on."""
    for layer in model.moe_layers():
        selection = Imposed(tuple(ratios_E))
        selection.check(layer.num_experts, layer.top_k)
        layer.gate.selection = selection

"""Controllers of a loss weight: towards a wanted MaxVio, or after the share of dropped tokens."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.balance.controllers.checks import check_positive, check_share
from equipoise.balance.controllers.protocol import Device, State
from equipoise.balance.controllers.rates import Rate, checked_rate, rate_at
from equipoise.errors import EquipoiseError


@dataclass(frozen=True)
class TargetMaxVio:
    """weight <- weight exp(rate clamp(MaxVio / target - 1, -1, 1)), within [lower, upper]; per layer.

    The weight is steered, not the load: it grows while the layer is less balanced than wanted, by at most
    the factor exp(rate) a step, and shrinks while it is more balanced. At `lower` it stays, and grows
    again from there as soon as MaxVio is above the target; 0 would hold for ever and is refused. A
    target below the sampling floor of the counts (`equipoise.metrics`) cannot be met by any weight: the
    weight then climbs to `upper` and stays there, so choose a target above the floor of the scope.
    A layer whose MaxVio is NaN (nothing was counted) keeps its weight.
    """

    target: float
    rate: Rate = 2e-2
    _: KW_ONLY
    lower: float = 1e-5
    upper: float = 1e-1

    measure: ClassVar[str] = "max_vio"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", checked_rate(self.rate))
        for name in ("target", "lower", "upper"):
            check_positive(name, getattr(self, name))
        if self.upper < self.lower:
            raise EquipoiseError(
                f"upper={self.upper} is below lower={self.lower}; the weight needs a range"
            )

    def initial(self, *, num_layers: int, device: Device = None) -> State:
        """No state: the weight is all it needs."""
        return {}

    def update(self, *, weight_L: Tensor, measure_L: Tensor, step: int, state: State) -> Tensor:
        """The weights after one step, float32 [L]; `measure_L` is each layer's MaxVio."""
        seen_L = _checked(weight_L, measure_L, "MaxVio", highest=float("inf"))
        rate = rate_at(self.rate, step, like_LE=seen_L[:, None])
        rate_L = rate[:, 0] if isinstance(rate, Tensor) else rate
        grow_L = torch.exp(rate_L * (seen_L / self.target - 1).clamp(-1, 1))
        new_L = (weight_L * grow_L).clamp(self.lower, self.upper)
        return torch.where(seen_L.isnan(), weight_L, new_L).to(torch.float32)


@dataclass(frozen=True)
class DropRate:
    """weight <- beta weight + (1 - beta) min(xi dropped share, maximum): Skywork-MoE, arXiv 2406.06563.

    A layer that drops no tokens needs no balancing loss, and its weight decays towards 0. The defaults
    are the report's. A layer whose dropped share is NaN (nothing was routed) keeps its weight.
    """

    xi: float = 0.2
    maximum: float = 0.01
    beta: float = 0.99

    measure: ClassVar[str] = "dropped_share"

    def __post_init__(self) -> None:
        check_positive("xi", self.xi)
        check_positive("maximum", self.maximum)
        check_share("beta", self.beta)

    def initial(self, *, num_layers: int, device: Device = None) -> State:
        """No state: the weight is its own running mean."""
        return {}

    def update(self, *, weight_L: Tensor, measure_L: Tensor, step: int, state: State) -> Tensor:
        """The weights after one step, float32 [L]; `measure_L` is each layer's share of dropped tokens."""
        seen_L = _checked(weight_L, measure_L, "the dropped share", highest=1.0)
        wanted_L = (self.xi * seen_L).clamp(max=self.maximum)
        new_L = self.beta * weight_L + (1 - self.beta) * wanted_L
        return torch.where(seen_L.isnan(), weight_L, new_L).to(torch.float32)


def _checked(weight_L: Tensor, seen_L: Tensor, what: str, *, highest: float) -> Tensor:
    if weight_L.ndim != 1 or seen_L.shape != weight_L.shape:
        raise EquipoiseError(
            f"weights of shape {tuple(weight_L.shape)} and {what} of shape {tuple(seen_L.shape)}; "
            "both must be [layers]"
        )
    bad_L = (
        (seen_L < 0) | seen_L.isinf() | (seen_L > highest) | ~weight_L.isfinite() | (weight_L < 0)
    )
    if bool(bad_L.any()):
        layer = int(bad_L.nonzero()[0])
        raise EquipoiseError(
            f"weight {float(weight_L[layer])} and {what} {float(seen_L[layer])} at the layer at position "
            f"{layer}; allowed are finite weights from 0 and {what} from 0 to {highest}"
        )
    return seen_L.to(torch.float32)

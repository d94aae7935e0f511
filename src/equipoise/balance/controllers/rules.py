"""Rules that move the bias by the counts alone: sign, proportional, RMS, momentum, multiplicative.

All of them look at the violation v = (mean - count) / mean of each expert, positive where an expert
has too little, and raise the bias of those experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
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
    violation,
    write,
)
from equipoise.balance.controllers.protocol import Acts, Device, State
from equipoise.balance.controllers.rates import Rate, checked_rate, rate_at
from equipoise.errors import EquipoiseError


@dataclass(frozen=True)
class Additive(ABC):
    """What the rules share: b <- clip(b + change), the change minus its mean where `centred`.

    `rate` is a number, a schedule (see `rates`) or one number per layer. Centring takes the mean out of
    each step, so the mean of the bias stays where it was, up to float32 rounding and `clip`: selection
    does not feel the mean, but a drifting one eats float32's digits. `clip` bounds |b|.
    """

    rate: Rate = 1e-3
    _: KW_ONLY
    centred: bool = False
    clip: float | None = None

    acts: ClassVar[Acts] = "add"
    start: ClassVar[float] = 0.0
    reduce: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", checked_rate(self.rate))
        check_positive("clip", self.clip)

    def initial(self, *, num_layers: int, num_experts: int, device: Device = None) -> State:
        """No state."""
        return {}

    @torch.no_grad()
    def update(self, *, bias_LE: Tensor, counts_LE: Tensor, step: int, state: State) -> Tensor:
        """The bias after one step, float32 [L, E]."""
        counts_LE = checked_counts(bias_LE, counts_LE)
        active_L1 = active(counts_LE)
        change_LE = self._change(violation(counts_LE), step, active_L1, state)
        return settled(bias_LE + change_LE, bias_LE, active_L1=active_L1, clip=self.clip)

    def _change(self, violation_LE: Tensor, step: int, active_L1: Tensor, state: State) -> Tensor:
        change_LE = rate_at(self.rate, step, like_LE=violation_LE) * self._direction(violation_LE)
        return change_LE - change_LE.mean(dim=-1, keepdim=True) if self.centred else change_LE

    @abstractmethod
    def _direction(self, violation_LE: Tensor) -> Tensor:
        """What the rate multiplies."""


@dataclass(frozen=True)
class Sign(Additive):
    """b += u sign(mean - count): loss-free balancing (Wang et al., arXiv 2408.15664, Algorithm 1).

    `centred` is the form of Ling 2.0 (arXiv 2510.22115) and torchtitan: b += u (sign - mean of signs).
    Without it a few hot experts push the mean bias up by nearly u a step. Near balance the bias keeps
    hopping by u: let a schedule bring u down.
    """

    def _direction(self, violation_LE: Tensor) -> Tensor:
        return torch.sign(violation_LE)


@dataclass(frozen=True)
class Proportional(Additive):
    """b += u (mean - count) / mean: the u e_i variant of arXiv 2408.15664 (ablation of the sign).

    There e_i = mean - count; here it is divided by the mean, so that u means the same at any batch size.
    An expert without tokens gains u, one with n times its share loses (n - 1) u. The step sums to zero of
    itself. LongCat-Flash divides by all selections instead: `PID(u * E)` is this rule.
    """

    rate: Rate = 1e-2

    def _direction(self, violation_LE: Tensor) -> Tensor:
        return violation_LE


@dataclass(frozen=True)
class RMSNormalised(Additive):
    """b += u v / RMS(v) over a layer's experts: J. Su, scientific spaces 10757 (MoE tour, part 3).

    The step has the same root mean square u at any imbalance, so it never settles by itself: sampling
    noise alone is blown up to u. Use a schedule that falls. It sums to zero of itself.
    """

    def _direction(self, violation_LE: Tensor) -> Tensor:
        rms_L1 = violation_LE.square().mean(dim=-1, keepdim=True).sqrt()
        return violation_LE / torch.where(rms_L1 > 0, rms_L1, 1.0)


@dataclass(frozen=True)
class MomentumTanh(Additive):
    """SMEBU of the Trinity report (arXiv 2602.17004): soft-clamped steps with momentum.

    d = u tanh(sharpness v), minus its mean where centred; m <- momentum m + (1 - momentum) d; b += m.
    The report uses sharpness (kappa) 2 and momentum (beta) 0.5; its u (lambda) is not known to us.
    """

    _: KW_ONLY
    centred: bool = field(default=True, kw_only=True)
    sharpness: float = 2.0
    momentum: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("sharpness", self.sharpness)
        check_share("momentum", self.momentum)

    def initial(self, *, num_layers: int, num_experts: int, device: Device = None) -> State:
        """`momentum`: the running step, [L, E]."""
        return {"momentum": torch.zeros(num_layers, num_experts, device=device)}

    def _change(self, violation_LE: Tensor, step: int, active_L1: Tensor, state: State) -> Tensor:
        before_LE = kept(state, "momentum", tuple(violation_LE.shape))
        target_LE = super()._change(violation_LE, step, active_L1, state)
        change_LE = self.momentum * before_LE + (1 - self.momentum) * target_LE
        write(state, "momentum", change_LE, active_L1)
        return change_LE

    def _direction(self, violation_LE: Tensor) -> Tensor:
        return torch.tanh(self.sharpness * violation_LE)


@dataclass(frozen=True)
class Multiplicative(Sign):
    """A bias that begins at 1 and multiplies the score in selection (arXiv 2408.15664, ablation).

    b += u sign(mean - count), never below `lower`; `clip` is the upper bound. `centred` rescales the
    layer to mean 1, which selection does not feel. Scores must not be negative: sigmoid, softmax or
    sqrt-softplus, not logits, where a larger factor would push a negative score down.
    """

    _: KW_ONLY
    lower: float = 1e-2

    acts: ClassVar[Acts] = "multiply"
    start: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("lower", self.lower)
        if self.clip is not None and self.clip < self.lower:
            raise EquipoiseError(
                f"clip={self.clip} is below lower={self.lower}; the bias needs a range"
            )

    @torch.no_grad()
    def update(self, *, bias_LE: Tensor, counts_LE: Tensor, step: int, state: State) -> Tensor:
        """The factors after one step, float32 [L, E]."""
        counts_LE = checked_counts(bias_LE, counts_LE)
        rate = rate_at(self.rate, step, like_LE=counts_LE)
        factor_LE = bias_LE + rate * self._direction(violation(counts_LE))
        if self.centred:
            factor_LE = factor_LE / factor_LE.clamp_min(self.lower).mean(dim=-1, keepdim=True)
        factor_LE = factor_LE.clamp(self.lower, self.clip)
        return settled(factor_LE, bias_LE, active_L1=active(counts_LE), clip=None)

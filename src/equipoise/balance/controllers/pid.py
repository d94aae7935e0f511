"""A proportional-integral-derivative rule, with experts that compute nothing (LongCat-Flash)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.balance.controllers.checks import (
    active,
    check_positive,
    checked_counts,
    kept,
    settled,
    write,
)
from equipoise.balance.controllers.protocol import Acts, Device, State
from equipoise.balance.controllers.rates import Rate, checked_rate, rate_at
from equipoise.errors import EquipoiseError


@dataclass(frozen=True)
class PID:
    """b += u (e + integral sum(e) + derivative (e - previous e)), e = wanted share - share of selections.

    LongCat-Flash (arXiv 2509.01322) calls its rule a PID but gives only the first part, which is the
    default here: e_i = K_e / (K N) - T_i / (K T) for the N computing experts. The last `null_experts`
    columns compute nothing: their bias never moves, and `computing_share` K_e / K is the share of all
    selections wanted for the others (8 of 12 in LongCat-Flash), each of which should get
    computing_share / N. Centring is not offered: the level of the biases against the null experts' is
    what holds computing_share.

    Shares are small: `rate` is E times that of `Proportional` for the same step. The bias itself already
    integrates e, so `integral` makes a double integrator, which oscillates unless it is small;
    `integral_limit` bounds |sum(e)|.
    """

    rate: Rate = 1e-1
    _: KW_ONLY
    integral: float = 0.0
    derivative: float = 0.0
    integral_limit: float | None = None
    null_experts: int = 0
    computing_share: float = 1.0
    clip: float | None = None

    acts: ClassVar[Acts] = "add"
    start: ClassVar[float] = 0.0
    reduce: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", checked_rate(self.rate))
        check_positive("clip", self.clip)
        check_positive("integral_limit", self.integral_limit)
        for name in ("integral", "derivative"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise EquipoiseError(
                    f"{name}={getattr(self, name)}; allowed is a finite number from 0"
                )
        self._check_null()

    def _check_null(self) -> None:
        if self.null_experts < 0:
            raise EquipoiseError(
                f"null_experts={self.null_experts}; give the number of last columns"
            )
        allowed = 0 < self.computing_share < 1 if self.null_experts else self.computing_share == 1
        if not allowed:
            raise EquipoiseError(
                f"computing_share={self.computing_share} with null_experts={self.null_experts}; give "
                "K_e / K, between 0 and 1, where there are null experts, and 1 where there are none"
            )

    def initial(self, *, num_layers: int, num_experts: int, device: Device = None) -> State:
        """`integral` and `previous` [L, E], and `updates` [L, 1]; {} where only the first part is used."""
        if not (self.integral or self.derivative):
            return {}
        return {
            "integral": torch.zeros(num_layers, num_experts, device=device),
            "previous": torch.zeros(num_layers, num_experts, device=device),
            "updates": torch.zeros(num_layers, 1, dtype=torch.int64, device=device),
        }

    @torch.no_grad()
    def update(self, *, bias_LE: Tensor, counts_LE: Tensor, step: int, state: State) -> Tensor:
        """The bias after one step, float32 [L, E]; null experts keep theirs."""
        counts_LE = checked_counts(bias_LE, counts_LE)
        active_L1 = active(counts_LE)
        error_LE = self._error(counts_LE)
        signal_LE = self._signal(error_LE, active_L1, state)
        new_LE = bias_LE + rate_at(self.rate, step, like_LE=counts_LE) * signal_LE
        new_LE = settled(new_LE, bias_LE, active_L1=active_L1, clip=self.clip)
        computing = new_LE.shape[-1] - self.null_experts
        new_LE[:, computing:] = bias_LE[:, computing:]
        return new_LE

    def _error(self, counts_LE: Tensor) -> Tensor:
        """Wanted minus actual share of selections; of no meaning for null experts."""
        computing = counts_LE.shape[-1] - self.null_experts
        if computing < 1:
            raise EquipoiseError(
                f"null_experts={self.null_experts} of {counts_LE.shape[-1]} experts; one must compute"
            )
        total_L1 = counts_LE.sum(dim=-1, keepdim=True)
        share_LE = counts_LE / torch.where(total_L1 > 0, total_L1, 1.0)
        return self.computing_share / computing - share_LE

    def _signal(self, error_LE: Tensor, active_L1: Tensor, state: State) -> Tensor:
        if not (self.integral or self.derivative):
            return error_LE
        shape = tuple(error_LE.shape)
        sum_LE = kept(state, "integral", shape) + error_LE
        if self.integral_limit is not None:
            sum_LE = sum_LE.clamp(-self.integral_limit, self.integral_limit)
        updates_L1 = kept(state, "updates", (shape[0], 1))
        change_LE = torch.where(updates_L1 > 0, error_LE - kept(state, "previous", shape), 0.0)
        write(state, "integral", sum_LE, active_L1)
        write(state, "previous", error_LE, active_L1)
        updates_L1 += active_L1
        return error_LE + self.integral * sum_LE + self.derivative * change_LE

"""The life cycle of one layer: who is idle, asleep or out, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.balance import experts
from equipoise.balance.biases import LayerBias, own_bias
from equipoise.balance.lifecycle import Lifecycle
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite

AWAKE, ASLEEP, RETIRED, RESERVE = 0, 1, 2, 3
SAID = {ASLEEP: "frozen", RETIRED: "retired", RESERVE: "reserved"}
OUT = float("-inf")


class Course:
    """One layer's experts: their phases and counters, all on the CPU."""

    def __init__(
        self, site: RouterSite, holders: Sequence[nn.Module], router: nn.Module, term: Lifecycle
    ):
        self.site, self.holders, self.term = site, holders, term
        self.rows: list[experts.Rows] = []
        self.router_rows: list[experts.Rows] = []
        if term.revives:
            self.rows = experts.expert_rows(site)
            self.router_rows = experts.router_rows(site, router)
            experts.check_rows(site, [*self.rows, *self.router_rows])
        num = site.num_experts
        self.idle_E = torch.zeros(num, dtype=torch.int64)
        """Steps in a row without load."""
        self.tried_E = torch.zeros(num, dtype=torch.int64)
        self.phase_E = torch.full((num,), AWAKE)
        self.left_E = torch.zeros(num, dtype=torch.int64)
        """Steps left in the phase, of experts that sleep and wake in turns."""
        self.turns_E = torch.zeros(num, dtype=torch.bool)
        """Sleeps and wakes in turns."""
        self.under_E = torch.zeros(num)
        """The selection bias of experts that are out, as it was."""
        self.wanting = torch.zeros((), dtype=torch.int64)
        """Steps in a row in which the load asked for an expert of the reserve."""
        self.bias: LayerBias | None = None
        self.always_E = self._named(term.freeze)

    STATE = ("idle_E", "tried_E", "phase_E", "left_E", "turns_E", "under_E", "wanting")

    def _named(self, by_layer: Any) -> Tensor:
        named_E = torch.zeros(self.site.num_experts, dtype=torch.bool)
        for expert in by_layer.get(self.site.layer, ()):
            if not 0 <= expert < self.site.num_experts:
                raise EquipoiseError(
                    f"Lifecycle: {self.site.path} has experts 0 to {self.site.num_experts - 1}, "
                    f"not {expert}."
                )
            named_E[expert] = True
        return named_E

    def _reserve(self) -> Tensor:
        """The last experts by number."""
        size, num = self.term.in_reserve(self.site.num_experts), self.site.num_experts
        if self.term.reserve and not size:
            raise EquipoiseError(
                f"Lifecycle: reserve={self.term.reserve} of the {num} experts of {self.site.path} is "
                "less than one."
            )
        return torch.arange(num) >= num - size

    def begin(self, say: Callable[[int, str], None]) -> None:
        """Put those out that were named, before the first step."""
        self._find_out()
        retired_E = self._named(self.term.retire)
        reserve_E = self._reserve()
        named = int((self.always_E | retired_E | reserve_E).sum())
        if self.site.num_experts - named < self.site.top_k:
            raise EquipoiseError(
                f"Lifecycle: {self.site.path} selects {self.site.top_k} of {self.site.num_experts} "
                f"experts; {named} of them cannot be out."
            )
        for expert in retired_E.nonzero()[:, 0].tolist():
            self.take_out(expert, RETIRED, say)
        for expert in (self.always_E & ~retired_E).nonzero()[:, 0].tolist():
            self.take_out(expert, ASLEEP, say)
        for expert in (reserve_E & (self.phase_E == AWAKE)).nonzero()[:, 0].tolist():
            self.take_out(expert, RESERVE, say)
        self.put_out()

    def _find_out(self) -> None:
        """Experts that an earlier run retired: the model's own bias says so."""
        if self.bias is None:
            return
        held_E = self.bias.read().cpu()
        out_E = held_E.isneginf()
        self.phase_E[out_E] = RETIRED
        self.under_E[out_E] = held_E[~out_E].mean()

    # -- biases -------------------------------------------------------------------------------------

    def lift(self) -> None:
        """Give those that are out their bias back, for controllers to see finite numbers."""
        self._write(self.phase_E != AWAKE, self.under_E)

    def put_out(self) -> None:
        """Take those that are out, out of selection."""
        self._write(self.phase_E != AWAKE, torch.full_like(self.under_E, OUT))

    def _write(self, where_E: Tensor, value_E: Tensor) -> None:
        if self.bias is not None and bool(where_E.any()):
            held_E = self.bias.read().clone()
            self.bias.write(
                torch.where(where_E.to(held_E.device), value_E.to(held_E.device), held_E)
            )

    def _to_mean(self, expert: int) -> None:
        """The expert's selection bias becomes the mean of those of the experts in selection."""
        among_E = self.phase_E == AWAKE
        among_E[expert] = False
        if self.bias is not None:
            held_E = self.bias.read()
        else:
            found = own_bias(self.site, self.holders)
            if found is None:
                return
            held_E = getattr(*found).data.view(-1)[: self.site.num_experts]
        held_E[expert] = held_E[among_E.to(held_E.device)].mean()

    # -- a step -------------------------------------------------------------------------------------

    def step(self, counts_E: Tensor, revive: Callable[[int, int], None], say: Any) -> None:
        """Count idle steps, let sleepers wake, and do what is to be done with the dead."""
        in_E = self.phase_E == AWAKE
        fair = counts_E[in_E].sum() / in_E.sum()
        quiet_E = (counts_E == 0) | (counts_E < self.term.below * fair)
        self.idle_E = torch.where(in_E & quiet_E, self.idle_E + 1, 0)
        self._turns(say)
        donors = [e for e in counts_E.argsort(descending=True, stable=True).tolist() if in_E[e]]
        self._wake(counts_E[in_E], donors, revive, say)
        dead_E = (self.phase_E == AWAKE) & ~self.turns_E & (self.idle_E >= self.term.patience)
        for expert in dead_E.nonzero()[:, 0].tolist():
            self._dead(expert, donors, quiet_E, revive, say)

    def _wake(self, awake_E: Tensor, donors: list[int], revive: Any, say: Any) -> None:
        """One of the reserve, when the load of those awake asked for it long enough."""
        reserve = (self.phase_E == RESERVE).nonzero()[:, 0].tolist()
        wanted = awake_E.max() > (1 + self.term.demand) * awake_E.double().mean()
        self.wanting = self.wanting + 1 if reserve and wanted else torch.zeros_like(self.wanting)
        if self.wanting < self.term.window:
            return
        donor = donors.pop(0) if self.term.woken == "donor" else None
        if donor is not None:
            revive(reserve[0], donor)
        self.phase_E[reserve[0]] = AWAKE
        self._to_mean(reserve[0])
        self.wanting = torch.zeros_like(self.wanting)
        say(reserve[0], "woken", donor)

    def _turns(self, say: Any) -> None:
        self.left_E = torch.where(self.turns_E, self.left_E - 1, self.left_E)
        for expert in (self.turns_E & (self.left_E <= 0)).nonzero()[:, 0].tolist():
            if self.phase_E[expert] == ASLEEP:
                self.phase_E[expert] = AWAKE
                self.left_E[expert] = self.term.awake
                self.idle_E[expert] = 0
                self._to_mean(expert)
                say(expert, "woken")
            elif self.always_E[expert] or self.idle_E[expert] >= self.term.awake:
                self._sleep_or_retire(expert, say)
            else:
                self.turns_E[expert] = False

    def _dead(self, expert: int, donors: list[int], quiet_E: Tensor, revive: Any, say: Any) -> None:
        if self.term.dead == "keep":
            return
        if self.term.dead == "retire":
            self.take_out(expert, RETIRED, say)
        elif self.term.dead == "freeze" or self._worn(expert):
            self._sleep_or_retire(expert, say)
        elif donors and not bool(quiet_E[donors[0]]):
            donor = donors.pop(0)
            revive(expert, donor)
            self._to_mean(expert)
            self.tried_E[expert] += 1
            self.idle_E[expert] = 0
            say(expert, "revived", donor)

    def _worn(self, expert: int) -> bool:
        return self.term.attempts is not None and int(self.tried_E[expert]) >= self.term.attempts

    def _sleep_or_retire(self, expert: int, say: Any) -> None:
        always = bool(self.always_E[expert])
        if self._worn(expert) and not always:
            self.take_out(expert, RETIRED, say)
        elif self.take_out(expert, ASLEEP, say) and not always:
            self.tried_E[expert] += 1

    def take_out(self, expert: int, phase: int, say: Any) -> bool:
        """Take an expert out of selection, unless too few would be left."""
        if int((self.phase_E == AWAKE).sum()) <= self.site.top_k:
            return False
        assert self.bias is not None
        self.under_E[expert] = float(self.bias.read()[expert])
        self.phase_E[expert] = phase
        self.idle_E[expert] = 0
        self.turns_E[expert] = phase == ASLEEP
        self.left_E[expert] = self.term.asleep
        say(expert, SAID[phase])
        return True

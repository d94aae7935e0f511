"""Life cycle: a dead expert is revived, put to sleep and woken, or retired; a reserve is woken.

What is known: experts that start from a dense layer's copies plus noise train well (sparse
upcycling, arXiv 2212.05055), and networks profit from resetting units that went dormant (ReDo,
arXiv 2302.12902). That reviving, freezing or retiring the experts of a language model while it
trains helps its quality is not shown anywhere; nothing of the kind is claimed here. First rule out
what makes experts look dead: too few tokens, narrow data (see docs/dead.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from equipoise.errors import EquipoiseError

Dead = Literal["revive", "freeze", "retire", "keep"]
_CHOICES = {
    "dead": ("revive", "freeze", "retire", "keep"),
    "woken": ("donor", "own"),
    "router": ("donor", "fresh"),
    "moments": ("fresh", "zero", "copy"),
}


@dataclass(frozen=True)
class Lifecycle:
    """What becomes of dead experts, as a term of `attach`; acts before the optimizer's step.

    An expert is dead after `patience` steps in a row without a selection on any rank, or below
    `below` times the fair share of the layer's experts that can be selected.

    dead: "revive": its weights become those of the busiest expert plus noise (`noise` standard
        deviations of each tensor), one donor for each revived expert of a step. "freeze": it is out
        of selection for `asleep` steps, then back for `awake`, again and again until it is selected
        while awake. "retire": it is out for good. "keep": nothing.
    router: the revived expert's row of the router: "donor" (the donor's, with noise, so that they
        share its tokens) or "fresh" (random, as long as the layer's rows are).
    moments: what the optimizer remembers of revived rows: "fresh": first moments (exp_avg,
        momentum_buffer) zero, the rest (exp_avg_sq) the donor's, because second moments of zero late
        in training make the first update (1 - b1) / sqrt(1 - b2) too large, 3 times at (0.9, 0.999);
        "zero" or "copy": all of it.
    freeze, retire: experts by layer number that go through asleep and awake, or are out, from the
        first step on, whatever their load.
    attempts: after so many revivals or sleeps of an expert in one run it is retired.
    reserve: experts of every layer, a number or a share below 1 (rounded down), that are out from the
        first step on, the last ones by number; the others are the core. One of them is woken, the
        first by number, when the layer's MaxVio among its awake experts was above `demand` in each
        of the last `window` steps; then the count of steps begins anew. It stays awake.
    woken: what an expert woken from the reserve begins with: "donor", weights and router row of the
        busiest expert as if revived, or "own", its own.

    A revived or woken expert's selection bias becomes the mean of the layer's. Out of selection
    means a selection bias of minus infinity; a controller does not see it, and what it does to the
    bias of such an expert is undone. Never are fewer than top-k experts left; what would go below
    waits. A router that limits groups and fills ruled out experts with 0 may still take a frozen one
    where too few others are left in the groups. After `detach()` the frozen are back, the retired of
    a model with a selection bias of its own stay out.

    Ranks draw the same noise (`seed`) and see the same counts. Reviving needs the whole weights and
    the optimizer in this process: not FSDP2, not experts spread over processes.
    """

    dead: Dead = "revive"
    patience: int = 100
    below: float = 0.0
    noise: float = 0.01
    router: Literal["donor", "fresh"] = "donor"
    moments: Literal["fresh", "zero", "copy"] = "fresh"
    asleep: int = 100
    awake: int = 10
    freeze: Mapping[int, Sequence[int]] = field(default_factory=dict)
    retire: Mapping[int, Sequence[int]] = field(default_factory=dict)
    attempts: int | None = None
    reserve: float = 0
    demand: float = 1.0
    window: int = 10
    woken: Literal["donor", "own"] = "donor"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise EquipoiseError(
                    f"Lifecycle: {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}."
                )
        for name in ("patience", "asleep", "awake", "window"):
            if getattr(self, name) < 1:
                raise EquipoiseError(f"Lifecycle: {name}={getattr(self, name)}: at least one step.")
        if self.attempts is not None and self.attempts < 1:
            raise EquipoiseError(
                f"Lifecycle: attempts={self.attempts} has to be 1 or more, or None."
            )
        if not 0 <= self.below < 1:
            raise EquipoiseError(
                f"Lifecycle: below={self.below} has to lie in [0, 1): 1 is the fair share itself."
            )
        if not 0 <= self.noise < float("inf"):
            raise EquipoiseError(f"Lifecycle: noise={self.noise} has to be 0 or more.")
        if not 0 <= self.demand < float("inf"):
            raise EquipoiseError(f"Lifecycle: demand={self.demand} is a MaxVio: 0 or more.")
        if self.reserve < 0 or (self.reserve >= 1 and self.reserve != int(self.reserve)):
            raise EquipoiseError(
                f"Lifecycle: reserve={self.reserve} has to be a whole number of experts, or a share "
                "from 0 to below 1."
            )

    @property
    def revives(self) -> bool:
        """Weights are written."""
        return self.dead == "revive" or (self.reserve > 0 and self.woken == "donor")

    @property
    def takes_out(self) -> bool:
        """Experts may be taken out of selection, which needs a selection bias."""
        taking = self.dead in ("freeze", "retire")
        return bool(taking or self.freeze or self.retire or self.attempts or self.reserve)

    def in_reserve(self, num_experts: int) -> int:
        """How many experts of a layer the reserve holds at first."""
        return int(self.reserve if self.reserve >= 1 else self.reserve * num_experts)


@dataclass(frozen=True)
class Event:
    """Something that happened to an expert at the end of a step."""

    step: int
    layer: int
    path: str
    expert: int
    what: str
    """"revived", "frozen", "woken", "retired" or "reserved"."""
    donor: int | None = None
    """The expert whose weights a revived one got, or one woken from the reserve."""

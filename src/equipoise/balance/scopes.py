"""Scopes: the set of tokens over which the load of a loss is counted.

- "sequence": of each sequence by itself (rows of the batch, or `segment_ids` of packed rows).
- "micro": of this rank's micro-batch.
- "group": of the micro-batch on all ranks of the process group.
- "global": of the step so far, all ranks: a buffer that each micro-batch adds to, emptied by the
  step (Qiu et al. 2025, 2501.11873, Algorithm 1).
- "exact": of the whole step, all ranks and micro-batches; needs `handle.preview()`, or all forward
  passes before the first backward pass.
- "running": a decaying sum over the steps before, plus this micro-batch on all ranks.
- "subset": of a random subset of this micro-batch on all ranks, as large as one rank's (the shuffle
  control of 2501.11873).
- "previous": of the step before: one reduction per step, no waiting.

A scope also says over which tokens the mean probability P is taken: the sequence for "sequence",
this rank's micro-batch for "micro" and "previous" (which waits for no other rank), the whole step
for "exact", and the micro-batch of all ranks otherwise.
With one micro-batch per step "group", "global" and "exact" are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError, nearest


@dataclass(frozen=True)
class Scope:
    """Base of all scopes; what they keep between micro-batches and steps is in `State`."""

    name: ClassVar[str] = ""
    synced: ClassVar[bool] = False
    """Needs the counts of all ranks for every micro-batch."""
    late: ClassVar[bool] = False
    """The load is known only when the backward pass asks for it."""

    def at_pass(self, state: dict[str, Tensor], counts_LE: Tensor) -> Tensor | None:
        """Counts that make the load of one micro-batch, from its own (of all ranks if `synced`)."""
        return counts_LE

    def at_step(self, state: dict[str, Tensor], counts_LE: Tensor) -> None:
        """The step ended: `counts_LE` are those of all its micro-batches and ranks."""


@dataclass(frozen=True)
class Sequence(Scope):
    """Each sequence by itself (DeepSeek-V3, 2412.19437)."""

    name = "sequence"


@dataclass(frozen=True)
class Micro(Scope):
    """This rank's micro-batch: what most trainers call the auxiliary loss."""

    name = "micro"


@dataclass(frozen=True)
class Group(Scope):
    """The micro-batch on all ranks (the synchronised loss of 2501.11873)."""

    name = "group"
    synced = True


@dataclass(frozen=True)
class Global(Scope):
    """The step so far, on all ranks (Algorithm 1 of 2501.11873)."""

    name = "global"
    synced = True

    def at_pass(self, state: dict[str, Tensor], counts_LE: Tensor) -> Tensor:
        """Add a micro-batch to the buffer; its load is that of the buffer."""
        state["buffer"] = state["buffer"] + counts_LE if "buffer" in state else counts_LE.clone()
        return state["buffer"]

    def at_step(self, state: dict[str, Tensor], counts_LE: Tensor) -> None:
        """Empty the buffer."""
        state.pop("buffer", None)


@dataclass(frozen=True)
class Exact(Scope):
    """The whole step: the load is what one large batch would have had."""

    name = "exact"
    synced = True
    late = True

    def at_pass(self, state: dict[str, Tensor], counts_LE: Tensor) -> None:
        """Nothing yet: known when all micro-batches have been seen."""
        return


@dataclass(frozen=True)
class Running(Scope):
    """Past steps, the one d steps ago by decay^d, plus this micro-batch."""

    decay: float = 0.9
    name = "running"
    synced = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise EquipoiseError(f"Running: decay={self.decay} has to be in [0, 1).")

    def at_pass(self, state: dict[str, Tensor], counts_LE: Tensor) -> Tensor:
        """The past, decayed, plus this micro-batch."""
        return counts_LE + state["past"] if "past" in state else counts_LE

    def at_step(self, state: dict[str, Tensor], counts_LE: Tensor) -> None:
        """Take the step into the past."""
        past = state.get("past", torch.zeros_like(counts_LE))
        state["past"] = self.decay * (past + counts_LE)


@dataclass(frozen=True)
class Subset(Scope):
    """As many random tokens of all ranks' micro-batch as one rank has (shuffle control)."""

    seed: int = 0
    name = "subset"
    synced = True


@dataclass(frozen=True)
class Previous(Scope):
    """The step before; in the first step the load is uniform, which asks for nothing."""

    name = "previous"

    def at_pass(self, state: dict[str, Tensor], counts_LE: Tensor) -> Tensor:
        """The counts of the step before."""
        return state["last"] if "last" in state else torch.ones_like(counts_LE)

    def at_step(self, state: dict[str, Tensor], counts_LE: Tensor) -> None:
        """Keep the counts of this step."""
        state["last"] = counts_LE.clone()


SCOPES: dict[str, Scope] = {
    scope.name: scope
    for scope in (
        Sequence(),
        Micro(),
        Group(),
        Global(),
        Exact(),
        Running(),
        Subset(),
        Previous(),
    )
}


def named(scope: str | Scope) -> Scope:
    """The scope of a name, or the scope itself; EquipoiseError for an unknown name."""
    if isinstance(scope, Scope):
        return replace(scope)
    if scope not in SCOPES:
        raise EquipoiseError(
            f"scope={scope!r} is not one of {', '.join(SCOPES)}.{nearest(str(scope), SCOPES)}"
        )
    return SCOPES[scope]

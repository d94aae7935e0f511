"""Capacity at the experts' call of any model: overflowing slots are dropped or sent elsewhere.

A model whose experts take every slot that they are handed (transformers) gets a dropped slot with
its own expert id and weight 0: the expert computes it, and nothing comes of it. The result is that
of a drop to the residual connection, to the bit; its time is not saved. Experts of `equipoise.nn`
are handed NO_EXPERT and leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from equipoise.errors import EquipoiseError
from equipoise.nn.limiter import Capacity as Settings


@dataclass(frozen=True)
class Capacity(Settings):
    """A capacity for every expert, as a term of `attach`; the settings are those of `equipoise.nn`.

    factor: room of each expert in units of its fair share of a micro-batch on one rank, T K / E.
    by, overflow, groups, recent: see `equipoise.nn.capacity.limit`; "pad" is not to be had here.
        "reroute" goes by the router's scores alone: a selection bias and limits on groups of
        experts do not enter. The weight is that which the new expert's score makes, by ratio.
    eval_factor: the factor in evaluation mode; by default nothing is dropped there.

    Weights of the slots that stay are as they were: nothing is renormalised. Dropped slots get no
    gradient. Padding takes no room. Activation checkpointing drops the same slots again; the
    average of `recent` moves at the step's end only. With `recent`, padding costs a wait for the
    device in each pass; "reroute" waits once a round. Observers hear what the experts are handed.
    """

    eval_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overflow == "pad":
            raise EquipoiseError(
                "Capacity(overflow='pad'): the experts of an attached model make their own buffers. "
                "Use overflow='drop', or equipoise.nn.MoELayer(capacity=...)."
            )
        if self.eval_factor is not None and not self.eval_factor > 0:
            raise EquipoiseError(f"Capacity: eval_factor={self.eval_factor} has to be above 0.")


def taken(settings: Settings) -> Capacity:
    """The term that settings of `equipoise.nn` stand for."""
    if isinstance(settings, Capacity):
        return settings
    return Capacity(**{f.name: getattr(settings, f.name) for f in fields(settings)})

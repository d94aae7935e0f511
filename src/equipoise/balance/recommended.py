"""The terms to begin with, by what a model can keep."""

from __future__ import annotations

from torch import nn

from equipoise.balance.arguments import check_arguments
from equipoise.balance.biases import own_bias
from equipoise.balance.controllers import Sign, cosine
from equipoise.balance.places import holders, sites_of
from equipoise.balance.terms import Bias, Loss
from equipoise.errors import EquipoiseError
from equipoise.models.scan import Scan

INDEPENDENT = ("sigmoid", "sqrtsoftplus")
"""Score functions of each expert by itself, whose scores do not shrink with the number of experts."""


def recommended(model: nn.Module, *, steps: int = 1000) -> tuple[Loss | Bias, ...]:
    """Balancing terms for `attach(model, *recommended(model), optimizer=optimizer)`.

    steps: optimizer steps over which the strength falls, at best those of the run.

    Strong first, when experts starve, and about as weak in the end as is published. A model whose every
    router has a selection bias of its own on sigmoid scores (DeepSeek-V3, GLM-4 MoE, ...) gets that bias
    moved by `Sign`, its rate falling from 0.02 to 0.0005 by a cosine; the bias stays in its checkpoints.
    The others would lose a bias when they are saved: they get the Switch loss over the global batch,
    its weight falling from 0.1 to 0.01. Provisional: docs/balance.md says what this rests on.

    Raises EquipoiseError for a model without routers, and for steps below 1.
    """
    check_arguments(model, None, 1, None)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise EquipoiseError(
            f"recommended: steps={steps!r}; it has to be a whole number, at least 1."
        )
    scan = Scan(model)
    sites = sites_of(model, None)
    if all(s.score_function in INDEPENDENT and own_bias(s, holders(scan, s)) for s in sites):
        return (Bias(Sign(rate=cosine(start=0.02, end=0.0005, steps=steps))),)
    return (Loss("switch", scope="global", weight=cosine(start=0.1, end=0.01, steps=steps)),)

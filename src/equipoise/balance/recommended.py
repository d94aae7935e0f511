"""The terms to begin with, by what a model can keep."""

from __future__ import annotations

from torch import nn

from equipoise.balance.arguments import check_arguments
from equipoise.balance.biases import group_limit, own_bias
from equipoise.balance.controllers import Quantile, QuantileHistogram
from equipoise.balance.places import holders, sites_of
from equipoise.balance.terms import Bias, Loss
from equipoise.models.scan import Scan


def recommended(model: nn.Module) -> tuple[Loss | Bias, ...]:
    """Balancing terms for `attach(model, *recommended(model), optimizer=optimizer)`.

    A model whose every router has a selection bias of its own gets that bias set to quantiles, under its
    group limits; it stays in the model's checkpoints. Where sigmoid scores are compared (DeepSeek-V3,
    GLM-4 MoE, ...) by `QuantileHistogram`, whose bins are as wide as these need; elsewhere (ERNIE 4.5
    MoE) by `Quantile`, which has none. The others would lose a bias when they are saved, or have experts
    that compute nothing (LongCat), whose share is no one's to level: they get the Switch loss of weight 0.1
    over the global batch. docs/balance.md says what this rests on.

    Raises EquipoiseError for a model without routers.
    """
    check_arguments(model, None, 1, None)
    scan = Scan(model)
    sites = sites_of(model, None)
    held = [(site, holders(scan, site)) for site in sites]
    if all(not s.null_experts and own_bias(s, modules) for s, modules in held):
        limits = {group_limit(site, modules) for site, modules in held}
        if len(limits) == 1:
            sigmoid = all(s.score_function == "sigmoid" and s.compares == "scores" for s in sites)
            quantile = QuantileHistogram if sigmoid else Quantile
            return (Bias(quantile(groups=limits.pop())),)
    return (Loss("switch", scope="global", weight=0.1),)

"""Objectives on the load f and the mean probability P of each expert; 1 at perfect balance.

f is counted, so it has no gradient of its own; these differ in how they lend it one.
None of the values is a measure of imbalance except where its docstring says so: f·P is 0 for
f = (1, 0), P = (0, 1), the worst of loads. Report MaxVio or CV of the load beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.balance.objectives.shares import wide
from equipoise.errors import EquipoiseError


def switch(*, load_E: Tensor, prob_E: Tensor) -> Tensor:
    """E sum_e f_e P_e, [...]: lowers the probability of an expert in proportion to its load.

    Switch Transformers (2101.03961), equations 4 to 6; GShard (2006.16668) the same but for its
    constant. 1 when either is uniform, E at collapse. Not a measure of imbalance: f = (1, 0),
    P = (0, 1) gives 0. Only its gradient acts like one: half that of `squared`.
    """
    load_E, prob_E = _pair(load_E, prob_E)
    return load_E.shape[-1] * (load_E * prob_E).sum(-1)


def squared(*, load_E: Tensor, prob_E: Tensor) -> Tensor:
    """E sum f^2 = 1 + E sum (f - 1/E)^2, [...], with the gradient as if f were P (straight through).

    A measure of imbalance, 1 + CV^2 of the load: 1 only at balance, E at collapse. The router's
    gradient is twice that of `switch`.
    """
    load_E, prob_E = _pair(load_E, prob_E)
    through_E = _straight_through(load_E, prob_E)
    return load_E.shape[-1] * through_E.square().sum(-1)


def importance(*, load_E: Tensor, prob_E: Tensor) -> Tensor:
    """1 + CV^2 of the mean gates P, [...]; the load plays no part.

    Shazeer et al. 2017 (1701.06538), where importance is the batch sum of the gates after top-k,
    zero on unselected experts, and the loss is CV^2 alone. P need not sum to 1 here.
    A measure of how uneven the gates are, not the load: a router may be sure of one expert by a
    hair on every token.
    """
    _, prob_E = _pair(load_E, prob_E)
    return _one_plus_squared_cv(prob_E)


def load_cv(*, load_E: Tensor, prob_E: Tensor | None = None) -> Tensor:
    """1 + CV^2 of the load, [...]; straight through P, or through the load itself without P.

    Shazeer et al. 2017 (1701.06538) takes CV^2 of `smooth_load`, which has a gradient: give that as
    `load_E` and no `prob_E`. With `prob_E`, value and router gradient are those of `squared`;
    but the load need not sum to 1.
    """
    if prob_E is None:
        return _one_plus_squared_cv(wide(load_E))
    load_E, prob_E = _pair(load_E, prob_E)
    return _one_plus_squared_cv(_straight_through(load_E, prob_E))


def group(*, load_E: Tensor, prob_E: Tensor, group_of_E: Tensor, num_groups: int) -> Tensor:
    """sum_g f'_g P'_g, [...]: the device- or expert-group loss; experts within a group may differ.

    DeepSeekMoE (2401.06066) and DeepSeek-V2 (2405.04434): f'_g is the mean over the group of
    E f_e, P'_g the sum of P_e. 1 when every group has its experts' fair share, G when one of G
    equal groups has everything. `group_of_E` is the group of each expert, in [0, num_groups).
    """
    load_E, prob_E = _pair(load_E, prob_E)
    load_G = _group_sums(load_E, group_of_E, num_groups)
    size_G = _group_sums(torch.ones_like(load_E), group_of_E, num_groups).clamp(min=1)
    mean_G = load_E.shape[-1] * load_G / size_G
    return (mean_G * _group_sums(prob_E, group_of_E, num_groups)).sum(-1)


def communication(*, sent_G: Tensor, prob_E: Tensor, group_of_E: Tensor, num_groups: int) -> Tensor:
    """G sum_g sent_g P'_g, [...]: the communication loss, on tokens received by each device.

    DeepSeek-V2 (2405.04434): with `sent_G` the tokens sent to device g over T M it is the paper's
    form; with the share that `sent` gives it is 1 at balance for any routing. G when every token
    is sent to one of G devices only.
    """
    sent_G, prob_E = wide(sent_G).detach(), wide(prob_E)
    if sent_G.shape[-1] != num_groups:
        raise EquipoiseError(
            f"sent_G has {sent_G.shape[-1]} groups on its last dimension, num_groups is {num_groups}"
        )
    return num_groups * (sent_G * _group_sums(prob_E, group_of_E, num_groups)).sum(-1)


def _pair(load_E: Tensor, prob_E: Tensor) -> tuple[Tensor, Tensor]:
    if load_E.shape[-1:] != prob_E.shape[-1:]:
        raise EquipoiseError(
            f"load_E has shape {tuple(load_E.shape)} and prob_E {tuple(prob_E.shape)}: "
            "both need the same experts on the last dimension"
        )
    return wide(load_E).detach(), wide(prob_E)


def _straight_through(load_E: Tensor, prob_E: Tensor) -> Tensor:
    """The load in value, the probability in gradient."""
    return load_E + (prob_E - prob_E.detach())


def _one_plus_squared_cv(values_E: Tensor) -> Tensor:
    """E sum x^2 / (sum x)^2, which is 1 + CV^2 with the population variance; 0 where all are 0."""
    total = values_E.sum(-1)
    total = torch.where(total > 0, total, torch.ones_like(total))
    return values_E.shape[-1] * values_E.square().sum(-1) / total.square()


def _group_sums(values_E: Tensor, group_of_E: Tensor, num_groups: int) -> Tensor:
    """Sums over the experts of each group, [..., G]."""
    if group_of_E.shape != values_E.shape[-1:]:
        raise EquipoiseError(
            f"group_of_E has shape {tuple(group_of_E.shape)}; it names the group of each of the "
            f"{values_E.shape[-1]} experts, so its shape must be ({values_E.shape[-1]},)"
        )
    zeros_G = values_E.new_zeros(*values_E.shape[:-1], num_groups)
    return zeros_G.index_add(-1, group_of_E.to(values_E.device), values_E)

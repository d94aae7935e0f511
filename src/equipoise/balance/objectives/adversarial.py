"""Pieces of an adversarial term: a discriminator predicts which experts idle, the router deceives it.

    features_E = reverse_gradient(tensor=features_of(prob_E), strength=0.1)
    term = idleness(idle_logits_E=discriminator(features_E), idle_E=idle(load_E=load_E))

Minimising the term trains the discriminator; through the reversed gradient the same step makes the
router hide what tells idle from busy experts. Gradient reversal is that of Ganin and Lempitsky
(1409.7495); its use on expert load has no published result behind it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.balance.objectives.shares import wide
from equipoise.errors import EquipoiseError


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


def reverse_gradient(*, tensor: Tensor, strength: float = 1.0) -> Tensor:
    """The tensor itself; its gradient comes back times minus `strength`."""
    if strength < 0:
        raise EquipoiseError(
            f"strength {strength} reverses nothing: give 0 or more, the sign is turned here"
        )
    reversed_: Tensor = _Reverse.apply(tensor, strength)  # type: ignore[no-untyped-call]
    return reversed_


def idle(*, load_E: Tensor, below: float = 0.5) -> Tensor:
    """Which experts have less than `below` times their fair share 1/E, bool [..., E]."""
    return wide(load_E) * load_E.shape[-1] < below


def idleness(*, idle_logits_E: Tensor, idle_E: Tensor) -> Tensor:
    """Cross-entropy of the discriminator's logits over ln 2, idle and busy weighing half each, [...].

    1 when it cannot tell idle from busy (logits of 0), 0 when it is sure and right. Where no expert
    is idle, or all are, there is nothing to tell: 1, without gradient.
    """
    logits_E = wide(idle_logits_E)
    if idle_E.shape != logits_E.shape:
        raise EquipoiseError(
            f"idle_E has shape {tuple(idle_E.shape)}, the logits {tuple(logits_E.shape)}: "
            "one label for each logit is needed"
        )
    target_E = idle_E.to(logits_E.dtype)
    error_E = F.binary_cross_entropy_with_logits(logits_E, target_E, reduction="none")
    num_idle = target_E.sum(-1)
    num_busy = target_E.shape[-1] - num_idle
    of_idle = (error_E * target_E).sum(-1) / num_idle.clamp(min=1)
    of_busy = (error_E * (1 - target_E)).sum(-1) / num_busy.clamp(min=1)
    value = (of_idle + of_busy) / (2 * math.log(2))
    return torch.where((num_idle > 0) & (num_busy > 0), value, torch.ones_like(value))

"""Balancing methods for any MoE model: objective x scope x controller, attached in two lines.

    handle = equipoise.balance.attach(
        model, Loss("switch", scope="global", weight=1e-3), Bias(Sign(rate=1e-3)), optimizer=optimizer
    )

The gradient of a `Loss` is added to the routers' in the backward pass; a `Bias` is moved by a
controller before each optimizer step. Pure functions for code of your own: `objectives`,
`controllers`, `conventions`. `BalanceCallback` is for transformers' Trainer, `sinks` for the metrics.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from equipoise.balance import controllers, conventions, objectives
from equipoise.balance.adversary import Adversarial
from equipoise.balance.attach import Handle, attach
from equipoise.balance.capacity import Capacity
from equipoise.balance.catalogue import CATALOGUE, Objective
from equipoise.balance.controllers import (
    PID,
    DropRate,
    MomentumTanh,
    Multiplicative,
    Proportional,
    Quantile,
    QuantileHistogram,
    RMSNormalised,
    Sign,
    TargetMaxVio,
)
from equipoise.balance.lifecycle import Lifecycle
from equipoise.balance.recommended import recommended
from equipoise.balance.scopes import SCOPES, Running, Scope, Subset
from equipoise.balance.terms import Bias, Loss

if TYPE_CHECKING:
    from equipoise.balance import sinks
    from equipoise.balance.trainer import BalanceCallback

__all__ = [
    "CATALOGUE",
    "PID",
    "SCOPES",
    "Adversarial",
    "BalanceCallback",
    "Bias",
    "Capacity",
    "DropRate",
    "Handle",
    "Lifecycle",
    "Loss",
    "MomentumTanh",
    "Multiplicative",
    "Objective",
    "Proportional",
    "Quantile",
    "QuantileHistogram",
    "RMSNormalised",
    "Running",
    "Scope",
    "Sign",
    "Subset",
    "TargetMaxVio",
    "attach",
    "controllers",
    "conventions",
    "objectives",
    "recommended",
    "sinks",
]


def __getattr__(name: str) -> Any:
    # Not needed to balance: the one loads transformers' Trainer, the other Arrow.
    if name == "BalanceCallback":
        return importlib.import_module("equipoise.balance.trainer").BalanceCallback
    if name == "sinks":
        return importlib.import_module("equipoise.balance.sinks")
    raise AttributeError(f"module 'equipoise.balance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

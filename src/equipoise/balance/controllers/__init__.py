"""Controllers: move the selection bias, or a loss weight, by the loads of a scope; no gradient."""

from equipoise.balance.controllers.histogram import QuantileHistogram
from equipoise.balance.controllers.margins import GroupLimit
from equipoise.balance.controllers.pid import PID
from equipoise.balance.controllers.protocol import Acts, Controller, Observer, State
from equipoise.balance.controllers.quantile import Quantile
from equipoise.balance.controllers.rates import (
    Rate,
    Schedule,
    constant_then_zero,
    cosine,
    linear,
    warmup,
    zero_then_constant,
)
from equipoise.balance.controllers.rules import (
    MomentumTanh,
    Multiplicative,
    Proportional,
    RMSNormalised,
    Sign,
)
from equipoise.balance.controllers.weights import DropRate, TargetMaxVio

__all__ = [
    "PID",
    "Acts",
    "Controller",
    "DropRate",
    "GroupLimit",
    "MomentumTanh",
    "Multiplicative",
    "Observer",
    "Proportional",
    "Quantile",
    "QuantileHistogram",
    "RMSNormalised",
    "Rate",
    "Schedule",
    "Sign",
    "State",
    "TargetMaxVio",
    "constant_then_zero",
    "cosine",
    "linear",
    "warmup",
    "zero_then_constant",
]

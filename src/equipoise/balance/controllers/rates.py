"""How far a controller moves in one step: a number, a schedule over steps, or one number per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError

Schedule = Callable[[int], float]
Rate = float | Schedule | Sequence[float] | Tensor


class _Schedule(partial[float]):
    """A schedule that prints as the call that made it."""

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
        return f"{self.func.__name__.lstrip('_')}({given})"


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` at step 0 in a straight line to `end` at `steps`, and `end` from there on."""
    return _Schedule(_linear, start=start, end=end, steps=_whole(steps))


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From `start` at step 0 along half a cosine to `end` at `steps`, and `end` from there on."""
    return _Schedule(_cosine, start=start, end=end, steps=_whole(steps))


def warmup(rate: float | Schedule, steps: int) -> Schedule:
    """`rate` (a number or another schedule) times (step + 1) / steps, in full from step `steps` - 1."""
    return _Schedule(_warmup, rate=rate, steps=_whole(steps))


def constant_then_zero(rate: float, steps: int) -> Schedule:
    """`rate` for the first `steps` steps, then 0: the bias is frozen (DeepSeek-V3, arXiv 2412.19437)."""
    return _Schedule(_constant_then_zero, rate=rate, steps=_whole(steps))


def zero_then_constant(rate: float, steps: int) -> Schedule:
    """0 for the first `steps` steps, then `rate`: what takes over from `constant_then_zero`."""
    return _Schedule(_zero_then_constant, rate=rate, steps=_whole(steps))


def checked_rate(rate: Rate) -> float | Schedule | tuple[float, ...]:
    """The rate in a form that prints, hashes and pickles; ValueError on a negative or non-finite one."""
    if callable(rate):
        return rate
    values: Any = rate.tolist() if isinstance(rate, Tensor) else rate
    if isinstance(values, (int, float)):
        return _checked(float(values), "")
    if isinstance(values, str) or not all(isinstance(r, (int, float)) for r in values):
        raise EquipoiseError(f"rate={rate!r}; give a number, a schedule or one number per layer")
    return tuple(_checked(float(r), f" of the layer at position {i}") for i, r in enumerate(values))


def rate_at(rate: Rate, step: int, *, like_LE: Tensor) -> float | Tensor:
    """The rate at a step: a number, or [L, 1] where each layer has its own."""
    if callable(rate):
        return _checked(float(rate(step)), f" at step {step}")
    if isinstance(rate, (int, float)):
        return rate
    if len(rate) != len(like_LE):
        raise EquipoiseError(f"{len(rate)} rates for {len(like_LE)} layers; give one per MoE layer")
    return torch.as_tensor(rate, dtype=like_LE.dtype, device=like_LE.device)[:, None]


def _checked(rate: float, where: str) -> float:
    if not (math.isfinite(rate) and rate >= 0):
        raise EquipoiseError(
            f"rate {rate}{where}; allowed is a finite number from 0 (0 freezes the bias)"
        )
    return rate


def _whole(steps: int) -> int:
    if steps < 1:
        raise EquipoiseError(f"steps={steps}; a schedule needs at least 1 step")
    return steps


def _linear(step: int, *, start: float, end: float, steps: int) -> float:
    return start + (end - start) * min(step / steps, 1.0)


def _cosine(step: int, *, start: float, end: float, steps: int) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def _warmup(step: int, *, rate: float | Schedule, steps: int) -> float:
    return (rate(step) if callable(rate) else rate) * min((step + 1) / steps, 1.0)


def _constant_then_zero(step: int, *, rate: float, steps: int) -> float:
    return rate if step < steps else 0.0


def _zero_then_constant(step: int, *, rate: float, steps: int) -> float:
    return 0.0 if step < steps else rate

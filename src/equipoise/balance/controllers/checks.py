"""What comes into a controller, checked; and the last steps that all of them share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equipoise.balance.controllers.protocol import State
from equipoise.errors import EquipoiseError


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64 (float32 on devices without it): counts above 2**24 stay exact."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def check_bias(bias: Tensor) -> None:
    """Refuse a bias narrower than float32, where steps of 1e-3 vanish, and (on CPU) one with NaN."""
    if bias.dtype not in (torch.float32, torch.float64):
        raise EquipoiseError(
            f"the selection bias is {bias.dtype}, which loses steps of 1e-3; keep it in torch.float32"
        )
    if bias.device.type == "cpu" and not bool(bias.isfinite().all()):
        raise EquipoiseError(
            "the selection bias holds NaN or inf; load one that does not, or zero it"
        )


def checked_counts(bias_LE: Tensor, counts_LE: Tensor) -> Tensor:
    """The counts, wide, of the bias' shape [L, E]; ValueError on NaN, infinite or negative ones.

    Integer counts on an accelerator are trusted, so that the step does not wait for the device.
    """
    check_bias(bias_LE)
    if bias_LE.ndim != 2 or counts_LE.shape != bias_LE.shape:
        raise EquipoiseError(
            f"bias of shape {tuple(bias_LE.shape)} and counts of shape {tuple(counts_LE.shape)}; "
            "both must be [layers, experts]: stack the layers"
        )
    if counts_LE.is_floating_point() or counts_LE.device.type == "cpu":
        _check_counted(counts_LE)
    return wide(counts_LE.to(bias_LE.device))


def _check_counted(counts_LE: Tensor) -> None:
    bad_LE = ~torch.isfinite(counts_LE) | (counts_LE < 0)
    if bool(bad_LE.any()):
        layer, expert = (int(i) for i in bad_LE.nonzero()[0])
        raise EquipoiseError(
            f"count {float(counts_LE[layer, expert])} for expert {expert} of the layer at position {layer}; "
            "counts are finite and not negative: look for an overflow or a bad reduction"
        )


def active(counts_LE: Tensor) -> Tensor:
    """[L, 1], True where the layer counted anything in this step."""
    return counts_LE.sum(dim=-1, keepdim=True) > 0


def violation(counts_LE: Tensor) -> Tensor:
    """(mean - count) / mean of each expert: 1 for one without tokens, 0 for a fair share or an idle layer."""
    mean_L1 = counts_LE.mean(dim=-1, keepdim=True)
    return (mean_L1 - counts_LE) / torch.where(mean_L1 > 0, mean_L1, 1.0)


def settled(new_LE: Tensor, bias_LE: Tensor, *, active_L1: Tensor, clip: float | None) -> Tensor:
    """The new bias within [-clip, clip], in float32; the old one where the layer was idle."""
    if clip is not None:
        new_LE = new_LE.clamp(-clip, clip)
    return torch.where(active_L1, new_LE.to(torch.float32), bias_LE.to(torch.float32))


def kept(state: State, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the state; ValueError where it is missing or of another model's shape."""
    found = state.get(name)
    if found is None or found.shape != shape:
        seen = "nothing" if found is None else f"shape {tuple(found.shape)}"
        raise EquipoiseError(
            f"state {name!r} holds {seen}, wanted shape {shape}; begin with the controller's initial(), "
            "or load the state of the same model and controller"
        )
    return found


def write(state: State, name: str, new: Tensor, where: Tensor) -> None:
    """Change a state tensor in place, where the layer was active."""
    state[name].copy_(torch.where(where, new.to(state[name].dtype), state[name]))


def check_positive(name: str, value: float | None) -> None:
    """ValueError unless the value is None or a finite number above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise EquipoiseError(f"{name}={value}; give a finite number above 0" + _or_none(name))


def check_share(name: str, value: float) -> None:
    """ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise EquipoiseError(f"{name}={value}; allowed is 0 <= {name} < 1")


def _or_none(name: str) -> str:
    return ", or None for no limit" if name in ("clip", "integral_limit") else ""

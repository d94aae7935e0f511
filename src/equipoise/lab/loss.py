"""Cross-entropy of a linear output, a chunk of rows at a time: [T, V] is never held whole.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.nn.grouped import linear_dtype

CHUNK = 512
"""Rows at a time. Their logits stay in the cache of a CPU; on a GPU chunks only cost launches."""


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy in nats of the logits hidden @ weight^T; "mean" over tokens, or "none" [T].

    The gradient is made in the forward pass, chunk by chunk, from the same exponentials.
    """
    if reduction == "none":
        parts = zip(torch.split(hidden_TD, CHUNK), torch.split(targets_T, CHUNK), strict=True)
        return torch.cat(
            [F.cross_entropy(F.linear(h, weight_VD).float(), y, reduction="none") for h, y in parts]
        )
    if hidden_TD.device.type != "cpu" or not torch.is_grad_enabled():
        return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), targets_T)
    loss: Tensor = _Chunked.apply(hidden_TD, weight_VD, targets_T)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        grad_TD, grad_VD = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD)
        dtype = linear_dtype(weight_VD)
        hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
        total = hidden_TD.new_zeros((), dtype=torch.float64)
        for start in range(0, len(hidden_TD), CHUNK):
            rows = slice(start, start + CHUNK)
            total += _chunk(hidden[rows], weight, targets_T[rows], grad_TD[rows], grad_VD)
        ctx.save_for_backward(grad_TD, grad_VD)
        ctx.count = len(hidden_TD)
        return (total / len(hidden_TD)).to(torch.promote_types(hidden_TD.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = grads[0] / ctx.count
        grad_TD, grad_VD = ctx.saved_tensors
        return grad_TD * scale, grad_VD * scale, None


def _chunk(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, grad_TD: Tensor, grad_VD: Tensor
) -> Tensor:
    """Sum of the losses of some rows; their gradients go into grad_TD, and are added to grad_VD."""
    logits_TV = (hidden_TD @ weight_VD.t()).to(grad_VD.dtype)
    shifted_TV = logits_TV.sub_(logits_TV.amax(1, keepdim=True))
    picked_T1 = shifted_TV.gather(1, targets_T[:, None])
    scores_TV = shifted_TV.exp_()
    sums_T1 = scores_TV.sum(1, keepdim=True)
    losses_T1 = sums_T1.log() - picked_T1
    error_TV = scores_TV.div_(sums_T1)
    error_TV.scatter_add_(1, targets_T[:, None], error_TV.new_full(targets_T[:, None].shape, -1.0))
    error = error_TV.to(hidden_TD.dtype)
    grad_TD.copy_(error @ weight_VD)
    grad_VD.add_(error.t() @ hidden_TD)
    return losses_T1.sum(dtype=torch.float64)

"""RMSNorm and rotary positions with backward passes of their own, for training on a CPU.

There a pass over memory costs as much as the arithmetic, and autograd makes two to three times as many of
them. Elsewhere torch's own are taken. Shapes: B rows, S positions, H heads, C head width, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, faster on a CPU; same parameters and values."""

    def forward(self, x: Tensor) -> Tensor:
        """x / root mean square over the last dimension, times the weight."""
        if not _worthwhile(x) or x.dtype != self.weight.dtype:
            plain: Tensor = super().forward(x)
            return plain
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        normed: Tensor = (x * inverse).mul_(weight_D)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse = ctx.saved_tensors
        product = grads[0] * x
        grad_D = product.flatten(0, -2).t().mv(inverse.flatten())
        along = product.matmul(weight_D).unsqueeze_(-1)
        along.mul_(inverse.square()).div_(-x.shape[-1])
        grad = (grads[0] * weight_D).addcmul_(x, along).mul_(inverse)
        return grad, grad_D, None


def rotated(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Heads turned by their positions' angles (Su et al., arXiv 2104.09864).

    Pairs are the halves of a head: element i turns with element i + C / 2; cos and sin hold each angle
    twice.
    """
    if _worthwhile(x_BHSC):
        fast: Tensor = _Turned.apply(x_BHSC, cos_SC, sin_SC)  # type: ignore[no-untyped-call]
        return fast
    first, second = x_BHSC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHSC * cos_SC + turned * sin_SC).to(x_BHSC.dtype)


class _Turned(torch.autograd.Function):
    """`rotated`, whose backward pass turns back."""

    @staticmethod
    def forward(ctx: Any, x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SC, sin_SC)
        return _turn(x_BHSC, cos_SC, sin_SC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_SC, sin_SC = ctx.saved_tensors
        return _turn(grads[0], cos_SC, -sin_SC), None, None


def _turn(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    half = x_BHSC.shape[-1] // 2
    first, second = x_BHSC[..., :half], x_BHSC[..., half:]
    cos, sin = cos_SC[:, :half], sin_SC[:, :half]
    out_BHSC = x_BHSC.new_empty(x_BHSC.shape)
    torch.mul(first, cos, out=out_BHSC[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_BHSC[..., half:]).addcmul_(first, sin)
    return out_BHSC


def _worthwhile(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )

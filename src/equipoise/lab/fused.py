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


def rotary_heads(
    joint_BSR: Tensor, cos_SC: Tensor, sin_SC: Tensor, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, S, C], keys and values [B, KV, S, C] of a joint projection, R = (H + 2 KV) C.

    Queries and keys are turned by their positions' angles (Su et al., arXiv 2104.09864): pairs are the
    halves of a head, element i turns with element i + C / 2; cos and sin hold each angle twice.
    """
    if _worthwhile(joint_BSR):
        fast: tuple[Tensor, Tensor, Tensor] = _RotaryHeads.apply(  # type: ignore[no-untyped-call]
            joint_BSR, cos_SC, sin_SC, heads, kv_heads
        )
        return fast
    query, key, value = _split(joint_BSR, cos_SC.shape[1], heads, kv_heads)
    return _rotated(query, cos_SC, sin_SC), _rotated(key, cos_SC, sin_SC), value


def _split(joint_BSR: Tensor, width: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Views [B, heads, S, C] of queries, keys and values."""
    rows, length, _ = joint_BSR.shape
    joint_BHSC = joint_BSR.view(rows, length, heads + 2 * kv_heads, width).transpose(1, 2)
    return torch.split(joint_BHSC, [heads, kv_heads, kv_heads], dim=1)


def _rotated(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    first, second = x_BHSC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHSC * cos_SC + turned * sin_SC).to(x_BHSC.dtype)


class _RotaryHeads(torch.autograd.Function):
    """`rotary_heads`, whose backward pass turns back into one gradient, without sums of padded parts."""

    @staticmethod
    def forward(
        ctx: Any, joint_BSR: Tensor, cos_SC: Tensor, sin_SC: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_SC, sin_SC)
        ctx.counts = heads, kv_heads
        query, key, value = _split(joint_BSR, cos_SC.shape[1], heads, kv_heads)
        turned = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
        outs = [_turn(x, cos_SC, sin_SC, out) for x, out in zip((query, key), turned, strict=True)]
        return outs[0], outs[1], value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_SC, sin_SC = ctx.saved_tensors
        heads, kv_heads = ctx.counts
        rows, _, length, width = grads[0].shape
        grad_BSR = grads[0].new_empty(rows, length, (heads + 2 * kv_heads) * width)
        query, key, value = _split(grad_BSR, width, heads, kv_heads)
        _turn(grads[0], cos_SC, -sin_SC, query)
        _turn(grads[1], cos_SC, -sin_SC, key)
        value.copy_(grads[2])
        return grad_BSR, None, None, None, None


def _turn(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor, out_BHSC: Tensor) -> Tensor:
    half = x_BHSC.shape[-1] // 2
    first, second = x_BHSC[..., :half], x_BHSC[..., half:]
    cos, sin = cos_SC[:, :half], sin_SC[:, :half]
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

"""RMSNorm and rotary positions with backward passes of their own, for training on a CPU.

There a pass over memory costs as much as the arithmetic, and autograd makes two to three times as many of
them. Elsewhere torch's own are taken. Shapes: B rows, S positions, H heads, C head
width, R rows of a joint projection, D hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from equipoise.nn.grouped import linear_dtype


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
        along = product.flatten(0, -2).mv(weight_D).view_as(inverse)  # autocast knows no mv
        along.mul_(inverse.square()).div_(-x.shape[-1])
        grad = torch.mul(grads[0], weight_D, out=product).addcmul_(x, along).mul_(inverse)
        return grad, grad_D, None


class Rotary(NamedTuple):
    """Positions' angles, for heads of one shape; pairs of a head are element i and i + C / 2."""

    cos_SC: Tensor
    """Each angle twice: for both of its pair."""
    sin_SC: Tensor
    turn_SP: Tensor
    """e^(i angle) of every pair of all queries and keys, P = (H + KV) C / 2."""
    order_R: Tensor
    """Rows of a joint projection with the two of each pair side by side; values' rows as they are."""

    @classmethod
    def of(cls, angles_SC: Tensor, heads: int, kv_heads: int) -> Rotary:
        """For these angles [S, C], the second half as the first."""
        width, turned = angles_SC.shape[1], heads + kv_heads
        half_SI = angles_SC[:, : width // 2]
        turn_SP = torch.polar(torch.ones_like(half_SI), half_SI).repeat(1, turned)
        rows = torch.arange((turned + kv_heads) * width, device=angles_SC.device)
        pairs = rows[: turned * width].view(turned, 2, width // 2).transpose(1, 2)
        order_R = torch.cat((pairs.flatten(), rows[turned * width :]))
        return cls(angles_SC.cos(), angles_SC.sin(), turn_SP, order_R)

    def first(self, length: int) -> Rotary:
        """Of the first positions only."""
        cos_SC, sin_SC, turn_SP = (table[:length] for table in self[:3])
        return Rotary(cos_SC, sin_SC, turn_SP, self.order_R)


def rotary_heads(
    hidden_BSD: Tensor, weight_RD: Tensor, rotary: Rotary, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, S, C], keys and values [B, KV, S, C] of a joint projection, R = (H + 2 KV) C.

    Queries and keys are turned by their positions' angles (Su et al., arXiv 2104.09864): pairs are the
    halves of a head, element i turns with element i + C / 2. On a CPU the elements of a query and a
    key come in another order, the same for both, which no product of the two sees.
    """
    if _worthwhile(hidden_BSD) and hidden_BSD.dtype == weight_RD.dtype == rotary.cos_SC.dtype:
        fast: tuple[Tensor, Tensor, Tensor] = _RotaryHeads.apply(  # type: ignore[no-untyped-call]
            hidden_BSD, weight_RD, rotary, heads, kv_heads
        )
        return fast
    joint_BSR = F.linear(hidden_BSD, weight_RD)
    if joint_BSR.device.type == "cpu":  # under autocast, as the fast way has them
        joint_BSR = joint_BSR.to(hidden_BSD.dtype)
    query, key, value = _split(joint_BSR, rotary, heads, kv_heads)
    return _rotated(query, rotary), _rotated(key, rotary), value


def _split(joint_BSR: Tensor, rotary: Rotary, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Views [B, heads, S, C] of queries, keys and values."""
    shape = *joint_BSR.shape[:2], heads + 2 * kv_heads, rotary.cos_SC.shape[1]
    joint_BHSC = joint_BSR.view(shape).transpose(1, 2)
    return torch.split(joint_BHSC, [heads, kv_heads, kv_heads], dim=1)


def _rotated(x_BHSC: Tensor, rotary: Rotary) -> Tensor:
    first, second = x_BHSC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHSC * rotary.cos_SC + turned * rotary.sin_SC).to(x_BHSC.dtype)


class _RotaryHeads(torch.autograd.Function):
    """`rotary_heads` with pairs side by side: one product of complex numbers turns all of them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BSD: Tensor, weight_RD: Tensor, rotary: Rotary, heads: int, kv_heads: int
    ) -> tuple[Tensor, ...]:
        dtype = linear_dtype(weight_RD)
        hidden_BSD = hidden_BSD.to(dtype)
        paired_RD = weight_RD.index_select(0, rotary.order_R).to(dtype)
        ctx.save_for_backward(hidden_BSD, paired_RD, rotary.turn_SP, rotary.order_R)
        ctx.counts = heads, kv_heads
        joint_BSR = F.linear(hidden_BSD, paired_RD).to(weight_RD.dtype)
        turned_BSX = joint_BSR[..., : 2 * rotary.turn_SP.shape[1]]
        _turn(turned_BSX, rotary.turn_SP, out=turned_BSX)
        return _split(joint_BSR, rotary, heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BSD, paired_RD, turn_SP, order_R = ctx.saved_tensors
        query, key, value = (grad.transpose(1, 2).flatten(2) for grad in grads)
        grad_BSR = query.new_empty(*query.shape[:2], len(paired_RD))
        parts = torch.split(grad_BSR, [x.shape[2] for x in (query, key, value)], dim=2)
        back_SP = turn_SP.conj().resolve_conj()
        _turn(query, back_SP[:, : query.shape[2] // 2], out=parts[0])
        _turn(key, back_SP[:, : key.shape[2] // 2], out=parts[1])
        parts[2].copy_(value)
        dtype = grad_BSR.dtype
        grad_BSR = grad_BSR.to(paired_RD.dtype)
        grad_paired_RD = (grad_BSR.flatten(0, 1).t() @ hidden_BSD.flatten(0, 1)).to(dtype)
        grad_RD = torch.empty_like(grad_paired_RD).index_copy_(0, order_R, grad_paired_RD)
        return (grad_BSR @ paired_RD).to(dtype), grad_RD, None, None, None


def _turn(rows_BSX: Tensor, turn_SP: Tensor, *, out: Tensor) -> None:
    """Turn each pair, X = 2 P."""
    shape = *rows_BSX.shape[:2], turn_SP.shape[1], 2
    pairs, turned = (torch.view_as_complex(x.view(shape)) for x in (rows_BSX, out))
    torch.mul(pairs, turn_SP, out=turned)


def _worthwhile(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()

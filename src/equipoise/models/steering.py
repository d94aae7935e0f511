"""Steering: what a balancer does at a router, beside watching it.

A steerer may replace the selection that goes to the experts (`limit` decides, `transform` makes ids
and weights of it), keep a record of each pass (`begin`), and add a gradient to the router's scores
when the backward pass comes through (`gradient`). In eager mode this is an autograd function around
the routing weights; in compiled code a custom operator, which the compiler can neither look into nor
leave out.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Steerer(Protocol):
    """What acts at one router; ids [T, K], weights [T, K] and scores [T, E] as the model has them."""

    @property
    def limits(self) -> bool:
        """Whether `limit` and `transform` are to be asked at all."""
        ...

    def limit(self, ids: Tensor, weights: Tensor, scores: Tensor | None) -> Tensor:
        """Ids as they are to be, NO_EXPERT where a slot is dropped; no compiler looks inside."""
        ...

    def transform(
        self, ids: Tensor, weights: Tensor, scores: Tensor | None, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The selection to hand to the experts, from what `limit` said; torch.compile traces it."""
        ...

    def begin(
        self,
        ids: Tensor,
        weights: Tensor,
        scores: Tensor | None,
        *,
        grad: bool,
        compiled: bool = False,
        kept: Tensor | None = None,
    ) -> Any:
        """A pass reached the router; what it gives back is handed to `gradient`.

        `grad` says whether gradients are recorded here, `compiled` whether compiled code calls,
        `kept` what `limit` said of this very selection.
        Called again when activation checkpointing runs the forward pass a second time.
        """
        ...

    def gradient(self, record: Any, scores: Tensor) -> Tensor | None:
        """What to add to the gradient of the scores [T, E]."""
        ...


def in_backward() -> bool:
    """True inside of a backward pass, where activation checkpointing runs the forward again.

    PyTorch has no public way to ask (pytorch#144928); this one is under test.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def in_reentrant_checkpoint() -> bool:
    """True in the first forward of reentrant checkpointing, which runs without gradients.

    Its forward cannot be told from an evaluation in any other way than by who called.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname.endswith("CheckpointFunction.forward"):
            return True
        frame = frame.f_back
    return False


class _Carry(torch.autograd.Function):
    """The identity on the routing weights, whose backward adds a gradient to the scores."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, scores: Tensor, steerer: Steerer, record: Any) -> Tensor:
        # Plain attributes, not saved tensors: they stay those of the first forward pass when
        # checkpointing computes the saved ones again.
        ctx.steerer, ctx.record = steerer, record
        ctx.save_for_backward(scores)
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        (scores,) = ctx.saved_tensors
        return grad_weights, ctx.steerer.gradient(ctx.record, scores), None, None


_STEERERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_RECORDS: dict[int, Any] = {}
_KEYS = itertools.count()


def register(steerer: Steerer) -> int:
    """A number by which compiled code finds a steerer."""
    key = next(_KEYS)
    _STEERERS[key] = steerer
    return key


def forget(record: Any) -> None:
    """Let go of a record whose backward pass will not come."""
    _RECORDS.pop(id(record), None)


def steer(
    key: int, steerer: Steerer, ids: Tensor, weights: Tensor, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids and weights for the experts, the weights carrying the gradient for the scores."""
    grad = torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    kept = None
    if steerer.limits:
        seen = (ids, weights.detach(), None if scores is None else scores.detach())
        kept = torch.ops.equipoise.limit(key, *seen) if compiling else steerer.limit(*seen)
    carried = weights
    if compiling:
        if scores is not None:
            carried = torch.ops.equipoise.carry_weights(key, ids, weights, scores, kept, grad)[0]
    else:
        record = steerer.begin(ids, weights, scores, grad=grad, kept=kept)
        if scores is not None and grad and scores.requires_grad:
            carried = _Carry.apply(weights, scores, steerer, record)  # type: ignore[no-untyped-call]
    return (ids, carried) if kept is None else steerer.transform(ids, carried, scores, kept)


@torch.library.custom_op("equipoise::limit", mutates_args=())
def _limit(key: int, ids: Tensor, weights: Tensor, scores: Tensor | None) -> Tensor:
    steerer = _STEERERS.get(key)
    kept: Tensor = ids if steerer is None else steerer.limit(ids, weights, scores)
    return kept.clone() if kept is ids else kept


@_limit.register_fake
def _(key: int, ids: Tensor, weights: Tensor, scores: Tensor | None) -> Tensor:
    return torch.empty_like(ids)


@torch.library.custom_op("equipoise::carry_weights", mutates_args=())
def _carry(
    key: int, ids: Tensor, weights: Tensor, scores: Tensor, kept: Tensor | None, grad: bool
) -> tuple[Tensor, Tensor]:
    steerer = _STEERERS.get(key)
    token = -1
    if steerer is not None:
        record = steerer.begin(ids, weights, scores, grad=grad, compiled=True, kept=kept)
        if record is not None:
            token = id(record)
            _RECORDS[token] = record
    return weights.clone(), torch.tensor(token, dtype=torch.int64)


@_carry.register_fake
def _(
    key: int, ids: Tensor, weights: Tensor, scores: Tensor, kept: Tensor | None, grad: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty((), dtype=torch.int64)


def with_autograd() -> Any:
    """A context that lets one differentiate: the body of a custom operator runs below autograd.

    PyTorch has no public way back up; this one is under test.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded)


# What arrives is not looked at, but waited for: the compiler moves into the forward pass whatever of
# the backward pass does not depend on it.
@torch.library.custom_op("equipoise::carry_weights_gradient", mutates_args=())
def _carry_gradient(key: int, token: Tensor, scores: Tensor, arriving: Tensor) -> Tensor:
    steerer, record = _STEERERS.get(key), _RECORDS.pop(int(token), None)
    with with_autograd():
        found = steerer.gradient(record, scores) if steerer is not None else None
    return torch.zeros_like(scores) if found is None else found.contiguous()


@_carry_gradient.register_fake
def _(key: int, token: Tensor, scores: Tensor, arriving: Tensor) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.key = inputs[0]
    ctx.save_for_backward(output[1], inputs[3])


def _backward(ctx: Any, grad_weights: Tensor, _: Tensor) -> tuple[Any, ...]:
    token, scores = ctx.saved_tensors
    found = torch.ops.equipoise.carry_weights_gradient(ctx.key, token, scores, grad_weights)
    return None, None, grad_weights, found, None, None


_carry.register_autograd(_backward, setup_context=_setup)

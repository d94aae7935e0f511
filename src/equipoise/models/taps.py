"""Taps: hooks on one module that hear each routing decision and pass it on to the observers.

A tap exists once per hooked module and outlives its observers, because code that torch.compile made
while a tap was open calls it by number. In eager mode the hook calls the tap directly; in compiled
code it goes through a custom operator, which the compiler can neither look into nor leave out.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Selection = tuple[Tensor, Tensor | None, Tensor | None]
"""Expert ids [T, K], weights [T, K] and scores [T, E], as a hook finds them."""
Observer = Callable[[Tensor, Tensor | None, Tensor | None], None]


class Ears(Protocol):
    """How one architecture is heard: puts hooks on modules and gives back their handles."""

    def __call__(self, hear: Observer, scores: bool) -> list[RemovableHandle]:
        """Install the hooks; each calls `hear(ids, weights, scores)` once per forward pass.

        Without `scores`, hooks that only serve these may be left out.
        """
        ...


class Tap:
    """The one place where a module's routing is heard, with the observers that want it."""

    def __init__(self, key: int) -> None:
        self.key = key
        self.observers: list[Observer] = []
        self.handles: list[RemovableHandle] = []
        self.scores = False
        self.tick = torch.zeros(1, dtype=torch.int64)

    def hear(self, ids: Tensor, weights: Tensor | None, scores: Tensor | None) -> None:
        """Take one decision from a hook; traceable by torch.compile."""
        if torch.compiler.is_compiling():
            _tick(
                self.key,
                ids,
                None if weights is None else weights.detach(),
                None if scores is None else scores.detach(),
                self.tick,
            )
        else:
            self.deliver(ids, weights, scores)

    def deliver(self, ids: Tensor, weights: Tensor | None, scores: Tensor | None) -> None:
        """Hand one decision to every observer."""
        for observer in tuple(self.observers):
            observer(ids, weights, scores)

    def add(self, observer: Observer, ears: Ears, scores: bool) -> None:
        """Let `observer` hear; the first, and the first that wants scores, installs the hooks."""
        if not self.handles or (scores and not self.scores):
            for handle in self.handles:
                handle.remove()
            self.handles, self.scores = ears(self.hear, scores), scores
        self.observers.append(observer)

    def discard(self, observer: Observer) -> None:
        """Let `observer` go; the last one takes the hooks away."""
        if observer in self.observers:
            self.observers.remove(observer)
        if not self.observers:
            for handle in self.handles:
                handle.remove()
            self.handles = []


_TAPS: weakref.WeakValueDictionary[int, Tap] = weakref.WeakValueDictionary()
_BY_MODULE: weakref.WeakKeyDictionary[nn.Module, Tap] = weakref.WeakKeyDictionary()
_KEYS = itertools.count()


def tap_of(module: nn.Module) -> Tap:
    """The tap of a module, made on first use and kept as long as the module lives."""
    tap = _BY_MODULE.get(module)
    if tap is None:
        tap = Tap(next(_KEYS))
        _TAPS[tap.key] = _BY_MODULE[module] = tap
    return tap


# Writing to `tick`, on the CPU, keeps the call alive and in order, and out of CUDA graphs, whose
# replay would not come back to Python.
@torch.library.custom_op("equipoise::tick", mutates_args={"tick"})
def _tick(
    key: int, ids: Tensor, weights: Tensor | None, scores: Tensor | None, tick: Tensor
) -> None:
    tick.add_(1)
    tap = _TAPS.get(key)
    if tap is not None:
        tap.deliver(ids, weights, scores)


@_tick.register_fake
def _(*_: Any) -> None:
    return None

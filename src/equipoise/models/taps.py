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

from equipoise.models import steering
from equipoise.models.steering import Steerer

Selection = tuple[Tensor, Tensor | None, Tensor | None]
"""Expert ids [T, K], weights [T, K] and scores [T, E], as a hook finds them."""
Observer = Callable[[Tensor, Tensor | None, Tensor | None], None]
Hear = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]
"""Takes one decision; gives back the ids and weights that the experts are to use."""


class Ears(Protocol):
    """How one architecture is heard: puts hooks on modules and gives back their handles."""

    def __call__(self, hear: Hear, scores: bool) -> list[RemovableHandle]:
        """Install the hooks; each calls `hear(ids, weights, scores)` once per forward pass.

        Where it gives back others than it was given, these go to the experts.

        Without `scores`, hooks that only serve these may be left out.
        """
        ...


class Tap:
    """The one place where a module's routing is heard, with the observers that want it."""

    def __init__(self, key: int) -> None:
        self.key = key
        self.observers: tuple[Observer, ...] = ()
        self.steerer: Steerer | None = None
        self.steerer_key = -1
        self.handles: list[RemovableHandle] = []
        self.scores = False
        self.tick = torch.zeros(1, dtype=torch.int64)

    def hear(
        self, ids: Tensor, weights: Tensor | None, scores: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Take one decision from a hook; traceable by torch.compile."""
        if self.steerer is not None and weights is not None:
            ids, weights = steering.steer(self.steerer_key, self.steerer, ids, weights, scores)
        if torch.compiler.is_compiling():
            if self.observers:
                _tick(
                    self.key,
                    ids,
                    None if weights is None else weights.detach(),
                    None if scores is None else scores.detach(),
                    self.tick,
                )
        else:
            for observer in self.observers:
                observer(ids, weights, scores)
        return ids, weights

    def deliver(self, ids: Tensor, weights: Tensor | None, scores: Tensor | None) -> None:
        """Hand one decision to every observer."""
        for observer in self.observers:
            observer(ids, weights, scores)

    def add(self, observer: Observer, ears: Ears, scores: bool) -> None:
        """Let `observer` hear; the first, and the first that wants scores, installs the hooks."""
        self._install(ears, scores)
        self.observers = (*self.observers, observer)

    def discard(self, observer: Observer) -> None:
        """Let `observer` go; the last one takes the hooks away."""
        self.observers = tuple(other for other in self.observers if other is not observer)
        self._release()

    def take_steerer(self, steerer: Steerer, ears: Ears) -> None:
        """Let `steerer` act here."""
        self._install(ears, scores=True)
        self.steerer, self.steerer_key = steerer, steering.register(steerer)

    def drop_steerer(self) -> None:
        """Let nobody act here."""
        self.steerer = None
        self._release()

    def _install(self, ears: Ears, scores: bool) -> None:
        if not self.handles or (scores and not self.scores):
            for handle in self.handles:
                handle.remove()
            self.handles, self.scores = ears(self.hear, scores), scores

    def _release(self) -> None:
        if not self.observers and self.steerer is None:
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

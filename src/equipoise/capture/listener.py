"""Hooks on a model: they copy what each router decided into the window that is being filled."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from equipoise.capture.buffers import Describes, Pass
from equipoise.capture.floats import fill_floats
from equipoise.capture.lanes import Seating, Width
from equipoise.capture.passes import Batch, batch_shape, mask_of, past_length
from equipoise.capture.provenance import Clock
from equipoise.capture.sequences import SequenceBook, keep
from equipoise.capture.writer import WriterThread
from equipoise.errors import RoutingError
from equipoise.models import RouterSite
from equipoise.models.steering import in_backward
from equipoise.models.taps import Observer
from equipoise.trace.schema import Manifest

_F = TypeVar("_F", bound=Callable[..., Any])


def _eager(function: _F) -> _F:
    """Keep a hook out of compiled graphs: it does its work in Python, at run time."""
    return cast(_F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class Listener:
    """Watches the forward passes of a model and fills the writer's arenas."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RouterSite],
        manifest: Manifest,
        writer: WriterThread,
        book: SequenceBook,
        clock: Clock,
    ) -> None:
        self.model, self._sites = model, sites
        self._layers, self._full = manifest.layers, manifest.level == "full"
        self._writer, self._book, self.clock = writer, book, clock
        config = getattr(_plain(model), "config", None)
        self._two_stacks = bool(getattr(config, "is_encoder_decoder", False))
        self._widths = _widths(manifest)
        self._seating = Seating(manifest.layers, self._widths)
        self.batch: Batch | None = None
        """What a runner says of the next passes; None: infer it from their arguments."""
        self._first: tuple[Batch, int, int] | None = None
        """The first pass of a batch: what was said, the length of its cache, its width."""
        self._handles: list[Any] = []
        self._roots: list[nn.Module] = []
        self._pass: Pass | None = None
        self._depth = 0
        self._error_before: BaseException | None = None

    def attach(self) -> None:
        """Put hooks on the model: around its forward pass, and at every router."""
        self._roots = [self.model, *_inner_models(_plain(self.model))]
        for root in self._roots:
            begin = root.register_forward_pre_hook(self._begin, with_kwargs=True)
            end = root.register_forward_hook(self._end, always_call=True)
            self._handles += [begin, end]
        for index, site in enumerate(self._sites):
            self._handles.append(site.listen(self._ear(index), scores=self._full))

    def detach(self) -> None:
        """Take every hook off, and forget a pass that was under way."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._pass = None
        self._seating.close()

    @_eager
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        if self._depth == 0 or module is self._roots[0]:
            self._depth = 0  # whatever an interrupt left open is void
            self._start(module, args, kwargs)
        self._depth += 1

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._writer.check()
        self._error_before = sys.exception()
        self.clock.start()
        arguments: Mapping[str, Any] = kwargs
        if args:
            signature = inspect.signature(_plain(module).forward)
            arguments = signature.bind_partial(*args, **kwargs).arguments
        shape = batch_shape(arguments)
        describe: Describes
        if self.batch is not None:
            describe = self._told(self.batch, arguments, shape)
        else:
            self._book.forget_written(self._writer.rotate())
            describe = self._book.infer(arguments, shape)
            keep(self._writer.arena, describe.sequences)
        self._pass = Pass(describe, shape)
        if self._two_stacks and self.batch is None:
            self._pass.decoder = self._book.infer_decoder(arguments)
        self._seating.open()

    def _told(
        self, batch: Batch, arguments: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> Batch:
        """What the runner said of this pass; generation goes on from the first pass it spoke of."""
        if shape is None:
            return batch
        past = past_length(arguments, shape[1], mask_of(arguments))
        if self._first is None or self._first[0] is not batch:
            self._first = batch, past, shape[1]
        _, before, width = self._first
        return batch.later(width, past - before - width) if past >= before + width else batch

    def _ear(self, index: int) -> Observer:
        """What a router's hook calls: one copy to its seat, where ids look as those before did."""
        general = partial(self._hear, index)
        if self._sites[index].interpret is not None or self._widths[index].floats:
            return general
        free = self._seating.free

        def hear(ids: Tensor, weights: Tensor | None, scores: Tensor | None) -> None:
            seat = free[index]
            if (
                seat is None
                or ids.shape != seat.shape
                or ids.dtype is not seat.dtype
                or ids.device != seat.device
            ):
                general(ids, weights, scores)
                return
            seat.ids.copy_(ids)
            free[index] = None

        return hear

    def _hear(self, index: int, ids: Tensor, weights: Tensor | None, scores: Tensor | None) -> None:
        if in_backward():
            return
        site = self._sites[index]
        if self._pass is None:
            raise RoutingError(
                f"{site.path} routed outside of a forward pass of {type(self.model).__name__}:"
                " record the module that your code calls."
            )
        if self._seating.taken(index):
            raise RoutingError(
                f"{site.path} routed twice in one forward pass. Record the module that is called"
                " once per batch; a model that uses a layer at several depths cannot be recorded."
            )
        decided = site.selection(ids, weights, scores)
        seat = self._seating.seat(index, decided[0])
        seat.ids.copy_(decided[0])
        if seat.floats is not None:
            fill_floats(seat.floats, decided, self._full, site.path)
        self._seating.free[index] = None

    @_eager
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._depth == 0 or in_backward():
            return
        self._depth -= 1
        if self._depth:
            return
        current, self._pass = self._pass, None
        self.clock.stop()
        error = sys.exception()
        if current is not None and (error is None or error is self._error_before):
            self._finish(current)
        self._seating.close()

    def _finish(self, current: Pass) -> None:
        if not self._seating.all_taken():
            self._check_seen(self._seating.heard())
        arena = self._writer.arena
        self._seating.send(arena, current)
        arena.passes.append(current)
        if current.shape is not None:
            arena.rows += current.shape[0] * current.shape[1]
        else:
            arena.rows += max((block.rows for block in current.blocks.values()), default=0)

    def _check_seen(self, heard: set[int]) -> None:
        """A router that was not heard would be recorded as idle: refuse."""
        layers = self._layers
        stacks = {layers[index].stack for index in heard}
        missing = [
            layer.path
            for index, layer in enumerate(layers)
            if index not in heard and (layer.stack in stacks or not stacks)
        ]
        if missing:
            raise RoutingError(
                f"Tokens went through the model, but {len(missing)} of {len(layers)} routers were"
                f" not heard ({missing[0]}, ...): a kernel or a graph compiled before recording"
                " bypasses them. Start recording before torch.compile runs (or call"
                " torch.compiler.reset()), and load without fused MoE kernels."
            )


def _widths(manifest: Manifest) -> list[Width]:
    """What is kept of each router: ids; weights and margin at level "full", else the stack's check."""
    last = {layer.stack: index for index, layer in enumerate(manifest.layers)}
    full = manifest.level == "full"
    return [
        Width(k, k + 1 if full else k * (index in last.values()))
        for index, k in enumerate(layer.top_k for layer in manifest.layers)
    ]


def _plain(model: nn.Module) -> nn.Module:
    """The module inside a torch.compile wrapper."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _inner_models(model: nn.Module) -> list[nn.Module]:
    """Modules that code may call in place of the whole: the base model, an encoder."""
    found = [getattr(model, "base_model", None)]
    encoder = getattr(model, "get_encoder", None)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and callable(encoder):
        found.append(encoder())  # generate() runs it by itself
    return [inner for inner in found if isinstance(inner, nn.Module) and inner is not model]

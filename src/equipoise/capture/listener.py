"""Hooks on a model: they copy what each router decided into the window that is being filled."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from equipoise.capture.buffers import Arena, Block, Describes, Pass, Staging
from equipoise.capture.passes import Batch, batch_shape, mask_of, past_length
from equipoise.capture.provenance import Clock
from equipoise.capture.sequences import SequenceBook, keep
from equipoise.capture.writer import WriterThread
from equipoise.errors import RoutingError
from equipoise.models import RouterSite
from equipoise.routing import Routing
from equipoise.trace.schema import Layer, Manifest

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
        self._checks = {_last_of_stack(manifest.layers, stack) for stack in manifest.stacks}
        self.batch: Batch | None = None
        """What a runner says of the next passes; None: infer it from their arguments."""
        self._first: tuple[Batch, int, int] | None = None
        """The first pass of a batch: what was said, the length of its cache, its width."""
        self._handles: list[Any] = []
        self._staging: dict[torch.device, Staging] = {}
        self._device_of: dict[int, torch.device] = {}
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
            self._handles.append(site.observe(partial(self._hear, index), scores=self._full))

    def detach(self) -> None:
        """Take every hook off, and forget a pass that was under way."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._pass = None

    @_eager
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _recomputing():
            return
        if module is self._roots[0] or self._depth == 0:
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

    def _hear(self, index: int, routing: Routing) -> None:
        if _recomputing():
            return
        current, site = self._pass, self._sites[index]
        if current is None:
            raise RoutingError(
                f"{site.path} routed outside of a forward pass of {type(self.model).__name__}:"
                " record the module that your code calls."
            )
        if index in current.blocks:
            raise RoutingError(
                f"{site.path} routed twice in one forward pass. Record the module that is called"
                " once per batch; a model that uses a layer at several depths cannot be recorded."
            )
        ids_TK = routing.expert_ids_TK
        block = self._block(current, index, ids_TK)
        block.ids.copy_(ids_TK, non_blocking=True)
        if block.floats is not None:
            _fill_floats(block.floats, routing, self._full)
        current.blocks[index] = block

    def _block(self, current: Pass, index: int, ids_TK: Tensor) -> Block:
        """Room for one router's decision; for those that follow on its device it is made at once."""
        device, (rows, top_k) = ids_TK.device, ids_TK.shape
        memory = self._memory(device)
        block = current.prepared.pop(index, None)
        if block is None or block.rows != rows or self._device_of.get(index) != device:
            lane = self._lane(index, device)
            blocks = memory.blocks(rows, [top_k, *(self._layers[i].top_k for i in lane)])
            block = blocks[0]
            current.prepared.update(zip(lane, blocks[1:], strict=True))
        self._device_of[index] = device
        width = top_k + 1 if self._full else int(index in self._checks)
        if width:
            memory.add_floats(block, width)
        return block

    def _lane(self, index: int, device: torch.device) -> list[int]:
        """Routers of the same stack behind this one that were on this device in the pass before."""
        stack = self._layers[index].stack
        return [
            i
            for i in range(index + 1, len(self._layers))
            if self._device_of.get(i) == device and self._layers[i].stack == stack
        ]

    def _memory(self, device: torch.device) -> Arena | Staging:
        if device.type == "cpu":
            return self._writer.arena
        if device not in self._staging:
            self._staging[device] = Staging(device)
        return self._staging[device]

    @_eager
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _recomputing() or self._depth == 0:
            return
        self._depth -= 1
        if self._depth:
            return
        current, self._pass = self._pass, None
        self.clock.stop()
        failed = sys.exception() is not None and sys.exception() is not self._error_before
        events = [staging.send(self._writer.arena) for staging in self._staging.values()]
        if current is None or failed:
            return
        self._check_seen(current)
        current.events = [event for event in events if event is not None]
        self._writer.arena.passes.append(current)
        shape = current.shape or (1, max((b.rows for b in current.blocks.values()), default=0))
        self._writer.arena.rows += shape[0] * shape[1]

    def _check_seen(self, current: Pass) -> None:
        """A router that was not heard would be recorded as idle: refuse."""
        if not self._sites:
            return
        layers = self._layers
        heard = {layers[index].stack for index in current.blocks}
        missing = [
            layer.path
            for index, layer in enumerate(layers)
            if index not in current.blocks and (layer.stack in heard or not heard)
        ]
        if missing:
            raise RoutingError(
                f"Tokens went through the model, but {len(missing)} of {len(layers)} routers were"
                f" not heard ({missing[0]}, ...): a kernel or a graph compiled before recording"
                " bypasses them. Start recording before torch.compile runs (or call"
                " torch.compiler.reset()), and load without fused MoE kernels."
            )


def _last_of_stack(layers: Sequence[Layer], stack: str) -> int:
    return max(index for index, layer in enumerate(layers) if layer.stack == stack)


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


def _recomputing() -> bool:
    """True inside of a backward pass, where activation checkpointing runs the forward again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _fill_floats(floats: Tensor, routing: Routing, full: bool) -> None:
    """Weights and margin at level "full"; else their sum, which is NaN when anything was."""
    weights = routing.weights_TK
    if weights is None:
        floats.zero_()
        if full:
            raise RoutingError(
                f"{routing.path} gives no routing weights: record it at level ids or counts."
            )
        return
    weights = weights.detach()
    if not full:
        floats.copy_(weights.sum(1, keepdim=True, dtype=torch.float32), non_blocking=True)
        return
    floats[:, :-1].copy_(weights, non_blocking=True)
    floats[:, -1].copy_(_margin(routing), non_blocking=True)


def _margin(routing: Routing) -> Tensor:
    """Lowest selected minus highest unselected score [T]; NaN where the router gives no scores.

    Negative where a selection bias or a group limit overruled the scores.
    """
    ids_TK, scores_TE = routing.expert_ids_TK.long(), routing.scores_TE
    if scores_TE is None:
        return torch.full((len(ids_TK),), float("nan"), device=ids_TK.device)
    scores_TE = scores_TE.detach().float()
    routed_TK = ids_TK >= 0
    selected_TK = scores_TE.gather(1, ids_TK.clamp(min=0))
    lowest_T = selected_TK.masked_fill(~routed_TK, float("inf")).amin(1)
    taken_TE = torch.zeros_like(scores_TE).scatter_add_(
        1, ids_TK.clamp(min=0), routed_TK.to(scores_TE.dtype)
    )
    highest_T = scores_TE.masked_fill(taken_TE > 0, float("-inf")).amax(1)
    return lowest_T - highest_T

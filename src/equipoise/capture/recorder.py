"""`equipoise.record`: watch a model run and write its trace."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.capture.buffers import Arena, Block, Pass, Staging, host_block
from equipoise.capture.passes import (
    Batch,
    Inferred,
    Sequence_,
    batch_shape,
    past_length,
    role_codes,
)
from equipoise.capture.provenance import Clock, describe_model, provenance
from equipoise.capture.ranks import Ranks, find_ranks
from equipoise.capture.writer import WriterThread
from equipoise.errors import EquipoiseError, RoutingError, TraceError, nearest
from equipoise.models import RouterSite, discover
from equipoise.routing import Routing
from equipoise.trace.files import Lock, PartWriter, prepare_folder
from equipoise.trace.merge import open_trace, read_manifests
from equipoise.trace.schema import LEVELS, WINDOW_TOKENS, Layer, Manifest, name_layers

_F = TypeVar("_F", bound=Callable[..., Any])
_RESULTS = ("answer", "choice", "correct", "loglikelihoods")


def record(
    model: nn.Module,
    path: str | Path,
    *,
    level: str = "ids",
    every: int = 1,
    force: bool = False,
    resume: bool = False,
    meta: Mapping[str, Any] | None = None,
    window_tokens: int = WINDOW_TOKENS,
    allow_dense: bool = False,
    data_rank: int | None = None,
) -> Recorder | Off:
    """Record the routing of everything that `model` computes inside a `with` block.

        with equipoise.record(model, "run.trace"):
            model.generate(**inputs)

    Args:
        model: a transformers model, the module that your loop calls; compile it afterwards.
        path: folder to write.
        level: "counts"; "ids", experts per token; or "full", ids, weights and the scores' margin.
        every: keep the token rows of one sequence in `every`. Counts stay exact.
        force: overwrite a trace at `path`.
        resume: go on with the unfinished trace at `path`, as a new part of it.
        meta: provenance to keep with the trace.
        window_tokens: rows after which counts and rows are written; what a kill can lose.
        allow_dense: accept a model without routers, whose trace has no layers.
        data_rank: with several processes, the lowest rank that sees the same tokens as this one
            (tensor parallelism); worked out from the model when left out.

    Set EQUIPOISE_TRACE=off in the environment to make this do nothing.

    Raises:
        RoutingError: no router found, or not all of them, before anything runs; impossible ids,
            NaN, or a layer that was not seen, in the forward pass after it happened.
        TraceError: a folder that cannot be written.
    """
    if os.environ.get("EQUIPOISE_TRACE", "").lower() in ("off", "0", "false", "no"):
        return Off()
    if level not in LEVELS:
        raise EquipoiseError(
            f"No level {level!r}: allowed are {', '.join(LEVELS)}." + nearest(level, LEVELS)
        )
    if every < 1 or window_tokens < 1:
        raise EquipoiseError(f"every={every}, window_tokens={window_tokens}: both are at least 1.")
    if force and resume:
        raise EquipoiseError("force and resume exclude each other: overwrite the trace, or go on.")
    sites = discover(model)
    if not sites and not allow_dense:
        raise RoutingError(
            f"No router found in {type(model).__name__}, and its config names no experts: it is a"
            " dense model. Pass allow_dense=True for a trace without layers."
        )
    ranks = find_ranks(model, data_rank)
    return Recorder(
        model, sites, Path(path), level, every, force, resume, meta or {}, window_tokens, ranks
    )


def _eager(function: _F) -> _F:
    """Keep a hook out of compiled graphs: it does its work in Python, at run time."""
    return cast(_F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class Recorder:
    """A running recording; made by `record`, used as a context manager."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RouterSite],
        path: Path,
        level: str,
        every: int,
        force: bool,
        resume: bool,
        meta: Mapping[str, Any],
        window_tokens: int,
        ranks: Ranks,
    ) -> None:
        self.path, self.model = path, model
        layers = name_layers([_layer(site) for site in sites])
        by_path = {site.path: site for site in sites}
        self._sites = [by_path[layer.path] for layer in layers]
        self._manifest = Manifest(
            layers,
            level if ranks.leads else "counts",
            every,
            window_tokens,
            ranks.rank,
            ranks.world_size,
            ranks.data_rank,
            run=ranks.run,
        )
        self._manifest.meta = {**describe_model(model), **provenance(), **meta}
        self._force, self._resume = force, resume
        self._clock = Clock(model)
        self._checks = {_last_of_stack(layers, stack) for stack in self._manifest.stacks}
        self._handles: list[Any] = []
        self._signature = inspect.signature(_plain(model).forward)
        self._staging: dict[torch.device, Staging] = {}
        self._roots: list[nn.Module] = []
        self._pass: Pass | None = None
        self._depth = 0
        self._error_before: BaseException | None = None
        self._batch: Batch | None = None
        self._known: dict[int, Sequence_] = {}
        self._live: list[Sequence_] = []
        self._next_sequence = 0
        self._closed = False
        self.done: set[tuple[Any, ...]] = set()
        """Keys of what a resumed trace holds: (split, subject, question) and (domain, name)."""

    # -- life cycle ----------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        manifest = self._manifest
        self._lock = Lock(self.path, manifest.rank)
        try:
            if self._resume:
                self._continue()
            else:
                prepare_folder(self.path, self._force, manifest.rank, manifest.world_size)
            self._part = PartWriter(self.path, manifest)
            self._writer = WriterThread(self._part, pinned=torch.cuda.is_available())
            self._arena: Arena = self._writer.arena()
            self._attach()
        except BaseException:
            self._detach()
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close("complete" if error is None else "partial")
        except Exception:
            if error is None:
                raise  # else the error that ended the block is the one to see

    def close(self, status: str = "complete") -> None:
        """End the recording: take the hooks off, write what is left, close the files."""
        if self._closed:
            return
        self._closed = True
        self._detach()
        try:
            if status == "partial":
                self._drop_unfinished()
            self._writer.submit(self._arena)
            self._writer.finish()
            self._manifest.meta.update(self._clock.figures(self._writer.tokens))
            self._part.close(status)
        except BaseException:
            self._part.abandon()
            raise
        finally:
            self._lock.release()

    def _continue(self) -> None:
        """Take up the trace at the path: its next session, and what it holds already."""
        mine = [m for m in read_manifests(self.path) if m.rank == self._manifest.rank]
        for other in mine:
            for what in ("layers", "level", "every", "window_tokens", "world_size"):
                if getattr(other, what) != getattr(self._manifest, what):
                    raise TraceError(
                        f"{self.path} cannot be resumed: its {what} differ from this run's"
                        f" ({getattr(other, what)!r}). Use the same model and options, or another"
                        " name."
                    )
        if mine and mine[-1].status == "complete":
            raise TraceError(f"{self.path} is complete: there is nothing to resume.")
        self._manifest.session = 1 + max((m.session for m in mine), default=-1)
        self._manifest.run = mine[0].run if mine else self._manifest.run
        for row in open_trace(self.path).sequences.to_pylist():
            if row["question"] is not None or row["subject"] is not None:
                self.done.add((row["split"], row["subject"], row["question"]))
            else:
                self.done.add((row["domain"], row["name"]))

    # -- for runners ---------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Token rows written so far."""
        return self._writer.tokens

    @property
    def manifest(self) -> Manifest:
        """The manifest; `meta` may be added to until the recording closes."""
        return self._manifest

    def add_sequence(
        self,
        *,
        subject: str | None = None,
        category: str | None = None,
        domain: str | None = None,
        split: str | None = None,
        name: str | None = None,
        question: int | None = None,
        tokens: int | None = None,
        roles: Sequence[tuple[str, int, int]] = (),
    ) -> int:
        """Announce a sequence; returns its number. `roles` are (role, start, stop) in positions."""
        spans = [{"role": r, "start": a, "stop": b} for r, a, b in roles]
        values = {
            "subject": subject,
            "category": category,
            "domain": domain,
            "split": split,
            "name": name,
            "question": question,
            "tokens": tokens,
            "roles": spans or None,
        }
        codes = role_codes(roles, tokens) if roles else None
        return self._new_sequence(values, codes).number

    def _new_sequence(self, values: dict[str, Any], codes: Any = None) -> Sequence_:
        sequence = Sequence_(self._next_sequence, values, codes)
        self._next_sequence += 1
        self._known[sequence.number] = sequence
        return sequence

    @contextmanager
    def batch(
        self,
        sequences: Sequence[int],
        starts: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        skip: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Say what the rows of the forward passes inside are.

        Row b, column c is position `starts[b] + c` of `sequences[b]` while `c < lengths[b]`, and
        padding beyond. Positions below `skip[b]` repeat a context that was counted before.
        """
        count = len(sequences)
        known = [self._sequence(number) for number in sequences]
        starts_B = np.asarray([0] * count if starts is None else starts, np.int64)
        skip_B = np.asarray([0] * count if skip is None else skip, np.int64)
        huge = [2**31 - 1] * count
        lengths_B = np.asarray(huge if lengths is None else lengths, np.int64)
        if not len(starts_B) == len(lengths_B) == len(skip_B) == count:
            raise EquipoiseError("starts, lengths and skip need one number for each sequence.")
        self._writer.check()
        self._rotate()
        self._keep(known)
        self._batch = Batch(known, starts_B, lengths_B, skip_B)
        try:
            yield
        finally:
            self._batch = None

    def _keep(self, sequences: Sequence[Sequence_]) -> None:
        have = {sequence.number for sequence in self._arena.sequences}
        self._arena.sequences += [s for s in sequences if s.number not in have]

    def complete(self, sequence: int, **results: Any) -> None:
        """Add the results of a question: answer, choice, correct, loglikelihoods."""
        unknown = sorted(set(results) - set(_RESULTS))
        if unknown:
            raise EquipoiseError(f"No result {unknown[0]!r}: allowed are {', '.join(_RESULTS)}.")
        found = self._sequence(sequence)
        found.values.update(results)
        self._keep([found])

    def _sequence(self, number: int) -> Sequence_:
        try:
            return self._known[number]
        except KeyError:
            raise EquipoiseError(f"No sequence {number}: announce it with add_sequence.") from None

    # -- hooks ---------------------------------------------------------------------------------

    def _attach(self) -> None:
        inner = getattr(_plain(self.model), "base_model", None)
        self._roots = [self.model]
        if isinstance(inner, nn.Module) and inner is not _plain(self.model):
            self._roots.append(inner)
        for root in self._roots:
            begin = root.register_forward_pre_hook(self._begin, with_kwargs=True)
            end = root.register_forward_hook(self._end, always_call=True)
            self._handles += [begin, end]
        for index, site in enumerate(self._sites):
            self._handles.append(site.observe(partial(self._hear, index)))

    def _detach(self) -> None:
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
        self._clock.start()
        arguments: Mapping[str, Any] = kwargs
        if args:
            signature = inspect.signature(_plain(module).forward)
            arguments = signature.bind_partial(*args, **kwargs).arguments
        shape = batch_shape(arguments)
        if self._batch is None:
            self._rotate()
        self._pass = Pass(self._batch or self._infer(arguments, shape), shape)

    def _infer(self, arguments: Mapping[str, Any], shape: tuple[int, int] | None) -> Inferred:
        """Rows are sequences; a pass on a cache goes on with those of the pass before."""
        batch, width = shape or (1, 0)
        mask = arguments.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        past = past_length(arguments, width, mask)
        if not past or len(self._live) != batch:
            self._known = {}  # a long run must not remember every sequence
            self._live = [self._new_sequence({}) for _ in range(batch)]
        self._keep(self._live)
        if mask is not None:
            mask = mask.detach().to("cpu", non_blocking=True)
        return Inferred(list(self._live), past, mask)

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
        rows, top_k = ids_TK.shape
        full = self._manifest.level == "full"
        floats = top_k + 1 if full else int(index in self._checks)
        block = self._block(ids_TK.device, rows, top_k, floats)
        block.ids.copy_(ids_TK.detach(), non_blocking=True)
        if block.floats is not None:
            _fill_floats(block.floats, routing, full)
        current.blocks[index] = block

    def _block(self, device: torch.device, rows: int, top_k: int, floats: int) -> Block:
        if device.type == "cpu":
            return host_block(self._arena, rows, top_k, floats)
        if device not in self._staging:
            self._staging[device] = Staging(device)
        return self._staging[device].block(rows, top_k, floats)

    @_eager
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _recomputing() or self._depth == 0:
            return
        self._depth -= 1
        if self._depth:
            return
        current, self._pass = self._pass, None
        self._clock.stop()
        failed = sys.exception() is not None and sys.exception() is not self._error_before
        events = [staging.send(self._arena) for staging in self._staging.values()]
        if current is None or failed:
            return
        self._check_seen(current)
        current.events = [event for event in events if event is not None]
        self._arena.passes.append(current)
        shape = current.shape or (1, max((b.rows for b in current.blocks.values()), default=0))
        self._arena.rows += shape[0] * shape[1]

    def _check_seen(self, current: Pass) -> None:
        """A router that was not heard would be recorded as idle: refuse."""
        if not self._sites:
            return
        layers = self._manifest.layers
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

    # -- windows -------------------------------------------------------------------------------

    def _rotate(self) -> None:
        """Hand the window to the writer when it has enough rows; between passes only."""
        if self._arena.rows >= self._manifest.window_tokens:
            full, self._arena = self._arena, None  # type: ignore[assignment]
            self._writer.submit(full)
            self._forget(full)
            self._arena = self._writer.arena()

    def _forget(self, arena: Arena) -> None:
        """Sequences with results are done; keeping them would grow with the run."""
        for sequence in arena.sequences:
            if "correct" in sequence.values:
                self._known.pop(sequence.number, None)

    def _drop_unfinished(self) -> None:
        """Leave out questions that ran but have no result: a resumed run will ask them again."""
        lost = {
            s.number
            for one in self._arena.passes
            for s in one.describe.sequences
            if any(_unfinished(q) for q in one.describe.sequences)
        }
        passes = self._arena.passes
        self._arena.passes = [
            one for one in passes if not any(s.number in lost for s in one.describe.sequences)
        ]
        self._arena.sequences = [s for s in self._arena.sequences if s.number not in lost]


class Off:
    """Stands in for a Recorder when EQUIPOISE_TRACE=off: every method does nothing."""

    tokens = 0

    def __init__(self) -> None:
        self.done: set[tuple[Any, ...]] = set()
        self.manifest = Manifest(())

    def __enter__(self) -> Off:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add_sequence(self, **_: Any) -> int:
        """Nothing; returns -1."""
        return -1

    @contextmanager
    def batch(self, *_: Any, **__: Any) -> Iterator[None]:
        """Nothing."""
        yield

    def complete(self, sequence: int, **_: Any) -> None:
        """Nothing."""

    def close(self, status: str = "complete") -> None:
        """Nothing."""


def _layer(site: RouterSite) -> Layer:
    return Layer(
        site.layer,
        site.path,
        site.num_experts,
        site.top_k,
        stack=site.stack,
        score_function=site.score_function,
        selection_bias=site.selection_bias,
        shared_experts=site.shared_experts,
    )


def _last_of_stack(layers: Sequence[Layer], stack: str) -> int:
    return max(index for index, layer in enumerate(layers) if layer.stack == stack)


def _plain(model: nn.Module) -> nn.Module:
    """The module inside a torch.compile wrapper."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _recomputing() -> bool:
    """True inside of a backward pass, where activation checkpointing runs the forward again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _unfinished(sequence: Sequence_) -> bool:
    return sequence.values.get("question") is not None and "correct" not in sequence.values


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

"""`equipoise.record`: watch a model run and write its trace."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from equipoise.capture.listener import Listener
from equipoise.capture.off import Off
from equipoise.capture.passes import UNLIMITED, Batch, role_codes
from equipoise.capture.provenance import Clock, describe_model, provenance
from equipoise.capture.ranks import Ranks, find_ranks
from equipoise.capture.sequences import SequenceBook, drop_unfinished, keep
from equipoise.capture.writer import WriterThread
from equipoise.errors import EquipoiseError, RoutingError, TraceError, nearest
from equipoise.models import RouterSite, discover
from equipoise.trace.files import PartWriter, lock_part, prepare_folder
from equipoise.trace.merge import open_trace, read_manifests
from equipoise.trace.schema import LEVELS, OFF, WINDOW_TOKENS, Layer, Manifest, name_layers

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
        model: a transformers model, the module that your loop calls, compiled or not.
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
    if os.environ.get("EQUIPOISE_TRACE", "").lower() in OFF:
        return Off()
    _check_arguments(model, level, every, window_tokens, force and resume)
    sites = discover(model)
    if not sites and not allow_dense:
        raise RoutingError(
            f"No router found in {type(model).__name__}, and its config names no experts: it is a"
            " dense model. Pass allow_dense=True for a trace without layers."
        )
    _refuse_variable(sites)
    ranks = find_ranks(model, data_rank)
    return Recorder(
        model, sites, Path(path), level, every, force, resume, meta or {}, window_tokens, ranks
    )


def _refuse_variable(sites: Sequence[RouterSite]) -> None:
    """A trace has K columns of ids for each layer, and buffers of that width before the first pass."""
    site = next((site for site in sites if site.variable_top_k), None)
    if site is not None:
        raise RoutingError(
            f"{site.path}: its router gives each token another number of experts"
            f" ({site.num_experts} experts, {site.top_k} on average), but a trace holds the same"
            " number for every token. Watch it with site.observe() of equipoise.models.discover, or"
            " measure it with equipoise.balance.attach(model)."
        )


def _check_arguments(model: object, level: str, every: int, window_tokens: int, both: bool) -> None:
    if not isinstance(model, nn.Module):
        raise EquipoiseError(
            f"record wants the loaded model (a torch module), not {type(model).__name__}."
        )
    if level not in LEVELS:
        raise EquipoiseError(
            f"No level {level!r}: allowed are {', '.join(LEVELS)}." + nearest(level, LEVELS)
        )
    if every < 1 or window_tokens < 1:
        raise EquipoiseError(f"every={every}, window_tokens={window_tokens}: both are at least 1.")
    if both:
        raise EquipoiseError("force and resume exclude each other: overwrite the trace, or go on.")


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
        layers = name_layers([_layer(site, _stack(site, sites)) for site in sites])
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
        self._book = SequenceBook()
        self._closed = False
        self.done: set[tuple[Any, ...]] = set()
        """Keys of what a resumed trace holds: (split, subject, question) and (domain, name)."""

    # -- life cycle ----------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        manifest = self._manifest
        self._lock = lock_part(self.path, manifest.rank)
        try:
            if self._resume:
                self._continue()
            else:
                prepare_folder(self.path, self._force, manifest.rank, manifest.world_size)
            self._part = PartWriter(self.path, manifest)
            self._writer = WriterThread(self._part, pinned=torch.cuda.is_available())
            self._listener = Listener(
                self.model, self._sites, manifest, self._writer, self._book, self._clock
            )
            with self._undone_on_error():
                self._listener.attach()
        except BaseException:
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
        self._listener.detach()
        try:
            if status == "partial":
                drop_unfinished(self._writer.arena)
            self._writer.finish()
            self._manifest.meta.update(self._clock.figures(self._writer.tokens))
            if status == "complete" and not self._clock.ran:
                warnings.warn(
                    f"Nothing ran while {self.path} was recorded: the trace is empty. Call the"
                    " model inside the with block.",
                    stacklevel=3,
                )
            self._part.close(status)
        except BaseException:
            self._part.abandon()
            raise
        finally:
            self._lock.release()

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._listener.detach()
            self._part.abandon()
            raise

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
        self._check_options(mine)
        if mine and mine[-1].status == "complete":
            raise TraceError(f"{self.path} is complete: there is nothing to resume.")
        self._manifest.session = 1 + max((m.session for m in mine), default=-1)
        self._manifest.run = mine[0].run if mine else self._manifest.run
        for row in open_trace(self.path).sequences.to_pylist():
            if row["question"] is not None or row["subject"] is not None:
                self.done.add((row["split"], row["subject"], row["question"]))
            else:
                self.done.add((row["domain"], row["name"]))

    def _check_options(self, mine: Sequence[Manifest]) -> None:
        """A resumed task must be the same task, or it would end as half of each."""
        wanted: dict[str, Any] = self._manifest.meta.get("options") or {}
        for other in mine:
            before: dict[str, Any] = other.meta.get("options") or {}
            for name in sorted(set(before) | set(wanted)):
                if before.get(name) != wanted.get(name):
                    raise TraceError(
                        f"{self.path} cannot be resumed: it was started with {name}"
                        f" {before.get(name)!r}, not {wanted.get(name)!r}. Use the same options, or"
                        " another name."
                    )

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
        return self._book.new(values, codes).number

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
        padding beyond. Positions below `skip[b]` repeat a context that was counted before. Passes on
        the cache of the first (`generate`) go on where it ended.
        """
        count = len(sequences)
        known = [self._book[number] for number in sequences]
        starts_B = np.asarray([0] * count if starts is None else starts, np.int64)
        skip_B = np.asarray([0] * count if skip is None else skip, np.int64)
        lengths_B = np.asarray([UNLIMITED] * count if lengths is None else lengths, np.int64)
        if not len(starts_B) == len(lengths_B) == len(skip_B) == count:
            raise EquipoiseError("starts, lengths and skip need one number for each sequence.")
        self._book.forget_written(self._writer.rotate())
        keep(self._writer.arena, known)
        self._listener.batch = Batch(known, starts_B, lengths_B, skip_B)
        try:
            yield
        finally:
            self._listener.batch = None

    def complete(self, sequence: int, **results: Any) -> None:
        """End a sequence, with its results if it has: answer, choice, correct, loglikelihoods."""
        unknown = sorted(set(results) - set(_RESULTS))
        if unknown:
            raise EquipoiseError(f"No result {unknown[0]!r}: allowed are {', '.join(_RESULTS)}.")
        found = self._book[sequence]
        found.values.update(results)
        found.done = True
        keep(self._writer.arena, [found])


def _layer(site: RouterSite, stack: str) -> Layer:
    return Layer(
        site.layer,
        site.path,
        site.num_experts,
        site.top_k,
        stack=stack,
        score_function=site.score_function,
        selection_bias=site.selection_bias,
        shared_experts=site.shared_experts,
    )


def _stack(site: RouterSite, sites: Sequence[RouterSite]) -> str:
    """The site's stack; where a layer has several routers, each kind is a stack of its own.

    They need not see the same rows: ERNIE 4.5 VL has one router for text and one for images.
    """
    beside = [s for s in sites if s.stack == site.stack and s.layer == site.layer]
    if len(beside) == 1:
        return site.stack
    return f"{site.stack}.*.{site.path.removeprefix(site.stack).split('.', 2)[-1]}"

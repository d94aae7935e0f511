"""`attach`: put balancing terms on a model, and the handle that drives and measures them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.balance.adversary import Adversarial, Adversaries
from equipoise.balance.arguments import (
    Term,
    check_accumulation,
    check_arguments,
    only,
    sorted_terms,
)
from equipoise.balance.biases import LayerBias
from equipoise.balance.book import Book
from equipoise.balance.capacities import Capacities
from equipoise.balance.controllers.protocol import Acts
from equipoise.balance.courses import Courses
from equipoise.balance.frameworks import OwnTerms
from equipoise.balance.layers import Layer
from equipoise.balance.lifecycle import Event, Lifecycle
from equipoise.balance.measures import Measures
from equipoise.balance.outputs import SlotOutputs
from equipoise.balance.parts import Part
from equipoise.balance.passes import KEPT, Bank, banks_of
from equipoise.balance.places import device_of, group_of, holders, router_of, selecting, sites_of
from equipoise.balance.roots import Roots
from equipoise.balance.steps import Steps
from equipoise.balance.terms import Bias
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite, valid_tokens
from equipoise.models.scan import Scan
from equipoise.nn.limiter import Capacity as Settings


def attach(
    model: nn.Module,
    *terms: Term,
    optimizer: torch.optim.Optimizer | None = None,
    group: Any = None,
    accumulation: int = 1,
    reduction: str = "mean",
    layers: Callable[[RouterSite], bool] | None = None,
    scaler: Any = None,
) -> Handle:
    """Balance a model's routers while it trains; the user's loop and loss stay as they are.

    model: any model that `models.discover` covers, alone or under DistributedDataParallel or FSDP2.
    terms: `Loss`es, whose gradient is added to the routers' in the backward pass, and at most one
        `Bias`, which a controller moves before each optimizer step, one `Capacity`, one `Lifecycle`
        and one `Adversarial`.
    optimizer: its `step()` ends a balancing step; without one call `handle.step()` before it.
    group: the process group whose ranks share a batch (data parallel). Found by itself under DDP and
        FSDP2; False for one process by itself.
    accumulation: micro-batches per optimizer step.
    reduction: what becomes of gradients of several ranks: "mean" (DDP, FSDP2) or "sum".
    layers: which sites to balance; all by default.
    scaler: a torch.amp.GradScaler, whose scale the added gradient then takes too.

    The model's own balancing loss is switched off until `handle.detach()`. Raises EquipoiseError or
    RoutingError, before anything is changed, for a model without routers, routers that a term
    cannot act on, and terms that contradict each other.
    """
    return Handle(
        model,
        terms,
        optimizer=optimizer,
        group=group,
        accumulation=accumulation,
        reduction=reduction,
        layers=layers,
        scaler=scaler,
    )


class Handle:
    """Balancing in place: counts, gradients, biases, metrics. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        *,
        optimizer: torch.optim.Optimizer | None,
        group: Any,
        accumulation: int,
        reduction: str,
        layers: Callable[[RouterSite], bool] | None,
        scaler: Any,
    ) -> None:
        check_arguments(model, optimizer, accumulation, layers)
        losses, bias = sorted_terms(terms)
        if reduction not in ("mean", "sum"):
            raise EquipoiseError(f"reduction={reduction!r} is not one of mean, sum.")
        self.model = model
        self.sites = sites_of(model, layers)
        scan = Scan(model)
        blocks = [scan.modules[site.path] for site in self.sites]
        self.device = device_of(blocks[0])
        self._undo: list[Callable[[], None]] = []
        banks = banks_of([site.num_experts for site in self.sites])
        self.book = Book(
            banks,
            losses,
            (KEPT,) if only(terms, Settings) else (),
            device=self.device,
            group=group_of(model, group),
            accumulation=accumulation,
            mean=reduction == "mean",
            paths=[site.path for site in self.sites],
            top_ks=[site.top_k for site in self.sites],
        )
        self.book.keep_passes = bias is not None and bias.scope == "micro"
        self.book.scaler = scaler
        self.book.alone = group is False
        self.layers = _layers(self.sites, banks, self.book)
        self.book.layers = self.layers
        for layer in self.layers:
            layer.check(losses, bias)
        self.parts = self._parts(terms, scan, blocks, bias)
        try:
            self._put_on(scan, blocks, bias)
            self.steps = Steps(self.book, self.layers, self.biases, bias, self.routers(scan))
        except BaseException:
            self.detach()
            raise
        self.steps.parts = self.parts
        self.measures = Measures(self)
        self.optimizer: torch.optim.Optimizer | None = None
        """Its `step()` ends balancing steps."""
        self.trained_by: torch.optim.Optimizer | None = None
        """Holds the state of the model's parameters, whoever ends the steps."""
        if optimizer is not None:
            self.drive_with(optimizer)

    def _parts(
        self, terms: Sequence[Term], scan: Scan, blocks: Sequence[nn.Module], bias: Bias | None
    ) -> list[Part]:
        """The terms that are neither losses nor biases, checked; the model is not touched."""
        found: list[Part] = []
        if (capacity := only(terms, Settings)) is not None:
            found.append(Capacities(capacity, self.layers, blocks))
        self.courses: Courses | None = None
        if (lifecycle := only(terms, Lifecycle)) is not None:
            near = [holders(scan, site) for site in self.sites]
            self.courses = Courses(lifecycle, self.sites, near, self.routers(scan), bias)
            found.append(self.courses)
        if (adversarial := only(terms, Adversarial)) is not None:
            found.append(Adversaries(adversarial, self.layers, self.book))
        return found

    def _put_on(self, scan: Scan, blocks: Sequence[nn.Module], bias: Bias | None) -> None:
        own = OwnTerms(self.model)
        self._undo.append(own.restore)
        self.biases: list[LayerBias] = []
        if bias is not None or (self.courses is not None and self.courses.term.takes_out):
            acts: Acts = "add" if bias is None else bias.controller.acts
            for site, block in zip(self.sites, blocks, strict=True):
                where = selecting(scan, site)
                placed = LayerBias(site, holders(scan, site), where, device_of(block), acts=acts)
                self._undo.append(placed.remove)
                self.biases.append(placed)
        for part in self.parts:
            self._undo.append(part.detach)
        if self.courses is not None:
            alive = weakref.ref(self)
            self.courses.begin(self.biases, lambda: getattr(alive(), "trained_by", None))
        for layer, site in zip(self.layers, self.sites, strict=True):
            if self.book.reads_outputs:
                self._undo.append(SlotOutputs(layer).remove)
            self._undo.append(site.steer(layer).remove)
        roots = Roots(self.model, self.book, own)
        self._undo.append(roots.remove)

    def routers(self, scan: Scan) -> list[nn.Module]:
        """The module that holds the weight of each router."""
        return [router_of(scan, site) for site in self.sites]

    # -- driving ------------------------------------------------------------------------------

    def step(self) -> None:
        """End a balancing step: call it before the optimizer's, where none was given to attach."""
        if not self.attached:
            raise EquipoiseError(
                "step(): the handle is detached, so nothing is balanced or counted. Leave the call "
                "out, or attach() again and step the new handle."
            )
        self.steps.end(self.measures)

    def drive_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Let `optimizer.step()` end balancing steps, as if it had been given to attach()."""
        hook = optimizer.register_step_pre_hook(_ends_step(self))
        self._undo.append(hook.remove)
        self.optimizer = self.trained_by = optimizer

    def bind(self, *, group: Any = None, scaler: Any = None) -> None:
        """Say between steps what attach() could not know yet: the process group, the GradScaler."""
        if self.book.passes:
            raise EquipoiseError(
                f"bind(): {self.book.passes} micro-batches of a step are under way. Call it before "
                "the first one."
            )
        if group is not None:
            self.book.group, self.book.ranks = group, dist.get_world_size(group)
        if scaler is not None:
            self.book.scaler = scaler

    def discard(self) -> None:
        """Forget the micro-batches seen since the last step: their optimizer step will not come."""
        self.steps.forget()

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step; may be changed between steps."""
        return self.book.accumulation

    @accumulation.setter
    def accumulation(self, value: int) -> None:
        check_accumulation(value)
        self.book.accumulation = value

    @contextmanager
    def preview(self) -> Iterator[None]:
        """Count the micro-batches of the step to come, for scope="exact": run them inside, once.

        with handle.preview(), torch.no_grad():
            for batch in micro_batches:
                model(**batch)
        """
        with self.book.preview():
            yield

    @contextmanager
    def batch(
        self, *, valid: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Iterator[None]:
        """Say of the forward passes inside which rows are tokens, and which sequence each is of.

        valid: [B, S], True or 1 on tokens; goes before the `attention_mask` that the model is given,
            which is taken where nothing is said here.
        segment_ids: [B, S] integers, distinct for the sequences packed into one micro-batch.
        """
        for name, given in (("valid", valid), ("segment_ids", segment_ids)):
            if given is not None and (not isinstance(given, Tensor) or given.ndim != 2):
                raise EquipoiseError(f"batch(): {name} has to be a tensor [batch, sequence].")
        before, self.book.segments = self.book.segments, _dense(segment_ids)
        told, self.book.told = self.book.told, {"valid": valid, "segment_ids": segment_ids}
        try:
            if valid is None:
                yield
            else:
                with valid_tokens(valid):
                    yield
        finally:
            self.book.segments, self.book.told = before, told

    def expect(self, *, tokens: int) -> None:
        """Say how many valid tokens the step under way has, on all ranks and micro-batches.

        Then every token counts the same in losses of scope "group" and wider, however unevenly
        padding spreads over micro-batches. Checked, and forgotten, at the step's end.
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise EquipoiseError(
                f"expect(tokens={tokens!r}): at least one token, as a whole number."
            )
        self.book.tokens_expected = tokens

    # -- reading ------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """What the last step measured, by stable names: see docs/balance.md."""
        return self.measures.last()

    def check(self, *args: Any, **batch: Any) -> Any:
        """Prove on this model and batch that routers get the gradient of the formula; a report.

        Raises EquipoiseError where any parameter's gradient differs. Changes nothing.
        """
        from equipoise.balance.check import check

        return check(self, args, batch)

    def counts(self) -> list[Tensor]:
        """Selections of the last step on all ranks, one [E] per layer."""
        return self.steps.counts()

    def tokens(self) -> list[int]:
        """Valid tokens of the last step on all ranks, by layer."""
        if self.steps.last is None:
            return [0] * len(self.layers)
        tables = [self.book.layout.tokens(self.steps.last, b.index) for b in self.book.banks]
        return [int(tables[layer.bank][layer.row]) for layer in self.layers]

    def bias(self) -> list[Tensor]:
        """The selection bias of each layer [E], float32."""
        return [bias.read().clone() for bias in self.biases]

    @property
    def events(self) -> list[Event]:
        """What `Lifecycle` did to experts, in order."""
        return [] if self.courses is None else self.courses.events

    # -- saving -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if never stopped."""
        from equipoise.balance.state import state_dict

        return state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; EquipoiseError, and nothing changed, where it is of other layers."""
        from equipoise.balance.state import load_state_dict

        load_state_dict(self, state)

    def detach(self) -> None:
        """Take everything off the model; a selection bias of its own keeps its value."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    @property
    def attached(self) -> bool:
        """Whether the terms still act on the model."""
        return bool(self._undo)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        seen = sorted({site.num_experts for site in self.sites})
        names = [loss.name for loss in self.book.losses]
        if self.steps.bias is not None:
            names.append(type(self.steps.bias.controller).__name__)
        names.extend(part.name for part in self.parts)
        return (
            f"Handle({len(self.sites)} MoE layers, {'/'.join(map(str, seen))} experts: "
            f"{', '.join(names)})"
        )


def _layers(sites: Sequence[RouterSite], banks: Sequence[Bank], book: Book) -> list[Layer]:
    places = {index: (bank.index, row) for bank in banks for row, index in enumerate(bank.layers)}
    return [Layer(index, site, *places[index], book) for index, site in enumerate(sites)]


def _dense(segment_ids: Tensor | None) -> Tensor | None:
    """Sequence numbers from 0 upwards, whatever numbers were given."""
    if segment_ids is None:
        return None
    order: Tensor = torch.unique(segment_ids, return_inverse=True)[1]
    return order


def _ends_step(handle: Handle) -> Callable[..., None]:
    kept = weakref.ref(handle)

    def before_step(optimizer: Any, *_: Any) -> None:
        alive = kept()
        # A GradScaler tells a fused optimizer so that its step is to change nothing.
        skipped = getattr(optimizer, "found_inf", None)
        if alive is not None and skipped is not None and bool(skipped):
            alive.discard()
        elif alive is not None:
            alive.step()

    return before_step

"""`attach`: put balancing terms on a model, and the handle that drives and measures them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.balance import frameworks
from equipoise.balance.adversary import Adversarial, Adversaries
from equipoise.balance.biases import LayerBias
from equipoise.balance.book import Book
from equipoise.balance.capacities import Capacities
from equipoise.balance.courses import Courses
from equipoise.balance.frameworks import SWITCH
from equipoise.balance.layers import Layer
from equipoise.balance.lifecycle import Event, Lifecycle
from equipoise.balance.measures import Measures
from equipoise.balance.parts import Part
from equipoise.balance.passes import KEPT, Bank, banks_of
from equipoise.balance.steps import Steps
from equipoise.balance.terms import Bias, Loss
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite, discover, valid_tokens
from equipoise.models.scan import Scan
from equipoise.models.steering import in_backward
from equipoise.nn.limiter import Capacity as Settings

Kind = TypeVar("Kind")
Term = Loss | Bias | Settings | Lifecycle | Adversarial


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
        _check_arguments(model, optimizer, accumulation, layers)
        losses, bias = _sorted_terms(terms)
        if reduction not in ("mean", "sum"):
            raise EquipoiseError(f"reduction={reduction!r} is not one of mean, sum.")
        self.model = model
        self.sites = _sites(model, layers)
        scan = Scan(model)
        blocks = [scan.modules[site.path] for site in self.sites]
        self.device = _device(blocks[0])
        self._undo: list[Callable[[], None]] = []
        banks = banks_of([site.num_experts for site in self.sites])
        self.book = Book(
            banks,
            losses,
            (KEPT,) if _only(terms, Settings) else (),
            device=self.device,
            group=_group(model, group),
            accumulation=accumulation,
            mean=reduction == "mean",
            paths=[site.path for site in self.sites],
            top_ks=[site.top_k for site in self.sites],
        )
        self.book.keep_passes = bias is not None and bias.scope == "micro"
        self.book.scaler = scaler
        self.layers = _layers(self.sites, banks, self.book)
        self.book.layers = self.layers
        for layer in self.layers:
            layer.check(losses, bias)
        self.parts = self._parts(terms, scan, blocks, bias)
        try:
            self._put_on(scan, blocks, bias)
        except BaseException:
            self.detach()
            raise
        self.steps = Steps(self.book, self.layers, self.biases, bias, self.routers(scan))
        self.steps.parts = self.parts
        self.measures = Measures(self)
        self.alone = group is False
        """attach() was told that this process shares its batch with no other."""
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
        if (capacity := _only(terms, Settings)) is not None:
            found.append(Capacities(capacity, self.layers, blocks))
        self.courses: Courses | None = None
        if (lifecycle := _only(terms, Lifecycle)) is not None:
            near = [holders(scan, site) for site in self.sites]
            self.courses = Courses(lifecycle, self.sites, near, self.routers(scan), bias)
            found.append(self.courses)
        if (adversarial := _only(terms, Adversarial)) is not None:
            found.append(Adversaries(adversarial, self.layers, self.book))
        return found

    def _put_on(self, scan: Scan, blocks: Sequence[nn.Module], bias: Bias | None) -> None:
        self._undo.append(frameworks.switch_off(self.model))
        self.biases: list[LayerBias] = []
        if bias is not None or (self.courses is not None and self.courses.term.takes_out):
            acts = "add" if bias is None else bias.controller.acts
            for site, block in zip(self.sites, blocks, strict=True):
                where = selecting(scan, site)
                placed = LayerBias(site, holders(scan, site), where, _device(block), acts=acts)
                self._undo.append(placed.remove)
                self.biases.append(placed)
        for part in self.parts:
            self._undo.append(part.detach)
        if self.courses is not None:
            alive = weakref.ref(self)
            self.courses.begin(self.biases, lambda: getattr(alive(), "trained_by", None))
        for layer, site in zip(self.layers, self.sites, strict=True):
            self._undo.append(site.steer(layer).remove)
        roots = _Roots(self.model, self.book)
        self._undo.append(roots.remove)

    def routers(self, scan: Scan) -> list[nn.Module]:
        """The module that holds the weight of each router."""
        return [router_of(scan, site) for site in self.sites]

    # -- driving ------------------------------------------------------------------------------

    def step(self) -> None:
        """End a balancing step: call it before the optimizer's, where none was given to attach."""
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
        self.book.set_aside()

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step; may be changed between steps."""
        return self.book.accumulation

    @accumulation.setter
    def accumulation(self, value: int) -> None:
        _check_accumulation(value)
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


def _check_arguments(model: Any, optimizer: Any, accumulation: Any, layers: Any) -> None:
    """EquipoiseError for what is of the wrong kind, before anything is looked at."""
    if not isinstance(model, nn.Module):
        raise EquipoiseError(f"attach: {type(model).__name__} is no model (torch.nn.Module).")
    _check_accumulation(accumulation)
    if layers is not None and not callable(layers):
        raise EquipoiseError(
            f"attach: layers={layers!r} is not callable; give a function of a site that says "
            "whether to balance it, such as layers=lambda site: site.layer > 0."
        )
    if optimizer is None:
        return
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise EquipoiseError(f"attach: optimizer={optimizer!r} is no torch.optim.Optimizer.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise EquipoiseError(
            "attach: the optimizer holds no parameter of this model, so its step() would end steps "
            "of another. Make it of model.parameters(), after wrapping the model."
        )


def _check_accumulation(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EquipoiseError(
            f"accumulation={value!r}: at least one micro-batch a step, as a whole number."
        )


def _sorted_terms(terms: Sequence[Term]) -> tuple[list[Loss], Bias | None]:
    losses = [term for term in terms if isinstance(term, Loss)]
    biases = [term for term in terms if isinstance(term, Bias)]
    for term in terms:
        if not isinstance(term, Term):
            raise EquipoiseError(
                f"attach: {term!r} is none of Loss, Bias, Capacity, Lifecycle, Adversarial; a "
                "controller goes into Bias(...)."
            )
    if len(biases) > 1:
        raise EquipoiseError(
            f"attach: {len(biases)} biases would move one selection bias. Give one, or a "
            "controller of your own that combines them."
        )
    names = [loss.name for loss in losses]
    for name in names:
        if names.count(name) > 1:
            raise EquipoiseError(
                f"attach: two losses are called {name!r}. Give each its own Loss(..., name=...)."
            )
    return losses, biases[0] if biases else None


def _only(terms: Sequence[Any], kind: type[Kind]) -> Kind | None:
    """The one term of a kind."""
    found = [term for term in terms if isinstance(term, kind)]
    if len(found) > 1:
        raise EquipoiseError(f"attach: {len(found)} terms of one kind: {found!r}. Give one.")
    return found[0] if found else None


def _sites(model: nn.Module, wanted: Callable[[RouterSite], bool] | None) -> list[RouterSite]:
    found = discover(model)
    chosen = [site for site in found if wanted is None or wanted(site)]
    # Layers that look experts up in a table have no router to balance.
    chosen = [site for site in chosen if site.score_function != "hash"]
    if not chosen:
        kind = type(model).__name__
        raise EquipoiseError(
            f"{kind}: no router to balance ({len(found)} found, none chosen). "
            + ("Its layers are dense." if not found else "layers= left none.")
        )
    return chosen


def _layers(sites: Sequence[RouterSite], banks: Sequence[Bank], book: Book) -> list[Layer]:
    places = {index: (bank.index, row) for bank in banks for row, index in enumerate(bank.layers)}
    return [Layer(index, site, *places[index], book) for index, site in enumerate(sites)]


def _device(module: nn.Module) -> torch.device:
    tensor = next(module.parameters(), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def _group(model: nn.Module, group: Any) -> Any:
    """The process group to count over, None for one process."""
    if group is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise EquipoiseError("attach: group= was given, but torch.distributed is not running.")
        return None
    if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    if group is None:
        group = sharded_over(model)
    if hasattr(group, "get_group"):  # a DeviceMesh
        group = group.get_group() if group.ndim == 1 else group._flatten().get_group()
    if group is None and dist.get_world_size() > 1:
        raise EquipoiseError(
            f"attach: {dist.get_world_size()} processes run, and the model is wrapped by neither "
            "DistributedDataParallel nor FSDP2: say which ranks share a batch with group= "
            "(torch.distributed.group.WORLD, a process group, a DeviceMesh), or group=False."
        )
    return group


def sharded_over(model: nn.Module) -> Any:
    """The device mesh of FSDP2's sharded parameters."""
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            return mesh
    return None


def router_of(scan: Scan, site: RouterSite) -> nn.Module:
    """The module that holds a site's router weight: the router, else the block."""
    path = next(p for p, module in scan.modules.items() if module is site.module)
    return scan.router_beside(path) or site.module


def holders(scan: Scan, site: RouterSite) -> list[nn.Module]:
    """Modules that may hold a site's selection bias: its router, its block, and around these."""
    path = next(p for p, module in scan.modules.items() if module is site.module)
    inside = [*scan.modules[site.path].modules(), *router_of(scan, site).modules()]
    return list(dict.fromkeys([*inside, scan.parent(path)[1]]))


def selecting(scan: Scan, site: RouterSite) -> nn.Module:
    """The module in whose forward a site selects: its router, or the block where the router only
    gives logits."""
    router = router_of(scan, site)
    return scan.modules[site.path] if site.selects_in_block else router


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


class _Roots:
    """Hooks on the model's own call: they take its attention mask and the shape of its batch."""

    def __init__(self, model: nn.Module, book: Book) -> None:
        self._book = book
        self._open: list[Any] = []
        root = getattr(model, "module", model)
        root = getattr(root, "_orig_mod", root)
        self._own_loss = bool(getattr(getattr(root, "config", None), SWITCH, False))
        self._names = tuple(inspect.signature(root.forward).parameters)
        self._handles = [
            root.register_forward_pre_hook(self._begin, with_kwargs=True),
            root.register_forward_hook(self._end, always_call=True),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_backward():
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._book.close()  # a pass before that left layers out ends here
        _check_told(self._book.told, given)
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._book.batch_rows = _rows_of(given, args)
        if self._book.segments is None:
            self._book.packed = _packed(given.get("position_ids"))
        context = valid_tokens(mask, unless_told=True)
        context.__enter__()
        self._open.append(context)
        if self._own_loss and SWITCH in self._names and given.get(SWITCH) is None:
            return args, {**kwargs, SWITCH: False}  # its own loss would count nothing
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, *_: Any) -> None:
        if self._open and not in_backward():
            self._open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _check_told(told: dict[str, Tensor | None], given: dict[str, Any]) -> None:
    """EquipoiseError where handle.batch() spoke of another shape than the model is called with."""
    ids = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        return
    for name, tensor in told.items():
        if tensor is not None and tensor.shape != ids.shape[:2]:
            raise EquipoiseError(
                f"handle.batch({name}=...) is {list(tensor.shape)}, but the model was called with "
                f"{list(ids.shape[:2])} tokens. Give one value for each token."
            )


def _rows_of(given: dict[str, Any], args: tuple[Any, ...]) -> int | None:
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.ndim >= 2:
            return int(tensor.shape[0])
    first = args[0] if args else None
    return int(first.shape[0]) if isinstance(first, Tensor) and first.ndim >= 3 else None


def _packed(position_ids: Any) -> Tensor | None:
    """Sequence numbers of packed rows, from positions that start at 0 again; None if none do."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return None
    starts = position_ids == 0
    starts[:, 0] = True
    if bool((starts.sum(1) <= 1).all()):
        return None
    order: Tensor = starts.reshape(-1).cumsum(0) - 1
    return order.view_as(position_ids)

"""`handle.check(batch)`: the gradient that balancing adds, against the formula by plain autograd.

Two backward passes on the user's model and batch. In the first the model's own loss counts nothing,
so what arrives at each parameter is what balancing adds. In the second nothing is attached: the
losses are written down from the scores and ids that the model hands out, and differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.balance.layers import Layer
from equipoise.balance.outputs import SlotBySlot
from equipoise.balance.passes import groups_of
from equipoise.balance.scopes import Exact, Global, Group, Micro, Previous
from equipoise.balance.terms import Loss, objective_of, scope_of
from equipoise.errors import EquipoiseError
from equipoise.routing import Routing

if TYPE_CHECKING:
    from equipoise.balance.attach import Handle

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest entry of the formula's gradient ..."""
EPSILONS = 4.0
"""... or so many roundings of the model's parameters, where they are coarser."""


@dataclass(frozen=True)
class Report:
    """What `check` found: gradient norms by parameter, and the largest difference of any."""

    layers: int
    routers: dict[str, float]
    """Norm of the balancing gradient of each router parameter."""
    untouched: int
    """Parameters that balancing gives no gradient, as the formula says."""
    difference: float
    """Largest difference from the formula, relative to its largest entry."""

    def __str__(self) -> str:
        least = min(self.routers.values(), default=0.0)
        return (
            f"{self.layers} of {self.layers} routers get the formula's gradient (largest "
            f"difference {self.difference:.1e}, smallest norm {least:.1e}); {self.untouched} "
            "parameters get none, as it says."
        )


def check(handle: Handle, args: tuple[Any, ...], batch: dict[str, Any]) -> Report:
    """See `Handle.check`; on every rank at once where several share a batch."""
    if not handle.book.losses:
        raise EquipoiseError("check(): no Loss is attached, so there is no gradient to check.")
    if not handle.attached:
        raise EquipoiseError("check(): the handle is detached; attach() again to check.")
    if all(objective_of(loss).kind == "weight" for loss in handle.book.losses):
        raise EquipoiseError(
            "check() is about the backward pass; a loss on the router's weight adds its gradient "
            "at the step's end."
        )
    if not args and not batch:
        raise EquipoiseError("check() needs a batch of the model: handle.check(**batch).")
    for loss in handle.book.losses:
        scope = scope_of(loss)
        allowed = isinstance(scope, Micro | Group | Global | Exact | Previous)
        if objective_of(loss).kind != "token" and not allowed:
            raise EquipoiseError(
                f"check(): scope {scope.name!r} of {loss.name} depends on more than one "
                "batch; check the loss with scope='global'."
            )
    if all(_asks_nothing_yet(handle, loss) for loss in handle.book.losses):
        raise EquipoiseError(
            "check(): scope 'previous' asks for nothing in the first step; check after it."
        )
    with _undisturbed(handle):
        # What draws at random, routers and dropout, has to draw the same twice.
        with torch.random.fork_rng(devices=_devices(handle)):
            ours = _added(handle, args, batch)
        formula = _formula(handle, args, batch)
    return _compare(handle, ours, formula)


def _asks_nothing_yet(handle: Handle, loss: Loss) -> bool:
    """The load of the step before is taken as uniform in the first step: no gradient."""
    objective = objective_of(loss)
    linear = objective.kind == "load" and not objective.needs_prob
    return linear and isinstance(scope_of(loss), Previous) and handle.book.step == 0


def _compare(handle: Handle, ours: dict[str, Tensor], formula: dict[str, Tensor]) -> Report:
    largest = max((float(g.abs().max()) for g in formula.values() if g.numel()), default=0.0)
    if largest == 0:
        raise EquipoiseError(
            "check(): the formula gives no gradient at all: every weight is 0, or no router trains."
        )
    worst, untouched = 0.0, 0
    for name, wanted in formula.items():
        found = ours[name]
        difference = float((found - wanted).abs().max()) / largest if found.numel() else 0.0
        worst = max(worst, difference)
        untouched += int(not bool(wanted.any()) and not bool(found.any()))
        coarse = torch.finfo(_parameters(handle)[name].dtype).eps
        if not difference <= max(TOLERANCE, EPSILONS * coarse):
            raise EquipoiseError(
                f"check(): {name} gets a balancing gradient of norm {float(found.norm()):.3e}, the "
                f"formula says {float(wanted.norm()):.3e} (largest difference {difference:.1e} of "
                "the formula's largest entry). Is the gradient detached or scaled on its way?"
            )
    routers = {
        name: float(ours[name].norm())
        for name in formula
        for router in handle.steps.routers
        for parameter in router.parameters()
        if parameter is _parameters(handle)[name]
    }
    return Report(len(handle.layers), routers, untouched, worst)


def _parameters(handle: Handle) -> dict[str, nn.Parameter]:
    return {n: p for n, p in handle.model.named_parameters() if p.requires_grad}


def _gradients(handle: Handle) -> dict[str, Tensor]:
    found = {}
    for name, parameter in _parameters(handle).items():
        grad: Any = parameter.grad
        if hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        shape = parameter.shape
        found[name] = torch.zeros(shape) if grad is None else grad.detach().float().cpu().clone()
        parameter.grad = None
    return found


def _added(handle: Handle, args: tuple[Any, ...], batch: dict[str, Any]) -> dict[str, Tensor]:
    for layer in handle.layers:
        layer.muted = False
    (_main(handle.model(*args, **batch)) * 0.0).backward()  # type: ignore[no-untyped-call]
    return _gradients(handle)


def _formula(handle: Handle, args: tuple[Any, ...], batch: dict[str, Any]) -> dict[str, Tensor]:
    slots = {site.path: SlotBySlot(site) for site in handle.sites if handle.book.reads_outputs}
    try:
        total, heard = _heard(handle, args, batch)
        for layer in handle.layers:
            path = layer.site.path
            outputs = slots[path].outputs_TKD if path in slots else None
            total = total + _loss_of(handle, layer, heard[path], outputs)
        total.backward()  # type: ignore[no-untyped-call]
    finally:
        for slot in slots.values():  # not before: checkpointing runs the forward pass again
            slot.remove()
    return _gradients(handle)


def _heard(
    handle: Handle, args: tuple[Any, ...], batch: dict[str, Any]
) -> tuple[Tensor, dict[str, Routing]]:
    """A pass that balancing has no part in: the model's output times 0, and the Routing by path."""
    heard: dict[str, Routing] = {}
    listening = [
        site.observe(lambda routing: heard.__setitem__(routing.path, routing))
        for site in handle.sites
    ]
    for layer in handle.layers:
        layer.muted = True
    try:
        return _main(handle.model(*args, **batch)) * 0.0, heard
    finally:
        for layer in handle.layers:
            layer.muted = False
        for handle_ in listening:
            handle_.remove()


def _loss_of(handle: Handle, layer: Layer, routing: Routing, outputs_TKD: Tensor | None) -> Tensor:
    """The weighted losses of one layer, as one writes them down."""
    book, site = handle.book, layer.site
    scores, valid = routing.scores_TE, routing.valid_T
    assert scores is not None
    scores = scores.float()
    keep = torch.ones(len(scores), device=scores.device) if valid is None else valid.float()
    probs = layer.scores.probs(scores)[:, : site.num_experts]
    ranks = book.ranks if book.mean else 1
    total = scores.new_zeros(())
    for term in range(len(book.losses)):
        objective: Any = book.objectives[term, layer.bank]
        wide = book.scopes[term].synced
        tokens = keep.sum()
        if wide:
            tokens = _summed(book, tokens) / ranks
        elif not book.mean:
            tokens = tokens * book.ranks
        prob = (keep @ probs) / tokens.clamp(min=1e-9)
        if objective.kind == "load":
            counts = _counts(book, layer, routing, term)
            if isinstance(book.scopes[term], Previous):
                last = book.states[term, layer.bank].get("last")
                counts = torch.ones_like(counts) if last is None else last[layer.row]
            elif wide:
                counts = _summed(book, counts)
            load = (counts / counts.sum().clamp(min=1)).float()
            value = objective.value(load_E=load, prob_E=prob)
        elif objective.kind == "token":
            sources = {"logits": scores, "probs": probs, "outputs": outputs_TKD}
            value_T = objective.value(**{objective.argument: sources[objective.reads]})
            value = torch.where(keep > 0, value_T, 0.0).sum() / tokens.clamp(min=1e-9)
        elif objective.kind == "batch":
            value = objective.value(probs_TE=probs, valid_T=valid)
        else:
            continue
        weight = book.weight(term, layer.index, book.step)
        total = total + value * weight / book.num_layers / book.accumulation
    return total


def _counts(book: Any, layer: Layer, routing: Routing, term: int) -> Tensor:
    """Counts by bincount, not by the way that is checked."""
    statistic = book.statistic(term, layer.bank)
    ids, width = _ids(layer, routing, statistic), layer.site.num_experts
    if statistic[0] == "unbiased":
        assert routing.scores_TE is not None
        ids = routing.scores_TE[:, :width].topk(layer.site.top_k, dim=-1).indices
    elif statistic[0] == "sent":
        ids, width = groups_of(ids, statistic[1]), max(statistic[1]) + 1
    inside = ids >= 0
    if routing.valid_T is not None:
        inside = inside & routing.valid_T.unsqueeze(1)
    return torch.bincount(ids[inside], minlength=width).double()


def _ids(layer: Layer, routing: Routing, statistic: Any) -> Tensor:
    """Ids before a capacity, or after it, where observers hear what the experts are handed."""
    choice = None if layer.capacity is None else layer.capacity.last
    if layer.capacity is None or choice is None:
        return routing.expert_ids_TK.long()
    before = layer.site.routing(choice.ids, routing.weights_TK, routing.scores_TE)
    if statistic[0] == "kept":
        return layer.capacity.ids_kept(before, choice.kept)
    return before.expert_ids_TK.long()


def _summed(book: Any, tensor: Tensor) -> Tensor:
    if book.group is not None and book.ranks > 1:
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor, group=book.group)
    return tensor


def _main(output: Any) -> Tensor:
    """Anything differentiable that the model gives: it is multiplied by 0."""
    if isinstance(output, Tensor):
        return output.float().sum()
    values = output.values() if hasattr(output, "values") else output
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad:
            return value.float().sum()
    raise EquipoiseError("check(): the model's output has no tensor with a gradient.")


def _devices(handle: Handle) -> list[torch.device]:
    """The accelerators whose random numbers the model uses."""
    held = {p.device for p in handle.model.parameters()}
    return [device for device in held if device.type == "cuda"]


@contextmanager
def _undisturbed(handle: Handle) -> Iterator[None]:
    """Gradients, random state, training mode and the book as they were before."""
    parameters = [p for p in handle.model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    modes = {module: module.training for module in handle.model.modules()}
    accumulation, handle.book.accumulation = handle.book.accumulation, 1
    book = handle.book.set_aside()
    adversaries = [layer.adversary for layer in handle.layers]
    for layer in handle.layers:
        layer.adversary = None  # its gradient is no formula of the scores alone
    observers = [layer.observe for layer in handle.layers]
    for layer in handle.layers:
        layer.observe = None  # a controller that gathers scores would take these for training
    try:
        with torch.random.fork_rng(devices=_devices(handle)):
            handle.model.train()
            for module in handle.model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
            yield
    finally:
        handle.book.take_up(book)
        for layer, adversary, observer in zip(handle.layers, adversaries, observers, strict=True):
            layer.adversary, layer.observe = adversary, observer
        handle.book.accumulation = accumulation
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

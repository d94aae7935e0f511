"""The end of an optimizer step: biases, loss weights and router weights get their due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.balance.biases import LayerBias
from equipoise.balance.book import Book
from equipoise.balance.layers import Layer
from equipoise.balance.parts import Part
from equipoise.balance.passes import SELECTED, Bank
from equipoise.balance.terms import Bias
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.balance.measures import Measures


class Steps:
    """Ends balancing steps; holds what controllers remember."""

    def __init__(
        self,
        book: Book,
        layers: Sequence[Layer],
        biases: Sequence[LayerBias],
        bias: Bias | None,
        routers: Sequence[nn.Module],
    ) -> None:
        self.book, self.layers, self.biases, self.bias = book, layers, biases, bias
        self.routers = routers
        self.parts: list[Part] = []
        self.last: Tensor | None = None
        """Counts of the last step on all ranks, flat."""
        self.states: list[dict[str, Tensor]] = []
        if bias is not None:
            for bank in book.banks:
                state = bias.controller.initial(
                    num_layers=len(bank.layers), num_experts=bank.num_experts, device=book.device
                )
                self.states.append(state)
            if hasattr(bias.controller, "observe"):
                for layer in layers:
                    layer.observe = self.observe
        self.weight_states: list[dict[str, Tensor]] = [{} for _ in book.losses]
        for term, loss in enumerate(book.losses):
            if loss.controller is not None:
                book.weights[term] = torch.full(
                    (book.num_layers,), loss.weight_at(0) * book.factors[term], device=book.device
                )

    def observe(self, layer: Layer, scores_TE: Tensor, valid_T: Tensor | None) -> None:
        """Show a counted pass to a controller that looks at scores."""
        assert self.bias is not None
        width = layer.site.num_experts
        self.bias.controller.observe(
            layer=layer.row,
            scores_TE=layer.scores.compared(scores_TE.detach())[:, :width],
            bias_E=self.biases[layer.index].read(),
            top_k=layer.site.top_k,
            valid_T=valid_T,
            state=self.states[layer.bank],
        )

    def end(self, measures: Measures) -> None:
        """End the step; nothing happens where no token was seen since the last one."""
        book = self.book
        book.close()
        if book.passes == 0:
            return
        if book.losses and not book.whole():
            raise EquipoiseError(
                f"{book.passes} micro-batches were seen in this optimizer step, but accumulation="
                f"{book.accumulation}: the losses would be weighted wrongly. Give attach() the "
                "number of micro-batches per step, or set handle.accumulation before the step; "
                "handle.discard() forgets those of a step that was skipped."
            )
        flat = book.counted()
        self._refuse_other_tokens(flat)
        book.value_passes()
        self._refuse_nonsense()
        passes, step = book.kept, book.step
        self._on_router_weights(step)
        book.end_step(flat)
        measures.take(flat)
        self.last = flat
        for part in self.parts:
            part.before()
        if self.bias is not None:
            for bank in book.banks:
                self._move_bias(bank, flat, passes, step)
        for term, loss in enumerate(book.losses):
            if loss.controller is not None:
                self._steer_weight(term, loss.controller, measures, step)
        counts = self.counts() if self.parts else []
        for part in self.parts:
            part.after(counts, step)

    def _refuse_other_tokens(self, flat: Tensor) -> None:
        """EquipoiseError where handle.expect() spoke of another number of tokens."""
        book = self.book
        if book.tokens_expected is None:
            return
        seen = max(int(book.layout.tokens(flat, bank.index).max()) for bank in book.banks)
        expected = book.tokens_expected
        if seen != expected:
            self.forget()
            raise EquipoiseError(
                f"expect(tokens={expected}): {seen} valid tokens were seen in the step, so its "
                "losses were weighted wrongly. Count those that are not padding, on all ranks and "
                "micro-batches. The step is forgotten."
            )

    def _refuse_nonsense(self) -> None:
        """EquipoiseError naming the layer whose scores were not finite, before anything moves.

        On every rank, whichever it was, so that none waits for another; the step is forgotten.
        """
        if self.book.scaler is not None:
            return  # steps with gradients that are not finite are the scaler's business
        found = self.book.meters.nonsense()
        if self.book.group is not None and self.book.ranks > 1:
            dist.all_reduce(found, group=self.book.group)
        bad = found.isnan().nonzero()[:, 0].tolist()
        if bad:
            self.forget()
            raise EquipoiseError(
                f"{self.layers[bad[0]].site.path}: router scores were NaN or infinite in this "
                f"step, in {len(bad)} of {len(self.layers)} layers. Biases and weights were left "
                "as they were; look for a learning rate that is too high, or overflow in half "
                "precision."
            )

    def forget(self) -> None:
        """Drop the step under way, and what controllers and other terms saw of it."""
        self.book.drop_step()
        for part in self.parts:
            part.forget()
        for state in self.states:
            assert self.bias is not None
            for name in self.bias.controller.reduce:  # empty when a step begins
                state[name].zero_()

    def counts(self) -> list[Tensor]:
        """Selections of the last step, one [E] per layer."""
        if self.last is None:
            return [torch.zeros(layer.site.num_experts) for layer in self.layers]
        tables = [self.book.layout.counts(self.last, SELECTED, b.index) for b in self.book.banks]
        return [tables[layer.bank][layer.row].clone() for layer in self.layers]

    # -- biases -------------------------------------------------------------------------------

    def _move_bias(self, bank: Bank, flat: Tensor, passes: list[Tensor], step: int) -> None:
        assert self.bias is not None
        controller, state = self.bias.controller, self.states[bank.index]
        self._reduce(controller, state)
        before = torch.stack([self.biases[i].read().to(self.book.device) for i in bank.layers])
        if self.bias.scope == "micro":
            after = self._mean_of_updates(bank, before, passes, step)
        else:
            counts = self.book.layout.counts(flat, SELECTED, bank.index)
            after = controller.update(bias_LE=before, counts_LE=counts, step=step, state=state)
        if not bool(torch.isfinite(after).all()):
            row = int((~torch.isfinite(after)).any(1).nonzero()[0])
            raise EquipoiseError(
                f"{self.layers[bank.layers[row]].site.path}: the new selection bias is not finite. "
                f"It stays as it was; look at the rate of {type(controller).__name__}."
            )
        for row, index in enumerate(bank.layers):
            self.biases[index].write(after[row])

    def _mean_of_updates(
        self, bank: Bank, before: Tensor, passes: list[Tensor], step: int
    ) -> Tensor:
        """Each rank's micro-batches move the bias by themselves; the mean of where it goes."""
        assert self.bias is not None
        total = torch.zeros_like(before)
        for flat in passes:
            counts = self.book.layout.counts(flat, SELECTED, bank.index)
            total += self.bias.controller.update(
                bias_LE=before, counts_LE=counts, step=step, state=self.states[bank.index]
            )
        total /= max(len(passes), 1)
        if self.book.group is not None and self.book.ranks > 1:
            dist.all_reduce(total, group=self.book.group)
            total /= self.book.ranks
        return total

    def _reduce(self, controller: Any, state: dict[str, Tensor]) -> None:
        if self.book.group is None or self.book.ranks == 1:
            return
        for name in getattr(controller, "reduce", ()):
            if name in state:
                dist.all_reduce(state[name], group=self.book.group)

    # -- weights ------------------------------------------------------------------------------

    def _steer_weight(self, term: int, controller: Any, measures: Measures, step: int) -> None:
        measure_L = measures.steering(controller.measure).to(self.book.device)
        state = self.weight_states[term]
        self.book.weights[term] = controller.update(
            weight_L=self.book.weights[term], measure_L=measure_L, step=step, state=state
        )

    def _on_router_weights(self, step: int) -> None:
        """Objectives of the router's weight alone: the same on every rank, added to the gradient."""
        for term in range(len(self.book.losses)):
            for layer, router in zip(self.layers, self.routers, strict=True):
                objective = self.book.objectives[term, layer.bank]
                if objective.kind != "weight":
                    continue
                parameter = weight_of(router, layer.site.num_experts + layer.site.null_experts)
                weight = self.book.weight(term, layer.index, step) / self.book.num_layers
                value, grad = _value_and_grad(objective.value, parameter)
                self.book.meters.value(term, layer.index, value)
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(grad * weight)


def weight_of(router: nn.Module, width: int) -> nn.Parameter:
    """The router's weight [E, D]; EquipoiseError where there is no such parameter."""
    for parameter in router.parameters():
        if parameter.ndim == 2 and parameter.shape[0] == width and parameter.requires_grad:
            return parameter
    raise EquipoiseError(
        f"{type(router).__name__} holds no trainable weight [{width}, D] for a weight objective."
    )


def _value_and_grad(value: Any, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    whole: Any = parameter
    sharded = hasattr(whole, "full_tensor")
    with torch.enable_grad():
        weight = (whole.full_tensor() if sharded else whole).detach().float().requires_grad_()
        found = value(weight_ED=weight)
        (grad,) = torch.autograd.grad(found, weight)
    if sharded:
        from torch.distributed.tensor import distribute_tensor

        grad = distribute_tensor(grad, whole.device_mesh, whole.placements)
    return found.detach(), grad.to(parameter.dtype)

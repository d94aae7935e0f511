"""The losses of a handle: their objectives, scopes and weights, and the counts that they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from equipoise.balance.catalogue import fitted
from equipoise.balance.passes import PROB, Bank, Statistic
from equipoise.balance.scopes import Sequence as SequenceScope
from equipoise.balance.scopes import Subset
from equipoise.balance.terms import Loss, objective_of, scope_of
from equipoise.errors import EquipoiseError


class Losses:
    """What a book knows of its losses whatever the step; only `weights` change."""

    def __init__(
        self,
        banks: Sequence[Bank],
        losses: Sequence[Loss],
        *,
        group: Any,
        paths: Sequence[str],
        top_ks: Sequence[int],
    ) -> None:
        self.banks, self.losses, self.group = tuple(banks), tuple(losses), group
        self.scopes = [scope_of(loss) for loss in losses]
        self.ranks = dist.get_world_size(group) if group is not None else 1
        self.num_layers = sum(len(bank.layers) for bank in banks)
        self.objectives = {
            (t, bank.index): fitted(objective_of(loss), bank.num_experts, paths[bank.layers[0]])
            for t, loss in enumerate(losses)
            for bank in banks
        }
        self.factors = [self._factor(loss, paths, top_ks) for loss in losses]
        self.weights: dict[int, Tensor] = {}
        """Weights per layer [L] of the losses that a controller steers."""
        self.synced = any(scope.synced for scope in self.scopes)
        self.reads_outputs = any(objective_of(loss).reads == "outputs" for loss in losses)

    def statistic(self, term: int, bank: int) -> Statistic:
        """The counts that make the load of a loss."""
        scope, objective = self.scopes[term], self.objectives[term, bank]
        sent = objective.name == "communication"
        if isinstance(scope, Subset):
            return ("subset", scope.seed, *([objective.groups] if sent else []))
        if sent:
            return ("sent", objective.groups)
        return (self.losses[term].count,)

    def _statistics(self) -> Iterator[Statistic]:
        for term, bank in self.objectives:
            objective, scope = self.objectives[term, bank], self.scopes[term]
            if objective.kind == "load" and not isinstance(scope, SequenceScope):
                yield self.statistic(term, bank)
                if objective.needs_prob:
                    yield PROB

    def in_batch(self, term: int, bank: int) -> bool:
        """Whether a loss compares load and mean probability of a batch, not of sequences."""
        is_load = self.objectives[term, bank].kind == "load"
        return is_load and not isinstance(self.scopes[term], SequenceScope)

    def weight(self, term: int, layer: int, step: int) -> Tensor | float:
        """The weight of a loss at one layer in one step."""
        if term in self.weights:
            return self.weights[term][layer]
        return self.losses[term].weight_at(step) * self.factors[term]

    def _factor(self, loss: Loss, paths: Sequence[str], top_ks: Sequence[int]) -> float:
        """From the convention of a loss to ours; one model has one, so its layers must be alike."""
        if loss.convention == "equipoise":
            return 1.0
        shapes = {(bank.num_experts, top_ks[i]) for bank in self.banks for i in bank.layers}
        if len(shapes) > 1:
            raise EquipoiseError(
                f"Loss({loss.name!r}): convention={loss.convention!r} has no single factor for "
                f"layers of (experts, top-k) {sorted(shapes)}; {paths[0]} and others differ. Use "
                "conventions.convert and layers=, one attach for each kind."
            )
        (experts, top_k) = shapes.pop()
        return loss.factor(
            top_k=top_k, num_layers=self.num_layers, num_experts=experts, ranks=self.ranks
        )

"""One attached router: it counts each pass and answers the backward pass with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equipoise.balance.gradients import Gradients
from equipoise.balance.outputs import refuse_without_outputs
from equipoise.balance.passes import KEPT, PROB, TOKENS, Record, Statistic, columns, groups_of
from equipoise.balance.probabilities import NO_LOSS, Scores
from equipoise.balance.terms import Bias, Loss, objective_of
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite, steering
from equipoise.models.steering import in_backward, in_reentrant_checkpoint
from equipoise.routing import Routing

if TYPE_CHECKING:
    from equipoise.balance.adversary import Adversaries
    from equipoise.balance.book import Book
    from equipoise.balance.limits import LayerCapacity


PROBED_ROWS = 128
"""Rows of each micro-batch that margin and overruled share are taken over."""
MEASURED_EVERY = 10
"""Steps between measurements of margin, overruled share and share of the gradient."""


class Layer:
    """A router site under balance; implements `models.steering.Steerer`."""

    def __init__(self, index: int, site: RouterSite, bank: int, row: int, book: Book) -> None:
        self.index, self.site, self.bank, self.row = index, site, bank, row
        self.scores = Scores(site)
        self._book, self._gradients = book, Gradients(book)
        self._waiting: list[Record] = []
        """Records whose forward pass will be run again before their backward pass."""
        self.record: Record | None = None
        """Of the pass heard last, for what comes after the router in it."""
        self._added: Tensor | None = None
        """The gradient given last, until the whole gradient of the scores arrives."""
        self.capacity: LayerCapacity | None = None
        """Limits what the experts are handed."""
        self.adversary: Adversaries | None = None
        """A term that adds a gradient of its own."""
        self.muted = False
        """Neither count nor add gradients."""
        self.observe: Callable[[Layer, Tensor, Tensor | None], None] | None = None
        """A bias controller that looks at scores."""

    def forget(self) -> None:
        """Drop the records of passes that had no backward pass."""
        for record in self._waiting:
            steering.forget(record)
        self._waiting.clear()
        self.record = None
        if self.capacity is not None:
            self.capacity.forget()

    # -- Steerer ------------------------------------------------------------------------------

    @property
    def limits(self) -> bool:
        """Whether a capacity acts here."""
        return self.capacity is not None

    def limit(self, ids: Tensor, weights: Tensor, scores: Tensor | None) -> Tensor:
        """Ids under the capacity, NO_EXPERT where a slot is dropped."""
        assert self.capacity is not None
        return self.capacity.limit(ids, weights, scores)

    def transform(
        self, ids: Tensor, weights: Tensor, scores: Tensor | None, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the experts are given under the capacity."""
        assert self.capacity is not None
        return self.capacity.transform(ids, weights, scores, kept)

    def begin(
        self,
        ids: Tensor,
        weights: Tensor,
        scores: Tensor | None,
        *,
        grad: bool,
        compiled: bool = False,
        kept: Tensor | None = None,
    ) -> Record | None:
        """Count a pass; one that is run again, or that does not train, counts nothing."""
        self.record = self._begin(ids, weights, scores, grad, compiled, kept)
        return self.record

    def _begin(
        self,
        ids: Tensor,
        weights: Tensor,
        scores: Tensor | None,
        grad: bool,
        compiled: bool,
        kept: Tensor | None,
    ) -> Record | None:
        book = self._book
        if self.muted:
            return None
        if in_backward():
            record = self._again(ids)
            if record is not None:
                self._watch(scores)
            return record
        if not self.site.module.training and not book.previewing:
            return None
        again = not grad and not book.previewing
        if again and not in_reentrant_checkpoint():
            return None
        routing = self.site.routing(ids, weights, scores)
        record = self._count(routing, kept)
        if book.previewing:
            return None
        if again or compiled:
            self._waiting.append(record)
        else:
            self._watch(scores)
        lives = again or compiled or (scores is not None and scores.requires_grad)
        if self.capacity is not None and lives:
            self.capacity.tie(record)
        return record

    def _watch(self, scores: Tensor | None) -> None:
        """Measure the whole gradient that arrives at the scores, to set balancing's beside it."""
        measured = self._book.losses and self._book.step % MEASURED_EVERY == 0
        if measured and scores is not None and scores.requires_grad:
            scores.register_hook(self._arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, grad: Tensor) -> None:
        if self._added is not None:
            self._book.meters.gradients(self.index, self._added, grad)
            self._added = None

    def gradient(self, record: Record | None, scores: Tensor) -> Tensor | None:
        """What the losses add to the gradient of the scores."""
        if record is None:
            return None
        if record in self._waiting:
            self._waiting.remove(record)
        rows = scores if scores.ndim == 2 else scores.reshape(-1, scores.shape[-1])
        found = self._gradients.of(self, record, rows)
        found = found if found is None else found.view_as(scores)
        if self._book.step % MEASURED_EVERY == 0:
            self._added = found
        return found

    def output_gradient(self, record: Record | None, outputs_TKD: Tensor) -> Tensor | None:
        """What the losses give the outputs of the selected experts [T, K, D] as a gradient."""
        return None if record is None else self._gradients.of_outputs(self, record, outputs_TKD)

    def check(self, losses: Sequence[Loss], bias: Bias | None) -> None:
        """EquipoiseError where a term cannot act on this router."""
        if losses and self.scores.function in ("none", "unknown"):
            raise EquipoiseError(
                f"{self.site.path} ({self.site.family}): its score function is "
                f"{self.site.score_function!r}, which no loss here knows"
                f"{NO_LOSS.get(self.site.score_function, '')}. Leave it out with layers=."
            )
        if losses and self.site.family == "doge":
            raise EquipoiseError(
                f"{self.site.path} (doge): product keys give no scores per expert for a loss."
            )
        for loss in losses:
            objective = objective_of(loss)
            if objective.reads == "outputs":
                refuse_without_outputs(self.site, objective.name)
            if objective.reads == "logits" and self.site.scores_are != "logits":
                raise EquipoiseError(
                    f"{self.site.path} ({self.site.family}): the router returns {self.site.scores_are}; "
                    f"Loss({objective.name!r}) needs its logits."
                )

    # -- counting -----------------------------------------------------------------------------

    def _again(self, ids: Tensor) -> Record | None:
        """The record of a pass that is run again: of those in flight the one that selected alike."""
        if not self._waiting:
            return None
        if len(self._waiting) == 1:
            return self._waiting[0]
        alike = [
            int((r.ids_TK == ids).sum()) if r.ids_TK.shape == ids.shape else -1
            for r in self._waiting
        ]
        return self._waiting[alike.index(max(alike))]

    def _count(self, routing: Routing, kept: Tensor | None = None) -> Record:
        current = self._book.pass_for(self)
        ids, valid = routing.expert_ids_TK.detach().long(), routing.valid_T
        record = Record(current, ids, valid)
        if self.capacity is not None and kept is not None:
            record.kept_TK = self.capacity.ids_kept(routing, kept)
        rows = len(ids) if valid is None else valid.sum()
        current.layout.row(current.flat, TOKENS, self)[1] = rows
        for statistic in current.layout.statistics:
            self._add(record, statistic, routing)
        if self.observe is not None and not self._book.previewing:
            scores = self.scores.required(routing.scores_TE, "this controller")
            self.observe(self, scores, valid)
        meters = self._book.meters
        if routing.scores_TE is not None and not self._book.previewing:
            scores = routing.scores_TE.detach()
            if self._book.step % MEASURED_EVERY == 0:
                few = slice(0, PROBED_ROWS)
                meters.probes[self.index] = (scores[few].clone(), ids[few].clone())
            # One sum tells at the step's end whether any score was not finite.
            meters.sums[self.index] += scores.sum(dtype=torch.float32).to(meters.sums.device)
        self._book.heard(self, record, routing)
        return record

    def _add(self, record: Record, statistic: Statistic, routing: Routing) -> None:
        current, valid = record.of, record.valid_T
        match statistic:
            case ("selected",) | ("kept",):
                left = record.kept_TK if statistic == KEPT else None
                ids = record.ids_TK if left is None else left
                current.count(self, statistic, columns(ids, valid))
            case ("unbiased",):
                scores = self.scores.required(routing.scores_TE, "count='unbiased'")
                ids = torch.topk(
                    scores.detach()[:, : self.site.num_experts], self.site.top_k, dim=-1
                ).indices
                current.count(self, statistic, columns(ids, valid))
            case ("subset", seed, *groups):
                if seed not in record.drawn:
                    record.drawn[seed] = self._book.subset(len(record.ids_TK), valid, seed)
                ids = record.ids_TK[record.drawn[seed]]
                ids = groups_of(ids, groups[0]) if groups else ids
                current.count(self, statistic, columns(ids, None))
            case ("sent", groups):
                sent = groups_of(record.ids_TK, groups)
                current.count(self, statistic, columns(sent, valid))
            case ("prob",):
                probs = self.scores.probs(routing.scores_TE.detach())  # type: ignore[union-attr]
                if valid is not None:
                    probs = probs * valid.unsqueeze(1)
                row = current.layout.row(current.flat, PROB, self)
                row[1:] = probs.sum(0, dtype=torch.float64)[: len(row) - 1]

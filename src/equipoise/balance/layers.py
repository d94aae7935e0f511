"""One attached router: it counts each pass and answers the backward pass with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equipoise.balance.gradients import Gradients
from equipoise.balance.passes import PROB, TOKENS, Record, Statistic, groups_of, masked
from equipoise.balance.probabilities import Scores
from equipoise.balance.terms import Bias, Loss, objective_of
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite
from equipoise.models.steering import in_backward, in_reentrant_checkpoint
from equipoise.routing import Routing

if TYPE_CHECKING:
    from equipoise.balance.book import Book


PROBED_ROWS = 256
"""Rows of each micro-batch that margin and overruled share are taken over."""


class Layer:
    """A router site under balance; implements `models.steering.Steerer`."""

    def __init__(self, index: int, site: RouterSite, bank: int, row: int, book: Book) -> None:
        self.index, self.site, self.bank, self.row = index, site, bank, row
        self.scores = Scores(site)
        self._book, self._gradients = book, Gradients(book)
        self._waiting: list[Record] = []
        """Records whose forward pass will be run again before their backward pass."""
        self._added: Tensor | None = None
        """The gradient given last, until the whole gradient of the scores arrives."""
        self.muted = False
        """Neither count nor act."""
        self.observe: Callable[[Layer, Tensor, Tensor | None], None] | None = None
        """A bias controller that looks at scores."""

    def forget(self) -> None:
        """Drop the records of passes that had no backward pass."""
        self._waiting.clear()

    # -- Steerer ------------------------------------------------------------------------------

    def transform(
        self, ids: Tensor, weights: Tensor, scores: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Nothing is changed here."""
        return ids, weights

    def begin(
        self,
        ids: Tensor,
        weights: Tensor,
        scores: Tensor | None,
        *,
        grad: bool,
        compiled: bool = False,
    ) -> Record | None:
        """Count a pass; one that is run again, or that does not train, counts nothing."""
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
        record = self._count(routing)
        if book.previewing:
            return None
        if again or compiled:
            self._waiting.append(record)
        else:
            self._watch(scores)
        return record

    def _watch(self, scores: Tensor | None) -> None:
        """Measure the whole gradient that arrives at the scores, to set balancing's beside it."""
        if scores is not None and scores.requires_grad and self._book.losses:
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
        self._added = found if found is None else found.view_as(scores)
        return self._added

    def check(self, losses: Sequence[Loss], bias: Bias | None) -> None:
        """EquipoiseError where a term cannot act on this router."""
        if losses and self.scores.function in ("none", "unknown"):
            raise EquipoiseError(
                f"{self.site.path} ({self.site.family}): its score function is "
                f"{self.site.score_function!r}, which no loss here knows. Leave it out with layers=."
            )
        if losses and self.site.family == "doge":
            raise EquipoiseError(
                f"{self.site.path} (doge): product keys give no scores per expert for a loss."
            )
        for loss in losses:
            objective = objective_of(loss)
            if objective.reads == "logits" and self.scores.function == "probabilities":
                raise EquipoiseError(
                    f"{self.site.path} ({self.site.family}): the router returns probabilities; "
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

    def _count(self, routing: Routing) -> Record:
        current = self._book.pass_for(self)
        ids, valid = routing.expert_ids_TK.detach().long(), routing.valid_T
        record = Record(current, ids, valid)
        rows = len(ids) if valid is None else valid.sum()
        current.layout.table(current.flat, TOKENS, self.bank)[self.row, 0] = rows
        for statistic in current.layout.statistics:
            self._add(record, statistic, routing)
        if self.observe is not None and not self._book.previewing:
            scores = self.scores.required(routing.scores_TE, "this controller")
            self.observe(self, scores, valid)
        if routing.scores_TE is not None:
            # One sum tells whether any score is not finite; it is looked at when the step ends.
            total = routing.scores_TE.detach().sum(dtype=torch.float32)
            self._book.meters.score_sums[self.index] += total.to(self._book.device)
            self._book.meters.probes[self.index] = self._probe(routing)
        self._book.heard(self, record, routing)
        return record

    def _probe(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Over a few rows: k-th minus (k+1)-th score, and selections that bias or groups overruled."""
        assert routing.scores_TE is not None
        few, k = slice(0, PROBED_ROWS), self.site.top_k
        scores, ids = routing.scores_TE.detach()[few], routing.expert_ids_TK[few]
        best = scores.float().topk(min(k + 1, scores.shape[1]), dim=-1)
        margin = (best.values[:, k - 1] - best.values[:, -1]).mean()
        kept = (ids.unsqueeze(2) == best.indices[:, :k].unsqueeze(1)).any(2)
        routed = ids >= 0
        overruled = (routed & ~kept).sum() / routed.sum().clamp(min=1)
        return margin, overruled

    def _add(self, record: Record, statistic: Statistic, routing: Routing) -> None:
        current, valid = record.of, record.valid_T
        width = current.layout.table(current.flat, statistic, self.bank).shape[1] - 1
        match statistic:
            case ("selected",) | ("kept",):
                current.count(self, statistic, masked(record.ids_TK, valid, width))
            case ("unbiased",):
                scores = self.scores.required(routing.scores_TE, "count='unbiased'")
                ids = torch.topk(scores.detach()[:, :width], self.site.top_k, dim=-1).indices
                current.count(self, statistic, masked(ids, valid, width))
            case ("subset", seed):
                rows = self._book.subset(len(record.ids_TK), valid, seed)
                ids = record.ids_TK[rows]
                current.count(self, statistic, masked(ids, None, width))
            case ("sent", groups):
                sent = groups_of(record.ids_TK, groups)
                current.count(self, statistic, masked(sent, valid, width))
            case ("prob",):
                probs = self.scores.probs(routing.scores_TE.detach())  # type: ignore[union-attr]
                if valid is not None:
                    probs = probs * valid.unsqueeze(1)
                table = current.layout.counts(current.flat, PROB, self.bank)
                table[self.row] = probs.sum(0, dtype=torch.float64)[:width]

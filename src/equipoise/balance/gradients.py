"""The gradient of all losses with respect to one router's scores in one micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equipoise.balance.catalogue import Objective
from equipoise.balance.passes import PROB, Record, groups_of, share
from equipoise.balance.scopes import Sequence

if TYPE_CHECKING:
    from equipoise.balance.book import Book
    from equipoise.balance.layers import Layer


class Gradients:
    """Turns the loads of a book into gradients, when the backward pass asks for them."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def of(self, layer: Layer, record: Record, scores: Tensor) -> Tensor | None:
        """The gradient of all losses with respect to one router's scores in one pass."""
        book = self._book
        current = record.of
        if not current.closed:
            book.close()
        if current.loads is None:
            book.resolve(current)
        total: Tensor | None = None
        probs = layer.scores.probs(scores)
        onto = None  # gradient with respect to the probabilities
        for term in range(len(book.losses)):
            objective = book.objectives[term, layer.bank]
            if objective.kind == "weight":
                continue
            weight = book.weight(term, layer.index, book.step)
            if objective.kind == "load":
                part = self._onto_probs(term, layer, record, scores, probs, objective, weight)
                part = _padded(part, probs.shape[1])
                onto = part if onto is None else onto + part
            else:
                part = self._direct(term, layer, record, scores, objective, weight)
                total = part if total is None else total + part
        if onto is not None:
            pulled = record.masked(layer.scores.pullback(scores, onto, probs))
            total = pulled if total is None else total + pulled
        if total is None:
            return None
        if book.scaler is not None:
            total = book.scaler.scale(total)
        return total.to(scores.dtype)

    def per_token(self, term: int, layer: Layer, record: Record) -> Tensor:
        """What one token counts in a loss of weight 1: 1 over the tokens that it is a mean of.

        Times what undoes the trainer's averaging over ranks, over the micro-batches of a step, and
        over the number of layers.
        """
        book = self._book
        scope = book.scopes[term]
        averaged = book.ranks if book.mean else 1
        if scope.late:
            tokens = book.layout.tokens(book.whole_step(), layer.bank)[layer.row]
            return averaged / book.num_layers / tokens.clamp(min=1)
        if scope.synced and book.tokens_expected is not None:
            return torch.tensor(averaged / book.num_layers / book.tokens_expected)
        flat = record.of.synced if scope.synced else record.of.flat
        assert flat is not None
        tokens = book.layout.tokens(flat, layer.bank)[layer.row]
        factor = averaged if scope.synced else averaged / book.ranks
        return factor / (book.num_layers * book.accumulation) / tokens.clamp(min=1)

    def _onto_probs(
        self,
        term: int,
        layer: Layer,
        record: Record,
        scores: Tensor,
        probs: Tensor,
        objective: Objective,
        weight: Tensor | float,
    ) -> Tensor:
        """The gradient of a load objective with respect to the probabilities, [1, E] or [T, E]."""
        book = self._book
        scope = book.scopes[term]
        width = book.banks[layer.bank].num_experts
        if isinstance(scope, Sequence):
            load_SE = self._loads_of_sequences(term, layer, record, scores)
            return self._of_sequences(
                term, layer, record, probs[:, :width], load_SE, objective, weight
            )
        loads = record.of.loads
        assert loads is not None
        counts = loads[term, layer.bank]
        whole = None
        if counts is None:
            whole = book.whole_step()
            counts = book.layout.counts(whole, book.statistic(term, layer.bank), layer.bank)
        load_E = share(counts[layer.row])
        prob_E = self._prob(term, layer, record, whole) if objective.needs_prob else None
        slope = objective.dP(load_E, prob_E)
        self._read(term, layer, record, probs[:, :width], objective, load_E)
        factor = self.per_token(term, layer, record).to(slope.device).float() * weight
        return (slope * factor).to(probs.device).unsqueeze(0)

    def _prob(self, term: int, layer: Layer, record: Record, whole: Tensor | None) -> Tensor:
        book = self._book
        scope = book.scopes[term]
        flat = whole
        if flat is None:
            flat = record.of.synced if scope.synced else record.of.flat
        assert flat is not None
        sums = book.layout.counts(flat, PROB, layer.bank)[layer.row]
        tokens = book.layout.tokens(flat, layer.bank)[layer.row]
        return (sums / tokens.clamp(min=1)).float()

    def _loads_of_sequences(
        self, term: int, layer: Layer, record: Record, scores: Tensor
    ) -> Tensor:
        """What each sequence's selections, or sendings to groups, make of a load [S, E]."""
        statistic = self._book.statistic(term, layer.bank)
        ids, width = record.ids_TK, layer.site.num_experts
        if statistic[0] == "unbiased":
            ids = torch.topk(scores.detach()[:, :width], layer.site.top_k, dim=-1).indices
        elif statistic[0] == "sent":
            ids, width = groups_of(ids, statistic[1]), max(statistic[1]) + 1
        inside = ids >= 0
        if record.valid_T is not None:
            inside = inside & record.valid_T.unsqueeze(1)
        assert record.segment_T is not None
        num = record.num_segments
        place = torch.where(inside, record.segment_T.unsqueeze(1) * width + ids, num * width)
        flat = torch.zeros(num * width + 1, dtype=torch.float64, device=ids.device)
        ones = torch.ones_like(place, dtype=flat.dtype).reshape(-1)
        flat.scatter_add_(0, place.reshape(-1), ones)
        return share(flat[:-1].view(num, width))

    def _of_sequences(
        self,
        term: int,
        layer: Layer,
        record: Record,
        probs_TE: Tensor,
        load_SE: Tensor,
        objective: Objective,
        weight: Tensor | float,
    ) -> Tensor:
        """Each sequence has its own load and mean probability; the loss is their mean."""
        book = self._book
        num, width = record.num_segments, probs_TE.shape[1]
        segment_T = record.segment_T
        assert segment_T is not None
        valid_T = (
            torch.ones(len(probs_TE), device=probs_TE.device)
            if record.valid_T is None
            else record.valid_T.float()
        )
        tokens_S = torch.zeros(num, device=probs_TE.device).index_add_(0, segment_T, valid_T)
        prob_SE = torch.zeros(num, width, device=probs_TE.device).index_add_(
            0, segment_T, probs_TE * valid_T.unsqueeze(1)
        ) / tokens_S.clamp(min=1).unsqueeze(1)
        slope_SE = objective.dP(load_SE, prob_SE)
        present = (tokens_S > 0).sum().clamp(min=1)
        book.meters.value(
            term,
            layer.index,
            (objective.value(load_E=load_SE, prob_E=prob_SE) * (tokens_S > 0)).sum() / present,
        )
        averaged = book.ranks if book.mean else 1
        scale = averaged / book.ranks / (book.num_layers * book.accumulation)
        per_S = scale * weight / present / tokens_S.clamp(min=1)
        return (slope_SE * per_S.unsqueeze(1))[segment_T] * valid_T.unsqueeze(1)

    def _direct(
        self,
        term: int,
        layer: Layer,
        record: Record,
        scores: Tensor,
        objective: Objective,
        weight: Tensor | float,
    ) -> Tensor:
        """The gradient of an objective of single tokens, or of the rank's batch, on the scores."""
        book = self._book
        with torch.enable_grad():
            x = scores.detach().float().requires_grad_()
            source = x if objective.reads == "logits" else layer.scores.probs(x)
            name = f"{objective.reads}_TE"
            if objective.kind == "token":
                value_T = objective.value(**{name: source})
                if record.valid_T is not None:
                    value_T = torch.where(record.valid_T, value_T, 0.0)
                value = value_T.sum()
                factor: Tensor | float = (
                    self.per_token(term, layer, record).to(x.device).float() * weight
                )
                tokens = (
                    len(scores) if record.valid_T is None else record.valid_T.sum().clamp(min=1)
                )
                book.meters.value(term, layer.index, value.detach() / tokens)
            else:
                value = objective.value(**{name: source}, valid_T=record.valid_T)
                averaged = 1.0 if book.mean else 1 / book.ranks
                factor = weight * averaged / (book.num_layers * book.accumulation)
                book.meters.value(term, layer.index, value.detach())
            return torch.autograd.grad(value, x)[0] * factor

    def _read(
        self,
        term: int,
        layer: Layer,
        record: Record,
        probs_TE: Tensor,
        objective: Objective,
        load_E: Tensor,
    ) -> None:
        """The value of a load objective, with this rank's mean probability."""
        book = self._book
        if record.valid_T is None:
            prob_E = probs_TE.mean(0)
        else:
            valid = record.valid_T.to(probs_TE.dtype)
            prob_E = (valid @ probs_TE) / valid.sum().clamp(min=1)
        value = objective.value(load_E=load_E.to(prob_E.device), prob_E=prob_E)
        book.meters.value(term, layer.index, value)


def _padded(grad: Tensor, width: int) -> Tensor:
    """Zero columns for choices beyond the experts."""
    missing = width - grad.shape[1]
    return torch.nn.functional.pad(grad, (0, missing)) if missing else grad

"""The gradient of all losses with respect to one router's scores in one micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equipoise.balance.catalogue import Objective
from equipoise.balance.passes import KEPT, PROB, Pass, Record, groups_of, share

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
        self._settle(record.of)
        if not book.losses and layer.adversary is None:
            return None  # and no probabilities, which not every router has
        total: Tensor | None = None
        probs = layer.scores.probs(scores, out=book.scratch(scores))
        onto = self._of_batch(layer, record, probs)  # gradient with respect to the probabilities
        for term in range(len(book.losses)):
            objective = book.objectives[term, layer.bank]
            elsewhere = objective.kind == "weight" or objective.reads == "outputs"
            if elsewhere or book.in_batch(term, layer.bank):
                continue
            weight = book.weight(term, layer.index, book.step)
            if objective.kind == "load":
                load_SE = self._loads_of_sequences(term, layer, record, scores)
                inside = probs[:, : layer.site.num_experts]
                part = self._of_sequences(term, layer, record, inside, load_SE, objective, weight)
                part = _padded(part, probs.shape[1])
                onto = part if onto is None else onto + part
            else:
                part = self._direct(term, layer, record, scores, objective, weight)
                total = part if total is None else total + part
        if onto is not None:
            pulled = record.masked(layer.scores.pullback(scores, onto, probs))
            total = pulled if total is None else total + pulled
        if layer.adversary is not None:
            part = record.masked(layer.adversary.gradient(layer, record, scores))
            total = part if total is None else total + part
        return self._scaled(total, scores)

    def of_outputs(self, layer: Layer, record: Record, outputs_TKD: Tensor) -> Tensor | None:
        """The gradient of all losses with respect to the outputs of a pass's selected experts."""
        book = self._book
        self._settle(record.of)
        total: Tensor | None = None
        for term in range(len(book.losses)):
            objective = book.objectives[term, layer.bank]
            if objective.reads == "outputs":
                weight = book.weight(term, layer.index, book.step)
                part = self._direct(term, layer, record, outputs_TKD, objective, weight)
                total = part if total is None else total + part
        return self._scaled(total, outputs_TKD)

    def _settle(self, current: Pass) -> None:
        """The counts of a pass are known before its gradient is."""
        if not current.closed:
            self._book.close()
        if current.loads is None:
            self._book.resolve(current)

    def _scaled(self, grad: Tensor | None, like: Tensor) -> Tensor | None:
        if grad is None:
            return None
        if self._book.scaler is not None:
            grad = self._book.scaler.scale(grad)
        return grad.to(like.dtype)

    def _of_batch(self, layer: Layer, record: Record, probs: Tensor) -> Tensor | None:
        """Of all load objectives over batches, [1, E + nulls], the same for every token."""
        current = record.of
        if layer.bank not in current.slopes:
            current.slopes[layer.bank] = self._slopes(current, layer.bank)
        slope_RE = current.slopes[layer.bank]
        if slope_RE is None:
            return None
        width = slope_RE.shape[1]
        current.see_mean(layer, probs[:, :width], record.valid_T)
        return _padded(slope_RE[layer.row : layer.row + 1].to(probs.device), probs.shape[1])

    def _slopes(self, current: Pass, bank: int) -> Tensor | None:
        """dL/dp of one token, for all layers of a bank at once [rows, E]; None without such a loss."""
        book, total = self._book, None
        for term in range(len(book.losses)):
            if not book.in_batch(term, bank):
                continue
            objective, flat = book.objectives[term, bank], self._flat(current, term)
            load_RE = share(self._counts(current, term, bank))
            current.shares[term, bank] = load_RE
            prob_RE = self._prob(flat, bank) if objective.needs_prob else None
            factor_R = self._per_token(term, flat, bank) * self._weights(term, bank)
            part = (objective.dP(load_RE, prob_RE) * factor_R.unsqueeze(1)).float()
            total = part if total is None else total + part
        return total

    def _counts(self, current: Pass, term: int, bank: int) -> Tensor:
        """Counts that make the load of a loss [rows, columns]."""
        assert current.loads is not None
        counts = current.loads[term, bank]
        if counts is not None:
            return counts
        book = self._book
        return book.layout.counts(book.whole_step(), book.statistic(term, bank), bank)

    def _flat(self, current: Pass, term: int) -> Tensor:
        """The statistics of the tokens that a loss takes its mean over."""
        scope = self._book.scopes[term]
        if scope.late:
            return self._book.whole_step()
        flat = current.synced if scope.synced else current.flat
        assert flat is not None
        return flat

    def _weights(self, term: int, bank: int) -> Tensor | float:
        """The weight of a loss at each layer of a bank."""
        book = self._book
        if term in book.weights:
            return book.weights[term][list(book.banks[bank].layers)]
        return book.weight(term, 0, book.step)

    def _per_token(self, term: int, flat: Tensor, bank: int) -> Tensor:
        """What one token counts in a loss of weight 1 [rows]: 1 over the tokens it is a mean of.

        Times what undoes the trainer's averaging over ranks, over the micro-batches of a step, and
        over the number of layers.
        """
        book = self._book
        scope = book.scopes[term]
        averaged = book.ranks if book.mean else 1
        tokens = book.layout.tokens(flat, bank)
        if scope.late:
            return averaged / book.num_layers / tokens.clamp(min=1)
        if scope.synced and book.tokens_expected is not None:
            return torch.full_like(tokens, averaged / book.num_layers / book.tokens_expected)
        factor = averaged if scope.synced else averaged / book.ranks
        return factor / (book.num_layers * book.accumulation) / tokens.clamp(min=1)

    def _prob(self, flat: Tensor, bank: int) -> Tensor:
        """Mean probabilities [rows, E] in float64: the gradients of some objectives cancel digits."""
        layout = self._book.layout
        tokens = layout.tokens(flat, bank)
        return layout.counts(flat, PROB, bank) / tokens.clamp(min=1).unsqueeze(1)

    def _loads_of_sequences(
        self, term: int, layer: Layer, record: Record, scores: Tensor
    ) -> Tensor:
        """What each sequence's selections, or sendings to groups, make of a load [S, E]."""
        statistic = self._book.statistic(term, layer.bank)
        ids, width = record.ids_TK, layer.site.num_experts
        if statistic == KEPT and record.kept_TK is not None:
            ids = record.kept_TK
        elif statistic[0] == "unbiased":
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
        read: Tensor,
        objective: Objective,
        weight: Tensor | float,
    ) -> Tensor:
        """The gradient of an objective of single tokens, or of the rank's batch, on what it reads:
        the scores [T, E], or the experts' outputs [T, K, D]."""
        book = self._book
        with torch.enable_grad():
            x = read.detach().float().requires_grad_()
            source = layer.scores.probs(x) if objective.reads == "probs" else x
            name = objective.argument
            if objective.kind == "token":
                value_T = objective.value(**{name: source})
                if record.valid_T is not None:
                    value_T = torch.where(record.valid_T, value_T, 0.0)
                value = value_T.sum()
                factor: Tensor | float = (
                    self._one_token(term, layer, record).to(x.device).float() * weight
                )
                tokens = len(read) if record.valid_T is None else record.valid_T.sum().clamp(min=1)
                book.meters.value(term, layer.index, value.detach() / tokens)
            else:
                value = objective.value(**{name: source}, valid_T=record.valid_T)
                averaged = 1.0 if book.mean else 1 / book.ranks
                factor = weight * averaged / (book.num_layers * book.accumulation)
                book.meters.value(term, layer.index, value.detach())
            return torch.autograd.grad(value, x)[0] * factor

    def _one_token(self, term: int, layer: Layer, record: Record) -> Tensor:
        """What one token of a layer counts in a loss of weight 1."""
        flat = self._flat(record.of, term)
        return self._per_token(term, flat, layer.bank)[layer.row]


def _padded(grad: Tensor, width: int) -> Tensor:
    """Zero columns for choices beyond the experts."""
    missing = width - grad.shape[1]
    return torch.nn.functional.pad(grad, (0, missing)) if missing else grad

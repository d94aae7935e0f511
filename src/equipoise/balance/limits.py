"""The capacity of one attached router: what it keeps, and how it knows a pass that is run again."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.balance.capacity import Capacity
from equipoise.balance.passes import Record
from equipoise.balance.probabilities import Scores
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite
from equipoise.models.steering import in_backward
from equipoise.nn import MoELayer
from equipoise.nn import capacity as rules
from equipoise.nn.limiter import Limiter
from equipoise.routing import NO_EXPERT, Routing

REFUSED = {
    "Llama4Router": "all experts run on all tokens, there is no dispatch to limit",
    "JetMoeTopKGating": "its router hands out a finished dispatch order, not ids",
    "DogeCDMoE": "product keys look experts up one by one, there is no dispatch to limit",
    "SwitchTransformersExperts": "it has a capacity of its own, set by config.expert_capacity",
}
"""Modules, by class name, at which no capacity can act, and why."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(eq=False)
class Choice:
    """What was kept of one pass's selection, both as the model has ids; kept for recomputation."""

    ids: Tensor
    kept: Tensor


class LayerCapacity:
    """The capacity of one attached router."""

    def __init__(
        self, site: RouterSite, scores: Scores, block: nn.Module, settings: Capacity
    ) -> None:
        _refuse(site, scores, block, settings)
        self.site, self.scores, self.settings = site, scores, settings
        self.limiter = Limiter(settings, site.num_experts)
        self.drops_ids = type(site.module).__module__.startswith("equipoise.nn")
        """The experts know NO_EXPERT."""
        self.last: Choice | None = None
        """Of the pass heard last."""
        self._held: list[Choice] = []
        """Of passes that no record keeps alive, until they are run again or the step ends."""
        self._alive: weakref.WeakSet[Choice] = weakref.WeakSet()

    # -- the decision, outside of compiled graphs ---------------------------------------------------

    @torch.no_grad()
    def limit(self, ids: Tensor, weights: Tensor, scores: Tensor | None) -> Tensor:
        """Ids as they are to be, NO_EXPERT where a slot is dropped; the same again when recomputed."""
        if in_backward():
            before = self._before(ids)
            if before is not None:
                return before.kept
        training = self.site.module.training
        factor = self.settings.factor if training else self.settings.eval_factor
        if factor is None:
            return ids
        choice = Choice(ids, self._limited(ids, weights, scores, factor))
        self.last = choice
        if training and not in_backward():
            self._held.append(choice)
        return choice.kept

    def _limited(
        self, ids: Tensor, weights: Tensor, scores: Tensor | None, factor: float
    ) -> Tensor:
        routing = self.site.routing(ids, weights, scores)
        ids_TK, valid_T = routing.expert_ids_TK.long(), routing.valid_T
        assert routing.weights_TK is not None
        rerouted = self.settings.overflow == "reroute"
        limited_TK = rules.limit(
            ids_TK,
            routing.weights_TK,
            self._logs(routing.scores_TE) if rerouted else None,
            valid_T,
            num_experts=self.site.num_experts,
            capacity=self._room(ids_TK, valid_T, factor),
            by=self.settings.by,
            overflow=self.settings.overflow,
            groups=self.settings.groups,
        ).expert_ids_TK
        touched_TK = (limited_TK != ids_TK) & (ids_TK != NO_EXPERT)
        if valid_T is not None:
            touched_TK = touched_TK & valid_T.unsqueeze(1)
        return torch.where(touched_TK.view_as(ids), limited_TK.view_as(ids).to(ids.dtype), ids)

    def _room(self, ids_TK: Tensor, valid_T: Tensor | None, factor: float) -> int | Tensor:
        """Of each bucket, of whose tokens only the valid ones count."""
        if self.limiter.share_E is not None and factor == self.settings.factor:
            return self.limiter.capacity(ids_TK, valid_T)
        buckets = self.settings.groups or self.site.num_experts
        if valid_T is None:
            return rules.capacity(len(ids_TK), ids_TK.shape[1], buckets, factor)
        # The same on the device, without waiting for it.
        exact = Fraction(str(factor)) * ids_TK.shape[1] / buckets
        return -(-valid_T.sum() * exact.numerator // exact.denominator)

    def _logs(self, scores_TE: Tensor | None) -> Tensor:
        """Logarithms of what weights are made of, whose differences are ratios of weights [T, E]."""
        x = self.scores.required(scores_TE, "Capacity(overflow='reroute')").float()
        x = x[:, : self.site.num_experts]
        match self.scores.function:
            case "softmax":
                return x
            case "sigmoid":
                return F.logsigmoid(x)
            case "sqrtsoftplus":
                return F.softplus(x).clamp_min(_TINY).log() / 2
            case _:  # probabilities, or scores after the score function
                return x.clamp_min(_TINY).log()

    # -- what the experts are handed ----------------------------------------------------------------

    def transform(
        self, ids: Tensor, weights: Tensor, scores: Tensor | None, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights for the experts; plain tensor code, differentiable."""
        lost = kept == NO_EXPERT
        used = ids
        wide = weights.shape[-1] != ids.shape[-1]
        chosen = weights.gather(-1, ids.long()) if wide else weights
        now = chosen.masked_fill(lost, 0.0)
        if self.settings.overflow == "reroute" and scores is not None:
            used = torch.where(lost, ids, kept)
            now = now * self._ratio(ids, used, scores).to(now.dtype)
        if wide:
            cleared = weights.scatter(-1, ids.long(), 0.0)
            now = cleared.scatter(-1, used.long(), now)
        return (kept if self.drops_ids else used), now

    def _ratio(self, ids: Tensor, used: Tensor, scores: Tensor) -> Tensor:
        """Weight at the expert that a slot was moved to over that at the one it had selected."""
        moved = used != ids
        logs_TE = self._logs(scores.reshape(-1, scores.shape[-1]))
        old_TK, new_TK = (
            x.masked_fill(~moved, 0).long().reshape(-1, x.shape[-1]) for x in (ids, used)
        )
        change = (logs_TE.gather(1, new_TK) - logs_TE.gather(1, old_TK)).view(ids.shape)
        return torch.where(moved, change, 0.0).exp()

    def ids_kept(self, routing: Routing, kept: Tensor) -> Tensor:
        """Ids that count as kept [T, K]: NO_EXPERT where a slot is dropped or computes nothing."""
        kept_TK = kept.reshape(-1, kept.shape[-1]).long()
        return torch.where(routing.expert_ids_TK == NO_EXPERT, NO_EXPERT, kept_TK)

    # -- recomputation ------------------------------------------------------------------------------

    def tie(self, record: Record) -> None:
        """A record that lives until its backward pass: the choice lives as long."""
        if self._held and self.last is self._held[-1]:
            record.choice = self._held.pop()
            self._alive.add(record.choice)

    def _before(self, ids: Tensor) -> Choice | None:
        """Of the passes in flight, the choice of the one that selected most alike."""
        among = [c for c in (*self._held, *self._alive) if c.ids.shape == ids.shape]
        if len(among) > 1:
            alike = [int((c.ids == ids).sum()) for c in among]
            among = [among[alike.index(max(alike))]]
        found = among[0] if among else None
        if found is not None and found in self._held:
            self._held.remove(found)
        return found

    def forget(self) -> None:
        """Drop what waits for passes that will not be run again."""
        self._held.clear()


def _refuse(site: RouterSite, scores: Scores, block: nn.Module, settings: Capacity) -> None:
    where = f"{site.path} ({site.family}): Capacity cannot act here: "
    reason = REFUSED.get(type(site.module).__name__)
    if reason is not None:
        raise EquipoiseError(f"{where}{reason}. Leave the layer out with layers=.")
    if site.variable_top_k:
        raise EquipoiseError(
            f"{where}its router gives tokens any number of experts, not top-k. Leave the layer out "
            "with layers=."
        )
    if isinstance(block, MoELayer) and block.limiter is not None:
        raise EquipoiseError(
            f"{where}the MoELayer has one of its own. Build it with capacity=None."
        )
    if settings.groups is not None and site.num_experts % settings.groups:
        raise EquipoiseError(
            f"{where}groups={settings.groups} does not divide {site.num_experts} experts."
        )
    if settings.overflow == "reroute" and scores.function in ("none", "unknown"):
        raise EquipoiseError(
            f"{where}overflow='reroute' makes weights from scores, and the score function of this "
            f"router is {site.score_function!r}. Use overflow='drop'."
        )

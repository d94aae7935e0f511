"""The bias that each token would need to reach each expert: what quantile balancing takes quantiles of.

A token selects expert e when score + bias is above its cutoff, the (K+1)-th largest of all. So
r = cutoff - score is the bias from which on e takes the token, and the bias below which lie T K / E of
the r of an expert gives it its fair share (J. Su, scientific spaces 11619; Kimi K3, arXiv 2607.24653).

Under a group limit e has to be above that cutoff, and to carry its group above the first one left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.balance.controllers.checks import check_bias, kept
from equipoise.balance.controllers.protocol import State
from equipoise.errors import EquipoiseError

WANTED, UNUSABLE = 0, 1  # columns of the state tensor "seen"


@dataclass(frozen=True)
class GroupLimit:
    """Group-limited selection (DeepSeek-V3): a token chooses among its `top_groups` best groups.

    Experts lie in `num_groups` equal blocks; a group's score is the sum of its `best` largest
    scores with bias.
    """

    num_groups: int
    top_groups: int
    best: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.top_groups <= self.num_groups or self.best < 1:
            raise EquipoiseError(
                f"{self}; allowed is 1 <= top_groups <= num_groups and best from 1"
            )

    def allowed(self, biased_TE: Tensor, top_k: int) -> Tensor:
        """True for the experts of each token's groups, [T, E]."""
        chosen_TG = self._chosen(self._best(biased_TE, top_k).sum(dim=-1))
        return chosen_TG.repeat_interleave(biased_TE.shape[-1] // self.num_groups, dim=-1)

    def cutoff(self, biased_TE: Tensor, top_k: int) -> Tensor:
        """The score with bias, [T, E], at which each expert is to take each token, others as they are.

        Both limits are of the first that is left out: the (K+1)-th expert of the token's groups, and its
        (top_groups + 1)-th group, above which an expert has to bring its own, with the best - 1 largest
        of the others there; +inf where those have no scores. An expert whose group is chosen without it
        is asked for its part too: else no bias of a group rises before all of them do, and under tight
        limits (2 of 8 groups) loads swing instead of settling.
        """
        best_TGb = self._best(biased_TE, top_k)
        score_TG = best_TGb.sum(dim=-1)
        grouped_TGe = biased_TE.view(*score_TG.shape, -1)
        within_TGe = grouped_TGe.where(self._chosen(score_TG)[..., None], -torch.inf)
        first_T1 = within_TGe.flatten(1).topk(top_k + 1, dim=-1).values[:, -1:]
        if self.top_groups == self.num_groups:
            return first_T1.expand_as(biased_TE)
        group_T1 = score_TG.topk(self.top_groups + 1, dim=-1).values[:, -1:]
        # Of the group's best without this expert: itself, where it is one of them, or else the last.
        without_TGe = grouped_TGe.maximum(best_TGb[..., -1:])
        carrying_TGe = (group_T1 - score_TG)[..., None] + without_TGe
        carrying_TGe = carrying_TGe.where(group_T1.isfinite()[..., None], -torch.inf)
        return carrying_TGe.flatten(1).maximum(first_T1)

    def _chosen(self, score_TG: Tensor) -> Tensor:
        """True for each token's groups."""
        chosen_TG = torch.zeros_like(score_TG, dtype=torch.bool)
        return chosen_TG.scatter_(-1, score_TG.topk(self.top_groups, dim=-1).indices, True)

    def _best(self, biased_TE: Tensor, top_k: int) -> Tensor:
        """The scores that count of each group, [T, groups, best], in falling order."""
        num_experts = biased_TE.shape[-1]
        per_group, rest = divmod(num_experts, self.num_groups)
        if rest or self.best > per_group:
            raise EquipoiseError(
                f"{self} with {num_experts} experts; num_groups must divide them, `best` fit in each"
            )
        if top_k > per_group * self.top_groups:
            raise EquipoiseError(
                f"{self} leaves {per_group * self.top_groups} of {num_experts} experts to choose "
                f"{top_k} from: raise top_groups"
            )
        return biased_TE.view(-1, self.num_groups, per_group).topk(self.best, dim=-1).values


def needed_bias(
    scores_TE: Tensor, bias_E: Tensor, top_k: int, valid_T: Tensor | None, groups: GroupLimit | None
) -> tuple[Tensor, Tensor]:
    """The bias r [T, E] at which each token would go to each expert, and (selections, unusable rows) [2].

    r is infinite where a token does not enter: padding, experts with score -inf or in a group that they
    cannot bring in, tokens without a choice. Rows with NaN or +inf are counted as unusable, not used.
    """
    _check_pass(scores_TE, bias_E, top_k, valid_T)
    scores_TE = scores_TE.to(torch.float32)
    usable_T = scores_TE.amax(dim=-1) < torch.inf  # False for NaN too
    valid_T = torch.ones_like(usable_T) if valid_T is None else valid_T.to(scores_TE.device)
    seen_2 = torch.stack([(valid_T & usable_T).sum() * top_k, (valid_T & ~usable_T).sum()])
    biased_TE = scores_TE.where(usable_T[:, None], 0.0) + bias_E.to(torch.float32)
    if groups is None:
        cutoff_TE = biased_TE.topk(top_k + 1, dim=-1).values[:, -1:].expand_as(biased_TE)
    else:
        cutoff_TE = groups.cutoff(biased_TE, top_k)
    enters_TE = (valid_T & usable_T)[:, None] & cutoff_TE.isfinite() & biased_TE.isfinite()
    return torch.where(enters_TE, cutoff_TE - scores_TE, torch.inf), seen_2


def check_observed(state: State, active_L1: Tensor) -> None:
    """ValueError where a layer counted selections but showed no scores, or scores that are no numbers."""
    seen_L2 = kept(state, "seen", (len(active_L1), 2))
    bad_L = (active_L1[:, 0] & (seen_L2[:, WANTED] == 0)) | (seen_L2[:, UNUSABLE] > 0)
    if not bool(bad_L.any()):
        return
    layer = int(bad_L.nonzero()[0])
    if rows := int(seen_L2[layer, UNUSABLE]):
        raise EquipoiseError(
            f"{rows} tokens of the layer at position {layer} had NaN or infinite scores; "
            "look at the router's logits, or mark rows that are no tokens in valid_T"
        )
    raise EquipoiseError(
        f"the layer at position {layer} counted selections, but none of its scores were observed; "
        "call observe() for every counted pass"
    )


def _check_pass(scores_TE: Tensor, bias_E: Tensor, top_k: int, valid_T: Tensor | None) -> None:
    check_bias(bias_E)
    if scores_TE.ndim != 2 or bias_E.shape != scores_TE.shape[1:]:
        raise EquipoiseError(
            f"scores of shape {tuple(scores_TE.shape)} and bias of shape {tuple(bias_E.shape)}; "
            "wanted are [tokens, experts] and [experts]"
        )
    if valid_T is not None and (
        valid_T.dtype != torch.bool or valid_T.shape != scores_TE.shape[:1]
    ):
        raise EquipoiseError(
            f"valid_T is {valid_T.dtype} of shape {tuple(valid_T.shape)} for {len(scores_TE)} tokens; "
            "give torch.bool, False on padding"
        )
    if not 1 <= top_k < scores_TE.shape[1]:
        raise EquipoiseError(
            f"top_k={top_k} of {scores_TE.shape[1]} experts; a quantile needs 1 <= top_k < experts"
        )

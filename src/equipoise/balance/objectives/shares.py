"""From ids, logits and masks to the loads and mean probabilities that objectives take.

Token dimensions come before the last: ids [..., T, K], scores [..., T, E], `valid_T` [..., T] with
False on padding. Each result keeps the leading dimensions, so [S, T, K] gives one load per sequence.
Where no token is valid, loads and probabilities are zero: every objective is then zero, without
gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.errors import EquipoiseError, nearest

PROBABILITY_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus", "probabilities")
"""Names that `probabilities` takes for `function`."""

_LINEAR_BELOW = -30.0
"""Under this, ln softplus(x) is x to 5e-14, and softplus itself would soon underflow."""


def counts(*, expert_ids_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> Tensor:
    """Selections of each expert, int64 [..., E]; slots of NO_EXPERT and of padding are not counted.

    Ids are in [0, num_experts) or NO_EXPERT; they are not checked here, where that would wait for
    the device.
    """
    counted_TK = _counted(expert_ids_TK, valid_T)
    slots = expert_ids_TK.clamp(min=0).flatten(-2).long()
    zeros = slots.new_zeros(*slots.shape[:-1], num_experts)
    return zeros.scatter_add_(-1, slots, counted_TK.flatten(-2).long())


def share(*, counts_E: Tensor) -> Tensor:
    """Counts over their sum, float [..., E]: a load from counts of any scope; zero where none."""
    total = counts_E.sum(-1, keepdim=True).clamp(min=1)
    return wide(counts_E) / wide(total)


def load(*, expert_ids_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> Tensor:
    """Each expert's share f of the selections, [..., E], summing to 1; no gradient."""
    counts_E = counts(expert_ids_TK=expert_ids_TK, num_experts=num_experts, valid_T=valid_T)
    return share(counts_E=counts_E)


def mean_prob(*, probs_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean P over the valid tokens of each expert's probability, [..., E]."""
    probs_TE = wide(probs_TE)
    if valid_T is None:
        return probs_TE.sum(-2) / max(probs_TE.shape[-2], 1)
    _check_valid(valid_T, probs_TE)
    weights_T = valid_T.to(probs_TE.dtype)
    total_E = (weights_T.unsqueeze(-2) @ probs_TE).squeeze(-2)
    return total_E / weights_T.sum(-1, keepdim=True).clamp(min=1)


def probabilities(*, scores_TE: Tensor, function: str) -> Tensor:
    """Probabilities [..., T, E] of a router's scores, each token's summing to 1.

    `function` is how the router scores: "softmax" of logits; "sigmoid" of logits s, as s / sum s
    (DeepSeek-V3, 2412.19437); "sqrtsoftplus" of logits, divided by the sum likewise (DeepSeek-V4,
    2606.19348); "probabilities" when they are that already, and are returned as they are.
    Computed in logarithms: finite for any finite logits.
    """
    scores_TE = wide(scores_TE)
    if function == "softmax":
        return scores_TE.softmax(-1)
    if function == "sigmoid":
        return F.logsigmoid(scores_TE).softmax(-1)
    if function == "sqrtsoftplus":
        return (0.5 * _log_softplus(scores_TE)).softmax(-1)
    if function == "probabilities":
        return scores_TE
    raise EquipoiseError(
        f"function {function!r}: allowed are {', '.join(PROBABILITY_FUNCTIONS)}."
        f"{nearest(function, PROBABILITY_FUNCTIONS)}"
    )


def smooth_load(
    *,
    logits_TE: Tensor,
    noise_std_TE: Tensor,
    noisy_logits_TE: Tensor,
    top_k: int,
    valid_T: Tensor | None = None,
) -> Tensor:
    """Share of the selections that new noise would give each expert, [..., E], with gradient.

    Shazeer et al. 2017 (1701.06538): an expert's chance to be among the top k if its own noise were
    drawn again, Phi((logit - threshold) / noise_std), where the threshold is the k-th largest noisy
    logit among the other experts; averaged over tokens, and here divided by the sum over experts.
    Standard deviations must be positive. Take it as the load of `load_cv`, without `prob_E`.
    """
    logits_TE, noise_std_TE = wide(logits_TE), wide(noise_std_TE)
    noisy_TE = wide(noisy_logits_TE)
    num_experts = logits_TE.shape[-1]
    if not 1 <= top_k < num_experts:
        raise EquipoiseError(
            f"a smooth load needs 1 <= top_k < {num_experts} experts, not top_k={top_k}: "
            "with every expert selected the load does not depend on the noise"
        )
    best = noisy_TE.topk(top_k + 1, -1).values
    kth, next_one = best[..., -2:-1], best[..., -1:]
    threshold_TE = torch.where(noisy_TE > next_one, next_one, kth)
    chance_TE = torch.special.ndtr((logits_TE - threshold_TE) / noise_std_TE)
    chance_E = mean_prob(probs_TE=chance_TE, valid_T=valid_T)
    total = chance_E.sum(-1, keepdim=True)
    return chance_E / torch.where(total > 0, total, torch.ones_like(total))


def contiguous_groups(*, num_experts: int, num_groups: int) -> Tensor:
    """Group of each expert, int64 [E], when experts lie in equal runs: 0, 0, 1, 1, ..."""
    if num_groups < 1 or num_experts % num_groups:
        raise EquipoiseError(
            f"{num_experts} experts do not divide into {num_groups} equal groups: choose a divisor "
            "of the number of experts, or give the group of each expert yourself"
        )
    return torch.arange(num_experts) // (num_experts // num_groups)


def sent_counts(
    *,
    expert_ids_TK: Tensor,
    group_of_E: Tensor,
    num_groups: int,
    valid_T: Tensor | None = None,
) -> Tensor:
    """Tokens sent to each group (device), int64 [..., G]; a token counts once per group."""
    ids_TK = expert_ids_TK.clamp(min=0).long()
    groups_TK = group_of_E.to(ids_TK.device)[ids_TK].long()
    nowhere = torch.full_like(groups_TK, num_groups)
    groups_TK = torch.where(_counted(expert_ids_TK, valid_T), groups_TK, nowhere)
    reached_TG = groups_TK.new_zeros(*groups_TK.shape[:-1], num_groups + 1)
    return reached_TG.scatter_(-1, groups_TK, 1)[..., :num_groups].sum(-2)


def sent(
    *,
    expert_ids_TK: Tensor,
    group_of_E: Tensor,
    num_groups: int,
    valid_T: Tensor | None = None,
) -> Tensor:
    """Each group's share of all (token, group) sendings, [..., G], summing to 1.

    DeepSeek-V2 (2405.04434) divides by T M instead, M the most groups a token may reach. The two
    agree when every token reaches M; else the share keeps the objective at 1 at balance.
    """
    sent_G = sent_counts(
        expert_ids_TK=expert_ids_TK, group_of_E=group_of_E, num_groups=num_groups, valid_T=valid_T
    )
    return share(counts_E=sent_G)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _counted(expert_ids_TK: Tensor, valid_T: Tensor | None) -> Tensor:
    """Which slots are selections of a token, bool [..., T, K]."""
    counted_TK = expert_ids_TK >= 0
    if valid_T is None:
        return counted_TK
    _check_valid(valid_T, expert_ids_TK)
    return counted_TK & valid_T.bool().unsqueeze(-1)


def _check_valid(valid_T: Tensor, rows: Tensor) -> None:
    if valid_T.shape != rows.shape[:-1]:
        raise EquipoiseError(
            f"valid_T has shape {tuple(valid_T.shape)}; with rows of shape {tuple(rows.shape)} "
            f"it must be {tuple(rows.shape[:-1])}, True on real tokens"
        )


def _log_softplus(scores: Tensor) -> Tensor:
    upper = F.softplus(scores.clamp(min=_LINEAR_BELOW)).log()
    return torch.where(scores < _LINEAR_BELOW, scores, upper)

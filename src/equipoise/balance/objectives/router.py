"""Objectives that shape the router or the experts beside their balance: z, entropy, variance,
orthogonality.

None of them has a "1 at balance": each docstring says what its extremes are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.balance.objectives.shares import mean_prob, wide
from equipoise.errors import EquipoiseError

_KINDS = ("ernie", "simbal")


def z(*, logits_TE: Tensor) -> Tensor:
    """(ln sum_e exp x_e)^2 of each token, [..., T]: keeps logits small.

    The z-loss of ST-MoE (2202.08906), whose weight is 1e-3. It knows nothing of balance: uniform
    logits of 0 give (ln E)^2, and logits of -ln E give 0.
    """
    return wide(logits_TE).logsumexp(-1).square()


def entropy(*, probs_TE: Tensor) -> Tensor:
    """1 - H / ln E of each token, [..., T]: 0 when all experts are equally likely, 1 when one is sure.

    To minimise it is the entropy bonus. It flattens each token's probabilities, which is more than
    balance asks: balanced and decided tokens are penalised too. Not a published objective.
    """
    probs_TE = wide(probs_TE)
    num_experts = probs_TE.shape[-1]
    if num_experts < 2:
        raise EquipoiseError(f"the entropy objective needs 2 experts or more, not {num_experts}")
    tiny = torch.finfo(probs_TE.dtype).tiny  # keeps the gradient finite where a probability is 0
    return 1 + (probs_TE * probs_TE.clamp(min=tiny).log()).sum(-1) / math.log(num_experts)


def score_variance(*, probs_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Minus the variance over tokens of each expert's score, mean over experts, [...].

    L_v of "Advancing Expert Specialization" (2505.22323): to minimise it makes routing decisions
    more distinct. 0 when all tokens are routed alike, balanced or not; at least -1/4. Population
    variance over the valid tokens.
    """
    probs_TE = wide(probs_TE)
    mean_E = mean_prob(probs_TE=probs_TE, valid_T=valid_T)
    deviation_TE = probs_TE - mean_E.unsqueeze(-2)
    return -mean_prob(probs_TE=deviation_TE.square(), valid_T=valid_T).mean(-1)


def output_orthogonality(*, outputs_TKD: Tensor) -> Tensor:
    """Mean length of the projection of one selected expert's output on another's, [..., T].

    L_o of "Advancing Expert Specialization" (2505.22323), as the mean over the K (K - 1) ordered
    pairs where the paper sums. 0 when the outputs of a token's experts are orthogonal; it grows
    with the outputs' length, so that short outputs lower it too. Rows of zeros add nothing.
    """
    outputs_TKD = wide(outputs_TKD)
    top_k = outputs_TKD.shape[-2]
    if top_k < 2:
        raise EquipoiseError(
            f"output orthogonality compares a token's experts: it needs top_k >= 2, not {top_k}"
        )
    gram_TKK = outputs_TKD @ outputs_TKD.mT
    squares_TK = gram_TKK.diagonal(dim1=-2, dim2=-1)
    length_TK = (squares_TK + torch.finfo(gram_TKK.dtype).eps ** 2).sqrt()
    projection_TKK = gram_TKK.abs() / length_TK.unsqueeze(-2)
    own_T = projection_TKK.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (projection_TKK.sum((-2, -1)) - own_T) / (top_k * (top_k - 1))


def router_orthogonality(*, weight_ED: Tensor, kind: str = "ernie") -> Tensor:
    """How far the router's rows are from orthogonal, [...]: 0 when they are; needs no tokens.

    "ernie" (ERNIE 4.5 technical report): mean square of R R^T - I with rows R of length 1, as in
    PaddleFormers' gate; at most (E - 1) / E, when all rows are parallel. Direction only.
    "simbal" (SimBal, 2506.14038): mean absolute entry of W W^T - I, rows as they are, so lengths
    are drawn to 1 as well; the paper's norm is the sum, E^2 times this.
    It cannot reach 0 where E exceeds the width D.
    """
    if kind not in _KINDS:
        raise EquipoiseError(f"kind {kind!r}: allowed are {' and '.join(_KINDS)}")
    weight_ED = wide(weight_ED)
    rows_ED = F.normalize(weight_ED, dim=-1) if kind == "ernie" else weight_ED
    identity_EE = torch.eye(rows_ED.shape[-2], dtype=rows_ED.dtype, device=rows_ED.device)
    excess_EE = rows_ED @ rows_ED.mT - identity_EE
    return (excess_EE.square() if kind == "ernie" else excess_EE.abs()).mean((-2, -1))

"""From a router's scores to probabilities that sum to 1, and gradients back, in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite

FUNCTIONS = {
    "softmax": "softmax",
    "sparsemixer": "softmax",
    "sigmoid": "sigmoid",
    "sqrtsoftplus": "sqrtsoftplus",
}
"""A site's score function, and what makes probabilities of its logits.

Sigmoid and sqrtsoftplus scores are divided by their sum, as DeepSeek-V3 does for its loss.
"""


NO_LOSS = {"relu": "; it steers itself by an L1 term, and takes no selection bias either"}
"""What to say of a score function that no loss knows."""


class Scores:
    """How one router's scores [T, E] become probabilities [T, E], and gradients go back."""

    def __init__(self, site: RouterSite) -> None:
        self.path = site.path
        # A bias of the model's own acts where its router adds it; ours acts on scores.
        self._bias_on_logits = site.selection_bias and site.compares == "logits"
        self.function = "none"
        if site.scores_are != "logits":
            self.function = site.scores_are
        elif site.score_function != "hash":
            self.function = FUNCTIONS.get(site.score_function, "unknown")

    def required(self, scores_TE: Tensor | None, by: str) -> Tensor:
        """The scores, or EquipoiseError where the router gives none."""
        if scores_TE is None:
            raise EquipoiseError(f"{self.path}: {by} needs the router's scores; it returns none.")
        return scores_TE

    def probs(self, scores_TE: Tensor, out: Tensor | None = None) -> Tensor:
        """Probabilities in float32, each row summing to 1; in `out` where that is possible."""
        x = scores_TE.float()
        if self.function == "softmax":
            return torch.softmax(x, dim=-1, out=out)
        if self.function == "probabilities":
            return x
        s = _gate(x, self.function)
        return s / s.sum(-1, keepdim=True)

    def compared(self, scores_TE: Tensor) -> Tensor:
        """What a selection bias is added to, in float32: not divided by its sum."""
        x = scores_TE.float()
        if self._bias_on_logits:
            return x
        return (
            self.probs(x)
            if self.function in ("softmax", "probabilities")
            else _gate(x, self.function)
        )

    def pullback(self, scores_TE: Tensor, grad_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """From the gradient with respect to the probabilities to that with respect to the scores.

        `grad_TE` may be [1, E], the same for every token.
        """
        if self.function == "probabilities":
            return grad_TE.expand_as(probs_TE)
        # What is the same for all experts cancels; taken out first, it takes no digits with it.
        grad_TE = grad_TE - grad_TE.mean(-1, keepdim=True)
        if grad_TE.shape[0] == 1:
            mean_T1 = (probs_TE @ grad_TE[0]).unsqueeze(1)
        else:
            mean_T1 = (probs_TE * grad_TE).sum(-1, keepdim=True)
        out = grad_TE - mean_T1
        if self.function == "softmax":
            return out.mul_(probs_TE)
        x = scores_TE.float()
        s = _gate(x, self.function)
        if self.function == "gates":
            return out.div_(s.sum(-1, keepdim=True))
        slope = s * (1 - s) if self.function == "sigmoid" else torch.sigmoid(x) / (2 * s)
        return out.mul_(slope).div_(s.sum(-1, keepdim=True))


def _gate(x: Tensor, function: str) -> Tensor:
    if function == "gates":
        return x
    if function == "sigmoid":
        return torch.sigmoid(x)
    if function == "sqrtsoftplus":
        return F.softplus(x).sqrt()
    raise AssertionError(function)

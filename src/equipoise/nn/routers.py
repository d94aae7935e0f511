"""The router of most models: a fixed number of experts per token, put together from parts.

| published as | configuration |
|---|---|
| Switch | `top_k=1, jitter=0.01` |
| GShard | `top_k=2, weighting="renormalized", random_second=True` |
| Shazeer, noisy top-k | `weighting="softmax", noise=LearnedNoise(D, E)` |
| Mixtral, GPT-OSS (softmax after top-k) | `weighting="softmax"` |
| OLMoE (softmax before top-k) | the defaults |
| Qwen3-MoE | `weighting="renormalized"` |
| DeepSeek-V3 | `score_function="sigmoid", selection=GroupLimited(8, 4), selection_bias=True`, |
| | `weighting="renormalized", route_scale=2.5` |
| DeepSeek-V4 | `score_function="sqrtsoftplus", weighting="renormalized", selection_bias=True` |
| Skywork-MoE | `logit_norm=1.0` |
| S-BASE, BASE | `selection=Sinkhorn()`; `score_function="sigmoid", selection=Assignment()` |
| MoE++, LongCat-Flash | `null_experts=n`, with `FreeExperts` |
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from equipoise.nn.base import SCORE_FUNCTIONS, Router, ScoreFunction, check_choice, scores_of
from equipoise.nn.noise import LearnedNoise, jittered
from equipoise.nn.selection import Selection, TopK
from equipoise.routing import NO_EXPERT

Weighting = Literal["scores", "renormalized", "softmax", "equal"]
WEIGHTINGS: tuple[Weighting, ...] = ("scores", "renormalized", "softmax", "equal")
_TINY = 1e-20


class TopKRouter(Router):
    """K experts for each token by score, weighted by score.

    `weighting`: "scores" as they are; "renormalized" to sum 1; "softmax" over the selected logits,
    which are then also what the selection bias is added to; "equal", 1 / K each.
    `temperature` divides the logits: lower is sharper, higher is flatter. `logit_norm` sets each
    token's logits to mean 0 and this standard deviation first (Skywork-MoE, arXiv 2406.06563).
    `jitter` and `noise` act in training only; the returned logits are without the noise.
    `random_second` (GShard, arXiv 2006.16668 alg. 1) keeps every expert but the first with
    probability min(1, 2 x its share of the selected scores), in training only.
    `null_experts` are choices with the ids from num_experts up, to be handled by `FreeExperts`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: ScoreFunction = "softmax",
        weighting: Weighting = "scores",
        route_scale: float = 1.0,
        selection: Selection | None = None,
        selection_bias: bool = False,
        null_experts: int = 0,
        temperature: float = 1.0,
        logit_norm: float | None = None,
        jitter: float = 0.0,
        noise: nn.Module | None = None,
        random_second: bool = False,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            score_function=score_function,
            null_experts=null_experts,
            selection_bias=selection_bias,
        )
        check_choice("score_function", score_function, SCORE_FUNCTIONS)
        check_choice("weighting", weighting, WEIGHTINGS)
        self.weighting, self.route_scale = weighting, route_scale
        self.selection: Selection = TopK() if selection is None else selection
        self.temperature, self.logit_norm = temperature, logit_norm
        self.jitter, self.noise, self.random_second = jitter, noise, random_second
        if weighting == "softmax" or self.selection.reads == "logits":
            self.compares = "logits"
        self._check()
        self.reset_parameters()

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], routing weights [T, K] and expert ids [T, K]."""
        logits_TE, used_TE, scores_TE = self._score(hidden_TD)
        ids_TK = self._select(scores_TE.detach(), used_TE.detach())
        return logits_TE, *self._weigh(scores_TE, ids_TK, hidden_TD.dtype)

    def _score(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Logits to return; with this pass's noise; and the scores made of those.
        if self.training and self.jitter:
            hidden_TD = jittered(hidden_TD, self.jitter)
        logits_TE = self.logits(hidden_TD)
        if self.logit_norm is not None:
            logits_TE = normalized(logits_TE) * self.logit_norm
        logits_TE = logits_TE / self.temperature
        used_TE = logits_TE
        if self.training and self.noise is not None:
            used_TE, _ = self.noise(logits_TE, hidden_TD)
        if self.weighting == "softmax":
            return logits_TE, used_TE, used_TE
        return logits_TE, used_TE, scores_of(used_TE, self.score_function)

    def _select(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        if self.selection.reads == "logits":
            return self.selection(logits_TE, self.top_k, training=self.training)
        if self.selection_bias is not None:
            scores_TE = scores_TE + self.selection_bias
        return self.selection(scores_TE, self.top_k, training=self.training)

    def _weigh(
        self, scores_TE: Tensor, ids_TK: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        selected_TK = scores_TE.gather(1, ids_TK)
        if self.weighting == "softmax":
            weights_TK = torch.softmax(selected_TK, dim=1)
        elif self.weighting == "renormalized":
            weights_TK = selected_TK / (selected_TK.sum(dim=1, keepdim=True) + _TINY)
        elif self.weighting == "equal":
            weights_TK = torch.full_like(selected_TK, 1.0 / self.top_k)
        else:
            weights_TK = selected_TK
        if self.training and self.random_second:
            dropped_TK = _drawn_out(weights_TK.detach())
            weights_TK = weights_TK.masked_fill(dropped_TK, 0.0)
            ids_TK = ids_TK.masked_fill(dropped_TK, NO_EXPERT)
        return (weights_TK * self.route_scale).to(dtype), ids_TK

    def _check(self) -> None:
        self.selection.check(self.num_experts + self.null_experts, self.top_k)
        if self.weighting == "softmax" and self.score_function != "softmax":
            raise ValueError(
                f"weighting='softmax' is for score_function='softmax', not {self.score_function!r}"
            )
        if self.top_k == 1 and self.weighting in ("renormalized", "softmax"):
            raise ValueError(
                f"weighting={self.weighting!r} with top_k=1 makes every weight 1, and the router "
                "gets no gradient: use weighting='scores'"
            )
        if self.selection_bias is not None and self.selection.reads == "logits":
            raise ValueError(
                f"{type(self.selection).__name__} does not read a selection bias: leave it out"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; it has to be above 0")
        if self.logit_norm is not None and not self.logit_norm > 0:
            raise ValueError(f"logit_norm={self.logit_norm}; it has to be above 0, or None")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter={self.jitter}; allowed is 0 to below 1")
        if isinstance(self.noise, LearnedNoise) and self.noise.weight.shape != self.weight.shape:
            raise ValueError(
                f"noise for {list(self.noise.weight.shape)}, but the router's weight is "
                f"{list(self.weight.shape)}: null experts count as experts there"
            )
        if self.random_second and self.top_k < 2:
            raise ValueError("random_second needs a second expert: top_k=2 or more")


def normalized(logits_TE: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 for each token."""
    centred_TE = logits_TE - logits_TE.mean(dim=1, keepdim=True)
    variance_T1 = centred_TE.square().mean(dim=1, keepdim=True)
    return centred_TE * (variance_T1 + 1e-12).rsqrt()


def _drawn_out(weights_TK: Tensor) -> Tensor:
    # True where a slot after the first loses the draw.
    share_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + _TINY)
    lost_TK = torch.rand_like(share_TK) >= 2.0 * share_TK
    lost_TK[:, 0] = False
    return lost_TK

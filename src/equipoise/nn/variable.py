"""Routers that give each token as many experts as it earns; ids are padded with NO_EXPERT.

Their `top_k` is the number of experts a token gets on average, and the number of slots changes
from batch to batch. Every row counts as a token: leave padding out.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from equipoise.nn.base import (
    SCORE_FUNCTIONS,
    Router,
    ScoreFunction,
    check_choice,
    first_pass,
    padded,
    scores_of,
)


class ExpertChoiceRouter(Router):
    """Each expert picks its best ceil(T K / E) tokens (Zhou et al., arXiv 2202.09368).

    Perfectly balanced, and not causal: whether a token is picked depends on the tokens after it, so
    a language model trained with it is told about its future, by up to K log2((1 - R) / R) bits per
    token and layer with R = K / E (`future_leak`; arXiv 2408.15664). A loss that falls for this
    reason does not come back in generation. `chunk` picks within runs of that many rows instead of
    the whole batch; the leak stays, and smaller chunks leaked more in that paper.
    """

    variable_top_k = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: ScoreFunction = "softmax",
        chunk: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, score_function=score_function)
        check_choice("score_function", score_function, SCORE_FUNCTIONS)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk}; it has to be 1 row or more, or None for all rows")
        self.chunk = chunk
        self.reset_parameters()

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], scores as weights [T, K], and ids [T, K] with K the most any token got."""
        logits_TE = self.logits(hidden_TD)
        scores_TE = scores_of(logits_TE, self.score_function)
        weights_TK, ids_TK = padded(self._choose(scores_TE.detach()), scores_TE)
        return logits_TE, weights_TK.to(hidden_TD.dtype), ids_TK

    def _choose(self, scores_TE: Tensor) -> Tensor:
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        size = self.chunk or max(len(scores_TE), 1)
        chunks = zip(torch.split(scores_TE, size), torch.split(chosen_TE, size), strict=True)
        for scores, chosen in chunks:
            picks = math.ceil(len(scores) * self.top_k / self.num_experts)
            chosen.scatter_(0, scores.topk(picks, dim=0).indices, True)
        return chosen_TE


def future_leak(top_k: int, num_experts: int) -> float:
    """Bits per token and layer that expert choice can leak: K log2((1 - R) / R) with R = K / E.

    Arithmetic of arXiv 2408.15664, made for sparse layers: R below 1/2, else ValueError.
    """
    if not 0 < 2 * top_k < num_experts:
        raise ValueError(f"top_k={top_k} of {num_experts} experts; the bound is for under half")
    ratio = top_k / num_experts
    return top_k * math.log2((1 - ratio) / ratio)


class ExpertThresholdRouter(Router):
    """A token goes to every expert whose threshold its score exceeds (arXiv 2603.11535).

    The threshold is a running average of the score that K / E of the tokens exceed: expert choice
    made causal, as each token is decided alone and only past steps move the thresholds. Training
    passes are noted (recomputation is not); `step()` moves the thresholds, once per optimizer step.
    The first step replaces the start, a guess for hidden states of unit mean square; later ones
    count at least 1 - decay. Batches should hold well over E / K tokens.
    """

    variable_top_k = True

    float32_buffers: ClassVar[tuple[str, ...]] = ("selection_bias", "threshold_E", "steps")
    threshold_E: Tensor
    steps: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: Literal["sigmoid", "sqrtsoftplus"] = "sigmoid",
        decay: float = 0.99,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, score_function=score_function)
        check_choice("score_function", score_function, ("sigmoid", "sqrtsoftplus"))
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}; allowed is 0 to below 1")
        if top_k >= num_experts:
            raise ValueError(f"top_k={top_k} of {num_experts} experts leaves nothing to choose")
        self.decay = decay
        self.register_buffer("threshold_E", torch.empty(num_experts, dtype=torch.float32))
        self.register_buffer("steps", torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew and forget every step."""
        super().reset_parameters()
        spread = 0.02 * math.sqrt(self.hidden_size)
        start = spread * NormalDist().inv_cdf(1 - self.top_k / self.num_experts)
        self.threshold_E.fill_(float(scores_of(torch.tensor(start), self.score_function)))
        self.steps.zero_()
        self._noted: Tensor | None = None

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], scores as weights [T, K], and ids [T, K] with K the most any token got."""
        logits_TE = self.logits(hidden_TD)
        scores_TE = scores_of(logits_TE, self.score_function)
        chosen_TE = scores_TE.detach() > self.threshold_E
        weights_TK, ids_TK = padded(chosen_TE, scores_TE)
        if self.training and len(hidden_TD) and first_pass():
            self._note(scores_TE.detach())
        return logits_TE, weights_TK.to(hidden_TD.dtype), ids_TK

    def step(self, group: ProcessGroup | None = None) -> None:
        """Move the thresholds by what was noted since the last step, on all ranks of `group`."""
        noted, self._noted = self._noted, None
        if noted is None:
            noted = torch.zeros(self.num_experts + 1, dtype=torch.float64)
            noted = noted.to(self.threshold_E.device)
        if group is not None:
            dist.all_reduce(noted, group=group)
        if noted[-1] > 0:
            share = max(1.0 - self.decay, 1.0 / (1.0 + float(self.steps)))
            self.threshold_E.lerp_((noted[:-1] / noted[-1]).float(), share)
            self.steps += 1

    def _note(self, scores_TE: Tensor) -> None:
        # The best `picks` tokens of an expert lie above the score that comes next. Tokens weigh
        # micro-batches; their number stands last. Not a buffer: DDP would overwrite it.
        tokens = len(scores_TE)
        picks = min(round(tokens * self.top_k / self.num_experts), tokens - 1)
        edge_E = scores_TE.topk(picks + 1, dim=0).values[-1].double()
        noted = torch.cat([edge_E * tokens, edge_E.new_tensor([tokens])])
        self._noted = noted if self._noted is None else self._noted + noted

"""Routers that give each token as many experts as it earns; ids are padded with NO_EXPERT.

Their `top_k` is the number of experts a token gets on average, and the number of slots changes
from batch to batch. Every row counts as a token: leave padding out.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, ClassVar, Literal

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


class Thresholds(Router):
    """Keeps for each expert a running average of the score that K / E of the tokens exceed.

    Training passes are noted (recomputation is not); `step()` moves the thresholds, once per
    optimizer step. The first step replaces the start, a guess; later ones count at least 1 - decay.
    Batches should hold well over E / K tokens.
    """

    variable_top_k = True

    float32_buffers: ClassVar[tuple[str, ...]] = ("selection_bias", "threshold_E", "steps")
    threshold_E: Tensor
    steps: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, decay: float, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}; allowed is 0 to below 1")
        self.decay = decay
        self.register_buffer("threshold_E", torch.empty(num_experts, dtype=torch.float32))
        self.register_buffer("steps", torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew and forget every step."""
        super().reset_parameters()
        self.threshold_E.fill_(self._start())
        self.steps.zero_()
        self._noted: Tensor | None = None

    def _start(self) -> float:
        # What K / E of the tokens exceed under the first weights, for hidden states of unit mean
        # square; scores that sum to 1 begin close together.
        if self.score_function == "softmax":
            return 1 / self.num_experts
        exceeded = min(self.top_k / self.num_experts, 0.999)
        spread = 0.02 * math.sqrt(self.hidden_size)
        logit = spread * NormalDist().inv_cdf(1 - exceeded)
        return float(scores_of(torch.tensor(logit), self.score_function))

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
        if not (self.training and len(scores_TE) and first_pass()):
            return
        tokens = len(scores_TE)
        picks = min(round(tokens * self.top_k / self.num_experts), tokens - 1)
        edge_E = scores_TE.topk(picks + 1, dim=0).values[-1].double()
        noted = torch.cat([edge_E * tokens, edge_E.new_tensor([tokens])])
        self._noted = noted if self._noted is None else self._noted + noted


class ExpertChoiceRouter(Thresholds):
    """Each expert picks its best ceil(T K / E) tokens (Zhou et al., arXiv 2202.09368).

    Perfectly balanced, and not causal: whether a token is picked depends on the tokens after it, so
    a language model trained with it is told about its future, by up to K log2((1 - R) / R) bits per
    token and layer with R = K / E (`future_leak`; arXiv 2408.15664). A loss that falls for this
    reason does not come back in generation. `chunk` picks within runs of that many rows instead of
    the whole batch; the leak stays, and smaller chunks leaked more in that paper. `shuffle` deals
    the rows of the batch out over chunks by chance, in evaluation too: a token's rivals are then
    tokens of other sequences, whose choice tells next to nothing of its own future.

    `causal = True` routes in evaluation as generation has to, each token by itself: to the experts
    whose threshold it exceeds, the running average of the score that K / E of the training tokens
    exceeded.
    """

    causal = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: ScoreFunction = "softmax",
        chunk: int | None = None,
        shuffle: bool = False,
        decay: float = 0.99,
    ) -> None:
        check_choice("score_function", score_function, SCORE_FUNCTIONS)
        shape = (hidden_size, num_experts, top_k)
        super().__init__(*shape, score_function=score_function, decay=decay)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk}; it has to be 1 row or more, or None for all rows")
        if shuffle and chunk is None:
            raise ValueError("shuffle=True changes nothing without chunk: give its number of rows")
        self.chunk, self.shuffle = chunk, shuffle

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], scores as weights [T, K], and ids [T, K] with K the most any token got."""
        logits_TE = self.logits(hidden_TD)
        scores_TE = scores_of(logits_TE, self.score_function)
        if self.causal and not self.training:
            chosen_TE = scores_TE.detach() > self.threshold_E
        else:
            chosen_TE = self._choose(scores_TE.detach())
        self._note(scores_TE.detach())
        weights_TK, ids_TK = padded(chosen_TE, scores_TE)
        return logits_TE, weights_TK.to(hidden_TD.dtype), ids_TK

    def _choose(self, scores_TE: Tensor) -> Tensor:
        if not self.shuffle:
            return self._choose_in_chunks(scores_TE)
        order_T = torch.randperm(len(scores_TE), device=scores_TE.device)
        chosen_TE = torch.empty_like(scores_TE, dtype=torch.bool)
        chosen_TE[order_T] = self._choose_in_chunks(scores_TE[order_T])
        return chosen_TE

    def _choose_in_chunks(self, scores_TE: Tensor) -> Tensor:
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        tokens, size = len(scores_TE), self.chunk or len(scores_TE)
        whole = tokens // max(size, 1) * size
        for rows, length in ((slice(whole), size), (slice(whole, None), tokens - whole)):
            if not len(scores_TE[rows]):
                continue
            chunks = scores_TE[rows].reshape(-1, length, self.num_experts)
            picks = math.ceil(length * self.top_k / self.num_experts)
            best = chunks.topk(picks, dim=1).indices
            chosen_TE[rows].view_as(chunks).scatter_(1, best, True)
        return chosen_TE


def future_leak(top_k: int, num_experts: int) -> float:
    """Bits per token and layer that expert choice can leak: K log2((1 - R) / R) with R = K / E.

    Arithmetic of arXiv 2408.15664, made for sparse layers: R below 1/2, else ValueError.
    """
    if not 0 < 2 * top_k < num_experts:
        raise ValueError(f"top_k={top_k} of {num_experts} experts; the bound is for under half")
    ratio = top_k / num_experts
    return top_k * math.log2((1 - ratio) / ratio)


class ExpertThresholdRouter(Thresholds):
    """A token goes to every expert whose threshold its score exceeds (arXiv 2603.11535).

    The threshold is a running average of the score that K / E of the tokens exceed: expert choice
    made causal, as each token is decided alone and only past steps move the thresholds.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: Literal["sigmoid", "sqrtsoftplus"] = "sigmoid",
        decay: float = 0.99,
    ) -> None:
        check_choice("score_function", score_function, ("sigmoid", "sqrtsoftplus"))
        if num_experts <= top_k:
            raise ValueError(f"top_k={top_k} of {num_experts} experts leaves nothing to choose")
        shape = (hidden_size, num_experts, top_k)
        super().__init__(*shape, score_function=score_function, decay=decay)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], scores as weights [T, K], and ids [T, K] with K the most any token got."""
        logits_TE = self.logits(hidden_TD)
        scores_TE = scores_of(logits_TE, self.score_function)
        chosen_TE = scores_TE.detach() > self.threshold_E
        weights_TK, ids_TK = padded(chosen_TE, scores_TE)
        self._note(scores_TE.detach())
        return logits_TE, weights_TK.to(hidden_TD.dtype), ids_TK

"""What every router has: a weight, logits in full precision, perhaps a bias that only selects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from equipoise.routing import NO_EXPERT

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]
SCORE_FUNCTIONS: tuple[ScoreFunction, ...] = ("softmax", "sigmoid", "sqrtsoftplus")


class Router(nn.Module):
    """Base of the routers: forward(hidden_TD) gives (scores_TE, weights_TK, expert_ids_TK).

    `scores_TE` are the logits, with their graph to `weight`; ids are int64, NO_EXPERT where a slot
    is empty, and the weight there is 0. Logits are computed in float32 (float64 where that comes
    in; `precision` says otherwise), also under autocast; weights come back in the type of the hidden states.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("selection_bias",)
    weight: nn.Parameter
    selection_bias: Tensor | None
    variable_top_k: ClassVar[bool] = False
    """Tokens get different numbers of experts; ids are padded with NO_EXPERT to the largest."""
    compares: Literal["scores", "logits"] = "scores"
    """What the selection compares, and the selection bias is added to."""
    precision: torch.dtype = torch.float32
    """Of the product that makes the logits; torch.bfloat16 is there to show what it costs."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str,
        null_experts: int = 0,
        selection_bias: bool = False,
    ) -> None:
        super().__init__()
        if null_experts < 0:
            raise ValueError(f"null_experts={null_experts}; it has to be 0 or more")
        choices = num_experts + null_experts
        if not 1 <= top_k <= choices:
            raise ValueError(f"top_k={top_k} of {choices} experts; allowed is 1 to {choices}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.null_experts, self.score_function = null_experts, score_function
        self.weight = nn.Parameter(torch.empty(choices, hidden_size))
        bias_E = torch.zeros(choices, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", bias_E)

    def reset_parameters(self) -> None:
        """Draw the weight anew and put every buffer to its start, as after `to_empty()`."""
        nn.init.normal_(self.weight, std=0.02)
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Affinity of each token to each expert, [T, E], in float32 or float64."""
        if hidden_TD.ndim != 2 or hidden_TD.shape[1] != self.hidden_size:
            raise ValueError(
                f"hidden states of shape {list(hidden_TD.shape)}; this router takes "
                f"[tokens, {self.hidden_size}]: flatten batch and sequence first"
            )
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        used = wide if self.precision == torch.float32 else self.precision
        with torch.autocast(hidden_TD.device.type, enabled=False):
            return F.linear(hidden_TD.to(used), self.weight.to(used)).to(wide)

    def step(self, group: ProcessGroup | None = None) -> None:
        """End of an optimizer step: routers that adapt without gradient do it here, over `group`.

        Call it on every rank of the group. Routers without such state do nothing.
        """

    def extra_repr(self) -> str:
        """The line in print(model)."""
        null = f", null_experts={self.null_experts}" if self.null_experts else ""
        return (
            f"{self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"score_function={self.score_function!r}{null}"
        )

    # A step of 1e-3 on a bias in bfloat16 is lost from 0.5 on: what a cast of the model does to
    # such buffers is taken back, and they are loaded as float32 whatever the file holds.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in self.float32_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            now = self._buffers[name]
            if kept is not None and now is not None and now.dtype != kept.dtype:
                self._buffers[name] = kept.to(now.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.float32_buffers:
            loaded = self._buffers[name]
            if loaded is not None:
                self._buffers[name] = loaded.float()


def scores_of(logits_TE: Tensor, function: str) -> Tensor:
    """Scores of logits: softmax over the experts, sigmoid, or the root of softplus (DeepSeek-V4)."""
    if function == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    if function == "sigmoid":
        return torch.sigmoid(logits_TE)
    # The root's slope at 0 is infinite, and softplus underflows to 0.
    tiny = torch.finfo(logits_TE.dtype).tiny
    return F.softplus(logits_TE).clamp_min(tiny).sqrt()


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError for an option that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; allowed are {', '.join(map(repr, allowed))}")


def padded(chosen_TE: Tensor, values_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids of any number of experts per token, best first, padded with NO_EXPERT.

    K is the largest number any token got, at least 1, so the host waits for the device here.
    """
    widest = int(chosen_TE.sum(dim=1).max()) if len(chosen_TE) else 0
    ranked_TE = values_TE.detach().masked_fill(~chosen_TE, -torch.inf)
    ids_TK = ranked_TE.topk(max(widest, 1), dim=1).indices
    empty_TK = ~chosen_TE.gather(1, ids_TK)
    weights_TK = values_TE.gather(1, ids_TK).masked_fill(empty_TK, 0.0)
    return weights_TK, ids_TK.masked_fill(empty_TK, NO_EXPERT)


def first_pass() -> bool:
    """False where a forward pass is run again in the backward pass (activation checkpointing)."""
    return int(torch._C._current_graph_task_id()) == -1

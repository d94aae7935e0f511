"""What a controller is: loads of a scope in, a new selection bias out, no gradient."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Acts = Literal["add", "multiply"]
State = dict[str, Tensor]
Device = torch.device | str | None


@runtime_checkable
class Controller(Protocol):
    """Moves the selection bias of all MoE layers at once, after the counts of one optimizer step.

    The bias enters selection only, never the routing weights (arXiv 2408.15664, Algorithm 1): experts
    are picked by `score + bias` where `acts` is "add", by `score * bias` where it is "multiply". It
    begins at `start` and is float32 throughout.
    """

    acts: ClassVar[Acts]
    start: ClassVar[float]
    reduce: ClassVar[tuple[str, ...]]
    """State tensors that the caller sums over the process group before `update`, which zeroes them."""

    def initial(self, *, num_layers: int, num_experts: int, device: Device = None) -> State:
        """Tensors that the controller carries from step to step; {} for none."""
        ...

    def update(self, *, bias_LE: Tensor, counts_LE: Tensor, step: int, state: State) -> Tensor:
        """The new bias (float32, a new tensor); `state` is changed in place.

        `counts_LE` are selections of the whole scope, int64 or float64. A layer whose counts are all
        zero keeps its bias and its state. ValueError on counts that are no counts, or on shapes that
        do not fit.
        """
        ...


@runtime_checkable
class Observer(Controller, Protocol):
    """A controller that looks at the scores of every counted pass, not only at the counts."""

    def observe(
        self,
        *,
        layer: int,
        scores_TE: Tensor,
        bias_E: Tensor,
        top_k: int,
        valid_T: Tensor | None,
        state: State,
    ) -> None:
        """Add one pass of the layer at position `layer`; its bias is the one it was routed with.

        `scores_TE` are what selection adds the bias to (after sigmoid, softmax, ...); -inf marks an
        expert that the token could not choose. Rows that are not `valid_T` do not enter.
        """
        ...

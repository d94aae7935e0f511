"""What one router decided in one forward pass, and the letters that shapes are written in.

| letter | dimension |                 | letter | dimension |
|---|---|---|---|---|
| T | tokens (rows of a batch)     || S | sequences |
| L | MoE layers                   || W | windows |
| E | experts                      || G | expert groups (devices, nodes) |
| K | experts selected per token   || P | physical slots |
| D | model width                  || | |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NO_EXPERT = -1
"""Id of a slot that went to no expert: dropped by capacity, skipped, or a zero-computation expert."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The decision of one router for the T token rows of one forward pass.

    Tensors live on the layer's device and belong to the model: copy what you keep.
    """

    layer: int
    """True layer number in the model, dense layers counted."""
    path: str
    """Module path of the router site; unique in a model, which `layer` need not be."""
    expert_ids_TK: Tensor
    """Integer ids in [0, E), or NO_EXPERT."""
    weights_TK: Tensor | None = None
    """Routing weights as the model used them: raw, renormalised or scaled, by architecture."""
    scores_TE: Tensor | None = None
    """Scores as the router returns them (logits in most architectures), before bias and groups."""
    valid_T: Tensor | None = None
    """False on padding; None where no mask was supplied, that is, every row is a token."""

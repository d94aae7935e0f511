"""The floats that are recorded beside ids: routing weights, and how clear the choice was."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import RoutingError
from equipoise.models.taps import Selection


def fill_floats(floats: Tensor, decided: Selection, full: bool, path: str) -> None:
    """Weights and margin at level "full"; else weights, which are NaN when anything was."""
    ids_TK, weights, scores_TE = decided
    if weights is None:
        floats.zero_()
        if full:
            raise RoutingError(
                f"{path} gives no routing weights: record it at level ids or counts."
            )
        return
    weights = weights.detach()
    if not full:
        floats.copy_(weights)
        return
    floats[:, :-1].copy_(weights)
    floats[:, -1].copy_(_margin(ids_TK.long(), scores_TE))


def _margin(ids_TK: Tensor, scores_TE: Tensor | None) -> Tensor:
    """Lowest selected minus highest unselected score [T]; NaN where the router gives no scores.

    Negative where a selection bias or a group limit overruled the scores.
    """
    if scores_TE is None:
        return torch.full((len(ids_TK),), float("nan"), device=ids_TK.device)
    scores_TE = scores_TE.detach().float()
    routed_TK = ids_TK >= 0
    selected_TK = scores_TE.gather(1, ids_TK.clamp(min=0))
    lowest_T = selected_TK.masked_fill(~routed_TK, float("inf")).amin(1)
    taken_TE = torch.zeros_like(scores_TE).scatter_add_(
        1, ids_TK.clamp(min=0), routed_TK.to(scores_TE.dtype)
    )
    highest_T = scores_TE.masked_fill(taken_TE > 0, float("-inf")).amax(1)
    return lowest_T - highest_T

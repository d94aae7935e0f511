"""What the routers of a `LanguageModel` select, counted as it runs. Shapes: L layers, E experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise.lab.model import LanguageModel
from equipoise.nn.base import scores_of


class Taken(NamedTuple):
    """What was selected in some passes."""

    counts_LE: Tensor
    """Selections, int64."""
    score_sums_L: Tensor
    """Of the selected scores, float64; 0 where they were not asked for."""
    unchosen_L: Tensor
    """Tokens without an expert, of routers that decide how many a token has, int64; 0 of others."""


class Meter:
    """Counts, and sums of the selected scores, of all passes since the last `take`.

    In training all passes of one optimizer step: the lab recomputes no activations, so a pass is
    seen once.
    """

    def __init__(self, model: LanguageModel) -> None:
        layers = list(model.moe_layers())
        self._layers, self._experts = layers, model.config.experts
        self._device = next(model.parameters()).device
        self._hooks = [
            layer.gate.register_forward_hook(self._hook(index))
            for index, layer in enumerate(layers)
        ]
        self.scores = False
        """Whether selected scores are summed too."""
        self._clear()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _clear(self) -> None:
        # By id + 1: 0 is "no expert", and E + 1 a null expert; neither is load.
        self._ids_LX = torch.zeros(
            len(self._layers), self._experts + 2, dtype=torch.int64, device=self._device
        )
        self._sums_L = torch.zeros(len(self._layers), dtype=torch.float64, device=self._device)
        self._unchosen_L = torch.zeros(len(self._layers), dtype=torch.int64, device=self._device)

    def _hook(self, index: int) -> Any:
        def hook(gate: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_TE, _weights_TK, ids_TK = output
            ids = (ids_TK.flatten() + 1).clamp(max=self._experts + 1)
            self._ids_LX[index].scatter_add_(0, ids, torch.ones_like(ids))  # no wait for a GPU
            if gate.variable_top_k:
                self._unchosen_L[index] += (ids_TK < 0).all(dim=1).sum()
            if self.scores:
                self._sums_L[index] += _selected(gate, logits_TE.detach(), ids_TK)

        return hook

    def take(self) -> Taken:
        """All since the last call."""
        found = Taken(self._ids_LX[:, 1:-1].contiguous(), self._sums_L, self._unchosen_L)
        self._clear()
        return found


def _selected(gate: Any, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
    if gate.score_function == "relu":
        scores_TE = torch.relu(logits_TE)
    else:
        scores_TE = scores_of(logits_TE, gate.score_function)
    valid_TK = (ids_TK >= 0) & (ids_TK < scores_TE.shape[1])
    picked_TK = scores_TE.gather(1, ids_TK.clamp(0, scores_TE.shape[1] - 1))
    return (picked_TK * valid_TK).sum(dtype=torch.float64)

"""Running sums of a step: what its losses were worth, how uneven its micro-batches, how strong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equipoise.balance.passes import SELECTED, Layout


class Meters:
    """Running sums of a step: values of the losses, imbalance of micro-batches, gradient norms."""

    def __init__(self, num_losses: int, num_layers: int, device: torch.device) -> None:
        self.values = torch.zeros(num_losses, num_layers, device=device)
        self.valued = [[0] * num_layers for _ in range(num_losses)]
        self.micro_vio: dict[int, Tensor] = {}
        self.passes = 0
        self.balance_sq = torch.zeros(num_layers, device=device)
        self.main_sq = torch.zeros(num_layers, device=device)
        self.score_sums = torch.zeros(num_layers, device=device)
        nothing = torch.tensor(math.nan)
        self.probes = [(nothing, nothing)] * num_layers

    def value(self, term: int, layer: int, value: Tensor) -> None:
        """The value of a loss in one pass."""
        self.values[term, layer] += value.detach().to(self.values.device)
        self.valued[term][layer] += 1

    def micro(self, layout: Layout, flat: Tensor) -> None:
        """MaxVio of one micro-batch on this rank, by bank."""
        self.passes += 1
        for bank in layout.banks:
            counts = layout.counts(flat, SELECTED, bank.index)
            vio = counts.amax(1) / counts.mean(1).clamp(min=1e-300) - 1
            vio = torch.where(counts.sum(1) > 0, vio, 0.0)
            before = self.micro_vio.get(bank.index)
            self.micro_vio[bank.index] = vio if before is None else before + vio

    def gradients(self, layer: int, balance: Tensor, whole: Tensor) -> None:
        """What balancing adds to the gradient of the scores, and the whole of it."""
        home = self.balance_sq.device
        self.balance_sq[layer] += balance.float().square().sum().to(home)
        self.main_sq[layer] += (whole.float() - balance.float()).square().sum().to(home)

    def reset(self) -> None:
        """Start a step."""
        self.values.zero_()
        self.valued = [[0] * len(row) for row in self.valued]
        self.micro_vio.clear()
        self.passes = 0
        self.score_sums.zero_()
        self.balance_sq.zero_()
        self.main_sq.zero_()

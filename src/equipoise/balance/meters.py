"""Running sums of a step: what its losses were worth, how uneven its micro-batches, how strong."""

from __future__ import annotations

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
        self.sums = torch.zeros(num_layers, device=device)
        """Of scores, where no loss looks at them: NaN or infinite if any of them is."""
        self.probes: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        """A few rows of each layer's scores and ids, of the last pass."""

    def value(self, term: int, layer: int, value: Tensor) -> None:
        """The value of a loss in one pass."""
        self.values[term, layer] += value.detach().to(self.values.device)
        self.valued[term][layer] += 1

    def values_of(self, term: int, layers: list[int], value_R: Tensor) -> None:
        """The values of a loss at several layers in one pass."""
        self.values[term, layers] += value_R.detach().to(self.values)
        for layer in layers:
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

    def nonsense(self) -> Tensor:
        """NaN for each layer with a score that was NaN or infinite, else 0 [L]."""
        return self.sums * 0 + (self.values * 0).sum(0)

    def reset(self) -> None:
        """Start a step."""
        self.values.zero_()
        self.valued = [[0] * len(row) for row in self.valued]
        self.micro_vio.clear()
        self.passes = 0
        self.sums.zero_()
        self.balance_sq.zero_()
        self.main_sq.zero_()

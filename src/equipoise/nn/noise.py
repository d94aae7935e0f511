"""Noise on the logits while training, as modules: hook one to see the noisy logits and the scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedNoise(nn.Module):
    """Noisy top-k (Shazeer et al., arXiv 1701.06538, eq. 4): standard deviation softplus(x W).

    forward(logits_TE, hidden_TD) gives (noisy_TE, std_TE). The smooth load of eq. 8-10 needs the
    clean logits, which go in, and both results: a forward hook on this module has all three.
    """

    def __init__(self, hidden_size: int, num_experts: int, floor: float = 1e-2) -> None:
        super().__init__()
        if floor < 0:
            raise ValueError(f"floor={floor}; a standard deviation is at least 0")
        self.floor = floor
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def reset_parameters(self) -> None:
        """The same scale for every token and expert, as the paper starts."""
        nn.init.zeros_(self.weight)

    def forward(self, logits_TE: Tensor, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy logits and the standard deviation of their noise."""
        wide = logits_TE.dtype
        with torch.autocast(logits_TE.device.type, enabled=False):
            std_TE = F.softplus(F.linear(hidden_TD.to(wide), self.weight.to(wide))) + self.floor
        return logits_TE + std_TE * torch.randn_like(logits_TE), std_TE


class FixedNoise(nn.Module):
    """Gaussian noise of one standard deviation; V-MoE (arXiv 2106.05974) takes 1 / E."""

    def __init__(self, std: float) -> None:
        super().__init__()
        if std < 0:
            raise ValueError(f"std={std}; a standard deviation is at least 0")
        self.std = std

    def forward(self, logits_TE: Tensor, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy logits and the standard deviation of their noise."""
        std_TE = torch.full_like(logits_TE, self.std)
        return logits_TE + std_TE * torch.randn_like(logits_TE), std_TE


def jittered(hidden_TD: Tensor, width: float) -> Tensor:
    """Hidden states times a uniform draw from [1 - width, 1 + width] (Switch, arXiv 2101.03961)."""
    return hidden_TD * torch.empty_like(hidden_TD).uniform_(1.0 - width, 1.0 + width)

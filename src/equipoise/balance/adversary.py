"""An adversarial term: each layer's discriminator predicts which experts idle, its router deceives it.

The discriminator sees, of each expert, three figures of the scores of a micro-batch on one rank,
and learns which experts get less than `below` times their fair share there; the gradient that goes
on to the scores is reversed (objectives/adversarial.py says where the parts come from). Nothing is
published on its use for expert load, and no gain is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.balance.objectives.adversarial import idle, idleness, reverse_gradient
from equipoise.balance.passes import SELECTED, Record
from equipoise.balance.probabilities import NO_LOSS
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.balance.book import Book
    from equipoise.balance.layers import Layer

FEATURES, WIDTH = 3, 16
_LEAST = 1e-6


@dataclass(frozen=True)
class Adversarial:
    """The router hides from a discriminator which experts idle, as a term of `attach`.

    weight: of the reversed gradient, on the scale of a `Loss`: the value is 1 where idle and busy
        experts cannot be told apart, per micro-batch and rank, averaged over layers.
    below: idle is an expert with less than this share of its fair load.
    rate: learning rate of the discriminators' own Adam. Their updates use all ranks' gradients.
    """

    weight: float = 1e-3
    below: float = 0.5
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weight", "rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise EquipoiseError(
                    f"Adversarial: {name}={getattr(self, name)} has to be a finite number of at "
                    "least 0."
                )
        if not 0 < self.below <= 1:
            raise EquipoiseError(f"Adversarial: below={self.below} has to lie in (0, 1].")


class Adversaries:
    """The discriminators of all layers, and their optimizer; implements `parts.Part`."""

    name = "adversarial"

    def __init__(self, term: Adversarial, layers: Sequence[Layer], book: Book) -> None:
        self.term, self.book = term, book
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(term.seed)
            nets = [_discriminator() for _ in layers]
        self.nets = nn.ModuleList(nets).to(book.device)
        self.optimizer = torch.optim.Adam(self.nets.parameters(), lr=term.rate)
        self._values: list[Tensor] = []
        self._last = math.nan
        for layer in layers:
            if layer.scores.function in ("none", "unknown"):
                raise EquipoiseError(
                    f"{layer.site.path} ({layer.site.family}): Adversarial needs scores per expert; "
                    f"{layer.site.score_function!r} is none that is known"
                    f"{NO_LOSS.get(layer.site.score_function, '')}. Leave it out with layers=."
                )
            layer.adversary = self

    def gradient(self, layer: Layer, record: Record, scores: Tensor) -> Tensor:
        """What goes to the scores [T, E]; the discriminator's own gradient is put by."""
        book, net = self.book, self.nets[layer.index]
        counts = book.layout.counts(record.of.flat, SELECTED, layer.bank)[layer.row]
        idle_E = idle(load_E=counts / counts.sum().clamp(min=1), below=self.term.below)
        parameters = list(net.parameters())
        with torch.enable_grad():
            x = scores.detach().float().requires_grad_()
            probs_TE = layer.scores.probs(x)[:, : len(idle_E)]
            features_E = features(probs_TE, record.valid_T, layer.site.top_k)
            # Discriminators live on one device, layers may be spread over several.
            seen_E = reverse_gradient(tensor=features_E.to(book.device))
            value = idleness(idle_logits_E=net(seen_E).squeeze(-1), idle_E=idle_E)
            onto_x, *onto_net = torch.autograd.grad(value, [x, *parameters])
        for parameter, grad in zip(parameters, onto_net, strict=True):
            grad = grad / book.accumulation
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        self._values.append(value.detach())
        averaged = 1.0 if book.mean else 1 / book.ranks
        return onto_x * (self.term.weight * averaged / (book.num_layers * book.accumulation))

    def before(self) -> None:
        """Nothing to do."""

    def after(self, counts: list[Tensor], step: int) -> None:
        """Train the discriminators on what all ranks saw."""
        flat = nn.utils.parameters_to_vector(
            p.grad if p.grad is not None else torch.zeros_like(p) for p in self.nets.parameters()
        )
        if self.book.group is not None and self.book.ranks > 1:
            dist.all_reduce(flat, group=self.book.group)
            flat = flat / self.book.ranks
        at = 0
        for parameter in self.nets.parameters():
            parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._last = float(torch.stack(self._values).mean()) if self._values else math.nan
        self._values.clear()

    def forget(self) -> None:
        """The step will not come: nothing is learned from what was seen of it."""
        self.optimizer.zero_grad()
        self._values.clear()

    def metrics(self) -> dict[str, float]:
        """The discriminators' mean loss on this rank: 1 is guessing, 0 is knowing."""
        return {} if math.isnan(self._last) else {"balance/adversarial": self._last}

    def state_dict(self) -> dict[str, Any]:
        """Discriminators and their optimizer."""
        return {"nets": self.nets.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        self.nets.load_state_dict(state["nets"])
        self.optimizer.load_state_dict(state["optimizer"])

    def detach(self) -> None:
        """Nothing lies on the model."""


def features(probs_TE: Tensor, valid_T: Tensor | None, top_k: int) -> Tensor:
    """Of each expert [E, 3]: logarithms of mean and root mean square of E p, mean lead over the k-th."""
    keep_T1 = torch.ones_like(probs_TE[:, :1]) if valid_T is None else valid_T.unsqueeze(1).float()
    tokens, width = keep_T1.sum().clamp(min=1), probs_TE.shape[1]
    ratio_TE = probs_TE * width
    mean_E = (ratio_TE * keep_T1).sum(0) / tokens
    square_E = (ratio_TE.square() * keep_T1).sum(0) / tokens
    last_T1 = ratio_TE.detach().topk(top_k, dim=-1).values[:, -1:]
    lead_E = ((ratio_TE - last_T1) * keep_T1).sum(0) / tokens
    return torch.stack(
        [(mean_E + _LEAST).log(), (square_E + _LEAST).log() / 2, lead_E / width], dim=-1
    )


def _discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

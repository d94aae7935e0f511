"""What layers that look at later tokens gain by it, on held-out text.

Expert choice picks tokens in competition with later ones, and soft MoE mixes all tokens of a row: a
low loss of theirs may be knowledge of the text to come, which generation does not have. Shapes: D
domains, R rows of each, B rows of a pass, S positions, N of them that are scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.lab.batches import held_out_rows
from equipoise.lab.corpus import Corpus
from equipoise.lab.model import LanguageModel
from equipoise.nn import ExpertChoiceRouter, SoftMoE

Values = NDArray[np.float64]
ROWS, POSITIONS = 32, 32
"""Of each domain, and of each row: most ways of scoring need a pass for each position."""


@dataclass(frozen=True)
class Leak:
    """The same held-out tokens scored in three ways, nats per token, [D]."""

    as_trained: Values
    """Routed as in training: in passes of as many rows, of all domains."""
    other_future: Values
    """The same, but what follows the scored token is the text of another row of its domain: all is
    as in training, except that nothing tells of the text to come."""
    causal: Values
    """As in generation: expert choice by thresholds, soft MoE on the tokens up to the scored one."""
    other_future_error: Values
    """Standard errors of other_future - as_trained, over rows."""
    causal_error: Values
    """Standard errors of causal - as_trained, over rows."""

    def gap(self, way: Literal["other_future", "causal"]) -> tuple[float, float]:
        """How much more than as trained, mean of the domains, and half its 95 % interval."""
        errors: Values = getattr(self, f"{way}_error")
        difference = float((getattr(self, way) - self.as_trained).mean())
        return difference, 1.96 * float(np.sqrt((errors**2).sum())) / len(errors)

    def to_dict(self) -> dict[str, list[float]]:
        """For JSON."""
        return {name: values.tolist() for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Leak:
        """What `to_dict` gave."""
        return cls(**{name: np.array(value) for name, value in values.items()})


@contextmanager
def causal_routing(model: LanguageModel) -> Iterator[None]:
    """Expert choice goes by its thresholds, each token by itself, while the model evaluates."""
    gates = _choosing(model)
    before = [gate.causal for gate in gates]
    try:
        for gate in gates:
            gate.causal = True
        yield
    finally:
        for gate, was in zip(gates, before, strict=True):
            gate.causal = was


def measure(
    model: LanguageModel, corpus: Corpus, row_length: int, rows: int, tokens: int = 0
) -> Leak | None:
    """Score held-out rows in all ways; None for a model that looks at no later token.

    `rows` go into a pass, dealt out over the domains as in training; `tokens`, unless 0, is the
    most of each domain. The model has to be in evaluation mode.
    """
    if not _mixes(model) and not _choosing(model):
        return None
    wanted = min(tokens or ROWS * row_length, ROWS * row_length)
    by_domain = [held_out_rows(domain, row_length, wanted) for domain in corpus.domains]
    fewest, domains = min(map(len, by_domain)), len(by_domain)
    dealt = torch.stack([found[:fewest] for found in by_domain], dim=1).flatten(0, 1)
    others = dealt.roll(domains, dims=0)  # the row before, of the same domain
    at = torch.linspace(0, row_length - 1, min(POSITIONS, row_length)).round().long().tolist()
    device, found = next(model.parameters()).device, []
    with torch.no_grad():
        for part, other in zip(torch.split(dealt, rows), torch.split(others, rows), strict=True):
            found.append(_ways(model, part.to(device), other.to(device), at).double().cpu())
    losses = torch.cat(found, dim=1).mean(2).view(3, fewest, domains).numpy()
    as_trained_RD, other_RD, causal_RD = losses
    errors = [
        (way_RD - as_trained_RD).std(0) / math.sqrt(max(1, fewest - 1))
        for way_RD in (other_RD, causal_RD)
    ]
    return Leak(*losses.mean(1), *errors)


def _ways(model: LanguageModel, rows: Tensor, others: Tensor, at: list[int]) -> Tensor:
    """Losses as trained, with the text of the other rows to come, and causally, [3, B, N]."""
    ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    trained = _losses(model, ids, targets)[:, at]
    replaced, alone = [], []
    for position in at:
        end = position + 1
        spliced = torch.cat([ids[:, :end], others[:, end:-1]], dim=1)
        replaced.append(_losses(model, spliced, targets)[:, position])
        if _mixes(model):
            short = _losses(model, ids[:, :end], targets[:, :end].contiguous())
            alone.append(short[:, position])
    if alone:
        return torch.stack([trained, torch.stack(replaced, 1), torch.stack(alone, 1)])
    with causal_routing(model):
        causal = _losses(model, ids, targets)[:, at]
    return torch.stack([trained, torch.stack(replaced, 1), causal])


def _losses(model: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    """[B, S]."""
    losses: Tensor = model(ids, targets, reduction="none")
    return losses.view_as(ids)


def _choosing(model: LanguageModel) -> list[ExpertChoiceRouter]:
    gates = (layer.gate for layer in model.moe_layers())
    return [gate for gate in gates if isinstance(gate, ExpertChoiceRouter)]


def _mixes(model: LanguageModel) -> bool:
    return any(isinstance(block.mlp, SoftMoE) for block in model.blocks)

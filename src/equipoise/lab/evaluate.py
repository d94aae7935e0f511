"""A model on held-out text: loss, load and routing weights of every domain.

Shapes: D domains, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.lab.batches import held_out_rows
from equipoise.lab.corpus import Corpus
from equipoise.lab.meter import Meter
from equipoise.lab.model import LanguageModel
from equipoise.metrics import floors, load

ROWS = 32
"""In one forward pass."""


@dataclass(frozen=True)
class Evaluation:
    """What the held-out text of each domain gave."""

    domains: tuple[str, ...]
    losses: NDArray[np.float64]
    """Nats per token, [D]."""
    tokens: NDArray[np.int64]
    """Tokens predicted, [D]."""
    bytes_per_token: NDArray[np.float64]
    """[D]; nats per token / bytes per token / ln 2 are bits per byte."""
    counts: NDArray[np.int64]
    """Selections of each domain, layer and expert, [D, L, E]; [D, 0, 0] where nothing is selected."""
    weight_sums: NDArray[np.float64]
    """Mean over tokens of the sum of selected scores, before they are renormalised, [D, L]."""

    @property
    def loss(self) -> float:
        """Mean of the domains' losses, nats per token."""
        return float(self.losses.mean())

    @property
    def bits_per_byte(self) -> NDArray[np.float64]:
        """[D]."""
        return self.losses / self.bytes_per_token / math.log(2)

    @property
    def max_vio(self) -> float:
        """MaxVio_global: of all domains' tokens together, mean over layers; NaN without layers."""
        counts_LE = self.counts.sum(0)
        return float(np.mean(load.max_vio(counts_LE))) if len(counts_LE) else math.nan

    @property
    def experts_per_token(self) -> float:
        """Mean over tokens and layers; more than top-k where routers decide for themselves."""
        if not self.counts.size:
            return math.nan
        return float(self.counts.sum() / self.tokens.sum() / self.counts.shape[1])

    def max_vio_floor(self, top_k: int) -> float:
        """What chance alone gives at so many tokens."""
        if not self.counts.size:
            return math.nan
        experts = self.counts.shape[2]
        return floors.floor(int(self.tokens.sum()), experts, top_k).mean["max_vio"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "domains": list(self.domains),
            "losses": self.losses.tolist(),
            "tokens": self.tokens.tolist(),
            "bytes_per_token": self.bytes_per_token.tolist(),
            "counts": self.counts.tolist(),
            "weight_sums": self.weight_sums.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        return cls(
            tuple(values["domains"]),
            np.array(values["losses"]),
            np.array(values["tokens"]),
            np.array(values["bytes_per_token"]),
            np.array(values["counts"], dtype=np.int64),
            np.array(values["weight_sums"]),
        )


def evaluate(
    model: LanguageModel,
    corpus: Corpus,
    row_length: int,
    *,
    tokens: int = 0,
    trace: Path | None = None,
) -> Evaluation:
    """Run every domain's held-out rows (about `tokens` of each; 0 is all); record to `trace`."""
    training = model.training
    model.eval()
    losses, seen, counts, sums, recorder = [], [], [], [], None
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            meter = stack.enter_context(Meter(model))
            meter.scores = True
            if trace is not None:
                recorder = stack.enter_context(_recording(model, trace))
            for domain in corpus.domains:
                rows = held_out_rows(domain, row_length, tokens)
                losses.append(_losses(model, rows, recorder, domain.name))
                seen.append(rows.shape[0] * row_length)
                counts_LE, sums_L = meter.take()
                counts.append(counts_LE.cpu().numpy())
                sums.append(sums_L.cpu().numpy() / seen[-1])
    finally:
        model.train(training)
    ratios = [d.held_out_bytes / len(d.held_out) for d in corpus.domains]
    return Evaluation(
        corpus.names,
        np.array(losses),
        np.array(seen),
        np.array(ratios),
        np.stack(counts),
        np.stack(sums),
    )


@contextmanager
def _recording(model: LanguageModel, path: Path) -> Iterator[Any]:
    """Of several processes each evaluates all: the first one's rows count, the others' check them."""
    import equipoise

    with equipoise.record(model, path, level="counts", force=True, data_rank=0) as recorder:
        yield recorder


def _losses(model: LanguageModel, rows: Tensor, recorder: Any, domain: str) -> float:
    total, device = 0.0, next(model.parameters()).device
    for part in torch.split(rows, ROWS):
        part = part.to(device)
        ids, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        with ExitStack() as stack:
            if recorder is not None:
                numbers = [recorder.add_sequence(domain=domain, tokens=ids.shape[1]) for _ in ids]
                stack.enter_context(recorder.batch(numbers))
            losses = model(ids, targets, reduction="none")
        total += float(losses.sum(dtype=torch.float64))
        if recorder is not None:
            for number in numbers:
                recorder.complete(number)
    return total / (rows.shape[0] * (rows.shape[1] - 1))

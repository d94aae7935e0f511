"""A model on held-out text: loss, load and routing weights of every domain.

Shapes: D domains, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.lab.batches import held_out_rows
from equipoise.lab.corpus import Corpus
from equipoise.lab.leak import Leak, causal_routing, measure
from equipoise.lab.meter import Meter
from equipoise.lab.model import LanguageModel
from equipoise.metrics import floors, load

if TYPE_CHECKING:
    from equipoise.lab.processes import Processes

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
    """Of the tokens predicted, [D]; nats per token / bytes per token / ln 2 are bits per byte."""
    counts: NDArray[np.int64]
    """Selections of each domain, layer and expert, [D, L, E]; [D, 0, 0] where nothing is selected."""
    weight_sums: NDArray[np.float64]
    """Mean over tokens of the sum of selected scores, before they are renormalised, [D, L]."""
    leak: Leak | None = None
    """Where layers look at later tokens: what they gain by it, if it was measured."""

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
        """MaxVio_global of equally much of each domain, as in training; mean over layers, or NaN.

        Held-out parts are not of one length; pooled, the longest one would weigh more than it did.
        """
        rates_LE = (self.counts / self.tokens[:, None, None]).mean(0)
        return float(np.mean(load.max_vio(rates_LE))) if len(rates_LE) else math.nan

    @property
    def experts_per_token(self) -> float:
        """Mean over tokens and layers; more than top-k where routers decide for themselves."""
        if not self.counts.size:
            return math.nan
        return float(self.counts.sum() / self.tokens.sum() / self.counts.shape[1])

    def max_vio_floor(self, top_k: int) -> float:
        """What chance alone gives at so many tokens, each drawn for itself.

        A mean over D domains varies as much as a pool of D^2 / sum(1 / tokens) tokens does.
        """
        if not self.counts.size:
            return math.nan
        tokens = round(len(self.tokens) ** 2 / float((1 / self.tokens).sum()))
        return floors.floor(tokens, self.counts.shape[2], top_k).mean["max_vio"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {
            "domains": list(self.domains),
            "losses": self.losses.tolist(),
            "tokens": self.tokens.tolist(),
            "bytes_per_token": self.bytes_per_token.tolist(),
            "counts": self.counts.tolist(),
            "weight_sums": self.weight_sums.tolist(),
        }
        return found if self.leak is None else {**found, "leak": self.leak.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        return cls(
            tuple(values["domains"]),
            np.array(values["losses"], dtype=np.float64),
            np.array(values["tokens"]),
            np.array(values["bytes_per_token"], dtype=np.float64),
            np.array(values["counts"], dtype=np.int64),
            np.array(values["weight_sums"], dtype=np.float64),
            Leak.from_dict(values["leak"]) if "leak" in values else None,
        )


def evaluate(
    model: LanguageModel,
    corpus: Corpus,
    row_length: int,
    *,
    tokens: int = 0,
    trace: Path | None = None,
    leak_rows: int = 0,
    processes: Processes | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Run every domain's held-out rows (about `tokens` of each; 0 is all); record to `trace`.

    processes: those that make the passes between them, the same passes as one would make alone;
    all get the whole evaluation. Their losses differ from one's in the rounding of sums only.
    Expert choice goes by its thresholds, as generation would. leak_rows: measure the `leak` of a
    model that looks at later tokens, with so many rows in a pass; 0 does not. told: called after
    every pass of this process, with how many of how many are done.
    """
    training = model.training
    model.eval()
    rows = [held_out_rows(domain, row_length, tokens) for domain in corpus.domains]
    seen_D = np.array([len(found) * row_length for found in rows])
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(causal_routing(model))
            meter = stack.enter_context(Meter(model))
            meter.scores = True
            recorder = stack.enter_context(_recording(model, trace)) if trace is not None else None
            losses_D, sums_DL, counts_DLE = _passes(
                model, _dealt(rows, processes), corpus.names, meter, recorder, told
            )
        if processes is not None:
            for part in (losses_D, sums_DL, counts_DLE):
                processes.total(part)
        leak = measure(model, corpus, row_length, leak_rows, tokens) if leak_rows else None
    finally:
        model.train(training)
    size_V = corpus.token_bytes()
    ratios = [float(size_V[found[:, 1:].numpy()].mean()) for found in rows]
    return Evaluation(
        corpus.names,
        losses_D.cpu().numpy() / seen_D,
        seen_D,
        np.array(ratios),
        counts_DLE.cpu().numpy(),
        sums_DL.cpu().numpy() / seen_D[:, None],
        leak,
    )


@contextmanager
def _recording(model: LanguageModel, path: Path) -> Iterator[Any]:
    """Every process records the passes that it makes."""
    import equipoise

    with equipoise.record(model, path, level="counts", force=True) as recorder:
        yield recorder


def _dealt(rows: Sequence[Tensor], processes: Processes | None) -> list[tuple[int, Tensor]]:
    """The passes of this process: a domain's number, and rows [B, S + 1] of it.

    Where all have to make each pass together, one without rows joins the last with none.
    """
    parts = [(d, part) for d, found in enumerate(rows) for part in torch.split(found, ROWS)]
    if processes is None or processes.count == 1:
        return parts
    mine = parts[processes.rank :: processes.count]
    if processes.in_step and len(mine) * processes.count < len(parts):
        mine.append((0, rows[0][:0]))
    return mine


def _passes(
    model: LanguageModel,
    parts: Sequence[tuple[int, Tensor]],
    domains: Sequence[str],
    meter: Meter,
    recorder: Any,
    told: Callable[[int, int], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the passes: losses [D], selected scores [D, L], float64, selections [D, L, E]."""
    device = next(model.parameters()).device
    losses_D = torch.zeros(len(domains), dtype=torch.float64, device=device)
    counts_LE, sums_L, _ = meter.take()
    counts_DLE = counts_LE.new_zeros(len(domains), *counts_LE.shape)
    sums_DL = sums_L.new_zeros(len(domains), *sums_L.shape)
    for done, (domain, part) in enumerate(parts):
        losses_D[domain] += _losses(model, part.to(device), recorder, domains[domain])
        counts_LE, sums_L, _ = meter.take()
        counts_DLE[domain] += counts_LE
        sums_DL[domain] += sums_L
        told(done + 1, len(parts))
    return losses_D, sums_DL, counts_DLE


def _losses(model: LanguageModel, rows: Tensor, recorder: Any, domain: str) -> Tensor:
    """The sum over the tokens of a pass, float64."""
    ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    numbers = []
    with ExitStack() as stack:
        if recorder is not None:
            numbers = [recorder.add_sequence(domain=domain, tokens=ids.shape[1]) for _ in ids]
            stack.enter_context(recorder.batch(numbers))
        losses: Tensor = model(ids, targets, reduction="none")
    for number in numbers:
        recorder.complete(number)
    return losses.sum(dtype=torch.float64)

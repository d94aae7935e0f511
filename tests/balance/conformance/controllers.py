"""Every controller: how it is tried, and its rule written down for one layer of the full batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.balance import (
    PID,
    Bias,
    DropRate,
    Loss,
    MomentumTanh,
    Multiplicative,
    Proportional,
    Quantile,
    QuantileHistogram,
    RMSNormalised,
    Sign,
    TargetMaxVio,
)
from equipoise.models import discover
from tests.balance.conformance.models import EXPERTS, TOP_K, Batch, batch, build
from tests.balance.conformance.settings import WITH_ALL_TERMS, Runner, Setting, Wrap

STEPS = 3
TOLERANCE = 1e-6
RATE = 0.03


@dataclass
class Seen:
    """What one layer saw in one step, and what its rule remembers."""

    bias_E: Tensor
    counts_E: Tensor
    pieces: list[tuple[Tensor, Tensor]]
    """Compared scores [T, E] of valid tokens, and counts, of each rank's micro-batches."""
    memory: dict[str, Tensor]

    @property
    def violation_E(self) -> Tensor:
        """(mean - count) / mean."""
        return 1 - self.counts_E / self.counts_E.mean()


Rule = Callable[[Seen], Tensor]


@dataclass(frozen=True)
class Tried:
    """A controller and its rule."""

    controller: Any
    rule: Rule
    scope: str = "global"
    binned: bool = False
    """Right to two widths of a bin."""
    splits: bool = True
    """The same under any split."""
    is_bias: bool = True


def sign(seen: Seen) -> Tensor:
    return seen.bias_E + RATE * seen.violation_E.sign()


def sign_centred(seen: Seen) -> Tensor:
    step = seen.violation_E.sign()
    return seen.bias_E + RATE * (step - step.mean())


def sign_micro(seen: Seen) -> Tensor:
    steps = [(counts.mean() - counts).sign() for _, counts in seen.pieces]
    return seen.bias_E + RATE * torch.stack(steps).mean(0)


def proportional(seen: Seen) -> Tensor:
    return seen.bias_E + RATE * seen.violation_E


def rms(seen: Seen) -> Tensor:
    return seen.bias_E + RATE * seen.violation_E / seen.violation_E.square().mean().sqrt()


def multiplicative(seen: Seen) -> Tensor:
    return (seen.bias_E + RATE * seen.violation_E.sign()).clamp(min=1e-2)


def momentum_tanh(seen: Seen) -> Tensor:
    step = RATE * torch.tanh(2 * seen.violation_E)
    before = seen.memory.get("momentum", torch.zeros(EXPERTS))
    seen.memory["momentum"] = 0.5 * before + 0.5 * (step - step.mean())
    return seen.bias_E + seen.memory["momentum"]


def pid(seen: Seen) -> Tensor:
    error = 1 / EXPERTS - seen.counts_E / seen.counts_E.sum()
    total = seen.memory.get("total", torch.zeros(EXPERTS)) + error
    change = error - seen.memory.get("before", error)
    seen.memory.update(total=total, before=error)
    return seen.bias_E + 0.3 * (error + 0.1 * total + 0.2 * change)


def quantile_of(scores_TE: Tensor, bias_E: Tensor) -> Tensor:
    """By sorting: the bias at which each expert would be taken by its fair share of the tokens."""
    biased = scores_TE + bias_E
    cutoff = biased.sort(-1, descending=True).values[:, TOP_K]
    need = (cutoff.unsqueeze(1) - scores_TE).sort(0).values
    fair = len(scores_TE) * TOP_K / EXPERTS
    if fair == int(fair):
        return (need[int(fair) - 1] + need[int(fair)]) / 2
    return need[math.ceil(fair) - 1]


def quantile(seen: Seen) -> Tensor:
    pieces = [scores for scores, _ in seen.pieces if len(scores)]
    found = sum(quantile_of(scores, seen.bias_E) * len(scores) for scores in pieces)
    assert isinstance(found, Tensor)
    found = found / sum(len(scores) for scores in pieces)
    return found - found.mean()


def quantile_of_all(seen: Seen) -> Tensor:
    found = quantile_of(torch.cat([scores for scores, _ in seen.pieces]), seen.bias_E)
    return found - found.mean()


def target_max_vio(seen: Seen) -> Tensor:
    vio = seen.counts_E.max() / seen.counts_E.mean() - 1
    return (seen.bias_E * math.exp(0.1 * min(float(vio) / 0.5 - 1, 1.0))).clamp(1e-5, 1e-1)


def drop_rate(seen: Seen) -> Tensor:
    return seen.bias_E * 0.9


BINS = 1000
TELLING = ("Sign", "Sign, scope=micro", "MomentumTanh", "QuantileHistogram", "TargetMaxVio")
"""One of each kind: by counts, by passes, with memory, by scores, of a weight."""
CONTROLLERS: dict[str, Tried] = {
    "Sign": Tried(Sign(RATE), sign),
    "Sign, centred": Tried(Sign(RATE, centred=True), sign_centred),
    "Sign, scope=micro": Tried(Sign(RATE), sign_micro, scope="micro", splits=False),
    "Proportional": Tried(Proportional(RATE), proportional),
    "Multiplicative": Tried(Multiplicative(RATE), multiplicative),
    "RMSNormalised": Tried(RMSNormalised(RATE), rms),
    "MomentumTanh": Tried(MomentumTanh(RATE), momentum_tanh),
    "PID": Tried(PID(0.3, integral=0.1, derivative=0.2), pid),
    "Quantile": Tried(Quantile(), quantile, splits=False),
    "QuantileHistogram": Tried(QuantileHistogram(bins=BINS), quantile_of_all, binned=True),
    "TargetMaxVio": Tried(TargetMaxVio(0.5, 0.1), target_max_vio, is_bias=False),
    "DropRate": Tried(DropRate(beta=0.9), drop_rate, is_bias=False),
}


def tried_in(setting: Setting, every: bool = False) -> dict[str, Tried]:
    """All controllers under each split, one of each kind where only the way of running differs."""
    if every or setting.name in WITH_ALL_TERMS:
        return CONTROLLERS
    return {name: CONTROLLERS[name] for name in TELLING}


def run_bias(
    tried: Tried, family: str, setting: Setting, *, rank: int = 0, wrap: Wrap | None = None
) -> list[Tensor]:
    """The biases [L, E] before the first step and after each."""
    bias = Bias(tried.controller, scope=tried.scope)  # type: ignore[arg-type]
    runner = Runner(family, setting, [bias], rank=rank, wrap=wrap)
    held = [torch.stack(runner.handle.bias())]
    for step in range(STEPS):
        runner.step(step % 2)
        held.append(torch.stack(runner.handle.bias()))
    runner.handle.detach()
    return held


def run_weights(
    tried: Tried, family: str, setting: Setting, *, rank: int = 0, wrap: Wrap | None = None
) -> list[Tensor]:
    """The weights of a steered loss [L, 1] before the first step and after each."""
    loss = Loss("switch", "global", weight=1e-2, controller=tried.controller)
    runner = Runner(family, setting, [loss], rank=rank, wrap=wrap)
    held = [runner.handle.book.weights[0].unsqueeze(1)]
    for step in range(STEPS):
        runner.step(step % 2)
        held.append(runner.handle.book.weights[0].unsqueeze(1))
    runner.handle.detach()
    return held


def expected(tried: Tried, family: str, setting: Setting, held: Sequence[Tensor]) -> list[Tensor]:
    """What the rule makes of each step's bias, from a forward pass of the full batch."""
    memory: list[dict[str, Tensor]] = [{} for _ in held[0]]
    out = []
    for step in range(STEPS):
        selected = _selections(family, setting, step % 2, tried, held[step])
        rows = [
            tried.rule(Seen(bias, counts, pieces, remembered))
            for bias, (counts, pieces), remembered in zip(held[step], selected, memory, strict=True)
        ]
        out.append(torch.stack(rows))
    return out


def follows(tried: Tried, held: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether each step made what the rule says; a histogram to two widths of its bins.

    One for the quantile, one for the mean that is taken out.
    """
    in_float32 = all(after.dtype == torch.float32 for after in held)
    if not tried.binned:
        return in_float32 and deviation(held, wanted) <= TOLERANCE
    for before, after, right in zip(held, held[1:], wanted, strict=False):
        allowed = 2 * float(before.max() - before.min() + 2) / BINS
        if not float((after - right).abs().max()) <= allowed:
            return False
    return in_float32


def deviation(held: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference from the rule in any step, relative to the step's largest entry."""
    each = [
        (after - right).abs().max() / right.abs().max()
        for after, right in zip(held[1:], wanted, strict=True)
    ]
    return float(torch.stack(each).max())


def _selections(
    family: str, setting: Setting, number: int, tried: Tried, bias_LE: Tensor
) -> list[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
    """Counts of each layer, and scores and counts by rank and micro-batch."""
    model, data = build(family).to(setting.dtype), batch(setting.data, number)
    if tried.is_bias:
        multiply = tried.controller.acts == "multiply"
        for gate, bias_E in zip(_gates(model), bias_LE, strict=True):
            _select_with(gate, family, bias_E, multiply)
    sites, split = discover(model), setting.split
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {site.path: [] for site in sites}
    for m in range(split.micro):
        for r in range(split.ranks):
            rows = data.rows(*split.rows(m, r))
            for routing in _routings(model, sites, rows):
                valid_T = rows.valid_BS.reshape(-1)
                scores = routing.scores_TE[valid_T].float()
                gate = scores.softmax(-1) if family == "mixtral" else scores.sigmoid()
                ids = routing.expert_ids_TK[valid_T].reshape(-1)
                counts = torch.bincount(ids, minlength=EXPERTS).float()
                pieces[routing.path].append((gate, counts))
    return [(torch.stack([c for _, c in pieces[s.path]]).sum(0), pieces[s.path]) for s in sites]


def _routings(model: Any, sites: Sequence[Any], piece: Batch) -> list[Any]:
    found: list[Any] = []
    taps = [site.observe(found.append) for site in sites]
    with torch.no_grad():
        model(**piece.given)
    for tap in taps:
        tap.remove()
    return found


def _gates(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def _select_with(gate: Any, family: str, bias_E: Tensor, multiply: bool) -> None:
    """A router that selects with a bias, as one writes it by hand."""
    if family == "deepseek_v3" and not multiply:
        gate.e_score_correction_bias.data = bias_E.clone()
        return

    def mixtral(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, gate.hidden_dim) @ gate.weight.T
        probs = logits.float().softmax(-1)
        ids = (probs * bias_E if multiply else probs + bias_E).topk(TOP_K).indices
        weights = probs.gather(1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    def deepseek_v3(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, gate.hidden_dim).float() @ gate.weight.float().T
        scores = logits.sigmoid()
        choice = scores + gate.e_score_correction_bias
        groups = choice.view(len(choice), gate.num_group, -1)
        best = groups.topk(2).values.sum(-1).topk(gate.topk_group).indices
        out = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, best, False)
        choice = choice.masked_fill(out.repeat_interleave(groups.shape[2], 1), -torch.inf)
        ids = (choice * bias_E).topk(TOP_K).indices
        weights = scores.gather(1, ids)
        return logits, weights / weights.sum(-1, keepdim=True) * gate.routed_scaling_factor, ids

    gate.forward = mixtral if family == "mixtral" else deepseek_v3

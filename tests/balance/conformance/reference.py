"""What the gradients have to be: losses written down from one forward pass over the full batch.

In float64, so that what differs by rounding is what is tested.

Nothing here is taken from `equipoise.balance`. The rows of the global batch are divided into
micro-batches and ranks only to say over which of them a scope takes its loads and its means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from equipoise.models import discover
from tests.balance.conformance.models import (
    EXPERTS,
    GROUPS,
    LENGTH,
    ROWS,
    TOP_K,
    Batch,
    batch,
    build,
)

GROUP_OF_E = torch.arange(EXPERTS) // (EXPERTS // GROUPS)
DECAY = 0.5
WIDE = ("group", "global", "running", "subset")
"""Scopes whose mean probability is that of the micro-batch on all ranks."""
Draws = dict[tuple[int, int, int], Tensor]
"""Rows drawn for the subset scope, by micro-batch, rank and layer; within the micro-batch."""


@dataclass(frozen=True)
class Term:
    """A balancing loss to be tried: objective, scope, and whose selections make the load."""

    objective: str
    scope: str
    count: str = "selected"
    kind: str = ""

    @property
    def name(self) -> str:
        """One word, also the loss's name."""
        extra = "".join(f"_{x}" for x in (self.kind, self.count) if x and x != "selected")
        return f"{self.objective}_{self.scope}{extra}"


@dataclass(eq=False)
class Heard:
    """One forward pass over the full batch, with its graph."""

    model: Any
    main: Tensor
    scores: list[Tensor]
    ids: list[Tensor]
    probs: list[Tensor]
    outputs: list[Tensor]
    """What each selected expert gives by itself [T, K, D], from its weights."""
    valid_T: Tensor
    segment_T: Tensor


@dataclass(frozen=True)
class Split:
    """The full batch in `micro` micro-batches of `ranks` ranks, contiguous rows each."""

    micro: int = 1
    ranks: int = 1

    def rows(self, micro: int, rank: int) -> tuple[int, int]:
        """First and last batch row, exclusive, of one rank's micro-batch."""
        size = ROWS // (self.micro * self.ranks)
        start = (micro * self.ranks + rank) * size
        return start, start + size

    def tokens(self, micro: int, rank: int) -> Tensor:
        """The same as token rows."""
        start, end = self.rows(micro, rank)
        return torch.arange(start * LENGTH, end * LENGTH)


@cache
def heard(family: str, kind: str, number: int, rounded: Split | None = None) -> Heard:
    """The full batch through a model that nothing is attached to, in one piece and in float64.

    With `rounded`, in bfloat16 and the pieces of that split: a router's scores feel how many rows
    are multiplied at once.
    """
    model, data = build(family), batch(kind, number)
    pieces = [data]
    if rounded is None:
        model = model.double()
        model.set_experts_implementation("eager")
    else:
        model = model.bfloat16()
        micros, ranks = range(rounded.micro), range(rounded.ranks)
        pieces = [data.rows(*rounded.rows(m, r)) for m in micros for r in ranks]
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in discover(model)]
    main = torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        loss_, layers = _listened(model, piece)
        main = main + loss_.double()
        for layer, of_piece in zip(found, layers, strict=True):
            layer.append(of_piece)
    scores, ids, outputs = zip(
        *([torch.cat(column) for column in zip(*layer, strict=True)] for layer in found),
        strict=True,
    )
    gates = [s.softmax(-1) if family == "mixtral" else s.sigmoid() for s in scores]
    probs = [g / g.sum(-1, keepdim=True) for g in gates]
    rows = (data.valid_BS.reshape(-1), data.segment_BS.reshape(-1))
    return Heard(model, main, list(scores), list(ids), probs, list(outputs), *rows)


def _listened(model: Any, piece: Batch) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The user's loss; scores in float64, ids, and the experts' outputs of each layer."""
    sites, found, hidden = discover(model), {}, {}
    taps = [site.observe(lambda r: found.__setitem__(r.path, r)) for site in sites]
    hooks = [
        site.module.register_forward_pre_hook(lambda m, args: hidden.__setitem__(m, args[0]))
        for site in sites
    ]
    main = piece.main_loss(model(**piece.given).logits)
    for handle in (*taps, *hooks):
        handle.remove()
    layers = []
    for site in sites:
        routing = found[site.path]
        outputs = experts_of(site.module, hidden[site.module], routing.expert_ids_TK)
        layers.append((routing.scores_TE.double(), routing.expert_ids_TK, outputs.double()))
    return main, layers


def experts_of(module: Any, hidden_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """down (silu(gate x) * up x) of each selected expert [T, K, D].

    In bfloat16 by the module itself: the sign of a product of two outputs may hang on their rounding.
    """
    if hidden_TD.dtype == torch.bfloat16:
        rows, ids = hidden_TD.repeat_interleave(TOP_K, 0), ids_TK.reshape(-1, 1)
        ones = torch.ones(ids.shape, dtype=rows.dtype)
        found: Tensor = module.forward(rows, ids, ones)
        return found.view(*ids_TK.shape, -1)
    inner = torch.einsum("tkfd,td->tkf", module.gate_up_proj[ids_TK], hidden_TD)
    gate, up = inner.chunk(2, dim=-1)
    act = torch.nn.functional.silu(gate) * up
    return torch.einsum("tkdf,tkf->tkd", module.down_proj[ids_TK], act)


def value(objective: str, load: Tensor, prob_E: Tensor) -> Tensor:
    """An objective of load and mean probability, as one writes it down."""
    size = len(prob_E)
    if objective == "switch":
        return size * (load * prob_E).sum()
    if objective in ("squared", "load_cv"):
        return size * (load + prob_E - prob_E.detach()).square().sum()
    if objective == "importance":
        return 1 + prob_E.var(unbiased=False) / prob_E.mean().square()
    prob_G = torch.stack([prob_E[g == GROUP_OF_E].sum() for g in range(GROUPS)])
    if objective == "group":
        load = torch.stack([load[g == GROUP_OF_E].mean() for g in range(GROUPS)]) * size
        return (load * prob_G).sum()
    assert objective == "communication"
    return GROUPS * (load * prob_G).sum()


def token_value(objective: str, scores_TE: Tensor, probs_TE: Tensor) -> Tensor:
    """An objective of single tokens, [T]."""
    if objective == "z":
        return scores_TE.exp().sum(-1).log().square()
    return 1 + (probs_TE * probs_TE.log()).sum(-1) / math.log(EXPERTS)


def projection_value(outputs_TKD: Tensor) -> Tensor:
    """Output orthogonality: mean length of one output's projection on another's, [T]."""
    slots = outputs_TKD.unbind(1)
    found = [
        ((a * b).sum(-1) / b.square().sum(-1)).abs() * b.square().sum(-1).sqrt()
        for i, a in enumerate(slots)
        for j, b in enumerate(slots)
        if i != j
    ]
    return torch.stack(found).mean(0)


def weight_value(kind: str, weight_ED: Tensor) -> Tensor:
    """Router orthogonality."""
    if kind == "ernie":
        weight_ED = weight_ED / weight_ED.square().sum(-1, keepdim=True).sqrt()
    excess = weight_ED @ weight_ED.T - torch.eye(EXPERTS, dtype=weight_ED.dtype)
    return (excess.square() if kind == "ernie" else excess.abs()).mean()


def counted(term: Term, run: Heard, layer: int, rows: Tensor) -> Tensor:
    """Selections of each expert, or sendings to each group, by loops over token rows."""
    ids = run.ids[layer][rows]
    if term.count == "unbiased":
        ids = run.scores[layer][rows].topk(TOP_K).indices
    if term.objective == "communication":
        reached = [sorted({int(GROUP_OF_E[e]) for e in row}) for row in ids.tolist()]
        flat = [g for row in reached for g in row]
        return torch.tensor([flat.count(g) for g in range(GROUPS)], dtype=torch.float64)
    flat = ids.reshape(-1).tolist()
    return torch.tensor([flat.count(e) for e in range(EXPERTS)], dtype=torch.float64)


@dataclass(frozen=True)
class Unit:
    """A set of token rows that one value of the objective is taken over."""

    rows: Tensor
    share: float
    """What the value counts in the loss of the step."""
    micro: int = 0
    whole: Tensor | None = None
    """All rows of the micro-batch, padding included, rank by rank."""


def units(term: Term, run: Heard, split: Split, expected: int | None) -> list[Unit]:
    """The values whose weighted sum is the loss of a step, at one split."""
    micros, ranks = range(split.micro), range(split.ranks)
    pieces = {(m, r): valid_of(run, split.tokens(m, r)) for m in micros for r in ranks}
    scope = "micro" if term.objective == "score_variance" else term.scope
    if scope == "exact":
        return [Unit(torch.cat(list(pieces.values())), 1.0)]
    if scope in WIDE:
        out = []
        for m in micros:
            rows = torch.cat([pieces[m, r] for r in ranks])
            share = 1 / split.micro if expected is None else len(rows) / expected
            out.append(Unit(rows, share, m))
        return out
    each = 1 / (split.micro * split.ranks)
    if scope in ("micro", "previous"):
        return [Unit(rows, each, m) for (m, _), rows in pieces.items()]
    assert scope == "sequence"
    out = []
    for (m, _), rows in pieces.items():
        names = run.segment_T[rows].unique().tolist()
        out += [Unit(rows[run.segment_T[rows] == n], each / len(names), m) for n in names]
    return out


def valid_of(run: Heard, rows: Tensor) -> Tensor:
    """Those of the rows that are tokens."""
    return rows[run.valid_T[rows]]


def load_of(
    term: Term,
    run: Heard,
    layer: int,
    unit: Unit,
    split: Split,
    history: Sequence[Heard],
    draws: Draws,
) -> Tensor:
    """The load that an objective takes, as a scope defines it."""
    rows = unit.rows
    if term.scope == "global":
        rows = torch.cat(
            [split.tokens(m, r) for m in range(unit.micro + 1) for r in range(split.ranks)]
        )
    elif term.scope == "subset":
        own = [split.tokens(unit.micro, r)[draws[unit.micro, r, layer]] for r in range(split.ranks)]
        rows = torch.cat(own)
    counts = counted(term, run, layer, valid_of(run, rows))
    past = [counted(term, h, layer, h.valid_T.nonzero()[:, 0]) for h in history]
    if term.scope == "previous":
        counts = past[-1] if past else torch.ones_like(counts)
    elif term.scope == "running":
        for ago, old in enumerate(reversed(past), start=1):
            counts = counts + DECAY**ago * old
    return counts / counts.sum().clamp(min=1)


def loss(
    term: Term,
    run: Heard,
    split: Split,
    history: Sequence[Heard] = (),
    draws: Draws | None = None,
    expected: int | None = None,
) -> Tensor:
    """The loss of a step: mean over layers of the weighted values of all units."""
    total = run.main * 0
    for layer, (scores, probs) in enumerate(zip(run.scores, run.probs, strict=True)):
        if term.objective == "router_orthogonality":
            total = total + weight_value(term.kind, routers(run.model)[layer].double())
            continue
        for unit in units(term, run, split, expected):
            rows = unit.rows
            if not len(rows):
                continue
            if term.objective == "output_orthogonality":
                found = projection_value(run.outputs[layer][rows]).mean()
            elif term.objective in ("z", "entropy"):
                found = token_value(term.objective, scores[rows], probs[rows]).mean()
            elif term.objective == "score_variance":
                found = -probs[rows].var(0, unbiased=False).mean()
            else:
                load = load_of(term, run, layer, unit, split, history, draws or {})
                found = value(term.objective, load, probs[rows].mean(0))
            total = total + unit.share * found
    return total / len(run.scores)


def routers(model: Any) -> list[Tensor]:
    """The router weights in the order of the layers."""
    return [p for name, p in model.named_parameters() if name.endswith("gate.weight")]


def gradients(run: Heard, total: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss for every parameter."""
    named = dict(run.model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def largest(gradient: dict[str, Tensor]) -> float:
    """The largest entry of a gradient; it has to have one."""
    found = max(float(g.abs().max()) for g in gradient.values())
    assert found > 0
    return found

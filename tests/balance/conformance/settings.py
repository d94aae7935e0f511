"""Ways to run one and the same step: splits, checkpointing, compilation, orders of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from equipoise.balance import Bias, Handle, Loss, Running, attach
from tests.balance.conformance.models import GROUPS, Batch, batch, build
from tests.balance.conformance.reference import DECAY, Draws, Split, Term

WEIGHT = 1.0
ONE = Split()
Wrap = Callable[[nn.Module], nn.Module]
MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@dataclass(frozen=True)
class Setting:
    """How a step is run."""

    name: str
    split: Split = ONE
    data: str = "padded"
    checkpointing: str = "none"
    """"none", "reentrant", "non-reentrant", "selective"."""
    backend: str | None = None
    """Of torch.compile."""
    interleaved: bool = False
    """All forward passes before the first backward pass, as in a pipeline."""
    evaluates: bool = False
    """Passes of no consequence between micro-batches."""
    expects: bool = False
    """Say how many tokens the step has."""
    parallel: str = "none"
    """"none", "ddp", "fsdp2"."""
    reduction: str = "mean"
    """What becomes of the ranks' gradients."""
    dtype: torch.dtype = torch.float32
    """Of the model."""


SINGLE = (
    Setting("1 micro-batch", data="full"),
    Setting("2 micro-batches", Split(2)),
    Setting("4 micro-batches", Split(4)),
    Setting("4, tokens expected", Split(4), expects=True),
    Setting("packed", Split(2), data="packed"),
    Setting("reentrant", Split(2), checkpointing="reentrant"),
    Setting("non-reentrant", Split(2), checkpointing="non-reentrant"),
    Setting("selective", Split(2), checkpointing="selective"),
    Setting("evaluation between", Split(2), evaluates=True),
    Setting("interleaved", Split(4), interleaved=True),
    Setting("interleaved, reentrant", Split(4), checkpointing="reentrant", interleaved=True),
    Setting(
        "interleaved, non-reentrant", Split(4), checkpointing="non-reentrant", interleaved=True
    ),
    Setting("bfloat16", Split(2), dtype=torch.bfloat16),
)
COMPILED = (
    Setting("compiled", Split(2), backend="aot_eager"),
    Setting(
        "compiled, non-reentrant", Split(2), checkpointing="non-reentrant", backend="aot_eager"
    ),
    Setting("inductor", Split(2), backend="inductor"),
)
PARALLEL = (
    Setting("DDP", Split(1, 2), data="full", parallel="ddp"),
    Setting("DDP, 4 micro-batches", Split(4, 2), parallel="ddp"),
    Setting("DDP, reentrant", Split(2, 2), checkpointing="reentrant", parallel="ddp"),
    Setting("DDP, non-reentrant", Split(2, 2), checkpointing="non-reentrant", parallel="ddp"),
    Setting("DDP, a rank without tokens", Split(1, 2), data="empty", parallel="ddp"),
    Setting("DDP, gradients summed", Split(2, 2), parallel="ddp", reduction="sum"),
    Setting("FSDP2", Split(1, 2), data="full", parallel="fsdp2"),
    Setting("FSDP2, 2 micro-batches", Split(2, 2), parallel="fsdp2"),
    Setting("FSDP2, reentrant", Split(2, 2), checkpointing="reentrant", parallel="fsdp2"),
    Setting("FSDP2, non-reentrant", Split(2, 2), checkpointing="non-reentrant", parallel="fsdp2"),
    Setting("FSDP2, a rank without tokens", Split(1, 2), data="empty", parallel="fsdp2"),
    Setting("FSDP2, gradients summed", Split(2, 2), parallel="fsdp2", reduction="sum"),
)
SETTINGS = (*SINGLE, *COMPILED, *PARALLEL)
_LIKE_OTHERS = ("DDP, reentrant", "FSDP2, non-reentrant", "FSDP2, a rank without tokens")
TESTED_PARALLEL = tuple(s for s in PARALLEL if s.name not in _LIKE_OTHERS)
"""The tests leave the rest to the script."""

LOADS = ("switch", "squared", "importance", "load_cv", "group", "communication")
TOKENS = ("z", "entropy", "output_orthogonality")
SCOPES = ("sequence", "micro", "group", "global", "exact", "running", "subset", "previous")
TERMS = (
    *(Term(objective, scope) for objective in LOADS for scope in SCOPES),
    Term("switch", "global", count="unbiased"),
    Term("switch", "global", count="kept"),
    *(Term(o, scope) for o in TOKENS for scope in ("micro", "group", "exact")),
    Term("score_variance", "micro"),
    Term("router_orthogonality", "micro", kind="ernie"),
    Term("router_orthogonality", "micro", kind="simbal"),
)

TELLING = tuple(
    t
    for t in TERMS
    if t.objective in ("switch", "z", "score_variance")
    or (
        t.objective in ("importance", "communication") and t.scope in ("sequence", "group", "exact")
    )
    or (t.objective == "output_orthogonality" and t.scope == "group")
    or t.kind == "ernie"
)
"""Terms that between them take every way that a pass's counts, scores and gradients can go."""
WITH_ALL_TERMS = (
    *("1 micro-batch", "2 micro-batches", "4 micro-batches"),
    *("DDP, 4 micro-batches", "FSDP2, 2 micro-batches"),
)
"""Settings in which the tests try all methods, not only telling ones, as the script does in each."""


def terms_of(setting: Setting, every: bool = False) -> tuple[Term, ...]:
    """All terms under each split; telling ones where only the way of running differs."""
    return TERMS if every or setting.name in WITH_ALL_TERMS else TELLING


def loss_of(term: Term, weight: Callable[[int], float] | float = WEIGHT) -> Loss:
    """The loss that a term asks for."""
    options: dict[str, Any] = {}
    if term.objective in ("group", "communication"):
        options["groups"] = GROUPS
    if term.kind:
        options["kind"] = term.kind
    scope = Running(decay=DECAY) if term.scope == "running" else term.scope
    return Loss(
        term.objective, scope, weight=weight, count=term.count, options=options, name=term.name
    )


def prepared(family: str, setting: Setting, wrap: Wrap | None = None) -> Any:
    """A model under the setting's checkpointing, parallelism and compilation."""
    model = build(family).to(setting.dtype)
    if setting.checkpointing != "none":
        kwargs: dict[str, Any] = {"use_reentrant": setting.checkpointing == "reentrant"}
        if setting.checkpointing == "selective":
            kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if wrap is not None:
        model = wrap(model)
    if setting.backend is not None:
        whole = setting.checkpointing == "none"  # see docs/conformance.md
        model = torch.compile(model, backend=setting.backend, fullgraph=whole)
    return model


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in MATRIX_PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@dataclass
class Outcome:
    """What one step gave: the gradient of every parameter, and the rows drawn on this rank."""

    gradients: dict[str, Tensor]
    draws: Draws = field(default_factory=dict)


class Runner:
    """Attaches terms to a model once, and runs steps of a setting on it."""

    def __init__(
        self,
        family: str,
        setting: Setting,
        terms: Sequence[Loss | Bias],
        *,
        rank: int = 0,
        wrap: Wrap | None = None,
        learning_rate: float = 0.0,
    ) -> None:
        self.setting, self.rank = setting, rank
        self.model = prepared(family, setting, wrap)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate)
        self.handle: Handle = attach(
            self.model,
            *terms,
            optimizer=self.optimizer,
            accumulation=setting.split.micro,
            reduction=setting.reduction,
        )
        self._exact = any(scope.late for scope in self.handle.book.scopes)

    def step(self, number: int) -> Outcome:
        """One optimizer step on batch `number`, 0 or 1."""
        data = batch(self.setting.data, number)
        split = self.setting.split
        pieces = [data.rows(*split.rows(m, self.rank)) for m in range(split.micro)]
        if self.setting.expects:
            self.handle.expect(tokens=int(data.valid_BS.sum()))
        if self._exact and not self.setting.interleaved:
            with self.handle.preview(), torch.no_grad():
                for piece in pieces:
                    self.model(**piece.given)
        drawn = _recorded_draws(self.handle)
        self._train(pieces, number)
        self.optimizer.step()
        del self.handle.book.subset
        found = _gradients(self.model)
        self.optimizer.zero_grad()
        layers = len(self.handle.sites)
        draws = {(i // layers, self.rank, i % layers): d for i, d in enumerate(drawn)}
        return Outcome(found, draws)

    def _train(self, pieces: Sequence[Batch], number: int) -> None:
        waiting: list[Tensor] = []
        for index, piece in enumerate(pieces):
            with _unsynced(self.model, last=index == len(pieces) - 1):
                averaged = self.setting.split.ranks if self.setting.reduction == "mean" else 1
                loss = piece.main_loss(self.model(**piece.given).logits) * averaged
                if self.setting.evaluates:
                    self._evaluate(number)
                if self.setting.interleaved:
                    waiting.append(loss)
                else:
                    loss.backward()
        for loss in waiting:
            loss.backward()

    def _evaluate(self, number: int) -> None:
        other = batch(self.setting.data, 1 - number)
        with torch.no_grad():
            self.model(**other.given)
        self.model.eval()
        self.model(**other.given)
        self.model.train()


def _recorded_draws(handle: Handle) -> list[Tensor]:
    """The rows that the subset scope draws from now on."""
    drawn: list[Tensor] = []
    book: Any = handle.book
    inner = type(book).subset.__get__(book)

    def subset(*args: Any) -> Tensor:
        drawn.append(inner(*args))
        return drawn[-1]

    book.subset = subset
    return drawn


def _unsynced(model: Any, *, last: bool) -> Any:
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        grad = torch.zeros(parameter.shape) if grad is None else grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("module.").removeprefix("_orig_mod.")] = grad.clone()
    return found


def chunks(terms: Sequence[Term]) -> list[tuple[Term, ...]]:
    """Terms that are attached together: the scopes of an objective; all exact ones by themselves."""
    exact = tuple(t for t in terms if t.scope == "exact")
    rest = [t for t in terms if t.scope != "exact"]
    names = dict.fromkeys(t.objective for t in rest)
    return [exact, *(tuple(t for t in rest if t.objective == name) for name in names)]


def run(
    family: str, setting: Setting, terms: Sequence[Term], *, rank: int = 0, wrap: Wrap | None = None
) -> Iterator[Outcome]:
    """One step for each term, in which that one weighs and the others do not; batches alternate."""
    active = {"term": terms[0]}

    def weight(_: int, term: Term) -> float:
        return WEIGHT if active["term"] is term else 0.0

    losses = [loss_of(term, partial(weight, term=term)) for term in terms]
    runner = Runner(family, setting, losses, rank=rank, wrap=wrap)
    for step, term in enumerate(terms):
        active["term"] = term
        yield runner.step(step % 2)
    runner.handle.detach()

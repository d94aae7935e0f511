"""What is counted: one flat tensor per micro-batch, with a view per statistic and bank of layers.

Layers with the same number of experts form a bank, so that everything is stacked over layers and a
micro-batch costs one collective, whatever the number of layers: E numbers per layer and statistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from equipoise.balance.layers import Layer

Statistic = tuple[Any, ...]
"""("selected",), ("unbiased",), ("kept",), ("sent", groups), ("subset", seed), ("subset", seed,
groups), ("prob",), ("tokens",)."""
SELECTED: Statistic = ("selected",)
PROB: Statistic = ("prob",)
TOKENS: Statistic = ("tokens",)
KEPT: Statistic = ("kept",)
_ONE = torch.ones((), dtype=torch.float64)


@dataclass(frozen=True)
class Bank:
    """Layers with the same number of experts, and where their rows stand."""

    index: int
    layers: tuple[int, ...]
    num_experts: int


@dataclass(frozen=True)
class Section:
    """Where a statistic of a bank lies in the flat tensor: [rows, columns], the first for nothing.

    The first column takes what is not counted: padding, and slots that went to no expert (-1).
    """

    start: int
    rows: int
    columns: int


class Layout:
    """The order of the statistics in the flat tensor of a micro-batch."""

    def __init__(self, banks: Sequence[Bank], statistics: Iterable[Statistic]) -> None:
        self.banks = tuple(banks)
        self.statistics = tuple(dict.fromkeys((SELECTED, *statistics, TOKENS)))
        self.sections: dict[tuple[Statistic, int], Section] = {}
        self.size = 0
        for statistic in self.statistics:
            for bank in self.banks:
                section = Section(self.size, len(bank.layers), _width(statistic, bank) + 1)
                self.sections[statistic, bank.index] = section
                self.size += section.rows * section.columns

    def empty(self, device: torch.device) -> Tensor:
        """A flat tensor of zeros; float64 holds integers exactly up to 2^53."""
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def table(self, flat: Tensor, statistic: Statistic, bank: int) -> Tensor:
        """A view of the flat tensor, [rows, columns + 1]."""
        section = self.sections[statistic, bank]
        end = section.start + section.rows * section.columns
        return flat[section.start : end].view(section.rows, section.columns)

    def row(self, flat: Tensor, statistic: Statistic, layer: Layer) -> Tensor:
        """A view of one layer's row [columns + 1]."""
        section = self.sections[statistic, layer.bank]
        return flat.narrow(0, section.start + layer.row * section.columns, section.columns)

    def counts(self, flat: Tensor, statistic: Statistic, bank: int) -> Tensor:
        """The statistic of a bank [rows, columns]."""
        return self.table(flat, statistic, bank)[:, 1:]

    def tokens(self, flat: Tensor, bank: int) -> Tensor:
        """Valid tokens of each layer of a bank [rows]."""
        return self.table(flat, TOKENS, bank)[:, 1]


def _width(statistic: Statistic, bank: Bank) -> int:
    if isinstance(statistic[-1], tuple):
        return int(max(statistic[-1])) + 1
    return 1 if statistic == TOKENS else bank.num_experts


@dataclass(eq=False)
class Pass:
    """One micro-batch: what its routers selected, and the loads that its losses use."""

    layout: Layout
    flat: Tensor
    """Counts of this rank."""
    preview: bool = False
    heard: set[int] = field(default_factory=set)
    """Layers heard so far: each once in a pass, in whatever order."""
    closed: bool = False
    work: Any = None
    """The collective under way."""
    synced: Tensor | None = None
    """Counts of all ranks, once `work` has ended."""
    loads: dict[tuple[int, int], Tensor | None] | None = None
    """By (term, bank): counts [rows, columns] that make the load; None: known at the step's end."""
    slopes: dict[int, Tensor | None] = field(default_factory=dict)
    """By bank: the gradient of one token's probabilities [rows, E]."""
    shares: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By (term, bank): the loads [rows, columns] that the gradients were made of."""
    means: dict[int, Tensor] = field(default_factory=dict)
    """By bank: this rank's mean probabilities [rows, E]."""
    seen: dict[int, list[int]] = field(default_factory=dict)
    """By bank: the rows whose mean is there, since their backward pass came."""

    def count(self, layer: Layer, statistic: Statistic, column: Tensor) -> None:
        """Add one to each of the columns named (any shape, long; 0 counts nothing)."""
        row = self.layout.row(self.flat, statistic, layer)
        column = column.reshape(-1)
        one = _ONE if column.device.type == "cpu" else _ONE.to(column.device)
        if column.device == row.device:
            row.scatter_add_(0, column, one.expand(column.shape))
        else:
            own = torch.zeros(row.shape, dtype=row.dtype, device=column.device)
            row += own.scatter_add_(0, column, one.expand(column.shape)).to(row.device)

    def see_mean(self, layer: Layer, probs_TE: Tensor, valid_T: Tensor | None) -> None:
        """Keep this rank's mean probability of a layer, for the values of losses."""
        if layer.bank not in self.means:
            rows = self.layout.sections[TOKENS, layer.bank].rows
            shape = (rows, probs_TE.shape[1])
            self.means[layer.bank] = torch.zeros(shape, device=self.flat.device)
            self.seen[layer.bank] = []
        if valid_T is None:
            mean_E = probs_TE.mean(0)
        else:
            weight_T = valid_T.to(probs_TE.dtype)
            mean_E = (weight_T @ probs_TE).div_(weight_T.sum().clamp_(min=1))
        self.means[layer.bank][layer.row] = mean_E
        self.seen[layer.bank].append(layer.row)


@dataclass(eq=False)
class Record:
    """One router's part in one micro-batch, kept until its backward pass."""

    of: Pass
    ids_TK: Tensor
    valid_T: Tensor | None
    segment_T: Tensor | None = None
    """The sequence of each token, 0 upwards, where a loss asks for it."""
    num_segments: int = 0
    kept_TK: Tensor | None = None
    """Ids after capacity, NO_EXPERT where a slot was dropped; None without a capacity."""
    choice: Any = None
    """The capacity's decision, which lives as long as this record."""
    drawn: dict[int, Tensor] = field(default_factory=dict)
    """Rows of random subsets, by seed."""

    def masked(self, grad_TE: Tensor) -> Tensor:
        """A gradient with the rows of padding at zero."""
        if self.valid_T is None:
            return grad_TE
        return torch.where(self.valid_T.unsqueeze(1), grad_TE, 0.0)


def share(counts_XE: Tensor) -> Tensor:
    """Counts to shares over the last dimension, float32; zero where there is nothing."""
    total = counts_XE.sum(-1, keepdim=True)
    return (counts_XE / total.clamp(min=1e-300)).float()


def banks_of(num_experts: Sequence[int]) -> list[Bank]:
    """Layers by number of experts, in the order of their first layer."""
    by_width: dict[int, list[int]] = {}
    for index, width in enumerate(num_experts):
        by_width.setdefault(width, []).append(index)
    return [Bank(at, tuple(rows), width) for at, (width, rows) in enumerate(by_width.items())]


def columns(ids: Tensor, valid_T: Tensor | None) -> Tensor:
    """The column that each id [T, K] is counted in: 0 for padding and NO_EXPERT, else id + 1."""
    at = ids + 1
    return at if valid_T is None else at * valid_T.unsqueeze(1)


def groups_of(ids_TK: Tensor, group_of_E: tuple[int, ...]) -> Tensor:
    """The group that each token is sent to, once per token and group; others -1: [T, K]."""
    table = torch.tensor((*group_of_E, -1), device=ids_TK.device)
    group, _ = table[ids_TK].sort(dim=1)
    repeated = torch.zeros_like(group, dtype=torch.bool)
    repeated[:, 1:] = group[:, 1:] == group[:, :-1]
    return torch.where(repeated, -1, group)

"""The tally of one layer over many shards of its token rows: `update`, `+`, `result`.

Only integers are kept, so the result is the same bit for bit whether the rows came in one pass or
from shards in any order, through threads, processes or a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.metrics.counting import Counts, Ids, count_grouped
from equipoise.metrics.idle import Runs, Span, join, scan


@dataclass(frozen=True)
class LayerResult:
    """What a LayerTally has counted."""

    counts_BE: Counts
    """Selections of each expert by block."""
    tokens_B: Counts
    """Rows of each block."""
    longest_idle_E: Runs
    """Longest run of tokens without a selection of the expert."""
    current_idle_E: Runs
    """Tokens since the expert's last selection."""

    @property
    def counts_E(self) -> Counts:
        """Selections of each expert."""
        total: Counts = self.counts_BE.sum(0)
        return total

    @property
    def tokens(self) -> int:
        """Rows counted."""
        return int(self.tokens_B.sum())


@dataclass
class LayerTally:
    """Counts by block and idle runs of one layer; picklable, mergeable with `+` in any order."""

    num_experts: int
    num_blocks: int = 1
    counts_BE: Counts = field(init=False, repr=False)
    tokens_B: Counts = field(init=False, repr=False)
    spans: list[Span] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.counts_BE = np.zeros((self.num_blocks, self.num_experts), np.int64)
        self.tokens_B = np.zeros(self.num_blocks, np.int64)
        self.spans = []

    def update(
        self, ids_TK: Ids, start: int, block_T: NDArray[np.integer] | None = None
    ) -> LayerTally:
        """Count the rows `start` to `start + T`; `block_T` is the block of each row, in [0, B).

        Rows may be handed in in any order, but each only once. Raises EquipoiseError for an
        impossible id or block, before anything is counted.
        """
        block_T = np.zeros(len(ids_TK), np.int64) if block_T is None else np.asarray(block_T)
        if block_T.size and block_T.min() < 0:
            raise EquipoiseError(f"block {block_T.min()}: blocks are 0..{self.num_blocks - 1}")
        count_grouped(ids_TK, block_T, self.num_blocks, self.num_experts, self.counts_BE)
        self.tokens_B += np.bincount(block_T, minlength=self.num_blocks)
        self.spans = _joined([*self.spans, scan(ids_TK, self.num_experts, start)])
        return self

    def __add__(self, other: LayerTally) -> LayerTally:
        """The tally of both shards' rows."""
        mine = (self.num_experts, self.num_blocks)
        if (other.num_experts, other.num_blocks) != mine:
            raise EquipoiseError(
                f"tallies of {mine} and {(other.num_experts, other.num_blocks)} "
                f"(experts, blocks) cannot be added: they are of different layers"
            )
        merged = LayerTally(*mine)
        merged.counts_BE = self.counts_BE + other.counts_BE
        merged.tokens_B = self.tokens_B + other.tokens_B
        merged.spans = _joined([*self.spans, *other.spans])
        return merged

    def result(self) -> LayerResult:
        """Counts and idle runs, over the rows in their order; rows not handed in do not exist."""
        empty = np.zeros(self.num_experts, np.int64)
        whole = reduce(join, self.spans) if self.spans else Span(0, 0, empty - 1, empty - 1, empty)
        return LayerResult(self.counts_BE, self.tokens_B, whole.longest(), whole.current())


def _joined(spans: list[Span]) -> list[Span]:
    """In order of rows, neighbours made one, so that a tally stays small."""
    kept: list[Span] = []
    for span in sorted((s for s in spans if s.tokens), key=lambda s: s.start):
        if kept and span.start <= kept[-1].stop:
            kept[-1] = join(kept[-1], span)
        else:
            kept.append(span)
    return kept

"""Idle runs: how many tokens in a row passed a layer without selecting an expert. Exact.

A shard of the token rows is summed up in three numbers per expert (first and last selection,
longest run between two), and two neighbouring summaries join into one without a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.metrics.counting import Ids, unsigned

Runs = NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """What rows `start` to `start + tokens` say of the idle runs of a layer's E experts."""

    start: int
    tokens: int
    first_E: Runs
    """Row of the first selection, counted from `start`; -1 when never selected here."""
    last_E: Runs
    """Row of the last selection, counted from `start`; -1 when never selected here."""
    inner_E: Runs
    """Longest run without a selection between two selections, 0 where there is none."""

    @property
    def stop(self) -> int:
        """Row after the last one."""
        return self.start + self.tokens

    def longest(self) -> Runs:
        """Longest run of tokens without a selection, int64 [E]; all tokens when never selected."""
        ends = np.maximum(self.first_E, self.tokens - 1 - self.last_E)
        return np.where(self.last_E < 0, self.tokens, np.maximum(ends, self.inner_E))

    def current(self) -> Runs:
        """Tokens since the last selection, int64 [E]; all tokens when never selected."""
        return self.tokens - 1 - self.last_E


def scan(ids_TK: Ids, num_experts: int, start: int = 0) -> Span:
    """Sum up the rows of one shard that begins at row `start`. Ids are checked by counting them."""
    from equipoise.metrics import _kernels

    ids = unsigned(ids_TK, num_experts)
    if ids.ndim != 2:
        raise EquipoiseError(f"ids need the shape [tokens, top-k], not {ids.shape}")
    first_E = np.full(num_experts, -1, np.int64)
    last_E = np.full(num_experts, -1, np.int64)
    inner_E = np.zeros(num_experts, np.int64)
    _kernels.scan_runs(ids, 0, first_E, last_E, inner_E)
    return Span(start, len(ids), first_E, last_E, inner_E)


def join(left: Span, right: Span) -> Span:
    """The summary of both shards' rows, left before right.

    Rows missing between the two are taken as not existing; rows in both raise EquipoiseError.
    """
    if right.start < left.stop:
        raise EquipoiseError(
            f"rows {right.start}..{min(left.stop, right.stop)} were counted twice: "
            f"shards must not overlap"
        )
    shifted_first = np.where(right.first_E < 0, -1, right.first_E + left.tokens)
    shifted_last = np.where(right.last_E < 0, -1, right.last_E + left.tokens)
    both = (left.last_E >= 0) & (right.first_E >= 0)
    bridge = np.where(both, shifted_first - left.last_E - 1, 0)
    return Span(
        left.start,
        left.tokens + right.tokens,
        np.where(left.first_E >= 0, left.first_E, shifted_first),
        np.where(right.last_E >= 0, shifted_last, left.last_E),
        np.maximum(np.maximum(left.inner_E, right.inner_E), bridge),
    )

"""What the measures need from a trace beyond its counts: counts by block, and idle runs.

One pass over the stored rows, layers in parallel. A block is whole documents; where no document
is known, a span of consecutive tokens; where no rows are stored, one or more whole windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from equipoise.metrics.accumulate import LayerTally
from equipoise.metrics.blocks import MAX_BLOCKS, MIN_BLOCKS, deal, span_length
from equipoise.metrics.counting import count_grouped
from equipoise.metrics.intervals import DesignEffect, design_effect, share_intervals
from equipoise.trace import Trace

Counts = NDArray[np.int64]
THREADS = 2
GROUPED_BLOCKS = 2048
"""Blocks of all groups together in `gather_by`: bounds its memory."""


@dataclass(frozen=True)
class LayerEvidence:
    """Counts by block and idle runs of one layer."""

    counts_BE: Counts
    tokens_B: Counts
    top_k: int
    longest_idle_E: Counts | None = None
    """None unless every counted token has its row."""
    current_idle_E: Counts | None = None

    @cached_property
    def effect(self) -> DesignEffect:
        """How far the layer's tokens are from independent."""
        return design_effect(self.counts_BE, self.tokens_B, self.top_k)

    @property
    def share_intervals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper 95 % bound of every expert's share, [E]; nan with too few blocks."""
        return share_intervals(self.counts_BE, self.tokens_B, self.top_k)

    @property
    def blocks(self) -> int:
        """Blocks with any selection."""
        return int((self.counts_BE.sum(1) > 0).sum())


@dataclass(frozen=True)
class Evidence:
    """Evidence of every layer of a trace or view, in the order of `trace.layers`."""

    kind: str
    """What a block is: "document", "span" or "window"."""
    layers: tuple[LayerEvidence, ...]
    why_no_interval: str | None = None
    """Why there is no interval although there are blocks enough for a design effect."""


_known: WeakKeyDictionary[Trace, Evidence] = WeakKeyDictionary()


def gather(trace: Trace) -> Evidence:
    """The evidence of a trace or view; kept while the trace lives, since a trace never changes."""
    found = _known.get(trace)
    if found is None:
        found = _from_rows(trace) if trace.rows_complete else _from_windows(trace)
        _known[trace] = found
    return found


def gather_by(trace: Trace, by: str) -> dict[str, Evidence]:
    """The evidence of each of `trace.groups(by)`, in one pass over the rows; without idle runs."""
    if not trace.rows_complete:
        return {name: gather(view) for name, view in trace.groups(by).items()}
    names = trace.values(by)
    if not names:
        return {}
    documents = Documents(trace)
    per_group = max(min(MAX_BLOCKS, GROUPED_BLOCKS // len(names)), MIN_BLOCKS)
    group_of = _grouper(trace, by, names, documents)
    block_S = _deal_within(documents, by, names, per_group)
    counts = [np.zeros((len(names) * per_group, x.experts), np.int64) for x in trace.layers]
    tokens = [np.zeros(len(names) * per_group, np.int64) for _ in trace.layers]

    def count(code_T: Counts, index: int, ids_TK: NDArray[Any]) -> None:
        experts = trace.layers[index].experts
        count_grouped(ids_TK, code_T, len(counts[index]), experts, counts[index])
        known = code_T[code_T >= 0]
        tokens[index] += np.bincount(known, minlength=len(tokens[index]))

    with ThreadPoolExecutor(THREADS) as pool:
        for batch in trace.batches("ids"):
            row_T = documents.row(batch.sequence_T)
            group_T = group_of(batch, row_T)
            code_T = np.where(group_T < 0, -1, group_T * per_group + block_S[row_T])
            _each_layer(pool, batch.ids, partial(count, code_T))
    return {
        name: Evidence(
            "document",
            tuple(
                LayerEvidence(c[g : g + per_group], t[g : g + per_group], layer.top_k)
                for c, t, layer in zip(counts, tokens, trace.layers, strict=True)
            ),
        )
        for name, g in zip(names, range(0, len(names) * per_group, per_group), strict=True)
    }


class Documents:
    """The sequences of a trace as rows 0..S-1; rows of no known sequence are one more document."""

    def __init__(self, trace: Trace) -> None:
        self.table = trace.sequences
        numbers = self.table["sequence"].to_numpy().astype(np.int64)
        self.order = np.argsort(numbers, kind="stable")
        self.numbers = numbers[self.order]

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, sequence_T: NDArray[Any]) -> Counts:
        """Row of each token's sequence, [T]; S where it is not in the table."""
        if not len(self):
            return np.zeros(len(sequence_T), np.int64)
        place_T = np.minimum(np.searchsorted(self.numbers, sequence_T), len(self) - 1)
        found_T = self.numbers[place_T] == sequence_T
        return np.where(found_T, place_T, len(self)).astype(np.int64)

    def labels(self, key: str) -> list[str | None]:
        """The label of each row."""
        values = self.table[key].to_pylist()
        return [values[i] for i in self.order]


def _from_rows(trace: Trace) -> Evidence:
    documents = Documents(trace)
    by_document = len(documents) >= MIN_BLOCKS
    if by_document:
        block_S = deal(len(documents) + 1)
        blocks = int(block_S.max()) + 1
    else:
        length = span_length(int(trace.tokens_L.max(initial=0)))
        blocks = max(-(-int(trace.tokens_L.max(initial=0)) // length), 1)
    tallies = [LayerTally(layer.experts, blocks) for layer in trace.layers]

    def update(start: int, block_T: Counts, index: int, ids_TK: NDArray[Any]) -> None:
        tallies[index].update(ids_TK, start, block_T)

    with ThreadPoolExecutor(THREADS) as pool:
        for batch in trace.batches("ids"):
            if by_document:
                block_T = block_S[documents.row(batch.sequence_T)]
            else:
                block_T = (batch.start + np.arange(len(batch.sequence_T))) // length
            _each_layer(pool, batch.ids, partial(update, batch.start, block_T))
    results = [tally.result() for tally in tallies]
    few = not by_document and len(documents) > 1
    return Evidence(
        "document" if by_document else "span",
        tuple(
            LayerEvidence(r.counts_BE, r.tokens_B, x.top_k, r.longest_idle_E, r.current_idle_E)
            for r, x in zip(results, trace.layers, strict=True)
        ),
        f"only {len(documents)} documents, {MIN_BLOCKS} are needed" if few else None,
    )


def _from_windows(trace: Trace) -> Evidence:
    """Whole windows as blocks; pairs of neighbours are joined whenever there are MAX_BLOCKS."""
    counts: list[Counts] = []
    tokens: list[Counts] = []
    width = 1
    for number, window in enumerate(trace.windows()):
        if number % width == 0:
            if len(counts) == MAX_BLOCKS:
                counts = [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
                tokens = [a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
                width *= 2
            counts.append(np.zeros_like(trace.counts_LE))
            tokens.append(np.zeros_like(trace.tokens_L))
        counts[-1] = counts[-1] + window.counts_LE
        tokens[-1] = tokens[-1] + window.tokens_L
    counts_BLE = np.array(counts, np.int64).reshape(len(counts), *trace.counts_LE.shape)
    tokens_BL = np.array(tokens, np.int64).reshape(len(tokens), len(trace.layers))
    return Evidence(
        "window",
        tuple(
            LayerEvidence(counts_BLE[:, i, : x.experts], tokens_BL[:, i], x.top_k)
            for i, x in enumerate(trace.layers)
        ),
    )


def _each_layer(
    pool: ThreadPoolExecutor, ids: dict[int, NDArray[Any]], work: Callable[[int, Any], None]
) -> None:
    """`work(index, ids_TK)` for every layer of a batch, a share of the layers per thread."""
    items = list(ids.items())

    def some(first: int) -> None:
        for index, ids_TK in items[first::THREADS]:
            work(index, ids_TK)

    for _ in pool.map(some, range(THREADS)):
        pass


def _grouper(
    trace: Trace, by: str, names: list[str], documents: Documents
) -> Callable[[Any, Counts], Counts]:
    """A function from a batch and its documents' rows to the group of each token, -1 for none."""
    code = {name: g for g, name in enumerate(names)}
    if by in ("role", "phase"):
        from equipoise.trace.schema import PHASES, ROLES

        codes = np.array([code.get(name, -1) for name in (ROLES if by == "role" else PHASES)])
        return lambda batch, _: codes[batch.role_T if by == "role" else batch.phase_T]
    group_S = np.array([*(code.get(x or "", -1) for x in documents.labels(by)), -1])
    return lambda _, row_T: group_S[row_T]


def _deal_within(documents: Documents, by: str, names: list[str], per_group: int) -> Counts:
    """Block of each document among those of its group, [S + 1]; among all for role and phase."""
    if by in ("role", "phase"):
        return deal(len(documents) + 1, per_group)
    labels = np.array([*documents.labels(by), None], object)
    block_S = np.zeros(len(labels), np.int64)
    for name in names:
        members = np.flatnonzero(labels == name)
        block_S[members] = deal(len(members), per_group)
    return block_S


def full_windows(trace: Trace) -> Iterator[Any]:
    """The windows that hold at least half the tokens of the median window."""
    sizes = [int(w.tokens_L.max(initial=0)) for w in trace.windows()]
    least = np.median(sizes) / 2 if sizes else 0
    for window in trace.windows():
        if window.tokens_L.max(initial=0) >= least:
            yield window

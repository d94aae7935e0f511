"""Which rows of which domain make which step: a function of the seed and the step alone.

Rows are drawn in blocks of `data.block` from one domain after the other, each domain's rows in an
order shuffled for every round through it. How the rows of a step fall into micro-batches is
`data.arrangement`: "mixed" takes a row of each block in turn, "domain" one block after the other, in an
order drawn for every step. That, and the size of micro-batches, changes no step's set of rows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.lab.config import Config
from equipoise.lab.corpus import Corpus, Domain

_OF_BLOCKS = 2**31
"""Tells the order of a step's blocks from that of a domain's rows, where seeds are drawn."""


class Batches:
    """The rows of every step of a run, for one process of several."""

    def __init__(self, corpus: Corpus, config: Config, *, rank: int = 0, ranks: int = 1) -> None:
        self.corpus, self.config = corpus, config
        self.rank, self.ranks = rank, ranks
        self.length = config.data.row_length
        self._order = lru_cache(maxsize=4 * len(corpus.domains))(self._shuffled)

    def step(self, step: int) -> list[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        """This process's micro-batches: ids and targets [B, S], int64, and each row's domain [B]."""
        blocks = [self._block(block) for block in self._blocks(step)]
        rows = np.stack([row for found, _ in blocks for row in found])
        domains = np.repeat([domain for _, domain in blocks], self.config.data.block)
        if self.config.data.arrangement == "mixed":
            order = np.arange(len(rows)).reshape(len(blocks), -1).T.ravel()
            rows, domains = rows[order], domains[order]
        size = self.config.micro_rows
        found = []
        for start in range(self.rank * size, len(rows), size * self.ranks):
            part = torch.from_numpy(rows[start : start + size].astype(np.int64))
            ids, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            found.append((ids, targets, domains[start : start + size]))
        return found

    def passes(self) -> dict[str, float]:
        """How often the whole run reads each domain."""
        rows = self.config.steps * self.config.batch_rows / len(self.corpus.domains)
        return {d.name: rows / row_count(d.train, self.length) for d in self.corpus.domains}

    def _blocks(self, step: int) -> list[int]:
        count = self.config.batch_rows // self.config.data.block
        blocks = np.arange(step * count, (step + 1) * count)
        if self.config.data.arrangement == "domain":  # no domain is always the first one counted
            generator = np.random.default_rng([self.config.seed, step, _OF_BLOCKS])
            blocks = generator.permutation(blocks)
        return blocks.tolist()

    def _block(self, block: int) -> tuple[list[NDArray[np.uint16]], int]:
        """Rows of S + 1 tokens, the last one only a target, and the number of their domain."""
        number = block % len(self.corpus.domains)
        first = block // len(self.corpus.domains) * self.config.data.block
        return [
            self._row(number, position) for position in range(first, first + self.config.data.block)
        ], number

    def _row(self, number: int, position: int) -> NDArray[np.uint16]:
        domain = self.corpus.domains[number]
        rows = row_count(domain.train, self.length)
        start = int(self._order(number, position // rows)[position % rows]) * self.length
        return domain.train[start : start + self.length + 1]

    def _shuffled(self, number: int, epoch: int) -> NDArray[np.int64]:
        rows = row_count(self.corpus.domains[number].train, self.length)
        return np.random.default_rng([self.config.seed, number, epoch]).permutation(rows)


def row_count(tokens: NDArray[np.uint16], length: int) -> int:
    """Whole rows of a stream; each needs one token more, for its last target."""
    return (len(tokens) - 1) // length


def held_out_rows(domain: Domain, length: int, tokens: int = 0) -> Tensor:
    """Rows of the held-out part, [N, S + 1] int64: all, or about `tokens` spread evenly over it."""
    count = row_count(domain.held_out, length)
    wanted = count if tokens == 0 else min(count, max(1, tokens // length))
    starts = np.linspace(0, count - 1, wanted).round().astype(np.int64) * length
    stream = domain.held_out
    return torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64))

"""Rows of steps: a function of the seed and the step, however they are split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.lab import Config, load_corpus
from equipoise.lab.batches import Batches, held_out_rows, row_count

Configure = Callable[..., Config]
Row = tuple[int, ...]


def rows_of(config: Config, step: int, **ranks: int) -> list[Row]:
    """Rows of a step of one process: ids, then the last target."""
    batches = Batches(load_corpus(config.data), config, **ranks)
    found = []
    for ids, targets, _ in batches.step(step):
        assert ids.dtype == targets.dtype == torch.int64
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        found += [tuple(row) for row in torch.cat([ids, targets[:, -1:]], 1).tolist()]
    return found


def test_a_step_is_a_function_of_the_seed_and_its_number(configure: Configure) -> None:
    config = configure()
    assert rows_of(config, 5) == rows_of(config, 5)
    assert rows_of(config, 5) != rows_of(config, 6)
    assert rows_of(config, 5) != rows_of(configure(seed=1), 5)


@pytest.mark.parametrize(
    "values",
    [{"micro_rows": 8}, {"data__arrangement": "domain"}, {"micro_rows": 1}],
    ids=["micro-batches", "arrangement", "single rows"],
)
def test_how_a_step_is_cut_changes_none_of_its_rows(
    configure: Configure, values: dict[str, Any]
) -> None:
    for step in (0, 7):
        assert Counter(rows_of(configure(**values), step)) == Counter(rows_of(configure(), step))


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_share_a_step_out(configure: Configure, ranks: int) -> None:
    parts = [rows_of(configure(), 3, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {8 // ranks}
    assert Counter(chain(*parts)) == Counter(rows_of(configure(), 3))


def test_a_round_takes_every_row_of_a_domain_once(configure: Configure) -> None:
    config = configure(data__domains=("abc",), data__arrangement="domain", data__block=8)
    stream = load_corpus(config.data).domains[0].train
    rows = row_count(stream, 16)
    steps = range(1 + 2 * rows // config.batch_rows)
    seen = list(chain(*(rows_of(config, step) for step in steps)))
    every = Counter(tuple(stream[i * 16 : i * 16 + 17].tolist()) for i in range(rows))
    first, second = seen[:rows], seen[rows : 2 * rows]
    assert Counter(first) == Counter(second) == every
    assert first != second


@pytest.mark.parametrize(("arrangement", "domains"), [("domain", 1), ("mixed", 2)])
def test_micro_batches_are_of_one_domain_or_of_several(
    configure: Configure, arrangement: str, domains: int
) -> None:
    config = configure(data__arrangement=arrangement)
    batches = Batches(load_corpus(config.data), config)
    for ids, _, numbers in batches.step(0):
        assert len(ids) == len(numbers) == config.micro_rows
        assert len(set(numbers.tolist())) == domains


def test_the_domains_of_a_step_come_in_an_order_of_its_own(configure: Configure) -> None:
    config = configure(data__arrangement="domain")
    batches = Batches(load_corpus(config.data), config)
    orders = [tuple(int(n[0]) for _, _, n in batches.step(step)) for step in range(40)]
    assert {order[0] for order in orders} == {domain for order in orders for domain in order}
    again = Batches(load_corpus(config.data), config)
    assert orders == [tuple(int(n[0]) for _, _, n in again.step(step)) for step in range(40)]


def test_rows_say_their_domain(configure: Configure) -> None:
    config = configure()
    corpus = load_corpus(config.data)
    batches = Batches(corpus, config)
    for ids, _, numbers in batches.step(4):
        for row, number in zip(ids.numpy(), numbers, strict=True):
            stream = np.asarray(corpus.domains[number].train)
            windows = np.lib.stride_tricks.sliding_window_view(stream, len(row))
            assert (windows == row).all(1).any()


def test_held_out_rows_are_all_or_spread_evenly(configure: Configure) -> None:
    domain = load_corpus(configure().data).domains[0]
    every = held_out_rows(domain, 16)
    assert len(every) == row_count(domain.held_out, 16)
    assert torch.equal(
        every[:, :-1].flatten(),
        torch.from_numpy(domain.held_out[: every.shape[0] * 16].astype(np.int64)),
    )
    some = held_out_rows(domain, 16, tokens=80)
    assert len(some) == 5
    assert torch.equal(some[[0, -1]], every[[0, -1]])

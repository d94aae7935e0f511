"""Idle runs and block counts: exact, and the same from one pass and from shards in any order."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError
from equipoise.metrics.accumulate import LayerTally
from equipoise.metrics.idle import join, scan
from tests.metrics import naive
from tests.metrics.test_counting import routed

EXPERTS = 6


def tally(shard):
    """One shard counted by itself; at the top of a module, for a process to find."""
    start, ids, block = shard
    return LayerTally(EXPERTS, 5).update(ids, start, block)


def shards(ids, count, seed=0):
    blocks = np.random.default_rng(seed).integers(0, 5, len(ids))
    cuts = np.linspace(0, len(ids), count + 1).astype(int)
    return [(int(a), ids[a:b], blocks[a:b]) for a, b in pairwise(cuts)]


def same(a, b):
    pairs = zip(vars(a.result()).items(), vars(b.result()).items(), strict=True)
    return all(x == y and v.tobytes() == w.tobytes() for (x, v), (y, w) in pairs)


@given(st.integers(0, 60), st.integers(1, 3), st.floats(0, 0.9), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_idle_runs_equal_the_naive_walk(tokens, top_k, missing, seed):
    ids, plain = routed(tokens, top_k, EXPERTS, "uint8", seed, missing)
    span = scan(ids, EXPERTS)
    longest, current = naive.idle_runs(plain, EXPERTS)
    assert span.longest().tolist() == longest
    assert span.current().tolist() == current


@given(st.integers(0, 80), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_joined_spans_equal_one_scan(tokens, count, seed):
    ids, _ = routed(tokens, 1, EXPERTS, "uint8", seed, 0.3)
    whole = scan(ids, EXPERTS)
    parts = [scan(piece, EXPERTS, start) for start, piece, _ in shards(ids, count)]
    joined = reduce(join, parts)
    assert joined.longest().tolist() == whole.longest().tolist()
    assert joined.current().tolist() == whole.current().tolist()


@given(st.integers(0, 120), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_seven_shards_in_any_order_give_the_same_bits(tokens, seed):
    ids, _ = routed(tokens, 2, EXPERTS, "uint8", seed, 0.2)
    pieces = [tally(s) for s in shards(ids, 7)]
    random.Random(seed).shuffle(pieces)
    assert same(reduce(add, pieces), tally(shards(ids, 1)[0]))


@pytest.mark.parametrize("executor", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_any_executor_gives_the_same_bits(executor):
    ids, _ = routed(700, 2, EXPERTS, "uint8")
    with executor(2) as pool:
        parts = list(pool.map(tally, shards(ids, 7)))
    assert same(reduce(add, parts[::-1]), tally(shards(ids, 1)[0]))


def test_updates_in_any_order_are_one_tally():
    ids, plain = routed(200, 2, EXPERTS, "uint16")
    whole = LayerTally(EXPERTS)
    for start, piece, _ in reversed(shards(ids, 5)):
        whole.update(piece, start)
    assert len(whole.spans) == 1
    assert whole.result().counts_E.tolist() == naive.count_ids(plain, EXPERTS)
    assert whole.result().longest_idle_E.tolist() == naive.idle_runs(plain, EXPERTS)[0]
    assert whole.result().tokens == 200


def test_adding_leaves_both_as_they_were():
    ids, _ = routed(40, 2, EXPERTS, "uint8")
    a, b = (tally(s) for s in shards(ids, 2))
    before = a.result().counts_E.copy()
    assert (a + b).result().tokens == 40
    assert (a.result().counts_E == before).all()


def test_a_shard_counted_twice_is_refused():
    ids, _ = routed(40, 2, EXPERTS, "uint8")
    a, _ = (tally(s) for s in shards(ids, 2))
    with pytest.raises(EquipoiseError, match=r"rows 0..20 were counted twice"):
        (a + a).result()


def test_tallies_of_different_layers_are_refused():
    with pytest.raises(EquipoiseError, match="different layers"):
        LayerTally(4) + LayerTally(5)
    with pytest.raises(EquipoiseError, match=r"block -1: blocks are 0..0"):
        LayerTally(4).update(np.zeros((1, 1), np.uint8), 0, np.array([-1]))


def test_nothing_counted_is_no_tokens():
    result = LayerTally(3, 2).result()
    assert result.tokens == 0
    assert result.longest_idle_E.tolist() == [0, 0, 0]

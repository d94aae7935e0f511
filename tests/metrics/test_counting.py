"""Counts equal the naive count for every type, shape and alignment; impossible ids are refused."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError
from equipoise.metrics.counting import count_columns, count_grouped, count_ids
from tests.metrics import naive

DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "int64")


def routed(tokens, top_k, experts, dtype, seed=0, missing=0.0):
    """Random ids [T, K] and the same as Python lists with -1 for no expert."""
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)]).reshape(-1, top_k)
    ids[rng.random(ids.shape) < missing] = -1
    none = np.iinfo(dtype).max if dtype.startswith("u") else -1
    return np.where(ids == -1, none, ids).astype(dtype), ids.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (333, 3, 100)])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_counts_equal_the_naive_count(dtype, tokens, top_k, experts, missing):
    ids, plain = routed(tokens, top_k, experts, dtype, missing=missing)
    assert count_ids(ids, experts).tolist() == naive.count_ids(plain, experts)


@given(
    st.integers(0, 40), st.integers(1, 5), st.integers(0, 9), st.sampled_from(["uint8", "uint16"])
)
@settings(max_examples=60, deadline=None)
def test_any_alignment_and_slice_counts_alike(tokens, top_k, skip, dtype):
    ids, plain = routed(tokens + skip, top_k, 7, dtype, missing=0.1)
    assert count_ids(ids[skip:], 7).tolist() == naive.count_ids(plain[skip:], 7)
    assert count_ids(ids[:, ::2], 7).tolist() == naive.count_ids([r[::2] for r in plain], 7)


def test_sixteen_bits_count_more_than_256_experts():
    ids, plain = routed(500, 8, 700, "uint16", missing=0.05)
    assert count_ids(ids, 700).tolist() == naive.count_ids(plain, 700)


@pytest.mark.parametrize("experts", [1, 2, 3, 32, 60, 64, 100, 127, 128, 129, 255])
@pytest.mark.parametrize("size", [16384, 4096 * 31 + 13, 300_001])
@pytest.mark.parametrize("skip", [0, 3])
def test_long_columns_of_bytes_count_alike_in_pairs(experts, size, skip):
    rng = np.random.default_rng(experts)
    ids = rng.integers(0, experts, size).astype(np.uint8)
    ids[9000:9100] = 255  # one block has to be counted singly
    real = ids[skip:][ids[skip:] != 255]
    expected = np.bincount(real, minlength=experts)
    assert (count_ids(ids[skip:], experts) == expected).all()


@pytest.mark.parametrize("ids", [(0, 0), (127, 127), (0, 127), (127, 0)])
def test_one_pair_over_and_over_does_not_overflow(ids):
    expected = np.bincount(ids, minlength=128) * 200_000
    assert (count_ids(np.array([ids] * 200_000, np.uint8), 128) == expected).all()


@pytest.mark.parametrize("wrong", [100, 127, 128, 254])
@pytest.mark.parametrize("place", [0, 1, 20_000, -1])
def test_impossible_id_in_a_long_column_is_named_and_forgotten(wrong, place):
    ids = np.random.default_rng(0).integers(0, 100, 50_001).astype(np.uint8)
    expected = np.bincount(ids, minlength=100)
    bad, out = ids.copy(), np.zeros(100, np.int64)
    bad[place] = wrong
    with pytest.raises(EquipoiseError, match=f"expert id {wrong} in a layer of 100"):
        count_ids(bad, 100, out)
    assert not out.any()
    assert (count_ids(ids, 100) == expected).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_columns_in_one_stretch_of_memory_are_counted_each_for_itself(dtype):
    rng, sizes, experts = np.random.default_rng(0), [40_000, 0, 7, 20_001], [100, 3, 7, 200]
    columns = [rng.integers(0, e, n) for n, e in zip(sizes, experts, strict=True)]
    memory = np.full(90_000, 254, dtype)
    starts = np.array([3, 41_000, 41_009, 60_000])
    for start, ids in zip(starts, columns, strict=True):
        memory[start : start + len(ids)] = ids
    counts_LE = np.zeros((4, 200), np.int64)
    asked = (starts, np.array(sizes), np.array(experts))
    assert count_columns(memory, *asked, counts_LE) is None
    assert (counts_LE == [np.bincount(ids, minlength=200) for ids in columns]).all()
    memory[41_010] = 7
    assert count_columns(memory, *asked, counts_LE) == 2
    with pytest.raises(EquipoiseError, match="reach from 3 to 80,001 in 80,000 ids"):
        count_columns(memory[:80_000], *asked, counts_LE)


def test_mask_keeps_the_rows_where_it_is_true():
    ids, plain = routed(100, 2, 5, "uint8")
    mask = np.random.default_rng(1).random(100) < 0.5
    assert count_ids(ids, 5, mask_T=mask).tolist() == naive.count_ids(plain, 5, mask)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64"])
def test_groups_are_counted_apart_and_negative_ones_left_out(dtype):
    ids, plain = routed(300, 3, 9, dtype, missing=0.1)
    groups = np.random.default_rng(2).integers(-1, 4, 300)
    assert count_grouped(ids, groups, 4, 9).tolist() == naive.count_grouped(plain, groups, 4, 9)


def test_counts_are_added_to_out():
    ids, plain = routed(50, 2, 6, "uint8")
    out = np.full(6, 10, np.int64)
    assert count_ids(ids, 6, out) is out
    assert out.tolist() == [10 + c for c in naive.count_ids(plain, 6)]
    masked = np.zeros(6, np.int64)
    count_ids(ids, 6, masked, np.ones(50, bool))
    assert masked.tolist() == naive.count_ids(plain, 6)


@pytest.mark.parametrize(
    ("ids", "seen"),
    [
        (np.array([[0, 4]], np.uint8), "4"),
        (np.array([[0, 254]], np.uint8), "254"),
        (np.array([[1, 65534]], np.uint16), "65534"),
        (np.array([[1, -2]], np.int16), "-2"),
        (np.array([[1, -2]], np.int8), "-2"),
        (np.array([[1, 2**40]], np.int64), str(2**40)),
    ],
)
def test_impossible_id_is_named_and_leaves_nothing_behind(ids, seen):
    out = np.zeros(4, np.int64)
    with pytest.raises(EquipoiseError, match=rf"expert id {seen} in a layer of 4 experts"):
        count_ids(ids, 4, out)
    with pytest.raises(EquipoiseError, match=f"expert id {seen}"):
        count_grouped(ids, np.zeros(1, int), 1, 4)
    assert not out.any()
    assert count_ids(np.array([[0, 3]], ids.dtype), 4).tolist() == [1, 0, 0, 1]


def test_what_cannot_be_counted_is_refused_in_words():
    with pytest.raises(EquipoiseError, match="must be integers, not float32"):
        count_ids(np.zeros((2, 2), np.float32), 4)
    with pytest.raises(EquipoiseError, match="uint8 ids cannot name 256 experts"):
        count_ids(np.zeros((2, 2), np.uint8), 256)
    with pytest.raises(EquipoiseError, match=r"group 3 at row 1: groups are 0..2"):
        count_grouped(np.zeros((2, 1), np.uint8), np.array([0, 3]), 3, 2)
    with pytest.raises(EquipoiseError, match=r"one group .* per row"):
        count_grouped(np.zeros((2, 1), np.uint8), np.array([0]), 3, 2)
    with pytest.raises(EquipoiseError, match=r"int64 of shape \(4,\)"):
        count_ids(np.zeros((2, 1), np.uint8), 4, np.zeros(5, np.int64))


def test_importing_the_measures_loads_neither_numba_nor_torch_nor_scipy():
    code = (
        "import sys, equipoise.metrics.counting, equipoise.metrics.load, equipoise.metrics.floors,"
        " equipoise.metrics.intervals, equipoise.metrics.accumulate, equipoise.metrics.bounds;"
        "print([m for m in ('numba', 'torch', 'scipy', 'equipoise.trace') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_counting_works_without_a_folder_to_cache_in(tmp_path):
    """numba finds no place to write where the cache folder it is told of is a file."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    code = (
        "import numpy as np; from equipoise.metrics.counting import count_ids;"
        "print(count_ids(np.array([[0, 2]], np.uint8), 3).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(blocked / "sub")},
    )
    assert done.stdout.strip() == "[1, 0, 1]", done.stderr[-500:]

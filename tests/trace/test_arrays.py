"""Traces from arrays: counts, views and files against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import equipoise
from equipoise import EquipoiseError, Trace


def naive_counts(ids_TLK: np.ndarray, experts: int) -> np.ndarray:
    counts_LE = np.zeros((ids_TLK.shape[1], experts), np.int64)
    for row in ids_TLK:
        for layer, chosen in enumerate(row):
            for expert in chosen:
                if expert >= 0:
                    counts_LE[layer, expert] += 1
    return counts_LE


def sample(tokens: int = 500, layers: int = 3, experts: int = 7, k: int = 2) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.integers(0, experts, (tokens, layers, k))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.uint8, np.uint16])
@pytest.mark.parametrize("experts", [7, 255, 256, 300])
def test_counts_equal_a_python_loop(dtype: type, experts: int) -> None:
    rng = np.random.default_rng(experts)
    top = min(experts, np.iinfo(dtype).max)
    ids = rng.integers(0, top, (200, 2, 3)).astype(dtype)
    trace = Trace.from_arrays(ids, num_experts=experts)
    expected = naive_counts(ids.astype(np.int64), experts)
    assert (trace.counts_LE == expected).all()
    assert (trace.recount() == expected).all()
    assert trace.tokens == 200
    assert (trace.expert_ids_TLK == ids).all()


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.int64, st.tuples(*[st.integers(1, 6)] * 3), elements=st.integers(-1, 5)))
def test_slots_without_an_expert_are_kept_apart(ids: np.ndarray) -> None:
    trace = Trace.from_arrays(ids, num_experts=6)
    assert (trace.counts_LE == naive_counts(ids, 6)).all()
    assert (trace.unrouted_L == (ids == -1).sum((0, 2))).all()
    assert (trace.recount() == trace.counts_LE).all()


def test_layers_keep_their_true_numbers_and_are_sorted_as_numbers() -> None:
    ids = sample(layers=3)
    trace = Trace.from_arrays(ids, layers=[10, 2, 9], num_experts=7)
    assert [layer.layer for layer in trace.layers] == [2, 9, 10]
    assert (trace.counts_LE == naive_counts(ids, 7)[[1, 2, 0]]).all()
    assert (trace.select(layers=10).counts_LE == naive_counts(ids[:, :1], 7)).all()
    assert (trace.select(layers=[10]).recount() == naive_counts(ids[:, :1], 7)).all()


def test_layers_may_differ_in_experts() -> None:
    ids = sample(layers=2, experts=4)
    trace = Trace.from_arrays(ids, num_experts=[4, 300])
    assert trace.counts_LE.shape == (2, 300)
    assert [layer.experts for layer in trace.layers] == [4, 300]
    assert (trace.recount() == trace.counts_LE).all()


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[np.ndarray, np.ndarray, Trace]:
    ids = sample(20_000)
    sequence_T = np.repeat(np.arange(40), 500)
    labels = {"subject": [f"s{i % 4}" for i in range(40)], "category": ["x", "y"] * 20}
    trace = Trace.from_arrays(ids, num_experts=7, sequences=sequence_T, labels=labels)
    trace.save(tmp_path / "t.trace")
    return ids, sequence_T, equipoise.open(tmp_path / "t.trace")


def test_a_view_counts_its_own_rows(labelled: tuple[np.ndarray, np.ndarray, Trace]) -> None:
    ids, sequence_T, trace = labelled
    view = trace.select(subject=["s1", "s3"], layers=[0, 2])
    mask = np.isin(sequence_T % 4, [1, 3])
    expected = naive_counts(ids[mask][:, [0, 2]], 7)
    assert (view.counts_LE == expected).all()
    assert (view.recount() == expected).all()
    assert view.tokens == mask.sum()
    assert view.sequences.num_rows == 20


def test_views_narrow_further(labelled: tuple[np.ndarray, np.ndarray, Trace]) -> None:
    ids, sequence_T, trace = labelled
    view = trace.select(category="y").select(subject="s3")
    assert (view.counts_LE == naive_counts(ids[sequence_T % 4 == 3], 7)).all()
    with pytest.raises(EquipoiseError, match="No subject 's0'"):
        trace.select(category="y").select(subject="s0")


def test_groups_add_up(labelled: tuple[np.ndarray, np.ndarray, Trace]) -> None:
    _, _, trace = labelled
    for key in ("subject", "category", "phase", "role"):
        groups = trace.groups(key)
        assert (sum(g.counts_LE for g in groups.values()) == trace.counts_LE).all()
    assert (sum(w.counts_LE for w in trace.windows()) == trace.counts_LE).all()


def test_rows_come_back_as_they_were(labelled: tuple[np.ndarray, np.ndarray, Trace]) -> None:
    ids, sequence_T, trace = labelled
    batches = [(b.start, b.sequence_T.copy(), b.ids[1].copy()) for b in trace.batches()]
    assert (np.concatenate([b[1] for b in batches]) == sequence_T).all()
    assert (np.concatenate([b[2] for b in batches]) == ids[:, 1]).all()
    assert [b[0] for b in batches] == np.cumsum([0] + [len(b[1]) for b in batches])[:-1].tolist()


def test_a_saved_view_is_a_trace(
    labelled: tuple[np.ndarray, np.ndarray, Trace], tmp_path: Path
) -> None:
    view = labelled[2].select(subject="s2", layers=1)
    view.save(tmp_path / "v.trace")
    again = equipoise.open(tmp_path / "v.trace")
    assert (again.counts_LE == view.counts_LE).all()
    assert (again.recount() == view.counts_LE).all()
    assert again.sequences.equals(view.sequences)


def test_weights_are_kept_to_float32(tmp_path: Path) -> None:
    ids = sample()
    weights = np.random.default_rng(0).random(ids.shape)
    Trace.from_arrays(ids, num_experts=7, weights=weights).save(tmp_path / "w.trace")
    batch = next(equipoise.open(tmp_path / "w.trace").batches())
    assert batch.weights is not None
    assert (batch.weights[2] == weights[:, 2].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": np.zeros((3, 2))}, r"shape \(3, 2\); wanted \[T, L, K\]"),
        ({"ids": np.zeros((3, 2, 1))}, "float64; wanted integers"),
        ({"ids": np.zeros((3, 2, 1), int), "layers": [1]}, "1 numbers .* 2 layers"),
        ({"ids": np.zeros((3, 2, 1), int), "layers": [1, 1]}, "1 distinct"),
        ({"ids": np.full((3, 2, 1), 9), "num_experts": 8}, "expert id 9 in a layer of 8"),
        ({"ids": np.full((3, 2, 1), -2), "num_experts": 8}, "expert id -2"),
        ({"ids": np.full((3, 2, 1), 300), "num_experts": 44}, "expert id 300"),
        ({"ids": np.zeros((3, 2, 1), int), "num_experts": 0}, "num_experts is 0"),
        ({"ids": np.zeros((3, 2, 9), int), "num_experts": 8}, "9 experts per token"),
        ({"ids": np.zeros((3, 2, 1), int), "sequences": np.zeros(2, int)}, r"integers \[3\]"),
        ({"ids": np.zeros((3, 2, 1), int), "weights": np.zeros(3)}, r"weights has shape \(3,\)"),
        ({"ids": np.zeros((3, 2, 1), int), "weights": np.full((3, 2, 1), np.nan)}, "NaN"),
        ({"ids": np.zeros((3, 2, 1), int), "labels": {"subjct": ["a"]}}, "No label 'subjct'"),
        ({"ids": np.zeros((3, 2, 1), int), "labels": {"subject": ["a", "b"]}}, "2 values for 1"),
    ],
)
def test_bad_arrays_are_refused(arguments: dict, message: str) -> None:
    ids = arguments.pop("ids")
    with pytest.raises(EquipoiseError, match=message):
        Trace.from_arrays(ids, **arguments)


def test_no_tokens_is_a_trace_of_zeros(tmp_path: Path) -> None:
    Trace.from_arrays(np.zeros((0, 2, 3), int), num_experts=4).save(tmp_path / "e.trace")
    trace = equipoise.open(tmp_path / "e.trace")
    assert trace.tokens == 0
    assert trace.counts_LE.shape == (2, 4)
    assert trace.counts_LE.sum() == 0


def test_an_unknown_name_suggests_the_nearest(
    labelled: tuple[np.ndarray, np.ndarray, Trace],
) -> None:
    with pytest.raises(EquipoiseError, match="Did you mean 'prefill'"):
        labelled[2].select(phase="prefil")
    with pytest.raises(EquipoiseError, match="No MoE layer 9 in this trace; it has 0, 1, 2"):
        labelled[2].select(layers=9)
    with pytest.raises(EquipoiseError, match=r"not grouped by 'subjects'.*Did you mean 'subject'"):
        labelled[2].groups("subjects")


def test_gpt_oss_counts_equal_an_independent_count(shared_data) -> None:
    recorded = np.load(shared_data("traces/gpt_oss_20b/mmlu_test.npz"))
    ids = recorded["topk_ids"]
    lengths = recorded["seq_lens"]
    trace = Trace.from_arrays(
        ids,
        num_experts=32,
        sequences=np.repeat(np.arange(len(lengths)), lengths),
        labels={"subject": recorded["categories"]},
    )
    for layer in range(24):
        values, counts = np.unique(ids[:, layer], return_counts=True)
        expected = dict(zip(values.tolist(), counts.tolist(), strict=True))
        found = {e: int(c) for e, c in enumerate(trace.counts_LE[layer]) if c}
        assert found == expected
    assert len(trace.values("subject")) == 57


def test_a_layer_filled_with_zeros_is_warned_of() -> None:
    ids = sample()
    ids[:, 1] = 0
    with pytest.warns(UserWarning, match="Layer 4: every token selects one and the same expert"):
        Trace.from_arrays(ids, layers=[3, 4, 5], num_experts=7)

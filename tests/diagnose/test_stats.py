"""`stats`: the promised JSON, right numbers from whole traces and views, floors and intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from equipoise.diagnose.evidence import gather, gather_by
from equipoise.diagnose.stats import layer_rows, stats, stats_by
from equipoise.errors import EquipoiseError
from equipoise.metrics import load
from equipoise.trace import Trace
from tests.diagnose.runs import DEAD, EVEN, HOT, run
from tests.metrics import naive

PROMISED = {
    "layer": int,
    "path": str,
    "experts": int,
    "top_k": int,
    "tokens": int,
    "counts": list,
    "max_vio": float,
    "max_vio_floor": float,
    "max_vio_interval": list,
    "gini": float,
    "cv": float,
    "entropy": float,
    "effective_experts": float,
    "never_selected": list,
    "least_used": list,
}


@pytest.fixture(scope="module")
def three():
    return run([EVEN, DEAD, HOT], layers=[2, 11, 3])


def test_the_promised_json_is_there(three):
    trace, _ = three
    found = json.loads(json.dumps(stats(trace), allow_nan=False))
    assert found["tokens"] == 20_000
    assert found["accuracy"] is None
    assert [row["layer"] for row in found["layers"]] == [2, 3, 11]
    for row in found["layers"]:
        assert {key: type(row[key]) for key in PROMISED} == PROMISED


def test_counts_and_measures_are_those_of_the_ids(three):
    trace, ids = three
    for row, position in zip(stats(trace)["layers"], [0, 2, 1], strict=True):
        counts = naive.count_ids(ids[:, position].tolist(), 16)
        assert row["counts"] == counts
        for name, value in naive.measures(counts).items():
            assert row[name] == pytest.approx(value), name
        assert sorted(row["least_used"]) == list(range(16))
        assert [counts[e] for e in row["least_used"]] == sorted(counts)


def test_known_loads_read_as_what_they_are(three):
    even, hot, dead = stats(three[0])["layers"]
    assert even["max_vio"] <= 1.5 * even["max_vio_floor_95"]
    assert even["max_vio_interval"][0] < 0.02
    assert even["design_effect"] == pytest.approx(1, abs=0.3)
    assert hot["max_vio_interval"][0] > 10 * hot["max_vio_floor"]
    assert hot["least_used"][-1] == 15
    assert dead["never_selected"] == [0]
    assert dead["least_used"][0] == 0
    assert dead["min_vio"] == -1
    assert dead["coverage"] == 15 / 16


def test_max_vio_of_windows_stands_beside_the_floor_of_a_window(three):
    trace, ids = three
    row = stats(trace)["layers"][0]
    full = [ids[a : a + 8192, 0] for a in (0, 8192)]  # the last window has 3,616 of 20,000 tokens
    expected = [naive.measures(naive.count_ids(w.tolist(), 16))["max_vio"] for w in full]
    assert row["batches"] == 2
    assert row["max_vio_batch_mean"] == pytest.approx(np.mean(expected))
    assert row["batch_tokens"] == 8192
    assert row["max_vio_batch_floor"] > row["max_vio_floor"]


def test_without_intervals_the_rows_are_not_read(three, monkeypatch):
    trace, _ = run([EVEN], tokens=500)
    monkeypatch.setattr(Trace, "batches", lambda *_: pytest.fail("read the token rows"))
    row = stats(trace, intervals=False)["layers"][0]
    assert row["max_vio_interval"] is None
    assert row["no_interval"] == "not asked for"
    assert row["gini_floor"] > 0
    assert layer_rows(trace, 0, intervals=False)[0]["ratio_interval"] is None


def test_too_few_documents_give_no_interval_and_say_why():
    trace, _ = run([EVEN], tokens=3000, per_document=1000)
    row = stats(trace)["layers"][0]
    assert row["max_vio_interval"] is None
    assert row["no_interval"] == "only 3 documents, 8 are needed"
    assert row["effective_tokens"] == pytest.approx(3000, rel=0.4)


def test_where_no_document_is_known_spans_of_tokens_are_blocks():
    trace, _ = run([EVEN], tokens=3000, per_document=None)
    found = stats(trace)
    assert found["block"] == "span"
    assert found["layers"][0]["max_vio_interval"] is not None
    few, _ = run([EVEN], tokens=300, per_document=None)
    assert stats(few)["layers"][0]["no_interval"] == "only 5 spans, 8 are needed"


def test_slots_without_an_expert_are_counted_apart():
    trace, ids = run([EVEN], tokens=1000)
    ids = ids.copy()
    ids[:100, 0, 1] = -1
    trace = Trace.from_arrays(ids, num_experts=16)
    row = stats(trace)["layers"][0]
    assert (row["unrouted"], row["unrouted_share"]) == (100, 0.05)
    assert sum(row["counts"]) == 1900


def test_an_interval_ends_at_one_expert_in_every_token_unless_slots_went_to_none():
    ids = np.tile([[[0, 1]]], (640, 1, 1))
    ids[:128] = [2, 3]  # two spans of ten
    row = stats(Trace.from_arrays(ids, num_experts=16))["layers"][0]
    assert row["max_vio_interval"][1] == 16 / 2 - 1
    ids[::10, 0, 1] = -1
    row = stats(Trace.from_arrays(ids, num_experts=16))["layers"][0]
    assert row["max_vio_interval"][1] > 16 / 2 - 1


def test_layers_of_different_size_are_measured_by_their_own():
    ids = np.stack([np.arange(4000).reshape(-1, 1) % 4, np.arange(4000).reshape(-1, 1) % 8], 1)
    rows = stats(Trace.from_arrays(ids, num_experts=[4, 8]))["layers"]
    assert [len(row["counts"]) for row in rows] == [4, 8]
    assert [row["max_vio"] for row in rows] == [0, 0]


def test_rows_of_a_layer_rank_every_expert_with_its_interval_and_idle_run(three):
    trace, ids = three
    rows = layer_rows(trace, 3)
    longest, _ = naive.idle_runs(ids[:, 2].tolist(), 16)
    assert [row["rank"] for row in rows] == list(range(1, 17))
    assert rows[-1]["expert"] == 15
    for row in rows:
        assert row["longest_idle"] == longest[row["expert"]]
        low, high = row["ratio_interval"]
        assert low < row["ratio"] < high
        assert row["share"] == pytest.approx(row["count"] / row["total"])
    assert layer_rows(trace, "layers.3") == rows
    assert layer_rows(trace, 11)[0]["longest_idle"] == 20_000


def test_unknown_layer_is_named_with_those_there_are(three):
    with pytest.raises(EquipoiseError, match="no MoE layer 7 in this trace: it has 2, 3, 11"):
        layer_rows(three[0], 7)


def labelled(documents=60):
    names = ["algebra", "law", "virology"]
    labels = {"subject": [names[s % 3] for s in range(documents)]}
    return run([HOT, EVEN], tokens=200 * documents, labels=labels)[0]


def test_groups_equal_the_views_of_them():
    trace = labelled()
    by = stats_by(trace, "subject")
    assert list(by) == ["algebra", "law", "virology"]
    for name, found in by.items():
        alone = stats(trace.select(subject=name))
        assert found == alone
    assert sum(found["tokens"] for found in by.values()) == trace.tokens


def test_groups_by_role_share_documents():
    trace = labelled()
    evidence = gather_by(trace, "role")["none"].layers[0]
    assert evidence.counts_BE.sum(0).tolist() == trace.counts_LE[0].tolist()
    assert evidence.tokens_B.sum() == trace.tokens


def test_splitting_by_what_was_not_recorded_is_refused():
    with pytest.raises(EquipoiseError, match="this trace has no domain"):
        stats_by(labelled(), "domain")
    with pytest.raises(EquipoiseError, match=r"not grouped by 'subjct'.*'subject'"):
        stats_by(labelled(), "subjct")


def test_evidence_is_whole_and_gathered_once(three, monkeypatch):
    trace, _ = three
    evidence = gather(trace)
    for i, here in enumerate(evidence.layers):
        assert here.counts_BE.sum(0).tolist() == trace.counts_LE[i].tolist()
        assert here.tokens_B.sum() == 20_000
    monkeypatch.setattr(Trace, "batches", lambda *_: pytest.fail("read again"))
    assert gather(trace) is evidence


def test_windows_are_blocks_where_no_rows_are_stored(three, monkeypatch):
    trace = three[0].select(layers=[2, 3])
    monkeypatch.setattr(Trace, "rows_complete", property(lambda _: False))
    found = stats(trace)
    assert found["block"] == "window"
    assert found["layers"][0]["no_interval"] == "only 3 windows, 8 are needed"
    many = trace.select(layers=3)
    window = next(many.windows())
    monkeypatch.setattr(Trace, "windows", lambda _: iter([window] * 1000))
    here = gather(many).layers[0]
    assert here.counts_BE.shape[0] <= 256
    assert here.tokens_B.sum() == 8192 * 1000
    assert set(here.tokens_B.tolist()) == {8192 * 4}


def test_nothing_routed_is_no_number():
    trace = Trace.from_arrays(np.full((50, 1, 2), -1), num_experts=4)
    row = stats(trace)["layers"][0]
    assert row["max_vio"] is None
    assert row["max_vio_floor"] is None
    assert row["never_selected"] == [0, 1, 2, 3]
    assert row["unrouted"] == 100
    json.dumps(stats(trace), allow_nan=False)


def test_counts_of_a_real_model_are_those_of_bincount(shared_data):
    data = np.load(shared_data("traces") / "gpt_oss_20b" / "mmlu_dev.npz")
    ids = data["topk_ids"]
    rows = stats(Trace.from_arrays(ids, num_experts=32), intervals=False)["layers"]
    for i, row in enumerate(rows):
        counts = np.bincount(ids[:, i].ravel(), minlength=32)
        assert row["counts"] == counts.tolist()
        assert row["max_vio"] == pytest.approx(float(load.max_vio(counts)))

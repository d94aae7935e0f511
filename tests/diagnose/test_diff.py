"""`diff`: two runs layer by layer, with what chance alone would change."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from equipoise.diagnose.diff import diff, js_distance
from equipoise.errors import EquipoiseError
from tests.diagnose.runs import DEAD, EVEN, HOT, run


def test_a_run_beside_itself_does_not_differ():
    trace, _ = run([EVEN, HOT])
    for row in diff(trace, trace)["layers"]:
        assert row["js_distance"] == 0
        assert row["least_overlap"] == 1
        assert row["max_vio"][0] == row["max_vio"][1]
        assert not any(row["share_change"])


def test_what_changed_is_found_and_what_did_not_stays_below_its_floor():
    same, changed = diff(run([EVEN, EVEN])[0], run([EVEN, HOT], seed=9)[0])["layers"]
    assert same["js_distance"] < 1.5 * same["js_floor"]
    assert changed["js_distance"] > 5 * changed["js_floor"]
    assert changed["most_changed"] == 15
    assert changed["share_change"][15] > 0
    assert changed["max_vio"][1] > changed["max_vio"][0]
    assert sum(changed["share_change"]) == pytest.approx(0)


def test_floor_is_the_distance_between_two_runs_of_one_model():
    rows = [diff(run([HOT], seed=s)[0], run([HOT], seed=s + 50)[0])["layers"][0] for s in range(8)]
    distances = np.sqrt(np.mean([row["js_distance"] ** 2 for row in rows]))
    assert distances == pytest.approx(np.mean([row["js_floor"] for row in rows]), rel=0.25)


def test_least_used_experts_are_compared_as_sets():
    a, b = run([[0.1, 0.1] + [1.0] * 14])[0], run([[0.1, 1.0, 0.1] + [1.0] * 13])[0]
    row = diff(a, b, least=2)["layers"][0]
    assert (row["least_k"], row["least_overlap"], row["least_overlap_floor"]) == (2, 0.5, 2 / 16)


def test_distance_is_scipys_in_bits():
    p, q = np.array([0.2, 0.0, 0.8]), np.array([0.5, 0.5, 0.0])
    assert js_distance(p, q) == pytest.approx(jensenshannon(p, q, base=2))
    assert js_distance(np.array([1.0, 0]), np.array([0, 1.0])) == 1


def test_accuracy_of_both_is_told():
    labels = {"correct": [True, False] * 50}
    found = diff(run([EVEN], labels=labels)[0], run([DEAD])[0])
    assert found["accuracy"] == [0.5, None]
    assert found["accuracy_change"] is None
    better = run([EVEN], labels={"correct": [True, True, True, False] * 25})[0]
    assert diff(run([EVEN], labels=labels)[0], better)["accuracy_change"] == 0.25
    json.dumps(found, allow_nan=False)


def test_a_dense_model_is_compared_by_accuracy_and_speed():
    score = {"overall": {"correct": 1, "questions": 4, "accuracy": 0.25}}
    dense = SimpleNamespace(
        layers=(), tokens=10, meta={"tokens_per_second": 5.0}, accuracy=lambda: score
    )
    found = diff(dense, run([EVEN])[0])
    assert found["layers"] == []
    assert found["dense"] == [True, False]
    assert found["accuracy"] == [0.25, None]
    assert found["tokens_per_second"] == [5.0, None]


def test_models_of_different_shape_are_refused_with_what_differs():
    one, _ = run([EVEN], tokens=100)
    with pytest.raises(
        EquipoiseError, match=r"layer 0 with 16 experts, top-2; .* 16 experts, top-3"
    ):
        diff(one, run([EVEN], tokens=100, top_k=3)[0])
    with pytest.raises(EquipoiseError, match="first has 1 MoE layers, the second 2"):
        diff(one, run([EVEN, EVEN], tokens=100)[0])

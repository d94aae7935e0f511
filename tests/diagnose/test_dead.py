"""`dead`: each verdict on a run built to earn it, in the stated precedence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from equipoise.diagnose.dead import VERDICTS, dead
from equipoise.errors import EquipoiseError
from equipoise.trace import Trace
from tests.diagnose.runs import DEAD, EVEN, ids_by, run
from tests.metrics import naive


def verdicts(found, layer=0):
    return [row["verdict"] for row in found["experts"] if row["layer"] == layer]


def test_never_selected_in_many_tokens_is_dead_and_idle_all_along():
    found = dead(run([DEAD])[0])
    assert verdicts(found) == ["dead"] + ["active"] * 15
    row = found["experts"][0]
    assert row["count"] == 0
    assert row["longest_idle"] == row["current_idle"] == 20_000
    assert 0 < row["share_upper"] < 0.01 / 16
    assert found["verdicts"]["dead"] == 1


def test_never_selected_in_few_tokens_is_not_dead():
    for tokens in (40, 400):
        found = dead(run([DEAD], tokens=tokens, per_document=20)[0])
        assert verdicts(found)[0] == "undetermined"
        assert found["experts"][0]["share_upper"] > 0.01 / 16


def test_tokens_that_say_the_same_do_not_add_up_to_dead():
    """20,000 tokens in 20 documents that each keep to one pair of experts tell as much as 20."""
    pairs = np.random.default_rng(0).integers(1, 8, 20) * 2
    ids = np.repeat(np.stack([pairs, pairs + 1], 1), 1000, axis=0)[:, None]
    trace = Trace.from_arrays(ids, num_experts=16, sequences=np.repeat(np.arange(20), 1000))
    assert verdicts(dead(trace))[0] == "undetermined"


def test_everyone_used_is_active():
    found = dead(run([EVEN])[0])
    assert set(verdicts(found)) == {"active"}
    assert list(found["verdicts"]) == list(VERDICTS)


def test_rarely_selected_everywhere_is_cold():
    found = dead(run([[0.02] + [1.0] * 15])[0])
    assert verdicts(found) == ["cold"] + ["active"] * 15
    assert found["experts"][0]["ratio_upper"] < 0.1


def test_low_but_not_surely_is_undetermined():
    found = dead(run([[0.06] + [1.0] * 15], tokens=600, per_document=20)[0])
    assert found["experts"][0]["count"] > 0
    assert found["experts"][0]["ratio"] < 0.1
    assert verdicts(found)[0] == "undetermined"


def specialised(seed=0):
    """Expert 0 serves one of thirty subjects, expert 1 hardly anyone."""
    documents, length = 300, 100
    chances = np.ones((documents, 16))
    chances[:, 0] = 0
    chances[::30, 0] = 1
    chances[:, 1] = 0.01
    ids = ids_by(np.repeat(chances, length, axis=0), 2, seed)[:, None]
    labels = {"subject": [f"subject {s % 30}" for s in range(documents)]}
    sequences = np.repeat(np.arange(documents), length)
    return Trace.from_arrays(ids, num_experts=16, sequences=sequences, labels=labels)


def test_cold_overall_but_not_in_one_subject_is_a_specialist_and_says_where():
    found = dead(specialised())
    assert verdicts(found)[:3] == ["specialist", "cold", "active"]
    where = found["experts"][0]["where"]
    assert [(row["by"], row["name"]) for row in where] == [("subject", "subject 0")]
    assert where[0]["ratio"] > 0.5
    assert found["experts"][1]["where"] == []


def test_chance_does_not_make_specialists():
    cold_everywhere = [0.02] * 4 + [1.0] * 12
    for seed in range(5):
        labels = {"subject": [f"subject {s % 20}" for s in range(100)]}
        found = dead(run([cold_everywhere], seed=seed, labels=labels)[0])
        assert verdicts(found)[:4] == ["cold"] * 4


def bursty():
    """Expert 0 is selected by every token of the first half, by none of the second."""
    chances = np.ones((8000, 8))
    chances[:4000, 0] = 50
    chances[4000:, 0] = 0
    ids = ids_by(chances, 2)
    return ids, Trace.from_arrays(ids[:, None], num_experts=8, sequences=np.arange(8000) // 100)


def test_long_run_without_a_selection_is_idle_by_the_threshold():
    ids, trace = bursty()
    found = dead(trace, idle=3000)
    assert verdicts(found) == ["idle"] + ["active"] * 7
    longest, current = naive.idle_runs(ids.tolist(), 8)
    assert [row["longest_idle"] for row in found["experts"]] == longest
    assert [row["current_idle"] for row in found["experts"]] == current
    assert found["idle_threshold"] == 3000
    assert set(verdicts(dead(trace))) == {"active"}


def test_dead_goes_before_idle_and_cold_goes_before_idle():
    found = dead(run([[0.0, 0.02] + [1.0] * 14])[0], idle=1)
    assert verdicts(found)[:2] == ["dead", "cold"]
    assert set(verdicts(found)[2:]) == {"idle"}


def test_idle_runs_need_every_row(monkeypatch):
    trace = run([DEAD])[0]
    monkeypatch.setattr(Trace, "rows_complete", property(lambda _: False))
    rows = dead(trace)["experts"]
    assert rows[0]["longest_idle"] == 20_000
    assert rows[0]["verdict"] == "undetermined"  # three windows: how alike tokens are is unknown
    assert rows[1]["longest_idle"] is None
    assert rows[1]["current_idle"] is None


def test_the_promised_json_is_there():
    found = json.loads(json.dumps(dead(run([DEAD, EVEN])[0]), allow_nan=False))
    assert found["idle_threshold"] == 10_000
    assert len(found["experts"]) == 32
    promised = ("layer", "expert", "verdict", "count", "share", "share_upper", "longest_idle")
    for row in found["experts"]:
        assert {*promised, "current_idle"} <= set(row)
        assert row["share"] <= row["share_upper"]


def test_bad_thresholds_are_refused_in_words():
    trace = run([EVEN], tokens=100)[0]
    with pytest.raises(EquipoiseError, match="number of tokens from 1 up, not 0"):
        dead(trace, idle=0)
    with pytest.raises(EquipoiseError, match=r"0 < dead <= cold < 1, not dead 0.2, cold 0.1"):
        dead(trace, dead_ratio=0.2)

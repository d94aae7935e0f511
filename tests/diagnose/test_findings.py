"""`findings`: the right statements, worst first, in sentences that stand alone."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.diagnose.dead import dead
from equipoise.diagnose.findings import SEVERITIES, findings
from equipoise.diagnose.stats import stats
from equipoise.trace import Trace
from tests.diagnose.runs import DEAD, EVEN, HOT, run


def codes(found):
    return [finding.code for finding in found]


def test_even_load_is_said_to_be_even():
    found = findings(run([EVEN, EVEN])[0])
    assert codes(found) == ["even"]
    assert found[0].severity == "good"
    assert found[0].value <= found[0].threshold * 1.5


def test_dead_and_uneven_are_told_with_their_evidence():
    found = findings(run([EVEN, DEAD, HOT])[0])
    assert codes(found) == ["dead", "uneven"]
    gone, uneven = found
    assert gone.experts == ((1, 0),)
    assert gone.message.startswith("1 expert of 48 in 1 of 3 layers is dead: never selected")
    assert uneven.layer == 2
    assert uneven.experts == ((2, 15),)
    assert uneven.interval[0] <= uneven.value <= uneven.interval[1]
    assert uneven.severity == "warning"


def test_worst_comes_first():
    found = findings(run([[0.0, 0.02] + [1.0] * 14], tokens=4000)[0])
    order = [SEVERITIES.index(finding.severity) for finding in found]
    assert order == sorted(order)


def test_few_tokens_are_said_to_be_few():
    found = findings(run([EVEN], tokens=60, per_document=6)[0])
    few = next(finding for finding in found if finding.code == "few_tokens")
    assert few.severity == "warning"
    assert few.value < few.threshold


def test_never_selected_but_untold_is_not_called_dead():
    found = findings(run([DEAD], tokens=300, per_document=20)[0])
    assert "dead" not in codes(found)
    untold = next(finding for finding in found if finding.code == "undetermined")
    assert "although 1 of them never came up" in untold.message


def test_slots_without_an_expert_are_told():
    ids = run([EVEN])[1].copy()
    ids[:4000, 0, 1] = -1
    found = findings(Trace.from_arrays(ids, num_experts=16))
    unrouted = next(finding for finding in found if finding.code == "unrouted")
    assert unrouted.value == pytest.approx(0.1)
    assert unrouted.severity == "warning"


@pytest.mark.parametrize(
    ("meta", "code"),
    [({"status": "partial"}, "partial"), ({"missing_ranks": [1]}, "missing_ranks")],
)
def test_what_is_missing_from_the_recording_is_told(meta, code):
    trace = run([EVEN])[0]
    trace.meta.update(meta)
    assert codes(findings(trace))[0] == code


def test_nothing_routed_is_one_error():
    trace = Trace.from_arrays(np.full((50, 1, 2), -1), num_experts=4)
    assert [(f.code, f.severity) for f in findings(trace)] == [("empty", "error")]


def test_answers_at_hand_are_not_computed_again(monkeypatch):
    trace = run([DEAD])[0]
    measured, verdicts = stats(trace), dead(trace)
    expected = findings(trace)
    monkeypatch.setattr("equipoise.diagnose.findings.stats", lambda _: pytest.fail("again"))
    monkeypatch.setattr("equipoise.diagnose.findings.dead", lambda _: pytest.fail("again"))
    assert findings(trace, measured=measured, verdicts=verdicts) == expected

"""A small trace with hostile names, and the rows of it, shared by the tests of the reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from equipoise.trace import Trace

HOSTILE = "<script>alert(1)</script>"
SUBJECTS = ("abstract_algebra", HOSTILE, "$x$ </svg><img src=x onerror=alert(2)>", "{{ 7 * 7 }}")
CATEGORIES = ("stem", HOSTILE, "other", "humanities")
LAYERS, EXPERTS, TOP_K, DOCUMENTS, LENGTH = 4, 16, 2, 40, 50
NEVER = (2, 7)
"""Layer and expert that is never selected."""


@pytest.fixture(scope="session")
def trace() -> Trace:
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(DOCUMENTS), LENGTH)
    scores = rng.gumbel(size=(len(document), LAYERS, EXPERTS))
    scores += rng.normal(size=(LAYERS, EXPERTS)) * 0.6
    scores[:, NEVER[0], NEVER[1]] = -np.inf
    scores[document % 4 == 1, 1, 5] += 3
    ids = np.argsort(-scores, -1)[..., :TOP_K]
    kind = [number % 4 for number in range(DOCUMENTS)]
    return Trace.from_arrays(
        ids,
        layers=[3, 4, 5, 60],
        num_experts=EXPERTS,
        sequences=document,
        labels={
            "subject": [SUBJECTS[k] for k in kind],
            "category": [CATEGORIES[k] for k in kind],
            "correct": [bool(number % 3) for number in range(DOCUMENTS)],
            "question": list(range(DOCUMENTS)),
        },
        meta={"model": f"model {HOSTILE}\x1b[31m", "task": "mmlu", "tokens_per_second": 3120.0},
    )


@pytest.fixture(scope="session")
def stats(trace: Trace) -> dict[str, Any]:
    from equipoise.diagnose.stats import stats

    return stats(trace)


@pytest.fixture(scope="session")
def dead(trace: Trace) -> dict[str, Any]:
    from equipoise.diagnose.dead import dead

    return dead(trace)


@pytest.fixture(scope="session")
def empty() -> Trace:
    return Trace.from_arrays(np.zeros((0, 3, 2), np.int64), num_experts=8)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A run of a model without experts that answered four questions, two of them right."""
    import torch
    from torch import nn

    import equipoise

    path = tmp_path_factory.mktemp("dense") / "dense.trace"
    model = nn.Sequential(nn.Linear(2, 2))
    with equipoise.record(model, path, allow_dense=True) as recorder:
        for number in range(4):
            row = recorder.add_sequence(subject="anatomy", category="stem", tokens=5)
            with recorder.batch(sequences=[row], starts=[0], lengths=[5], skip=[0]):
                model(torch.ones(1, 5, 2))
            recorder.complete(row, answer="A", choice="A", correct=number % 2 == 0)
    return equipoise.open(path)

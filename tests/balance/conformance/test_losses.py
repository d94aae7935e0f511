"""Every objective under every scope: the gradient is that of its definition, however a step is run."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.balance.conformance.models import FAMILIES, batch
from tests.balance.conformance.reference import Split, Term, counted, heard
from tests.balance.conformance.settings import (
    COMPILED,
    SINGLE,
    TERMS,
    TESTED_PARALLEL,
    TOKENS,
    Setting,
    run,
)
from tests.balance.conformance.table import outcomes
from tests.balance.conformance.verdict import judge, same_as_full_batch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", SINGLE, ids=lambda s: s.name)
def test_gradient_is_that_of_the_definition(setting: Setting, family: str) -> None:
    assert not wrong(family, setting, [])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", COMPILED[:2], ids=lambda s: s.name)
def test_compiled_gradient_is_that_of_the_definition(setting: Setting, family: str) -> None:
    assert not wrong(family, setting, [])


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor wants a C++ compiler")
def test_inductors_gradient_is_that_of_the_definition() -> None:
    assert not wrong("mixtral", COMPILED[2], [])


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", TESTED_PARALLEL, ids=lambda s: s.name)
def test_parallel_gradient_is_that_of_the_definition(
    setting: Setting, family: str, ranks: list[dict[str, Any]]
) -> None:
    assert not wrong(family, setting, ranks)


def wrong(family: str, setting: Setting, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Differences that are too large, by term."""
    bad = {}
    for chunk, by_rank in outcomes(family, setting, ranks):
        bad |= judge(family, setting, chunk, by_rank)
    return bad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", [Split(2), Split(4), Split(2, 2)], ids=str)
def test_what_does_not_feel_the_split(split: Split, family: str) -> None:
    """By the definitions: scope exact always; the others only where their tokens are the same."""
    padded, full = Setting("", split), Setting("", split, data="full")
    for term in TERMS:
        if term.scope == "exact" or term.kind:
            assert same_as_full_batch(family, padded, term), term
        if term.objective in TOKENS:
            assert same_as_full_batch(family, full, term), term
            assert same_as_full_batch(family, padded, term) == (term.scope == "exact"), term
        if term.scope in ("micro", "global") and term.objective in ("switch", "group"):
            assert not same_as_full_batch(family, full, term), term


def test_the_batches_show_what_they_are_for() -> None:
    """Micro-batches with experts that get no token, uneven padding, a half without tokens."""
    split = Split(4, 2)
    run_ = heard("mixtral", "padded", 0)
    counts = [
        counted(Term("switch", "micro"), run_, 0, split.tokens(m, r))
        for m in range(4)
        for r in range(2)
    ]
    assert any((c == 0).any() for c in counts)
    assert len({int(v) for v in batch("padded", 0).valid_BS.sum(1)}) > 4
    assert not batch("empty", 0).valid_BS[4:].any()


def test_a_wrong_reference_is_found_out() -> None:
    """The comparison can fail: one scope's gradient is not another's."""
    setting, terms = SINGLE[1], (Term("switch", "micro"),)
    found = list(run("mixtral", setting, terms))
    assert not judge("mixtral", setting, terms, [found])
    assert judge("mixtral", setting, (Term("switch", "group"),), [found]) == {}
    assert judge("mixtral", setting, (Term("switch", "exact"),), [found])
    assert judge("mixtral", setting, (Term("squared", "micro"),), [found])

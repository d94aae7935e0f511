"""docs/conformance.md: every method and setting of the suite is in it, and nothing is wrong there."""

from __future__ import annotations

import pytest

from equipoise.balance import CATALOGUE, SCOPES, controllers
from tests.balance.conformance import table
from tests.balance.conformance.controllers import CONTROLLERS, tried_in
from tests.balance.conformance.settings import SETTINGS, SINGLE, TERMS, terms_of


def test_the_page_has_the_methods_and_settings_of_the_suite() -> None:
    legend, heads, rows = table.read()
    assert [line.split(" (")[0] for line in legend] == [s.name for s in SETTINGS]
    assert heads == [str(n) for n in range(1, len(SETTINGS) + 1)]
    assert list(rows) == table.row_names(), "run: python scripts/conformance.py"


def test_cells_say_what_was_run_and_none_is_wrong() -> None:
    _, _, rows = table.read()
    for name, cells in rows.items():
        for setting, cell in zip(SETTINGS, cells, strict=True):
            ran = {*map(table.name_of, terms_of(setting)), *tried_in(setting)}
            assert (cell in (table.EQUAL, table.DEFINED)) == (name in ran), (name, setting.name)
            assert name in ran or cell == table.NOT_RUN


@pytest.mark.parametrize("column", [0, 1])
def test_cells_are_those_of_the_definitions(column: int) -> None:
    _, _, rows = table.read()
    for term in TERMS:
        assert rows[table.name_of(term)][column] == table.loss_cell(term, SINGLE[column]), term


def test_the_suite_has_every_objective_scope_and_controller() -> None:
    assert {t.objective for t in TERMS} == set(CATALOGUE)
    assert {t.scope for t in TERMS} == set(SCOPES)
    for objective in (o for o in CATALOGUE.values() if o.kind == "load"):
        assert {t.scope for t in TERMS if t.objective == objective.name} == set(SCOPES)
    tried = {type(t.controller).__name__ for t in CONTROLLERS.values()}
    offered = {
        name for name in controllers.__all__ if hasattr(getattr(controllers, name), "update")
    }
    assert tried == offered - {"Controller", "Observer", "State"}

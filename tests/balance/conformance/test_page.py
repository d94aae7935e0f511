"""docs/conformance.md: every method and setting of the suite is in it, and nothing is wrong there."""

from __future__ import annotations

import pytest

from equipoise.balance import CATALOGUE, SCOPES, controllers
from tests.balance.conformance import table
from tests.balance.conformance.controllers import CONTROLLERS
from tests.balance.conformance.settings import SETTINGS, TERMS


def test_the_page_has_the_methods_and_settings_of_the_suite() -> None:
    legend, heads, rows = table.read()
    assert [line.split(" (")[0] for line in legend] == [s.name for s in SETTINGS]
    assert heads == [str(n) for n in range(1, len(SETTINGS) + 1)]
    assert list(rows) == table.row_names(), "run: python scripts/conformance.py"


def test_every_method_was_run_in_every_setting_and_none_is_wrong() -> None:
    _, _, rows = table.read()
    for name, cells in rows.items():
        assert len(cells) == len(SETTINGS)
        assert set(cells) <= {table.EQUAL, table.DEFINED}, name


def test_no_difference_in_float32_is_above_what_is_asked() -> None:
    assert "In float32 above 1e-06: none." in table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "column",
    [n if n < 2 else pytest.param(n, marks=pytest.mark.slow) for n in range(len(SETTINGS))],
)
def test_cells_are_those_of_the_definitions(column: int) -> None:
    """What the tests beside this one find right is what the page says of it."""
    _, _, rows = table.read()
    setting = SETTINGS[column]
    for term in TERMS:
        assert rows[table.name_of(term)][column] == table.loss_cell(term, setting), term
    for name, tried in CONTROLLERS.items():
        assert rows[name][column] == table.controller_cell(tried, setting), name


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

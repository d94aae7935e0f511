"""The conformance table: rows are methods, columns settings, cells what the tests' own runs find."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.balance.conformance.controllers import (
    CONTROLLERS,
    Tried,
    deviation,
    expected,
    follows,
    run_bias,
    run_weights,
)
from tests.balance.conformance.models import FAMILIES
from tests.balance.conformance.reference import Split, Term
from tests.balance.conformance.settings import (
    COMPILED,
    ONE,
    PARALLEL,
    SETTINGS,
    TERMS,
    Outcome,
    Setting,
    chunks,
    run,
    terms_of,
)
from tests.balance.conformance.verdict import TOLERANCE, differences, same_as_full_batch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "conformance.md"
BEGIN, END = "<!-- table: python scripts/conformance.py -->", "<!-- end of table -->"
EQUAL, DEFINED, WRONG = "=", "def", "WRONG"
ASKED = 1e-6
"""Relative difference that float32 columns are held against below the table."""
Found = list[dict[str, Any]]
"""What each of two processes found."""


@dataclass(frozen=True)
class Cell:
    """What one method gave in one setting."""

    says: str
    difference: float
    """From the reference, the larger of both families; of the histogram by bins, so NaN."""


Column = dict[str, Cell]


def name_of(term: Term) -> str:
    """How a row calls a term."""
    extra = [x for x in (term.kind, term.count if term.count != "selected" else "") if x]
    scope = "-" if term.kind else term.scope
    return " · ".join([term.objective, scope, *extra])


def row_names() -> list[str]:
    """The first column."""
    return [*map(name_of, TERMS), *CONTROLLERS]


def chunks_of(setting: Setting, every: bool = False) -> list[tuple[Term, ...]]:
    """Terms that are attached together; compiled code takes all at once, to be compiled once."""
    terms = terms_of(setting, every)
    return [terms] if setting in COMPILED else chunks(terms)


def outcomes(
    family: str, setting: Setting, ranks: Found, every: bool = False
) -> Iterator[tuple[tuple[Term, ...], list[list[Outcome]]]]:
    """The outcomes of each chunk of terms, one list per rank."""
    start = 0
    for chunk in chunks_of(setting, every):
        if setting not in PARALLEL:
            yield chunk, [list(run(family, setting, chunk))]
            continue
        numbers = range(start, start + len(chunk))
        yield chunk, [[r["losses"][setting.name, family, n] for n in numbers] for r in ranks]
        start += len(chunk)


@cache
def _equal(term: Term, split: Split, data: str, expects: bool) -> bool:
    setting = Setting("", split, data=data, expects=expects)
    return same_as_full_batch("mixtral", setting, term)


def loss_cell(term: Term, setting: Setting) -> str:
    """What is to be expected: the full batch's gradient, or that of the definition at the split."""
    equal = _equal(term, setting.split, setting.data, setting.expects)
    return EQUAL if equal else DEFINED


def controller_cell(tried: Tried, setting: Setting) -> str:
    """The same of a controller."""
    return EQUAL if tried.splits or setting.split == ONE else DEFINED


def column(setting: Setting, ranks: Found) -> Column:
    """Every method in one setting."""
    return _losses(setting, ranks) | _controllers(setting, ranks)


def _losses(setting: Setting, ranks: Found) -> Column:
    found: dict[str, float] = {}
    for family in FAMILIES:
        for chunk, by_rank in outcomes(family, setting, ranks, every=True):
            for name, d in differences(family, setting, chunk, by_rank).items():
                found[name] = max(d, found.get(name, 0.0))
    right = TOLERANCE[setting.dtype]
    return {
        name_of(t): Cell(loss_cell(t, setting) if found[t.name] <= right else WRONG, found[t.name])
        for t in TERMS
    }


def _controllers(setting: Setting, ranks: Found) -> Column:
    cells = {}
    for name, tried in CONTROLLERS.items():
        right, worst = True, math.nan if tried.binned else 0.0
        for family in FAMILIES:
            if setting in PARALLEL:
                held, other = (r["controllers"][setting.name, family, name] for r in ranks)
                right = right and all(map(torch.equal, held, other))
            else:
                held = (run_bias if tried.is_bias else run_weights)(tried, family, setting)
            wanted = expected(tried, family, setting, held)
            right = right and follows(tried, held, wanted)
            worst = max(worst, deviation(held, wanted))
        cells[name] = Cell(controller_cell(tried, setting) if right else WRONG, worst)
    return cells


def lines(columns: Sequence[Column]) -> list[str]:
    """The lines of the table, and what differences were seen."""
    numbers = range(1, len(SETTINGS) + 1)
    head = [f"| method | {' | '.join(map(str, numbers))} |", "|---" * (len(SETTINGS) + 1) + "|"]
    rows = [
        f"| {name} | {' | '.join(column[name].says for column in columns)} |"
        for name in row_names()
    ]
    legend = [f"{n}. {setting.name}{_data(setting)}" for n, setting in enumerate(SETTINGS, 1)]
    return [*legend, "", *head, *rows, "", *_seen(columns)]


def _seen(columns: Sequence[Column]) -> Iterator[str]:
    """Largest differences by type, and every cell of float32 above what is asked for."""
    cells = [
        (cell.difference, name, number, setting.dtype)
        for number, (setting, column) in enumerate(zip(SETTINGS, columns, strict=True), 1)
        for name, cell in column.items()
        if not math.isnan(cell.difference)
    ]
    for dtype in TOLERANCE:
        worst, name, number, _ = max(c for c in cells if c[3] == dtype)
        kind = str(dtype).removeprefix("torch.")
        yield f"Largest difference in {kind}: {worst:.1e} ({name}, column {number})."
    above = [c for c in sorted(cells, reverse=True) if c[0] > ASKED and c[3] == torch.float32]
    listed = "; ".join(f"{name}, column {number}: {d:.1e}" for d, name, number, _ in above)
    yield f"In float32 above {ASKED:.0e}: {listed or 'none'}."


def _data(setting: Setting) -> str:
    told = {"padded": "unevenly padded", "full": "no padding", "packed": "two sequences a row"}
    told["empty"] = "one rank's rows are all padding"
    split = setting.split
    size = f"{split.micro} micro-batch{'es' if split.micro > 1 else ''}"
    return f" ({told[setting.data]}; {size}{' on each of 2 ranks' if split.ranks > 1 else ''})"


def read() -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Legend, column heads and rows of the page as it is."""
    part = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    found = [line for line in part.splitlines() if line.strip()]
    legend = [line.split(". ", 1)[1] for line in found if line[0].isdigit()]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in found if line.startswith("|")]
    return legend, rows[0][1:], {row[0]: row[1:] for row in rows[2:]}


def write(columns: Sequence[Column]) -> int:
    """Rewrite the page's table; gives the number of wrong cells."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    made = "\n".join([BEGIN, "", *lines(columns), "", END])
    PAGE.write_text(before + made + after, encoding="utf-8")
    return sum(cell.says == WRONG for column in columns for cell in column.values())

"""The conformance table: rows are methods, columns settings, cells what the tests' own runs find."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.balance.conformance.controllers import (
    CONTROLLERS,
    expected,
    follows,
    run_bias,
    run_weights,
    tried_in,
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
from tests.balance.conformance.verdict import judge, same_as_full_batch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "conformance.md"
BEGIN, END = "<!-- table: python scripts/conformance.py -->", "<!-- end of table -->"
EQUAL, DEFINED, NOT_RUN, WRONG = "=", "def", "", "WRONG"
Found = list[dict[str, Any]]
"""What each of two processes found."""


def name_of(term: Term) -> str:
    """How a row calls a term."""
    extra = [x for x in (term.kind, term.count if term.count != "selected" else "") if x]
    scope = "-" if term.kind else term.scope
    return " · ".join([term.objective, scope, *extra])


def row_names() -> list[str]:
    """The first column."""
    return [*map(name_of, TERMS), *CONTROLLERS]


def chunks_of(setting: Setting) -> list[tuple[Term, ...]]:
    """Terms that are attached together; compiled code takes all at once, to be compiled once."""
    terms = terms_of(setting)
    return [terms] if setting in COMPILED else chunks(terms)


def outcomes(
    family: str, setting: Setting, ranks: Found
) -> Iterator[tuple[tuple[Term, ...], list[list[Outcome]]]]:
    """The outcomes of each chunk of terms, one list per rank."""
    start = 0
    for chunk in chunks_of(setting):
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


def loss_cells(setting: Setting, ranks: Found) -> dict[str, str]:
    """A column of the losses."""
    wrong: set[str] = set()
    for family in FAMILIES:
        for chunk, by_rank in outcomes(family, setting, ranks):
            wrong |= set(judge(family, setting, chunk, by_rank))
    return {
        name_of(t): WRONG if t.name in wrong else loss_cell(t, setting) for t in terms_of(setting)
    }


def controller_cells(setting: Setting, ranks: Found) -> dict[str, str]:
    """A column of the controllers."""
    cells = {}
    for name, tried in tried_in(setting).items():
        right = True
        for family in FAMILIES:
            if setting in PARALLEL:
                held = ranks[0]["controllers"][setting.name, family, name]
            else:
                held = (run_bias if tried.is_bias else run_weights)(tried, family, setting)
            right = right and follows(tried, held, expected(tried, family, setting, held))
        equal = tried.splits or setting.split == ONE
        cells[name] = (EQUAL if equal else DEFINED) if right else WRONG
    return cells


def table(ranks: Found) -> list[str]:
    """The lines of the table, all settings run."""
    columns = [loss_cells(s, ranks) | controller_cells(s, ranks) for s in SETTINGS]
    numbers = range(1, len(SETTINGS) + 1)
    lines = [f"| method | {' | '.join(map(str, numbers))} |", "|---" * (len(SETTINGS) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(column.get(name, NOT_RUN) for column in columns)} |"
        for name in row_names()
    ]
    legend = [f"{n}. {setting.name}{_data(setting)}" for n, setting in enumerate(SETTINGS, 1)]
    return [*legend, "", *lines]


def _data(setting: Setting) -> str:
    told = {"padded": "unevenly padded", "full": "no padding", "packed": "two sequences a row"}
    told["empty"] = "one rank's rows are all padding"
    split = setting.split
    size = f"{split.micro} micro-batch{'es' if split.micro > 1 else ''}"
    return f" ({told[setting.data]}; {size}{' on each of 2 ranks' if split.ranks > 1 else ''})"


def read() -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Legend, column heads and rows of the page as it is."""
    part = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in part.splitlines() if line.strip()]
    legend = [line.split(". ", 1)[1] for line in lines if not line.startswith("|")]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return legend, rows[0][1:], {row[0]: row[1:] for row in rows[2:]}


def write(ranks: Found) -> int:
    """Rewrite the page's table; gives the number of wrong cells."""
    lines = table(ranks)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(before + "\n".join([BEGIN, "", *lines, "", END]) + after, encoding="utf-8")
    return "\n".join(lines).count(WRONG)

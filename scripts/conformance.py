"""Rewrite the table in docs/conformance.md: python scripts/conformance.py [--resume] [COLUMN ...]

Runs every method in every setting of tests/balance/conformance, two processes for the parallel ones.
Each finished column is kept in build/conformance. --resume takes those of an earlier run as they
stand (right only if no code has changed since) and runs the rest; numbers of columns run these again.
About 40 minutes on one core, two thirds of it for the compiled columns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from tests.balance.conformance import table  # noqa: E402
from tests.balance.conformance.processes import two_processes  # noqa: E402
from tests.balance.conformance.settings import PARALLEL, SETTINGS, Setting  # noqa: E402

KEPT = ROOT / "build" / "conformance"


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--resume", action="store_true", help="keep columns that were finished")
    asked.add_argument("again", nargs="*", type=int, metavar="COLUMN", help="run these again")
    args = asked.parse_args()
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    columns = []
    for number, setting in enumerate(SETTINGS, 1):
        file = KEPT / f"{number}.json"
        kept = _kept(file, setting) if args.resume or args.again else None
        if kept is None or number in args.again:
            kept = _run(number, setting, file)
        columns.append(kept)
    wrong = table.write(columns)
    page = table.PAGE.relative_to(ROOT)
    print(f"Wrote {page} ({len(columns[0])} methods, {len(columns)} settings, {wrong} wrong).")
    return 1 if wrong else 0


def _kept(file: Path, setting: Setting) -> table.Column | None:
    """A column of an earlier run, if it has the suite's methods."""
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    same = found["setting"] == setting.name and list(found["cells"]) == table.row_names()
    return {name: table.Cell(**cell) for name, cell in found["cells"].items()} if same else None


def _run(number: int, setting: Setting, file: Path) -> table.Column:
    """Run a column and keep it."""
    print(f"[{number}/{len(SETTINGS)}] {setting.name} ...", end=" ", file=sys.stderr, flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ranks = two_processes(Path(folder), setting.name) if setting in PARALLEL else []
    column = table.column(setting, ranks)
    cells = {name: asdict(cell) for name, cell in column.items()}
    text = json.dumps({"setting": setting.name, "cells": cells}, indent=1)
    file.write_text(text, encoding="utf-8")
    wrong = [name for name, cell in column.items() if cell.says == table.WRONG]
    says = f"wrong: {', '.join(wrong)}" if wrong else "right"
    print(f"{time.monotonic() - start:.0f} s, {says}", file=sys.stderr, flush=True)
    return column


if __name__ == "__main__":
    sys.exit(main())

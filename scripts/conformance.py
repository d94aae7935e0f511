"""Rewrite the table in docs/conformance.md from the tests' own runs: python scripts/conformance.py

Runs every method in every setting of tests/balance/conformance, two processes for the parallel
ones, and writes what they gave. A few minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from tests.balance.conformance import table  # noqa: E402
from tests.balance.conformance.processes import two_processes  # noqa: E402


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ranks = two_processes(Path(folder))
    wrong = table.write(ranks)
    print(
        f"Wrote {table.PAGE.relative_to(ROOT)} ({len(table.row_names())} methods, {wrong} wrong)."
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

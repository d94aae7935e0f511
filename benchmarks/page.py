"""Write docs/benchmarks.md from results: `python benchmarks/page.py RESULT.json ...`.

Each result is what a benchmark wrote with `--json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Every figure is a ratio to a baseline in the same run, or stands beside what the machine gave meanwhile:
absolute speeds vary with the machine, and on a shared one from minute to minute. Variants take turns in
every round; figures are medians over rounds. Tables are written by `python benchmarks/page.py`; words
between them, and rows of other machines, by hand.

Not measured yet: anything on a GPU.
"""


def section(path: Path) -> str:
    """One benchmark as Markdown."""
    found = json.loads(path.read_text())
    columns = list(found["rows"][0])
    lines = [f"## {found['title']}", "", f"`{found['command']}`", "", f"{found['machine']}", ""]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in found["rows"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text("\n".join([HEAD, *(section(Path(name)) for name in sys.argv[1:])]))
    print(f"Wrote {PAGE.name}")

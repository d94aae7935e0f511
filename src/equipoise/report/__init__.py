"""Findings and measures to terminal, HTML, JSON, CSV and figures.

    report.write_html(trace, "report.html")
    report.write_figures(trace, "figures")

Tables for the terminal are in `report.terminal`, JSON and CSV in `report.export`. They all take
plain rows from `equipoise.diagnose` and compute nothing themselves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.report import export, terminal
    from equipoise.report.export import to_csv, to_json
    from equipoise.report.figures import write_figures
    from equipoise.report.html import write_html

_HOMES = {
    "write_html": "html",
    "write_figures": "figures",
    "to_json": "export",
    "to_csv": "export",
}
_MODULES = ("export", "terminal")

__all__ = ["export", "terminal", "to_csv", "to_json", "write_figures", "write_html"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"equipoise.report.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"equipoise.report.{name}")
    raise AttributeError(f"module 'equipoise.report' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Equipoise: measure, explain and repair the load of the experts in Mixture-of-Experts models.

    import equipoise

    with equipoise.record(model, "run.trace"):
        model(**inputs)
    trace = equipoise.open("run.trace")
    trace.counts_LE  # selections per layer and expert

Nothing heavy is loaded by importing this package: each name below loads its room when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from equipoise import capture, diagnose, metrics, models, report, trace
    from equipoise.capture.recorder import record
    from equipoise.errors import EquipoiseError, RoutingError, TraceError
    from equipoise.routing import Routing
    from equipoise.trace import Trace
    from equipoise.trace import open_trace as open

_HOMES = {
    "record": ("equipoise.capture.recorder", "record"),
    "open": ("equipoise.trace", "open_trace"),
    "Trace": ("equipoise.trace", "Trace"),
    "Routing": ("equipoise.routing", "Routing"),
    "EquipoiseError": ("equipoise.errors", "EquipoiseError"),
    "RoutingError": ("equipoise.errors", "RoutingError"),
    "TraceError": ("equipoise.errors", "TraceError"),
}
_ROOMS = ("balance", "capture", "diagnose", "lab", "metrics", "models", "nn", "report", "trace")

__all__ = [
    "EquipoiseError",
    "Routing",
    "RoutingError",
    "Trace",
    "TraceError",
    "capture",
    "diagnose",
    "metrics",
    "models",
    "open",
    "record",
    "report",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _ROOMS:
        return importlib.import_module(f"equipoise.{name}")
    raise AttributeError(f"module 'equipoise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})

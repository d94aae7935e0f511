"""Numbers as people read them: compact, never cut, the same in the terminal and in the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOTHING = "-"
"""Stands where a number is unknown: not measured, or not a number."""


def compact(value: float | None) -> str:
    """A count in at most 5 characters: 999, 12.3k, 1.23M, 456G."""
    if value is None or not math.isfinite(value):
        return NOTHING
    size = abs(value)
    for unit, name in ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        scaled = size / unit
        if scaled < 999.5 or name == "T":
            break
    if not name:
        return f"{value:.0f}"
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{value / unit:.{digits}f}{name}"


def measure(value: float | None) -> str:
    """A measure in at most 5 characters for values up to 99999: 0.123, 1.23, 12.3, 123."""
    if value is None or not math.isfinite(value):
        return NOTHING
    size = abs(value)
    digits = 3 if size < 0.9995 else 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A share as a fraction of one, three significant digits: 0.0312, 0.000417, 0, 3.1e-06."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    if value < 9.995e-5:
        return f"{value:.1e}"
    return f"{value:.{max(2 - math.floor(math.log10(value)), 2)}f}"


def interval(bounds: Sequence[float | None] | None, form: object = measure) -> str:
    """Lower and upper bound, "0.83..1.20"; "-" when there is none."""
    if not bounds or any(b is None or not math.isfinite(b) for b in bounds):
        return NOTHING
    assert callable(form)
    return "..".join(form(bound) for bound in bounds)


def percent(value: float | None) -> str:
    """A part of one as a percentage with one decimal."""
    return NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


def size(count: float | None) -> str:
    """Bytes in decimal units: 4.1 MB."""
    if count is None:
        return NOTHING
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def duration(seconds: float | None) -> str:
    """Seconds as 1.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def ids(numbers: Sequence[int], shown: int = 8) -> str:
    """Expert numbers, the first few and how many more: "3, 7, 12 and 5 more"."""
    listed = ", ".join(map(str, numbers[:shown]))
    more = len(numbers) - shown
    return f"{listed} and {more} more" if more > 0 else listed or "none"


def grouped(number: float | None) -> str:
    """A whole number with commas: 14,042."""
    return NOTHING if number is None else f"{number:,}"


def line(text: object) -> str:
    """Text from outside on one line, without control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))

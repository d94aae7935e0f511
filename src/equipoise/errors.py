"""The errors that a user sees: one line that names what was seen, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EquipoiseError(ValueError):
    """Bad input or an unusable file; the command line prints it without a traceback, exit code 2."""


class TraceError(EquipoiseError):
    """A trace folder that cannot be read, trusted or written."""


class RoutingError(EquipoiseError):
    """A model whose routing cannot be seen in full, or that routed to impossible experts."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean X?' for the closest of the allowed words, or '' when none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def counted(number: int, noun: str) -> str:
    """'1 domain', '3 domains'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

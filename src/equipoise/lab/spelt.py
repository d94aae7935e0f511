"""Balancing terms field by field, as JSON: what a run's setting stood for, to tell a changed default by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from equipoise.balance.catalogue import Objective


def spelt(value: Any) -> Any:
    """A term, or a list of terms, or what one holds: every field, defaults too."""
    if isinstance(value, Objective):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: spelt(getattr(value, field.name)) for field in fields(value)}
        return {"is": type(value).__name__, **held}
    if isinstance(value, Mapping):
        return {str(key): spelt(held) for key, held in value.items()}
    if isinstance(value, tuple | list):
        return [spelt(held) for held in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def changed(before: Any, now: Any, path: str = "") -> str:
    """The first field with another value now, in words; "" where there is none.

    A field that there was not yet changes nothing: as a new setting, it leaves old runs what they are.
    """
    kinds = [_kinds(value) for value in (before, now)]
    if kinds[0] != kinds[1]:
        return f"{path or 'the terms'}: {kinds[0]} before, {kinds[1]} now"
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(before, dict):
        inside = f"{path}.{before['is']}".lstrip(".") if "is" in before else path
        parts = [(before[key], now.get(key), f"{inside}.{key}") for key in before]
    elif isinstance(before, list):
        parts = [(*pair, path) for pair in zip(before, now, strict=True)]
    return next((found for part in parts if (found := changed(*part))), "")


def _kinds(value: Any) -> str:
    """What has to be the same on either side before its parts are compared."""
    if isinstance(value, dict):
        return str(value.get("is", "options"))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " + ".join(_kinds(held) for held in value) or "none"
    return repr(value)

"""What `record` returns when recording is switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from equipoise.trace.schema import Manifest


class Off:
    """Stands in for a Recorder when EQUIPOISE_TRACE=off: every method does nothing."""

    tokens = 0

    def __init__(self) -> None:
        self.done: set[tuple[Any, ...]] = set()
        self.manifest = Manifest(())

    def __enter__(self) -> Off:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add_sequence(self, **_: Any) -> int:
        """Nothing; returns -1."""
        return -1

    @contextmanager
    def batch(self, *_: Any, **__: Any) -> Iterator[None]:
        """Nothing."""
        yield

    def complete(self, sequence: int, **_: Any) -> None:
        """Nothing."""

    def close(self, status: str = "complete") -> None:
        """Nothing."""

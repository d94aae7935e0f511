"""Files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equipoise.errors import EquipoiseError


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns a write that failed into one line, and leaves no half file."""
    try:
        yield
    except Exception as error:
        if not _of_the_disk(error):
            raise
        if path.is_file():
            path.unlink()
        raise EquipoiseError(
            f"{path.parent} cannot be written ({error}). What was saved before is whole: "
            "make room and run the same command again."
        ) from error


def _of_the_disk(error: Exception) -> bool:
    """torch and safetensors tell of a full disk by errors of their own."""
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        return any(word in str(error).lower() for word in ("writ", "ioerror", "i/o"))
    return isinstance(error, OSError)

"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equipoise.errors import EquipoiseError

_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns a write that failed into one line, and leaves no half file."""
    try:
        yield
    except BaseException as error:
        if path.is_file():
            path.unlink()
        if not _of_the_disk(error):
            raise
        room = not isinstance(error, OSError) or error.errno in _ROOM
        raise EquipoiseError(
            f"{path.parent} cannot be written ({error}). What was saved before is whole: "
            f"{'make room and run' if room else 'see to it, and run'} the same command again."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, whose file then takes the place of `path`, on the disk and not only in memory."""
    unfinished = path.with_name(path.name + ".tmp")
    with saving(unfinished):
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)


def _of_the_disk(error: BaseException | None) -> bool:
    """torch and safetensors tell of a full disk by errors of their own, torch by two at once."""
    if error is None:
        return False
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        words = ("writ", "ioerror", "i/o", "iostream", "inline_container")
        if any(word in str(error).lower() for word in words):
            return True
        return isinstance(error, RuntimeError) and _of_the_disk(error.__context__)
    return isinstance(error, OSError)

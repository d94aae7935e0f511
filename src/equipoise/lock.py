"""A file that one process holds; the system frees it when that process dies."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from equipoise.errors import EquipoiseError


class HeldError(EquipoiseError):
    """Another process holds the lock."""


class Lock:
    """An advisory lock, held from here to `release`, which removes its file.

    what: is written under the lock, for the error. Raises HeldError where another process has it. On
    Windows, without such locks, nothing is refused.
    """

    def __init__(self, path: Path, what: str | Path) -> None:
        self.path = path
        while True:
            self._file: TextIO | None = path.open("a+")
            try:
                _exclude_others(self._file)
            except OSError:
                self._file.seek(0)
                owner = self._file.read().strip() or "unknown"
                self._file.close()
                raise HeldError(
                    f"{what} is being written by another process (pid {owner}). Wait for it to end,"
                    " or choose another name."
                ) from None
            if os.fstat(self._file.fileno()).st_nlink > 0:
                break
            self._file.close()  # its holder removed it in between: what is locked is no more there
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Free the lock and remove its file."""
        if self._file is not None:
            with suppress(PermissionError):  # Windows keeps what is open
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _exclude_others(file: TextIO) -> None:
    """Lock the file, or raise OSError."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""Signals of the processes that tests start."""

from __future__ import annotations

import signal


def heed_ctrl_c() -> None:
    """For a child: a shell's background jobs, and all that they start, ignore SIGINT otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

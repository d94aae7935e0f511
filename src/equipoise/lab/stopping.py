"""Ctrl-C and SIGTERM: a run ends its step, saves, and stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """While it is entered, a first signal is only noted in `asked`; a second one interrupts.

    Between the optimizer's step and the next forward pass is the one place to save, so that the
    run itself asks. Threads other than the main one get no signals: there this does nothing.
    `say` is told of the first signal.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        self.asked, self.say = False, say
        self._before: dict[signal.Signals, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say("Stopping when this step is made and saved; once more stops at once.")

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

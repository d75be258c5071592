"""Signals that end a program become one exception, so that everything is released before it ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# after the first signal others are taken for impatience; then, if the program is still there, they count again
IMPATIENCE_S = 10.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM, or the terminal went away. `exit_code` is what shells show for it: 130, 143, 129."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def ending_signals(*, for_good: bool) -> Iterator[None]:
    """Inside, signals that end a program raise Interrupted, once. What ignores them already goes on ignoring them.

    `for_good`: nothing follows but the end of the process, so that they are ignored afterwards: all is written by then.
    """
    last = float("-inf")

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > IMPATIENCE_S:
            last = now
            raise Interrupted(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) in (
                signal.SIG_DFL,
                signal.default_int_handler,
            ):
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if for_good else handler)

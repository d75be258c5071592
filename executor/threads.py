"""Starting a thread without waiting for ever, and cores that waiting threads leave to others."""

from __future__ import annotations

import os
import threading

from planner.errors import OutOfMemory

# a thread begins within microseconds, or not at all; short turns, so that a process that was stopped for minutes
# and goes on does not count them
TURNS, TURN_S = 100, 0.1


def leave_cores() -> None:
    """From now on a thread of torch's that waits for the others burns its core for some 0.2 ms, not for 15; before torch is imported.

    The core is wanted by the thread that reads weights. Read by GNU's OpenMP when it is loaded; others do not spin so long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")


class _Begun(threading.Event):
    """What `Thread.start` waits for, with an end."""

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            return super().wait(timeout)
        for _ in range(TURNS):
            if super().wait(TURN_S):
                return True
        raise RuntimeError("it got no memory to begin with")


def start_thread(thread: threading.Thread, what: str) -> None:
    """Nothing, once the thread has begun; OutOfMemory where the system refuses it or it ends before it could begin.

    In the second case `Thread.start` by itself waits for ever, since nobody tells it:
    https://github.com/python/cpython/issues/140746 (3.11 to 3.14).
    """
    # private, and the same from 3.10 to 3.14; where it is not there, Python's own wait stays
    if hasattr(thread, "_started"):
        thread._started = _Begun()
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        # one that never began would be listed as one to come
        getattr(threading, "_limbo", {}).pop(thread, None)
        raise OutOfMemory(f"{what}: a thread was refused: {str(error) or 'no memory'}") from None

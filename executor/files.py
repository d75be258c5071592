"""Reading weights: files opened once, and large reads shared by several threads.

One core copies some 6 GB/s out of the page cache, a card's bus brings four times as much, and a fast disk wants several
reads in flight.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from executor.threads import start_thread
from planner.errors import CheckpointError, RunFailed
from planner.units import MIB

SHARE_BYTES = 4 * MIB  # less than that is not worth waking another thread for
ALIGNED_BYTES = 4096  # where a share may begin
READERS = 4  # so many copy out of the page cache as fast as a card's bus takes it


def readers_beside_a_card() -> int:
    """Threads to read with where steps run on a card: one of the host's cores stays for whoever issues them."""
    return max(1, min(READERS, (os.cpu_count() or 1) - 1))


class Files:
    """Open files by path, each opened once, read only; closed together, with the threads that helped to read."""

    def __init__(self, readers: int = 1) -> None:
        """`readers`: threads that read together, the caller's one of them."""
        self._handles: dict[Path, int] = {}
        # without `preadv` a file has one position, which its reads share
        self._crew = Crew(readers if hasattr(os, "preadv") else 1)

    def read(self, path: Path, offset_bytes: int, targets: Sequence[memoryview]) -> None:
        """Fill the targets one behind another from `offset_bytes` on; when it returns or raises, nothing is under way.

        CheckpointError where the file ends early or cannot be opened, RunFailed where the disk fails.
        """
        handle = self._open(path)
        size = sum(map(len, targets))
        self._crew.do(
            [
                partial(self._share, path, handle, offset_bytes + start, _cut(targets, start, stop))
                for start, stop in _shares(size, min(self._crew.size, size // SHARE_BYTES))
            ]
        )

    def _open(self, path: Path) -> int:
        if path not in self._handles:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            try:
                self._handles[path] = os.open(path, flags)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
        return self._handles[path]

    def _share(self, path: Path, handle: int, offset_bytes: int, targets: list[memoryview]) -> None:
        """What one thread reads."""
        views = list(targets)
        try:
            while views:
                count = _read_once(handle, views, offset_bytes)
                if count == 0:
                    missing = sum(len(view) for view in views)
                    raise CheckpointError(
                        f"{path}: the file ends at byte {offset_bytes}, {missing} bytes short of a tensor; "
                        "it was cut off or replaced: fetch it anew"
                    )
                offset_bytes += count
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if count:
                    views[0] = views[0][count:]
        except OSError as error:
            raise RunFailed(
                f"{path}: the disk failed at byte {offset_bytes}: {error.strerror}; "
                "run again, and if it fails there again, fetch the checkpoint to another disk"
            ) from None

    def close(self) -> None:
        self._crew.close()
        while self._handles:
            os.close(self._handles.popitem()[1])


Part = Callable[[], None]


class Crew:
    """Threads that do the parts of one thing at once; they begin with the first thing that has several."""

    def __init__(self, size: int) -> None:
        """`size`: with the caller's own."""
        self.size = size
        self._given: SimpleQueue[tuple[Part, SimpleQueue[BaseException | None]] | None]
        self._given = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def do(self, parts: Sequence[Part]) -> None:
        """Return once all parts have ended; raises what one of them raised."""
        while len(self._threads) < min(len(parts), self.size) - 1:
            thread = threading.Thread(target=self._work, name="stowplan-reads", daemon=True)
            start_thread(thread, "a reader of weights")
            self._threads.append(thread)
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        for part in parts[1:]:
            self._given.put((part, ended))
        errors = [_error_of(part) for part in parts[:1]] + [ended.get() for _ in parts[1:]]
        failed = next((error for error in errors if error is not None), None)
        if failed is not None:
            try:
                raise failed
            finally:
                # or they and this frame would keep one another, and what was read into
                del failed, errors

    def _work(self) -> None:
        while (given := self._given.get()) is not None:
            part, ended = given
            ended.put(_error_of(part))
            del part, given  # what it read into may be given back while this thread waits

    def close(self) -> None:
        for _ in self._threads:
            self._given.put(None)
        while self._threads:
            self._threads.pop().join()


def _error_of(part: Part) -> BaseException | None:
    try:
        part()
    except BaseException as error:  # carried to the thread that wants the whole
        return error
    return None


def _shares(size: int, count: int) -> list[tuple[int, int]]:
    """`[0, size)` cut into so many parts of about one size, of which all but the last are whole pages."""
    pages = -(-size // ALIGNED_BYTES)
    each = max(1, -(-pages // max(1, count))) * ALIGNED_BYTES
    return [(start, min(start + each, size)) for start in range(0, size, each)]


def _cut(views: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """The bytes `[start, stop)` of views that lie one behind another."""
    found = []
    for view in views:
        part = view[max(start, 0) : max(stop, 0)]
        if len(part):
            found.append(part)
        start, stop = start - len(view), stop - len(view)
    return found


def _read_once(handle: int, views: Sequence[memoryview], offset_bytes: int) -> int:
    """Bytes read by one call; fewer than asked for at the end of the file or of the kernel's patience."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, views[:1024], offset_bytes)  # 1024: IOV_MAX
    os.lseek(handle, offset_bytes, os.SEEK_SET)  # Windows; one thread reads
    data = os.read(handle, len(views[0]))
    views[0][: len(data)] = data
    return len(data)

"""Files read by several threads: the same bytes, and nobody at work any more once a read is over."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from executor import files as module
from executor.cpu import CpuDevice
from executor.files import Files
from executor.run import run
from planner.errors import CheckpointError, RunFailed

SIZE = 300_000


@pytest.fixture(autouse=True)
def _small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE_BYTES", 10_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "weights"
    found.write_bytes(os.urandom(SIZE))
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Thread, offset and bytes of every read of the system; threads beside the caller's are gone afterwards."""
    before, found, real = threading.active_count(), [], os.preadv

    def noted(handle: int, views: list[memoryview], offset: int) -> int:
        count = real(handle, views, offset)
        found.append((threading.current_thread().name, offset, count))
        return count

    monkeypatch.setattr(os, "preadv", noted)
    yield found
    assert threading.active_count() == before


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("offset", "sizes"),
    [(0, [SIZE]), (13, [100_000, 0, 7, 60_001, 90_000]), (5, [3]), (0, []), (9, [25_000])],
)
def test_every_byte_comes_to_its_place(
    path: Path, reads: list[Any], readers: int, offset: int, sizes: list[int]
) -> None:
    targets = [bytearray(size) for size in sizes]
    with closing(Files(readers)) as files:
        files.read(path, offset, [memoryview(target) for target in targets])
    assert b"".join(targets) == path.read_bytes()[offset : offset + sum(sizes)]
    # each byte once, by as many threads as shares are worth it
    assert sum(count for _, _, count in reads) == sum(sizes)
    assert len(reads) == (1 if sizes else 0) * max(1, min(readers, sum(sizes) // 10_000))
    for _, start, _ in reads:
        assert (start - offset) % module.ALIGNED_BYTES == 0


def test_threads_begin_with_the_first_large_read_and_serve_all_others(
    path: Path, reads: list[tuple[str, int, int]]
) -> None:
    before = threading.active_count()
    target = memoryview(bytearray(SIZE))
    with closing(Files(3)) as files:
        files.read(path, 0, [target[:15_000]])
        assert threading.active_count() == before
        for _ in range(20):
            files.read(path, 0, [target])
            assert threading.active_count() == before + 2
    assert len(reads) == 61


def test_a_read_ends_when_its_slowest_share_does(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, late = os.preadv, []

    def slow(handle: int, views: list[memoryview], offset: int) -> int:
        if threading.current_thread().name == "stowplan-reads":
            time.sleep(0.2)
            late.append(offset)
        return real(handle, views, offset)

    monkeypatch.setattr(os, "preadv", slow)
    target = bytearray(SIZE)
    with closing(Files(2)) as files:
        files.read(path, 0, [memoryview(target)])
        assert bytes(target) == path.read_bytes()
    assert len(late) == 1


@pytest.mark.parametrize("bad", ["first", "last"])
def test_a_share_that_fails_is_told_after_the_others_have_ended(
    path: Path, reads: list[Any], monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    noting = os.preadv

    def failing(handle: int, views: list[memoryview], offset: int) -> int:
        if (offset == 0) is (bad == "first"):
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.1)
        return noting(handle, views, offset)

    monkeypatch.setattr(os, "preadv", failing)
    target = bytearray(SIZE)
    with closing(Files(2)) as files:
        with pytest.raises(RunFailed, match=r"the disk failed at byte \d+: Input/output error"):
            files.read(path, 0, [memoryview(target)])
        assert len(reads) == 1  # the other share
        monkeypatch.setattr(os, "preadv", noting)
        files.read(path, 0, [memoryview(target)])  # and the threads are still there
    assert bytes(target) == path.read_bytes()


def test_a_file_that_ends_early_is_told_and_nothing_holds_the_memory_that_was_read_into(
    path: Path, reads: list[Any]
) -> None:
    target = bytearray(SIZE + 5)
    with closing(Files(4)) as files:
        with pytest.raises(CheckpointError, match="ends at byte 300000, 5 bytes short"):
            files.read(path, 0, [memoryview(target)])
        files.read(path, 0, [memoryview(target)[:SIZE]])
        time.sleep(0.1)  # until the threads wait again
        target.clear()  # refused where a view of it is still held


def test_one_thread_reads_where_a_file_has_one_position(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    before, target = threading.active_count(), bytearray(SIZE)
    with closing(Files(4)) as files:
        files.read(path, 0, [memoryview(target)])
        assert threading.active_count() == before
    assert bytes(target) == path.read_bytes()


def test_a_run_whose_weights_several_threads_read_says_the_same(
    tiny: Any, reads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Several(CpuDevice):
        readers = 4

    wanted = run(tiny.plan(), tiny.request()).tokens
    monkeypatch.setattr(module, "SHARE_BYTES", 4096)
    reads.clear()
    assert run(tiny.plan(), tiny.request(), device=Several()).tokens == wanted
    helped = sum(name == "stowplan-reads" for name, _, _ in reads)
    assert helped > len(reads) / 4

"""A disk that fails, runs short or loses a file while a plan runs."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from executor.run import run
from planner.errors import CheckpointError, RunFailed

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads go another way here")


@pytest.fixture(scope="module")
def answer(lab: Any) -> tuple[int, ...]:
    return run(lab.streamed, lab.request()).tokens


def test_reads_that_come_in_pieces_change_nothing(
    lab: Any, disk: Any, answer: tuple[int, ...]
) -> None:
    whole = run(lab.streamed, lab.request()).tokens
    reads, disk.reads = disk.reads, 0
    disk.short = random.Random(0)
    assert run(lab.streamed, lab.request()).tokens == whole == answer
    assert disk.reads > 2 * reads


@pytest.mark.parametrize(
    ("part", "error"),
    [(0.0, errno.EIO), (0.6, errno.EIO), (1.0, errno.EIO), (0.4, errno.ESTALE), (0.3, None)],
)
def test_a_read_that_fails_ends_the_run_with_the_file_and_the_byte(
    lab: Any, disk: Any, part: float, error: int | None
) -> None:
    run(lab.streamed, lab.request())
    disk.fail_at = int(part * (disk.reads - 1))
    disk.reads = 0
    disk.error = None if error is None else OSError(error, os.strerror(error))
    failure = lab.fails(lab.streamed, lab.request())
    file = str(lab.model / "model.safetensors")
    if error is None:
        assert isinstance(failure, CheckpointError)
        assert f"{file}: the file ends at byte " in str(failure)
    else:
        assert isinstance(failure, RunFailed)
        assert f"{file}: the disk failed at byte " in str(failure)
        assert os.strerror(error) in str(failure)


def test_a_failing_disk_is_one_line_and_exit_code_1(lab: Any, disk: Any, execute: Any) -> None:
    disk.fail_at, disk.error = 3, OSError(errno.EIO, os.strerror(errno.EIO))
    execute().refused("the disk failed at byte", code=1)


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.full)])
def test_every_single_read_may_fail(lab: Any, disk: Any, stride: int) -> None:
    run(lab.resident, lab.request(max_new_tokens=2))
    reads = disk.reads
    disk.error = OSError(errno.EIO, os.strerror(errno.EIO))
    for number in range(0, reads, stride):
        disk.reads, disk.fail_at = 0, number
        assert isinstance(lab.fails(lab.resident, lab.request(max_new_tokens=2)), RunFailed)


@pytest.mark.parametrize("when", ["vision/patch_embed", "prefill/embed_tokens", "decode/norm"])
def test_a_shard_cut_off_after_the_check_is_named(lab: Any, tmp_path: Path, when: str) -> None:
    file = lab.copy(tmp_path) / "model.safetensors"
    size = file.stat().st_size

    def cut(step: str) -> None:
        if step == when:
            os.truncate(file, size // 100)

    failure = lab.fails(lab.streamed, lab.request(locations=lab.moved(file.parent), on_step=cut))
    assert isinstance(failure, CheckpointError)
    assert f"{file}: the file ends at byte " in str(failure)


def test_a_shard_deleted_after_the_check_is_named(lab: Any, tmp_path: Path) -> None:
    folder = lab.copy(tmp_path)
    (folder / "model.safetensors").unlink()
    failure = lab.fails(lab.streamed, lab.request(locations=lab.moved(folder)))
    assert isinstance(failure, CheckpointError)
    assert "cannot be opened: No such file" in str(failure)


def test_a_shard_deleted_while_it_is_read_is_read_to_its_end(
    lab: Any, tmp_path: Path, answer: tuple[int, ...]
) -> None:
    folder = lab.copy(tmp_path)

    def delete(step: str) -> None:
        (folder / "model.safetensors").unlink(missing_ok=True)

    request = lab.request(locations=lab.moved(folder), on_step=delete)
    # both of the executor's handles are open by the first token
    late = lab.request(locations=lab.moved(folder), on_token=lambda token, piece: delete(""))
    assert run(lab.streamed, late).tokens == answer
    assert isinstance(lab.fails(lab.streamed, request), CheckpointError)

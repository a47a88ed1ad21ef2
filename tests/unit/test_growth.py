"""Writes past the end of a regular file: they allocate their own room, and give back only that."""

import errno
import os
import threading
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf.transfer import growth
from tests.guards import needs
from tests.support import (
    PAGE,
    Filter,
    assert_same,
    loop_device,
    mounted,
    pattern,
    poison,
    raises_errno,
    run,
    together,
)

MIB = 1 << 20
THEIRS = pattern(3 * PAGE + 5, 9)


class Stop(Exception):
    """What a test's progress function raises."""


def append(path: Path) -> Callable[[], object]:
    def act() -> None:
        with path.open("ab") as file:
            file.write(THEIRS)

    return act


def write_beyond(path: Path) -> Callable[[], object]:
    def act() -> None:
        with dmabuf.allocate(PAGE) as buffer, dmabuf.open(path, "r+") as file:
            buffer.pwrite(poison(PAGE), 0)
            file.write_from(buffer, file_offset=path.stat().st_size)

    return act


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("other", [append, write_beyond])
@pytest.mark.parametrize("offset", [0, PAGE, 5])
def test_what_others_write_behind_a_copy_stays(
    offset: int, other: Callable, fails: bool, tmp_path: Path
) -> None:
    data = pattern(MIB, 1)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    target.write_bytes(b"old")
    act, done = other(target), []

    def progress(*_now: object) -> None:
        if not done:
            done.append(True)
            act()
        if fails:
            raise Stop

    if fails:
        with pytest.raises(Stop):
            copy_slowly(source, target, offset, progress)
    else:
        copy_slowly(source, target, offset, progress)
    found = target.read_bytes()
    theirs = THEIRS if other is append else poison(PAGE)
    assert_same(found[offset + MIB :], theirs, "what the other wrote")
    if not fails:
        assert_same(found[offset : offset + MIB], data, "the copy")


def copy_slowly(source: Path, target: Path, offset: int, progress: Callable) -> None:
    """Copy into an existing file, calling `progress` at least once: at the end."""
    with target.open("r+b", buffering=0) as file:
        dmabuf.copy(source, file, dst_offset=offset, progress=progress, block_size=PAGE)


def test_copies_into_disjoint_parts_of_one_file(tmp_path: Path) -> None:
    target, parts = tmp_path / "target", [pattern(MIB + number, number) for number in range(6)]
    starts = [number * (MIB + 8) for number in range(6)]
    for number, part in enumerate(parts):
        (tmp_path / str(number)).write_bytes(part)
    expected = bytearray(starts[-1] + len(parts[-1]))
    for start, part in zip(starts, parts, strict=True):
        expected[start : start + len(part)] = part
    for _ in range(8):
        target.write_bytes(b"")

        def one(number: int) -> None:
            fd = os.open(target, os.O_WRONLY)
            try:
                dmabuf.copy(
                    tmp_path / str(number), fd, dst_offset=starts[number], block_size="64KiB"
                )
            finally:
                os.close(fd)

        together(one, 6)
        assert_same(target.read_bytes(), bytes(expected), "the file")


def test_a_copy_that_fails_leaves_a_copy_before_it_alone(tmp_path: Path) -> None:
    """The later part is allocated first: the file ends there while the earlier one is written."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(pattern(MIB, 1))
    target.touch()

    def progress(*_now: object) -> None:
        thread = threading.Thread(target=dmabuf.copy, args=(source, fd))
        thread.start()
        thread.join()
        raise Stop

    fd = os.open(target, os.O_WRONLY)
    with pytest.raises(Stop):
        dmabuf.copy(source, fd, dst_offset=8 * MIB, progress=progress)
    os.close(fd)
    assert_same(target.read_bytes()[:MIB], pattern(MIB, 1), "the copy before it")


def test_room_that_a_failed_copy_allocated_is_given_back(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(pattern(4 * MIB, 1))
    target.write_bytes(b"old")

    def stop(*_now: object) -> None:
        raise Stop

    with pytest.raises(Stop) as caught, target.open("r+b", buffering=0) as file:
        dmabuf.copy(source, file, dst_offset=PAGE, progress=stop, block_size=PAGE)
    assert target.stat().st_size == PAGE + caught.value.nbytes


def holes(path: Path) -> int:
    """Bytes of a file that no block holds."""
    status = path.stat()
    return status.st_size - 512 * status.st_blocks


@pytest.mark.parametrize("gap", [10 << 30, 1 << 40])
def test_segments_past_the_end_leave_holes_between_them(gap: int, tmp_path: Path) -> None:
    path, data = tmp_path / "file", pattern(2 * PAGE, 3)
    segments = array("Q", [gap, PAGE, PAGE, 0, 0, PAGE])
    with dmabuf.allocate(2 * PAGE) as buffer, dmabuf.open(path, "w") as file:
        buffer.pwrite(data, 0)
        file.write_segments(buffer, segments)
    assert path.stat().st_size == gap + PAGE
    assert holes(path) > gap - MIB
    with path.open("rb") as found:
        assert_same(found.read(2 * PAGE), data[:PAGE] + bytes(PAGE), "the first segment")
        found.seek(gap)
        assert_same(found.read(), data[PAGE:], "the second segment")


def test_a_write_past_the_end_leaves_a_hole_before_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with dmabuf.allocate(PAGE) as buffer, dmabuf.open(path, "w") as file:
        file.write_from(buffer, file_offset=1 << 30)
    assert holes(path) > (1 << 30) - MIB


@needs("ext4")
def test_a_failed_allocation_changes_nothing(tmp_path: Path) -> None:
    """The copy is larger than the disk: it is refused whole, and the disk is as free as before."""
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(64 * MIB)
    with (
        loop_device(tmp_path / "image", 32 * MIB) as device,
        mounted(device, "ext4", tmp_path / "mount") as folder,
    ):
        path = folder / "file"
        path.write_bytes(b"old")
        os.sync()
        free = os.statvfs(folder).f_bfree
        with path.open("r+b", buffering=0) as file, raises_errno(errno.ENOSPC, nbytes=0):
            dmabuf.copy(source, file)
        assert path.read_bytes() == b"old"
        assert os.statvfs(folder).f_bfree >= free - 16


def test_a_failed_allocation_frees_nothing_of_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one write allocates its blocks, another of the same file finds the disk full."""
    path = tmp_path / "file"
    path.touch()
    real, failed = growth.lib.dmb_fallocate, threading.Event()
    failing = threading.Thread(target=lambda: write(MIB))

    def write(offset: int) -> None:
        with dmabuf.allocate(MIB) as buffer, dmabuf.open(path, "r+") as file:
            if offset:
                with pytest.raises(OSError, match="No space left"):
                    file.write_from(buffer, file_offset=offset)
                failed.set()
            else:
                file.write_from(buffer)

    def fallocate(fd: int, start: int, size: int, keep_size: bool) -> int:
        if threading.current_thread() is failing:
            return -errno.ENOSPC
        rc = real(fd, start, size, keep_size)
        if failing.ident is None:
            failing.start()
            failed.wait(2)  # time enough to fail, if it does not wait for this write's allocation
        found.append(os.fstat(fd).st_blocks * 512)
        return int(rc)

    found: list[int] = []
    monkeypatch.setattr(growth.lib, "dmb_fallocate", fallocate)
    write(0)
    failing.join(60)
    assert failed.is_set()
    assert min(found) >= MIB


@pytest.mark.parametrize("flushes", [True, False])
def test_a_synced_write_that_fails_reports_what_is_on_the_medium(
    flushes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is full after a megabyte; `nbytes` of it are in the file, and flushed."""
    path, flushed, committed = tmp_path / "file", [], []

    def fdatasync(fd: int) -> None:
        flushed.append(os.fstat(fd).st_size)
        if not flushes:
            raise OSError(errno.EIO, "no medium")

    def full(completion: object) -> int:
        return -errno.EIO if completion.offset >= MIB else completion.result

    with (
        dmabuf.allocate(4 * MIB) as buffer,
        dmabuf.Engine() as engine,
        dmabuf.open(path, "w", engine=engine) as file,
        Filter(full),
        raises_errno(errno.EIO) as caught,
    ):
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        monkeypatch.setattr(os, "fsync", committed.append)
        file.write_from(buffer, sync=True)
    assert flushed == [MIB]
    # the blocks that were freed, on ext4; fdatasync(2) would leave them in the journal
    assert len(committed) == (run("stat", "-f", "-c", "%T", path) == "ext2/ext3")
    assert caught.value.nbytes == (MIB if flushes else 0)

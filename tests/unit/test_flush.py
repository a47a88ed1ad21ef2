"""Synced writes of several threads through one File, whose bytes may not reach the medium.

The kernel reports bytes that it could not write out once for each open file, to the first call of
fdatasync(2) that ends after. The others return 0. `Medium` does the same.
"""

import contextlib
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import dmabuf
from dmabuf import remote
from tests.support import raises_errno, wait_until

PART = 64 << 10
FAILED = "flushing to the medium failed"


class Medium:
    """os.fdatasync for a file: the first call ends when `ready` is true, by `outcome`."""

    def __init__(self, monkeypatch):
        self.calls, self.ready, self.outcome = 0, threading.Event(), None
        self.here = threading.Event()
        monkeypatch.setattr(os, "fdatasync", self.flush)

    def flush(self, fd):
        self.calls += 1
        if self.calls == 1:
            self.here.set()
            assert self.ready.wait(60)
            if self.outcome is not None:
                raise self.outcome


@pytest.fixture
def medium(monkeypatch):
    return Medium(monkeypatch)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8 * PART))
    with dmabuf.open(tmp_path / "file", "r+") as file:
        yield file


@pytest.fixture
def write(file):
    """A function that writes part `number` of the file, and returns when it is on the medium."""
    with dmabuf.allocate(PART, exporter="memfd") as buffer:
        buffer.pwrite(b"\1" * PART, 0)

        def write(number, route="buffered"):
            file.write_from(buffer, file_offset=number * PART, route=route, sync=True)

        yield write


def is_written(file, number):
    return os.pread(file.fileno(), PART, number * PART) == b"\1" * PART


def write_together(write, file, medium, count):
    """The futures of `count` writes: one flushes, and the others have written meanwhile."""
    with ThreadPoolExecutor(count) as pool:
        writes = [pool.submit(write, 0)]
        assert medium.here.wait(60)
        writes += [pool.submit(write, number) for number in range(1, count)]
        for number in range(1, count):
            wait_until(lambda number=number: is_written(file, number), f"write {number}")
        medium.ready.set()
    return writes


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_flush_is_an_error_of_each_write_in_flight(file, write, medium, number):
    medium.outcome = OSError(number, os.strerror(number))
    for one in write_together(write, file, medium, 4):
        with raises_errno(number, FAILED, nbytes=0) as caught:
            one.result()
        assert caught.value.filename == file.target.path
    write(5)  # which began after the failure
    assert is_written(file, 5)


def test_an_interrupted_flush_is_repeated_by_those_that_wait(file, write, medium):
    medium.outcome = KeyboardInterrupt()
    first, *others = write_together(write, file, medium, 4)
    assert first.exception() is medium.outcome
    assert [one.result() for one in others] == [None] * 3
    assert medium.calls >= 2


def test_a_copy_in_flight_fails_too(file, medium, tmp_path):
    """Two copies into one File: both have written when the flush of the first one fails."""
    (tmp_path / "source").write_bytes(b"\1" * PART)

    def copy(number):
        dmabuf.copy(tmp_path / "source", file, dst_offset=number * PART, sync=True)

    medium.outcome = OSError(errno.EIO, "no medium")
    for one in write_together(copy, file, medium, 2):
        with raises_errno(errno.EIO, FAILED):
            one.result()
    copy(3)


def test_a_node_reports_a_failed_flush_until_the_file_is_opened_again(medium, tmp_path):
    medium.outcome = OSError(errno.EIO, "no medium")
    medium.ready.set()
    with (
        dmabuf.allocate(PART) as buffer,
        remote.serving(f"unix:{tmp_path}/socket", tmp_path) as listener,
        remote.connect(listener.address) as node,
    ):
        with raises_errno(errno.EIO, FAILED), node.replacing("new") as file:
            file.write_from(buffer)  # whose error the next one takes
            for flush in (lambda: file.write_from(buffer, file_offset=PART, sync=True), file.flush):
                with raises_errno(errno.EIO, FAILED):
                    flush()
        assert not (tmp_path / "new").exists()


def test_writes_that_wait_share_the_next_flush(file, write, monkeypatch):
    """Their bytes were written before it begins; the flush under way is not enough."""
    calls = []
    while 2 not in calls and len(calls) < 50:  # some may not wait yet when the first one ends
        os.pwrite(file.fileno(), bytes(8 * PART), 0)
        medium = Medium(monkeypatch)
        writes = write_together(write, file, medium, 5)
        assert [one.result() for one in writes] == [None] * 5
        calls.append(medium.calls)
    assert min(calls) == 2


def test_a_write_in_a_signal_handler_flushes_by_itself(file, write, medium, monkeypatch):
    """In the middle of a flush of its own thread, whose error is then of both writes."""

    def flush(fd):
        medium.calls += 1
        if medium.calls == 1:
            with raises_errno(errno.EIO, FAILED):
                write(1)
            assert is_written(file, 1)
        elif medium.calls == 2:
            raise OSError(errno.EIO, "no medium")

    monkeypatch.setattr(os, "fdatasync", flush)
    with raises_errno(errno.EIO, FAILED):
        write(0)
    write(0)
    assert medium.calls == 3


@pytest.mark.parametrize("handed_in", [False, True])
def test_edges_are_flushed_by_another_open_file(tmp_path, monkeypatch, handed_in):
    """The core's flush of edges would take the error of a synced write, or the reverse."""
    (tmp_path / "file").write_bytes(bytes(2 * PART))
    with contextlib.ExitStack() as stack:
        given = os.open(tmp_path / "file", os.O_RDWR) if handed_in else tmp_path / "file"
        file = stack.enter_context(dmabuf.File(given, "r+"))
        buffer = stack.enter_context(dmabuf.allocate(PART, exporter="memfd"))
        if file.plan(buffer).rejected.get("direct"):
            pytest.skip("the filesystem has no O_DIRECT: put TMPDIR on ext4 or xfs")
        flushed = []
        monkeypatch.setattr(os, "fdatasync", flushed.append)
        where = {"file_offset": 3, "buffer_offset": 3, "route": "direct"}
        file.write_from(buffer, PART - 7, sync=True, **where)
        assert flushed == [file.target.direct().fd]
        assert file.target.plain() not in flushed
        if handed_in:
            os.close(given)

"""Writes of one file that share a page, one of them through the page cache: one waits."""

import errno
import os
import threading
from contextlib import contextmanager

import anyio
import pytest

import dmabuf
from dmabuf import aio
from dmabuf.kernel import files
from tests import emulation, forking
from tests.support import assert_same, pattern

PAGE = os.sysconf("SC_PAGESIZE")
CUT = 2 * PAGE + 512
"""Where the first write ends and the second begins: in the middle of a page, at a block."""
TAIL = 100
STORM = 100


class Both:
    """Holds the write that comes first up until the other one completes, or for long enough."""

    def __init__(self):
        self.first, self.left, self.late, self.done = None, STORM, False, False
        self.begun, self.other_begins = threading.Event(), threading.Event()
        self.other_begins.set()

    def __call__(self, completion):
        behind = completion.offset >= CUT
        self.first = behind if self.first is None else self.first
        self.begun.set()
        self.other_begins.wait()
        if behind != self.first:
            self.late = self.late or not self.done
        elif self.left and not self.late:
            self.left -= 1
            return -errno.EAGAIN
        else:
            self.done = True
        return completion.result


def in_threads(path, buffer, first, second, both):
    """The second thread begins when the first one's requests are under way."""
    both.other_begins.clear()
    thread = threading.Thread(target=write, args=(path, buffer, *first))
    thread.start()
    both.begun.wait()
    other = threading.Thread(target=write, args=(path, buffer, *second))
    other.start()
    both.other_begins.set()
    thread.join()
    other.join()


def write(path, buffer, offset, size):
    with dmabuf.open(path, "r+") as file:
        file.write_from(buffer, size, file_offset=offset, buffer_offset=offset)


def in_a_loop(path, buffer, first, second, both):
    async def write_both():
        async with await aio.open(path, "r+") as file, anyio.create_task_group() as group:
            for offset, size in (first, second):
                group.start_soon(one, file, offset, size)

    async def one(file, offset, size):
        await file.write_from(buffer, size, file_offset=offset, buffer_offset=offset)

    anyio.run(write_both)


def demand_blocks_of_512(path):
    with path.open("rb") as file:
        direct = files.open_direct(file.fileno(), "file", False, True)
    if direct.fd >= 0:
        os.close(direct.fd)
    if direct.refusal or direct.alignment.offset > 512:
        pytest.skip("O_DIRECT takes no 512 bytes here: set TMPDIR to a folder on such a disk")


@pytest.mark.parametrize("run", [in_threads, in_a_loop])
def test_an_edge_waits_for_whole_blocks_of_its_page(tmp_path, run):
    path, data = tmp_path / "file", pattern(CUT + TAIL, 1)
    path.write_bytes(bytes(CUT + TAIL))
    demand_blocks_of_512(path)
    both = Both()
    with dmabuf.allocate(4 * PAGE, exporter="memfd") as buffer:
        buffer.pwrite(data, 0)
        with emulation.Filter(both):
            run(path, buffer, (0, CUT), (CUT, TAIL), both)
    assert both.done
    assert not both.late
    assert_same(path.read_bytes(), data, "both writes")


def test_a_write_that_fails_lets_the_next_one_write_the_page(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    with dmabuf.allocate(4 * PAGE, exporter="memfd") as buffer, dmabuf.open(path, "r+") as file:
        for size in (CUT, TAIL, CUT):
            with (
                emulation.Filter(lambda completion: -errno.EREMOTEIO),
                pytest.raises(dmabuf.TransferError),
            ):
                file.write_from(buffer, size)
            file.write_from(buffer, size)


@contextmanager
def held_write(path, buffer):
    """Another thread's write of the first part, whose requests do not complete meanwhile."""
    begun, go, pid = threading.Event(), threading.Event(), os.getpid()

    def hold(completion):
        if os.getpid() == pid and completion.offset < CUT:
            begun.set()
            go.wait()
        return completion.result

    thread = threading.Thread(target=write, args=(path, buffer, 0, CUT))
    with emulation.Filter(hold):
        thread.start()
        begun.wait()
        try:
            yield
        finally:
            go.set()
            thread.join()


@pytest.fixture
def written(tmp_path):
    path, data = tmp_path / "file", pattern(CUT + TAIL, 1)
    path.write_bytes(bytes(CUT + TAIL))
    demand_blocks_of_512(path)
    with dmabuf.allocate(4 * PAGE, exporter="memfd") as buffer:
        buffer.pwrite(data, 0)
        yield path, data, buffer


def test_a_forked_child_does_not_wait_for_a_thread_that_it_has_not(written):
    path, data, buffer = written
    with held_write(path, buffer):
        forking.in_child(lambda: write(path, buffer, CUT, TAIL))
    assert_same(path.read_bytes(), data, "both writes")


def test_a_write_that_waits_for_another_one_can_be_cancelled(written, run):
    path, data, buffer = written

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(aio.call, lambda: write(path, buffer, CUT, TAIL))
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()

    with held_write(path, buffer):
        run(main)
    assert_same(path.read_bytes(), data[:CUT] + bytes(TAIL), "the first write")

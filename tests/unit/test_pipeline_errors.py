"""copy() when something goes wrong in the middle: stopped in order, and nothing left."""

import errno
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.pipeline import copy
from tests.support import assert_same, in_child, pattern

BLOCK = 64 << 10
SIZE = 40 * BLOCK
DATA = pattern(SIZE, 3)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


# -- the source changes meanwhile


def at_first_progress(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> Callable:
    """A progress function that acts once, after the first block."""
    monkeypatch.setattr("dmabuf.pipeline._TICK", 0)
    done: list[bool] = []

    def progress(*_now: object) -> None:
        if not done:
            done.append(True)
            act()

    return progress


def test_a_source_that_shrinks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink = at_first_progress(monkeypatch, lambda: os.truncate(source, BLOCK + 5))
    with pytest.raises(dmabuf.ShortReadError, match=f"shrank.* it ends at {BLOCK + 5}") as caught:
        copy(source, tmp_path / "t", block_size=BLOCK, progress=shrink)
    found = (tmp_path / "t").read_bytes()
    assert len(found) == caught.value.nbytes < SIZE
    assert_same(found, DATA[: len(found)], "what was copied before")


def test_a_source_that_grows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow = at_first_progress(monkeypatch, lambda: os.truncate(source, 2 * SIZE))
    copy(source, tmp_path / "t", block_size=BLOCK, progress=grow)
    assert_same((tmp_path / "t").read_bytes(), DATA, "what was there when it began")


# -- errors in the middle


class Boom(Exception):
    pass


def test_what_progress_raises_stops_the_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise Boom

    progress = at_first_progress(monkeypatch, fail)
    with pytest.raises(Boom):
        copy(source, tmp_path / "t", block_size=BLOCK, progress=progress)
    assert_same((tmp_path / "t").read_bytes(), DATA[:BLOCK], "the block before")


def failing(method: Callable, after: int, whole: int) -> Callable:
    """A transfer that fails with EIO, `whole` bytes into its call number `after`."""
    calls: list[int] = []

    def transfer(self, buffer, size, **how):
        calls.append(size)
        if len(calls) <= after:
            return method(self, buffer, size, **how)
        if whole:
            method(self, buffer, whole, **how)
        error = OSError(errno.EIO, "a bad sector", "the disk")
        error.nbytes = whole
        raise error

    return transfer


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("direction", ["read_into", "write_from"])
def test_an_error_in_the_middle(
    direction: str, blocks: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = getattr(dmabuf.File, direction)
    monkeypatch.setattr(dmabuf.File, direction, failing(method, after=7, whole=8192))
    with pytest.raises(OSError, match="a bad sector") as caught:
        copy(source, tmp_path / "t", block_size=BLOCK, blocks=blocks)
    assert caught.value.errno == errno.EIO
    assert caught.value.nbytes == 7 * BLOCK + 8192
    assert_same((tmp_path / "t").read_bytes(), DATA[: 7 * BLOCK + 8192], "all that is whole")


def test_an_error_into_a_buffer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmabuf.pipeline._SLICE", BLOCK)
    read = failing(dmabuf.File.read_into, after=2, whole=4096)
    monkeypatch.setattr(dmabuf.File, "read_into", read)
    with dmabuf.allocate(SIZE) as buffer:
        with pytest.raises(OSError, match="a bad sector") as caught:
            copy(source, buffer)
        assert caught.value.nbytes == 2 * BLOCK + 4096
        assert_same(buffer.pread(2 * BLOCK, 0), DATA[: 2 * BLOCK], "what came before")


def test_a_target_that_leaves_while_the_source_is_silent() -> None:
    """The thread that waits for the source is woken, and the error is the target's."""
    read, write = os.pipe()
    os.write(write, b"one word, and then silence")
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(BrokenPipeError):
        copy(read, ours)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("target", ["file", "buffer", "pipe"])
def test_ctrl_c_while_waiting_for_a_stream(target: str, blocks: int, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"abc")
    over = threading.Event()

    def interrupt() -> None:
        while _pending(read) and not over.is_set():  # until the copy has it, and waits for more
            time.sleep(0.001)
        if not over.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    sink_read, sink_write = os.pipe()
    try:
        with dmabuf.allocate(BLOCK) as buffer:
            ends = {"file": tmp_path / "t", "buffer": buffer, "pipe": sink_write}
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                copy(read, ends[target], blocks=blocks)
    finally:
        over.set()
    thread.join()
    for fd in (read, write, sink_read, sink_write):
        os.close(fd)


def _pending(fd: int) -> int:
    import array
    import fcntl
    import termios

    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


def test_ctrl_c_while_the_target_is_full() -> None:
    """The calling thread is in write(2) to a pipe that nobody empties."""
    code = """
import os, signal, sys, threading, time
from dmabuf.pipeline import copy
read, write = os.pipe()
def interrupt():
    import array, fcntl, termios
    count = array.array("i", [0])
    while count[0] < 65536 and main.is_alive():
        fcntl.ioctl(read, termios.FIONREAD, count)
    os.kill(os.getpid(), signal.SIGINT)
main = threading.main_thread()
threading.Thread(target=interrupt, daemon=True).start()
try:
    copy("/dev/zero", write, size="1GiB")
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
"""
    assert in_child(code).strip() in ("interrupted 1", "interrupted 2")


def test_file_size_limit(tmp_path: Path) -> None:
    """Stands for a full disk, without being root: RLIMIT_FSIZE."""
    code = """
import os, resource, sys
from dmabuf.pipeline import copy
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
folder = sys.argv[1]
for source in (folder + "/source", sys.stdin):
    try:
        copy(source, folder + "/t", block_size=65536)
    except OSError as error:
        print(error.errno, error.nbytes, os.path.exists(folder + "/t")
              and os.path.getsize(folder + "/t"))
"""
    (tmp_path / "source").write_bytes(DATA)
    import subprocess
    import sys

    read, write = os.pipe()
    feeder = threading.Thread(target=_feed, args=(write,))
    feeder.start()
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], stdin=read, capture_output=True, text=True
    )
    os.close(read)
    feeder.join()
    assert done.stderr == ""
    # A known size is refused whole, and the file that was made is gone; a stream gets as far as
    # whole blocks fit, and the file has exactly those.
    assert done.stdout.splitlines() == [
        f"{errno.EFBIG} 0 False",
        f"{errno.EFBIG} 131072 131072",
    ]
    assert_same((tmp_path / "t").read_bytes(), DATA[:131072], "what fitted")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def _feed(fd: int) -> None:
    try:
        with os.fdopen(fd, "wb") as pipe:
            pipe.write(DATA)
    except BrokenPipeError:
        pass

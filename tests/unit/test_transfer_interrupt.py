"""Interrupts: nothing is in flight afterwards, and what is whole is known.

The signal comes in a wait for completions, so that requests are in flight each time. One test
leaves it to a timer.
"""

import errno
import os
import signal
import threading

import pytest

import dmabuf
from dmabuf import Engine
from tests import emulation
from tests.core import lib
from tests.support import assert_same, pattern, poison

SIZE = 1 << 20
BLOCK = 4096


@pytest.fixture(params=["auto", "threads"])
def engine(request):
    with Engine(queue_depth=4, block_size=BLOCK, backend=request.param) as made:
        yield made


@pytest.mark.parametrize("route", ["direct", "staged", "buffered"])
def test_an_interrupted_read(path, engine, buf, route):
    emulation.interrupt(signal.SIGINT, after=2)
    with dmabuf.open(path, engine=engine) as file:
        with pytest.raises(KeyboardInterrupt) as caught:
            file.read_into(buf, route=route)
        done = caught.value.nbytes
        assert 0 <= done < SIZE
        got = buf.pread(SIZE, 0)
        assert_same(got[:done], pattern(SIZE, 1)[:done], "what is whole")
        assert_same(got[SIZE // 2 :], poison(SIZE)[SIZE // 2 :], "what was never asked for")
        assert file.read_into(buf, route=route).nbytes == SIZE  # the engine is as good as new
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


@pytest.mark.parametrize("route", ["direct", "staged", "buffered"])
@pytest.mark.parametrize("old", [0, 3 * BLOCK])
def test_an_interrupted_write(tmp_path, engine, buf, route, old):
    path = tmp_path / "file"
    path.write_bytes(pattern(old, 2))
    emulation.interrupt(signal.SIGINT, after=2)
    with dmabuf.open(path, "r+", engine=engine) as file:
        with pytest.raises(KeyboardInterrupt) as caught:
            file.write_from(buf, SIZE - 77, route=route)
        done = caught.value.nbytes
        now = path.read_bytes()
        assert len(now) == max(old, done) and done < SIZE // 2
        assert_same(now[:done], poison(done), "what is whole")
        assert file.write_from(buf, SIZE - 77, route=route).nbytes == SIZE - 77
    assert_same(path.read_bytes(), poison(SIZE - 77), "the file")


def test_a_second_signal_while_it_drains(path, engine, buf):
    emulation.interrupt(signal.SIGINT, after=2, count=2)
    with dmabuf.open(path, engine=engine) as file:
        with pytest.raises(KeyboardInterrupt) as caught:
            file.read_into(buf)
        done = caught.value.nbytes
        assert_same(buf.pread(done, 0), pattern(SIZE, 1)[:done], "what is whole")
        assert file.read_into(buf).nbytes == SIZE


def test_any_exception_of_a_handler(path, engine, buf):
    def handler(number, frame):
        raise TimeoutError("the handler's own")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        emulation.interrupt(signal.SIGUSR1, after=2)
        with dmabuf.open(path, engine=engine) as file, pytest.raises(TimeoutError, match="own"):
            file.read_into(buf)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_timer_in_the_middle_of_a_long_read(tmp_path):
    """32 MiB by 4 KiB, one at a time: far longer than the timer, and over soon after it."""
    size = 32 << 20
    path = tmp_path / "long"
    path.write_bytes(pattern(1 << 20, 3) * 32)
    with path.open("rb") as file:
        os.fsync(file.fileno())

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with (
            Engine(queue_depth=1, block_size=4096) as engine,
            dmabuf.open(path, engine=engine) as file,
            dmabuf.allocate(size, exporter="memfd") as buffer,
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(KeyboardInterrupt) as caught:
                file.read_into(buffer)
            done = caught.value.nbytes
            expected = pattern(1 << 20, 3) * 32
            assert_same(buffer.pread(done, 0), expected[:done], "what is whole")
            assert buffer.pread(1 << 20, 31 << 20) == bytes(1 << 20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("verb", ["read", "write"])
def test_signals_that_do_not_raise_disturb_nothing(path, tmp_path, engine, buf, verb):
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for _ in range(4):
            if verb == "read":
                with dmabuf.open(path, engine=engine) as file:
                    assert file.read_into(buf, SIZE - 1).nbytes == SIZE - 1
            else:
                with dmabuf.open(tmp_path / "sink", "w", engine=engine) as file:
                    assert file.write_from(buf, SIZE - 1).nbytes == SIZE - 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits
    if verb == "read":
        assert_same(buf.pread(SIZE - 1, 0), pattern(SIZE, 1)[:-1], "the buffer")
    else:
        assert_same((tmp_path / "sink").read_bytes(), poison(SIZE - 1), "the file")


def test_growing_a_file_that_signals_interrupt(tmp_path, buf, monkeypatch):
    """tmpfs answers fallocate(2) with EINTR when a signal comes: it is asked again."""
    answers, real = [-errno.EINTR, -errno.EINTR], lib.dmb_fallocate

    def fallocate(*arguments):
        return answers.pop() if answers else real(*arguments)

    monkeypatch.setattr(lib, "dmb_fallocate", fallocate)
    with dmabuf.open(tmp_path / "file", "w") as file:
        assert file.write_from(buf).nbytes == SIZE
    assert not answers


def test_threads_are_not_interrupted_by_the_main_thread_s_signals(path, engine, buf):
    """A transfer in another thread ends whole while the main thread takes signals."""
    results = []
    before = signal.signal(signal.SIGALRM, lambda *_: None)

    def work():
        with dmabuf.open(path) as file:
            results.extend(file.read_into(buf).nbytes for _ in range(20))

    thread = threading.Thread(target=work)
    try:
        thread.start()
        while thread.is_alive():
            signal.raise_signal(signal.SIGALRM)
            thread.join(0.001)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert results == [SIZE] * 20

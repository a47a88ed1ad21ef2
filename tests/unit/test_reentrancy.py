"""Code of others in the middle of a transfer: signal handlers that raise, or transfer themselves.

Destructors, weakref callbacks and the garbage collector run in the same way.
"""

import array
import gc
import os
import signal
import threading
from contextlib import ExitStack, contextmanager, suppress

import pytest

import dmabuf
from dmabuf import Engine
from tests.resources import held, pinned
from tests.support import assert_same, pattern, poison
from tests.unit.interrupting import Interruptions, Points

SIZE = 128 << 10
SEGMENTS = array.array("Q", [0, 0, 8192, 16384, 16384, 8192])
PAST_THE_END = array.array("Q", [0, 0, 8192, SIZE, 16384, 8192])


def fail(file, buffer):
    with suppress(EOFError):
        file.read_segments(buffer, PAST_THE_END)


MOVES = {
    "read": lambda file, buffer: file.read_into(buffer, SIZE - 5),
    "small read": lambda file, buffer: file.read_into(buffer, 4096),
    "staged read": lambda file, buffer: file.read_into(buffer, route="staged"),
    "write": lambda file, buffer: file.write_from(buffer, SIZE - 5),
    "synced write": lambda file, buffer: file.write_from(buffer, SIZE - 5, sync=True),
    "growing write": lambda file, buffer: file.write_from(buffer, 9999, file_offset=SIZE),
    "segments": lambda file, buffer: file.read_segments(buffer, SEGMENTS),
    "segments that fail": fail,
    "plan": lambda file, buffer: file.plan(buffer),
}


@pytest.fixture(autouse=True)
def waits_end():
    """A wait for a lock that never comes ends in a failure."""

    def give_up(*_):
        raise TimeoutError("a transfer waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(600)  # which replaces the alarm of pytest-timeout; loops renew it
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["default", "own", "threads"])
def engine(request):
    if request.param == "default":
        yield None
        return
    with Engine(backend="threads" if request.param == "threads" else "auto") as made:
        yield made


@pytest.mark.filterwarnings("ignore:.*was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("move", MOVES)
def test_an_interrupt_anywhere_leaves_nothing_held(path, buf, move):
    """The buffer and the file can be closed, no descriptor stays, and the engine works."""
    move, number = MOVES[move], 0
    with dmabuf.open(path, "r+") as whole:
        whole.read_into(buf)
        before = len(os.listdir("/proc/self/fd"))
        counted = None
        while counted is None or counted.seen >= number:
            number += 1
            signal.alarm(600)
            file, buffer = dmabuf.open(path, "r+"), dmabuf.allocate(SIZE, exporter="memfd")
            move(file, buffer)
            os.truncate(path, SIZE)
            with suppress(KeyboardInterrupt), Interruptions({number}) as counted:
                move(file, buffer)
            buffer.close()
            file.close()
            assert len(os.listdir("/proc/self/fd")) == before, number
        path.write_bytes(pattern(SIZE, 2))
        buf.pwrite(poison(SIZE), 0)
        whole.read_into(buf)
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 2), "the buffer")
    assert number > 10


def close(buffer, file):
    buffer.close()
    file.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["close", "read", "del"])
def test_after_an_interrupt_nothing_is_pinned_and_bytes_arrive(path, what):
    """A ring that keeps the pages of a closed buffer could read into them for the next buffer."""
    with dmabuf.open(path) as other:
        with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
            other.read_into(buffer)
        before, number, counted = (pinned(), held()), 0, None
        while counted is None or counted.seen >= number:
            number += 1
            signal.alarm(600)
            buffer, file = dmabuf.allocate(SIZE, exporter="memfd"), dmabuf.open(path)
            if what == "read":
                file.plan(buffer)  # which opens the descriptors, and registers nothing
            else:
                file.read_into(buffer)
                other.read_into(buffer)
            was = id(buffer)
            with suppress(KeyboardInterrupt), Interruptions({number}) as counted:
                if what == "del":
                    del buffer
                elif what == "read":
                    file.read_into(buffer)
                else:
                    close(buffer, file)
            if what != "del":
                close(buffer, file)
                del buffer
            file.close()
            with ExitStack() as stack:
                for _ in range(20):  # until one has the id of the closed one
                    buffer = stack.enter_context(dmabuf.allocate(SIZE, exporter="memfd"))
                    if id(buffer) == was:
                        break
                buffer.pwrite(poison(SIZE), 0)
                assert other.read_into(buffer).nbytes == SIZE
                assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 1), f"interrupt {number}")
            del buffer
            assert (pinned(), held()) == before, number
    assert number > 10


@contextmanager
def paused_at(point, path):
    """Another thread stands still in the middle of a transfer by the default engine.

    Yields whether it does: how many points a transfer has is not the same in every thread.
    """
    ready, go_on, paused, moved = threading.Event(), threading.Event(), [], []

    def pause():
        paused.append(point)
        ready.set()
        go_on.wait()

    def work():
        try:
            with dmabuf.open(path) as file, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
                file.read_into(buffer)
                with Points({point}, pause):
                    moved.append(file.read_into(buffer).nbytes)
        finally:
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        ready.wait()
        yield bool(paused)
    finally:
        go_on.set()
        thread.join()
    assert moved == [SIZE]


@contextmanager
def inside(path, buf, engine, count):
    """A transfer that is made inside another; both are compared."""
    sink = path.with_name("inner")
    with (
        dmabuf.allocate(SIZE, exporter="memfd") as inner,
        dmabuf.open(sink, "w", engine=engine) as out,
        dmabuf.open(path, engine=engine) as file,
    ):
        file.read_into(buf)
        file.read_into(inner)
        done = []

        def nested():
            inner.pwrite(poison(SIZE), 0)
            file.read_into(inner)
            out.write_from(inner, SIZE - 7)
            done.append(inner.pread(SIZE, 0))

        yield nested, lambda: file.read_into(buf)
        assert len(done) >= count
        for got in done:
            assert_same(got, pattern(SIZE, 1), "the inner buffer")
        assert_same(sink.read_bytes(), pattern(SIZE, 1)[:-7], "the inner file")


def test_a_transfer_in_a_signal_handler_inside_another(path, buf, engine):
    with inside(path, buf, engine, 20) as (nested, outer):
        with Points((), nested) as counted:
            outer()
        for number in range(1, counted.seen, max(1, counted.seen // 20)):
            buf.pwrite(poison(SIZE), 0)
            with Points({number}, nested):
                assert outer().nbytes == SIZE
            assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the outer buffer")


def test_a_transfer_in_a_signal_handler_beside_another_thread(path, buf):
    """Which has a ring of the default engine, and keeps it."""
    with inside(path, buf, None, 20) as (nested, outer):
        with Points((), nested) as counted:
            outer()
        points, paused = range(1, counted.seen, max(1, counted.seen // 15)), 0
        for where in points:
            with paused_at(where, path) as beside:
                paused += beside
                for number in points:
                    buf.pwrite(poison(SIZE), 0)
                    with Points({number}, nested):
                        assert outer().nbytes == SIZE
                    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the outer buffer")
        assert paused >= 10


class Garbage:
    """Calls `act` when the collector finds it."""

    def __init__(self, act):
        self.cycle, self.act = self, act

    def __del__(self):
        self.act()


def test_a_transfer_in_a_destructor_inside_another(path, buf, engine):
    """Which the collector calls at one of the outer transfer's allocations."""
    with inside(path, buf, engine, 10) as (nested, outer):
        thresholds = gc.get_threshold()
        for allocations in range(1, 60, 3):
            buf.pwrite(poison(SIZE), 0)
            gc.collect()
            Garbage(nested)
            gc.set_threshold(allocations)
            try:
                assert outer().nbytes == SIZE
            finally:
                gc.set_threshold(*thresholds)
                gc.collect()
            assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the outer buffer")

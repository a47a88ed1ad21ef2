"""What the store's server holds: freed before its place is taken, and within what it may have."""

import contextlib
import errno
import os
import resource
import threading
import tracemalloc
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.store import keeper, memory
from dmabuf.store.keeper import Keeper
from dmabuf.store.marks import Marks
from dmabuf.store.memory import Memory
from dmabuf.store.names import Names, Peer
from dmabuf.store.protocol import Refusal
from tests.serving import Loop, as_a_program, in_a_thread

ROOT = Peer(0, 0)
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


def test_memory_counts_until_it_is_gone(monkeypatch) -> None:
    """And so do its descriptors."""
    loop, names, made, left = Loop(), Names[Memory](2 * MIB, 10), [], []
    kept = Keeper(names, 1, loop.later)
    entry = names.begin("one", ROOT, 0o600, MIB, MIB)
    kept.make(MIB, "memfd", "one", False, made.append)
    loop.until(lambda: made)
    names.finish(entry, made.pop())
    may_close, close = threading.Event(), Memory.close

    def slow_close(self: Memory) -> None:
        may_close.wait(30)
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "close", slow_close)
        names.remove("one", ROOT)
        kept.settle(lambda: left.append(names.left))
        kept.make(MIB, "memfd", "two", False, made.append)
        loop.until(lambda: len(kept._waiting) == 2)
        assert (names.left, left, made) == (MIB, [], [])
        may_close.set()
        loop.until(lambda: left and made)
    assert left == [2 * MIB]
    made.pop().close()
    kept.end()
    kept.release_all()


def test_what_takes_the_place_of_memory_is_made_when_that_is_gone(path, monkeypatch) -> None:
    make, close, events = memory.make, Memory.close, []
    with in_a_thread(path, MIB), dmabuf.store.connect(path) as store:
        store.create("one", MIB, exporter="memfd").close()
        monkeypatch.setattr(Memory, "close", lambda self: close(self) or events.append("closed"))
        monkeypatch.setattr(memory, "make", lambda *what: events.append("made") or make(*what))
        store.remove("one")
        store.create("two", MIB, exporter="memfd").close()
        assert events == ["closed", "made"]


def test_usage_waits_only_if_it_is_to(path, monkeypatch) -> None:
    may_close, close = threading.Event(), Memory.close

    def slow_close(self: Memory) -> None:
        may_close.wait(30)
        close(self)

    with in_a_thread(path, MIB), dmabuf.store.connect(path) as store:
        store.create("one", MIB, exporter="memfd").close()
        monkeypatch.setattr(Memory, "close", slow_close)
        store.remove("one")
        assert store.usage(settle=False)[::2] == (MIB, 0)
        may_close.set()
        assert store.usage()[::2] == (0, 0)


def test_who_waits_for_much_to_be_freed_takes_no_room() -> None:
    """10,000 that are being freed, and 500 who wait for all of them."""
    loop, may_free, called = Loop(), threading.Event(), []
    kept = Keeper(Names[Memory](MIB, 1), 1, loop.later)
    for _ in range(10_000):
        kept._free(lambda: may_free.wait(30), called.append)
    tracemalloc.start()
    try:
        for number in range(500):
            kept.settle(lambda number=number: called.append(number))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    may_free.set()
    loop.until(lambda: len(called) == 10_500)
    assert called == [True] * 10_000 + [*range(500)]
    kept.end()
    kept.release_all()


def test_what_cannot_be_marked_now_is_tried_again_later(monkeypatch) -> None:
    """And not at once, again and again."""
    loop, names, made, tried, called = Loop(), Names[Memory](MIB, 10), [], [], []
    now, put = [100.0], Marks._put

    def full(marks: Marks, group: int, fd: int) -> bytes | None:
        tried.append(fd)
        raise OSError(errno.ENOSPC, "no more marks")

    class Sealed:
        @staticmethod
        def dmb_punch(fd: int, size: int) -> int:
            return -errno.EPERM

    monkeypatch.setattr(memory, "lib", Sealed)
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    kept = Keeper(names, 1, loop.later)
    entry = names.begin("one", ROOT, 0o600, MIB, MIB)
    kept.make(MIB, "memfd", "one", False, made.append)
    loop.until(lambda: made)
    made[0].lent = True
    names.finish(entry, made.pop())
    names.remove("one", ROOT)
    monkeypatch.setattr(Marks, "_put", full)
    kept.sweep()
    loop.until(lambda: not kept._jobs)
    for _ in range(100):
        kept.sweep()
    assert (len(tried), kept._jobs) == (1, {})
    now[0] += 1
    kept.sweep()
    loop.until(lambda: not kept._jobs)
    assert (len(tried), names.left) == (2, 0)
    monkeypatch.setattr(Marks, "_put", put)
    kept.settle(lambda: called.append(names.left))
    loop.until(lambda: called)
    assert called == [MIB]
    kept.end()
    kept.release_all()


def test_no_thread_has_to_be_started_later(path, monkeypatch) -> None:
    def no_room(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with in_a_thread(path), dmabuf.store.connect(path) as store:
        store.list()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_room)
            store.create("n", 4096).close()
            store.remove("n")
            assert store.usage()[::2] == (0, 0)


def test_no_threads_to_begin_with(monkeypatch) -> None:
    start, threads = threading.Thread.start, threading.active_count()
    room = iter(range(3))

    def some_room(thread: threading.Thread) -> None:
        if next(room, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", some_room)
    with pytest.raises(OSError, match="ulimit -u") as caught:
        Keeper(Names[Memory](MIB, 1), 100, lambda *what: None)
    assert caught.value.errno == errno.EAGAIN
    assert threading.active_count() == threads


def test_asking_about_much_that_was_removed_takes_a_share_of_the_time(monkeypatch) -> None:
    now = [0.0]
    asked = []
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])

    class Held:
        size = 1

        def others(self) -> bool:
            asked.append(now[0])
            now[0] += 0.01
            return True

    names: Names[Held] = Names(1 << 20, 1000)
    for number in range(50):
        names.finish(names.begin(f"{number}", ROOT, 0, 1, 1), Held())
        names.remove(f"{number}", ROOT)
    kept = Keeper(names, 100, lambda *what: None)
    began = now[0]
    for _ in range(1000):
        kept.sweep()
        now[0] += 0.01
    assert asked, "it is asked"
    assert len(asked) * 0.01 < 0.2 * (now[0] - began) + 0.6
    kept.end()
    names.removed.clear()
    kept.release_all()


def test_much_that_is_removed_at_once_is_looked_at_in_slices(monkeypatch) -> None:
    """The loop has turns in between; who waits for memory waits for all of it."""
    now, loop, asked, settled = [0.0], Loop(), [], []
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])

    class Held:
        size = 1

        def others(self) -> bool:
            asked.append(self)
            now[0] += 0.001
            return True

    names: Names[Held] = Names(1 << 20, 1000)
    for number in range(500):
        names.finish(names.begin(f"{number}", ROOT, 0, 1, 1), Held())
        names.remove(f"{number}", ROOT)
    kept = Keeper(names, 100, loop.later)
    kept.sweep()
    assert 1 <= len(asked) < 20
    kept.settle(lambda: settled.append(len(set(asked))))
    turns = 0
    while not settled:
        before = now[0]
        loop.next()
        assert now[0] - before < 0.01
        turns += 1
    assert turns > 50
    assert settled == [500]
    kept.end()
    names.removed.clear()
    kept.release_all()


def test_descriptors_are_kept_for_clients(tmp_path: Path) -> None:
    """Under a limit of 96: half for memory, a quarter for clients."""
    path = tmp_path / "store.sock"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))

    with as_a_program(path, preexec_fn=limit) as server, contextlib.ExitStack() as stack:
        store = stack.enter_context(dmabuf.store.connect(path))
        count = 0
        with pytest.raises(OSError, match="as many descriptors as it may") as caught:
            for _ in range(100):
                store.create(f"{count}", 4096, exporter="memfd").close()
                count += 1
        assert (caught.value.errno, count) == (errno.ENOSPC, 48)
        assert store.usage().names == 48
        for _ in range(11):
            stack.enter_context(dmabuf.store.connect(path)).list()
        with dmabuf.store.connect(path) as more, pytest.raises(OSError) as caught:
            more.list()
        assert caught.value.errno == errno.EUSERS
        store.remove("0")
        store.create("again", 4096, exporter="memfd").close()
        assert len(os.listdir(f"/proc/{server.pid}/fd")) < 96


def test_no_descriptors_left_to_accept_with(tmp_path: Path) -> None:
    """The loop does not spin, and goes on when there are some again."""
    path = tmp_path / "store.sock"
    with as_a_program(path) as server, dmabuf.store.connect(path) as store:
        store.list()
        now = len(os.listdir(f"/proc/{server.pid}/fd"))
        before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (now, before[1]))
        with dmabuf.store.connect(path) as waiting:
            store.list()
            with pytest.raises(OSError):
                store.create("n", 4096)
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)
            assert waiting.list() == []
        store.create("n", 4096).close()


def test_a_refusal_says_what_was_asked(tmp_path: Path) -> None:
    with pytest.raises(Refusal) as caught:
        Names[Memory](10, 1).begin("n", ROOT, 0, 11, 11)
    assert "11 B are more than the store has left: 10 B of 10 B" in caught.value.text

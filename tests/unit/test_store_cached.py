"""Cached buffers and reservations of the store: final content, one maker, no lost waiter."""

import contextlib
import errno
import fcntl
import os
import signal
import socket as sockets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.kernel import uapi
from dmabuf.store import Status, Store
from tests.restarting import KINDS
from tests.serving import as_a_program, for_every_user, in_a_thread
from tests.support import assert_same, in_child, pattern, wait_until

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with in_a_thread(path, 16 * MIB), dmabuf.store.connect(path) as store:
        yield store


def cache(store: Store, name: str, size: int = MIB, **how: object) -> Status:
    buffer = store.create(None, size, exporter="memfd", trusted=True)
    buffer.pwrite(pattern(size, len(name)), 0)
    try:
        return store.link(buffer, name, cached=True, **how)
    finally:
        buffer.close()


class Waiting:
    """A thread that reserves a name on a connection of its own."""

    def __init__(self, path: Path, name: str) -> None:
        self.store = dmabuf.store.connect(path)
        self.results: list[Status | OSError | None] = []
        self._thread = threading.Thread(target=self._run, args=[name])
        self._thread.start()

    def _run(self, name: str) -> None:
        try:
            self.results.append(self.store.reserve(name))
        except OSError as error:
            self.results.append(error)

    def result(self) -> Status | OSError | None:
        self._thread.join()
        return self.results[0]


# -- cached


def test_a_cached_buffer_is_final(store: Store) -> None:
    status = cache(store, "a", 5000)
    assert status.cached and store.list() == [status]
    with store.open("a") as buffer:
        assert_same(buffer.pread(5000, 0), pattern(5000, 1), "a")
        seals = fcntl.fcntl(buffer.fileno(), uapi.F_GET_SEALS)
        assert seals & uapi.F_SEAL_WRITE and seals & uapi.F_SEAL_SEAL
        assert store.stat("a").in_use
    assert store.stat("a").in_use is False
    with pytest.raises(PermissionError, match="content is final"):
        store.open("a", "r+")
    with store.create("b", 1, exporter="memfd") as buffer:
        assert fcntl.fcntl(buffer.fileno(), uapi.F_GET_SEALS) & uapi.F_SEAL_SEAL
    buffer = store.create(None, 1, exporter="memfd")
    store.link(buffer, "c")
    with buffer, pytest.raises(PermissionError):
        fcntl.fcntl(buffer.fileno(), uapi.F_ADD_SEALS, uapi.F_SEAL_WRITE)
    assert not store.stat("c").cached


def test_memory_that_others_can_write_is_not_cached(store: Store) -> None:
    buffer = store.create(None, 4096, exporter="memfd")
    view = memoryview(buffer)
    with pytest.raises(BufferError, match="exported pointers exist"):
        store.link(buffer, "a", cached=True)
    view.release()
    assert store.list() == []
    with pytest.raises(OSError, match="has not sealed the memory") as raised:
        store._connection.ask(
            "link", unnamed=store._unnamed[buffer], name="a", replace=True, length=None, cached=True
        )
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="invalid name"):
        store.link(buffer, "a/b", cached=True)
    assert not buffer.closed
    store.create("there", 1).close()
    with pytest.raises(FileExistsError):
        store.link(buffer, "there", replace=False, cached=True)
    assert buffer.closed
    assert store.link(buffer, "a", cached=True).cached


def test_a_use_is_noted(store: Store) -> None:
    first = cache(store, "a")
    store.create("b", 1).close()
    before = store.stat("b").accessed_ns
    store.open("a").close()
    store.open("b").close()
    assert store.stat("a").accessed_ns > first.accessed_ns
    assert store.stat("b").accessed_ns == before, "an ordinary buffer's is the clients'"


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_keeps_what_is_cached(kind: str, path: Path) -> None:
    with closing(KINDS[kind](path)) as server, dmabuf.store.connect(path) as store:
        cache(store, "a")
        with store.open("a") as buffer:
            before = store.list()
            server.restart()
            assert store.list() == before and before[0].cached
            assert store.stat("a").in_use
            assert_same(buffer.pread(MIB, 0), pattern(MIB, 1), "a")


# -- reservations


def test_the_others_wait_until_the_name_appears(path: Path, store: Store) -> None:
    assert store.reserve("a") is None
    waiting = [Waiting(path, "a") for _ in range(3)]
    other = Waiting(path, "b")
    assert other.result() is None, "another name is free"
    store.create("c", 1).close()
    assert not any(one.results for one in waiting)
    status = cache(store, "a")
    assert [one.result() for one in waiting] == [status] * 3
    assert store.reserve("a") == status
    for one in (*waiting, other):
        one.store.close()


@pytest.mark.parametrize("how", ["create", "rename"])
def test_a_name_may_appear_in_other_ways(how: str, path: Path, store: Store) -> None:
    assert store.reserve("a") is None
    waiting = Waiting(path, "a")
    if how == "create":
        store.create("a", 1).close()
    else:
        store.create("b", 1).close()
        store.rename("b", "a")
    result = waiting.result()
    assert isinstance(result, Status) and result.number == store.stat("a").number
    waiting.store.close()


@pytest.mark.parametrize("how", ["close", "another name"])
def test_one_of_those_that_wait_reserves_it_next(how: str, path: Path, store: Store) -> None:
    with dmabuf.store.connect(path) as first:
        assert first.reserve("a") is None
        waiting = [Waiting(path, "a") for _ in range(3)]
        if how == "close":
            first.close()
        else:
            assert first.reserve("b") is None
        for left in (3, 2, 1):
            wait_until(lambda: any(one.results for one in waiting))
            [served] = [one for one in waiting if one.results]
            assert served.result() is None
            waiting.remove(served)
            assert len(waiting) == left - 1
            served.store.close()


def test_a_client_that_waits_can_end(path: Path, store: Store) -> None:
    assert store.reserve("a") is None
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as one:
        one.connect(str(path))
        one.send(b'{"op": "reserve", "name": "a"}')
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as one:
        one.connect(str(path))
        one.send(b'{"op": "reserve", "name": "a"}')
        one.send(b'{"op": "usage"}')  # before it has read the reply
        assert one.recv(4096) == b""
    cache(store, "a")
    assert store.reserve("a") == store.list()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_keeps_who_makes_it(kind: str, path: Path) -> None:
    with closing(KINDS[kind](path)) as server, dmabuf.store.connect(path) as store:
        assert store.reserve("a") is None
        waiting = Waiting(path, "a")
        dmabuf.store.connect(path).close()  # so the server has read the request before
        server.restart()
        if kind == "killed":  # nobody has reserved it now
            assert waiting.result() is None
            waiting.store.close()
            assert store.reserve("a") is None
        else:
            assert not waiting.results
            status = cache(store, "a")
            assert waiting.result() == status
            waiting.store.close()


def test_the_maker_is_killed(path: Path) -> None:
    with as_a_program(path):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            dmabuf.store.connect(path).reserve("a")
            os.write(writing, b"x")
            signal.pause()
        os.read(reading, 1)
        waiting = Waiting(path, "a")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert waiting.result() is None
        waiting.store.close()
        os.close(reading)
        os.close(writing)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be any user")
def test_users_do_not_wait_for_each_other() -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        os.chmod(folder, 0o755)
        path = f"{folder}/s"
        stack.enter_context(for_every_user(path))
        store = stack.enter_context(dmabuf.store.connect(path))
        assert store.reserve("a") is None
        cache(store, "b")
        in_child(
            """
import errno, os, sys
import dmabuf.store
os.setresgid(4001, 4001, 4001); os.setresuid(4001, 4001, 4001)
store = dmabuf.store.connect(sys.argv[1])
assert store.reserve("a") is None
try:
    store.reserve("b")
except PermissionError as error:
    assert error.errno == errno.EPERM and "belongs to user 0" in str(error), error
else:
    raise AssertionError
""",
            path,
        )
        cache(store, "a")

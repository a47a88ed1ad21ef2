"""Clients that send garbage or descriptors, or that die: other clients are not disturbed."""

import contextlib
import errno
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmabuf.store
from dmabuf.store import Store
from tests.serving import as_a_program, in_a_thread
from tests.support import pattern

MIB = 1 << 20
REPLY = 1 << 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with in_a_thread(path, 16 * MIB), dmabuf.store.connect(path) as store:
        store.list()  # the server has accepted it
        yield store


@contextlib.contextmanager
def raw(path: Path) -> Iterator[socket.socket]:
    """A connection that keeps to no protocol."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        yield connection


def reply(connection: socket.socket) -> bytes:
    """What the server answers; empty if it ended the connection."""
    try:
        return connection.recv(REPLY)
    except ConnectionResetError:
        return b""


def works(store: Store) -> None:
    """A well-behaved client gets what it asks for."""
    with store.create("works", 4096) as buffer, store.open("works") as again:
        buffer.pwrite(b"yes", 0)
        assert again.pread(3, 0) == b"yes"
    store.remove("works")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def released(store: Store, before: int) -> bool:
    """Wait for the server's threads to close what was removed."""
    for _ in range(3000):
        if descriptors() <= before:
            return True
        works(store)
    return False


def test_garbage_is_answered_with_an_error(path: Path, store: Store) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=5))
    def throw(messages: list[bytes]) -> None:
        with raw(path) as connection:
            for message in messages:
                connection.send(message)
                number, _, _ = json.loads(reply(connection))["error"]
                assert number in (errno.EPROTO, errno.EMSGSIZE, errno.EINVAL)

    before = descriptors()
    throw()
    works(store)
    assert released(store, before)


FIELDS = {
    "create": ("name", "size", "mode", "exporter", "huge_pages", "trusted"),
    "link": ("unnamed", "name", "replace", "length"),
    "discard": ("unnamed",),
    "open": ("name", "number", "mode", "trusted"),
    "stat": ("name",),
    "list": ("after",),
    "remove": ("name", "number"),
    "rename": ("name", "number", "to", "replace"),
    "truncate": ("name", "number", "length"),
    "chmod": ("name", "number", "mode"),
    "chown": ("name", "number", "uid", "gid"),
    "utime": ("name", "number", "accessed_ns", "modified_ns"),
    "usage": (),
}
NAMES = st.sampled_from(["a", "b", "kept", "", "x/y", "n" * 300, "\ud800"]) | st.none()
NUMBERS = st.sampled_from([-1, 0, 1, 2, 4095, 4096, 4097, 2**31, 2**62, 2**64]) | st.none()
FLAGS = st.booleans() | st.none() | NUMBERS
VALUES = {
    "name": NAMES, "to": NAMES, "after": NAMES, "trusted": FLAGS, "replace": FLAGS,
    "huge_pages": st.booleans(), "exporter": st.sampled_from(["memfd", "auto", "none", ""]),
    "mode": st.sampled_from(["r", "r+", "w", 0o600, 0o777, 0, True]),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def _operations(path: Path, data: st.DataObject) -> None:
    """Requests in any order, with any of their fields wrong."""
    with raw(path) as connection:
        for _ in range(data.draw(st.integers(1, 6))):
            op = data.draw(st.sampled_from(sorted(FIELDS)))
            fields = {field: data.draw(VALUES.get(field, NUMBERS)) for field in FIELDS[op]}
            connection.send(json.dumps({"op": op, **fields}).encode())
            got, fds, _, _ = socket.recv_fds(connection, REPLY, 253)
            for fd in fds:
                os.close(fd)
            assert json.loads(got).keys() in ({"result"}, {"error"}), fields


def test_operations_of_any_kind_in_any_order(path: Path, store: Store, caplog) -> None:
    with store.create("mine", MIB) as mine:
        mine.pwrite(pattern(MIB, 1), 0)
        _operations(path)
        assert mine.pread(MIB, 0) == pattern(MIB, 1)
    for one in store.list():
        store.remove(one.name)
    works(store)
    assert (store.usage().charged, store.usage().names) == (0, 0)
    assert not caplog.records


def test_a_message_that_is_too_long_or_empty(path: Path, store: Store) -> None:
    with raw(path) as connection:
        connection.send(b"x" * 100_000)
        assert json.loads(reply(connection))["error"][0] == errno.EMSGSIZE
    with raw(path) as connection:
        connection.send(b"")
        assert reply(connection) == b""
    with raw(path) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert reply(connection) == b""
    works(store)


def test_requests_without_reading_end_the_connection(path: Path, store: Store) -> None:
    request = b'{"op":"usage"}'
    with raw(path) as connection:
        connection.send(request)
        connection.send(request)
        ended = select.poll()
        ended.register(connection, select.POLLRDHUP)
        assert ended.poll(30_000), "the second came before the first reply was read"
        assert reply(connection), "the first was answered"
        assert reply(connection) == b""
    with raw(path) as connection:
        for _ in range(100):
            connection.send(request)
            assert reply(connection)
    works(store)


def test_uninvited_descriptors_end_the_connection(path: Path, store: Store) -> None:
    memfd = os.memfd_create("uninvited")
    ends = os.pipe()
    before = descriptors()
    for count in (1, 3, 200):
        with raw(path) as connection:
            fds = ([memfd, *ends] * count)[:count]
            socket.send_fds(connection, [b'{"op":"usage"}'], fds)
            assert reply(connection) == b""
    works(store)
    for fd in (memfd, ends[1]):
        os.close(fd)
    assert os.read(ends[0], 1) == b"", "nobody else has the pipe's other end"
    os.close(ends[0])
    assert released(store, before - 3)


def test_a_client_that_ends_releases_what_it_made_and_did_not_publish(
    path: Path, store: Store
) -> None:
    before = descriptors()
    other = dmabuf.store.connect(path)
    with other.create(None, MIB), other.create("named", MIB), other.create(None, 5) as linked:
        other.link(linked, "linked")
        assert store.usage().names == 3
        other.close()
    works(store)
    assert [one.name for one in store.list()] == ["linked", "named"]
    assert store.usage().charged == MIB + 4096
    for name in ("linked", "named"):
        store.remove(name)
    assert released(store, before)


_BUSY = """
import random, sys, dmabuf.store
dice = random.Random(int(sys.argv[2]))
with dmabuf.store.connect(sys.argv[1]) as store:
    print("ready", flush=True)
    while True:
        name = dice.choice([None, "a", "b", "c"])
        try:
            buffer = store.create(name, 1 << dice.randrange(22), trusted=dice.random() < 0.5)
            if name is None and dice.random() < 0.5:
                store.link(buffer, dice.choice("abc"))
            store.open(dice.choice("abc"), "r+").pwrite(b"x", 0)
            store.rename(dice.choice("abc"), dice.choice("abc"))
            store.remove(dice.choice("abc"))
        except OSError:
            pass
"""


def test_clients_that_are_killed_at_any_point(path: Path, store: Store) -> None:
    before = descriptors()
    dice = random.Random(1)
    for seed in range(6):
        busy = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _BUSY, path, str(seed * 2 + number)],
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[2],
            )
            for number in range(2)
        ]
        for process in busy:
            assert process.stdout.readline() == b"ready\n"
        for _ in range(dice.randrange(50)):
            works(store)
        for process in busy:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
    for _ in range(3000):  # their last requests may still be in progress
        for one in store.list():
            store.remove(one.name)
        if store.usage().names == 0:
            break
    assert (store.usage().charged, store.usage().names) == (0, 0)
    works(store)
    assert released(store, before)


def test_a_server_without_descriptors_serves_again_later(path: Path) -> None:
    """Who waits to connect meanwhile is accepted when another connection ends."""
    limited = {"preexec_fn": lambda: _limit_descriptors(64)}
    with as_a_program(path, **limited) as server, contextlib.ExitStack() as stack:
        first = stack.enter_context(dmabuf.store.connect(path))
        first.list()
        others = [stack.enter_context(dmabuf.store.connect(path)) for _ in range(80)]
        first.list()
        for one in others:
            one.close()
        with dmabuf.store.connect(path) as late:
            late.list()
            works(late)
        assert server.poll() is None


def _limit_descriptors(count: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def test_a_server_that_is_not_a_store(path: Path) -> None:
    """The client refuses what it sends, and closes every descriptor."""
    memfd = os.memfd_create("other")
    os.truncate(memfd, 4096)
    status = {
        "name": "n", "size": 4096, "length": 1, "mode": 0o600, "uid": 0, "gid": 0,
        "created_ns": 0, "changed_ns": 0, "modified_ns": 0, "accessed_ns": 0, "exporter": "memfd",
        "reason": "", "slabs": 1, "is_dmabuf": False, "number": 1, "in_use": None,
    }  # fmt: skip

    def grant(kind: str, slabs: int, with_memfd: bool) -> bytes:
        granted = {
            "kind": kind, "slabs": slabs, "memfd": with_memfd, "writable": True, "unnamed": None,
        }  # fmt: skip
        return json.dumps({"result": {"status": status, "grant": granted}}).encode()

    replies: list[tuple[bytes, list[int]]] = [
        (b"", []),
        (b"hello", []),
        (b'{"result":{}}', [memfd]),
        (b'{"result":{"status":{},"grant":[]}}', [memfd]),
        (grant("memfd", 1, False).replace(b'"size": 4096', b'"size": true'), [memfd]),
        (grant("memfd", 1, False), []),
        (grant("memfd", 1, False), [memfd, memfd]),
        (grant("memfd", 1, False), [memfd]),  # it could shrink
        (grant("dma-buf", 1, False), [memfd]),
        (grant("dma-buf", 0, False), []),
        (grant("dma-buf", -1, True), [memfd]),
    ]
    before = descriptors()
    for data, fds in replies:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            with dmabuf.store.connect(path, again=False) as store:
                connection, _ = listener.accept()
                with connection:
                    socket.send_fds(connection, [data], fds)
                    with pytest.raises(OSError) as caught:
                        store.open("n")
                    assert caught.value.errno in (errno.EPROTO, errno.ECONNRESET)
        path.unlink()
    assert descriptors() == before
    os.close(memfd)


def test_many_messages_leave_nothing(path: Path) -> None:
    with as_a_program(path) as server, dmabuf.store.connect(path) as store:
        store.create("n", 4096).close()

        def resident() -> int:
            return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])

        def run(count: int) -> None:
            for _ in range(count):
                store.open("n").close()
                with contextlib.suppress(FileNotFoundError):
                    store.stat("m")

        run(500)
        before = resident(), len(os.listdir(f"/proc/{server.pid}/fd"))
        run(2000)
        after = resident(), len(os.listdir(f"/proc/{server.pid}/fd"))
        assert after[1] == before[1]
        assert after[0] - before[0] < 256, "pages"

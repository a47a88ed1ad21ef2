"""Clients that send garbage, too much, descriptors or nothing, or die: nobody else is harmed."""

import contextlib
import errno
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmabuf.store
from dmabuf.store import Store, marks, memory, place, protocol
from dmabuf.store.clients import Client
from dmabuf.store.server import Server
from tests.serving import as_a_program, in_a_thread, serving
from tests.support import in_child, pattern

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def server(path: Path) -> Iterator[Server]:
    with in_a_thread(path, 16 * MIB) as server:
        yield server


@pytest.fixture
def store(path: Path, server: Server) -> Iterator[Store]:
    with dmabuf.store.connect(path) as store:
        store.list()  # so it was accepted, and its descriptor is there
        yield store


@contextlib.contextmanager
def raw(path: Path) -> Iterator[socket.socket]:
    """A connection of somebody who keeps to nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        yield connection


def reply(connection: socket.socket) -> bytes:
    """What comes back, empty where the connection was ended."""
    try:
        return connection.recv(protocol.REPLY_BYTES)
    except ConnectionResetError:
        return b""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def no_more_than(before: int) -> bool:
    """Whether the descriptors come down to that: threads of the store close what was removed."""
    return any(descriptors() <= before or time.sleep(0.02) for _ in range(500))


def works(store: Store) -> None:
    """A well-behaved client gets all that it did before."""
    with store.create("works", 4096) as buffer, store.open("works") as again:
        buffer.pwrite(b"yes", 0)
        assert again.pread(3, 0) == b"yes"
    store.remove("works")


def test_garbage_is_answered_and_harms_nobody(path: Path, store: Store) -> None:
    @settings(max_examples=150)
    @given(st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=5))
    def throw(messages: list[bytes]) -> None:
        with raw(path) as connection:
            for message in messages:
                connection.send(message)
                with pytest.raises(protocol.Refusal) as caught:
                    protocol.parse_reply(reply(connection))
                assert caught.value.errno in (errno.EPROTO, errno.EMSGSIZE)

    before = descriptors()
    throw()
    works(store)
    assert no_more_than(before)


@settings(max_examples=150)
@given(st.data())
def _operations(path: Path, data: st.DataObject) -> None:
    """Good requests in any order, with any of their fields wrong."""
    names = st.sampled_from(["a", "b", "kept", "", "x/y", "n" * 300])
    numbers = st.sampled_from([-1, 0, 1, 2, 4095, 4096, 4097, 2**31, 2**62, 2**64])
    with raw(path) as connection:
        for _ in range(data.draw(st.integers(1, 6))):
            op = data.draw(st.sampled_from(sorted(protocol._OPERATIONS)))
            fields: dict[str, object] = {"op": op}
            for field in protocol._OPERATIONS[op]:
                if field in ("name", "to", "after"):
                    fields[field] = data.draw(names | st.none())
                elif field in ("trusted", "replace", "huge_pages"):
                    fields[field] = data.draw(st.booleans())
                elif field == "exporter":
                    fields[field] = data.draw(st.sampled_from(["memfd", "auto", "none", ""]))
                elif field == "mode":
                    fields[field] = data.draw(st.sampled_from(["r", "r+", "w", 0o600, 0o777, 0]))
                else:
                    fields[field] = data.draw(numbers | st.none())
            connection.send(protocol._dump(fields))
            got, fds, _, _ = socket.recv_fds(connection, protocol.REPLY_BYTES, 253)
            for fd in fds:
                os.close(fd)
            assert got, fields
            with contextlib.suppress(protocol.Refusal):
                protocol.parse_reply(got)


def test_operations_of_any_kind_in_any_order(path: Path, store: Store, caplog) -> None:
    with store.create("mine", MIB) as mine:
        mine.pwrite(pattern(MIB, 1), 0)
        _operations(path)
        assert mine.pread(MIB, 0) == pattern(MIB, 1)
    for one in store.list():
        store.remove(one.name)
    assert store.usage()[::2] == (0, 0)
    works(store)
    assert not caplog.records


def test_a_message_that_is_empty_or_never_ends(path: Path, store: Store) -> None:
    with raw(path) as connection:
        connection.send(b"x" * 100_000)
        with pytest.raises(protocol.Refusal) as caught:
            protocol.parse_reply(reply(connection))
        assert caught.value.errno == errno.EMSGSIZE
    with raw(path) as connection:
        connection.send(b"")
        assert reply(connection) == b""
    with raw(path) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert reply(connection) == b""
    works(store)


def test_requests_without_reading_end_the_connection(path: Path, store: Store) -> None:
    request = protocol.pack_request("list", after="")
    with raw(path) as connection:
        connection.send(request)
        connection.send(request)
        ended = select.poll()
        ended.register(connection, select.POLLRDHUP)
        assert ended.poll(10_000), "the second came before the first reply was read"
        assert reply(connection), "the first was answered"
        assert reply(connection) == b""
    with raw(path) as connection:
        for _ in range(100):
            connection.send(request)
            assert reply(connection)
    works(store)


def test_grants_that_nobody_reads_end_no_other_connection(store: Store, monkeypatch) -> None:
    """As many are under way as may be, of a server without privileges (unix(7), ETOOMANYREFS)."""
    send = Client.send

    def too_many(client: Client, data: bytes, descriptors: list[int]) -> None:
        if descriptors:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        send(client, data, descriptors)

    store.create("n", 4096, exporter="memfd").close()
    with monkeypatch.context() as patch:
        patch.setattr(Client, "send", too_many)
        for ask in (lambda: store.open("n"), lambda: store.create("m", 4096, exporter="memfd")):
            with pytest.raises(OSError, match="do not read what they are granted") as caught:
                ask()
            assert caught.value.errno == errno.ETOOMANYREFS
        assert [one.name for one in store.list()] == ["n"]
    works(store)
    store.open("n").close()


@contextlib.contextmanager
def older_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on Linux before 6.16, where the server cannot refuse descriptors."""
    with monkeypatch.context() as patch:
        patch.setattr(place, "_SO_PASSRIGHTS", 0x7FFF)
        yield


@pytest.mark.parametrize("older", [False, True])
def test_descriptors_that_nobody_asked_for(path: Path, older: bool, monkeypatch) -> None:
    with contextlib.ExitStack() as stack:
        if older:
            stack.enter_context(older_kernel(monkeypatch))
        stack.enter_context(in_a_thread(path))
        store = stack.enter_context(dmabuf.store.connect(path))
        store.list()
        memfd = os.memfd_create("uninvited")
        ends = os.pipe()
        before = descriptors()
        for count in (1, 3, 200):
            with raw(path) as connection:
                fds = ([memfd, *ends] * count)[:count]
                try:
                    socket.send_fds(connection, [protocol.pack_request("list", after="")], fds)
                except PermissionError:
                    assert not older, "only a newer kernel refuses them"
                else:
                    assert reply(connection) == b""
        works(store)
        store.list()
        for fd in (memfd, ends[1]):
            os.close(fd)
        assert os.read(ends[0], 1) == b"", "nobody else has the pipe's other end"
        os.close(ends[0])
        assert no_more_than(before - 3)


@contextlib.contextmanager
def slow_to_close() -> Iterator[socket.socket]:
    """A TCP socket that lingers for data that nobody reads until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        slow = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    with peer:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        slow.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                slow.send(bytes(1 << 16))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        yield slow


def systemds(path: Path, backlog: int) -> socket.socket:
    """A socket that listens before there is a server, which refuses nothing yet."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(backlog)
    return listener


def closing() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if "closing" in one.name]


@pytest.mark.parametrize("older", [False, True])
def test_a_descriptor_that_takes_long_to_close_holds_nobody_up(
    path: Path, older: bool, monkeypatch
) -> None:
    """It was sent, and closed by its sender, before the server came to refuse any."""
    with contextlib.ExitStack() as stack:
        if older:
            stack.enter_context(older_kernel(monkeypatch))
        listener = systemds(path, 2)
        with slow_to_close() as slow, raw(path) as connection:
            socket.send_fds(connection, [b"{}"], [slow.fileno()])
            slow.close()
            place.refuse_descriptors(listener)
            stack.enter_context(serving(Server(listener, MIB)))
            assert reply(connection) == b""
            with dmabuf.store.connect(path) as store:
                works(store)
            for _ in range(500):  # the other client's may be closed by one, too
                threads = closing()
                if len(threads) == 1:
                    break
                time.sleep(0.02)
            assert len(threads) == 1, "it is still being closed"
        threads[0].join(30)


def turn(server: Server, times: int) -> None:
    """The server's loop, by hand."""
    for _ in range(times):
        server._later()  # so that it waits for nothing
        server._turn()


def close_all(server: Server, times: int) -> None:
    """The server's loop, by hand, and the threads that close."""
    for _ in range(times):
        turn(server, 1)
        for thread in closing():
            thread.join(30)
    turn(server, 1)
    assert server._clients._users.total() == 0


def test_no_more_threads_close_than_there_may_be_clients(path: Path) -> None:
    """Who waits for them to come to an end is served then."""
    listener = systemds(path, 20)
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            slow = stack.enter_context(slow_to_close())
            connection = stack.enter_context(raw(path))
            socket.send_fds(connection, [b"{}"], [slow.fileno()])
            slow.close()
        server = Server(listener, MIB)
        server._clients._most = 4
        turn(server, 40)
        assert len(closing()) == 4
    close_all(server, 40)
    with serving(server), dmabuf.store.connect(path) as store:
        works(store)


def test_no_thread_to_close_with(path: Path, monkeypatch, caplog) -> None:
    start = threading.Thread.start

    def no_room(thread: threading.Thread) -> None:
        if "closing" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    server = Server(systemds(path, 2), MIB)
    with raw(path) as connection:
        socket.send_fds(connection, [b"{}"], [connection.fileno()])
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_room)
            turn(server, 4)
            assert reply(connection) == b"", "the peer is told all the same"
            assert not server._listening
        assert "can't start new thread" in caplog.text
        close_all(server, 1)
        with serving(server), dmabuf.store.connect(path) as store:
            works(store)


def test_more_clients_than_there_may_be(path: Path) -> None:
    with in_a_thread(path) as server, contextlib.ExitStack() as stack:
        server._clients._most = 10  # half of them one user's
        good = stack.enter_context(dmabuf.store.connect(path))
        good.list()
        for _ in range(4):
            stack.enter_context(dmabuf.store.connect(path)).list()
        with dmabuf.store.connect(path) as more, pytest.raises(OSError) as caught:
            more.list()
        assert caught.value.errno == errno.EUSERS
        works(good)
    with in_a_thread(path), contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(dmabuf.store.connect(path)).list()


def test_who_is_turned_away_hears_why_though_more_was_sent(path: Path) -> None:
    with place.listening(str(path)) as listener:
        server = Server(listener, MIB)
        server._clients._most = 1  # half of which is no one
        with raw(path) as connection:
            connection.send(b"{}")
            turn(server, 2)
            for thread in closing():
                thread.join(30)
            with pytest.raises(protocol.Refusal, match="as many clients") as caught:
                protocol.parse_reply(connection.recv(protocol.REPLY_BYTES))
            assert caught.value.errno == errno.EUSERS
        close_all(server, 1)
        server._end()


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
    for _ in range(500):  # what they had asked for last may still be under way
        for one in store.list():
            store.remove(one.name)
        if store.usage()[::2] == (0, 0):
            break
        time.sleep(0.02)
    assert store.usage()[::2] == (0, 0)
    works(store)
    assert no_more_than(before)


def test_memory_counts_until_the_last_lets_go(store: Store) -> None:
    one = store.create("one", 10 * MIB)
    with pytest.raises(OSError) as caught:
        store.create("two", 10 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert "10 MiB are more than the store has left: 6 MiB of 16 MiB" in str(caught.value)
    store.remove("one")
    with pytest.raises(OSError) as caught:
        store.create("two", 10 * MIB)
    assert caught.value.errno == errno.ENOSPC
    with one.map():
        assert store.usage().charged == 10 * MIB
    one.close()
    store.create("two", 10 * MIB).close()
    again = store.open("two")
    store.rename("two", "three")
    with store.create(None, 5 * MIB) as unnamed:
        store.link(unnamed, "three")  # the old three is only here now
        assert store.usage().charged == 15 * MIB
    again.close()
    assert store.usage().charged == 5 * MIB


@contextlib.contextmanager
def referred_to(store: Store) -> Iterator[int]:
    """An O_PATH descriptor (open(2)) of all the memory there may be, which has no name any more."""
    with store.create("one", 16 * MIB, exporter="memfd") as one:
        reference = os.open(f"/proc/self/fd/{one.fileno()}", os.O_PATH)
    assert os.fstat(reference).st_blocks == 16 * MIB // 512
    store.remove("one")
    yield reference
    os.close(reference)


def test_memory_that_somebody_refers_to_without_having_it_open(store: Store) -> None:
    with referred_to(store) as reference:
        with pytest.raises(OSError) as caught:
            store.create("two", 16 * MIB, exporter="memfd")
        assert caught.value.errno == errno.ENOSPC
        assert store.usage().charged == 16 * MIB
        assert os.fstat(reference).st_blocks == 0, "and it loses its pages"
    store.create("two", 16 * MIB, exporter="memfd").close()


def test_only_memory_files_are_marked() -> None:
    """What has links, as dma-bufs and pipes, makes the kernel wait for itself: marks.py."""
    marked = marks.Marks(1)
    fds = [os.memfd_create("m"), *os.pipe()]
    assert list(map(marked.can, fds)) == [True, False, False]
    told: list[bool] = []
    for fd in fds:
        left = marked.around(fd, told.append)
        assert bool(left) is told[-1], "it is open"
        os.close(fd)
    assert told == [True, False, False]
    marked.close()


def test_a_kernel_without_marks(path: Path, monkeypatch, caplog) -> None:
    class Lib:
        @staticmethod
        def dmb_fanotify_group() -> int:
            return -errno.ENOSYS

    monkeypatch.setattr(marks, "lib", Lib)
    with in_a_thread(path, 16 * MIB), dmabuf.store.connect(path) as store:
        assert "of huge pages that was ever granted counts until the server ends" in caplog.text
        with referred_to(store) as reference:
            store.create("two", 16 * MIB, exporter="memfd").close()
            assert os.fstat(reference).st_blocks == 0


class NoMoreMarks:
    """As where a user has as many as may be."""

    @staticmethod
    def dmb_fanotify_mark(group: int, fd: int) -> int:
        return -errno.ENOSPC


def test_what_cannot_be_marked_for_now_counts(store: Store, monkeypatch, caplog) -> None:
    """Where it cannot be emptied, it is kept, and tried again."""

    class Sealed:
        @staticmethod
        def dmb_punch(fd: int, size: int) -> int:
            return -errno.EPERM

    monkeypatch.setattr(memory, "lib", Sealed)
    store.create("one", 16 * MIB, exporter="memfd").close()
    with monkeypatch.context() as patch:
        patch.setattr(marks, "lib", NoMoreMarks)
        store.remove("one")
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                store.create("two", 4096, exporter="memfd")
            assert caught.value.errno == errno.ENOSPC
    said = [record for record in caplog.records if "kept for now" in record.getMessage()]
    assert len(said) == 1
    store.usage()  # which waits for the last try of those
    store.create("two", 16 * MIB, exporter="memfd").close()


def test_who_uses_up_the_marks_keeps_nothing_but_names_of_files(store: Store, monkeypatch) -> None:
    monkeypatch.setattr(marks, "lib", NoMoreMarks)
    with referred_to(store) as reference:
        store.create("two", 16 * MIB, exporter="memfd").close()
        assert os.fstat(reference).st_blocks == 0


def test_a_kernel_that_watches_no_more(server: Server, path: Path, monkeypatch) -> None:
    """As with fs.epoll.max_user_watches: that one connection ends."""

    def full(*what: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with dmabuf.store.connect(path) as there:
        there.list()
        with monkeypatch.context() as patch:
            patch.setattr(server._selector, "register", full)
            with dmabuf.store.connect(path) as more, pytest.raises(ConnectionError):
                more.list()
            assert there.list() == []
        with dmabuf.store.connect(path) as more:
            assert more.list() == []


def test_memory_of_a_server_that_ended_is_whole(path: Path) -> None:
    """What clients have stays theirs."""
    with in_a_thread(path), dmabuf.store.connect(path) as store:
        kept = store.create("kept", MIB, exporter="memfd")
        kept.pwrite(pattern(MIB, 1), 0)
        store.remove("kept")
        assert store.usage().charged == MIB
    with kept:
        assert kept.pread(MIB, 0) == pattern(MIB, 1)


def test_more_than_there_is_and_other_mistakes(store: Store) -> None:
    for size, number in ((17 * MIB, errno.ENOSPC), (2**62, errno.ENOSPC)):
        with pytest.raises(OSError) as caught:
            store.create("n", size)
        assert caught.value.errno == number
    with pytest.raises(OSError, match="unknown exporter 'nothing'"):
        store.create("n", 1, exporter="nothing")
    with pytest.raises(OSError, match="no huge pages of 3 B"):
        store.create("n", 1, huge_pages=3)
    with pytest.raises(ValueError):
        store.create("n", "much")
    with pytest.raises(OSError) as caught:
        store.open("n", "w")
    assert caught.value.errno == errno.EINVAL
    assert store.usage()[::2] == (0, 0)
    store.create("n", 1).close()
    with pytest.raises(FileExistsError) as caught:
        store.create("n", 1)
    assert caught.value.filename == "n"


def test_new_memory_is_nobodys_old(store: Store) -> None:
    for seed in range(5):
        with store.create("n", 8 * MIB) as buffer:
            assert buffer.pread(buffer.size, 0) == bytes(buffer.size)
            buffer.pwrite(pattern(8 * MIB, seed), 0)
        store.remove("n")


def test_what_a_server_may_say(path: Path) -> None:
    """A client of something that is no store: refused, and every descriptor closed."""
    memfd = os.memfd_create("other")
    os.truncate(memfd, 4096)
    status = protocol.Status("n", 4096, 1, 0o600, 0, 0, 0, 0, "memfd", "", 1, False, 1, 0, 0, None)

    def grant(*what: object) -> bytes:
        return protocol.pack_result({"status": status, "grant": what})

    said: list[tuple[bytes, list[int]]] = [
        (b"", []),
        (b"hello", []),
        (b'{"result":{}}', [memfd]),
        (grant("memfd", 1, False, True, None), []),
        (grant("memfd", 1, False, True, None), [memfd, memfd]),
        (grant("memfd", 1, False, True, None), [memfd]),  # which could be cut short
        (grant("dma-buf", 1, False, True, None), [memfd]),
        (grant("dma-buf", 0, False, True, None), []),
        (grant("dma-buf", -1, True, True, None), [memfd]),
    ]
    before = descriptors()
    for data, fds in said:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            with dmabuf.store.connect(path) as store:
                connection, _ = listener.accept()
                with connection:
                    socket.send_fds(connection, [data], fds)
                    with pytest.raises(OSError) as caught:
                        store.open("n")
                    assert caught.value.errno in (errno.EPROTO, errno.ECONNRESET)
        path.unlink()
    assert descriptors() == before
    os.close(memfd)


_FORK = """
import os, sys, dmabuf.store
from dmabuf.errors import ClosedError
with dmabuf.store.connect(sys.argv[1]) as store:
    if not os.fork():
        try:
            store.list()
        except ClosedError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    store.list()
"""


def test_after_a_fork_the_connection_is_the_parents(path: Path, store: Store) -> None:
    in_child(_FORK, path)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="this Store is closed"):
        store.list()


def test_many_messages(path: Path) -> None:
    """More are in benchmarks/store.py."""
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

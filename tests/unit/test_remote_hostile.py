"""Nodes and clients that lie, stall, die or are someone else, and what is left of the other end."""

import errno
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import remote
from tests.guards import needs
from tests.nodes import HELLO, Peer, certificates, lying_node, node, sizes
from tests.serving import as_a_program
from tests.support import assert_same, pattern, poison, together, wait_until

MIB = 1 << 20
SIZE = 4 * MIB
DATA = pattern(SIZE, 6)
SOON = 0.3
"""Seconds after which an end that does nothing is given up."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "served"
    made.mkdir()
    (made / "a.bin").write_bytes(DATA)
    return made


@pytest.fixture
def listener(folder: Path) -> Iterator[remote.Listener]:
    with node(folder) as made:
        yield made


@pytest.fixture
def big() -> Iterator[dmabuf.Buffer]:
    with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        buffer.pwrite(poison(SIZE), 0)
        yield buffer


def still_serves(listener: remote.Listener) -> bool:
    """Whether another client gets every byte of the file."""
    with (
        remote.connect(listener.address) as there,
        there.open("a.bin") as file,
        dmabuf.allocate(SIZE, exporter="memfd") as buffer,
    ):
        file.read_into(buffer)
        assert_same(buffer.pread(SIZE, 0), DATA, "the file")
    return True


def open_by_hand(peer: Peer, path: str = "a.bin", mode: str = "r") -> int:
    return peer.ask(op="open", path=path, mode=mode)["file"]


def asked(number: int, *segments: object, **how: object) -> dict[str, object]:
    """The fields of a request to read."""
    terms = {"require": "any", "route": None, "prefer": "zero-copy", "sync": False}
    return {
        "op": "read", "file": number, "segments": segments, "whole": False, "checksum": 0,
        "terms": terms | how,
    }  # fmt: skip


# -- what a node gets


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 8,
        b"\xff" * 8,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\5\0\0\0\0nojso",
        b"\0\0\0\2\0\0\0\0[]",
        b"\0\0\0\2\0\0\0\0{}",
        b"\0\0\0\0\0\0\0\4data",
        b"\0\0\0\5\0\0\0\5nojsodata!",
        b"\0\0\x40\0\0\0\0\0" + b"[" * 0x4000,
        *(
            len(text).to_bytes(4) + bytes(4) + text
            for text in (
                json.dumps(one).encode()
                for one in (
                    {"op": "none"},
                    {"op": "open", "path": 5, "mode": "r"},
                    {"op": "open", "path": "a.bin", "mode": "rw"},
                    {"op": "size", "file": 1},
                    {"op": "size", "file": -1},
                    {"op": "size", "file": True},
                    {"op": "fetch", "names": [["a", -1]], "checksum": 0},
                    {"op": "fetch", "names": [[1, 1]], "checksum": 0},
                    {"op": "publish", "name": "a", "size": 1, "mode": "x", "replace": True},
                    {"op": "nixl", "transports": 5},
                    {"op": "regions", "metadata": "AAAA"},
                    {"op": "fetch", "names": [], "checksum": 0, "addresses": []},
                    {"op": "fetch", "names": [], "checksum": 0, "addresses": [4096]},
                )
            )
        ),
    ],
)
def test_garbage_ends_one_connection_and_not_the_node(
    listener: remote.Listener, garbage: bytes
) -> None:
    with Peer.of(listener.address) as peer:
        peer.socket.sendall(garbage)
        assert peer.ended()
    assert still_serves(listener)


def test_half_a_message_and_half_of_the_data(listener: remote.Listener, folder: Path) -> None:
    for half in (b"", HELLO[:9]):
        with socket.create_connection(listener.address.rsplit(":", 1)) as early:
            early.sendall(half)
    for half in (b"\0\0", b"\0\0\0\x10\0\0\0\0{"):
        with Peer.of(listener.address) as peer:
            peer.socket.sendall(half)
    with Peer.of(listener.address) as peer:
        number = open_by_hand(peer, "new", "replace")
        peer.send(**asked(number, [0, MIB]) | {"op": "write"})
        assert peer.receive() == {"go": True}
        peer.socket.sendall((0).to_bytes(4) + (MIB).to_bytes(4) + b"half")
        assert len(sizes(folder)) == 2
    with Peer.of(listener.address) as peer:
        peer.send(op="publish", name="n", size=MIB, mode=0o600, replace=True, checksum=0)
        assert peer.receive() == {"go": True}
        peer.send_data(b"half")
    wait_until(lambda: not listener.clients)
    assert sizes(folder) == {"a.bin": SIZE}
    with remote.connect(listener.address) as there:
        assert there.ls() == []
    assert still_serves(listener)


def test_more_or_less_data_than_announced(listener: remote.Listener, folder: Path) -> None:
    for data, end in ((b"more", {"end": True}), (b"l", {"end": True}), (b"les", {"x": 1})):
        with Peer.of(listener.address) as peer:
            number = open_by_hand(peer, "new", "replace")
            peer.send(**asked(number, [0, 3]) | {"op": "write"})
            assert peer.receive() == {"go": True}
            peer.send_data(data)
            peer.send(**end)
            assert peer.ended()
    wait_until(lambda: not listener.clients)
    assert sizes(folder) == {"a.bin": SIZE}


def test_every_range_is_checked_by_the_node(listener: remote.Listener) -> None:
    with Peer.of(listener.address) as peer:
        number = open_by_hand(peer)
        peer.send(**asked(number, [SIZE - 3, 2**62], [2**62, 5], [SIZE, 9]))
        assert peer.receive() == DATA[-3:]
        assert peer.receive()["nbytes"] == 3
        reply = peer.ask(**asked(number, [0, SIZE + 1]) | {"whole": True})
        assert reply["error"]["kind"] == "ShortReadError"
        reply = peer.ask(**asked(number, [2**63 - 1, 2**63 - 1]) | {"op": "write"})
        assert reply["error"]["kind"] == "ValueError"
        reply = peer.ask(op="open", path="../served/a.bin", mode="r")
        assert reply["error"]["errno"] == errno.EACCES
        peer.send(**asked(number, [-1, 5]))
        assert peer.ended()
    for wrong in ([[2**63, 1]], [["0", 1]], [[0, 1.0]], [[0]], [5], [[0, 1, 2]]):
        with Peer.of(listener.address) as peer:
            peer.send(**asked(open_by_hand(peer), *wrong))
            assert peer.ended()


@pytest.mark.parametrize("left", [0, 44 * MIB + 1234])
@pytest.mark.parametrize("require", ["any", "uncached"])
def test_a_file_that_shrinks(
    listener: remote.Listener, folder: Path, require: str, left: int
) -> None:
    size = 96 * MIB  # more than the buffers of a socket hold
    with (folder / "large").open("wb") as file:
        file.truncate(size)
        if require == "any":
            for _ in range(size // MIB):
                file.write(bytes(MIB))
    with Peer.of(listener.address) as peer:
        number = open_by_hand(peer, "large")
        try:
            peer.send(**asked(number, [0, size], require=require))
            first = peer.receive()
        except EOFError:
            pytest.skip("needs a filesystem with O_DIRECT: set TMPDIR to a disk")
        if isinstance(first, dict):
            pytest.skip("needs a filesystem with O_DIRECT: set TMPDIR to a disk")
        os.truncate(folder / "large", left)
        got, reply = len(first), peer.receive()
        while isinstance(reply, bytes):
            got, reply = got + len(reply), peer.receive()
        assert got < size
        assert reply["error"]["kind"] == "ShortReadError"
        assert peer.ask(op="size", file=number)["size"] == left


def test_a_client_that_stalls_is_dropped(folder: Path) -> None:
    with node(folder, timeout=SOON) as listener:
        with Peer.of(listener.address) as peer:
            peer.socket.sendall(b"\0\0")
            assert peer.ended()
        with socket.create_connection(listener.address.rsplit(":", 1)) as silent:
            Peer(silent).ended()
        with (folder / "large").open("wb") as file:
            file.truncate(96 * MIB)
        with Peer.of(listener.address) as peer:
            peer.send(**asked(open_by_hand(peer, "large"), [0, 96 * MIB]))
            wait_until(lambda: not listener.clients)  # which reads nothing
        with remote.connect(listener.address) as idle:  # between requests nobody is in a hurry
            assert still_serves(listener)
            threading.Event().wait(2 * SOON)
            assert idle.ls() == []


def test_a_slow_reader_does_not_delay_a_fast_one(listener: remote.Listener, folder: Path) -> None:
    with (folder / "large").open("wb") as file:
        file.truncate(96 * MIB)
    with Peer.of(listener.address) as slow, Peer.of(listener.address) as other:
        for peer, require in ((slow, "any"), (other, "uncached")):
            peer.send(**asked(open_by_hand(peer, "large"), [0, 96 * MIB], require=require))
        assert still_serves(listener)
        assert listener.clients <= 3
        got = 0
        while isinstance(reply := slow.receive(), bytes):
            got += len(reply)
        assert (got, reply["nbytes"]) == (96 * MIB, 96 * MIB)


def test_a_thousand_connections(folder: Path, tmp_path: Path) -> None:
    options = ["--listen", "127.0.0.1:0", "--files", folder]
    with as_a_program(tmp_path / "s.sock", *options) as process:
        address = process.stderr.readline().split()[2].rstrip(",")
        peers = [Peer.of(address) for _ in range(1000)]
        try:
            with remote.connect(address) as there, there.open("a.bin") as file:
                assert file.size == SIZE
            assert all(peer.ask(op="ls", after="") == {"names": []} for peer in peers[::50])
        finally:
            for peer in peers:
                peer.socket.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_threads_share_a_node_and_clients_read_the_same_range(listener: remote.Listener) -> None:
    def read(number: int) -> None:
        with dmabuf.allocate(MIB, exporter="memfd") as buffer, shared.open("a.bin") as file:
            for offset in range(number, SIZE - MIB, MIB):
                file.read_into(buffer, file_offset=offset)
                assert_same(buffer.pread(MIB, 0), DATA[offset : offset + MIB], "a part")

    def alone(number: int) -> None:
        with (
            remote.connect(listener.address) as mine,
            mine.open("a.bin") as file,
            dmabuf.allocate(SIZE, exporter="memfd") as buffer,
        ):
            file.read_into(buffer, prefer="fastest", audit="always")
            assert_same(buffer.pread(SIZE, 0), DATA, "the file")

    with remote.connect(listener.address) as shared:
        together(read, 4)
    together(alone, 4)


def test_clients_that_write_the_same_range_leave_the_bytes_of_either(
    listener: remote.Listener, folder: Path
) -> None:
    def write(number: int) -> None:
        with (
            remote.connect(listener.address) as mine,
            mine.open("a.bin", "r+") as file,
            dmabuf.allocate(SIZE, exporter="memfd") as buffer,
        ):
            buffer.pwrite(bytes([number]) * SIZE, 0)
            file.write_from(buffer, audit="off")

    together(write, 3)
    found = (folder / "a.bin").read_bytes()
    assert len(found) == SIZE
    assert all(len(set(found[at : at + 4096])) == 1 for at in range(0, SIZE, 4096))


# -- what a client gets


def opens_then(act: Callable[[Peer], None]) -> Callable[[Peer], None]:
    """A node that opens a file and takes one request, and then acts."""

    def behave(peer: Peer) -> None:
        assert peer.receive()["op"] == "open"
        peer.send(file=1)
        peer.receive()
        act(peer)
        peer.ended()

    return behave


SIDE = {
    "nbytes": 100, "route": "direct", "reason": "", "rejected": {}, "registered": False,
    "requests": 1, "reissues": 0, "copied": 0, "seconds": 0.5,
}  # fmt: skip


def replies(data: bytes, **reply: object) -> Callable[[Peer], None]:
    def act(peer: Peer) -> None:
        if data:
            peer.send_data(data)
        peer.send(**reply)

    return opens_then(act)


@pytest.mark.parametrize(
    ("behave", "told"),
    [
        (replies(b"x" * 101, nbytes=101), "more data came"),
        (replies(b"x" * 100, nbytes=99), "100 bytes moved, and the node reports another"),
        (replies(b"x" * 100, nbytes=100, side={}, checksum=5), "no valid"),
        (
            replies(b"x" * 100, nbytes=100, side={**SIDE, "route": "best"}, checksum=""),
            "no valid route",
        ),
        (replies(b"", nbytes=-5), "number"),
        (replies(b"", error={"kind": "OSError", "errno": "EIO"}), "no valid"),
        (opens_then(lambda peer: peer.socket.sendall(b"\xff" * 30)), "invalid header"),
        (opens_then(lambda peer: peer.socket.sendall(b"\0\0\0\2\0\0\0\0[]")), "not a JSON object"),
    ],
)
def test_a_node_that_lies(big: dmabuf.Buffer, behave: Callable[[Peer], None], told: str) -> None:
    with lying_node(behave) as address, remote.connect(address) as there:
        file = there.open("a.bin")
        with pytest.raises(OSError, match=told) as caught:
            file.read_into(big, 100, buffer_offset=200)
        assert caught.value.errno in (errno.EPROTO, errno.EIO)
        assert there.closed
        with pytest.raises(dmabuf.ClosedError):
            file.read_into(big, 100)
    rest = poison(SIZE)
    assert_same(big.pread(200, 0), rest[:200], "the buffer before the range")
    assert_same(big.pread(SIZE - 300, 300), rest[300:], "the buffer after the range")


def test_bytes_that_differ_from_the_checksum(big: dmabuf.Buffer) -> None:
    behave = replies(b"x" * 100, nbytes=100, side=SIDE, checksum="00" * 16)
    with lying_node(behave) as address, remote.connect(address) as there:
        with pytest.raises(dmabuf.IntegrityError, match="first 100 bytes differ"):
            there.open("a.bin").read_into(big, 100)
    with lying_node(behave) as address, remote.connect(address) as there:
        assert there.open("a.bin").read_into(big, 100, audit="off").nbytes == 100


@pytest.mark.parametrize(
    ("hello", "told"),
    [
        (b"dmabuf-remote/2".ljust(24) + b"\n", "version 2 of the protocol, this end 1"),
        (b"HTTP/1.1 400 Bad Request\r\n", "not a node of dmabuf"),
    ],
)
def test_a_peer_of_another_version(listener: remote.Listener, hello: bytes, told: str) -> None:
    with lying_node(lambda peer: None, hello) as address:
        with pytest.raises(OSError, match=told) as caught:
            remote.connect(address)
        assert caught.value.errno == errno.EPROTO
    with Peer.of(listener.address, hello[:25]) as peer:
        assert peer.ended()


def test_a_node_that_stalls(big: dmabuf.Buffer) -> None:
    def waits(peer: Peer) -> None:
        for _ in range(3):
            peer.send(wait=True)
        peer.send_data(b"x" * 100)
        peer.send(wait=True)
        peer.send(nbytes=100, side=SIDE, checksum="")

    with lying_node(opens_then(waits)) as address, remote.connect(address) as there:
        assert there.open("a.bin").read_into(big, 100, audit="off").nbytes == 100
    half = opens_then(lambda peer: peer.send_data(b"x" * 50))
    with lying_node(half) as address, remote.connect(address, timeout=SOON) as there:
        file = there.open("a.bin")
        with pytest.raises(TimeoutError, match=r"stalled .*undefined") as caught:
            file.read_into(big, 100)
        assert isinstance(caught.value, dmabuf.TransferError)
        assert caught.value.nbytes == 50
        assert there.closed
    goes = opens_then(lambda peer: peer.send(go=True) or threading.Event().wait(4 * SOON))
    with (
        lying_node(goes) as address,
        remote.connect(address) as there,
        dmabuf.allocate(64 * MIB, exporter="memfd") as large,
    ):
        with pytest.raises(TimeoutError, match="stalled while receiving") as caught:
            there.open("b.bin", "x").write_from(large, timeout=SOON)
        assert there.closed
        large.close()  # an exception that is kept does not keep the memory in use
        assert isinstance(caught.value, dmabuf.TransferError)
    with lying_node(lambda peer: peer.ended(), b"") as address:
        with pytest.raises(TimeoutError):
            remote.connect(address, timeout=SOON)


def test_a_receiver_over_tcp_is_not_woken_for_each_packet(big: dmabuf.Buffer) -> None:
    def in_packets(peer: Peer) -> None:
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.socket.sendall(bytes(4) + SIZE.to_bytes(4))
        for at in range(0, SIZE, 4096):
            peer.socket.sendall(DATA[at : at + 4096])
            time.sleep(200e-6)  # a receiver that is woken for each sleeps again
        peer.send(nbytes=SIZE, side=SIDE, checksum="")

    with lying_node(opens_then(in_packets)) as address, remote.connect(address) as there:
        file = there.open("a.bin")
        begun, waits = time.monotonic(), resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        assert file.read_into(big, SIZE, audit="off").nbytes == SIZE
        waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - waits
        assert waits < 300 + 20 * (time.monotonic() - begun)  # without it about 1000
    assert_same(big.pread(SIZE, 0), DATA, "the buffer")


def drips(data: bytes) -> Callable[[Peer], None]:
    """Send a byte now and then: 200 take 20 seconds."""

    def act(peer: Peer) -> None:
        for byte in data:
            peer.socket.sendall(bytes([byte]))
            threading.Event().wait(0.1)

    return act


def padded(**fields: object) -> bytes:
    """A message of 200 bytes and its header."""
    return (200).to_bytes(4) + bytes(4) + json.dumps(fields).encode().ljust(200)


@pytest.mark.parametrize("what", ["greeting", "reply", "data", "end", "go", "names"])
def test_a_node_that_sends_a_byte_now_and_then_is_given_up_in_time(
    what: str, big: dmabuf.Buffer
) -> None:
    dripping = {
        "greeting": drips(HELLO),
        "reply": lambda peer: peer.receive() and drips(padded(file=1))(peer),
        "data": opens_then(drips(bytes(7) + b"\xc8" + b"x" * 200)),
        "end": opens_then(
            lambda peer: peer.send_data(b"x" * 200) or drips(padded(nbytes=200))(peer)
        ),
        "go": opens_then(drips(padded(go=True))),
        "names": lambda peer: peer.receive() and drips(padded(names=[200]))(peer),
    }
    limit = {"timeout": SOON} if what in ("greeting", "reply") else {}
    with lying_node(dripping[what], b"" if what == "greeting" else HELLO) as address:
        with pytest.raises(TimeoutError, match="not complete in time"):
            there = remote.connect(address, **limit)
            if what == "names":
                there.fetch("name", big, timeout=SOON)
            file = there.open("a.bin", "r+")
            move = file.write_from if what == "go" else file.read_into
            move(big, 200, timeout=SOON)
        if what != "greeting":
            assert there.closed
        big.pwrite(poison(SIZE), 0)
    assert_same(big.pread(SIZE, 0), poison(SIZE), "the buffer once nobody writes any more")


@pytest.mark.parametrize("way", ["interrupt", "close"])
def test_an_interrupt_and_a_close_while_bytes_arrive(big: dmabuf.Buffer, way: str) -> None:
    main, told = threading.main_thread().ident, []

    def act(peer: Peer) -> None:
        peer.send_data(b"x" * 50)
        if way == "interrupt":
            signal.pthread_kill(main, signal.SIGINT)
            return
        try:
            big.close()
        except BufferError as error:
            told.append(error)
        peer.send_data(b"y" * 50)
        peer.send(nbytes=100, side=SIDE, checksum="")

    with lying_node(opens_then(act)) as address, remote.connect(address) as there:
        file = there.open("a.bin")
        if way == "close":
            assert file.read_into(big, 100, audit="off").nbytes == 100
            assert told
            assert big.pread(100, 0) == b"x" * 50 + b"y" * 50
            return
        with pytest.raises(KeyboardInterrupt):
            file.read_into(big, 100)
        assert there.closed
    assert_same(big.pread(SIZE - 100, 100), poison(SIZE)[100:], "the rest of the buffer")
    big.close()


def endless(path: Path) -> array:
    """Segments that read a file of 16 MiB again and again into 16 MiB: 32 GiB."""
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return array("Q", [0, 0, 16 * MIB] * 2048)


def test_the_node_is_killed(folder: Path, tmp_path: Path) -> None:
    options = ["--listen", "127.0.0.1:0", "--files", folder]
    segments = endless(folder / "large")
    with (
        as_a_program(tmp_path / "s.sock", *options) as process,
        dmabuf.allocate(16 * MIB, exporter="memfd") as buffer,
    ):
        address = process.stderr.readline().split()[2].rstrip(",")
        with remote.connect(address) as there, there.open("large") as file:
            with pytest.raises(ConnectionResetError, match="undefined") as caught:
                file.read_segments(buffer, segments, progress=lambda *_: process.kill())
            assert isinstance(caught.value, dmabuf.TransferError)
            assert caught.value.nbytes
            assert there.closed
        process.wait()
        with pytest.raises(ConnectionRefusedError):
            remote.connect(address)


CLIENT = """
import array, sys
import dmabuf, dmabuf.remote
segments = array.array("Q", [0, 0, 16 << 20] * 2048)
with dmabuf.remote.connect(sys.argv[1]) as there, dmabuf.allocate("16MiB") as buffer:
    replacing = there.replacing("new")
    replacing.__enter__().write_from(buffer)
    file = there.open("large")
    file.read_segments(buffer, segments, progress=lambda *_: print("moving", flush=True))
"""


def test_the_client_is_killed(listener: remote.Listener, folder: Path) -> None:
    endless(folder / "large")
    command = [sys.executable, "-c", CLIENT, listener.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout.readline() == "moving\n"
        assert len(sizes(folder)) == 3
        client.kill()
    wait_until(lambda: not listener.clients)
    assert sizes(folder) == {"a.bin": SIZE, "large": 16 * MIB}
    assert still_serves(listener)


def test_a_node_that_ends_cuts_its_clients_off(folder: Path, big: dmabuf.Buffer) -> None:
    with node(folder) as listener:
        there = remote.connect(listener.address)
        file = there.open("a.bin")
    with there, pytest.raises(ConnectionError):
        file.read_into(big)


def test_a_disk_that_is_full(folder: Path, big: dmabuf.Buffer) -> None:
    import resource

    with node(folder) as listener, remote.connect(listener.address) as there:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
        try:
            with pytest.raises(OSError) as caught, there.replacing("new") as file:
                file.write_from(big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == f"dmabuf://{there.address}/new"
        assert sizes(folder) == {"a.bin": SIZE}
        assert there.ls() == []  # the connection is in order


# -- event loops


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_call_in_an_event_loop_is_cancelled_when_nobody_writes_any_more(
    listener: remote.Listener, backend: str
) -> None:
    import anyio

    from dmabuf import aio

    half = opens_then(lambda peer: peer.send_data(b"x" * 50))

    async def read(address: str, size: int, patience: float) -> int | None:
        there = await aio.call(lambda: remote.connect(address))
        file = await aio.call(lambda: there.open("a.bin"))
        done = None
        with there, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
            with anyio.move_on_after(patience):
                done = await aio.call(lambda: file.read_into(buffer, size))
                assert_same(buffer.pread(SIZE, 0), DATA, "the file")
            assert there.closed == (done is None)
        return done and done.nbytes

    assert anyio.run(read, listener.address, SIZE, 100, backend=backend) == SIZE
    with lying_node(half) as address:
        assert anyio.run(read, address, 100, SOON, backend=backend) is None


# -- certificates


@needs("openssl")
def test_certificates(folder: Path, tmp_path: Path) -> None:
    mine, its = certificates(tmp_path, "client"), certificates(tmp_path, "node")
    other = certificates(tmp_path, "stranger", "other authority")
    elsewhere = certificates(tmp_path, "elsewhere", host="127.0.0.2")
    with node(folder, certificates=its) as listener:
        with remote.connect(listener.address, certificates=mine) as there:
            assert there.open("a.bin").size == SIZE
        for known, told in (
            (other, "certificate is refused"),
            (remote.Certificates(other.certificate, other.key, its.authority), "refuses this"),
        ):
            with pytest.raises(PermissionError, match=told):
                remote.connect(listener.address, certificates=known)
        with pytest.raises(ConnectionError):
            remote.connect(listener.address)
        with pytest.raises(OSError, match="KEY_VALUES_MISMATCH"):
            remote.connect(
                listener.address,
                certificates=remote.Certificates(mine.certificate, its.key, mine.authority),
            )
        with pytest.raises(FileNotFoundError):
            remote.connect(
                listener.address,
                certificates=remote.Certificates(mine.certificate, "none", mine.authority),
            )
        with socket.create_connection(listener.address.rsplit(":", 1)) as plain:
            plain.sendall(HELLO + b"x" * 1000)
            assert Peer(plain).ended()
        with remote.connect(listener.address, certificates=mine) as there:
            assert there.ls() == []
    with node(folder, certificates=elsewhere) as listener:
        with pytest.raises(PermissionError, match="certificate is refused"):
            remote.connect(listener.address, certificates=mine)
    with node(folder) as listener, pytest.raises(OSError) as caught:
        remote.connect(listener.address, certificates=mine)
    assert caught.value.errno in (errno.EPROTO, errno.ECONNRESET)


@needs("openssl")
def test_certificates_of_the_environment(tmp_path: Path, monkeypatch) -> None:
    mine = certificates(tmp_path, "client")
    monkeypatch.setenv("DMABUF_CERTIFICATE", mine.certificate)
    with pytest.raises(ValueError, match="DMABUF_KEY is not set"):
        remote.certificates_from_environment()
    monkeypatch.setenv("DMABUF_KEY", mine.key)
    monkeypatch.setenv("DMABUF_AUTHORITY", mine.authority)
    assert remote.certificates_from_environment() == mine
    assert stat.S_ISREG(os.stat(mine.key).st_mode)


def test_a_batch_that_fails_while_others_are_under_way(big: dmabuf.Buffer) -> None:
    def behave(peer: Peer) -> None:
        for _ in range(2):
            peer.receive()
        for _ in range(2):
            peer.send(error={"kind": "OSError", "errno": 5, "text": "no", "path": "", "nbytes": 0,
                             "file_offset": None, "index": None})  # fmt: skip
        peer.ended()

    with lying_node(behave) as address, remote.connect(address) as there:
        with pytest.raises(OSError, match="no"):
            there.fetch_many([("n", 0, 10)] * 300, big)
        assert there.closed  # the next reply would be that of another request

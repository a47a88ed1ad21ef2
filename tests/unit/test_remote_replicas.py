"""Several nodes with the same files: ranges are spread over them, and some of them fail."""

import contextlib
import errno
import os
import signal
import socket
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

import dmabuf
from dmabuf import remote
from dmabuf.remote import aio
from tests.nodes import Peer, lying_node, url_of
from tests.serving import as_a_program
from tests.support import assert_same, pattern, poison

MIB = 1 << 20
SIZE = 70 * MIB + 4097  # five requests
DATA = pattern(SIZE, 8)

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three directories with the same file."""
    made = [tmp_path / name for name in "abc"]
    for one in made:
        one.mkdir()
    (made[0] / "a.bin").write_bytes(DATA)
    for one in made[1:]:
        os.link(made[0] / "a.bin", one / "a.bin")
    return made


@pytest.fixture
def addresses(folders: list[Path]) -> Iterator[list[str]]:
    """Nodes that serve them."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(remote.serving("127.0.0.1:0", one)).address for one in folders]


@pytest.fixture
def big() -> Iterator[dmabuf.Buffer]:
    with dmabuf.allocate(SIZE + 8192, exporter="memfd") as buffer:
        buffer.pwrite(poison(buffer.size), 0)
        yield buffer


def check(buffer: dmabuf.Buffer, start: int = 0, offset: int = 0, size: int = SIZE) -> None:
    """Compare every byte of the buffer: the range, and poison around it."""
    expected = bytearray(poison(buffer.size))
    expected[start : start + size] = DATA[offset : offset + size]
    assert_same(buffer.pread(buffer.size, 0), bytes(expected), "the buffer")


def test_ranges_are_spread_over_all_nodes(addresses: list[str], big: dmabuf.Buffer) -> None:
    with remote.connect(addresses) as there, there.open("a.bin") as file:
        assert there.address == ",".join(addresses)
        assert isinstance(file, remote.ReplicaFile)
        assert (file.size, file.transport) == (SIZE, "tcp")
        assert file.versions.keys() == set(addresses)
        done = file.read_into(big, buffer_offset=4096, audit="always")
        check(big, 4096)
        assert done.nbytes == done.copied == done.remote.nbytes == SIZE
        assert done.nodes.keys() == set(addresses)
        assert sum(done.nodes.values()) == SIZE
        assert all(f"from {node}: " in done.audited for node in addresses)
        assert file.plan(big).remote.route == "buffered"

        big.pwrite(poison(big.size), 0)
        assert file.read_into(big, 100, file_offset=SIZE - 7, buffer_offset=5).nbytes == 7
        check(big, 5, SIZE - 7, 7)
        assert file.read_into(big, 100, file_offset=SIZE + 7).nbytes == 0

        big.pwrite(poison(big.size), 0)
        segments = array("Q", [0, SIZE - 10, 10, 20 * MIB, 0, 40 * MIB, 5, 50 * MIB, 3])
        told = []
        file.read_segments(big, segments, progress=lambda *how: told.append(how))
        expected = bytearray(poison(big.size))
        expected[SIZE - 10 : SIZE] = DATA[:10]
        expected[: 40 * MIB] = DATA[20 * MIB : 60 * MIB]
        expected[50 * MIB : 50 * MIB + 3] = DATA[5:8]
        assert_same(big.pread(big.size, 0), bytes(expected), "the buffer")
        assert told[-1] == (40 * MIB + 13, 40 * MIB + 13)
        with pytest.raises(dmabuf.ShortReadError) as caught:
            file.read_segments(big, array("Q", [0, 0, 1, SIZE, 0, 1]))
        assert caught.value.index == 1
        with pytest.raises(dmabuf.RouteUnavailable, match="use require='uncached'"):
            file.read_into(big, require="zero-copy")
    with pytest.raises(dmabuf.ClosedError):
        file.read_into(big)
    assert there.closed


def test_several_nodes_are_only_read_from(addresses: list[str], big: dmabuf.Buffer) -> None:
    with remote.connect(addresses[:2]) as there:
        for act in (
            lambda: there.open("a.bin", "r+"),
            lambda: there.replacing("a.bin").__enter__(),
            lambda: there.fetch("name", big),
            lambda: there.publish("name", big),
            lambda: there.remove("name"),
            there.ls,
        ):
            with pytest.raises(OSError, match="only read from") as caught:
                act()
            assert caught.value.errno == errno.EOPNOTSUPP
        with there.open("a.bin") as file, pytest.raises(OSError, match="not open for writing"):
            file.write_from(big)
    with pytest.raises(ValueError, match="no address"):
        remote.connect([])


@pytest.mark.parametrize("change", ["size", "content"])
def test_files_that_differ_are_refused(
    addresses: list[str], folders: list[Path], change: str
) -> None:
    other = folders[1] / "a.bin"
    other.unlink()
    other.write_bytes(DATA[:-1] if change == "size" else DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with remote.connect(addresses) as there:
        with pytest.raises(OSError, match="the file differs from that at") as caught:
            there.open("a.bin")
        assert caught.value.errno == errno.ESTALE
        assert addresses[1] in caught.value.filename
    with remote.connect([addresses[0], addresses[2]]) as there, there.open("a.bin") as file:
        assert file.size == SIZE


def test_nodes_that_lack_the_file_or_do_not_answer(
    addresses: list[str],
    folders: list[Path],
    big: dmabuf.Buffer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (folders[1] / "a.bin").unlink()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    with remote.connect([nobody, *addresses]) as there, there.open("a.bin") as file:
        assert file.read_into(big).nodes.keys() == {addresses[0], addresses[2]}
        check(big)
        with pytest.raises(FileNotFoundError):
            there.open("none")
    told = [one for one in caplog.messages if nobody in one]
    assert len(told) == 1 and told[0].startswith(f"{nobody}: not used: ")
    for alone in (nobody, [nobody, nobody]):  # the error is enough
        with pytest.raises(ConnectionRefusedError):
            remote.connect(alone)
    assert [one for one in caplog.messages if nobody in one] == told


def test_one_of_three_nodes_is_killed_under_way(
    folders: list[Path], tmp_path: Path, big: dmabuf.Buffer
) -> None:
    with contextlib.ExitStack() as stack:
        names = [f"unix:{tmp_path}/{one.name}.node" for one in folders]
        nodes = [
            stack.enter_context(
                as_a_program(tmp_path / one.name / "sock", "--listen", name, "--files", one)
            )
            for one, name in zip(folders, names, strict=True)
        ]
        for one in nodes:
            one.stderr.readline()
        with remote.connect(names) as there, there.open("a.bin") as file:
            nodes[1].send_signal(signal.SIGSTOP)  # its request is not answered until it is killed
            done = file.read_into(big, progress=lambda *_: nodes[1].kill())
            check(big)
            assert done.nodes.keys() == {names[0], names[2]}
            assert sum(done.nodes.values()) == SIZE
            assert not there.closed
            nodes[1].wait()
            for one in (nodes[0], nodes[2]):
                one.kill()
                one.wait()
            with pytest.raises(dmabuf.TransferError, match="no node is left"):
                file.read_into(big)
            assert there.closed


def falsely(act: Callable[[Peer], object]) -> Callable[[Peer], None]:
    """A node with the file, which acts when it is asked for the first request of a transfer."""

    def behave(peer: Peer) -> None:
        side = {
            "nbytes": 0, "route": "direct", "reason": "", "rejected": {}, "registered": False,
            "requests": 1, "reissues": 0, "copied": 0, "seconds": 0.5,
        }  # fmt: skip
        while True:
            request = peer.receive()
            if request["op"] == "open":
                peer.send(file=1)
            elif request["op"] == "size":
                peer.send(size=SIZE, modified_ns=1)
            elif request["op"] == "read" and request["segments"][0][1] == 4096:  # samples
                data = b"".join(DATA[at : at + size] for at, size in request["segments"])
                peer.send_data(data)
                peer.send(nbytes=len(data), side=side, checksum="")
            elif request["op"] == "close":
                peer.send()
            else:
                act(peer)

    return behave


ERROR = {
    "kind": "OSError", "errno": errno.EIO, "text": "bad sector", "path": "a.bin", "nbytes": 0,
    "file_offset": None, "index": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "act",
    [
        lambda peer: peer.send_data(b"x" * MIB) or peer.socket.close(),
        lambda peer: peer.send_data(b"x" * MIB) or peer.ended(),  # stalls
        lambda peer: peer.send(error=ERROR),
        lambda peer: peer.socket.sendall(b"\xff" * 30),
    ],
    ids=["ends", "stalls", "reports an error", "lies"],
)
def test_a_node_that_fails_is_replaced_by_the_others(
    addresses: list[str], big: dmabuf.Buffer, act: Callable[[Peer], object]
) -> None:
    with (
        lying_node(falsely(act)) as bad,
        remote.connect([bad, *addresses[:2]], timeout=0.5) as there,
        there.open("a.bin") as file,
    ):
        done = file.read_into(big, audit="off")
        check(big)
        assert done.nodes.keys() == set(addresses[:2])
        assert file.versions.keys() == set(addresses[:2])
        with there.open("a.bin") as again:
            big.pwrite(poison(big.size), 0)
            again.read_into(big, audit="off")
            check(big)


def test_bytes_that_differ_from_a_checksum_are_an_error_and_not_read_again(
    addresses: list[str], big: dmabuf.Buffer
) -> None:
    def lies(peer: Peer) -> None:
        for _ in range(2):
            peer.send_data(b"x" * 8 * MIB)
        side = {
            "nbytes": 16 * MIB, "route": "direct", "reason": "", "rejected": {},
            "registered": False, "requests": 1, "reissues": 0, "copied": 0, "seconds": 0.5,
        }  # fmt: skip
        peer.send(nbytes=16 * MIB, side=side, checksum="00" * 16)

    with (
        lying_node(falsely(lies)) as bad,
        remote.connect([bad, addresses[0]]) as there,
        there.open("a.bin") as file,
        pytest.raises(dmabuf.IntegrityError, match="bytes differ"),
    ):
        file.read_into(big)


def test_an_interrupt_ends_the_requests_of_all_nodes(
    addresses: list[str], big: dmabuf.Buffer
) -> None:
    main = threading.main_thread().ident

    def interrupts(peer: Peer) -> None:
        peer.send_data(b"x" * MIB)
        signal.pthread_kill(main, signal.SIGINT)
        peer.ended()

    with (
        lying_node(falsely(interrupts)) as bad,
        remote.connect([bad, *addresses]) as there,
        there.open("a.bin") as file,
    ):
        with pytest.raises(KeyboardInterrupt):
            file.read_into(big)
        content = big.pread(big.size, 0)
    assert_same(big.pread(big.size, 0), content, "the buffer once nobody writes any more")
    big.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cancelling_ends_the_requests_of_all_nodes(
    addresses: list[str], big: dmabuf.Buffer, backend: str
) -> None:
    moving = threading.Event()

    def stalls(peer: Peer) -> None:
        peer.send_data(b"x" * MIB)
        moving.set()
        peer.ended()

    async def cancel(bad: str) -> None:
        nodes = await aio.connect([bad, *addresses], timeout=1000)
        async with nodes, await nodes.open("a.bin") as file:
            async with anyio.create_task_group() as group:
                group.start_soon(file.read_into, big)
                while not moving.is_set():
                    await anyio.sleep(0.01)
                group.cancel_scope.cancel()
            big.pwrite(poison(big.size), 0)

    with lying_node(falsely(stalls)) as bad:
        anyio.run(cancel, bad, backend=backend)
    assert_same(
        big.pread(big.size, 0), poison(big.size), "the buffer, where nobody writes any more"
    )


def test_the_time_of_a_call_is_limited_at_all_nodes_together(big: dmabuf.Buffer) -> None:
    with contextlib.ExitStack() as stack:
        stalled = falsely(lambda peer: peer.ended())
        bad = [stack.enter_context(lying_node(stalled)) for _ in range(2)]
        there = stack.enter_context(remote.connect(bad))
        file = stack.enter_context(there.open("a.bin"))
        with pytest.raises(TimeoutError, match="not complete in time"):
            file.read_into(big, timeout=0.3)
        assert there.closed


def test_the_url_of_several_nodes(folders: list[Path], tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        paths = [tmp_path / f"{one.name}.node" for one in folders]
        for path, one in zip(paths, folders, strict=True):
            stack.enter_context(remote.serving(f"unix:{path}", one))
        hosts = ",".join(url_of(path).removeprefix("dmabuf://") for path in paths)
        node, file = remote.open_url(f"dmabuf://{hosts}/a.bin")
        with node:
            assert file.versions.keys() == {f"unix:{path}" for path in paths}
            assert dmabuf.copy(file, tmp_path / "here").nbytes == SIZE
    assert_same((tmp_path / "here").read_bytes(), DATA, "the copy")

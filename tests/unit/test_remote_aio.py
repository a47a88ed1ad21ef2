"""Nodes in event loops: the same names, awaited; a cancelled call has ended when it returns."""

import threading
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import pytest

import dmabuf
from dmabuf import remote
from dmabuf.remote import aio
from tests.nodes import Peer, lying_node, node, sizes
from tests.support import assert_same, pattern, poison

MIB = 1 << 20
SIZE = 4 * MIB
DATA = pattern(SIZE, 6)

pytestmark = pytest.mark.usefixtures("leaves_nothing")


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


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_every_call_is_awaited(
    backend: str, listener: remote.Listener, folder: Path, buf: dmabuf.Buffer
) -> None:
    async def use() -> None:
        async with await aio.connect(listener.address) as there:
            assert (there.transport, there.address) == ("tcp", listener.address)
            assert there.reason == there.sync.reason and not there.closed
            async with await there.open("a.bin") as file:
                assert await file.size() == SIZE
                assert (await file.read_into(buf, 5, buffer_offset=9)).nbytes == 5
                assert_same(buf.pread(SIZE, 0), poison(9) + DATA[:5] + poison(SIZE)[14:], "a part")
                assert (await file.plan(buf)).route == "staged"
                assert (await file.read_into(buf)).transport == "tcp"
                assert_same(buf.pread(SIZE, 0), DATA, "the buffer")
                with pytest.raises(OSError, match="not open for writing"):
                    await file.write_from(buf)
            assert file.closed and file.transport == "tcp"
            async with there.replacing("b.bin") as file:
                await file.write_from(buf, audit="always")
                await file.flush()
            assert_same((folder / "b.bin").read_bytes(), DATA, "the new file")
            with pytest.raises(ZeroDivisionError):
                async with there.replacing("b.bin") as file:
                    await file.write_from(buf, 10)
                    raise ZeroDivisionError
            assert sizes(folder) == {"a.bin": SIZE, "b.bin": SIZE}
            await there.publish("name", buf)
            assert [one.name for one in await there.ls()] == ["name"]
            buf.pwrite(poison(SIZE), 0)
            assert (await there.fetch("name", into=buf)).nbytes == SIZE
            assert_same(buf.pread(SIZE, 0), DATA, "what was fetched")
            [missing] = await there.fetch_many([("none", 0, 1)], buf)
            assert isinstance(missing, FileNotFoundError)
            await there.remove("name")
            with pytest.raises(FileNotFoundError):
                await there.fetch("name", buf)
        assert there.closed
        with pytest.raises(ConnectionRefusedError):
            await aio.connect("127.0.0.1:1")

    anyio.run(use, backend=backend)


SIDE = {
    "nbytes": 100, "route": "direct", "reason": "", "rejected": {}, "registered": False,
    "requests": 1, "reissues": 0, "copied": 0, "seconds": 0.5,
}  # fmt: skip


def begun(act: Callable[[Peer], object]) -> Callable[[Peer], None]:
    """A node that opens a file, sends the first 50 bytes of a reply, and then acts."""

    def behave(peer: Peer) -> None:
        assert peer.receive()["op"] == "open"
        peer.send(file=1)
        peer.receive()
        peer.send_data(b"x" * 50)
        act(peer)

    return behave


async def arrive(buffer: dmabuf.Buffer) -> None:
    """Wait for the first bytes."""
    while buffer.pread(50, 0) != b"x" * 50:
        await anyio.sleep(0.01)


def endless(peer: Peer) -> None:
    data = b"x" * MIB
    while True:
        peer.send_data(data)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("act", [endless, Peer.ended], ids=["arrives", "stalls"])
def test_nobody_writes_the_memory_when_a_cancelled_call_has_returned(
    backend: str, act: Callable[[Peer], object], buf: dmabuf.Buffer
) -> None:
    segments = array("Q", [0, 0, SIZE] * 60000)  # 234 GiB

    async def cancel(address: str) -> None:
        async with await aio.connect(address) as there, await there.open("a.bin") as file:
            async with anyio.create_task_group() as group:
                group.start_soon(partial(file.read_segments, buf, segments, audit="off"))
                await arrive(buf)
                group.cancel_scope.cancel()
            assert there.closed
            buf.pwrite(poison(SIZE), 0)

    with lying_node(begun(act)) as address:
        anyio.run(partial(cancel, address), backend=backend)
    assert_same(buf.pread(SIZE, 0), poison(SIZE), "the memory")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cancelling_a_call_that_waits_for_its_turn_leaves_the_connection(
    backend: str, buf: dmabuf.Buffer
) -> None:
    go = threading.Event()

    def act(peer: Peer) -> None:
        go.wait()
        peer.send_data(b"y" * 50)
        peer.send(nbytes=100, side=SIDE, checksum="")
        assert peer.receive()["op"] == "close"
        peer.send()
        peer.ended()

    async def cancel(address: str) -> None:
        async with await aio.connect(address) as there, await there.open("a.bin") as file:
            async with anyio.create_task_group() as group:
                group.start_soon(partial(file.read_into, buf, 100, audit="off"))
                await arrive(buf)
                with anyio.move_on_after(0.2) as scope:
                    await file.read_into(buf, 100)
                assert scope.cancelled_caught
                go.set()
            assert not there.closed

    with lying_node(begun(act)) as address:
        anyio.run(partial(cancel, address), backend=backend)
    assert_same(buf.pread(SIZE, 0), b"x" * 50 + b"y" * 50 + poison(SIZE)[100:], "the buffer")

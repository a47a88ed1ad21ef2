"""Files and names of other nodes, with real dma-bufs at both ends and a file on an NVMe drive."""

import os
from pathlib import Path

import pytest

import dmabuf
import dmabuf.store
from dmabuf import remote
from tests.guards import needs
from tests.kernel.conftest import dma_bufs, settled
from tests.kernel.test_store import KINDS, everything
from tests.kernel.vgem import Card
from tests.nodes import node
from tests.support import assert_same, cached, drop_cache, mounted, pattern, poison

MIB = 1 << 20
SIZE = 20 * MIB + 4096
DATA = pattern(SIZE, 8)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ext4")
    with mounted(os.environ["DMABUF_TEST_NVME0"], "ext4", folder):
        (folder / "served").mkdir()
        yield folder / "served"


@everything
@needs("nvme")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_node_in_each_kind_of_buffer(served: Path, kind: str) -> None:
    path = served / "cold"
    path.write_bytes(DATA)
    before = dma_bufs()
    with (
        node(served) as listener,
        remote.connect(listener.address) as there,
        there.open("cold") as file,
        dmabuf.allocate(SIZE + MIB, **KINDS[kind]) as buffer,
    ):
        for require in ("uncached", "any"):
            with path.open("rb") as plain:
                drop_cache(plain.fileno())
                buffer.pwrite(poison(buffer.size), 0)
                done = file.read_into(buffer, require=require, buffer_offset=5, audit="off")
                assert done.remote.route == "direct"
                assert cached(plain.fileno()) == 0
            expected = poison(5) + DATA + poison(buffer.size)[SIZE + 5 :]
            assert_same(buffer.pread(buffer.size, 0), expected, f"{kind} {done}")
        with there.open("back", "w") as back:
            done = back.write_from(buffer, SIZE, buffer_offset=5, audit="always", sync=True)
        assert done.remote.route == "direct"
        with (served / "back").open("rb") as plain:
            drop_cache(plain.fileno())
        assert_same((served / "back").read_bytes(), DATA, kind)
    assert settled(dma_bufs, before) == before


@everything
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_a_store_that_are_dma_bufs(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    before = dma_bufs()
    with (
        node(folder) as listener,
        remote.connect(listener.address) as there,
        dmabuf.store.connect(tmp_path / "store.sock") as store,
        dmabuf.allocate(SIZE, **KINDS[kind]) as buffer,
    ):
        for number in range(3):
            with store.create(f"n{number}", MIB, **KINDS[kind]) as made:
                made.pwrite(DATA[number : number + MIB], 0)
        buffer.pwrite(poison(SIZE), 0)
        wanted = [(f"n{number}", number * MIB, MIB) for number in range(3)]
        outcomes = there.fetch_many(wanted, buffer, audit="always")
        assert [one.nbytes for one in outcomes] == [MIB] * 3
        expected = b"".join(DATA[number : number + MIB] for number in range(3))
        expected += poison(SIZE)[3 * MIB :]
        assert_same(buffer.pread(SIZE, 0), expected, kind)
        there.publish("back", buffer, audit="always")
        with store.open("back") as made:
            assert made.exporter == "udmabuf"
            assert_same(made.pread(SIZE, 0), expected, f"{kind}, published")
    assert settled(dma_bufs, before) == before


@everything
@needs("vgem")
@pytest.mark.parametrize("end", ["client", "node"])
def test_each_end_waits_for_devices_that_write_its_memory(
    card: Card, tmp_path: Path, end: str
) -> None:
    (tmp_path / "served").mkdir()
    with (
        node(tmp_path / "served") as listener,
        remote.connect(listener.address) as there,
        dmabuf.store.connect(tmp_path / "store.sock") as store,
        store.create("name", MIB, exporter="udmabuf") as made,
        dmabuf.allocate(MIB, exporter="udmabuf") as buffer,
    ):
        made.pwrite(DATA[:MIB], 0)
        buffer.pwrite(poison(MIB), 0)
        busy = card.handle_of((made if end == "node" else buffer).slabs[0].fd)
        with card.ending(card.job("write", busy)):
            there.fetch("name", buffer)
        assert_same(buffer.pread(MIB, 0), DATA[:MIB], "the buffer")
        if end == "client":
            job = card.job("write", busy)
            for move in (there.fetch, there.publish):
                with pytest.raises(TimeoutError, match="a device still"):
                    move("name", buffer, timeout=0.05)
            card.done(job)
            assert_same(there.fetch("name", buffer) and buffer.pread(MIB, 0), DATA[:MIB], "again")

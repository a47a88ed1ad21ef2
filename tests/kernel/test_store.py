"""The store with real dma-bufs: the same memory in two processes, grants, and what is left."""

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.kernel import uapi
from dmabuf.memory import exporters, foreign
from dmabuf.store import Store
from tests.guards import needs
from tests.kernel.conftest import dma_bufs, settled
from tests.serving import as_a_program, for_every_user
from tests.support import PAGE, assert_same, in_child, pattern, raises_errno
from tests.unit.test_store_users import READ_ONLY, become

MIB = 1 << 20
SIZE = 3 * MIB + PAGE
KINDS = {
    "udmabuf": {"exporter": "udmabuf"},
    "memfd": {"exporter": "memfd"},
    "dma-heap": {"exporter": "system"},
    "huge pages": {"exporter": "memfd", "huge_pages": "2MiB"},
}
everything = needs("udmabuf", "dma_heap", "hugepages")


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder, "store.sock")


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    before = dma_bufs()
    with for_every_user(path, "--max-memory", "256MiB"), dmabuf.store.connect(path) as store:
        yield store
    assert settled(dma_bufs, before) == before


_OTHER = """
import sys, dmabuf.store
from tests.support import assert_same, pattern
path, size, trusted = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
with dmabuf.store.connect(path) as store, store.open("shared", "r+", trusted=trusted) as buffer:
    assert_same(buffer.pread(size, 0), pattern(size, 1), "the first process's bytes")
    buffer.pwrite(pattern(size, 2), 0)
    print(buffer.exporter, buffer.is_dmabuf, len(buffer.slabs))
"""


@everything
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_same_memory(
    store: Store, path: Path, kind: str, trusted: bool
) -> None:
    with store.create("shared", SIZE, **KINDS[kind]) as buffer:
        assert_same(buffer.pread(buffer.size, 0), bytes(buffer.size), "a new buffer")
        buffer.pwrite(pattern(SIZE, 1), 0)
        exporter, is_dmabuf, slabs = in_child(_OTHER, path, SIZE, trusted).split()
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 2), "the other process's bytes")
        assert exporter == KINDS[kind]["exporter"]
        assert (is_dmabuf == "True") == (exporter != "memfd") == store.stat("shared").is_dmabuf
        assert int(slabs) == store.stat("shared").slabs


@needs("udmabuf")
def test_several_slabs_in_one_mapping(path: Path, udmabuf_limit: Callable[[int], object]) -> None:
    """Where udmabufs are capped: each grant is all of them, with or without the memory file."""
    udmabuf_limit(1)
    with as_a_program(path), dmabuf.store.connect(path) as store:
        with store.create("several", SIZE, exporter="udmabuf", trusted=True) as buffer:
            assert [slab.size for slab in buffer.slabs] == [MIB, MIB, MIB, PAGE]
            buffer.pwrite(pattern(SIZE, 3), 0)
            for mode in ("r", "r+"):
                with store.open("several", mode) as again:
                    assert len(again.slabs) == store.stat("several").slabs == 4
                    assert_same(again.pread(SIZE, 0), pattern(SIZE, 3), "the slabs in a row")
            with store.open("several", "r+") as again:
                again.pwrite(b"across", MIB - 3)
            assert buffer.pread(6, MIB - 3) == b"across"


@needs("udmabuf", "nvme")
def test_the_memory_file_brings_the_direct_route(store: Store) -> None:
    drive = os.environ["DMABUF_TEST_NVME0"]
    store.create("n", SIZE, exporter="udmabuf").close()
    with dmabuf.open(drive) as file:
        expected = os.pread(file.fileno(), MIB, 0)
        for trusted, route in ((False, "staged"), (True, "direct")):
            with store.open("n", "r+", trusted=trusted) as buffer:
                buffer.pwrite(pattern(MIB, 4), 0)
                transfer = file.read_into(buffer, MIB, route=None)
                assert_same(buffer.pread(MIB, 0), expected, "what was read")
                assert transfer.route in (route, "native")
                if transfer.route == "staged":
                    why = transfer.rejected[dmabuf.Route.DIRECT]
                    assert "its owner may open it with trusted=True" in why


@needs("udmabuf")
def test_removed_memory_lives_in_who_has_it_and_counts_no_more(store: Store) -> None:
    with store.create("n", SIZE, exporter="udmabuf", trusted=True) as buffer:
        kept = os.dup(buffer.fileno())
        assert store.stat("n").in_use
    assert store.stat("n").in_use
    with mmap.mmap(kept, SIZE, mmap.MAP_SHARED) as mapping:
        os.close(kept)
        assert store.stat("n").in_use
        store.remove("n")
        assert store.usage().charged == 0
        assert mapping[0] == 0
    store.create("n", SIZE, exporter="udmabuf").close()
    assert not store.stat("n").in_use


@contextlib.contextmanager
def for_everyone(*devices: str) -> Iterator[None]:
    """Devices that every user may open."""
    modes = [os.stat(device).st_mode & 0o777 for device in devices]
    for device in devices:
        os.chmod(device, 0o666)
    try:
        yield
    finally:
        for device, mode in zip(devices, modes, strict=True):
            os.chmod(device, mode)


@needs("hugepages")
def test_huge_pages_come_back(store: Store) -> None:
    """Some kernels do not report who has a memory file of huge pages open."""

    def free() -> int:
        return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())

    before = free()
    with store.create("one", 8 * MIB, **KINDS["huge pages"]) as one:
        store.open("one").close()
        assert store.stat("one").in_use is not False
        store.remove("one")
        one.pwrite(pattern(MIB, 5), 0)
        assert_same(one.pread(MIB, 0), pattern(MIB, 5), "memory whose name was removed")
    assert settled(free, before) == before


@everything
def test_who_only_reads_gets_a_memory_file_or_hears_why_not(store: Store, path: Path) -> None:
    with store.create("public", 65536, mode=0o644, exporter="udmabuf") as buffer:
        buffer.pwrite(b"public", 0)
        become(READ_ONLY, path, "4001,4002")
        assert buffer.pread(7, 0) == b"public\0"
    store.create("heap", 4096, mode=0o644, exporter="system").close()
    said = become('print(refused(errno.EACCES, store.open, "heap").strerror)', path, "4001,4002")
    assert "a dma-buf of system is always writable" in said


@needs("udmabuf")
def test_a_memory_file_stays_the_owners(store: Store, path: Path) -> None:
    store.create("shared", 65536, mode=0o666, exporter="udmabuf").close()
    script = """
def memory_files():
    return [line for line in open("/proc/self/maps") if "/memfd:" in line]

refused(errno.EPERM, store.open, "shared", "r+", trusted=True)
with store.open("shared", "r+") as buffer:
    assert foreign.identify(buffer.fileno()).exporter == "udmabuf"
    assert not memory_files()
with store.create(None, 4096, exporter="udmabuf", trusted=True) as buffer:
    assert memory_files()
    refused(errno.EPERM, store.link, buffer, "shared")
"""
    with for_everyone(exporters.UDMABUF):
        become(script, path, "4001,4002")


@everything
def test_a_killed_server_leaves_the_memory_to_its_clients(path: Path) -> None:
    before = dma_bufs()
    with as_a_program(path) as server, dmabuf.store.connect(path) as store:
        buffers = [store.create(kind, SIZE, **how) for kind, how in KINDS.items()]
        for number, buffer in enumerate(buffers):
            buffer.pwrite(pattern(SIZE, number), 0)
        server.kill()
        server.wait(timeout=30)
        for number, buffer in enumerate(buffers):
            assert_same(buffer.pread(SIZE, 0), pattern(SIZE, number), str(buffer))
            if buffer.is_dmabuf:
                assert foreign.identify(buffer.fileno()) is not None
            buffer.close()
    assert settled(dma_bufs, before) == before


@needs("udmabuf")
def test_no_exporter_takes_what_it_was_not_asked_for(store: Store) -> None:
    with raises_errno(errno.EINVAL):
        store.create("n", 4096, exporter="system", huge_pages="2MiB")
    assert (store.usage().charged, store.usage().names) == (0, 0)


@everything
def test_a_cached_buffer_cannot_be_written_through_a_dma_buf_either(store: Store) -> None:
    with store.create(None, SIZE) as buffer:
        assert buffer.is_dmabuf
        with pytest.raises(ValueError, match="the buffer is a dma-buf"):
            store.link(buffer, "model", cached=True)
    buffer = store.create(None, SIZE, exporter="memfd")
    buffer.pwrite(pattern(SIZE, 1), 0)
    store.link(buffer, "model", cached=True)
    with store.open("model") as buffer:
        assert store.stat("model").in_use
        device = exporters.open_udmabuf()
        try:
            for access in (os.O_RDONLY, os.O_RDWR):
                fd = os.open(f"/proc/self/fd/{buffer.fileno()}", access)
                try:
                    with raises_errno(errno.EINVAL):
                        os.close(uapi.udmabuf_create(device, fd, 0, buffer.size))
                    with mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ) as memory:
                        with raises_errno(errno.EACCES):
                            memory.madvise(mmap.MADV_REMOVE)
                finally:
                    os.close(fd)
        finally:
            os.close(device)
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 1), "a cached buffer")
    assert store.stat("model").in_use is False

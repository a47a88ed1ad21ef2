"""The store with real dma-bufs: the same memory in two processes, grants, and what is left."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf import _uapi
from dmabuf.exporters import foreign, udmabuf
from dmabuf.store import Store
from tests.guards import needs
from tests.kernel.conftest import dma_bufs, settled
from tests.serving import as_a_program
from tests.support import assert_same, in_child, pattern
from tests.unit.test_store_users import READ_ONLY, SERVE, become

MIB = 1 << 20
SIZE = 3 * MIB + 4096
KINDS = {
    "udmabuf": {"exporter": "udmabuf"},
    "memfd": {"exporter": "memfd"},
    "dma-heap": {"exporter": "system"},
    "huge pages": {"exporter": "memfd", "huge_pages": "2MiB"},
}
HEAP = "/dev/dma_heap/system"
everything = needs("udmabuf", "dma_heap", "hugepages")


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder, "store.sock")


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    before = dma_bufs()
    with as_a_program(path, "--max-memory", "256MiB"), dmabuf.store.connect(path) as store:
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
def test_several_slabs_in_one_mapping(path: Path) -> None:
    """Where udmabufs are capped: each grant is all of them, with or without the memory file."""
    limit = Path(udmabuf.SIZE_LIMIT)
    before = limit.read_text()
    limit.write_text("1")
    try:
        with as_a_program(path), dmabuf.store.connect(path) as store:
            with store.create("several", SIZE, exporter="udmabuf", trusted=True) as buffer:
                assert [slab.size for slab in buffer.slabs] == [MIB, MIB, MIB, 4096]
                buffer.pwrite(pattern(SIZE, 3), 0)
                for mode in ("r", "r+"):
                    with store.open("several", mode) as again:
                        assert len(again.slabs) == store.stat("several").slabs == 4
                        assert_same(again.pread(SIZE, 0), pattern(SIZE, 3), "the slabs in a row")
                with store.open("several", "r+") as again:
                    again.pwrite(b"across", MIB - 3)
                assert buffer.pread(6, MIB - 3) == b"across"
    finally:
        limit.write_text(before)


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
def test_a_device_holds_memory_as_programs_do(store: Store) -> None:
    """Removed memory counts while a mapping, a descriptor or nothing but a device has it."""
    with store.create("n", SIZE, exporter="udmabuf", trusted=True) as buffer:
        kept = os.dup(buffer.fileno())
        assert store.stat("n").in_use
    assert store.stat("n").in_use
    with mmap.mmap(kept, SIZE, mmap.MAP_SHARED) as mapping:
        os.close(kept)
        store.remove("n")
        assert store.usage().charged == SIZE
        assert mapping[0] == 0
    assert settled(lambda: store.usage().charged, 0) == 0


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


@contextlib.contextmanager
def of_a_user(path: Path, max_memory: int) -> Iterator[None]:
    """A server without privileges, whose user may make dma-bufs."""
    command = [sys.executable, "-c", SERVE, path, str(max_memory)]
    with (
        for_everyone(udmabuf.DEVICE, HEAP),
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout.readline() == "serving\n"
            yield
        finally:
            server.terminate()


@everything
@pytest.mark.parametrize("by", ["root", "a user"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_is_referred_to_without_being_open_counts(
    path: Path, kind: str, by: str
) -> None:
    """An O_PATH descriptor (open(2)) of a memory file; of a dma-buf of who could make it himself,
    it does not.
    """
    size = 8 * MIB
    before, how = dma_bufs(), KINDS[kind]
    serving = of_a_user(path, size) if by == "a user" else as_a_program(path, "--max-memory", size)
    with serving, dmabuf.store.connect(path) as store:
        with store.create("one", size, trusted=True, **how) as one:
            reference = os.open(f"/proc/self/fd/{one.fileno()}", os.O_PATH)
            counts = not one.is_dmabuf
        store.remove("one")
        if counts:
            with pytest.raises(OSError) as caught:
                store.create("two", MIB, **how)
            assert caught.value.errno == errno.ENOSPC
        assert store.usage().charged == (size if counts else 0)
        os.close(reference)
        store.create("two", size, **how).close()
    assert settled(dma_bufs, before) == before


@everything
@pytest.mark.parametrize("kind", KINDS)
def test_references_that_go_while_the_store_looks_for_them(path: Path, kind: str) -> None:
    """Where dma-bufs were marked, the kernel waited for itself, and ended none of the processes."""
    held: queue.Queue[int | None] = queue.Queue()

    def let_go() -> None:
        while (fd := held.get()) is not None:
            os.close(fd)

    with as_a_program(path), dmabuf.store.connect(path) as store:
        closing = threading.Thread(target=let_go)
        closing.start()
        for _ in range(200):
            with store.create("n", 4096, **KINDS[kind]) as one:
                reference = os.open(f"/proc/self/fd/{one.fileno()}", os.O_PATH)
            store.remove("n")
            held.put(reference)
            store.usage()
        held.put(None)
        closing.join()
        assert settled(lambda: store.usage().charged, 0) == 0


@everything
@pytest.mark.parametrize("kind", KINDS)
def test_an_inotify_watch_leaves_nothing_counted(store: Store, kind: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_CLOEXEC)
    with store.create("n", SIZE, **KINDS[kind]) as buffer:
        link = f"/proc/self/fd/{buffer.fileno()}".encode()
        assert libc.inotify_add_watch(watch, link, 0x400) > 0, os.strerror(ctypes.get_errno())
    store.remove("n")
    assert store.usage().charged == 0
    os.close(watch)


@needs("hugepages")
def test_huge_pages_come_back(store: Store) -> None:
    """Which of their descriptors others have, the kernel does not tell; what is gone it does."""

    def free() -> int:
        return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())

    before = free()
    with store.create("one", 8 * MIB, **KINDS["huge pages"]) as one:
        store.open("one").close()
        store.remove("one")
        assert store.usage().charged == 8 * MIB
        one.pwrite(pattern(MIB, 5), 0)
        assert_same(one.pread(MIB, 0), pattern(MIB, 5), "memory whose name was removed")
    assert store.usage().charged == 0
    assert free() == before


@everything
def test_who_only_reads_gets_a_memory_file_or_hears_why_not(store: Store, path: Path) -> None:
    assert os.stat(udmabuf.DEVICE).st_mode & 0o006 == 0, "others may not make udmabufs here"
    with store.create("public", 65536, mode=0o644, exporter="udmabuf") as buffer:
        buffer.pwrite(b"public", 0)
        become(READ_ONLY, path, "4001,4002")
        assert buffer.pread(7, 0) == b"public\0"
    store.create("heap", 4096, mode=0o644, exporter="system").close()
    said = become('print(refused(errno.EACCES, store.open, "heap").strerror)', path, "4001,4002")
    assert "there is no second descriptor of it to be had" in said


@needs("udmabuf")
def test_a_memory_file_for_reading_makes_a_udmabuf_that_writes(store: Store, path: Path) -> None:
    """Why those who may open /dev/udmabuf are refused: UDMABUF_CREATE asks for no right."""
    memory = os.memfd_create("m", _uapi.MFD_ALLOW_SEALING)
    os.truncate(memory, 4096)
    fcntl.fcntl(memory, _uapi.F_ADD_SEALS, _uapi.F_SEAL_SHRINK)
    reading = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    device = udmabuf.open_device()
    made = _uapi.udmabuf_create(device, reading, 0, 4096)
    with mmap.mmap(made, 4096) as mapping:
        mapping[:5] = b"wrote"
    assert os.pread(memory, 5, 0) == b"wrote"
    for fd in (memory, reading, device, made):
        os.close(fd)
    store.create("public", 4096, mode=0o644, exporter="udmabuf").close()
    group = os.stat(udmabuf.DEVICE).st_gid
    mode = os.stat(udmabuf.DEVICE).st_mode & 0o777
    os.chown(udmabuf.DEVICE, 0, 4321)
    os.chmod(udmabuf.DEVICE, 0o660)
    try:
        refusal = 'print(refused(errno.EACCES, store.open, "public").strerror)'
        assert "would be none: you may open /dev/udmabuf" in become(refusal, path, "4001,4321")
        become('store.open("public").close()', path, "4001,4002")
    finally:
        os.chown(udmabuf.DEVICE, 0, group)
        os.chmod(udmabuf.DEVICE, mode)


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
    refused(errno.EPERM, store.swap, buffer, "shared", 1)
"""
    with for_everyone(udmabuf.DEVICE):
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
    with pytest.raises(OSError) as caught:
        store.create("n", 4096, exporter="system", huge_pages="2MiB")
    assert caught.value.errno == errno.EINVAL
    assert store.usage()[::2] == (0, 0)

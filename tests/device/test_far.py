"""Far memory: NUMA nodes without processors, of ordinary and of movable memory, and device DAX."""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import dmabuf
from dmabuf.memory import capacity, exporters
from tests.guards import DAX, needs
from tests.kernel.test_exporters import through_dmabuf
from tests.support import (
    PAGE,
    PATIENCE,
    assert_same,
    drop_cache,
    fill,
    in_child,
    pattern,
    poison,
    raises_errno,
    read_and_compare,
    wait_until,
    write_and_compare,
)

FAR, MOVABLE = 1, 2
"""The nodes of `lab/run --devices numa`: without processors, the second one of ZONE_MOVABLE."""
MIB = 1 << 20
SIZE = 16 * MIB  # enough requests for io_uring to register the pages


def nodes_of(buffer: dmabuf.Buffer) -> set[int]:
    """The nodes of the buffer's pages, as move_pages(2) reports them."""
    count = buffer.size // PAGE
    pages = (ctypes.c_void_p * count)(*(buffer.address + at * PAGE for at in range(count)))
    where = (ctypes.c_int * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    move_pages = {"x86_64": 279, "aarch64": 239}[os.uname().machine]
    rc = libc.syscall(move_pages, 0, ctypes.c_ulong(count), pages, None, where, 0)
    assert rc == 0, os.strerror(ctypes.get_errno())
    return set(where)


def free_on(node: int) -> int:
    """Bytes of free memory that a node has: dma-heaps' mappings show no pages to other calls."""
    return capacity.parse_table(Path(f"/sys/devices/system/node/node{node}/meminfo").read_text())[
        "MemFree"
    ]


def transfers(buffer: dmabuf.Buffer, **how: object) -> tuple[dmabuf.Transfer, dmabuf.Transfer]:
    """Fill the buffer from an NVMe drive, and the drive from the buffer; compare every byte."""
    drive, size = os.environ["DMABUF_TEST_NVME0"], buffer.size
    with dmabuf.open(drive, "r+") as file, open(drive, "r+b", buffering=0) as plain:
        fill(plain.fileno(), pattern(size, 1), 0)
        drop_cache(plain.fileno())
        read = read_and_compare(file, plain.fileno(), buffer, size, **how)
        how |= {"limit": size, "uncached": True}
        return read, write_and_compare(file, plain.fileno(), buffer, size, **how)


@pytest.fixture
def huge_pages(request: pytest.FixtureRequest) -> int | bool:
    """Huge pages on both nodes while the test runs."""
    for node in (FAR, MOVABLE) if request.param else ():
        path = Path(f"/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages")
        path.write_text(str(SIZE // request.param))
        request.addfinalizer(partial(path.write_text, "0"))
    return request.param


# -- NUMA nodes


@pytest.mark.device_table("NUMA node without processors", "export", "read", "write", "zero-copy")
@needs("numa", "udmabuf", "nvme")
@pytest.mark.parametrize("exporter", ["udmabuf", "memfd"])
@pytest.mark.parametrize("huge_pages", [False, 2 * MIB], ids=["ordinary", "huge"], indirect=True)
def test_pages_are_on_a_node_without_processors(exporter: str, huge_pages: int | bool) -> None:
    if exporter == "udmabuf" and huge_pages and not exporters.maps_large_pages():
        with raises_errno(errno.EOPNOTSUPP, "importers that map a udmabuf of huge pages"):
            dmabuf.allocate(SIZE, exporter=exporter, numa_node=FAR, huge_pages=huge_pages)
        return
    assert not Path(f"/sys/devices/system/node/node{FAR}/cpulist").read_text().strip()
    with dmabuf.allocate(SIZE, exporter=exporter, numa_node=FAR, huge_pages=huge_pages) as buffer:
        maps = Path("/proc/self/numa_maps").read_text().splitlines()
        line = next(line for line in maps if line.startswith(f"{buffer.address:08x} "))
        assert f"bind:{FAR}" in line and f"N{FAR}=" in line and "N0=" not in line
        assert nodes_of(buffer) == {FAR}
        read, _ = transfers(buffer, require="zero-copy")
        assert (read.registered, read.copied) == (True, 0), read.registration
        assert nodes_of(buffer) == {FAR}
        if buffer.is_dmabuf:
            assert_same(through_dmabuf(buffer.slabs[0]), poison(SIZE), "the dma-buf's own bytes")


@needs("numa", "udmabuf")
def test_the_example(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(pattern(SIZE, 3))
    command = [sys.executable, "examples/far_memory.py", path, str(FAR)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("<dmabuf.Buffer") and "bytes direct in" in done.stdout, (
        done.stdout
    )


@needs("numa", "dma_heap", "nvme")
def test_a_heap_takes_its_pages_from_the_node() -> None:
    size, slack = 64 * MIB, 32 * MIB  # what the rest of the guest may take or give back meanwhile
    before = free_on(FAR)
    with dmabuf.allocate(size, exporter="system", numa_node=FAR) as buffer:
        assert size - slack < before - free_on(FAR) < size + slack
        transfers(buffer, route="staged")
    wait_until(lambda: free_on(FAR) > before - slack, "the pages to be free again")
    with dmabuf.allocate(size, exporter="system"):  # the thread's policy is as before
        assert free_on(FAR) > before - slack


@needs("numa", "udmabuf", "nvme")
@pytest.mark.parametrize("huge_pages", [False, 2 * MIB], ids=["ordinary", "huge"], indirect=True)
def test_movable_memory_stays_on_its_node_in_a_memfd(huge_pages: int | bool) -> None:
    how = {"numa_node": MOVABLE, "huge_pages": huge_pages}
    moved = f"off NUMA node {MOVABLE}, which is ZONE_MOVABLE"
    if huge_pages and not exporters.maps_large_pages():
        moved = "importers that map a udmabuf of huge pages"
    with raises_errno(errno.EOPNOTSUPP, moved):
        dmabuf.allocate(SIZE, exporter="udmabuf", **how)
    with dmabuf.allocate(SIZE, **how) as buffer:
        assert buffer.exporter == "memfd" and moved in buffer.reason
        assert "pinning pages for long moves them off NUMA node 2" in buffer.reason
        assert nodes_of(buffer) == {MOVABLE}
        for transfer in transfers(buffer, require="zero-copy"):
            assert (transfer.registered, transfer.copied) == (False, 0)
            assert "pinning pages for long moves them" in transfer.registration
        assert nodes_of(buffer) == {MOVABLE}


@needs("numa", "dma_heap")
def test_a_heap_cannot_use_movable_memory() -> None:
    with raises_errno(errno.EOPNOTSUPP, "all ZONE_MOVABLE, which a dma-heap cannot use"):
        dmabuf.allocate(SIZE, exporter="system", numa_node=MOVABLE)


@needs("numa")
def test_bytes_survive_when_their_node_goes_offline() -> None:
    blocks = list(Path(f"/sys/devices/system/node/node{MOVABLE}").glob("memory[0-9]*/state"))
    with dmabuf.allocate(SIZE, exporter="memfd", numa_node=MOVABLE) as buffer:
        buffer.write(pattern(SIZE, 5))
        try:
            for state in blocks:
                state.write_text("offline")
            assert MOVABLE not in nodes_of(buffer)
            with pytest.raises(
                ValueError, match=f"invalid numa_node {MOVABLE}: use a node that has memory"
            ):
                dmabuf.allocate(SIZE, numa_node=MOVABLE)
        finally:
            for state in blocks:
                state.write_text("online_movable")
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 5), "moved")
    with dmabuf.allocate(SIZE, exporter="memfd", numa_node=MOVABLE) as buffer:
        assert nodes_of(buffer) == {MOVABLE}


@needs("numa", "udmabuf")
def test_a_node_with_too_little_memory_is_not_tried() -> None:
    for exporter in ("udmabuf", "memfd", "system"):
        with raises_errno(errno.ENOMEM, f"that NUMA node {FAR} allows"):
            dmabuf.allocate("512MiB", exporter=exporter, numa_node=FAR)


# -- device DAX


@needs("dax", "nvme")
def test_device_dax_is_zeroed_rounded_and_exclusive() -> None:
    with open(DAX, "r+b", buffering=0) as node, mmap.mmap(node.fileno(), 4 * MIB) as plain:
        plain[:] = poison(4 * MIB)
        with dmabuf.allocate(3 * MIB, exporter=DAX, name="far") as buffer:
            assert (buffer.size, buffer.exporter, buffer.name) == (4 * MIB, DAX, "far")
            assert not buffer.is_dmabuf and "is not a dma-buf" in buffer.reason
            assert_same(plain[:], bytes(4 * MIB), "zeroed")
            again = f"import dmabuf; dmabuf.allocate(1, exporter={DAX!r})"
            ended = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
            assert "another Buffer has it" in ended.stderr and ended.returncode == 1
            with raises_errno(errno.EBUSY, "another Buffer has it", filename=DAX):
                dmabuf.allocate(1, exporter=DAX)
        dmabuf.allocate(1, exporter=DAX).close()
        with raises_errno(errno.ENOMEM, "allocate 1 GiB: the device has 2"):
            dmabuf.allocate("1GiB", exporter=DAX)


@pytest.mark.device_table("device DAX", "read", "write", "zero-copy")
@needs("dax", "nvme")
def test_drives_read_and_write_device_dax_directly() -> None:
    with dmabuf.allocate(SIZE, exporter=DAX) as buffer:
        read, write = transfers(buffer, require="zero-copy")
        assert (read.registered, read.copied, write.copied) == (True, 0, 0), read.registration
        with open(DAX, "rb", buffering=0) as node:
            with mmap.mmap(node.fileno(), SIZE, prot=mmap.PROT_READ) as plain:
                assert_same(plain[:], poison(SIZE), "the device's own bytes")


@needs("dax")
def test_bytes_of_device_dax_outlive_buffers_and_are_shared() -> None:
    with dmabuf.allocate(SIZE, exporter=DAX) as buffer:
        buffer.write(pattern(SIZE, 3))
        seen = in_child(
            "import os, sys, dmabuf\n"
            "with dmabuf.from_fd(os.open(sys.argv[1], os.O_RDWR)) as buffer:\n"
            "    data = buffer.pread(int(sys.argv[2]), 0)\n"
            "    buffer.pwrite(data[::-1], 0)\n",
            DAX,
            SIZE,
        )
        assert not seen
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 3)[::-1], "what another process wrote")
    fd = os.open(DAX, os.O_RDONLY)
    with dmabuf.from_fd(fd) as buffer:
        os.close(fd)
        assert (buffer.size, buffer.exporter, buffer.writable()) == (whole(), DAX, False)
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 3)[::-1], "kept")


def whole() -> int:
    return int(Path(f"/sys/bus/dax/devices/{Path(DAX).name}/size").read_text())


@needs("dax", "fuse")
def test_device_dax_goes_to_another_process_and_to_programs() -> None:
    in_child(
        "import multiprocessing, sys, dmabuf\n"
        "data = bytes(range(256)) * 8192\n"
        "with dmabuf.allocate(len(data), exporter=sys.argv[1]) as buffer:\n"
        "    how = {'target': dmabuf.Buffer.pwrite, 'args': (buffer, data, 0)}\n"
        "    process = multiprocessing.get_context('spawn').Process(**how)\n"
        "    process.start(); process.join()\n"
        "    assert process.exitcode == 0\n"
        "    assert buffer.pread(len(data), 0) == data, 'written by the other process'\n"
        "    with dmabuf.as_file(buffer) as file:\n"
        "        assert file.way == 'fuse' and file.read() == data, 'as a file'\n",
        DAX,
    )


_TAKEN = """
import os, sys, dmabuf
node, drive, size, first = *sys.argv[1:3], int(sys.argv[3]), sys.argv[4]
with dmabuf.allocate(size, exporter=node) as buffer, dmabuf.open(drive, "r+") as file:
    print(buffer.size, flush=True)
    sys.stdin.readline()
    if first == "the CPU":
        buffer.pread(1, 0)
    for act in (file.read_into, file.write_from):
        try:
            print(act(buffer, 4096), flush=True)
        except dmabuf.RouteUnavailable as error:
            print(error, flush=True)
    try:
        buffer.pread(1, 0)
    except OSError as error:
        print(error)
"""


@needs("dax", "nvme", "root")
@pytest.mark.parametrize("first", ["the CPU", "a transfer"])
def test_a_device_that_is_taken_away(first: str) -> None:
    """As `daxctl disable-device` does it. A transfer is refused, and so is the CPU afterwards."""
    driver, name = Path("/sys/bus/dax/drivers/device_dax"), Path(DAX).name
    command = [sys.executable, "-c", _TAKEN, DAX, os.environ["DMABUF_TEST_NVME0"], SIZE, first]
    pipe = subprocess.PIPE
    with subprocess.Popen(list(map(str, command)), stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == f"{SIZE}\n"
        (driver / "unbind").write_text(name)
        try:
            told = process.communicate("\n", timeout=PATIENCE)[0].splitlines()
        finally:
            (driver / "bind").write_text(name)
    gone = f"{DAX} was taken away, and its memory with it; close the buffer"
    if first == "the CPU":
        assert (process.returncode, told) == (-signal.SIGBUS, [])
    else:
        assert (process.returncode, len(told)) == (0, 3)
        assert all(f"direct, staged, buffered: {gone}" in line for line in told[:2]), told
        assert told[2] == gone
    with dmabuf.allocate(SIZE, exporter=DAX) as buffer:
        transfers(buffer, require="zero-copy")


@needs("dax")
def test_a_lock_of_another_program_is_respected() -> None:
    with open(DAX, "rb") as node:
        fcntl.flock(node, fcntl.LOCK_EX)
        with raises_errno(errno.EBUSY):
            dmabuf.allocate(1, exporter=DAX)

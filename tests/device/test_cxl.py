"""CXL memory (type 3, by a region in mode pmem): as device DAX, and as a NUMA node.

QEMU emulates each access to it, so Buffers are small here. tests/device/test_far.py has the rest.
Ordinary memory of a node does not go offline again, so its test is the last one.
"""

import errno
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.memory import exporters
from tests.device.test_far import free_on, nodes_of, transfers
from tests.guards import DAX, needs
from tests.kernel.test_exporters import through_dmabuf
from tests.support import assert_same, pattern, poison, raises_errno, run

SIZE, HUGE = 256 << 10, 2 << 20
PAGES = [(SIZE, False), (HUGE, HUGE)]
"""Sizes of Buffers, and of their huge pages."""
HUGE_REFUSED = "importers that map a udmabuf of huge pages"
NAME = Path(DAX).name
DEVICE = Path("/sys/bus/dax/devices", NAME)
DRIVERS = Path("/sys/bus/dax/drivers")


@pytest.mark.device_table("CXL memory, as device DAX", "read", "write", "zero-copy")
@needs("cxl", "nvme")
def test_drives_read_and_write_cxl_memory_directly() -> None:
    regions = [path.read_text() for path in Path("/sys/bus/cxl/devices").glob("region*/commit")]
    assert regions == ["1\n"]
    with open(DAX, "r+b", buffering=0) as node, mmap.mmap(node.fileno(), HUGE) as plain:
        plain[:] = pattern(HUGE, 2)
        with dmabuf.allocate(HUGE, exporter=DAX) as buffer:
            assert_same(plain[:], bytes(HUGE), "zeroed")
            read, write = transfers(buffer, require="zero-copy")
            assert (read.route, read.copied, write.copied) == ("direct", 0, 0)
            assert_same(plain[:], poison(HUGE), "the memory's own bytes")


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[int]:
    """The memory as a NUMA node, as `daxctl reconfigure-device --mode=system-ram` makes it."""
    number = int((DEVICE / "target_node").read_text())
    (DRIVERS / "device_dax/unbind").write_text(NAME)
    run("modprobe", "kmem")
    (DRIVERS / "kmem/new_id").write_text(NAME)
    states = list(Path(f"/sys/devices/system/node/node{number}").glob("memory[0-9]*/state"))
    assert states, "memory of the node"
    for state in states:
        state.write_text(request.param)
    yield number
    if request.param == "online_movable":
        for state in states:
            state.write_text("offline")
        (DRIVERS / "kmem/remove_id").write_text(NAME)
        (DRIVERS / "kmem/unbind").write_text(NAME)
        (DRIVERS / "device_dax/bind").write_text(NAME)


@pytest.fixture
def huge_page(node: int) -> Iterator[None]:
    """One huge page on the node."""
    path = Path(f"/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages")
    path.write_text("1")
    assert path.read_text() == "1\n"
    yield
    path.write_text("0")


@pytest.mark.device_table("CXL memory, as a movable NUMA node", "read", "write", "zero-copy")
@needs("cxl", "nvme", "udmabuf")
@pytest.mark.usefixtures("huge_page")
@pytest.mark.parametrize("node", ["online_movable"], indirect=True)
def test_movable_cxl_memory_is_used_by_memfds_only(node: int) -> None:
    assert not Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
    with raises_errno(errno.ENXIO, f"it is ordinary memory now; use numa_node={node}"):
        dmabuf.allocate(SIZE, exporter=DAX)
    moved = f"off NUMA node {node}, which is ZONE_MOVABLE"
    for size, pages in PAGES:
        how = {"numa_node": node, "huge_pages": pages}
        why = HUGE_REFUSED if pages and not exporters.maps_large_pages() else moved
        with raises_errno(errno.EOPNOTSUPP, why):
            dmabuf.allocate(size, exporter="udmabuf", **how)
        with dmabuf.allocate(size, **how) as buffer:
            assert buffer.exporter == "memfd" and why in buffer.reason
            assert f"pinning pages for long moves them off NUMA node {node}" in buffer.reason
            assert nodes_of(buffer) == {node}
            for transfer in transfers(buffer, require="zero-copy"):
                assert (transfer.route, transfer.registered, transfer.copied) == (
                    "direct",
                    False,
                    0,
                )
            assert nodes_of(buffer) == {node}
    with raises_errno(errno.EOPNOTSUPP, "all ZONE_MOVABLE, which a dma-heap cannot use"):
        dmabuf.allocate(SIZE, exporter="system", numa_node=node)


@pytest.mark.device_table("CXL memory, as a NUMA node", "export", "read", "write", "zero-copy")
@needs("cxl", "nvme", "udmabuf", "dma_heap")
@pytest.mark.usefixtures("huge_page")
@pytest.mark.parametrize("node", ["online_kernel"], indirect=True)
def test_dma_bufs_are_on_ordinary_cxl_memory(node: int) -> None:
    for exporter in ("udmabuf", "memfd"):
        for size, pages in PAGES:
            how = {"exporter": exporter, "numa_node": node, "huge_pages": pages}
            if exporter == "udmabuf" and pages and not exporters.maps_large_pages():
                with raises_errno(errno.EOPNOTSUPP, HUGE_REFUSED):
                    dmabuf.allocate(size, **how)
                continue
            with dmabuf.allocate(size, **how) as buffer:
                assert nodes_of(buffer) == {node}
                for transfer in transfers(buffer, require="zero-copy"):
                    assert (transfer.route, transfer.copied) == ("direct", 0)
                assert nodes_of(buffer) == {node}
                assert buffer.is_dmabuf == (exporter == "udmabuf")
                if buffer.is_dmabuf:
                    data = through_dmabuf(buffer.slabs[0])
                    assert_same(data, poison(size), "the dma-buf's own bytes")
    size, slack = 16 << 20, 4 << 20  # free pages that processors keep for themselves
    before = free_on(node)
    with dmabuf.allocate(size, exporter="system", numa_node=node):
        assert size - slack < before - free_on(node) < size + slack
    with dmabuf.allocate(SIZE, exporter="system", numa_node=node) as buffer:
        transfers(buffer, route="staged")

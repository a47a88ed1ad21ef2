"""The exporters on a real kernel: the lab, or any machine that has them."""

import mmap
import os
from pathlib import Path

import pytest

from dmabuf.kernel import uapi
from dmabuf.memory import allocate, exporters, from_fd
from tests.guards import needs

PAGE = mmap.PAGESIZE
MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("leaves_nothing")


def fdinfo(fd):
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def through_dmabuf(slab):
    """The bytes that the dma-buf itself shows, by a mapping of its own."""
    with mmap.mmap(slab.fd, slab.size, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        uapi.sync(slab.fd, uapi.DMA_BUF_SYNC_START | uapi.DMA_BUF_SYNC_READ)
        data = mapping[:]
        uapi.sync(slab.fd, uapi.DMA_BUF_SYNC_END | uapi.DMA_BUF_SYNC_READ)
    return data


@needs("udmabuf")
@pytest.mark.device_table("udmabuf", "export")
def test_a_udmabuf_is_a_dma_buf_over_the_same_pages():
    with allocate("4MiB", name="lab") as buf:
        assert buf.exporter == "udmabuf" and buf.is_dmabuf and len(buf.slabs) == 1
        info = fdinfo(buf.fileno())
        assert (info["exp_name"], info["name"], info["size"]) == ("udmabuf", "lab", str(4 * MIB))
        assert not os.get_inheritable(buf.fileno())
        assert through_dmabuf(buf.slabs[0]) == bytes(4 * MIB)
        data = os.urandom(4 * MIB)
        buf.write(data)
        assert through_dmabuf(buf.slabs[0]) == data
        assert buf.pread(4 * MIB, 0) == data


@needs("udmabuf")
def test_pages_behind_a_udmabuf_can_be_pinned(tmp_path):
    # tmp_path need not take O_DIRECT, so the test is a registration with io_uring's own pinning:
    # vmsplice into a pipe pins the same way, and fails with EFAULT on a dma-buf's own mapping.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def vmsplice(address):
        ends = os.pipe()
        try:
            vector = (ctypes.c_uint64 * 2)(address, PAGE)
            rc = libc.vmsplice(ends[1], vector, ctypes.c_ulong(1), ctypes.c_uint(0))
            return os.read(ends[0], PAGE) if rc == PAGE else ctypes.get_errno()
        finally:
            os.close(ends[0])
            os.close(ends[1])

    with allocate(PAGE, exporter="udmabuf") as buf, from_fd(buf) as twin:
        buf.write(b"p" * PAGE)
        assert buf.pin_refusal is None and vmsplice(buf.address) == b"p" * PAGE
        assert "EFAULT" in twin.pin_refusal and vmsplice(twin.address) == 14


@needs("udmabuf", "root")
def test_slabs_within_the_modules_limit(udmabuf_limit):
    udmabuf_limit(1)
    with allocate(MIB * 7 // 2, name="slab") as buf:
        assert [(slab.offset, slab.size) for slab in buf.slabs] == [
            (0, MIB),
            (MIB, MIB),
            (2 * MIB, MIB),
            (3 * MIB, MIB // 2),
        ]
        assert "4 slabs, since this kernel caps a udmabuf at 1 MiB" in buf.reason
        data = os.urandom(buf.size)
        buf.write(data)
        assert b"".join(map(through_dmabuf, buf.slabs)) == data
        assert {fdinfo(slab.fd)["name"] for slab in buf.slabs} == {"slab"}


@needs("udmabuf", "root")
def test_a_limit_that_cannot_be_read_is_found_by_trying(udmabuf_limit, monkeypatch, tmp_path):
    udmabuf_limit(1)
    with monkeypatch.context() as patch:
        patch.setattr(exporters, "UDMABUF_SIZE_LIMIT", str(tmp_path / "absent"))
        with allocate(3 * MIB, exporter="udmabuf") as buf:
            assert [slab.size for slab in buf.slabs] == [768 << 10] * 4
            buf.write(bytes(range(256)) * (buf.size // 256))
            assert b"".join(map(through_dmabuf, buf.slabs)) == buf.pread(buf.size, 0)


@needs("udmabuf")
def test_the_default_limit_is_met():
    size = 65 * MIB  # one more than the limit of kernels up to 6.12 at least
    with allocate(size, exporter="udmabuf") as buf:
        assert sum(slab.size for slab in buf.slabs) == size
        buf.pwrite(b"last", size - 4)
        with from_fd(buf.slabs[-1].fd) as last:
            assert last.pread(4, last.size - 4) == b"last"


@needs("udmabuf", "hugepages")
def test_huge_pages():
    with allocate("3MiB", huge_pages="2MiB") as buf:
        assert buf.size == 4 * MIB
        assert buf.exporter == ("udmabuf" if exporters.maps_large_pages() else "memfd")
        data = os.urandom(buf.size)
        buf.write(data)
        if buf.is_dmabuf:
            assert b"".join(map(through_dmabuf, buf.slabs)) == data
        assert buf.pread(buf.size, 0) == data
        smaps = Path("/proc/self/smaps").read_text()
        part = smaps[smaps.index(f"\n{buf.address:x}-") :]
        assert "KernelPageSize:     2048 kB" in part[: part.index("VmFlags")]


@needs("hugepages")
def test_more_huge_pages_than_are_free_are_refused():
    with pytest.raises(OSError, match="huge pages of 2 MiB are needed"):
        allocate("1GiB", huge_pages="2MiB")


@needs("udmabuf")
def test_a_udmabuf_on_a_node():
    with allocate("1MiB", exporter="udmabuf", numa_node=0) as buf:
        numa_maps = Path("/proc/self/numa_maps").read_text().splitlines()
        line = next(line for line in numa_maps if line.startswith(f"{buf.address:08x} "))
        assert "bind:0" in line and f"N0={MIB // PAGE}" in line.split()


@needs("dma_heap")
@pytest.mark.device_table("dma-heap", "export")
def test_a_heap():
    assert "system" in exporters.names()
    with allocate("1MiB", exporter="system", name="heap") as buf:
        assert buf.exporter == "system" and fdinfo(buf.fileno())["exp_name"] == "system"
        assert fdinfo(buf.fileno())["name"] == "heap"
        assert not os.get_inheritable(buf.fileno())
        assert buf.read() == bytes(MIB)
        data = os.urandom(MIB)
        buf.pwrite(data, 0)
        assert through_dmabuf(buf.slabs[0]) == data
        assert "has no pages to pin" in buf.pin_refusal


@needs("dma_heap")
def test_a_heap_is_not_asked_for_more_than_there_is():
    with pytest.raises(OSError, match="not tried: 100 GiB"):
        allocate("100GiB", exporter="system")


def heap_fd(size, mode):
    device = os.open("/dev/dma_heap/system", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return uapi.heap_alloc(device, size, mode | os.O_CLOEXEC)
    finally:
        os.close(device)


@needs("dma_heap")
def test_a_read_only_dma_buf_makes_a_read_only_buffer():
    fd = heap_fd(PAGE, os.O_RDONLY)
    with from_fd(fd) as buf:
        os.close(fd)
        assert (buf.exporter, buf.mode, buf.writable()) == ("system", "rb", False)
        assert buf.read() == bytes(PAGE)
        with pytest.raises(PermissionError):
            buf.map("w").__enter__()


@needs("udmabuf")
def test_a_dma_buf_is_known_without_proc(monkeypatch):
    from dmabuf.memory import foreign

    monkeypatch.setattr(foreign, "FDINFO", "/nonexistent")
    with allocate(PAGE, exporter="udmabuf") as buf, from_fd(buf) as twin:
        assert twin.exporter == "unknown"
    with allocate(PAGE, exporter="memfd") as buf, from_fd(buf) as twin:
        assert (twin.exporter, twin.is_dmabuf) == ("memfd", False)


@needs("vgem")
@pytest.mark.device_table("DRM GPU", "export")
def test_a_drm_drivers_dma_buf(card):
    with from_fd(card.fd) as buf, from_fd(card.fd) as twin:
        assert (buf.size, buf.mode) == (256 * 256 * 4, "rb+")
        data = os.urandom(buf.size)
        buf.write(data)
        assert twin.read() == data
        with twin.map("r", 4000, 200) as view:
            assert view == data[4000:4200]

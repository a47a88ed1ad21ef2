"""What docs/explanations/security.md claims of real dma-bufs."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest

import dmabuf
from dmabuf.kernel import uapi
from dmabuf.memory import exporters, from_fd
from dmabuf.transfer.engine import default_engine
from tests.guards import needs
from tests.kernel.conftest import BUFFERS, heap_read_only, others_huge_pages, vgem
from tests.kernel.test_exporters import fdinfo, through_dmabuf
from tests.support import PAGE, pattern
from tests.unit.test_security import punch

SIZE = 64 * 1024
KINDS = {
    "udmabuf": BUFFERS["udmabuf"],
    "udmabuf of huge pages": others_huge_pages,
    "dma-heap": BUFFERS["dma-heap"],
    "vgem": vgem,
}
everything = needs("udmabuf", "dma_heap", "vgem", "hugepages")


@everything
@pytest.mark.parametrize("kind", KINDS)
def test_a_holder_cannot_resize_or_read_it_as_a_file(kind):
    with KINDS[kind](SIZE) as buf:
        fd = buf.fileno()
        for change in (
            lambda: os.ftruncate(fd, 4096),
            lambda: os.ftruncate(fd, 1 << 30),
            lambda: os.pread(fd, 1, 0),
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
        ):
            with pytest.raises(OSError):
                change()
        assert not os.get_inheritable(fd)


@everything
@pytest.mark.parametrize("kind", KINDS)
def test_memory_begins_as_zeros(kind):
    with KINDS[kind](SIZE) as buf:
        assert buf.pread(buf.size, 0) == bytes(buf.size)
        buf.pwrite(pattern(buf.size, 3), 0)  # which the next one does not see


@everything
@pytest.mark.parametrize("kind", KINDS)
def test_closing_the_buffer_takes_nothing_away_from_a_duplicate(kind):
    with KINDS[kind](SIZE) as buf:
        buf.pwrite(pattern(SIZE, 4), 0)
        kept = os.dup(buf.fileno())
    with from_fd(kept) as again:
        os.close(kept)
        assert again.pread(SIZE, 0) == pattern(SIZE, 4)


@needs("udmabuf")
def test_the_memfd_behind_a_udmabuf_is_not_handed_out():
    with dmabuf.allocate(SIZE, exporter="udmabuf") as buf:
        links = {
            int(link.name): os.readlink(link)
            for link in Path("/proc/self/fd").iterdir()
            if link.is_symlink()
        }
        assert links[buf.fileno()].startswith("/dmabuf:")
        for fd, link in links.items():  # Python's mmap keeps one of its own on some versions
            assert "memfd:" not in link or not os.get_inheritable(fd)


@needs("udmabuf")
def test_a_hole_in_the_memfd_separates_it_from_its_udmabuf():
    memfd = os.memfd_create("ours", uapi.MFD_CLOEXEC | uapi.MFD_ALLOW_SEALING)
    device = exporters.open_udmabuf()
    try:
        os.ftruncate(memfd, SIZE)
        fcntl.fcntl(memfd, uapi.F_ADD_SEALS, uapi.F_SEAL_SHRINK)
        os.pwrite(memfd, pattern(SIZE, 5), 0)
        fd = uapi.udmabuf_create(device, memfd, 0, SIZE)
        with from_fd(fd) as buf:
            os.close(fd)
            assert through_dmabuf(buf.slabs[0]) == pattern(SIZE, 5)
            punch(memfd, 0, PAGE)
            os.pwrite(memfd, b"new page", 0)
            assert through_dmabuf(buf.slabs[0]) == pattern(SIZE, 5)
            os.pwrite(memfd, b"shared still", PAGE)
            assert through_dmabuf(buf.slabs[0])[PAGE : PAGE + 12] == b"shared still"
    finally:
        os.close(device)
        os.close(memfd)


@needs("dma_heap", "nvme")
@pytest.mark.parametrize("route", [None, "native", "staged", "buffered"])
def test_a_read_only_dma_buf_is_not_written(route):
    with heap_read_only(SIZE) as buf, dmabuf.open(os.environ["DMABUF_TEST_NVME0"]) as file:
        with pytest.raises(PermissionError) as caught:
            file.read_into(buf, SIZE, route=route)
        assert caught.value.errno == errno.EACCES
        assert buf.pread(SIZE, 0) == bytes(SIZE)
        with pytest.raises(PermissionError):
            mmap.mmap(buf.fileno(), SIZE, mmap.MAP_SHARED, mmap.PROT_WRITE)


@everything
@pytest.mark.parametrize("kind", KINDS)
def test_anyone_with_the_descriptor_relabels_it_for_everyone(kind):
    with KINDS[kind](SIZE) as buf:
        exporter = fdinfo(buf.fileno())["exp_name"]
        with from_fd(buf.fileno(), name="a label"):
            assert fdinfo(buf.fileno())["name"] == "a label"
        assert fdinfo(buf.fileno())["exp_name"] == exporter


@needs("udmabuf", "nvme")
def test_closing_either_side_clears_what_was_registered():
    """On a kernel with the series the slot goes with either; elsewhere pages go with the buffer."""
    size = 2 << 20  # more than one system call moves without a ring
    ring = default_engine()._rings[0]
    free = ring.free_buffer_slots
    native = default_engine().no_native() is None
    for first in ("buffer", "file"):
        buf = dmabuf.allocate(size, exporter="udmabuf")
        file = dmabuf.open(os.environ["DMABUF_TEST_NVME0"])
        transfer = file.read_into(buf, size)
        assert (transfer.route is dmabuf.Route.NATIVE) == native
        assert ("every byte" in transfer.audited) == (native and first == "buffer")
        assert ring.free_buffer_slots == free - 1
        (buf if first == "buffer" else file).close()
        assert ring.free_buffer_slots == free - (not native and first == "file")
        buf.close()
        file.close()
        assert ring.free_buffer_slots == free

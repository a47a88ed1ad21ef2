"""What a camera's driver, which maps dma-bufs into the kernel, makes of large pages.

vivid's frames are written by the CPU through the kernel's own mapping of the dma-buf (vmap). Where
udmabuf maps large pages wrongly, so do the frames arrive; see the head of exporters/udmabuf.py.
"""

import errno
import fcntl
import mmap
import os
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest

import dmabuf
from dmabuf.memory import exporters
from tests.guards import needs, vivid_node
from tests.kernel.conftest import bare_udmabuf
from tests.support import PAGE, poison, raises_errno, read_and_compare

FRAME = 640 * 360 * 3
SIZE = -(-FRAME // PAGE) * PAGE
HUGE = 2 << 20
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_CAPTURE, _DMABUF = 1, 4  # V4L2_BUF_TYPE_VIDEO_CAPTURE, V4L2_MEMORY_DMABUF


pytestmark = pytest.mark.usefixtures("leaves_nothing")


def v4l2(fd, direction, number, layout, *fields):
    """A VIDIOC_ ioctl; `layout` is the whole structure, the fields those that are not padding."""
    data = bytearray(struct.pack(layout, *fields))
    fcntl.ioctl(fd, direction << 30 | len(data) << 16 | ord("V") << 8 | number, data)


def frame_into(fd, length):
    """Have vivid capture one frame into a dma-buf, as a camera that imports it does."""
    camera = os.open(vivid_node(), os.O_RDWR | os.O_CLOEXEC)
    try:
        v4l2(camera, 3, 39, "=i", 0)  # VIDIOC_S_INPUT: the webcam
        v4l2(camera, 3, 5, "=I4xII4sI184x", _CAPTURE, 640, 360, b"RGB3", 1)  # VIDIOC_S_FMT
        v4l2(camera, 3, 8, "=III8x", 1, _CAPTURE, _DMABUF)  # VIDIOC_REQBUFS
        buffer = "=IIIII40xIi4xI12x"
        v4l2(camera, 3, 15, buffer, 0, _CAPTURE, 0, 0, 1, _DMABUF, fd, length)  # VIDIOC_QBUF
        v4l2(camera, 1, 18, "=i", _CAPTURE)  # VIDIOC_STREAMON
        v4l2(camera, 3, 17, buffer, 0, _CAPTURE, 0, 0, 0, _DMABUF, 0, 0)  # VIDIOC_DQBUF
        v4l2(camera, 1, 19, "=i", _CAPTURE)  # VIDIOC_STREAMOFF
    finally:
        os.close(camera)


def untouched(data):
    """How many pages of the frame still hold the poison."""
    before = poison(len(data))
    pages = range(0, FRAME, PAGE)
    return sum(data[at : at + PAGE] == before[at : at + PAGE] for at in pages)


@contextmanager
def transparent_huge_pages():
    """Shared memory gets them without being asked, as some distributions have it."""
    before = SHMEM_ENABLED.read_text().split("[")[1].split("]")[0]
    SHMEM_ENABLED.write_text("always")
    try:
        yield
    finally:
        SHMEM_ENABLED.write_text(before)


def frame_through(offset, **how):
    """Pages of a frame that did not arrive in a bare udmabuf, and whether others changed."""
    with bare_udmabuf(offset, SIZE, **how) as (made, memory):
        memory[:] = poison(len(memory))
        memory[offset : offset + SIZE] = poison(SIZE)
        around = memory[:offset] + memory[offset + SIZE :]
        frame_into(made, SIZE)
        with mmap.mmap(made, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as own:
            assert own[:] == memory[offset : offset + SIZE], "its own mapping is right everywhere"
        strayed = around != memory[:offset] + memory[offset + SIZE :]
        return untouched(memory[offset : offset + SIZE]), strayed


@needs("udmabuf", "vivid", "hugepages")
@pytest.mark.parametrize("offset", [0, 65536, HUGE, HUGE - 2 * PAGE])
def test_the_probe_tells_what_a_camera_does_to_huge_pages(offset):
    missing, strayed = frame_through(offset, huge_pages="2MiB")
    if exporters.maps_large_pages():
        assert (missing, strayed) == (0, False)
    else:  # every page of it went to the first of the huge page, in the dma-buf or before it
        begins = offset % HUGE == 0 or offset % HUGE + SIZE > HUGE
        assert missing == SIZE // PAGE - begins
        assert strayed == (offset % HUGE != 0)


@needs("udmabuf", "vivid", "root")
def test_the_probe_tells_what_a_camera_does_to_transparent_huge_pages():
    with transparent_huge_pages():
        assert (frame_through(0, huge_pages=False)[0] == 0) == exporters.maps_large_pages()
        assert frame_through(0, huge_pages=False, transparent=False) == (0, False)


@needs("udmabuf", "vivid", "root")
@pytest.mark.parametrize("exporter", ["udmabuf", "system"])
def test_a_frame_arrives_whole_whatever_pages_shared_memory_gets(exporter):
    with transparent_huge_pages(), dmabuf.allocate(2 * HUGE, exporter=exporter) as buffer:
        buffer.write(poison(buffer.size))
        frame_into(buffer.slabs[0].fd, buffer.slabs[0].size)
        got = buffer.pread(buffer.size, 0)
        assert untouched(got) == 0
        assert got[SIZE:] == poison(buffer.size)[SIZE:]


@needs("udmabuf", "vivid", "hugepages")
def test_huge_pages_are_right_for_a_camera_or_refused():
    if exporters.maps_large_pages():
        with dmabuf.allocate(HUGE, exporter="udmabuf", huge_pages="2MiB") as buffer:
            buffer.write(poison(HUGE))
            frame_into(buffer.fileno(), HUGE)
            assert untouched(buffer.pread(HUGE, 0)) == 0
    else:
        with raises_errno(
            errno.EOPNOTSUPP, "may get wrong bytes", filename=exporters.UDMABUF
        ) as refused:
            dmabuf.allocate(HUGE, exporter="udmabuf", huge_pages="2MiB")
        assert 'exporter="memfd"' in refused.value.strerror


@needs("udmabuf", "hugepages", "nvme")
def test_huge_pages_by_the_direct_route_are_had_on_every_kernel():
    path = os.environ["DMABUF_TEST_NVME0"]
    with dmabuf.allocate(HUGE, huge_pages="2MiB") as buffer, dmabuf.open(path) as file:
        assert buffer.exporter == ("udmabuf" if exporters.maps_large_pages() else "memfd")
        assert buffer.is_dmabuf or "may get wrong bytes" in buffer.reason
        reference = os.open(path, os.O_RDONLY)
        transfer = read_and_compare(file, reference, buffer, HUGE, require="zero-copy")
        os.close(reference)
        assert transfer.copied == 0

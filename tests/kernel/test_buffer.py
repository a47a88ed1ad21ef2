"""A Buffer's file behaviour, bracket and lifetime over real dma-bufs."""

import io
import mmap
import random

import pytest

from dmabuf.kernel import uapi
from dmabuf.memory import allocate, from_fd
from tests.forking import in_child
from tests.guards import needs
from tests.resources import held

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE


pytestmark = pytest.mark.usefixtures("leaves_nothing")


def make(kind):
    if kind != "from_fd":
        return allocate(SIZE, exporter=kind)
    with allocate(SIZE, exporter="system") as buf:
        return from_fd(buf)


kinds = pytest.mark.parametrize("kind", ["udmabuf", "system", "from_fd"])


@kinds
@needs("udmabuf", "dma_heap")
def test_a_file_against_bytes_io(kind):
    rng = random.Random(5)
    model = io.BytesIO(bytes(SIZE))
    with make(kind) as buf:
        for _ in range(500):
            offset, count = rng.randrange(SIZE), rng.randrange(3 * PAGE)
            assert buf.seek(offset) == model.seek(offset)
            if rng.random() < 0.5:
                assert buf.read(count) == model.read(count)
            elif offset + count <= SIZE:
                data = rng.randbytes(count)
                assert buf.write(data) == model.write(data)
            assert buf.tell() == model.tell()
        assert buf.pread(SIZE, 0) == model.getvalue()


@kinds
@needs("udmabuf", "dma_heap")
def test_the_kernel_accepts_every_bracket(kind, monkeypatch):
    real, flags = uapi.ioctl, []

    def ioctl(fd, request, argument):
        if request == uapi.DMA_BUF_IOCTL_SYNC:
            flags.append(int.from_bytes(argument, "little"))
        return real(fd, request, argument)

    with make(kind) as buf:
        monkeypatch.setattr(uapi, "ioctl", ioctl)
        buf.pread(1, 0)
        buf.pwrite(b"x", 0)
        buf.pwrite(bytes(PAGE), 0)
        with buf.map("r+"):
            pass
        monkeypatch.undo()
    assert flags == [1, 5, 3, 7, 2, 6, 3, 7]


@kinds
@needs("udmabuf", "dma_heap")
def test_a_forked_child_shares_the_memory(kind):
    with make(kind) as buf:
        buf.write(b"parent")

        def child():
            assert buf.pread(6, 0) == b"parent"
            buf.write(b" and child")
            buf.close()

        in_child(child)
        assert buf.pread(16, 0) == b"parent and child"


@kinds
@needs("udmabuf", "dma_heap")
def test_dropping_one_gives_everything_back(kind):
    before = held()
    buf = make(kind)
    buf.write(b"x")
    with pytest.warns(ResourceWarning, match="unclosed"):
        del buf
        after = held()
    assert after == before

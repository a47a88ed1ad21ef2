"""vgem, a GPU's driver without a GPU: buffers, and jobs that end when a test wants."""

import contextlib
import fcntl
import os
import struct
import threading
from collections.abc import Iterator

import dmabuf
from dmabuf.kernel import uapi
from tests.guards import vgem_node

PATIENCE = 5.0
"""Seconds: less than the ten after which a vgem fence expires, more than any wait here takes."""


def drm(fd: int, number: int, layout: str, *fields: int, direction: int = 3) -> tuple[int, ...]:
    """Return the fields of an ioctl's struct after the call; `direction` is _IOWR, or 1: _IOW."""
    struct_ = struct.Struct(layout)
    data = bytearray(struct_.pack(*fields))
    fcntl.ioctl(fd, direction << 30 | struct_.size << 16 | ord("d") << 8 | number, data)
    return struct_.unpack(data)


def _object(card: int, size: int, flags: int = os.O_RDWR) -> tuple[int, int]:
    """Return the handle and the dma-buf of a new object of `size` bytes, a multiple of 4096."""
    handle = drm(card, 0xB2, "=IIIIIIQ", size // 4096, 1024, 32, 0, 0, 0, 0)[4]
    return handle, drm(card, 0x2D, "=IIi", handle, flags | os.O_CLOEXEC, -1)[2]


@contextlib.contextmanager
def vgem(size: int, flags: int = os.O_RDWR) -> Iterator[dmabuf.Buffer]:
    """A GPU driver's buffer of `size` bytes, a multiple of 4096, handed over by descriptor."""
    card = os.open(vgem_node(), os.O_RDWR | os.O_CLOEXEC)
    try:
        _, fd = _object(card, size, flags)
        try:
            buffer = dmabuf.from_fd(fd)
        finally:
            os.close(fd)
        with buffer:
            yield buffer
    finally:
        os.close(card)


class Card:
    """An open vgem device with one object of 256 KiB, whose dma-buf is `fd`, and its queue."""

    def __init__(self) -> None:
        self.card = os.open(vgem_node(), os.O_RDWR | os.O_CLOEXEC)
        self.handle, self.fd = _object(self.card, 256 << 10)
        self.fences: set[int] = set()

    def handle_of(self, fd: int) -> int:
        """The handle of another exporter's dma-buf, imported."""
        return drm(self.card, 0x2E, "=IIi", 0, 0, fd)[0]

    def job(self, access: str, handle: int | None = None) -> int:
        """A job that reads or writes the object: its fence's number."""
        flags = int(access == "write")
        fence = drm(self.card, 0x41, "=IIII", handle or self.handle, flags, 0, 0)[2]
        self.fences.add(fence)
        return fence

    def done(self, fence: int) -> None:
        """The job has ended."""
        self.fences.discard(fence)
        drm(self.card, 0x42, "=II", fence, 0, direction=1)

    @contextlib.contextmanager
    def ending(self, *fences: int) -> Iterator[None]:
        """The jobs end a moment later, one after the other; what runs here lasts until then."""
        timers = [
            threading.Timer(0.1 * number, self.done, [fence])
            for number, fence in enumerate(fences, 1)
        ]
        for timer in timers:
            timer.start()
        try:
            yield
            assert not self.fences, "it returned before they had ended"
        finally:
            for timer in timers:
                timer.join()

    def sync_file(self, access: str = "write") -> tuple[int, int]:
        """A job, and a sync file with its fence and no other."""
        fence = self.job(access)
        return fence, uapi.export_sync_file(self.fd, uapi.DMA_BUF_SYNC_WRITE)

    def close(self) -> None:
        """End its jobs, and close it."""
        try:
            for fence in list(self.fences):
                self.done(fence)
        finally:  # one that has expired is an error
            os.close(self.fd)
            os.close(self.card)

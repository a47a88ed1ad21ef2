"""A fake kernel with dma-buf exporters, in place of the ioctls of the package."""

import errno
import fcntl
import mmap
import os

from dmabuf.kernel import uapi


class FakeKernel:
    """The ioctls of udmabuf, dma-heaps and dma-bufs; its dma-bufs are memfds. Files' are real.

    ``calls`` lists the SYNC calls as ``(descriptor, "START" or "END", "R", "W" or "RW")``. Each
    such call takes the first errno of ``sync_errors``, where 0 is success. A udmabuf of more than
    ``limit`` bytes is refused, and after ``creates_left`` udmabufs the next one fails with
    ``create_error``.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, str, str]] = []
        self.sync_errors: list[int] = []
        self.undirected_sync_error = errno.EINVAL
        self.labels: dict[int, bytes] = {}
        self.limit = 1 << 40
        self.create_error = 0
        self.creates_left = -1  # -1: without limit

    def ioctl(self, fd: int, request: int, argument: object) -> object:
        if request == uapi.DMA_BUF_IOCTL_SYNC:
            return self._sync(fd, *uapi._SYNC.unpack(argument))
        if request == uapi.DMA_BUF_SET_NAME_B:
            assert argument.endswith(b"\0") and len(argument) <= 32
            self.labels[fd] = argument[:-1]
            return argument
        if request == uapi.UDMABUF_CREATE:
            return self._create(*uapi.UDMABUF_CREATE_STRUCT.unpack(argument))
        if request == uapi.DMA_HEAP_IOCTL_ALLOC:
            return self._alloc(argument)
        assert request in (uapi.FS_IOC_FIEMAP, uapi.FS_IOC_GETFLAGS, uapi.FS_IOC_FSGETXATTR)
        return fcntl.ioctl(fd, request, argument)

    def _sync(self, fd: int, flags: int) -> bytes:
        if not flags & 3:
            raise OSError(self.undirected_sync_error, "no direction")
        what = "END" if flags & uapi.DMA_BUF_SYNC_END else "START"
        self.calls.append((fd, what, {1: "R", 2: "W", 3: "RW"}[flags & 3]))
        error = self.sync_errors.pop(0) if self.sync_errors else 0
        if error:
            raise OSError(error, os.strerror(error))
        return b""

    def _create(self, memfd: int, flags: int, offset: int, size: int) -> int:
        assert flags == uapi.UDMABUF_FLAGS_CLOEXEC
        if size > self.limit or (offset | size) % mmap.PAGESIZE or not size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.creates_left == 0:
            raise OSError(self.create_error, os.strerror(self.create_error))
        self.creates_left -= 1
        assert offset + size <= os.fstat(memfd).st_size
        return os.dup(memfd)

    def _alloc(self, argument: bytearray) -> int:
        size, _, flags, heap_flags = uapi.DMA_HEAP_ALLOC_STRUCT.unpack(argument)
        assert flags == os.O_RDWR | os.O_CLOEXEC and heap_flags == 0
        fd = os.memfd_create("heap")
        os.ftruncate(fd, size)
        argument[:] = uapi.DMA_HEAP_ALLOC_STRUCT.pack(size, fd, flags, 0)
        return 0

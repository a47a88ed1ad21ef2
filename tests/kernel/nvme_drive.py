"""The drives of the tests of NVMe passthrough: references go by the block device and O_DIRECT."""

import mmap
import os
from dataclasses import dataclass

import pytest

from tests.guards import needs
from tests.support import drop_cache

everything = needs("udmabuf", "dma_heap", "vgem", "hugepages", "nvme", "io_uring")


@dataclass(frozen=True)
class Drive:
    """A namespace by its block device and by its character device."""

    disk: str
    node: str
    block: int

    def read(self, size: int, offset: int = 0) -> bytes:
        fd = os.open(self.disk, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, size) as memory:
            done = os.preadv(fd, [memory], offset)
            os.close(fd)
            return memory[:done]

    def write(self, data: bytes, offset: int = 0) -> None:
        fd = os.open(self.disk, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, len(data)) as memory:
            memory[:] = data
            assert os.pwritev(fd, [memory], offset) == len(data)
        os.close(fd)

    @property
    def size(self) -> int:
        fd = os.open(self.disk, os.O_RDONLY)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)


@pytest.fixture(scope="module", params=[("DMABUF_TEST_NVME0", 512), ("DMABUF_TEST_NVME1", 4096)])
def drive(request):
    name, block = request.param
    disk = os.environ[name]
    fd = os.open(disk, os.O_RDWR)
    drop_cache(fd)
    os.close(fd)
    return Drive(disk, disk.replace("/nvme", "/ng"), block)

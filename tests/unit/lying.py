"""An engine whose full-length completions do not mean that the bytes arrived."""

import mmap
import os

import dmabuf
from dmabuf import Route
from dmabuf.memory import Buffer, Slab
from tests import emulation
from tests.support import pattern


class Lying(dmabuf.Engine):
    """An engine that emulates the native route, and spoils the result of each job by `fault`.

    `fault(right, before)` returns the final content of the job's single range, from the right
    content and the content before the job. It is called for jobs on the routes in `routes`.
    """

    fault = None
    routes = (Route.NATIVE,)

    def __init__(self, **how):
        with emulation.native():
            super().__init__(**how)

    def run(self, job):
        if self.fault is None or job.route not in self.routes:
            return super().run(job)
        file_offset, offset, size = job.segments[0:3]
        path = os.readlink(f"/proc/self/fd/{job.core.fd}")
        if job.core.direction == emulation.core.lib.DMB_WRITE:
            before = os_pread(path, size, file_offset)
            job = super().run(job)
            right = content(job.buffer)[offset : offset + size]
            os_pwrite(path, self.fault(right, before), file_offset)
        else:
            before = content(job.buffer)[offset : offset + size]
            job = super().run(job)
            wrong = self.fault(os_pread(path, size, file_offset), before)
            os.pwrite(job.buffer.slabs[0].fd, wrong, offset)
        return job


def os_pread(path, size, offset):
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def os_pwrite(path, data, offset):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def content(buffer):
    """Return the bytes of a Buffer, read from its dma-bufs, whether the CPU can map it or not."""
    return b"".join(os.pread(slab.fd, slab.size, 0) for slab in buffer.slabs)


def dma_buf(*sizes, exporter="fake", mapped=True, writable=True):
    """Return a Buffer of one slab of each size, which passes for dma-bufs.

    The CPU can map it, or not, as far as anyone can tell.
    """
    slabs, start = [], 0
    for size in sizes:
        fd = os.memfd_create("dma-buf")
        os.ftruncate(fd, size)
        slabs.append(Slab(fd, start, size))
        start += size
    return Buffer(
        slabs,
        mmap.mmap(slabs[0].fd, sizes[0]) if mapped else None,
        exporter=exporter,
        reason="a test",
        map_refusal=None if mapped else "not by the CPU",
        writable=writable,
    )


def nothing(right, before):
    return before


def zeros(right, before):
    return bytes(len(right))


def foreign(right, before):
    return pattern(len(right), 0xF0E)


def shifted(right, before):
    return right[512:] + right[:512]


def last_byte(right, before):
    return right[:-1] + bytes([right[-1] ^ 0xFF])

"""An engine on which a full-length completion does not mean that the bytes arrived."""

import mmap
import os

import dmabuf
from dmabuf import Route
from dmabuf._ffi import lib
from dmabuf.buffer import Buffer, Slab
from tests.support import pattern


class Lying(dmabuf.Engine):
    """Emulates the native route, runs each job, and then lets `fault` undo what it did.

    `fault(right, before)` answers what the job's one range holds in the end: `right` is what it
    should, `before` what it held when the job began. It is asked for the routes in `routes`.
    """

    _flags = lib.DMB_RING_EMULATE_NATIVE
    fault = None
    routes = (Route.NATIVE,)

    def run(self, job):
        lies = self.fault is not None and job.route in self.routes
        if not lies:
            return super().run(job)
        file_offset, offset, size = job.segments[0:3]
        path = os.readlink(f"/proc/self/fd/{job.fd}")
        before = os_pread(path, size, file_offset) if job.write else content(job.buffer)
        before = before if job.write else before[offset : offset + size]
        outcome = super().run(job)
        if job.write:
            wrong = self.fault(content(job.buffer)[offset : offset + size], before)
            os_pwrite(path, wrong, file_offset)
        else:
            wrong = self.fault(os_pread(path, size, file_offset), before)
            os.pwrite(job.buffer.slabs[0].fd, wrong, offset)
        return outcome


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
    return b"".join(os.pread(slab.fd, slab.size, 0) for slab in buffer.slabs)


def dma_buf(size, *, exporter="fake", mapped=True):
    """A Buffer that the CPU can map, or not, as far as anyone can tell."""
    fd = os.memfd_create("dma-buf")
    os.ftruncate(fd, size)
    memory = mmap.mmap(fd, size) if mapped else None
    refusal = None if mapped else "not by the CPU"
    return Buffer(
        [Slab(fd, 0, size)], memory, exporter=exporter, reason="a test", map_refusal=refusal
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

"""Files that the server reads natively for a client that may read the file and not its disk.

A native read goes past the filesystem, which may give blocks of the file to another file meanwhile.
That is noticed after the read only, and until then the memory has the other file's bytes. So the
server reads into new memory that no other process has. The client gets the memory if the file was
the same before and after the read and has filled the memory; otherwise the memory is given up.

The client sends the descriptor that it has opened for reading, as the proof that it may. The server
opens the file behind it again, because the client can change the flags of its own descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress

from dmabuf.errors import RouteUnavailable
from dmabuf.kernel import files
from dmabuf.store.grant import of_dmabufs
from dmabuf.store.memory import Memory
from dmabuf.store.protocol import Loaded, Refusal

__all__ = ["load", "why_not"]


def load(memory: Memory, fd: int, file_offset: int, size: int) -> Loaded:
    """Fill new memory with `size` bytes of a client's file, read through the file's block device.

    `why_not` has no objection to the descriptor.

    Raises:
        Refusal: why that is impossible. The memory may have bytes of other files then, and must be
            given up.
    """
    from dmabuf.transfer import Route, open  # noqa: A004 - few servers need it

    if not memory.slabs:
        text = f"the server's new memory is a memfd, which is not a dma-buf: {memory.reason}"
        raise Refusal(errno.EOPNOTSUPP, text)
    try:
        own = _opened_again(fd)
        try:
            with of_dmabufs([os.dup(slab) for slab in memory.slabs]) as buffer, open(own) as file:
                done = file.read_into(
                    buffer, size, file_offset=file_offset, route=Route.NATIVE, require="zero-copy"
                )
        finally:
            os.close(own)
    except RouteUnavailable as error:
        raise Refusal(errno.EOPNOTSUPP, error.reason) from None
    except OSError as error:
        text = f"the server reads the file: {error.strerror or error}"
        raise Refusal(error.errno or errno.EIO, text) from None
    if done.nbytes != size:
        text = f"the file has {done.nbytes} bytes from offset {file_offset} on, not {size}"
        raise Refusal(errno.ESTALE, text)
    return Loaded(
        done.reason,
        done.registered,
        done.registration,
        done.requests,
        done.reissues,
        done.copied,
        done.audited,
    )


def why_not(fd: int) -> Refusal | None:
    """Return why a client's descriptor is refused, without waiting; None if it is not.

    The descriptor has to be open for reading, and of a regular file whose filesystem is on a disk.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        return Refusal(errno.EBADF, "the descriptor is not open for reading")
    with suppress(OSError):  # such as EACCES, for a FUSE mount of another user
        if files.is_file_on_disk(fd):
            return None
    text = "the descriptor is not of a regular file of a filesystem on a disk"
    return Refusal(errno.EOPNOTSUPP, text)


def _opened_again(fd: int) -> int:
    """Open a client's file again for reading.

    Raises:
        Refusal: a program has a lease of the file.
        OSError: this server may not open it.
    """
    try:  # O_NONBLOCK: without waiting for the holder of a lease
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except BlockingIOError:
        raise Refusal(errno.EAGAIN, "a program has a write lease of the file (fcntl(2))") from None

"""A Buffer as a file that any program can use: as_file()."""

import errno
import fcntl
import io
import json
import os
import socket
import subprocess
import sys

from dmabuf import _uapi
from dmabuf._ffi import lib
from dmabuf.buffer import Buffer
from dmabuf.exporters import foreign

__all__ = ["BufferFile", "as_file", "of_descriptor"]

_IS_MEMFD = "the memory is a memfd, which is a file already"
_IS_DMABUF = "a dma-buf has no read(2) and write(2), so a process of its own copies for each call"
_HUGE_PAGES = "a memfd of huge pages has no write(2), so a process of its own copies for each call"
_ANOTHERS = (
    "the memfd is another user's and may not be opened again, so a process of its own copies for "
    "each call"
)


class BufferFile(io.FileIO):
    """A Buffer's bytes behind a descriptor that read(2), write(2) and lseek(2) work on.

    Made by :func:`as_file`. An :class:`io.FileIO`, unbuffered, whose ``fileno()`` is meant to be
    given to other programs; it is close-on-exec, and ``subprocess`` has ``pass_fds`` and ``stdin``
    for that. Closing it leaves the buffer open, and the other way round: the memory lives as long
    as either.
    """

    way: str
    """``"memfd"``: the memory file itself; or ``"fuse"``: a process copies for each call."""
    reason: str
    """A sentence: why this way."""


def as_file(buffer: Buffer, mode: str | None = None) -> BufferFile:
    """A descriptor of the buffer's bytes that works with read(2), write(2), lseek(2) and mmap(2).

    ``mode`` is "r", "w" or "rw" ("r+" and "b" are understood), by default all that the buffer
    allows. The file has a position of its own, at 0, and the buffer's size, which is fixed.

    Where the memory is a memfd, that is the file, at no cost. A dma-buf cannot be read(2), and a
    memfd of another user's cannot be opened again, so there FUSE makes one: a process of its own,
    which ends with the file's last descriptor, answers each call and copies, within
    DMA_BUF_IOCTL_SYNC. What mmap(2) gives then is docs/exec.md's to tell. ``BufferFile.way`` and
    ``reason`` say which it is.

    Raises OSError(EOPNOTSUPP) with the fix where FUSE is not to be had, or where the CPU cannot map
    the memory (io.UnsupportedOperation); PermissionError for writing where the buffer's descriptor
    is read-only, ValueError for an unknown mode, ClosedError after close.
    """
    if buffer._map_refusal is not None:
        raise io.UnsupportedOperation(errno.EOPNOTSUPP, buffer._map_refusal)
    read, write = buffer._check_mode(
        mode if mode is not None else "rw" if buffer.writable() else "r"
    )
    buffer._acquire()
    try:
        slabs = [(slab.fd, slab.size) for slab in buffer.slabs]
        return _make(slabs, buffer.is_dmabuf, read, write)
    finally:
        buffer._release()


def of_descriptor(fd: int, *, read_only: bool) -> BufferFile:
    """as_file() of anyone's dma-buf or memfd, with no more access than the descriptor has.

    Raises what from_fd() and as_file() raise.
    """
    if foreign.is_memfd(fd):
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        read, write = access != os.O_WRONLY, access != os.O_RDONLY and not read_only
        if not read and not write:
            raise PermissionError(errno.EACCES, f"descriptor {fd} is open for writing only")
        return _make([(fd, os.fstat(fd).st_size)], False, read, write)
    with foreign.from_fd(fd) as buffer:
        return as_file(buffer, "r" if read_only else None)


def _make(slabs: list[tuple[int, int]], is_dmabuf: bool, read: bool, write: bool) -> BufferFile:
    flags, mode = {
        (True, True): (os.O_RDWR, "rb+"),
        (True, False): (os.O_RDONLY, "rb"),
        (False, True): (os.O_WRONLY, "wb"),
    }[read, write]
    if is_dmabuf:
        reason = _IS_DMABUF
    elif write and _has_huge_pages(slabs[0][0]):
        reason = _HUGE_PAGES
    else:
        try:
            return _file(_reopened(slabs[0][0], flags), mode, "memfd", _IS_MEMFD)
        except PermissionError:
            reason = _ANOTHERS
    root = _start([(fd, size, is_dmabuf) for fd, size in slabs], write)
    try:  # O_DIRECT: else sendfile(2) and splice(2) see what a mapping once saw
        return _file(_reopened(root, flags | os.O_DIRECT), mode, "fuse", reason)
    finally:
        os.close(root)


def _reopened(fd: int, flags: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    except FileNotFoundError:
        raise OSError(
            errno.EOPNOTSUPP, "a file is opened through /proc/self/fd: mount /proc"
        ) from None


def _file(fd: int, mode: str, way: str, reason: str) -> BufferFile:
    file = BufferFile(fd, mode)  # asks for its size, without which no mapping would work
    file.way, file.reason = way, reason
    return file


def _has_huge_pages(memfd: int) -> bool:
    return _uapi.MEMORY_FILESYSTEMS.get(lib.dmb_statfs_type(memfd)) == "hugetlbfs"


_PROGRAM = """
import json, sys
sys.path, arguments = json.loads(sys.argv[1])
from dmabuf import _file_server
_file_server.main(*arguments)
"""


def _start(slabs: list[tuple[int, int, bool]], writable: bool) -> int:
    """Start the process behind a file by FUSE; the file, as O_PATH has it."""
    if not sys.executable:
        raise OSError(errno.EOPNOTSUPP, "no process can be started for it: sys.executable is empty")
    path = [os.path.dirname(os.path.dirname(__file__)), *map(os.path.abspath, sys.path)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = json.dumps([path, [theirs.fileno(), writable, slabs]])
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, arguments],
            pass_fds=[theirs.fileno(), *(fd for fd, _, _ in slabs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        ) as process:
            theirs.close()
            told, fds, _, _ = socket.recv_fds(ours, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    if fds:
        return fds[0]
    if told:
        raise OSError(*json.loads(told))
    raise OSError(
        errno.EOPNOTSUPP,
        f"the process behind it did not start: {sys.executable} ended with {process.returncode}",
    )

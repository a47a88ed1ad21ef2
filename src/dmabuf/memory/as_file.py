"""A Buffer as a file that any program can use: as_file()."""

import errno
import fcntl
import io
import os
import stat
import sys

from dmabuf._core import lib
from dmabuf.kernel import uapi
from dmabuf.memory import foreign
from dmabuf.memory.buffer import Buffer
from dmabuf.memory.foreign import from_fd

__all__ = ["BufferFile", "as_file", "descriptor_as_file"]

_IS_MEMFD = "the memory is a memfd, which is a file"
_IS_DMABUF = "a dma-buf has no read(2) or write(2), so another process copies for each call"
_HUGE_PAGES = "a memfd of huge pages has no write(2), so another process copies for each call"
_IS_DEVICE = "a device that is mapped has no read(2), so another process copies for each call"
_NOT_OURS = "this user may not open the memfd again, so another process copies for each call"
_SERVER = "dmabuf.mount.one_file"


class BufferFile(io.FileIO):
    """A Buffer's bytes behind a descriptor for read(2), write(2) and lseek(2).

    Made by :func:`as_file`. It is an unbuffered :class:`io.FileIO`; its ``fileno()`` is for other
    programs. The descriptor is close-on-exec: pass it with ``pass_fds`` or ``stdin`` of
    ``subprocess``. The file and the buffer can be closed in either order: the memory lives as long
    as one of them.
    """

    way: str
    """``"memfd"``: the memory file itself; ``"fuse"``: another process copies for each call."""
    reason: str
    """A sentence: why this way."""


def as_file(buffer: Buffer, mode: str | None = None) -> BufferFile:
    """Return a file with the buffer's bytes, for programs that know read(2) and write(2).

    ``mode`` is "r", "w" or "r+"; the default is all that the buffer allows. The file has its own
    position, 0 at first, and the buffer's size, which is fixed.

    A memfd is opened again, at no cost. For a dma-buf, device DAX, a memfd of huge pages that is
    written, and a memfd that this user may not open, a process of its own serves the file by FUSE
    and copies for each call, within DMA_BUF_IOCTL_SYNC; it ends with the file's last descriptor.
    docs/guides/programs.md describes the differences. ``BufferFile.way`` and ``BufferFile.reason``
    report the choice.

    Raises ImportError if FUSE is needed and pyfuse3 is missing (``pip install dmabuf[fuse]``),
    OSError(EOPNOTSUPP) with the fix if the kernel refuses FUSE, io.UnsupportedOperation if the CPU
    cannot map the memory or it is peer memory, PermissionError to write a read-only buffer,
    ValueError for another mode, ClosedError after close.
    """
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
    buffer.check_shareable()
    if mode is None:
        mode = "r+" if buffer.writable() else "r"
    with buffer.open(mode) as window:  # checks the mode, and that the memory can be mapped
        read, write = window.readable(), window.writable()
        slabs = [(slab.fd, slab.size) for slab in buffer.slabs]
        return _make(slabs, buffer.is_dmabuf, read, write)


def descriptor_as_file(fd: int, *, read_only: bool) -> BufferFile:
    """Return a file of any dma-buf or memfd, with no more access than the descriptor has.

    Raises what from_fd() and as_file() raise.
    """
    if foreign.is_memfd(fd):
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        read, write = access != os.O_WRONLY, access != os.O_RDONLY and not read_only
        if not read and not write:
            raise PermissionError(errno.EACCES, f"descriptor {fd} is open for writing only")
        return _make([(fd, os.fstat(fd).st_size)], False, read, write)
    with from_fd(fd) as buffer:
        return as_file(buffer, "r" if read_only else None)


def _make(slabs: list[tuple[int, int]], is_dmabuf: bool, read: bool, write: bool) -> BufferFile:
    flags, mode = {
        (True, True): (os.O_RDWR, "rb+"),
        (True, False): (os.O_RDONLY, "rb"),
        (False, True): (os.O_WRONLY, "wb"),
    }[read, write]
    if is_dmabuf:
        reason = _IS_DMABUF
    elif stat.S_ISCHR(os.fstat(slabs[0][0]).st_mode):
        reason = _IS_DEVICE
    elif write and _has_huge_pages(slabs[0][0]):
        reason = _HUGE_PAGES
    else:
        try:
            return _file(_reopened(slabs[0][0], flags), mode, "memfd", _IS_MEMFD)
        except PermissionError:
            reason = _NOT_OURS
    root = serve_by_fuse([(fd, size, is_dmabuf) for fd, size in slabs], write)
    try:  # O_DIRECT: without it sendfile(2) and splice(2) read a stale page cache
        return _file(_reopened(root, flags | os.O_DIRECT), mode, "fuse", reason)
    finally:
        os.close(root)


def _reopened(fd: int, flags: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    except FileNotFoundError:
        text = "as_file: /proc/self/fd is missing; mount /proc"
        raise OSError(errno.EOPNOTSUPP, text) from None


def _file(fd: int, mode: str, way: str, reason: str) -> BufferFile:
    file = BufferFile(fd, mode)
    file.way, file.reason = way, reason
    return file


def _has_huge_pages(memfd: int) -> bool:
    return uapi.MEMORY_FILESYSTEMS.get(lib.dmb_statfs_type(memfd)) == "hugetlbfs"


def serve_by_fuse(slabs: list[tuple[int, int, bool]], writable: bool) -> int:
    """Start the process behind a file by FUSE, and return the file as an O_PATH descriptor.

    The process is started by its module's name: this room imports nothing of FUSE.
    """
    # Only this needs them, and they take long to load.
    import importlib.util
    import json
    import socket
    import subprocess

    if importlib.util.find_spec("pyfuse3") is None:
        raise ImportError("as_file: pyfuse3 is not installed; pip install 'dmabuf[fuse]'")
    if not sys.executable:
        text = "as_file: cannot start a process: sys.executable is empty"
        raise OSError(errno.EOPNOTSUPP, text)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = json.dumps([theirs.fileno(), writable, slabs])
        with subprocess.Popen(
            [sys.executable, "-P", "-m", _SERVER, arguments],
            pass_fds=[theirs.fileno(), *(fd for fd, _, _ in slabs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        ) as process:
            theirs.close()
            reply, fds, _, _ = socket.recv_fds(ours, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    if fds:
        return fds[0]
    if reply:
        raise OSError(*json.loads(reply))
    text = f"as_file: {sys.executable} -m {_SERVER} ended with status {process.returncode}"
    raise OSError(errno.EOPNOTSUPP, text)

"""The process behind a file of :func:`dmabuf.as_file` by FUSE: ``python -m dmabuf.mount.one_file``.

It is a program of its own rather than a fork, so that it holds the buffer's descriptors and nothing
else of its starter's: no memory, no other file, no lock. It is nobody's child and in a session of
its own, so a Ctrl-C at the terminal ends the program that uses the file first.

The file is the root of a FUSE filesystem, which is mounted on a regular file in a mount namespace
of this process, and detached at once. So it has no path, and it ends with its last descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import stat
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator

import pyfuse3
import trio

from dmabuf.memory import Buffer, Slab, from_fd
from dmabuf.mount.access import wait_for_devices
from dmabuf.mount.operations import fuse_errors

_BLOCK = 4096
_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # include/uapi/linux/sched.h
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18  # include/uapi/linux/mount.h
_MNT_DETACH = 2  # umount(2)


class OneFile(pyfuse3.Operations):
    """A filesystem that is one regular file of fixed size: the bytes of some buffers in a row."""

    enable_writeback_cache = False

    def __init__(self, buffers: list[Buffer], writable: bool) -> None:
        super().__init__()
        self._buffers, self._writable = buffers, writable
        self._starts = [sum(one.size for one in buffers[:at]) for at in range(len(buffers))]
        self._size = sum(buffer.size for buffer in buffers)
        self._changed_ns = time.time_ns()

    def _parts(self, offset: int, size: int) -> Iterator[tuple[Buffer, int, int]]:
        """Yield a buffer, an offset in it and a size for each buffer that a range touches."""
        at = bisect_right(self._starts, offset) - 1
        while size:
            buffer, start = self._buffers[at], offset - self._starts[at]
            part = min(size, buffer.size - start)
            yield buffer, start, part
            offset, size, at = offset + part, size - part, at + 1

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """stat(2)."""
        entry = pyfuse3.EntryAttributes()
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_ino, entry.st_nlink = inode, 1
        entry.st_mode = stat.S_IFREG | (0o600 if self._writable else 0o400)
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.st_size, entry.st_blocks, entry.st_blksize = self._size, self._size // 512, _BLOCK
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._changed_ns
        return entry

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """chmod(2) and chown(2) fail, and truncate(2) to another size; times are not kept."""
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_size and attr.st_size != self._size:
            raise pyfuse3.FUSEError(errno.EINVAL)
        return await self.getattr(inode, ctx)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """open(2); O_TRUNC changes nothing, as on a block device."""
        if not self._writable and flags & _ACCESS != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EACCES)
        return pyfuse3.FileInfo(fh=1, direct_io=True, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """read(2)."""
        with fuse_errors(_ignore):
            parts = []
            for buffer, start, part in self._parts(off, max(min(size, self._size - off), 0)):
                await wait_for_devices(buffer, "read", "as_file")
                parts.append(buffer.pread(part, start))
            return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """write(2): as much as fits."""
        if not self._writable:
            raise pyfuse3.FUSEError(errno.EBADF)
        if off >= self._size and buf:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        view = memoryview(buf)[: self._size - off]
        done = 0
        with fuse_errors(_ignore):
            for buffer, start, part in self._parts(off, len(view)):
                await wait_for_devices(buffer, "write", "as_file")
                buffer.pwrite(view[done : done + part], start)
                done += part
        self._changed_ns = time.time_ns()
        return done

    async def release(self, fh: int) -> None:
        """Do nothing."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the size of the file."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks, data.f_files, data.f_namemax = self._size // _BLOCK, 1, 255
        return data


def _ignore(text: str) -> None:
    """Drop an explanation: the process has no standard error."""


def _buffer(fd: int, size: int, is_dmabuf: bool, writable: bool) -> Buffer:
    if is_dmabuf:
        buffer = from_fd(fd)
        os.close(fd)
        return buffer
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
    return Buffer(
        [Slab(fd, 0, size)], memory, exporter="memfd", reason="as_file", is_dmabuf=False,
        writable=writable,
    )  # fmt: skip


def _enter_namespaces() -> bool:
    """Enter a mount namespace, in a user namespace if this user may not mount; return whether so.

    In the user namespace this user is 0: until the first stat(2) that is the owner of the file.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWNS) == 0:
        if libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None):
            raise _namespace_error(ctypes.get_errno())
        return False
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        raise _namespace_error(ctypes.get_errno())
    for name, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise _namespace_error(error.errno or errno.EPERM) from None
    return True


def _namespace_error(number: int) -> OSError:
    text = (
        f"as_file: no user namespace for FUSE: {os.strerror(number)}; be root, or allow them "
        "(sysctl user.max_user_namespaces)"
    )
    return OSError(errno.EOPNOTSUPP, text)


def _mount(operations: OneFile) -> int:
    """Mount the file, detach it, and return it as an O_PATH descriptor."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        text = (
            f"as_file: open /dev/fuse: {error.strerror}; as root: modprobe fuse, "
            "or give the user or container the device"
        )
        raise OSError(errno.EOPNOTSUPP, text) from None
    options = {"default_permissions", "fsname=dmabuf", "subtype=dmabuf", "nosuid", "nodev"}
    if not _enter_namespaces():
        options.add("allow_other")
    try:
        pyfuse3.init(operations, __file__, options)
    except RuntimeError:
        text = "as_file: mount FUSE: not permitted; a container needs the right to mount"
        raise OSError(errno.EOPNOTSUPP, text) from None
    root = os.open(__file__, os.O_PATH | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(__file__), _MNT_DETACH):
        number = ctypes.get_errno()
        raise OSError(errno.EOPNOTSUPP, f"as_file: umount2: {os.strerror(number)}")
    return root


def main(connection: int, writable: bool, slabs: list[tuple[int, int, bool]]) -> None:
    """Send the file over a socket, or the error, and serve it until its last descriptor closes.

    ``slabs`` are (descriptor, bytes, whether it is a dma-buf).
    """
    if os.fork():
        os._exit(0)  # the starter waits for this process only
    os.setsid()
    with socket.socket(fileno=connection) as starter:
        try:
            buffers = [_buffer(fd, size, is_dmabuf, writable) for fd, size, is_dmabuf in slabs]
            root = _mount(OneFile(buffers, writable))
        except Exception as error:
            number = getattr(error, "errno", None) or errno.EOPNOTSUPP
            text = getattr(error, "strerror", None) or f"as_file: {error!r}"
            starter.sendall(json.dumps([number, text]).encode())
            os._exit(1)
        socket.send_fds(starter, [b"[]"], [root])
        os.close(root)
    trio.run(pyfuse3.main)
    os._exit(0)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))

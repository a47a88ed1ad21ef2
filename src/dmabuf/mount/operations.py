"""The requests of the kernel (fuse(4)), answered with the files of a store.

Each request is a task of one event loop. What may take long runs in a thread, and what waits for a
device waits in its task; both delay the requests for the same file only, by the file's lock.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import pyfuse3
import trio

from dmabuf.errors import ClosedError
from dmabuf.mount.access import wait_for_devices
from dmabuf.mount.files import File, Files

log = logging.getLogger("dmabuf")

_EXPLAINED = {
    errno.EEXIST, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.ETIMEDOUT,
}  # fmt: skip
_BLOCK = 4096
_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


@contextmanager
def fuse_errors(tell: Callable[[str], None]) -> Iterator[None]:
    """Raise every error as a FUSEError; ``tell`` gets the text where the errno alone is unclear."""
    try:
        yield
    except pyfuse3.FUSEError:
        raise
    except OSError as error:
        number = error.errno or errno.EIO
        if isinstance(error, io.UnsupportedOperation):
            number = error.errno or errno.EOPNOTSUPP
        if isinstance(error, ConnectionError):
            number = errno.EIO
        if number in _EXPLAINED:
            name = "" if error.filename is None else f"{error.filename}: "
            tell(f"{name}{error.strerror or error}")
        raise pyfuse3.FUSEError(number) from None
    except MemoryError:
        raise pyfuse3.FUSEError(errno.ENOMEM) from None
    except (ClosedError, BufferError) as error:
        tell(str(error))
        raise pyfuse3.FUSEError(errno.EIO) from None
    except Exception:  # a bug here fails one request, not the mount
        log.exception("dmabuf mount: a request")
        raise pyfuse3.FUSEError(errno.EIO) from None


class _Handle(NamedTuple):
    file: File
    write: bool


def _refused(number: int) -> Any:
    async def refuse(self: object, *arguments: object) -> None:
        raise pyfuse3.FUSEError(number)

    return refuse


class Operations(pyfuse3.Operations):
    """The requests; ``shared`` is whether every user may create files."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    # There is one directory of regular files with one name each.
    mkdir: Any = _refused(errno.EPERM)
    mknod: Any = _refused(errno.EPERM)
    symlink: Any = _refused(errno.EPERM)
    link: Any = _refused(errno.EPERM)
    setxattr: Any = _refused(errno.EOPNOTSUPP)
    removexattr: Any = _refused(errno.EOPNOTSUPP)

    def __init__(self, files: Files, *, shared: bool, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._files, self._tell = files, tell
        self._mode = stat.S_IFDIR | (0o1777 if shared else 0o700)
        self._handles: dict[int, _Handle] = {}
        self._listings: dict[int, list[tuple[str, File]]] = {}
        self._next = 0
        self._changed_ns = time.time_ns()

    def _errors(self) -> Any:
        return fuse_errors(self._tell)

    def _file(self, ino: int) -> File:
        try:
            return self._files.by_inode(ino)
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    @asynccontextmanager
    async def _holding(self, *names: str) -> AsyncIterator[list[File]]:
        """Hold the locks of the known files of some names, which keep their names meanwhile."""
        while True:
            held = {file for name in names if (file := self._files.known(name)) is not None}
            async with AsyncExitStack() as stack:
                for file in sorted(held, key=lambda file: file.ino):
                    await stack.enter_async_context(file.lock)
                now = {file for name in names if (file := self._files.known(name)) is not None}
                if now == held:
                    yield list(held)
                    return

    # Attributes.

    def _entry(self, file: File) -> pyfuse3.EntryAttributes:
        status, accessed, modified = file.status, file.accessed_ns, file.modified_ns
        entry = pyfuse3.EntryAttributes()
        # The kernel caches nothing: other clients of the store change it without notice.
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_ino = file.ino
        entry.st_mode = stat.S_IFREG | status.mode
        entry.st_nlink = 0 if file.name is None else 1
        entry.st_uid, entry.st_gid = status.uid, status.gid
        entry.st_size, entry.st_blocks = file.length, file.memory // 512
        entry.st_blksize = 1 << 20
        entry.st_atime_ns = status.accessed_ns if accessed is None else accessed
        entry.st_mtime_ns = status.modified_ns if modified is None else modified
        entry.st_ctime_ns = max(status.changed_ns, modified or 0)
        return entry

    def _directory(self) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_ino, entry.st_mode, entry.st_nlink = pyfuse3.ROOT_INODE, self._mode, 2
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._changed_ns
        return entry

    def _found(self, file: File) -> pyfuse3.EntryAttributes:
        file.lookups += 1
        return self._entry(file)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name."""
        if name in (b".", b".."):
            return self._directory()
        with self._errors():
            return self._found(self._files.lookup(_name(name)))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Drop lookups."""
        for ino, lookups in inode_list:
            self._files.forget(ino, lookups)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """stat(2)."""
        if inode == pyfuse3.ROOT_INODE:
            return self._directory()
        with self._errors():
            file = self._file(inode)
            self._files.look(file)
            return self._entry(file)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """chmod(2), chown(2), truncate(2), utimensat(2)."""
        if inode == pyfuse3.ROOT_INODE:
            raise pyfuse3.FUSEError(errno.EPERM)
        file = self._file(inode)
        with self._errors():
            async with file.lock:
                if fields.update_size:
                    await self._truncate(file, attr.st_size)
                if fields.update_mode:
                    self._files.chmod(file, stat.S_IMODE(attr.st_mode) & 0o777)
                if fields.update_uid or fields.update_gid:
                    uid = attr.st_uid if fields.update_uid else file.status.uid
                    gid = attr.st_gid if fields.update_gid else file.status.gid
                    self._files.chown(file, uid, gid)
                if fields.update_atime or fields.update_mtime:
                    self._files.utime(
                        file,
                        attr.st_atime_ns if fields.update_atime else None,
                        attr.st_mtime_ns if fields.update_mtime else None,
                    )
            self._files.look(file)
            return self._entry(file)

    async def _truncate(self, file: File, length: int) -> None:
        self._files.open(file, write=True)
        try:
            await self._resize(file, length)
        finally:
            await self._release(file)

    async def _release(self, file: File) -> None:
        try:
            if file.handles == 1:
                await trio.to_thread.run_sync(self._files.publish, file)
        except OSError:  # the last close(2) has reported it
            pass
        finally:
            self._files.release(file)

    async def _resize(self, file: File, length: int) -> None:
        if file.buffer is not None:
            await wait_for_devices(file.buffer, "write", file.status.name)
        await trio.to_thread.run_sync(self._files.resize, file, length)

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return a fact about the buffer."""
        if inode != pyfuse3.ROOT_INODE and name.startswith(b"user.dmabuf."):
            with self._errors():
                found = self._files.extended(self._file(inode)).get(os.fsdecode(name))
            if found is not None:
                return found
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """Return the names of the facts."""
        if inode == pyfuse3.ROOT_INODE:
            return []
        with self._errors():
            return [os.fsencode(name) for name in self._files.extended(self._file(inode))]

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return how full the store is."""
        with self._errors():
            usage = self._files.usage()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = usage.max_memory // _BLOCK
        data.f_bfree = data.f_bavail = (usage.max_memory - usage.charged) // _BLOCK
        data.f_files = usage.max_names
        data.f_ffree = data.f_favail = usage.max_names - usage.names
        data.f_namemax = 255
        return data

    # The directory.

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Take a listing of the names."""
        with self._errors():
            listing = self._files.listing()
        for _, file in listing:
            file.lookups += 1  # until releasedir
        self._next += 1
        self._listings[self._next] = listing
        return self._next

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Return as many names as fit."""
        listing = self._listings[fh]
        for index in range(start_id, len(listing) + 2):
            if index < 2:
                entry, name = self._directory(), (b".", b"..")[index]
            else:
                file = listing[index - 2][1]
                entry, name = self._entry(file), os.fsencode(listing[index - 2][0])
            if not pyfuse3.readdir_reply(token, name, entry, index + 1):
                return
            if index >= 2:
                file.lookups += 1

    async def releasedir(self, fh: int) -> None:
        """Drop the listing."""
        for _, file in self._listings.pop(fh):
            self._files.forget(file.ino, 1)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Do nothing: the store has every name that is published."""

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """open(2) with O_CREAT of a missing name."""
        with self._errors():
            try:
                file = self._files.create(_name(name), mode & ~ctx.umask, ctx.uid, ctx.gid)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                # Another client made it after the kernel's lookup; the kernel looks again.
                raise pyfuse3.FUSEError(errno.ESTALE) from None
            self._changed_ns = time.time_ns()
            return self._opened(file, flags), self._found(file)

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """unlink(2)."""
        with self._errors():
            async with self._holding(_name(name)):
                self._files.unlink(_name(name), ctx.uid)
            self._changed_ns = time.time_ns()

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """rename(2), and renameat2(2) with RENAME_NOREPLACE. A new file is published first."""
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise pyfuse3.FUSEError(errno.EINVAL)
        old, new = _name(name_old), _name(name_new)
        with self._errors():
            async with self._holding(old, new) as files:
                for file in files:
                    if file.number is None:
                        await trio.to_thread.run_sync(self._files.publish, file)
                self._files.rename(old, new, ctx.uid, replace=not flags)
            self._changed_ns = time.time_ns()

    # An open file.

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """open(2) of an existing file."""
        file = self._file(inode)
        write = flags & _ACCESS != os.O_RDONLY
        with self._errors():
            async with file.lock:
                self._files.open(file, write=write or bool(flags & os.O_TRUNC))
                try:
                    if flags & os.O_TRUNC:
                        await self._resize(file, 0)
                    return self._opened(file, flags)
                except BaseException:
                    await self._release(file)
                    raise

    def _opened(self, file: File, flags: int) -> pyfuse3.FileInfo:
        self._next += 1
        self._handles[self._next] = _Handle(file, flags & _ACCESS != os.O_RDONLY)
        # No page cache: other clients write the same memory without notice.
        return pyfuse3.FileInfo(fh=self._next, direct_io=True, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """read(2)."""
        file = self._handles[fh].file
        with self._errors():
            async with file.lock:
                if file.buffer is not None:
                    await wait_for_devices(file.buffer, "read", file.status.name)
                return file.read(off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """write(2)."""
        file = self._handles[fh].file
        with self._errors():
            async with file.lock:
                if not file.fits(off + len(buf)):
                    await trio.to_thread.run_sync(self._files.move_to_spool, file)
                if file.buffer is not None:
                    await wait_for_devices(file.buffer, "write", file.status.name)
                file.write(off, buf)
        return len(buf)

    async def flush(self, fh: int) -> None:
        """close(2): the store has everything when it returns."""
        handle = self._handles[fh]
        if handle.write:
            await self._publish(handle.file)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """fsync(2): the store has everything when it returns."""
        await self._publish(self._handles[fh].file)

    async def _publish(self, file: File) -> None:
        with self._errors():
            async with file.lock:
                await trio.to_thread.run_sync(self._files.publish, file)

    async def release(self, fh: int) -> None:
        """Drop an open file."""
        file = self._handles.pop(fh).file
        with self._errors():
            async with file.lock:
                await self._release(file)


def _name(name: bytes) -> str:
    """Return the name in the form that the store uses. Raises FUSEError."""
    if len(name) > 255:
        raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise pyfuse3.FUSEError(errno.EILSEQ) from None

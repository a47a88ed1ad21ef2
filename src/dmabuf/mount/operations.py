"""What the kernel asks of a file system (fuse(4)), answered by the files of a store.

Each request is a task of one event loop. What is quick is done in it; what waits for memory, for
fences or for a long copy does so aside, and holds up its own file alone.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import pyfuse3
import trio

from dmabuf.errors import ClosedError
from dmabuf.fence import Access
from dmabuf.mount.absent import Absent
from dmabuf.mount.content import Part
from dmabuf.mount.entries import entry_of, name_of
from dmabuf.mount.files import Files
from dmabuf.mount.node import Attributes, Node

log = logging.getLogger("dmabuf")

FENCE_SECONDS = 10.0
"""How long a read or write waits for the devices that use the memory, before it is ETIMEDOUT."""

_ASIDE_BYTES = 4 << 20  # making or copying more than this is done in a thread
_TOLD = {
    errno.EBUSY, errno.EEXIST, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.ETIMEDOUT,
}  # fmt: skip
_BLOCK = 4096
_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


class Handle(NamedTuple):
    """An open file."""

    node: Node
    write: bool


class Operations(Absent):
    """The requests. ``tell`` gets the sentence behind an errno that says too little."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, files: Files, *, shared: bool, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._files, self._tell = files, tell
        self._mode = stat.S_IFDIR | (0o1777 if shared else 0o700)
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, list[tuple[str, Node]]] = {}
        self._next = 0
        self._busy: dict[Node, trio.Event] = {}
        self._changed_ns = time.time_ns()

    # Errors.

    @contextmanager
    def _refusing(self) -> Iterator[None]:
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
            if number in _TOLD:
                name = "" if error.filename is None else f"{error.filename}: "
                self._tell(f"{name}{error.strerror or error}")
            raise pyfuse3.FUSEError(number) from None
        except MemoryError:
            raise pyfuse3.FUSEError(errno.ENOMEM) from None
        except (ClosedError, BufferError) as error:
            self._tell(str(error))
            raise pyfuse3.FUSEError(errno.EIO) from None
        except Exception:  # a mistake of ours is to fail one request, and not the mount
            log.exception("dmabuf mount: a request")
            raise pyfuse3.FUSEError(errno.EIO) from None

    # One file at a time.

    @contextmanager
    def _alone(self, node: Node) -> Iterator[None]:
        event = self._busy[node] = trio.Event()
        node.aside = True
        try:
            yield
        finally:
            node.aside = False
            del self._busy[node]
            event.set()

    async def _settled(self, node: Node) -> None:
        while node in self._busy:
            await self._busy[node].wait()

    async def _names_settled(self, *names: str) -> None:
        """Until no file of these names is changed aside, which ends under the name it began with.

        What is done to the names is then to be done without an await.
        """
        while node := next((busy for busy in self._busy if busy.name in names), None):
            await self._settled(node)

    async def _aside(self, node: Node, end: int, work: Callable[[], None]) -> None:
        """Do what changes a file as a whole, up to ``end`` or more.

        In a thread, where it touches much, or asks for memory: that waits for all else being made.
        """
        await self._settled(node)
        if node.growing is None and node.fits(end) and end <= _ASIDE_BYTES:
            work()
            return
        with self._alone(node):
            await trio.to_thread.run_sync(work)

    async def _ready(self, node: Node, direction: Access, end: int = 0) -> None:
        """Until a file has room, and no thread and no device changes it: for what has no await."""
        waited = True
        while waited:
            await self._settled(node)
            if not node.fits(end):
                await self._aside(node, end, partial(self._files.make_room, node, end))
            waited = await self._fences(node, direction)

    def _node(self, ino: int) -> Node:
        try:
            return self._files.node(ino)
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    # Attributes.

    def _directory(self) -> pyfuse3.EntryAttributes:
        entry = entry_of(
            Attributes(
                pyfuse3.ROOT_INODE, 2, 0, os.geteuid(), os.getegid(), 0, 0,
                self._changed_ns, self._changed_ns, self._changed_ns,
            )
        )  # fmt: skip
        entry.st_mode = self._mode
        return entry

    def _found(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = entry_of(node.attributes())
        node.lookups += 1
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name."""
        if name in (b".", b".."):
            return self._directory()
        with self._refusing():
            return self._found(self._files.lookup(name_of(name)))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel lets go of inodes."""
        for ino, lookups in inode_list:
            self._files.forget(ino, lookups)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """stat(2)."""
        if inode == pyfuse3.ROOT_INODE:
            return self._directory()
        with self._refusing():
            return entry_of(self._files.attributes(self._node(inode)))

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
        node = self._node(inode)
        with self._refusing():
            if fields.update_size:
                await self._resize(node, attr.st_size)
            await self._settled(node)
            if fields.update_mode:
                self._files.chmod(node, stat.S_IMODE(attr.st_mode))
            if fields.update_uid or fields.update_gid:
                status = node.status
                self._files.chown(
                    node,
                    attr.st_uid if fields.update_uid else status.uid,
                    attr.st_gid if fields.update_gid else status.gid,
                )
            if fields.update_atime or fields.update_mtime:
                self._files.utime(
                    node,
                    attr.st_atime_ns if fields.update_atime else None,
                    attr.st_mtime_ns if fields.update_mtime else None,
                )
            return entry_of(self._files.attributes(node))

    async def _resize(self, node: Node, length: int) -> None:
        await self._settled(node)
        self._files.open(node, write=True)
        try:
            if length > node.size:
                await self._ready(node, "write")
            await self._aside(node, length, partial(self._files.resize, node, length))
            await self._aside(node, 0, partial(self._files.settle_if_whole, node))
        finally:
            await self._release(node)

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """One of what the store says of a buffer."""
        if inode != pyfuse3.ROOT_INODE and name.startswith(b"user.dmabuf."):
            with self._refusing():
                found = self._files.extended(self._node(inode)).get(os.fsdecode(name))
            if found is not None:
                return found
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """The names of all of it."""
        if inode == pyfuse3.ROOT_INODE:
            return []
        with self._refusing():
            return [os.fsencode(name) for name in self._files.extended(self._node(inode))]

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """How full the store is."""
        with self._refusing():
            usage = self._files.usage()
        told = pyfuse3.StatvfsData()
        told.f_bsize = told.f_frsize = _BLOCK
        told.f_blocks = usage.max_memory // _BLOCK
        told.f_bfree = told.f_bavail = (usage.max_memory - usage.charged) // _BLOCK
        told.f_files = usage.max_names
        told.f_ffree = told.f_favail = usage.max_names - usage.names
        told.f_namemax = 255
        return told

    # The directory.

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """The names as they are now."""
        with self._refusing():
            listing = self._files.listing()
        for _, node in listing:
            node.lookups += 1  # until releasedir
        self._next += 1
        self._listings[self._next] = listing
        return self._next

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """As many of them as go into the answer."""
        listing = self._listings[fh]
        for index in range(start_id, len(listing) + 2):
            if index < 2:
                if not pyfuse3.readdir_reply(
                    token, (b".", b"..")[index], self._directory(), index + 1
                ):
                    return
                continue
            name, node = listing[index - 2]
            entry = entry_of(node.attributes())
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, index + 1):
                return
            node.lookups += 1

    async def releasedir(self, fh: int) -> None:
        """It was read."""
        for _, node in self._listings.pop(fh):
            self._files.forget(node.ino, 1)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Names are the store's as soon as they are there."""

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """open(2) with O_CREAT of what is not there."""
        with self._refusing():
            try:
                node = self._files.create(name_of(name), mode & ~ctx.umask, ctx.uid, ctx.gid)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                # Another client made it since the kernel looked, which looks again now.
                raise pyfuse3.FUSEError(errno.ESTALE) from None
            self._files.open(node, write=True)
            self._changed_ns = time.time_ns()
            return self._opened(node, flags), self._found(node)

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """unlink(2)."""
        with self._refusing():
            await self._names_settled(name_of(name))
            self._files.unlink(name_of(name), ctx.uid)
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
        """rename(2), and renameat2(2) with RENAME_NOREPLACE."""
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise pyfuse3.FUSEError(errno.EINVAL)
        old, new = name_of(name_old), name_of(name_new)
        with self._refusing():
            await self._names_settled(old, new)
            while node := self._files.coming(old) or self._files.coming(new):
                await self._aside(node, 0, partial(self._files.settle, node))
                await self._names_settled(old, new)
            self._files.rename(old, new, ctx.uid, replace=not flags)
            self._changed_ns = time.time_ns()

    # An open file.

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """open(2) of what is there."""
        node = self._node(inode)
        write = flags & _ACCESS != os.O_RDONLY
        await self._settled(node)
        with self._refusing():
            self._files.open(node, write=write or bool(flags & os.O_TRUNC))
            try:
                if flags & os.O_TRUNC:
                    await self._aside(node, 0, partial(self._files.resize, node, 0))
                return self._opened(node, flags)
            except BaseException:
                await self._release(node)
                raise

    def _opened(self, node: Node, flags: int) -> pyfuse3.FileInfo:
        self._next += 1
        self._handles[self._next] = Handle(node, flags & _ACCESS != os.O_RDONLY)
        # Past the page cache, since others write the same memory without a word.
        return pyfuse3.FileInfo(fh=self._next, direct_io=True, keep_cache=False)

    async def read(  # type: ignore[override]  # it takes any buffer
        self, fh: int, off: int, size: int
    ) -> Part:
        """read(2)."""
        node = self._handles[fh].node
        with self._refusing():
            await self._ready(node, "read")
            return node.read(off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """write(2)."""
        node = self._handles[fh].node
        with self._refusing():
            await self._ready(node, "write", off + len(buf))
            node.write(off, buf)
            self._files.wrote(node)
        return len(buf)

    async def _fences(self, node: Node, direction: Access) -> bool:
        """Wait for the devices that write the memory, or for all that use it; whether it had to."""
        buffer = node.buffer
        if buffer is None or not buffer.is_dmabuf:
            return False
        try:
            buffer.wait(direction, 0)
            return False
        except TimeoutError:
            pass
        with trio.move_on_after(FENCE_SECONDS) as scope:
            for slab in buffer.slabs:
                own = os.dup(slab.fd)
                try:
                    wait = (
                        trio.lowlevel.wait_readable
                        if direction == "read"
                        else trio.lowlevel.wait_writable
                    )
                    await wait(own)
                finally:
                    os.close(own)
        if scope.cancelled_caught:
            text = f"a device has not done with it for {FENCE_SECONDS:.0f} s"
            raise OSError(errno.ETIMEDOUT, text, node.name)
        return True

    async def flush(self, fh: int) -> None:
        """close(2): what was written is the store's when it returns."""
        handle = self._handles[fh]
        if handle.write:
            await self._settle(handle.node)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """fsync(2): likewise."""
        await self._settle(self._handles[fh].node)

    async def _settle(self, node: Node) -> None:
        with self._refusing():
            await self._aside(node, 0, partial(self._files.settle, node))

    async def release(self, fh: int) -> None:
        """The last descriptor of an open file is gone."""
        with self._refusing():
            await self._release(self._handles.pop(fh).node)

    async def _release(self, node: Node) -> None:
        await self._settled(node)
        try:
            if node.handles == 1:
                await self._aside(node, 0, partial(self._files.leave, node))
        finally:
            self._files.release(node)

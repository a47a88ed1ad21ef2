"""The files of a store, in terms of the store; nothing here is about FUSE.

A file whose size is not known yet is *spooled*: its content is in a temporary file. It becomes a
buffer when it is published: at its first fsync(2) or close(2), or when truncate(2) sets a size. A
write past the end of a buffer's memory moves the content back to the spool, and publishing then
makes a new buffer that replaces the old one under the same name.
"""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import BinaryIO, TypeVar

import trio

from dmabuf.memory import Buffer
from dmabuf.mount.access import zero
from dmabuf.mount.connections import Connections
from dmabuf.sizes import format_size
from dmabuf.store import Status, Usage

T = TypeVar("T")

_YES_NO = {True: "yes", False: "no", None: "unknown"}
_ATTRIBUTES: dict[str, Callable[[Status], object]] = {
    "user.dmabuf.exporter": lambda status: status.exporter,
    "user.dmabuf.in_use": lambda status: _YES_NO[status.in_use],
    "user.dmabuf.is_dmabuf": lambda status: "yes" if status.is_dmabuf else "no",
    "user.dmabuf.reason": lambda status: status.reason,
    "user.dmabuf.size": lambda status: status.size,
    "user.dmabuf.slabs": lambda status: status.slabs,
}
_COPIED = 8 << 20
_LATEST_NS = 2**63 - 1  # in the year 2262


@dataclass(eq=False)
class File:
    """A file of the mount.

    Its bytes are in ``spool``, or in ``buffer`` while it is open. ``number`` is the store's, None
    until it is published; ``name`` is None after it was removed. ``status`` is the store's last
    record of it. ``lock`` is held while its bytes or its name are used or changed.
    """

    ino: int
    name: str | None
    number: int | None
    status: Status
    length: int = 0
    lookups: int = 0
    handles: int = 0
    buffer: Buffer | None = None
    spool: BinaryIO | None = None
    lost: int | None = None
    """Its number when the store ended, which it still has if the store was restarted."""
    accessed_ns: int | None = None
    """A time that the store does not have yet; otherwise None."""
    modified_ns: int | None = None

    def __post_init__(self) -> None:
        self.lock = trio.Lock()

    @property
    def is_stored(self) -> bool:
        """Whether the store has it, as far as is known."""
        return self.name is not None and self.number is not None

    @property
    def memory(self) -> int:
        """The bytes that it takes."""
        return self.length if self.spool is not None else self.status.size

    def refresh(self, status: Status) -> None:
        """Take the store's record, unless it is older than what is written here."""
        if self.length == self.status.length and self.spool is None:
            self.length = status.length
        self.status = status

    def fits(self, end: int) -> bool:
        """Return whether bytes up to ``end`` fit where its content is now."""
        return self.spool is not None or end <= self._opened().size

    def read(self, offset: int, size: int) -> bytes:
        """Return at most ``size`` bytes; b"" past the end."""
        size = min(size, self.length - offset)
        if size <= 0:
            return b""
        if self.spool is not None:
            return os.pread(self.spool.fileno(), size, offset)
        return self._opened().pread(size, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes that fit; a gap before them is zeros."""
        if self.spool is not None:
            done = 0
            while done < len(data):
                done += os.pwrite(self.spool.fileno(), memoryview(data)[done:], offset + done)
        else:
            self.lengthen(offset)
            self._opened().pwrite(data, offset)
        self.length = max(self.length, offset + len(data))
        self.modified_ns = time.time_ns()

    def lengthen(self, length: int) -> None:
        """Zero the bytes of the buffer between the end and ``length``."""
        if length > self.length:
            zero(self._opened(), self.length, length)
            self.length = length

    def _opened(self) -> Buffer:
        if self.buffer is None:
            raise OSError(errno.ESTALE, "its memory is gone; open it again", self.status.name)
        return self.buffer


class Files:
    """The files of a store, for one mount; ``tell`` gets notes for the user.

    Methods raise OSErrors, EIO if the store has ended; the next call connects again. Not
    thread-safe; those that may take long may run in a thread while the file's lock is held.
    """

    def __init__(self, path: str, tell: Callable[[str], None]) -> None:
        self._connections = Connections(path, self._lost)
        self._tell = tell
        self._files: dict[int, File] = {}  # by inode number
        self._numbered: dict[int, File] = {}  # by the store's number
        self._new: dict[str, File] = {}  # not published yet
        self._inodes = itertools.count(2)  # 1 is the directory

    def _lost(self) -> None:
        """Forget the names of a store that has ended; what is spooled is new for the next."""
        for file in list(self._numbered.values()):
            name, file.lost, file.number = file.name, file.number, None
            if file.spool is None or name in self._new:
                file.name = None
            elif name is not None:
                self._new[name] = file
        self._numbered.clear()

    def close(self) -> None:
        """Publish what is spooled, and close everything."""
        for file in list(self._files.values()):
            with suppress(OSError):
                self.publish(file)
            self._close(file)
        self._connections.close()

    @staticmethod
    def _close(file: File) -> None:
        if file.spool is not None:
            file.spool.close()
            file.spool = None
        if file.buffer is not None:
            file.buffer.close()
            file.buffer = None

    # Names.

    def lookup(self, name: str) -> File:
        """Return the file of a name."""
        if name in self._new:
            return self._new[name]
        with self._connections.use() as store:
            return self._known(store.stat(name))

    def known(self, name: str) -> File | None:
        """Return the file of a name if it was looked up before, without asking the store."""
        if name in self._new:
            return self._new[name]
        return next((one for one in list(self._numbered.values()) if one.name == name), None)

    def listing(self) -> list[tuple[str, File]]:
        """Return every name and its file."""
        names = dict(self._new)
        with self._connections.use() as store:
            found = store.list()
        names.update((s.name, self._known(s)) for s in found if s.name not in names)
        return sorted(names.items())

    def _known(self, status: Status) -> File:
        file = self._numbered.get(status.number)
        if file is None:
            file = File(next(self._inodes), status.name, status.number, status, status.length)
            self._files[file.ino] = self._numbered[status.number] = file
        elif not file.lock.locked():
            file.name = status.name
            file.refresh(status)
        return file

    def by_inode(self, ino: int) -> File:
        """Return the file of an inode number. Raises KeyError."""
        return self._files[ino]

    def forget(self, ino: int, lookups: int) -> None:
        """Drop as many lookups of the kernel."""
        file = self._files.get(ino)
        if file is not None:
            file.lookups -= lookups
            self._drop_if_unused(file)

    def _drop_if_unused(self, file: File) -> None:
        if file.lookups <= 0 and not file.handles:
            self._files.pop(file.ino, None)
            if file.number is not None and self._numbered.get(file.number) is file:
                del self._numbered[file.number]

    def create(self, name: str, mode: int, uid: int, gid: int) -> File:
        """Return a new file, open and spooled."""
        with self._connections.use() as store:
            with suppress(FileNotFoundError):
                store.stat(name)
                raise OSError(errno.EEXIST, "a buffer of that name exists", name)
            usage = store.usage()
        if name in self._new:
            raise OSError(errno.EEXIST, "a file of that name exists", name)
        if usage.names + len(self._new) >= usage.max_names:
            raise OSError(
                errno.ENOSPC, f"the store is full: it holds {usage.max_names} names", name
            )
        now = time.time_ns()
        status = Status(name, 0, 0, mode & 0o777, uid, gid, now, now, now, now, "", "", 0, False, 0,
                        False, None)  # fmt: skip
        file = File(next(self._inodes), name, None, status, handles=1, modified_ns=now)
        file.spool = _spool()
        self._files[file.ino] = self._new[name] = file
        return file

    def unlink(self, name: str, uid: int) -> None:
        """Remove a name for a user; the file lives on while it is open."""
        file = self._new.get(name)
        if file is not None:
            _check_owner(file.status, uid)
            del self._new[name]
            file.name = None
            self._drop_if_unused(file)
            return
        with self._connections.use() as store:
            status = store.stat(name)
            _check_owner(status, uid)
            store.remove(name, number=status.number)
        self._lost_name(status.number)

    def _lost_name(self, number: int) -> None:
        file = self._numbered.get(number)
        if file is not None:
            file.name = None
            self._drop_if_unused(file)

    def rename(self, old: str, new: str, uid: int, *, replace: bool) -> None:
        """Rename a published file for a user, and replace a published file of the new name."""
        file = self.lookup(old)
        _check_owner(file.status, uid)
        if old == new:
            return
        with self._connections.use() as store:
            replaced = None
            with suppress(FileNotFoundError):
                there = store.stat(new)
                if replace:
                    _check_owner(there, uid)
                    replaced = there.number
            try:
                store.rename(old, new, replace=replaced or False, number=file.number)
            except FileExistsError:
                if not replace:
                    raise
                raise OSError(errno.ESTALE, "another client took the name", new) from None
        if replaced is not None:
            self._lost_name(replaced)
        file.name = new

    # A file.

    def look(self, file: File) -> None:
        """Refresh what is known of a file. Raises OSError(ESTALE) if its name is gone."""
        if not file.is_stored or file.lock.locked():
            return
        status = self._find(file)
        if status is not None:
            file.refresh(status)
        elif not file.handles:
            raise OSError(errno.ESTALE, "its name is gone", file.status.name)

    def _find(self, file: File) -> Status | None:
        """Return the store's record of a file's number, whatever other clients named it.

        None if they removed it; the file then has no name.
        """
        with self._connections.use() as store:
            while file.name is not None and file.number is not None:
                with suppress(FileNotFoundError):
                    status = store.stat(file.name)
                    if status.number == file.number:
                        return status
                found = (s.name for s in store.list() if s.number == file.number)
                file.name = next(found, None)
        return None

    def _request(self, file: File, request: Callable[[str, int], T]) -> T | None:
        """Make a request with a file's name and number; None if the file has no name any more."""
        while file.name is not None and file.number is not None:
            try:
                return request(file.name, file.number)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            self._find(file)
        return None

    def chmod(self, file: File, mode: int) -> None:
        """Set the mode."""
        with self._connections.use() as store:
            self._request(file, lambda name, number: store.chmod(name, mode, number=number))
        file.status = replace(file.status, mode=mode)

    def chown(self, file: File, uid: int, gid: int) -> None:
        """Set the owner and group."""
        with self._connections.use() as store:
            self._request(file, lambda name, number: store.chown(name, uid, gid, number=number))
        file.status = replace(file.status, uid=uid, gid=gid)

    def utime(self, file: File, accessed_ns: int | None, modified_ns: int | None) -> None:
        """Set the times; None keeps one."""
        if accessed_ns is not None:
            file.accessed_ns = min(max(accessed_ns, 0), _LATEST_NS)
        if modified_ns is not None:
            file.modified_ns = min(max(modified_ns, 0), _LATEST_NS)
        if file.spool is None:
            self._send(file)

    def extended(self, file: File) -> dict[str, bytes]:
        """Return the extended attributes; none before the file is published."""
        self.look(file)
        if file.number is None:
            return {}
        return {name: str(get(file.status)).encode() for name, get in _ATTRIBUTES.items()}

    def usage(self) -> Usage:
        """Return how full the store is."""
        with self._connections.use() as store:
            return store.usage()

    # Its bytes.

    def open(self, file: File, *, write: bool) -> None:
        """Open a file. A :meth:`release` belongs to each."""
        if file.spool is None and (file.buffer is None or (write and not file.buffer.writable())):
            mode = "r+" if write else "r"
            with self._connections.use() as store:
                opened = self._request(
                    file,
                    lambda name, number: store.open_with_status(name, mode, None, number=number),
                )
            if opened is None:
                raise OSError(errno.ESTALE, "its name is gone", file.status.name)
            if file.buffer is not None:
                file.buffer.close()
            file.buffer = opened[0]
            file.refresh(opened[1])
        file.handles += 1

    def release(self, file: File) -> None:
        """Close a file. What could not be published before, by :meth:`publish`, is dropped."""
        if file.handles == 1:
            if file.spool is not None:
                file.modified_ns = None
                file.length = file.status.length
                if file.number is None and file.name is not None:
                    self._new.pop(file.name, None)
                    file.name = None
            self._close(file)
        file.handles -= 1
        self._drop_if_unused(file)

    def resize(self, file: File, length: int) -> None:
        """Cut the content, or lengthen it with zeros. May take long.

        A spooled file that gets a size is published, so that others can open it.
        """
        before = file.length
        if not file.fits(length):
            self.move_to_spool(file)
        if file.spool is None:
            file.lengthen(length)
            file.length = length
        else:
            os.ftruncate(file.spool.fileno(), length)
            file.length = length
            if length:
                try:
                    self._publish_spooled(file)
                except OSError:
                    if before < length:
                        os.ftruncate(file.spool.fileno(), before)
                        file.length = before
                    raise
        file.modified_ns = time.time_ns()
        self._send(file)

    def move_to_spool(self, file: File) -> None:
        """Copy the content of a buffer to the spool, because it outgrows the memory."""
        buffer = file.buffer
        assert buffer is not None
        spool = _spool()
        try:
            for at in range(0, file.length, _COPIED):
                with buffer.map("r", at, min(_COPIED, file.length - at)) as view:
                    spool.write(view)
        except BaseException:
            spool.close()
            raise
        file.spool, file.buffer = spool, None
        buffer.close()
        if file.length:  # dd closes a new file once before it writes
            self._tell(
                f"{file.name or file.status.name}: outgrows its {format_size(buffer.size)} of "
                "memory and becomes a new buffer"
            )

    def publish(self, file: File) -> None:
        """Give the store everything it does not have yet of a file. May take long."""
        if file.spool is not None:
            self._publish_spooled(file)
        self._send(file)

    def _publish_spooled(self, file: File) -> None:
        """Make a spooled file a buffer under its name."""
        assert file.spool is not None
        if file.number is not None and (now := self._find(file)) is not None:
            file.status = now  # its mode and owner, which other clients may have changed
        if file.name is None:
            return
        wanted = file.status
        with self._connections.use("memory") as store:
            size = max(file.length, 1)
            buffer = store.create(None, size, mode=wanted.mode, trusted=True)
            try:
                _copy(file.spool, buffer, file.length)
                status: Status | None
                if file.number is None:
                    try:
                        status = store.link(buffer, file.name, replace=False, length=file.length)
                    except FileExistsError:
                        if file.lost is None:
                            raise
                        status = store.link(
                            buffer, file.name, replace=file.lost, length=file.length
                        )
                else:
                    status = self._request(
                        file,
                        lambda name, number: store.link(
                            buffer, name, replace=number, length=file.length
                        ),
                    )
            except BaseException:
                with suppress(OSError, ValueError):
                    store.discard(buffer)
                raise
            if status is None:
                store.discard(buffer)
                return
        spool, replaced = file.spool, file.number
        # In this order: the event loop reads the file meanwhile.
        file.number, file.buffer = status.number, buffer
        file.status = replace(status, uid=wanted.uid, gid=wanted.gid)
        self._numbered[status.number] = file
        file.spool = None
        spool.close()
        if replaced is None:
            self._new.pop(status.name, None)
        else:
            self._numbered.pop(replaced, None)
        if (status.uid, status.gid) != (wanted.uid, wanted.gid):
            self.chown(file, wanted.uid, wanted.gid)

    def _send(self, file: File) -> None:
        """Give the store the length and the times that were set here."""
        cut = file.length != file.status.length
        accessed, modified = file.accessed_ns, file.modified_ns
        if not file.is_stored or file.spool is not None:
            return
        if (cut, accessed, modified) == (False, None, None):
            return
        times: dict[str, int] = {}
        if accessed is not None:
            times["accessed_ns"] = accessed
        if modified is not None:
            times["modified_ns"] = modified
        with self._connections.use() as store:
            if cut:
                self._request(
                    file, lambda name, number: store.truncate(name, file.length, number=number)
                )
            self._request(file, lambda name, number: store.utime(name, number=number, **times))
        status = self._find(file)
        if status is not None:
            file.accessed_ns = file.modified_ns = None
            file.refresh(status)


def _spool() -> BinaryIO:
    return tempfile.TemporaryFile(prefix="dmabuf-mount-", buffering=0)


def _copy(spool: BinaryIO, buffer: Buffer, size: int) -> None:
    for at in range(0, size, _COPIED):
        with buffer.map("w", at, min(_COPIED, size - at)) as view:
            done = 0
            while done < len(view):
                got = os.preadv(spool.fileno(), [view[done:]], at + done)
                if not got:
                    raise OSError(errno.EIO, "the spool is shorter than what was written to it")
                done += got


def _check_owner(status: Status, uid: int) -> None:
    """Repeat the kernel's check of a sticky directory, for who owns the name now: inode(7)."""
    if uid not in (0, status.uid):
        text = f"permission denied: it belongs to user {status.uid}"
        raise OSError(errno.EPERM, text, status.name)

"""The client of the store."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from dmabuf.errors import ClosedError, RouteUnavailable
from dmabuf.kernel import uapi
from dmabuf.memory import Buffer
from dmabuf.sizes import parse_size
from dmabuf.store import place, protocol
from dmabuf.store.connection import Connection, reported, reporting
from dmabuf.store.grant import as_buffer
from dmabuf.store.protocol import UNCHANGED, Grant, Loaded, Status, Usage

if TYPE_CHECKING:
    from dmabuf.transfer import Transfer

__all__ = ["Store", "check_name", "connect"]

_UNPINNED_SECONDS = 10.0
_STARTS = 5
"""How often a store is started: one that was started may be killed before it is used."""


def connect(
    path: str | os.PathLike[str] | None = None,
    *,
    again: bool = True,
    timeout: float | None = None,
    start: bool = False,
) -> Store:
    """Return a connection to the store whose socket is at ``path``.

    None is ``$XDG_RUNTIME_DIR/dmabuf.sock``, or ``/run/dmabuf.sock`` for root. ``again`` is whether
    the Store connects again if the server was restarted. ``timeout`` is the most seconds to wait
    for a reply, None for ever. ``start`` is whether a store is started if none is running: a
    process of its own, which ends after an hour in which it held nothing (``dmabuf serve
    --background --idle 3600``). Raises OSError: ENOENT or ECONNREFUSED if no store is running,
    EACCES if this user may not connect.
    """
    where = place.default_path() if path is None else os.fspath(path)
    failure: str | None = None
    for left in reversed(range(_STARTS + 1)):
        try:
            return Store(where, again=again, timeout=timeout)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if not start:
                raise
            if not left:
                raise OSError(error.errno, f"start a store: {failure}", where) from None
        failure = place.start_server(where)
    raise AssertionError


def check_name(name: str) -> str:
    """Return a valid name of a buffer. Raises OSError: EINVAL or ENAMETOOLONG."""
    try:
        return protocol.check_name(name)
    except protocol.Refusal as refusal:
        raise reported(refusal, name) from None


class Store:
    """A connection to a server that holds named buffers (``dmabuf serve``).

    Made by :func:`connect`. Every process that opens a name gets the same memory. A Buffer stays
    usable after its name is removed, after the Store is closed, and after the server has ended.

    A name has 1 to 255 bytes of UTF-8, printable and without "/". It has an owner, a group and a
    mode, as a file in /tmp has: the mode decides who opens it; its owner, or root, removes, renames
    and changes it.

    Another client may give a name to another buffer between two calls. A call with ``number``
    (Status.number) fails with OSError(ESTALE) unless the name still belongs to that buffer.

    Every method raises OSErrors with the name as ``filename``: FileNotFoundError, FileExistsError,
    PermissionError, ENOSPC above ``--max-memory``, ConnectionError if the server has ended,
    TimeoutError after ``timeout``. After that, after :meth:`close`, and in the child of a fork, it
    raises ClosedError.

    An orderly restart of the server keeps the connection. If the server was killed and another one
    listens, the Store connects to it and makes the request once more. A ``create``, ``load``,
    ``link``, ``discard``, ``remove`` or ``rename`` raises ConnectionError then, because the killed
    server may have carried it out. Buffers without a name are lost with the killed server.

    Thread-safe: one request at a time.
    """

    def __init__(self, path: str, *, again: bool = True, timeout: float | None = None) -> None:
        self._connection = Connection(path, again, timeout)
        self._unnamed: weakref.WeakKeyDictionary[Buffer, int] = weakref.WeakKeyDictionary()

    @property
    def path(self) -> str:
        """The path of the store's socket."""
        return self._connection.path

    @property
    def closed(self) -> bool:
        """Whether it was closed, or the server has ended the connection."""
        return self._connection.closed

    def create(
        self,
        name: str | None,
        size: int | str,
        *,
        mode: int = 0o600,
        exporter: str = "auto",
        huge_pages: bool | str | int = False,
        trusted: bool = False,
    ) -> Buffer:
        """Create a zeroed buffer of ``size`` bytes, rounded up to a page, and return it writable.

        The server makes the memory: ``exporter`` and ``huge_pages`` are those of
        :func:`dmabuf.allocate`. ``mode`` is the mode of the name (no umask applies), ``trusted``
        that of :meth:`open`. ``Status.length`` is ``size`` before rounding.

        Without a name (None) the buffer is visible to nobody until :meth:`link` names it; it counts
        against ``--max-memory``, and is released with this Store if it never gets a name.

        Raises ValueError for a size of 0, FileExistsError, and as OSErrors what allocate raises. If
        this process cannot receive or map the memory (EMFILE, ENOMEM), neither name nor memory
        remains.
        """
        return self._make("create", name, size, huge_pages, mode, exporter, trusted)[0]

    def load(
        self,
        name: str | None,
        file: str | bytes | os.PathLike[str] | int,
        size: int | str | None = None,
        *,
        file_offset: int | str = 0,
        mode: int = 0o600,
        exporter: str = "auto",
        huge_pages: bool | str | int = False,
        trusted: bool = False,
    ) -> tuple[Buffer, Transfer]:
        """Create a buffer with bytes of a file that the server reads natively.

        It is for a client that may read the file, and not the block device below its filesystem,
        which a native read goes through. The client opens the file and sends the descriptor; the
        server, such as one of root, reads its device. The memory is new, and nobody has it before
        the bytes are the file's: see docs/explanations/security.md.

        Args:
            name: that of the buffer, which appears with its content; or None, as for `create`.
            file: the path of a regular file on ext4 or xfs, or a descriptor open for reading.
            size: bytes, which the file must have; by default all from `file_offset` on.
            file_offset: where in the file, in bytes; a multiple of the disk's block.
            mode: as for `create`, and so the keywords after it.

        Returns:
            The Buffer, and the record of the transfer. `timeout` of `connect` is the most time that
            it takes; the server then gives the memory up when the device has finished.

        Raises:
            RouteUnavailable: the server cannot read it natively: the reason is that of a File.
            OSError: as `create`; of opening the file; ESTALE, the file became shorter meanwhile.
        """
        path = None if isinstance(file, int) else os.fsdecode(file)
        fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            begun, offset = time.perf_counter(), parse_size(file_offset, "file_offset")
            if size is None:
                size = max(os.fstat(fd).st_size - offset, 0)
            buffer, result = self._make(
                "load", name, size, huge_pages, mode, exporter, trusted, fd, file_offset=offset
            )
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise RouteUnavailable(str(error.strerror), path, route="native") from None
            raise
        finally:
            if path is not None:
                os.close(fd)
        return buffer, _transfer(result, parse_size(size), time.perf_counter() - begun)

    def _make(
        self,
        op: str,
        name: str | None,
        size: int | str,
        huge_pages: bool | str | int,
        mode: int,
        exporter: str,
        trusted: bool,
        *sending: int,
        **fields: int,
    ) -> tuple[Buffer, dict[str, Any]]:
        nbytes = parse_size(size)
        if not nbytes:
            raise ValueError("invalid size 0: use at least one byte")
        result, descriptors = self._connection.ask(
            op,
            sending=sending,
            name=name,
            size=nbytes,
            mode=mode,
            exporter=exporter,
            huge_pages=huge_pages if isinstance(huge_pages, bool) else parse_size(huge_pages),
            trusted=trusted,
            **fields,
        )
        try:
            buffer, _, unnamed = _buffer(name, result, descriptors)
        except BaseException:
            self._undo(name, result)
            raise
        if unnamed is not None:
            self._unnamed[buffer] = unnamed
        return buffer, result

    def _undo(self, name: str | None, result: dict[str, Any]) -> None:
        """Make the server drop the new buffer, if its reply can be read."""
        with suppress(OSError, ClosedError), reporting(name):
            unnamed = protocol.parse_record(Grant, result.get("grant")).unnamed
            if unnamed is not None:
                self._connection.ask("discard", unnamed=unnamed)
            elif name is not None:
                number = protocol.parse_record(Status, result.get("status")).number
                self.remove(name, number=number)

    def link(
        self,
        buffer: Buffer,
        name: str,
        *,
        replace: bool | int = True,
        length: int | str | None = None,
        cached: bool = False,
    ) -> Status:
        """Give a name to a Buffer that :meth:`create` made without one, and return its status.

        ``replace`` is whether a buffer of that name is replaced; a number (Status.number) replaces
        that one only. ``length`` is the number of bytes of content, by default the size that was
        asked for. The name appears with its mode and length at once.

        ``cached=True`` is for content that can be made again, such as that of a file. It closes the
        Buffer and makes its content final: the kernel lets nobody write it any more (F_SEAL_WRITE,
        fcntl(2)), so each :meth:`open` is read-only. The store may drop the buffer while no process
        has it: the least recently used first where ``--max-memory`` leaves no room for another, and
        after ``--idle``. Only a buffer of ``exporter="memfd"`` can be cached.

        Raises ValueError if the Buffer has a name or is not of this Store, or is a dma-buf and
        ``cached``; FileExistsError; OSError(EFBIG) if ``length`` is larger than the memory, ESTALE
        for another number; for a cached one BufferError if exported pointers exist, and EBUSY if
        its pages stay pinned or another process has them mapped for writing.
        """
        content = None if length is None else parse_size(length, "length")
        unnamed = self._number(buffer)
        if cached and not buffer.closed:  # by a call that failed after this
            _make_final(buffer, check_name(name))
        result, _ = self._connection.ask(
            "link", unnamed=unnamed, name=name, replace=replace, length=content, cached=cached
        )
        del self._unnamed[buffer]
        with reporting(name):
            return protocol.parse_record(Status, result.get("status"))

    def discard(self, buffer: Buffer) -> None:
        """Close a Buffer that was created without a name, and release its memory in the server."""
        unnamed = self._number(buffer)
        buffer.close()
        del self._unnamed[buffer]
        self._connection.ask("discard", unnamed=unnamed)

    def _number(self, buffer: Buffer) -> int:
        if not isinstance(buffer, Buffer):
            raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
        unnamed = self._unnamed.get(buffer)
        if unnamed is None:
            raise ValueError(f"{buffer!r} was not created without a name by this Store")
        return unnamed

    def reserve(self, name: str) -> Status | None:
        """Return the status of a name, or reserve it for this connection and return None.

        While another connection of the same user has reserved it, this waits: until the name
        appears, or until that connection reserves another name, or ends. So of several processes
        that need a buffer one makes it and the others wait; if that one dies, another makes it. It
        keeps nobody from giving a buffer that name without a reservation.

        Raises PermissionError if the name belongs to another user.
        """
        result, _ = self._connection.ask("reserve", name=name)
        status = result.get("status")
        with reporting(name):
            return None if status is None else protocol.parse_record(Status, status)

    def open(
        self, name: str, mode: str = "r", trusted: bool | None = False, *, number: int | None = None
    ) -> Buffer:
        """Return the buffer of a name, mapped without filling page tables.

        ``mode`` is "r" or "r+". A user who may write the name gets its dma-bufs for "r" too; then
        only the Buffer object refuses to write. A user who may only read gets the memory file,
        opened for reading, or EACCES where the exporter has none (dma-heaps).

        ``trusted=True`` adds the memory file behind a udmabuf, and with it the ``direct`` route. It
        is for the name's owner and root, EPERM for others; None adds it if this user may have it.
        docs/explanations/security.md describes what it hands over.
        """
        return self.open_with_status(name, mode, trusted, number=number)[0]

    def open_with_status(
        self, name: str, mode: str = "r", trusted: bool | None = False, *, number: int | None = None
    ) -> tuple[Buffer, Status]:
        """Return the buffer of a name, as :meth:`open`, and its status at that moment.

        A separate :meth:`stat` could be that of another buffer. ``in_use`` is None.
        """
        result, descriptors = self._connection.ask(
            "open", name=name, number=number, mode=mode, trusted=trusted
        )
        return _buffer(name, result, descriptors)[:2]

    def list(self) -> list[Status]:
        """Return the status of every name, sorted by name; ``in_use`` is None."""
        found: list[Status] = []
        while True:
            after = found[-1].name if found else ""
            result, _ = self._connection.ask("list", after=after)
            with reporting(None):
                page = [protocol.parse_record(Status, one) for one in result.get("names", ())]
            if not page:
                return found
            found += page

    def stat(self, name: str) -> Status:
        """Return the status of a name, with ``in_use``."""
        result, _ = self._connection.ask("stat", name=name)
        with reporting(name):
            return protocol.parse_record(Status, result.get("status"))

    def remove(self, name: str, *, number: int | None = None) -> None:
        """Remove a name. The memory lives on in the processes that have it open."""
        self._connection.ask("remove", name=name, number=number)

    def rename(
        self, old: str, new: str, *, replace: bool | int = True, number: int | None = None
    ) -> None:
        """Rename a buffer. ``replace`` is that of :meth:`link`; True is rename(2)."""
        self._connection.ask("rename", name=old, number=number, to=new, replace=replace)

    def truncate(self, name: str, length: int | str, *, number: int | None = None) -> None:
        """Set the number of bytes of content; the memory keeps its size, the most it can be."""
        content = parse_size(length, "length")
        self._connection.ask("truncate", name=name, number=number, length=content)

    def chmod(self, name: str, mode: int, *, number: int | None = None) -> None:
        """Set the nine permission bits. Buffers that are open stay open."""
        self._connection.ask("chmod", name=name, number=number, mode=mode)

    def chown(
        self,
        name: str,
        uid: int = UNCHANGED,
        gid: int = UNCHANGED,
        *,
        number: int | None = None,
    ) -> None:
        """Set the owner (root only) or group (the owner, to one of its groups); -1 keeps it."""
        self._connection.ask("chown", name=name, number=number, uid=uid, gid=gid)

    def utime(
        self,
        name: str,
        *,
        accessed_ns: int = UNCHANGED,
        modified_ns: int = UNCHANGED,
        number: int | None = None,
    ) -> None:
        """Set the times of the content, in nanoseconds since 1970; -1 keeps a time.

        For the owner, and users who may write the name.
        """
        self._connection.ask(
            "utime", name=name, number=number, accessed_ns=accessed_ns, modified_ns=modified_ns
        )

    def usage(self) -> Usage:
        """Return how many bytes and names the store holds, and the limits."""
        result, _ = self._connection.ask("usage")
        with reporting(None):
            return protocol.parse_record(Usage, result.get("usage"))

    def close(self) -> None:
        """Close the connection; a second call does nothing. Buffers stay open."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = " closed" if self.closed else ""
        return f"<dmabuf.store.Store {self.path!r}{closed}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Store cannot be copied or pickled: call dmabuf.store.connect() again")


def _make_final(buffer: Buffer, name: str) -> None:
    """Close a buffer and seal its memory, so that nobody can write it any more."""
    if buffer.is_dmabuf:
        text = 'cached=True: the buffer is a dma-buf; create it with exporter="memfd"'
        raise ValueError(text)
    fd = os.dup(buffer.fileno())
    try:
        buffer.close()
        until = time.monotonic() + _UNPINNED_SECONDS
        while True:
            try:
                fcntl.fcntl(fd, uapi.F_ADD_SEALS, uapi.F_SEAL_WRITE)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, f"seal: {error.strerror}", name) from None
                if time.monotonic() > until:
                    text = "seal: another process has it mapped, or its pages stay pinned"
                    raise OSError(errno.EBUSY, text, name) from None
                time.sleep(0.001)  # a ring gives up its registered pages after close()
            else:
                return
    finally:
        os.close(fd)


def _transfer(result: dict[str, Any], nbytes: int, seconds: float) -> Transfer:
    """Return the record of what the server has read."""
    from dmabuf.transfer import Route, Transfer  # only where it is needed

    with reporting(None):
        loaded = protocol.parse_record(Loaded, result.get("loaded"))
    return Transfer(
        nbytes, Route.NATIVE, rejected={}, seconds=seconds, **dataclasses.asdict(loaded)
    )


def _buffer(
    name: str | None, result: dict[str, Any], descriptors: Sequence[int] | None
) -> tuple[Buffer, Status, int | None]:
    """Return the granted Buffer, its status and its number without a name; close the rest."""
    if descriptors is None:
        raise OSError(errno.EMFILE, "too many open files; raise ulimit -n", name)
    left = list(descriptors)
    try:
        with reporting(name):
            status = protocol.parse_record(Status, result.get("status"))
            grant = protocol.parse_record(Grant, result.get("grant"))
            buffer = as_buffer(status, grant, descriptors)
        del left[: grant.slabs]
        return buffer, status, grant.unnamed
    finally:
        for fd in left:
            os.close(fd)

"""The client's side of the store: one connection, one request at a time."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from dmabuf.buffer import Buffer
from dmabuf.errors import ClosedError, Uncopyable
from dmabuf.sizes import parse_size
from dmabuf.store import place, protocol
from dmabuf.store.connection import Connection, told
from dmabuf.store.grant import as_buffer
from dmabuf.store.protocol import SAME, Status, Usage

__all__ = ["Store", "as_trusted_as_may_be", "connect"]

T = TypeVar("T")


def connect(path: str | os.PathLike[str] | None = None) -> Store:
    """A connection to the store that serves at ``path``: see :class:`Store`.

    None is ``$XDG_RUNTIME_DIR/dmabuf.sock``, and for root ``/run/dmabuf.sock``. Raises OSError:
    ENOENT and ECONNREFUSED where no store serves, EACCES where it is not for this user.
    """
    return Store(place.default_path() if path is None else os.fspath(path))


def as_trusted_as_may_be(request: Callable[..., T]) -> T:
    """Make a request with ``trusted=True``, and without where that is not for this user.

    The Buffer says which: ``Buffer.reason``, and ``rejected`` of its transfers.
    """
    try:
        return request(trusted=True)
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
    return request(trusted=False)


class Store(Uncopyable, instead="connect again where it is needed"):
    """Named buffers that outlive the programs which fill them, in a server: ``dmabuf serve``.

    Made by :func:`connect`. The Buffers are the same memory in every process that opens them, and
    stay usable when the name is removed, the Store closed or the server gone.

    Names follow the rules of files in a directory like /tmp: an owner, a group and a mode; who may
    open is the mode's word, and a name is removed, renamed and changed by its owner, or root. A
    name has 1 to 255 bytes of UTF-8, printable and without "/".

    A name may be another buffer's by the time a request comes. With ``number`` (Status.number) it
    is for that buffer, or refused: OSError(ESTALE).

    Every method raises plain OSErrors with the name as ``filename``: FileNotFoundError,
    FileExistsError, PermissionError, ENOSPC for more than ``--max-memory``, ConnectionError where
    the server is gone; and ClosedError after :meth:`close`, and in the child of a fork.

    Thread-safe: one request at a time.
    """

    def __init__(self, path: str) -> None:
        self._connection = Connection(path)
        self._unnamed: weakref.WeakKeyDictionary[Buffer, int] = weakref.WeakKeyDictionary()

    @property
    def path(self) -> str:
        """Where the store's socket is."""
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
        """Make a buffer of ``size`` bytes (rounded up to a page), zeroed, under a new name.

        ``Status.length`` is what was asked for.

        ``exporter`` and ``huge_pages`` are those of :func:`dmabuf.allocate`; the server makes the
        memory, and counts it against its ``--max-memory``. ``mode`` is whole: no umask is taken off
        it. ``trusted`` is that of :meth:`open`; the Buffer can be written, whatever the mode.

        Without a name (None) nobody else sees it, until :meth:`link` gives it one: so a buffer can
        be filled first. It counts as the others do, and is gone with this Store if it has none.

        Raises FileExistsError, and what allocate raises, as OSErrors; EMFILE and ENOMEM where this
        process may not have or map what came, and then there is neither name nor memory.
        """
        huge: bool | int = huge_pages if isinstance(huge_pages, bool) else parse_size(huge_pages)
        result, descriptors = self._connection.ask(
            "create",
            name=name,
            size=parse_size(size),
            mode=mode,
            exporter=exporter,
            huge_pages=huge,
            trusted=trusted,
        )
        try:
            buffer, _, unnamed = _buffer(name, result, descriptors)
        except BaseException:
            self._undo(name, result)
            raise
        if unnamed is not None:
            self._unnamed[buffer] = unnamed
        return buffer

    def _undo(self, name: str | None, result: dict[str, Any]) -> None:
        """Have the store forget what it made, as far as its reply can be read."""
        with suppress(OSError, ClosedError), told(name):
            unnamed = protocol.grant(result.get("grant")).unnamed
            if unnamed is not None:
                self._connection.ask("discard", unnamed=unnamed)
            elif name is not None:
                self.remove(name, number=protocol.status(result.get("status")).number)

    def link(
        self, buffer: Buffer, name: str, *, replace: bool = True, length: int | str | None = None
    ) -> Status:
        """Give a Buffer that :meth:`create` made without a name one, in the place of any other's.

        ``length`` is that of the content, by default what was asked for: the name is there with it
        at once, whatever its mode. Returns what the name stands for then; ``in_use`` is None.

        Raises ValueError for a Buffer that has one, or is not of this Store; FileExistsError for
        one of that name without ``replace``; OSError(EFBIG) for more content than memory.
        """
        content = None if length is None else parse_size(length, "length")
        return self._give(buffer, "link", name=name, replace=replace, length=content)

    def swap(
        self, buffer: Buffer, name: str, length: int | str, *, number: int | None = None
    ) -> Status:
        """Put a Buffer that was created without a name behind one: so a name grows, and shrinks.

        The name keeps its owner, its mode and its number; ``length`` is that of the content. Who
        may write the name may, while nobody has its old memory: else OSError(EBUSY), and your own
        Buffer of it counts too. Returns what the name stands for then; ``in_use`` is None.
        """
        content = parse_size(length, "length")
        return self._give(buffer, "swap", name=name, number=number, length=content)

    def _give(self, buffer: Buffer, op: str, **fields: Any) -> Status:
        result, _ = self._connection.ask(op, unnamed=self._number(buffer), **fields)
        del self._unnamed[buffer]
        with told(fields["name"]):
            return protocol.status(result.get("status"))

    def discard(self, buffer: Buffer) -> None:
        """Close a Buffer that was created without a name: its memory is free again."""
        unnamed = self._number(buffer)
        buffer.close()
        del self._unnamed[buffer]
        self._connection.ask("discard", unnamed=unnamed)

    def _number(self, buffer: Buffer) -> int:
        unnamed = self._unnamed.get(buffer)
        if unnamed is None:
            raise ValueError(f"{buffer!r} was not created without a name, by this Store")
        return unnamed

    def open(
        self, name: str, mode: str = "r", trusted: bool = False, *, number: int | None = None
    ) -> Buffer:
        """The buffer of a name: the same memory as everyone's, mapped when it is first touched.

        ``mode`` is "r" or "r+". Who may write the name gets its dma-bufs, also for "r": the Buffer
        then keeps from writing, and the kernel does not. Who may only read it gets the memory
        file, opened for reading, which the kernel holds to; where there is none (dma-heaps), EACCES
        says so.

        ``trusted=True`` is for the owner of the name, if he may open /dev/udmabuf, and for root
        (EPERM for others; :func:`as_trusted_as_may_be`): it adds the memory file behind a udmabuf,
        and with it the ``direct`` route. What that hands over is in docs/security.md.
        """
        return self.open_with_status(name, mode, trusted, number=number)[0]

    def open_with_status(
        self, name: str, mode: str = "r", trusted: bool = False, *, number: int | None = None
    ) -> tuple[Buffer, Status]:
        """As :meth:`open`, and what the name stood for in that moment; ``in_use`` is None.

        What is asked with :meth:`stat`, before or after, may be another buffer of that name.
        """
        result, descriptors = self._connection.ask(
            "open", name=name, number=number, mode=mode, trusted=trusted
        )
        return _buffer(name, result, descriptors)[:2]

    def list(self) -> list[Status]:
        """Every name with its status, sorted by name; ``in_use`` is not asked, and None.

        Names that come or go meanwhile may be in it or not; the others are.
        """
        found: list[Status] = []
        while True:
            after = found[-1].name if found else ""
            result, _ = self._connection.ask("list", after=after)
            with told(None):
                page = [protocol.status(value) for value in result.get("names", ())]
            if not page:
                return found
            found += page

    def stat(self, name: str) -> Status:
        """What a name stands for, and whether anyone has it."""
        result, _ = self._connection.ask("stat", name=name)
        with told(name):
            return protocol.status(result.get("status"))

    def remove(self, name: str, *, number: int | None = None) -> None:
        """Take a name away. Whoever has the buffer keeps it, and it counts until they let go."""
        self._connection.ask("remove", name=name, number=number)

    def rename(
        self, old: str, new: str, *, replace: bool | int = True, number: int | None = None
    ) -> None:
        """Give a buffer another name; one of that name is replaced, as rename(2) does.

        Where ``replace`` is a number, only that one. Raises FileExistsError for one of that name
        without ``replace``.
        """
        self._connection.ask("rename", name=old, number=number, to=new, replace=replace)

    def truncate(self, name: str, length: int | str, *, number: int | None = None) -> None:
        """Say how many bytes are content, at most the buffer's size; the memory stays as it is."""
        content = parse_size(length, "length")
        self._connection.ask("truncate", name=name, number=number, length=content)

    def chmod(self, name: str, mode: int, *, number: int | None = None) -> None:
        """Change who may open it: nine bits, as chmod(2). What is open stays open."""
        self._connection.ask("chmod", name=name, number=number, mode=mode)

    def chown(
        self, name: str, uid: int = SAME, gid: int = SAME, *, number: int | None = None
    ) -> None:
        """Change its owner (root alone) or group (its owner, to one of his own); -1 leaves it."""
        self._connection.ask("chown", name=name, number=number, uid=uid, gid=gid)

    def utime(
        self,
        name: str,
        *,
        accessed_ns: int = SAME,
        modified_ns: int = SAME,
        number: int | None = None,
    ) -> None:
        """Set the times of the content, in ns since 1970; its owner may, and who may write it."""
        times = {"accessed_ns": accessed_ns, "modified_ns": modified_ns}
        self._connection.ask("utime", name=name, number=number, **times)

    def usage(self, *, settle: bool = True) -> Usage:
        """How many bytes and names there are, and how many there may be.

        With ``settle``, when what nobody has any more is free; without it, at once.
        """
        result, _ = self._connection.ask("usage", settle=settle)
        with told(None):
            return protocol.usage(result.get("usage"))

    def close(self) -> None:
        """End the connection; again and again does nothing. Buffers stay."""
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


def _buffer(
    name: str | None, result: dict[str, Any], descriptors: Sequence[int] | None
) -> tuple[Buffer, Status, int | None]:
    """The Buffer that was granted, its status, and what "link" calls it; the rest is closed."""
    if descriptors is None:
        raise OSError(errno.EMFILE, "too many open descriptors (ulimit -n)", name)
    left = list(descriptors)
    try:
        with told(name):
            status = protocol.status(result.get("status"))
            grant = protocol.grant(result.get("grant"))
            buffer = as_buffer(status, grant, descriptors)
        del left[: grant.slabs]
        return buffer, status, grant.unnamed
    finally:
        for fd in left:
            os.close(fd)

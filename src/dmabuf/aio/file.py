"""File: a dmabuf.File whose transfers are awaited in an event loop."""

from __future__ import annotations

import os
from time import perf_counter

import anyio

from dmabuf.aio.engine import loop_engine
from dmabuf.aio.waiter import Loop, signalled
from dmabuf.errors import Uncopyable
from dmabuf.kernel import fence as fences
from dmabuf.kernel import process
from dmabuf.memory import Buffer
from dmabuf.sizes import Size
from dmabuf.transfer import (
    SMALL,
    Audit,
    Direction,
    Link,
    Mode,
    Plan,
    Prefer,
    Require,
    Route,
    Segments,
    Terms,
    Transfer,
    segments_of,
    terms_of,
)
from dmabuf.transfer import file as sync


async def open(  # noqa: A001 - as dmabuf.open
    path: str | bytes | os.PathLike[str] | int, mode: Mode = "r", *, force: bool = False
) -> File:
    """Open a file, device, pipe or socket for transfers in this event loop.

    The arguments and errors are those of `dmabuf.open`. Opening blocks the loop for the duration of
    open(2). Close the File with `aclose`, which `async with` calls.
    """
    engine = await loop_engine()
    return File(sync.File(path, mode, force=force, engine=engine), Loop(engine))


class File(Uncopyable, instead="open its path again in the event loop that needs it"):
    """A file, device or stream that is read into a Buffer or written from one, awaited.

    Make it with `dmabuf.aio.open`. It belongs to the event loop it was opened in, and any number of
    tasks of that loop may use it. The methods, arguments, records and errors are those of
    `dmabuf.File`, which documents them. Two transfers of one pipe or socket in the same direction
    run one after the other.
    """

    def __init__(self, file: sync.File, loop: Loop) -> None:
        self._file, self._loop = file, loop
        self._in_order = {"read": anyio.Semaphore(1), "write": anyio.Semaphore(1)}

    @property
    def name(self) -> str | int:
        """The path, or the descriptor that was passed."""
        return self._file.name

    @property
    def mode(self) -> str:
        """The mode it was opened with: "r", "w", "r+" or "x"."""
        return self._file.mode

    @property
    def kind(self) -> str:
        """The kind of file, as `dmabuf.File.kind`."""
        return self._file.kind

    @property
    def size(self) -> int | None:
        """Where the file or device ends now, in bytes; None for a stream."""
        return self._file.size

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._file.closed

    def readable(self) -> bool:
        """Return whether bytes can be read from it into a buffer."""
        return self._file.readable()

    def writable(self) -> bool:
        """Return whether bytes can be written to it from a buffer."""
        return self._file.writable()

    def fileno(self) -> int:
        """Return the descriptor without O_DIRECT. It stays the File's."""
        return self._file.fileno()

    def __repr__(self) -> str:
        return repr(self._file).replace("dmabuf.File", "dmabuf.aio.File")

    async def __aenter__(self) -> File:
        self._file.target.check_open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel its transfers, wait until devices have finished with their memory, and close it.

        The transfers raise ClosedError. It can be called again. Cancelling it does not shorten it.

        Raises:
            RuntimeError: the running event loop is not the File's.
        """
        file, engine = self._file, self._loop.engine
        if file.target.owner == process.pid and not engine.closed:
            engine.check_usable()
        file.close()  # nothing new begins; a transfer that runs keeps the descriptors
        self._loop.cancel()
        interruption = None
        while file.links.busy and not engine.forked:
            try:
                with anyio.CancelScope(shield=True):
                    self._loop.ended = anyio.Event()
                    await self._loop.ended.wait()
            except GeneratorExit:
                raise
            except BaseException as caught:
                interruption = caught
        if interruption is not None:
            raise interruption

    # -- transfers

    async def read_into(
        self,
        buffer: Buffer,
        size: Size | None = None,
        *,
        file_offset: Size | None = None,
        buffer_offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        prefer: Prefer = "zero-copy",
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
        terms: Terms | None = None,
    ) -> Transfer:
        """Read from the file into the buffer; see `dmabuf.File.read_into`."""
        begun = perf_counter()
        file = self._file
        link = file.links.get(buffer, "read")
        if terms is None:
            terms = terms_of(require, route, prefer, timeout, fence, audit)
        if terms.plain and type(size) is int and size <= SMALL:
            done = await self._loop.move_small(
                link, file_offset or 0, buffer_offset, size, terms, begun
            )
            if done is not None:
                return done
        segments = file.segment(buffer, "read", size, file_offset, buffer_offset)
        return await self._move(link, segments, terms, begun)

    async def write_from(
        self,
        buffer: Buffer,
        size: Size | None = None,
        *,
        file_offset: Size | None = None,
        buffer_offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        prefer: Prefer = "zero-copy",
        sync: bool = False,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
        terms: Terms | None = None,
    ) -> Transfer:
        """Write from the buffer to the file; see `dmabuf.File.write_from`."""
        begun = perf_counter()
        file = self._file
        link = file.links.get(buffer, "write")
        if terms is None:
            terms = terms_of(require, route, prefer, timeout, fence, audit, sync)
        if terms.plain and type(size) is int and size <= SMALL:
            done = await self._loop.move_small(
                link, file_offset or 0, buffer_offset, size, terms, begun
            )
            if done is not None:
                return done
        segments = file.segment(buffer, "write", size, file_offset, buffer_offset)
        return await self._move(link, segments, terms, begun)

    async def read_segments(
        self,
        buffer: Buffer,
        segments: object,
        *,
        require: Require = "any",
        route: Route | str | None = None,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
        terms: Terms | None = None,
    ) -> Transfer:
        """Read many ranges to many places of the buffer; see `dmabuf.File.read_segments`."""
        begun = perf_counter()
        link = self._file.links.get(buffer, "read")
        self._file.check_offsets()
        if terms is None:
            terms = terms_of(require, route, "zero-copy", timeout, fence, audit)
        with segments_of(segments) as held:
            return await self._move(link, held, terms, begun)

    async def write_segments(
        self,
        buffer: Buffer,
        segments: object,
        *,
        require: Require = "any",
        route: Route | str | None = None,
        sync: bool = False,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
        terms: Terms | None = None,
    ) -> Transfer:
        """Write many ranges of the buffer to many places; see `dmabuf.File.write_segments`."""
        begun = perf_counter()
        link = self._file.links.get(buffer, "write")
        self._file.check_offsets()
        if terms is None:
            terms = terms_of(require, route, "zero-copy", timeout, fence, audit, sync)
        with segments_of(segments) as held:
            return await self._move(link, held, terms, begun)

    def plan(
        self,
        buffer: Buffer,
        direction: Direction = "read",
        *,
        size: Size | None = None,
        file_offset: Size | None = None,
        buffer_offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        prefer: Prefer = "zero-copy",
        terms: Terms | None = None,
    ) -> Plan:
        """Return the route that a transfer would take, and why; see `dmabuf.File.plan`."""
        return self._file.plan(
            buffer,
            direction,
            size=size,
            file_offset=file_offset,
            buffer_offset=buffer_offset,
            require=require,
            route=route,
            prefer=prefer,
            terms=terms,
        )

    async def _move(self, link: Link, segments: Segments, terms: Terms, begun: float) -> Transfer:
        try:
            if link.target.stream is None:
                return await link.move(segments, terms, self._loop, begun)
            async with self._in_order[link.direction]:
                return await link.move(segments, terms, self._loop, begun)
        finally:
            if link.target.closed:
                self._loop.ended.set()


async def wait(
    buffer: Buffer, direction: fences.Access = "read", timeout: float | None = None
) -> None:
    """Return when the fences of a buffer let it be read (or written); see `dmabuf.Buffer.wait`.

    Raises:
        TimeoutError: a device still uses it after `timeout` seconds.
        ClosedError, ValueError: as `dmabuf.Buffer.wait`.
    """
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
    fences.check_direction(direction)
    fences.check_timeout(timeout)
    users: set[object] = {wait}  # keeps the buffer open
    buffer.attach(users, users.clear)
    try:
        await signalled(buffer.dmabufs(0, buffer.size), direction, timeout)
    finally:
        users.clear()
        buffer.detach(users, users.clear)

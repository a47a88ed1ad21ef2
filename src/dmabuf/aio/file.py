"""File: a dmabuf.File whose transfers are awaited in an event loop."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from time import perf_counter

import anyio

from dmabuf.aio.engine import loop_engine
from dmabuf.aio.waiter import Loop, signalled
from dmabuf.kernel import fence as fences
from dmabuf.kernel import process
from dmabuf.memory import Buffer
from dmabuf.sizes import Size
from dmabuf.transfer import (
    SMALL,
    BaseFile,
    Direction,
    Link,
    Mode,
    Progress,
    Segments,
    Terms,
    Transfer,
    segments_of,
)


async def open(  # noqa: A001 - as dmabuf.open
    path: str | bytes | os.PathLike[str] | int, mode: Mode = "r", *, force: bool = False
) -> File:
    """Open a file, device, pipe or socket for transfers in this event loop.

    The arguments and errors are those of `dmabuf.open`. Opening blocks the loop for the duration of
    open(2). Close the File with `aclose`, which `async with` calls.
    """
    return File(path, mode, force=force, loop=Loop(await loop_engine()))


class File(
    BaseFile[Coroutine[object, object, Transfer]],
    instead="open its path again in the event loop that needs it",
):
    """A file, device or stream that is read into a Buffer or written from one, awaited.

    Make it with `dmabuf.aio.open`. It belongs to the event loop it was opened in, and any number of
    tasks of that loop may use it. The methods, arguments, records and errors are those of
    `dmabuf.File`, which documents them. Two transfers of one pipe or socket in the same direction
    run one after the other.
    """

    _shown = "dmabuf.aio.File"

    def __init__(
        self, path: str | bytes | os.PathLike[str] | int, mode: Mode, *, force: bool, loop: Loop
    ) -> None:
        super().__init__(path, mode, force=force, engine=loop.engine)
        self._loop = loop
        self._in_order = {"read": anyio.Semaphore(1), "write": anyio.Semaphore(1)}

    async def __aenter__(self) -> File:
        self.target.check_open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel its transfers, wait until devices have finished with their memory, and close it.

        The transfers raise ClosedError. It can be called again. Cancelling it does not shorten it.

        Raises:
            RuntimeError: the running event loop is not the File's.
        """
        engine = self._loop.engine
        if self.links.target.owner == process.pid and not engine.closed:
            engine.check_usable()
        self.links.close()  # nothing new begins; a transfer that runs keeps the descriptors
        self._loop.cancel()
        interruption = None
        while self.links.busy and not engine.forked:
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

    async def _move_range(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
        terms: Terms,
        progress: Progress | None,
    ) -> Transfer:
        begun = perf_counter()
        link = self.links.get(buffer, direction)
        if terms.plain and type(size) is int and size <= SMALL and progress is None:
            done = await self._loop.move_small(
                link, file_offset or 0, buffer_offset, size, terms, begun
            )
            if done is not None:
                return done
        segments = self.segment(buffer, direction, size, file_offset, buffer_offset)
        return await self._move(link, segments, terms, begun, progress)

    async def _move_segments(
        self,
        direction: Direction,
        buffer: Buffer,
        segments: object,
        terms: Terms,
        progress: Progress | None,
    ) -> Transfer:
        begun = perf_counter()
        link = self.links.get(buffer, direction)
        self.check_offsets()
        with segments_of(segments) as held:
            return await self._move(link, held, terms, begun, progress)

    async def _move(
        self,
        link: Link,
        segments: Segments,
        terms: Terms,
        begun: float,
        progress: Progress | None,
    ) -> Transfer:
        try:
            if link.target.stream is None:
                done = await link.move(segments, terms, self._loop, begun)
            else:
                async with self._in_order[link.direction]:
                    done = await link.move(segments, terms, self._loop, begun)
        finally:
            if link.target.closed:
                self._loop.ended.set()
        if progress is not None:
            progress(done.nbytes, done.nbytes)
        return done


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

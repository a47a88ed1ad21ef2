"""The asynchronous face, for asyncio and trio: `pip install dmabuf[aio]`.

Each event loop has an engine of its own: one io_uring ring, whose completions wake the loop through
an eventfd, so thousands of transfers can be under way and none has a thread. What cannot be waited
for so (allocating a file's blocks, flushing to the medium, a whole `copy`) is done in threads.

Cancelling a transfer, closing its File, and throwing its coroutine away stop it, and return when
the device has let go of the buffer's memory, which the buffer stays open for. A coroutine that was
never awaited has begun nothing. When the loop ends, so does its engine.

Pages are not registered here, since pinning a large buffer would stop the loop.
"""

from __future__ import annotations

import os
from collections.abc import Coroutine
from time import perf_counter
from typing import Any, TypeVar

from dmabuf import _process, lone, transfer
from dmabuf import file as sync
from dmabuf.audit import Audit
from dmabuf.buffer import Buffer
from dmabuf.engine import Job, Transfer
from dmabuf.errors import ClosedError, Uncopyable
from dmabuf.fence import Access, check_direction, check_timeout
from dmabuf.file import Mode
from dmabuf.route import Direction, Plan, Prefer, Require, Route
from dmabuf.sizes import Size
from dmabuf.steps import Blocking, Fences, Ready, Steps
from dmabuf.transfer import Order

try:
    import anyio

    from dmabuf._copying import copy
    from dmabuf._loop import LoopEngine, loop_engine
    from dmabuf._waits import until, until_unfenced
except ImportError as error:
    raise ImportError(f"dmabuf.aio needs anyio ({error}): pip install dmabuf[aio]") from error

__all__ = ["File", "copy", "open", "wait"]

T = TypeVar("T")

_CLOSED = "the file was closed while the transfer ran"
_ALONE = "one small request: nothing to register it for"


async def open(  # noqa: A001 - as dmabuf.open
    path: str | bytes | os.PathLike[str] | int, mode: Mode = "r", *, force: bool = False
) -> File:
    """Open a file, device, pipe or socket for transfers in this event loop; as `dmabuf.open`.

    The file itself is opened at once, as the loop's other work waits. Close it with `aclose`, which
    `async with` calls.

    Raises:
        OSError, ValueError: as `dmabuf.open`.
    """
    return File(sync.File(path, mode, force=force, engine=await loop_engine()))


class File(Uncopyable, instead="open its path again in the event loop that needs it"):
    """What is read into a Buffer or written from one, awaited; make it with `dmabuf.aio.open`.

    It belongs to the event loop it was opened in, and any number of its tasks may use it. The
    transfers' arguments, records and errors are those of `dmabuf.File`, which explains them.
    """

    def __init__(self, file: sync.File) -> None:
        self._file = file
        self._target = file._target
        self._engine: LoopEngine = file._target.engine  # type: ignore[assignment]
        self._scopes: set[anyio.CancelScope] = set()
        self._idle: anyio.Event | None = None
        self._in_order = {"read": anyio.Lock(), "write": anyio.Lock()}

    @property
    def name(self) -> str | int:
        """The path, or the descriptor that was handed in."""
        return self._file.name

    @property
    def mode(self) -> str:
        """As it was opened."""
        return self._file.mode

    @property
    def kind(self) -> str:
        """As `dmabuf.File.kind`."""
        return self._file.kind

    @property
    def size(self) -> int | None:
        """Where the file or block device ends now, in bytes; None for a stream."""
        return self._file.size

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._file.closed

    def fileno(self) -> int:
        """The descriptor without O_DIRECT; it stays the File's."""
        return self._file.fileno()

    def plan(self, buffer: Buffer, direction: Direction = "read", **how: Any) -> Plan:
        """The route that a transfer would take, and why; as `dmabuf.File.plan`, moves nothing."""
        return self._file.plan(buffer, direction, **how)

    def __repr__(self) -> str:
        return repr(self._file).replace("dmabuf.File", "dmabuf.aio.File")

    async def __aenter__(self) -> File:
        self._target.check_open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop its transfers, wait until the devices have let go of their memory, and close it.

        The transfers raise ClosedError. Can be called again; being cancelled does not shorten it.

        Raises:
            RuntimeError: awaited in another thread than its event loop's.
        """
        target = self._target
        if target.pid != _process.pid or self._file.closed:
            self._file.close()
            return
        if not self._engine.closed:
            self._engine.check_usable()  # in its own loop's thread
        target._closed = True  # nothing new begins; transfers that run keep the descriptors
        interruption = None
        self._engine.stop(self, target)
        for scope in list(self._scopes):
            scope.cancel()
        try:
            while target.lone:
                try:
                    with anyio.CancelScope(shield=True):
                        self._idle = anyio.Event()
                        await self._idle.wait()
                except GeneratorExit:
                    raise
                except BaseException as caught:
                    interruption = interruption or caught
        finally:
            self._file.close()
        if interruption is not None:
            raise interruption

    # -- transfers

    def read_into(
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
    ) -> Coroutine[Any, Any, Transfer]:
        """Read from the file into the buffer; as `dmabuf.File.read_into`."""
        return self._move(
            "read",
            buffer,
            size,
            file_offset,
            buffer_offset,
            require,
            route,
            prefer,
            False,
            timeout,
            fence,
            audit,
        )

    def write_from(
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
    ) -> Coroutine[Any, Any, Transfer]:
        """Write from the buffer to the file; as `dmabuf.File.write_from`."""
        return self._move(
            "write",
            buffer,
            size,
            file_offset,
            buffer_offset,
            require,
            route,
            prefer,
            sync,
            timeout,
            fence,
            audit,
        )

    async def _move(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
        require: Require,
        route: Route | str | None,
        prefer: Prefer,
        sync: bool,
        timeout: float | None,
        fence: bool,
        audit: Audit,
    ) -> Transfer:
        begun = perf_counter()
        if (
            type(size) is type(buffer_offset) is int
            and (file_offset is None or type(file_offset) is int)
            and buffer.__class__ is Buffer
            and timeout is None
            and not sync
            and (
                (require == "any" and route is None and prefer == "zero-copy" and audit == "first")
                or lone.permitted(require, route, prefer, audit)
            )
        ):
            # Written out here, since each call is a part of a small request's cost.
            target, engine = self._target, self._engine
            requests, of_buffer, nbytes = target.lone, buffer._lone, None
            new_wake, next_tag = engine.new_wake, engine.next_tag  # faster apart on CPython 3.11
            # A buffer outlives loops: unlike wake, its token does not refer to the task.
            wake, tag, token = new_wake(), next_tag(), object()
            try:
                requests.add(wake)
                try:
                    of_buffer.add(token)
                    lane = lone.lane(target, buffer, direction)
                    if lane is not None and engine.take_off_alone(
                        lane, file_offset, buffer_offset, size, fence, tag, wake
                    ):
                        nbytes = await wake
                        if nbytes is None:
                            await engine.landing_alone(tag)
                except BaseException as caught:
                    await engine.interrupted_alone(tag, caught)
                    raise
                finally:
                    if tag in engine.flights:
                        engine.leave_alone(tag)
                    of_buffer.discard(token)
            finally:
                requests.discard(wake)
                if target._closed:
                    self._left()
            if lane is not None:
                if nbytes == size:
                    return lane.record(size, route, audit, begun, _ALONE)
                if target._closed:
                    raise ClosedError(_CLOSED)
        ranges = self._file._range(direction, buffer, size, file_offset, buffer_offset)
        order = Order(
            direction, buffer, ranges, require, route, prefer, sync, timeout, fence, audit
        )
        return await self._carry(order, begun)

    async def read_segments(
        self,
        buffer: Buffer,
        segments: Any,
        *,
        require: Require = "any",
        route: Route | str | None = None,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
    ) -> Transfer:
        """Read many ranges to many places of the buffer; as `dmabuf.File.read_segments`."""
        begun = perf_counter()
        with self._file._segments("read", buffer, segments) as ranges:
            order = Order(
                "read", buffer, ranges, require, route, timeout=timeout, fence=fence, audit=audit
            )
            return await self._carry(order, begun)

    async def write_segments(
        self,
        buffer: Buffer,
        segments: Any,
        *,
        require: Require = "any",
        route: Route | str | None = None,
        sync: bool = False,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
    ) -> Transfer:
        """Write many ranges of the buffer to many places; as `dmabuf.File.write_segments`."""
        begun = perf_counter()
        with self._file._segments("write", buffer, segments) as ranges:
            order = Order(
                "write",
                buffer,
                ranges,
                require,
                route,
                sync=sync,
                timeout=timeout,
                fence=fence,
                audit=audit,
            )
            return await self._carry(order, begun)

    def _left(self) -> None:
        """A transfer has ended on a closed file: if it was the last, tell `aclose`."""
        self._target.left()
        if self._idle is not None and not self._target.lone:
            self._idle.set()

    async def _carry(self, order: Order, begun: float) -> Transfer:
        """As `transfer.carry_out`, awaited."""
        target, token = self._target, object()
        try:
            target.lone.add(token)
            try:
                order.buffer._lone.add(token)
                transfer.check_usable(target, order)
                if target.stream is None:
                    return await self._follow(transfer.carry(target, order, begun))
                steps = transfer.carry_stream(target, order, begun, nowait=True)
                async with self._in_order[order.direction]:
                    return await self._follow(steps)
            finally:
                order.buffer._lone.discard(token)
        finally:
            target.lone.discard(token)
            if target.closed:
                self._left()

    async def _follow(self, steps: Steps[Transfer]) -> Transfer:
        """Await each step; what it raises is raised where the transfer waits for it."""
        try:
            step = next(steps)
            while True:
                try:
                    outcome = None
                    if isinstance(step, Job):
                        outcome = await self._engine.fly(step, self)
                    elif isinstance(step, Blocking):
                        await self._engine.in_thread(step.call, self)
                    else:
                        await self._until(step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def _until(self, step: Fences | Ready) -> None:
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await until(step)
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            raise ClosedError("the file was closed while the transfer waited")


async def wait(buffer: Buffer, direction: Access = "read", timeout: float | None = None) -> None:
    """Return when the buffer may be read (written) by its fences; as `dmabuf.Buffer.wait`.

    Raises:
        TimeoutError: a device still uses it after `timeout` seconds.
        ClosedError, ValueError: as `dmabuf.Buffer.wait`.
    """
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
    check_direction(direction)
    check_timeout(timeout)
    buffer._acquire()
    try:
        await until_unfenced(buffer._touched(0, buffer.size), direction, timeout)
    finally:
        buffer._release()

"""Synchronous calls of many transfers, in a thread that an event loop can stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from dmabuf import copying
from dmabuf.aio.engine import loop_engine
from dmabuf.aio.waiter import Loop
from dmabuf.copying import DEPTH, AnyFileRange, Copy, SourceEnd, TargetEnd
from dmabuf.memory import Buffer
from dmabuf.sizes import Size
from dmabuf.transfer import Prefer, Progress, Require, Route, Terms, Transfer, stopping

T = TypeVar("T")


class _Stopped(BaseException):
    """Raised in the thread when the awaiting task was cancelled."""


async def _in_thread(function: Callable[[Callable[[], None]], T]) -> T:
    """Call a function in a thread, with a check that raises once the task was cancelled."""
    stop: list[bool] = []

    def check() -> None:
        if stop:
            raise _Stopped

    def call() -> T:
        stopping.check = check
        try:
            return function(check)
        finally:
            stopping.check = None

    return await Loop(await loop_engine()).call(call, cancel=lambda: stop.append(True))


async def call(function: Callable[[], T]) -> T:
    """Call a function that blocks in a thread, and return what it returns.

    For the calls of dmabuf that have no coroutine::

        await dmabuf.aio.call(lambda: dmabuf.safetensors.load(url))

    Cancelling it stops a transfer of `dmabuf.remote` within 100 ms, and returns when the function
    has ended. The Node of a transfer that was stopped is closed.
    """
    return await _in_thread(lambda _: function())


async def copy(
    src: SourceEnd,
    dst: TargetEnd,
    *,
    size: Size | None = None,
    src_offset: Size = 0,
    dst_offset: Size = 0,
    progress: Progress | None = None,
    require: Require = "any",
    route: Route | str | None = None,
    prefer: Prefer = "zero-copy",
    exporter: str = "auto",
    sync: bool = False,
    force: bool = False,
    block_size: int | str = "8MiB",
    blocks: int = 4,
) -> Copy:
    """Copy any source to any target in a thread; the arguments are those of `dmabuf.copy`.

    `progress` and the methods of file objects are called in that thread. Cancelling stops the copy
    within 100 ms or at its next block, and gives back unused room as after an error; this returns
    when that is done. A method of a file object that blocks is waited for. Files that belong to an
    event loop, or to an Engine of another thread, cannot be copied.
    """

    def call(check: Callable[[], None]) -> Copy:
        def watch(done: int, total: int | None) -> None:
            check()
            if progress is not None:
                progress(done, total)

        return copying.copy(
            src, dst, size=size, src_offset=src_offset, dst_offset=dst_offset, progress=watch,
            require=require, route=route, prefer=prefer, exporter=exporter, sync=sync,
            force=force, block_size=block_size, blocks=blocks,
        )  # fmt: skip

    return await _in_thread(call)


async def read_files(
    files: Iterable[AnyFileRange],
    buffer: Buffer,
    *,
    terms: Terms | None = None,
    queue_depth: int = DEPTH,
    progress: Progress | None = None,
) -> list[Transfer | OSError]:
    """Read a range of each of many files into a buffer; see `dmabuf.read_files`.

    `progress` is called in a thread. Cancelling it returns when the transfers in flight have ended.
    No further file is opened.
    """
    read = partial(
        copying.read_files, files, buffer, terms=terms, queue_depth=queue_depth, progress=progress
    )
    return await _in_thread(lambda _: read())


async def write_files(
    files: Iterable[AnyFileRange],
    buffer: Buffer,
    *,
    terms: Terms | None = None,
    queue_depth: int = DEPTH,
    progress: Progress | None = None,
) -> list[Transfer | OSError]:
    """Write ranges of a buffer to many files, each whole or not; see `dmabuf.write_files`.

    `progress` is called in a thread. Cancelling it returns when the transfers in flight have ended.
    No further file is begun.
    """
    write = partial(
        copying.write_files, files, buffer, terms=terms, queue_depth=queue_depth, progress=progress
    )
    return await _in_thread(lambda _: write())

"""dmabuf.aio.copy: the synchronous copy in a thread, which an event loop can stop."""

from __future__ import annotations

from dmabuf import copying
from dmabuf.aio.engine import loop_engine
from dmabuf.aio.waiter import Loop
from dmabuf.copying import Copy, Progress, SourceEnd, TargetEnd
from dmabuf.sizes import Size
from dmabuf.transfer import Prefer, Require, Route, stopping


class _Stopped(BaseException):
    """Raised in the copying thread when the awaiting task was cancelled."""


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
    stop: list[bool] = []

    def check() -> None:
        if stop:
            raise _Stopped

    def watch(done: int, total: int | None) -> None:
        check()
        if progress is not None:
            progress(done, total)

    def call() -> Copy:
        stopping.check = check
        try:
            return copying.copy(
                src, dst, size=size, src_offset=src_offset, dst_offset=dst_offset, progress=watch,
                require=require, route=route, prefer=prefer, exporter=exporter, sync=sync,
                force=force, block_size=block_size, blocks=blocks,
            )  # fmt: skip
        finally:
            stopping.check = None

    return await Loop(await loop_engine()).call(call, cancel=lambda: stop.append(True))

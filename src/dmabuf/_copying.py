"""dmabuf.aio.copy: the pipeline in a thread, which an event loop can stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmabuf import pipeline
from dmabuf._loop import loop_engine
from dmabuf._opening import End
from dmabuf.pipeline import Copy
from dmabuf.steps import stopping


class _Stopped(BaseException):
    """Raised in the copying thread where the awaiting task was cancelled."""


async def copy(
    src: End, dst: End, *, progress: Callable[[int, int | None], object] | None = None, **how: Any
) -> Copy:
    """Copy any source to any target; as `dmabuf.copy`, in a thread.

    `progress` is called in that thread. Being cancelled stops the copy within 100 ms or at its next
    block, and cuts the target back as after an error; it returns when that is done. Files that
    belong to an event loop, or an Engine of another thread, cannot be its ends.
    """
    engine = await loop_engine()
    stop: list[bool] = []

    def check() -> None:
        if stop:
            raise _Stopped

    def watch(done: int, total: int | None) -> None:
        check()
        if progress is not None:
            progress(done, total)

    def call() -> None:
        stopping.check = check
        try:
            result.append(pipeline.copy(src, dst, progress=watch, **how))
        finally:
            stopping.check = None

    result: list[Copy] = []
    await engine.in_thread(call, None, stop=lambda: stop.append(True))
    return result[0]

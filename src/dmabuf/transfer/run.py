"""Segments and waiters: the ranges that a transfer moves, and how the transfer waits.

A transfer is one coroutine, `Link.move`, that awaits the methods of a Waiter. `Blocking`, for
`File`, waits in the thread and never suspends, so `complete` runs the coroutine in one step. The
waiter of dmabuf.aio suspends until the event loop resumes it.
"""

from __future__ import annotations

import errno
import select
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar

from dmabuf._core import ffi
from dmabuf.errors import os_error
from dmabuf.kernel import fence
from dmabuf.transfer.engine import Engine, Job, this_thread
from dmabuf.transfer.shared_pages import RETRY_PAUSE, SharedPagesLock

T = TypeVar("T")

SLICE = 0.1
"""Seconds of one wait: a signal just before a system call does not interrupt the call."""


_SEGMENTS = (
    "segments must be native unsigned 8-byte integers, flat or of shape (n, 3), such as array('Q')"
)


class Segments:
    """An array of segments: file offset, buffer offset and size of each, in bytes."""

    __slots__ = ("array", "asked", "count", "whole")

    def __init__(self, array: Any, count: int, whole: bool, asked: Any = None) -> None:
        self.array = array
        self.count = count
        self.whole = whole
        """Whether a read that meets the end of the file is an error."""
        self.asked: Segments | None = asked
        """The caller's segments, if this array joins adjacent ones of them; else None."""

    def at(self, index: int) -> tuple[int, int, int]:
        """Return file offset, buffer offset and size of a segment."""
        return tuple(self.array[3 * index : 3 * index + 3])

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return (self.at(index) for index in range(self.count))

    def file_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield where each segment that is not empty begins and ends in the file."""
        return ((offset, offset + size) for offset, _, size in self if size)

    def file_reached(self, nbytes: int) -> int:
        """Return how far in the file the first `nbytes` of the segments reach; 0 for none."""
        reached = 0
        for offset, _, size in self:
            if nbytes <= 0:
                break
            reached = max(reached, offset + min(size, nbytes))
            nbytes -= size
        return reached

    def find(self, nbytes: int) -> tuple[int, int]:
        """Return the segment that holds the byte after the first `nbytes`, and its place there.

        The segments have more than `nbytes` bytes.
        """
        index = 0
        while nbytes >= (size := self.array[3 * index + 2]):
            nbytes -= size
            index += 1
        return index, nbytes

    def index(self, nbytes: int) -> int:
        """Return the caller's segment that holds the byte after the first `nbytes`."""
        return (self.asked or self).find(nbytes)[0]

    def file_offset(self, nbytes: int) -> int:
        """Return the file offset of the byte after the first `nbytes` of the segments."""
        index, place = self.find(nbytes)
        return self.at(index)[0] + place

    def error(self, index: int, limit: int, *, overlaps: bool) -> ValueError:
        """Return the error for a segment that overlaps another in the file, or leaves a buffer.

        `limit` is the size of the buffer in bytes.
        """
        offset, start, size = self.at(index)
        which = f"file_offset={offset} buffer_offset={start} size={size}"
        if self.whole:
            which = f"segment {index} ({which})"
        if overlaps:
            return ValueError(f"{which} overlaps another segment in the file")
        text = f"leaves the buffer of {limit} bytes or the largest file offset, 2^63-1"
        return ValueError(f"{which} {text}")

    def overlap(self) -> bool:
        """Return whether two segments overlap in the buffer."""
        end = 0
        for start, size in sorted((start, size) for _, start, size in self if size):
            if start < end:
                return True
            end = start + size
        return False


@contextmanager
def segments_of(array: object) -> Iterator[Segments]:
    """Yield an array of ranges, which cannot be resized until the block ends.

    Raises:
        TypeError, ValueError: the array is not a contiguous array of triples.
    """
    _check_triples(array)
    # A single context: of two, an interrupt could end the outer one first, which is a BufferError.
    with ffi.from_buffer("uint64_t[]", array) as held:
        yield Segments(held, len(held) // 3, True)


def _check_triples(array: object) -> None:
    try:
        view = memoryview(array)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{_SEGMENTS}, not {type(array).__name__}") from None
    if view.format.lstrip("@=") not in ("Q", "L") or view.itemsize != 8:
        raise TypeError(f"{_SEGMENTS}, not one of format {view.format!r}")
    if not view.c_contiguous:
        raise TypeError(f"{_SEGMENTS}, contiguous in memory")
    shape = view.shape or ()
    flat = len(shape) == 1 and shape[0] % 3 == 0
    if not flat and not (len(shape) == 2 and shape[1] == 3):
        raise ValueError(f"{_SEGMENTS}, not of shape {shape}")


class Waiter(Protocol):
    """The interface by which a transfer waits."""

    blocking: bool
    """Whether the calling thread may wait in a system call."""

    async def run(self, engine: Engine, job: Job) -> Job:
        """Run a job to its end, and return it, with the exception that interrupted it if any."""

    async def fences(
        self,
        fds: Sequence[int],
        access: fence.Access,
        timeout: float | None,
        spent: float,
        path: str,
    ) -> None:
        """Wait until the dma-bufs may be accessed; raise TimeoutError after the timeout.

        `spent` is how many seconds of the timeout have passed.
        """

    async def ready(
        self, fd: int, access: Literal["read", "write"], deadline: float | None, path: str
    ) -> None:
        """Wait until a stream can be read or written; raise TimeoutError after the deadline.

        `deadline` is a value of time.monotonic(), or None to wait without limit.
        """

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function that may block, for files that poll(2) does not support."""


class Stopping(threading.local):
    """A per-thread hook by which another thread stops a transfer that waits for a peer."""

    check: Callable[[], object] | None = None
    """Called ten times a second while the thread waits for a peer; an exception ends the wait."""


stopping = Stopping()


class Blocking:
    """A Waiter that waits in the calling thread."""

    blocking = True

    async def run(self, engine: Engine, job: Job) -> Job:
        """Run a job to its end."""
        # A transfer inside another, in a signal handler, would wait for the outer one for ever.
        if not job.measure.shared_pages or in_transfer(2):
            return engine.run(job)
        lock = SharedPagesLock(job)
        try:
            while not lock.acquire():
                if stopping.check is not None:
                    stopping.check()
                time.sleep(RETRY_PAUSE)
            return engine.run(job)
        finally:
            lock.holders.pop(lock, None)

    async def fences(
        self,
        fds: Sequence[int],
        access: fence.Access,
        timeout: float | None,
        spent: float,
        path: str,
    ) -> None:
        """Wait until the dma-bufs may be accessed."""
        fence.wait(fds, access, timeout, spent=spent, path=path, tick=stopping.check)

    async def ready(
        self, fd: int, access: Literal["read", "write"], deadline: float | None, path: str
    ) -> None:
        """Wait until a stream can be read or written."""
        poll = select.poll()
        poll.register(fd, select.POLLIN if access == "read" else select.POLLOUT)
        while True:
            if stopping.check is not None:
                stopping.check()
            left = SLICE if deadline is None else max(0.0, deadline - time.monotonic())
            if poll.poll(1000 * min(left, SLICE)):
                return
            if not left:
                raise late(path)

    async def call(self, function: Callable[[], T]) -> T:
        """Call the function."""
        return function()


BLOCKING = Blocking()

Progress = Callable[[int, int | None], object]
"""What is called with the bytes moved and their expected sum, None if that is unknown."""


def part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return what to call with the progress of a part, of which `before` bytes precede it."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


class Reporting(Blocking):
    """A Waiter that waits in the calling thread, and reports progress meanwhile."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total

    async def run(self, engine: Engine, job: Job) -> Job:
        """Run a job to its end."""
        job.report = lambda done: self._progress(min(done, self._total), self._total)
        return await super().run(engine, job)


def complete(transfer: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine whose waiter is Blocking, and return its result."""
    this_thread.transfers += 1
    try:
        transfer.send(None)
        transfer.close()
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        this_thread.transfers -= 1
    raise RuntimeError("a transfer with a Blocking waiter suspended")


def in_transfer(count: int = 1) -> bool:
    """Return whether this thread runs `count` transfers, one inside another.

    The inner ones are those of signal handlers and destructors.
    """
    return this_thread.transfers >= count


def late(path: str) -> OSError:
    """Return the TimeoutError for a stream whose peer did nothing."""
    text = "the peer did nothing in time; pass a longer timeout or look at what the peer waits for"
    return os_error(errno.ETIMEDOUT, text, path)

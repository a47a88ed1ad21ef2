"""Pipes, sockets and character devices: read and written in order, by poll, read and write.

Only system calls that Python itself answers signals in, so Ctrl-C ends a wait at once, and no
ring is held while a peer keeps us waiting.
"""

from __future__ import annotations

import errno
import os
import select
import time

from dmabuf.errors import os_error

CHUNK = 1 << 20
"""Bytes asked for at once: what a large pipe holds."""
SLICE_MS = 100
"""How often a wait looks for signals."""


def _ready(fd: int, event: int, deadline: float | None, path: str) -> None:
    """Wait until `fd` can be read or written, or raise TimeoutError at the deadline.

    In slices: a signal that arrives between Python's look for one and the poll would otherwise go
    unanswered for as long as the peer keeps still.
    """
    poll = select.poll()
    poll.register(fd, event)
    while not poll.poll(_slice(deadline)):
        if deadline is not None and time.monotonic() >= deadline:
            text = "the peer did nothing in time: give timeout= more, or look at what it waits for"
            raise os_error(errno.ETIMEDOUT, text, path)


def _slice(deadline: float | None) -> float:
    """Milliseconds to wait before looking around."""
    if deadline is None:
        return SLICE_MS
    return max(0.0, min((deadline - time.monotonic()) * 1000, SLICE_MS))


def read_all(fd: int, view: memoryview, timeout: float | None, path: str) -> tuple[int, int]:
    """Read until the view is full or the stream ends.

    Args:
        fd: a descriptor, blocking or not.
        view: where to.
        timeout: seconds to wait for the first byte; None waits for ever.
        path: for the error.

    Returns:
        Bytes read, and how many reads it took.

    Raises:
        OSError: with `nbytes`, the bytes that were read before it.
    """
    done = requests = 0
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while done < len(view):
            _ready(fd, select.POLLIN, deadline if done == 0 else None, path)
            try:
                got = os.readv(fd, [view[done : done + CHUNK]])
            except BlockingIOError:
                continue
            requests += 1
            if got == 0:
                break
            done += got
    except OSError as error:
        raise _telling(error, "reading", done, len(view), path) from error
    return done, requests


def write_all(fd: int, view: memoryview, timeout: float | None, path: str) -> tuple[int, int]:
    """Write all of a view.

    Returns:
        Bytes written, and how many writes it took.

    Raises:
        OSError: with `nbytes`, the bytes that were written before it.
    """
    done = requests = 0
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while done < len(view):
            _ready(fd, select.POLLOUT, deadline if done == 0 else None, path)
            try:
                done += os.writev(fd, [view[done : done + CHUNK]])
            except BlockingIOError:
                continue
            requests += 1
    except OSError as error:
        raise _telling(error, "writing", done, len(view), path) from error
    return done, requests


def _telling(error: OSError, verb: str, done: int, size: int, path: str) -> OSError:
    text = f"{verb} failed after {done} of {size} bytes: {error.strerror}"
    raised = os_error(error.errno or errno.EIO, text, path)
    raised.nbytes = done  # type: ignore[attr-defined]
    return raised

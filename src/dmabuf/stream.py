"""Pipes, sockets and character devices: read and written in order, by poll, read and write.

Written down as generators that yield where they wait for the peer (see steps.py). Only system calls
that Python itself answers signals in, so Ctrl-C ends a wait at once, and no ring is held while a
peer keeps us waiting.

An event loop must not wait anywhere else either, and a descriptor may be a blocking one that others
share, so its flags are not ours to change. There each read and write says RWF_NOWAIT. Where the
kernel does not know that of a file (EOPNOTSUPP: terminals, pipes before Linux 6.2), poll has to do:
a read after POLLIN returns what is there, and a write of at most PIPE_BUF after POLLOUT fits.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable

from dmabuf.errors import os_error
from dmabuf.steps import Ready, Steps, here

CHUNK = 1 << 20
"""Bytes asked for at once: what a large pipe holds."""


def write_all(fd: int, view: memoryview, timeout: float | None, path: str) -> tuple[int, int]:
    """`writing`, with each wait made on the spot."""
    return here(writing(fd, view, timeout, path))


def reading(
    fd: int, view: memoryview, timeout: float | None, path: str, *, nowait: bool = False
) -> Steps[tuple[int, int]]:
    """Read until the view is full or the stream ends.

    Args:
        fd: a descriptor, blocking or not.
        view: where to.
        timeout: seconds to wait for the first byte; None waits for ever.
        path: for the error.
        nowait: never wait in the read itself, whatever another reader takes meanwhile.

    Returns:
        Bytes read, and how many reads it took.

    Raises:
        OSError: with `nbytes`, the bytes that were read before it.
    """
    done = requests = 0
    deadline = None if timeout is None else time.monotonic() + timeout
    read = _Now(_read_now, os.readv, CHUNK) if nowait else os.readv
    try:
        while done < len(view):
            yield Ready(fd, "read", deadline if done == 0 else None, path)
            try:
                got = read(fd, [view[done : done + CHUNK]])
            except BlockingIOError:
                continue
            requests += 1
            if got == 0:
                break
            done += got
    except OSError as error:
        raise _telling(error, "reading", done, len(view), path) from error
    return done, requests


def writing(
    fd: int, view: memoryview, timeout: float | None, path: str, *, nowait: bool = False
) -> Steps[tuple[int, int]]:
    """Write all of a view.

    Returns:
        Bytes written, and how many writes it took.

    Raises:
        OSError: with `nbytes`, the bytes that were written before it.
    """
    done = requests = 0
    deadline = None if timeout is None else time.monotonic() + timeout
    write = _Now(_write_now, os.writev, select.PIPE_BUF) if nowait else os.writev
    try:
        while done < len(view):
            yield Ready(fd, "write", deadline if done == 0 else None, path)
            try:
                done += write(fd, [view[done : done + CHUNK]])
            except BlockingIOError:
                continue
            requests += 1
    except OSError as error:
        raise _telling(error, "writing", done, len(view), path) from error
    return done, requests


class _Now:
    """Reading or writing without a wait: by RWF_NOWAIT, or little enough where that is unknown."""

    def __init__(
        self,
        now: Callable[[int, list[memoryview]], int],
        plain: Callable[[int, list[memoryview]], int],
        most: int,
    ) -> None:
        self._now, self._plain, self._most = now, plain, most
        self._known = True

    def __call__(self, fd: int, views: list[memoryview]) -> int:
        if self._known:
            try:
                return self._now(fd, views)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._known = False
        return self._plain(fd, [views[0][: self._most]])


def _read_now(fd: int, views: list[memoryview]) -> int:
    return os.preadv(fd, views, -1, os.RWF_NOWAIT)


def _write_now(fd: int, views: list[memoryview]) -> int:
    return os.pwritev(fd, views, -1, os.RWF_NOWAIT)


def _telling(error: OSError, verb: str, done: int, size: int, path: str) -> OSError:
    text = f"{verb} failed after {done} of {size} bytes: {error.strerror}"
    raised = os_error(error.errno or errno.EIO, text, path)
    raised.nbytes = done  # type: ignore[attr-defined]
    return raised

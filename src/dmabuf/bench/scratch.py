"""A file to measure on that nobody else has: without a name, so that nothing of it can be left."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dmabuf.errors import os_error
from dmabuf.sizes import format_size
from dmabuf.verify import Patterns

_PIECE = 4 << 20
_SPARE = 1.05
"""Free space that is asked for, times the size: the filesystem's tables take some."""


@contextmanager
def scratch(folder: str) -> Iterator[int]:
    """An empty file in a folder: its descriptor. The kernel frees it when that is closed.

    Raises:
        OSError: the folder is none, or no file can be made there.
    """
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - with, below
    except OSError as error:
        text = f"a scratch file cannot be made there: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, folder) from None
    with file:
        yield file.fileno()


def check_space(fd: int, size: int, folder: str) -> None:
    """Raise OSError(ENOSPC), with the figures, where a file of `size` bytes does not fit."""
    answer = os.fstatvfs(fd)
    free = answer.f_bavail * answer.f_frsize
    if size * _SPARE > free:
        text = (
            f"has {format_size(free)} free, and a scratch file of {format_size(size)} may take "
            f"{format_size(int(size * _SPARE))}: give a smaller --size, or another --dir"
        )
        raise os_error(errno.ENOSPC, text, folder)


def fill(
    fd: int,
    size: int,
    least: int,
    seed: int,
    deadline: float,
    progress: Callable[[int], object],
) -> int:
    """Put random bytes there, on the medium: `size` of them, or as many as there is time for.

    `least` of them are put there whatever the time. Returns how many were.
    """
    patterns = Patterns(seed)
    done = 0
    while done < size and (done < least or time.monotonic() < deadline):
        data = memoryview(patterns.at("scratch", done, min(_PIECE, size - done)))
        while data:
            written = os.pwrite(fd, data, done)
            done += written
            data = data[written:]
        os.fdatasync(fd)
        progress(done)
    return done

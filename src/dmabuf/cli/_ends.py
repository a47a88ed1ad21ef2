"""SRC and DST of a command, looked at; and errors that name them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dmabuf.cli import _output


@dataclass(frozen=True, slots=True)
class End:
    """SRC or DST, looked at."""

    what: str | int
    """The path, or the descriptor of standard input or output."""
    name: str
    status: os.stat_result | None
    """None where there is nothing yet."""
    offset: int = 0

    @property
    def again(self) -> bool:
        """Whether its bytes can be read a second time."""
        mode = self.status.st_mode if self.status else stat.S_IFREG
        return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


@contextmanager
def telling(source: End, target: End, temporary: str | None) -> Iterator[None]:
    """Errors by the names that the user gave, with what became of the target."""
    try:
        yield
    except OSError as error:
        names = {temporary: target.name} if temporary else {}
        for end in (source, target):
            names[f"descriptor {end.what}"] = end.name
        error.filename = names.get(error.filename, error.filename)
        moved = getattr(error, "nbytes", None)
        if temporary:
            state = "no file was made" if target.status is None else "the old file is as it was"
            so_far = f"after {moved} whole bytes; " if moved else ""
            error.strerror = f"{error.strerror} ({so_far}{state})"
        elif moved is not None:
            error.strerror = f"{error.strerror} ({moved} whole bytes were copied)"
        raise


def find_source(name: str) -> End:
    """SRC, which has to be there."""
    if name == "-":
        return _standard(0, _output.STDIN, sys.stdin)
    status = os.stat(name)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "is a directory: name a file in it", name)
    return End(name, name, status)


def find_target(name: str, source: str) -> End:
    """DST; in a directory, a file of the source's name."""
    if name in ("-", "/dev/stdout"):
        return _standard(1, _output.STDOUT, sys.stdout)
    try:
        status = os.stat(name)
    except FileNotFoundError:
        if name.endswith("/") or not name:
            raise
        return End(name, name, None)
    if not stat.S_ISDIR(status.st_mode):
        return End(name, name, status)
    if source == "-":
        raise OSError(errno.EISDIR, "is a directory, and standard input has no name", name)
    inside = os.path.join(name, os.path.basename(source))
    try:
        status = os.stat(inside)
    except FileNotFoundError:
        return End(inside, inside, None)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "is a directory: nothing was copied over it", inside)
    return End(inside, inside, status)


def _standard(fd: int, name: str, stream: object) -> End:
    """Standard input or output: at its position, where it has one."""
    if stream is None:
        raise OSError(errno.EBADF, "is closed", name)
    status = os.fstat(fd)
    has_position = stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)
    return End(fd, name, status, os.lseek(fd, 0, os.SEEK_CUR) if has_position else 0)


def advance(source: End, target: End, nbytes: int) -> None:
    """Leave standard input and output where the next program goes on."""
    for end in (source, target):
        if isinstance(end.what, int) and end.again and not _appends(end.what):
            os.lseek(end.what, end.offset + nbytes, os.SEEK_SET)


def _appends(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)

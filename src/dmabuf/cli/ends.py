"""SRC and DST of a command: examining them, replacing a regular DST, and naming them in errors."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO, TypeVar

from dmabuf.cli import output
from dmabuf.copying import Replacement

if TYPE_CHECKING:
    from dmabuf.remote import RemoteFile

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class End:
    """SRC or DST."""

    what: str | int
    """The path, or the descriptor of standard input or output."""
    name: str
    status: os.stat_result | None = None
    """None if it does not exist yet."""
    offset: int = 0
    remote: RemoteFile | None = None
    """A SRC on another node, open."""
    replacing: Callable[[], AbstractContextManager[RemoteFile]] | None = None
    """Makes the new file of a DST on another node, which gets its name at the end."""

    @property
    def rereadable(self) -> bool:
        """Whether its bytes can be read a second time."""
        mode = self.status.st_mode if self.status else stat.S_IFREG
        return stat.S_ISREG(mode) or stat.S_ISBLK(mode)

    @property
    def replaced(self) -> bool:
        """Whether it is a regular file by its path, which a command replaces as a whole."""
        regular = self.status is None or stat.S_ISREG(self.status.st_mode)
        return regular and isinstance(self.what, str) and self.replacing is None

    @property
    def report_stream(self) -> TextIO:
        """Where the result goes: standard error if standard output has the bytes."""
        return sys.stderr if self.what == 1 else sys.stdout


@contextmanager
def opened(source: str, target: str, *, sync: bool) -> Iterator[tuple[End, End]]:
    """Give SRC and DST. The connections to other nodes, for dmabuf:// URLs, close at the end."""
    with ExitStack() as stack:
        yield (
            _on_a_node(source, stack, None) or find_source(source),
            (_on_a_node(target, stack, sync) or find_target(target, source)),
        )


def _on_a_node(name: str, stack: ExitStack, sync: bool | None) -> End | None:
    """Return a file of another node; `sync` is None for SRC."""
    if not name.startswith("dmabuf://"):
        return None
    from dmabuf.remote import connect, parse_url

    address, path = parse_url(name)
    node = stack.enter_context(connect(address))
    if sync is None:
        return End(name, name, remote=stack.enter_context(node.open(path)))
    return End(name, name, replacing=lambda: node.replacing(path, sync=sync))


def find_source(name: str) -> End:
    """Return SRC. Raises OSError if it does not exist or is a directory."""
    if name == "-":
        return _standard(0, output.STDIN, sys.stdin)
    status = os.stat(name)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "is a directory: name a file in it", name)
    return End(name, name, status)


def find_target(name: str, source: str) -> End:
    """Return DST; in a directory, a file with the source's name."""
    if name in ("-", "/dev/stdout"):
        return _standard(1, output.STDOUT, sys.stdout)
    try:
        status = os.stat(name)
    except FileNotFoundError:
        if name.endswith("/") or not name:
            raise
        return End(name, name)
    if not stat.S_ISDIR(status.st_mode):
        return End(name, name, status)
    if source == "-":
        raise OSError(errno.EISDIR, "is a directory, and standard input has no name", name)
    inside = os.path.join(name, os.path.basename(source))
    try:
        status = os.stat(inside)
    except FileNotFoundError:
        return End(inside, inside)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "is a directory: nothing was copied over it", inside)
    return End(inside, inside, status)


def _standard(fd: int, name: str, stream: object) -> End:
    """Return standard input or output, at its position if it has one."""
    if stream is None:
        raise OSError(errno.EBADF, "is closed", name)
    status = os.fstat(fd)
    has_position = stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)
    return End(fd, name, status, os.lseek(fd, 0, os.SEEK_CUR) if has_position else 0)


def move_bytes(
    source: End,
    target: End,
    move: Callable[[str | int], _Made],
    *,
    force: bool,
    sync: bool,
    like: os.stat_result | None = None,
) -> tuple[_Made, str | None]:
    """Call `move` with the path or descriptor to write to.

    Returns its result, and why a regular file was written in place; None if it was replaced.

    A regular target appears whole when `move` has returned, or not at all; everything else is
    written in place. `like` gives a new file its mode and times.
    """
    if not target.replaced:
        with naming(source, target, None):
            return move(target.what), None
    assert isinstance(target.what, str)
    with Replacement(target.what, force=force, note=output.note) as place:
        with naming(source, target, None if place.in_place else place.temporary):
            made = move(place.temporary)
            place.commit(like, sync=False)
        if sync and place.in_place is None:
            place.sync_name()
        return made, place.in_place


@contextmanager
def naming(source: End, target: End, temporary: str | None) -> Iterator[None]:
    """Give errors the names that the user gave, and the state of the target."""
    try:
        yield
    except OSError as error:
        names = {f"descriptor {end.what}": end.name for end in (source, target)}
        if temporary:
            names[temporary] = target.name
        error.filename = names.get(error.filename, error.filename)
        moved = getattr(error, "nbytes", None)
        if temporary:
            state = "no file was made" if target.status is None else "the old file is unchanged"
            so_far = f"after {moved} whole bytes; " if moved else ""
            error.strerror = f"{error.strerror} ({so_far}{state})"
        elif moved is not None:
            error.strerror = f"{error.strerror} ({moved} whole bytes were copied)"
        raise


def advance(source: End, target: End, nbytes: int) -> None:
    """Move the positions of standard input and output past what was copied."""
    for end in (source, target):
        if isinstance(end.what, int) and end.rereadable and not _appends(end.what):
            os.lseek(end.what, end.offset + nbytes, os.SEEK_SET)


def _appends(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)

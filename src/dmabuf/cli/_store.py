"""The names of the store, told to people and to programs."""

from __future__ import annotations

import grp
import pwd
import time
from stat import S_IFREG, filemode
from typing import Any

from dmabuf.cli import _output
from dmabuf.store import Status, connect


def run(socket: str | None, *, json: bool) -> None:
    """List the store's names.

    Raises:
        OSError: no store serves there.
    """
    with connect(socket) as store:
        found = store.list()
    if json:
        _output.say_json([as_json(one) for one in found])
        return
    rows = [
        (
            permissions(one),
            user(one.uid),
            group(one.gid),
            str(one.length),
            one.exporter,
            moment(one.modified_ns),
            one.name,
        )
        for one in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for mode, owner, members, length, *rest in rows:
        texts = [mode, owner, members, length.rjust(widths[3]), *rest]
        _output.say(" ".join(map(str.ljust, texts, widths)).rstrip())


def as_json(status: Status) -> dict[str, Any]:
    """A name for programs; keys are only ever added."""
    return status._asdict()


def permissions(status: Status) -> str:
    """As ls(1) has them: `-rw-r-----`."""
    return filemode(S_IFREG | status.mode)


def user(uid: int) -> str:
    """A user's name, or the number of one without."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group(gid: int) -> str:
    """A group's name, or the number of one without."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def moment(nanoseconds: int) -> str:
    """A time, as `ls -l --time-style=long-iso` has it, with seconds."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))

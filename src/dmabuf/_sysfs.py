"""What the kernel tells in small text files, under /proc and /sys."""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple


def read(*path: str) -> str:
    """A file's text, "" where it does not exist or is not ours to read."""
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="replace", newline="\n") as file:
            return file.read()
    except OSError:
        return ""


def number(*path: str) -> int | None:
    """The number that is all of a file's text; None where there is no such number."""
    text = read(*path).strip()
    return int(text) if text.isdecimal() else None


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo: what a mount point shows of which filesystem."""

    point: str
    below: str
    kind: str
    options: str


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def mounts(root: str = "/") -> Iterator[Mount]:
    """The mounts that this process sees, under names that may be any bytes: see proc(5).

    Raises OSError: /proc is not mounted.
    """
    with open(os.path.join(root, "proc/self/mountinfo"), "rb") as lines:
        for line in lines:
            head, _, tail = line.rstrip(b"\n").partition(b" - ")
            below, point = (
                os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), name))
                for name in head.split(b" ")[3:5]
            )
            kind, _, options = os.fsdecode(tail).split(" ", 2)
            yield Mount(point, below, kind, options)

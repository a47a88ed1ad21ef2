"""Text files of the kernel, under /proc and /sys."""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple


def read(*path: str) -> str:
    """Return a file's text; "" if it does not exist or this user may not read it."""
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="replace", newline="\n") as file:
            return file.read()
    except OSError:
        return ""


def number(*path: str) -> int | None:
    """Return the number that a file consists of; None if its text is not a number."""
    text = read(*path).strip()
    return int(text) if text.isdecimal() else None


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo: a mount point, and the part of a filesystem that it shows."""

    point: str
    below: str
    kind: str
    options: str


DMABUF_PATH = "/dmabuf:"
"""The start of a dma-buf's path in /proc (dmabuffs_dname in drivers/dma-buf/dma-buf.c)."""


class DmabufInfo(NamedTuple):
    """A dma-buf in /proc/PID/fdinfo; a field that the kernel does not write is None."""

    exporter: str
    name: str | None
    inode: int | None
    size: int | None
    """Bytes."""
    references: int | None
    """All references to its file: descriptors, mappings and the kernel's own."""


def parse_fdinfo(text: str) -> DmabufInfo | None:
    """Parse a descriptor's fdinfo; None if it is not a dma-buf's.

    Only a dma-buf's fdinfo names an exporter, and the label comes last (dma_buf_show_fdinfo). A
    holder may set the label to any text, newlines included.
    """
    head, labelled, label = text.partition("\nname:\t")
    fields = dict(line.split(":", 1) for line in head.split("\n") if ":" in line)
    if "exp_name" not in fields:
        return None
    return DmabufInfo(
        fields["exp_name"].strip(),
        label.removesuffix("\n") if labelled else None,
        *(_number(fields.get(name)) for name in ("ino", "size", "count")),
    )


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() else None


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def mounts(root: str = "/") -> Iterator[Mount]:
    """Yield the mounts of this process's namespace: see proc(5). Names may have any bytes.

    Raises OSError if /proc is not mounted.
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

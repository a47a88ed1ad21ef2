"""One file of the mount: what is known of it, and its bytes, whoever holds them."""

from __future__ import annotations

import errno
from typing import NamedTuple

from dmabuf.buffer import Buffer
from dmabuf.errors import os_error
from dmabuf.mount import content
from dmabuf.mount.content import Growing, Part
from dmabuf.store import Status


class Attributes(NamedTuple):
    """What stat(2) tells of a file. ``memory`` is the bytes that it takes; times are in ns."""

    ino: int
    links: int
    mode: int
    uid: int
    gid: int
    size: int
    memory: int
    accessed_ns: int
    modified_ns: int
    changed_ns: int


class Node:
    """A file. Its bytes are in ``buffer`` while it is open, or in ``growing`` while it grows.

    ``number`` is the store's, None while the store has no such name yet; ``name`` is None when it
    was unlinked. ``status`` is what the store said last, or what it will be told.
    """

    def __init__(self, ino: int, name: str, number: int | None, status: Status) -> None:
        self.ino, self.number, self.status = ino, number, status
        self.name: str | None = name
        self.lookups = 0
        self.handles = 0
        self.aside = False
        """Whether a thread changes it: what the store says now may be older than what that sets."""
        self.buffer: Buffer | None = None
        self.growing: Growing | None = None
        self.length = status.length
        self.accessed_ns: int | None = None
        """Not told to the store yet; None if there is nothing to tell."""
        self.modified_ns: int | None = None

    @property
    def stored(self) -> bool:
        """Whether the store has it, as far as is known."""
        return self.name is not None and self.number is not None

    @property
    def size(self) -> int:
        """Bytes of content."""
        growing = self.growing  # once: a thread may end it meanwhile
        return self.length if growing is None else growing.length

    def attributes(self) -> Attributes:
        """What is known of it."""
        status, growing = self.status, self.growing
        memory = status.size if growing is None else growing.capacity
        accessed, modified = self.accessed_ns, self.modified_ns
        return Attributes(
            self.ino,
            0 if self.name is None else 1,
            status.mode,
            status.uid,
            status.gid,
            self.size,
            memory,
            status.accessed_ns if accessed is None else accessed,
            status.modified_ns if modified is None else modified,
            max(status.changed_ns, modified or 0),
        )

    def refresh(self, status: Status) -> None:
        """The store said this of it now."""
        if self.length == self.status.length:
            self.length = status.length
        self.status = status

    def memory(self) -> Buffer:
        """Its buffer, while it is open. Raises OSError(ESTALE) where the store took it back."""
        if self.buffer is None:
            raise os_error(errno.ESTALE, "its memory is gone: open it again", self.status.name)
        return self.buffer

    def fits(self, end: int) -> bool:
        """Whether there is room for bytes up to ``end``."""
        if self.growing is not None:
            return end <= self.growing.capacity
        return self.buffer is not None and end <= self.buffer.size

    def read(self, offset: int, size: int) -> Part:
        """At most ``size`` bytes of content; b"" past its end."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        if self.growing is not None:
            return self.growing.read(offset, size)
        return content.lend(self.memory(), offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Put bytes at an offset, for which there is room."""
        if self.growing is not None:
            self.growing.write(offset, data)
            return
        self.lengthen(offset)
        content.put(self.memory(), offset, data)
        self.length = max(self.length, offset + len(data))

    def lengthen(self, length: int) -> None:
        """Have zeros up to ``length``, for which there is room in its buffer."""
        if length > self.length:
            content.zero(self.memory(), self.length, length)
            self.length = length

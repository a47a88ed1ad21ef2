"""Buffers of this process that a node serves under names, without a store."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence

from dmabuf.errors import os_error
from dmabuf.memory import Buffer


class Lending:
    """Names for Buffers of this process, which a node of `serving` lets clients fetch.

    Clients read a Buffer where it is; nothing is copied before. It cannot be closed while a client
    reads it. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: dict[str, Buffer] = {}

    def add(self, name: str, buffer: Buffer) -> None:
        """Serve a buffer under a name, in place of another one of that name."""
        with self._lock:
            self._buffers[name] = buffer

    def remove(self, name: str) -> None:
        """Serve a name no more. Can be called again; a fetch under way goes on."""
        with self._lock:
            self._buffers.pop(name, None)

    def lend(self, names: Sequence[str]) -> list[Buffer | OSError]:
        """Return each name's buffer, or the error that there is none."""
        with self._lock:
            found = [self._buffers.get(name) for name in names]
        return [
            os_error(errno.ENOENT, "no buffer has this name", name) if one is None else one
            for one, name in zip(found, names, strict=True)
        ]

"""The lifetime of a device handle, and what a device needs to know of a Buffer that it uses.

A handle is closed once, belongs to the process that opened it, and is never copied. A Buffer that
a device uses cannot be closed until the device has released it.
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from dmabuf.errors import ClosedError, Uncopyable
from dmabuf.kernel import process
from dmabuf.memory import Buffer

__all__ = ["DeviceHandle"]


class DeviceHandle(Uncopyable, instead="open the device again in the process that needs it"):
    """An open handle of a device: a context manager, closed once, in the process that opened it.

    A subclass calls :meth:`_opened` at the end of ``__init__``, implements :meth:`close`, and sets
    ``_closed`` there. A handle that is dropped while open closes itself with a ResourceWarning.
    """

    _closed = True  # until _opened() is called: a half-made handle has nothing to close
    _pid = 0

    def _opened(self) -> None:
        """Mark the handle as open in this process."""
        self._pid = process.pid
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the handle was closed."""
        return self._closed

    @property
    def forked(self) -> bool:
        """Whether the handle was opened by another process, which forked this one."""
        return self._pid != process.pid

    def check_open(self) -> None:
        """Raise ClosedError if the handle is closed, or was opened before a fork."""
        if self.closed:
            raise ClosedError(f"use {self!r}: it is closed; open another one")
        if self.forked:
            raise ClosedError(f"use {self!r}: it was opened before fork(); open one here")

    def close(self) -> None:
        """Close the handle. Closing it again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @process.finalizer
    def __del__(self) -> None:
        if self._closed:
            return
        try:
            if not self.forked:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=3)
        finally:
            with suppress(BufferError):
                self.close()


# What a device needs of a Buffer. These are the only uses of Buffer internals in this room.


def check_buffer(buffer: object) -> Buffer:
    """Return the argument if it is a Buffer, or raise TypeError."""
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
    return buffer


def descriptor_writable(buffer: Buffer) -> bool:
    """Whether the buffer's descriptors permit a device to write. Raises ClosedError."""
    flags = fcntl.fcntl(buffer.slabs[0].fd, fcntl.F_GETFL)
    return flags & os.O_ACCMODE != os.O_RDONLY


def hold(buffer: Buffer) -> None:
    """Keep a Buffer open until :func:`release`: ``close`` raises BusyError meanwhile."""
    buffer.hold()


def release(buffer: Buffer) -> None:
    """End one :func:`hold`."""
    buffer.release()


def lend(buffer: Buffer, device: object) -> None:
    """Hold a Buffer for a device that writes; raise BusyError if it is mapped or in a transfer."""
    buffer.lend(device)


def take_back(buffer: Buffer, device: object) -> None:
    """End a :func:`lend`, if the Buffer is lent to this device."""
    buffer.take_back(device)


def on_close(buffer: Buffer, callback: Callable[[], object]) -> None:
    """Call back once when the Buffer is closed."""
    buffer.on_close(callback)


def host_address(buffer: Buffer) -> int | None:
    """Return the address of the buffer's mapping, None where the CPU cannot map it."""
    buffer.written_by_others()
    return buffer.address


def pin_refusal(buffer: Buffer) -> str | None:
    """Return why the pages of the mapping cannot be pinned for long, None where they can."""
    return buffer.pin_refusal or buffer.registration_refusal

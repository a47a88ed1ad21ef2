"""A client's connection: a request goes out, and its reply with what was granted comes in."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dmabuf import _process
from dmabuf.errors import ClosedError
from dmabuf.store import place, protocol
from dmabuf.store.protocol import Refusal


class Connection:
    """One request at a time, from any thread. An interrupt between request and reply ends it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._pid = _process.pid
        place.check_path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            fixes = {
                errno.ENOENT: "no store serves there (start one: dmabuf serve)",
                errno.ECONNREFUSED: "the store that served there is gone (start it: dmabuf serve)",
            }
            text = fixes.get(error.errno or 0, error.strerror)
            raise OSError(error.errno, text, path) from None

    @property
    def closed(self) -> bool:
        """Whether it was closed, or has ended."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """End it."""
        with self._lock:
            self._socket.close()

    def ask(self, op: str, **fields: Any) -> tuple[dict[str, Any], list[int] | None]:
        """What the store answers, and the descriptors that came along: the caller's to close.

        None in their place: this process may not have as many.
        """
        name = fields.get("name")
        with told(name):
            request = protocol.pack_request(op, **fields)
        with self._lock:
            if self.closed or self._pid != _process.pid:
                raise ClosedError("this Store is closed, or its connection is the parent process's")
            data, descriptors = self._exchange(request)
        try:
            with told(name):
                return protocol.parse_reply(data), descriptors
        except BaseException:
            for fd in descriptors or ():
                os.close(fd)
            raise

    def _exchange(self, request: bytes) -> tuple[bytes, list[int] | None]:
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have said why
                self._socket.send(request)
            try:
                data, descriptors, flags, _ = self._receive()
            except (
                ConnectionResetError
            ):  # the kernel tells of the end first, and then what was said
                data, descriptors, flags, _ = self._receive()
        except OSError as error:
            self._socket.close()
            text = f"the store is gone, or ended the connection: {error.strerror}"
            raise OSError(error.errno, text, self.path) from None
        except BaseException:  # an interrupt: whose reply comes next would not be known
            self._socket.close()
            raise
        if not data:
            self._socket.close()
            text = "the store is gone, or ended the connection"
            raise OSError(errno.ECONNRESET, text, self.path)
        if flags & socket.MSG_CTRUNC:
            for fd in descriptors:
                os.close(fd)
            return data, None
        return data, descriptors

    def _receive(self) -> tuple[bytes, list[int], int, object]:
        return socket.recv_fds(
            self._socket,
            protocol.REPLY_BYTES + 1,
            protocol.MOST_DESCRIPTORS,
            socket.MSG_CMSG_CLOEXEC,
        )


@contextmanager
def told(name: object) -> Iterator[None]:
    """A refusal as the OSError that a program sees, about a name."""
    try:
        yield
    except Refusal as refusal:
        about = refusal.name if refusal.name is not None else name
        text = refusal.text or os.strerror(refusal.errno)
        raise OSError(refusal.errno, text, about if isinstance(about, str) else None) from None

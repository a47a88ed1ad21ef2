"""The client's connection to the store: one request and its reply at a time."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from dmabuf.errors import ClosedError
from dmabuf.store import place, protocol
from dmabuf.store.protocol import Refusal

_open: weakref.WeakSet[Connection] = weakref.WeakSet()


def _close_in_child() -> None:
    for connection in list(_open):
        connection.forget()


os.register_at_fork(after_in_child=_close_in_child)


class Connection:
    """A connection to a server. Thread-safe; an interrupt between request and reply closes it.

    If the server ends and another listens there, it connects to that one, unless ``again`` is
    False. ``timeout`` is the most seconds to wait for a reply; None is for ever.
    """

    def __init__(self, path: str, again: bool, timeout: float | None) -> None:
        self.path, self._again, self._timeout = path, again, timeout
        self._lock = threading.Lock()
        place.check_path(path)
        self._socket = self._connected()
        _open.add(self)

    def _connected(self) -> socket.socket:
        path = self.path
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            made.connect(path)
        except OSError as error:
            made.close()
            fixes = {
                errno.ENOENT: "no store is running here; start one: dmabuf serve",
                errno.ECONNREFUSED: "the store has stopped; start it: dmabuf serve",
                errno.EACCES: "permission denied: join the socket's group",
            }
            text = fixes.get(error.errno or 0, error.strerror)
            if error.errno == errno.ECONNREFUSED and not _is_socket(path):
                text = "the file is not a socket; name that of a store"
            raise OSError(error.errno, text, path) from None
        made.settimeout(self._timeout)
        return made

    @property
    def closed(self) -> bool:
        """Whether the connection was closed or has failed."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Close the connection, after a request that another thread has in flight."""
        with self._lock:
            self._socket.close()

    def forget(self) -> None:
        """Close a forked child's copy: replies belong to the parent."""
        self._lock = threading.Lock()
        self._socket.close()

    def ask(
        self, op: str, *, sending: Sequence[int] = (), **fields: object
    ) -> tuple[dict[str, Any], list[int] | None]:
        """Return the server's result and its descriptors, which the caller closes.

        `sending` are descriptors that go with the request. Those of the result are None if this
        process could not receive them (EMFILE).
        """
        name = fields.get("name")
        with reporting(name):
            request = protocol.pack_request(op, **fields)
        with self._lock:
            if self.closed:
                raise ClosedError("this Store is closed, or belongs to the parent of a fork")
            try:
                data, descriptors = self._exchange(request, sending)
            except ConnectionError:
                if not self._reconnect() or op not in protocol.REPEATABLE:
                    raise
                data, descriptors = self._exchange(request, sending)
        try:
            with reporting(name):
                return protocol.parse_reply(data), descriptors
        except BaseException:
            for fd in descriptors or ():
                os.close(fd)
            raise

    def _reconnect(self) -> bool:
        if self._again:
            with suppress(OSError):
                self._socket = self._connected()
        return not self.closed

    def _exchange(self, request: bytes, sending: Sequence[int]) -> tuple[bytes, list[int] | None]:
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # there may be a reply to read
                socket.send_fds(self._socket, [request], sending)
            try:
                data, descriptors, flags, _ = self._receive()
            except ConnectionResetError:  # reported once, before the data that was received
                data, descriptors, flags, _ = self._receive()
        except TimeoutError:
            self._socket.close()
            text = f"the store does not answer within {self._timeout} s"
            raise OSError(errno.ETIMEDOUT, text, self.path) from None
        except OSError as error:
            self._socket.close()
            text = f"the store has stopped or closed the connection: {error.strerror}"
            raise OSError(error.errno, text, self.path) from None
        except BaseException:  # after an interrupt the next reply would be that of this request
            self._socket.close()
            raise
        if not data:
            self._socket.close()
            text = "the store has stopped or closed the connection"
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
def reporting(name: object) -> Iterator[None]:
    """Raise a Refusal as the OSError of a name."""
    try:
        yield
    except Refusal as refusal:
        raise reported(refusal, name) from None


def reported(refusal: Refusal, name: object) -> OSError:
    """Return a Refusal as the OSError of a name."""
    about = refusal.name if refusal.name is not None else name
    text = refusal.text or os.strerror(refusal.errno)
    return OSError(refusal.errno, text, about if isinstance(about, str) else None)


def _is_socket(path: str) -> bool:
    with suppress(OSError):
        return stat.S_ISSOCK(os.stat(path).st_mode)
    return True

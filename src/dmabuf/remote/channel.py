"""A connection between a node and a client: messages and data over TCP, TLS or a Unix socket.

Bytes are received where they belong: recv(2) into the mapping of a Buffer. Each system call waits
for at most a tenth of a second, so that signals are handled and a stalled peer is noticed.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Literal

from dmabuf.errors import os_error
from dmabuf.remote import protocol
from dmabuf.remote.protocol import Malformed, Message
from dmabuf.transfer import stopping

Transport = Literal["tcp", "tls", "unix"]

_SLICE = 0.1
_TIMEVAL = struct.pack("@ll", 0, int(_SLICE * 1e6))
_TELL = 5.0
"""Seconds after which a message announces to the other end that the reply will come."""
_WAKE_AT = 512 << 10
"""Bytes of data for which the kernel wakes a receiver over TCP, instead of for each packet."""
_ROOM = 1024
"""Bytes that are received at once with a header; those of data among them are copied."""


class Channel:
    """A connected socket. One thread at a time reads from it, and one writes."""

    def __init__(self, connection: socket.socket, name: str, timeout: float) -> None:
        """Take over a connected socket; `timeout` is the most seconds without any progress."""
        self.name = name
        self.timeout = timeout
        self._deadline = math.inf
        self._socket = connection
        self._room = memoryview(bytearray(_ROOM))
        self._spare = self._room[:0]
        """Bytes that were received and not yet used."""
        self._out = bytearray()
        """Bytes that are sent with the next ones."""
        self._coming = self._message = 0
        """Bytes of data that have no header yet, and that the message begun still needs."""
        self._told = time.monotonic()
        self.failed = False
        """Whether the connection cannot be used any more."""
        self._file_error: OSError | None = None
        self.received = 0
        """Bytes that `read_into` has received, also where it raised."""
        self._tls = isinstance(connection, ssl.SSLSocket)
        self._unix = connection.family == socket.AF_UNIX
        if self._tls:
            connection.settimeout(_SLICE)
        else:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
        if not self._unix:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    @property
    def transport(self) -> Transport:
        """What carries the bytes."""
        return "tls" if self._tls else "unix" if self._unix else "tcp"

    @property
    def local_address(self) -> str | None:
        """This end's numeric address; None for a Unix socket."""
        return None if self._unix else str(self._socket.getsockname()[0])

    @property
    def sends_files(self) -> bool:
        """Whether sendfile(2) can be used."""
        return not self._tls

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    # -- waiting

    def limit(self, seconds: float | None) -> None:
        """Have every call fail after so many seconds from now; None is without limit."""
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds

    def _patiently(self, doing: str, call: Callable[..., int], *args: object) -> int:
        """Call until something has moved; return how many bytes."""
        begun = time.monotonic()
        last = min(begun + self.timeout, self._deadline)
        while True:
            if stopping.check is not None:
                stopping.check()
            if time.monotonic() > last:
                text = f"nothing moved in {self.timeout:g} s"
                if last == self._deadline:
                    text = "not complete in time"
                raise self._failure(errno.ETIMEDOUT, f"the other end stalled while {doing}: {text}")
            try:
                moved = call(*args)
            except (BlockingIOError, TimeoutError):
                continue
            except ssl.SSLError as error:
                text = f"TLS failed while {doing}: {error.reason or error}"
                raise self._failure(errno.ECONNRESET, text) from None
            except OSError as error:
                text = f"the connection failed while {doing}: {error.strerror}"
                raise self._failure(error.errno or errno.EIO, text) from None
            if moved:
                return moved
            text = f"the other end closed the connection while {doing}"
            raise self._failure(errno.ECONNRESET, text)

    def _failure(self, number: int, text: str) -> OSError:
        self.failed = True
        return os_error(number, text, self.name)

    def await_message(self) -> bool:
        """Wait without limit; return whether there are bytes to read, not the end."""
        while not self.is_readable(None):
            pass
        return bool(self._spare)

    def is_readable(self, milliseconds: int | None = 0) -> bool:
        """Return whether there are bytes to read, or the end; None waits without limit.

        TLS has messages of its own, so what can be read is read: into the spare bytes.
        """
        if self._spare:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not (self._tls_pending() or poll.poll(milliseconds)):
            return False
        try:
            self._spare = self._room[: self._socket.recv_into(self._room)]
        except (BlockingIOError, TimeoutError):
            return False
        except OSError:  # as the next call reports
            self._spare = self._room[:0]
        return True

    def _tls_pending(self) -> int:
        return self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0

    # -- receiving

    def read_into(self, view: memoryview) -> None:
        """Receive exactly as many bytes as fit into a view."""
        done = min(len(self._spare), len(view))
        view[:done] = self._spare[:done]
        self._spare = self._spare[done:]
        self.received += done
        early = len(view) - _WAKE_AT  # the kernel waits for bytes behind this, so they must come
        if done < early and self.transport == "tcp":
            self._wake_at(_WAKE_AT)
            self._receive_into(view[done:early])
            self._wake_at(1)
            done = early
        self._receive_into(view[done:])

    def _receive_into(self, view: memoryview) -> None:
        done, flags = 0, 0 if self._tls else socket.MSG_WAITALL
        with view:
            while done < len(view):
                with view[done:] as rest:
                    got = self._patiently("sending", self._socket.recv_into, rest, 0, flags)
                done, self.received = done + got, self.received + got

    def _wake_at(self, size: int) -> None:
        """Have the kernel wake a receiver for at least so many bytes (TCP: since Linux 4.18)."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def _read(self, size: int) -> memoryview:
        """Return the next bytes, at most `_ROOM`; the next call may overwrite them."""
        have = len(self._spare)
        if have < size:
            self._room[:have] = bytes(self._spare)
            while have < size:
                have += self._patiently("sending", self._socket.recv_into, self._room[have:])
            self._spare = self._room[:have]
        found, self._spare = self._spare[:size], self._spare[size:]
        return found

    def receive(self) -> Message | int:
        """Return the next message of JSON, or how many bytes of data come next."""
        while True:
            found = self._receive()
            if isinstance(found, int) or "wait" not in found:
                return found

    def _receive(self) -> Message | int:
        text, data = protocol.HEADER.unpack(self._read(protocol.HEADER.size))
        if bool(text) == bool(data) or text > protocol.MOST_JSON or data > protocol.MOST_DATA:
            raise Malformed("a message has an invalid header")
        if data:
            return int(data)
        if text <= _ROOM:
            return protocol.parse(bytes(self._read(text)))
        raw = bytearray(text)
        self.read_into(memoryview(raw))
        return protocol.parse(raw)

    def receive_message(self) -> Message:
        """Return the next message, which has to be one of JSON."""
        found = self.receive()
        if isinstance(found, int):
            raise Malformed("data came where none was expected")
        return found

    def receive_reply(self) -> Message:
        """Return the next message; raises Reported for the error of a node."""
        return protocol.checked(self.receive_message(), self.name)

    # -- sending

    def send(self, message: bytes, *, more: bool = False) -> None:
        """Send a message; with `more`, together with what is sent next.

        Zeros complete data that an error has cut off: the message then reports it.
        """
        if self._message:
            self._send_all(memoryview(bytes(self._message)))
        self._message = self._coming = 0
        self._out += message
        if not more or len(self._out) > 1 << 16:
            self.flush()

    def flush(self, *, more: bool = False) -> None:
        """Send what was kept back."""
        if self._out:
            out, self._out = bytes(self._out), bytearray()
            self._send_all(memoryview(out), socket.MSG_MORE if more and not self._tls else 0)

    def _send_all(self, view: memoryview, flags: int = 0) -> None:
        done = 0
        while done < len(view):
            with view[done:] as rest:  # or an exception that is kept would keep the memory in use
                done += self._patiently("receiving", self._socket.send, rest, flags)

    def announce(self, size: int) -> None:
        """Begin to send so many bytes of data, by `send_data` and `send_file` as often as needed.

        After an error the rest need not come: the message that ends the data reports it.
        """
        self._coming = size

    def _headed(self, size: int) -> int:
        """Return how many of the next bytes belong to one message, whose header is sent."""
        if not self._message:
            self._message = min(self._coming, protocol.MOST_DATA)
            self._coming -= self._message
            self._out += protocol.HEADER.pack(0, self._message)
            self.flush(more=True)
        return min(size, self._message)

    def send_data(self, view: memoryview) -> None:
        """Send bytes of memory."""
        done = 0
        while done < len(view):
            size = self._headed(len(view) - done)
            with view[done : done + size] as part:
                self._send_all(part)
            self._message -= size
            done += size

    def send_file(self, fd: int, offset: int, size: int) -> tuple[int, int]:
        """Send a range of a file, from the page cache.

        Returns how many bytes the file had, and the number of system calls. A file that shrinks
        meanwhile has fewer.
        """
        done = calls = 0
        while done < size:
            how = self._socket.fileno(), fd, offset + done, self._headed(size - done)
            sent = self._patiently("receiving", self._sendfile, *how)
            calls += 1
            if sent < 0:
                error, self._file_error = self._file_error, None
                if error is not None:
                    error.nbytes = done  # type: ignore[attr-defined]
                    raise error
                break
            done += sent
            self._message -= sent
        return done, calls

    def _sendfile(self, *how: int) -> int:
        """Call sendfile(2), and return how many bytes it sent; -1 if the file has no more."""
        try:
            return os.sendfile(*how) or -1
        except (BlockingIOError, TimeoutError, ConnectionError):
            raise
        except OSError as error:
            self._file_error = error
            return -1

    def keep_waiting(self) -> None:
        """Tell the other end from time to time that the reply will come."""
        now = time.monotonic()
        if now - self._told > _TELL and not self._message:
            self._told = now
            self.send(protocol.pack(wait=True))

    # -- the greeting

    def greet(self) -> bytes:
        """Send the greeting, and return that of the other end."""
        self.send(protocol.HELLO)
        return bytes(self._read(len(protocol.HELLO)))

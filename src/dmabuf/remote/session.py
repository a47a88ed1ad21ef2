"""The client's end of a connection: requests, and bytes between the node and a Buffer."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import accumulate

from dmabuf.copying import CopySide, Meter
from dmabuf.errors import ClosedError, IntegrityError, RouteUnavailable, TransferError, os_error
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel, Transport
from dmabuf.remote.protocol import Malformed, Message
from dmabuf.sizes import OFFSET_MAX, format_size
from dmabuf.store import Status
from dmabuf.transfer import Direction, Plan, Progress, Route, Terms, Transfer

REASONS: dict[Direction, str] = {
    "read": "the kernel copies from the socket's buffers into the buffer's mapping",
    "write": "the kernel copies from the buffer's mapping into the socket's buffers",
}
_THROUGH_SOCKETS = "the engine tcp moves bytes through the buffers of a socket"
REJECTED = {Route.NATIVE: _THROUGH_SOCKETS, Route.DIRECT: _THROUGH_SOCKETS}
_NOT_AUDITED = "not audited: the first transfer was, or audit='off'"
_UNDEFINED = "the content of the buffer's range is undefined"

_KINDS: dict[str, type] = {"str": str, "int": int, "bool": bool}

Place = tuple[int, int]
"""Where in a buffer bytes go or come from: offset and size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTransfer(Transfer):
    """The record of a finished transfer between a Buffer here and a node.

    The fields of Transfer are about this end, `remote` is about the other one.
    """

    transport: Transport
    """What carried the bytes: "tcp", "tls" or "unix"."""
    remote: CopySide
    """How the bytes moved between the node's file or memory and its socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePlan(Plan):
    """The route at this end, and the plan for the node's file."""

    transport: Transport
    remote: Plan


class Session:
    """A connection to a node. Thread-safe: one request at a time.

    A failure other than an error that the node reports closes it, because replies to the request
    may still be under way.
    """

    def __init__(self, channel: Channel) -> None:
        self.name = channel.name
        self.transport = channel.transport
        self._channel = channel
        self._lock = threading.Lock()
        self._audited: set[tuple[str, Direction]] = set()

    @property
    def closed(self) -> bool:
        """Whether it was closed or has failed."""
        return self._channel.closed

    def close(self) -> None:
        """Close the connection, after a request that another thread has in flight."""
        with self._lock:
            self._channel.close()

    def forget(self) -> None:
        """Close a forked child's copy: replies belong to the parent."""
        self._lock = threading.Lock()
        self._channel.close()

    @contextmanager
    def exchange(self, timeout: float | None = None) -> Iterator[Channel]:
        """Give the channel for requests and their replies.

        `timeout` is the most seconds without any progress; None is that of the connection.
        """
        with self._lock:
            channel = self._channel
            if channel.closed:
                raise ClosedError(f"the connection to {self.name} is closed; connect again")
            usual, channel.timeout = channel.timeout, timeout or channel.timeout
            try:
                yield channel
            except Reported as reported:
                raise reported.error from None
            except BaseException:
                channel.close()
                raise
            finally:
                channel.timeout = usual

    def check(self, reply: Message) -> Message:
        """Return a reply, or raise the error that it carries."""
        if "error" in reply:
            raise Reported(protocol.parse_error(reply, self.name))
        return reply

    def ask(self, op: str, **fields: object) -> Message:
        """Make a request, and return its reply."""
        request = protocol.pack(op=op, **fields)
        with self.exchange() as channel:
            channel.send(request)
            return self.check(channel.receive_message())

    def status(self, record: dict[str, object]) -> Status:
        """Return the status of a name. Raises OSError(EPROTO) if it is invalid."""
        kinds = {field.name: _KINDS.get(str(field.type), type(None)) for field in fields(Status)}
        if kinds != {name: type(value) for name, value in record.items()}:
            raise os_error(errno.EPROTO, "the node sent an invalid status", self.name)
        return Status(**record)  # type: ignore[arg-type]

    # -- bytes

    def receive(
        self,
        channel: Channel,
        view: memoryview,
        places: Sequence[Place],
        path: str,
        meter: Meter | None = None,
    ) -> Message:
        """Receive the data of a reply into a view, and return the message that ends it.

        Args:
            channel: the connection.
            view: the memory.
            places: where in the view the bytes go, one place after the other.
            path: what the data is of, for errors.
            meter: called with the bytes received.
        """
        done, cursor = 0, _Cursor(view, places)
        try:
            while isinstance(found := channel.receive(), int):
                for part in cursor.take(found):
                    with part:
                        channel.read_into(part)
                        done += len(part)
                if meter is not None:
                    meter(done)
        except OSError as error:
            text = f"{error.strerror}; {_UNDEFINED}"
            raise TransferError(error.errno or errno.EIO, text, path, nbytes=done) from None
        if "error" not in found and found.number("nbytes") != done:
            raise Malformed("fewer bytes came than the node reports")
        return self.check(found)

    def receive_names(
        self,
        channel: Channel,
        buffer: Buffer,
        view: memoryview,
        names: Sequence[tuple[str, int, int]],
        limit: int,
    ) -> list[RemoteTransfer | OSError]:
        """Receive the contents of names into their places of a view, and return their outcomes.

        Args:
            channel: the connection, on which the request was sent.
            buffer: the buffer.
            view: its memory.
            names: for each its name, its place in the view, and the room there.
            limit: how many bytes of each to compare with the checksum of the other end.
        """
        begun, places = time.perf_counter(), list[Place]()
        told = self.check(channel.receive_message()).outcomes("names")
        if len(told) != len(names):
            raise Malformed("other names were answered than requested")
        for one, (_, start, room) in zip(told, names, strict=True):
            if isinstance(one, Message):
                continue
            if one > room:
                raise Malformed("more data came than was requested")
            if places and places[-1][0] + places[-1][1] == start:  # received at once
                places[-1] = places[-1][0], places[-1][1] + one
            else:
                places.append((start, one))
        reply = self.receive(channel, view, places, names[0][0])
        side, digests = protocol.parse_side(reply), reply.text("checksum").split()
        seconds, outcomes = time.perf_counter() - begun, list[RemoteTransfer | OSError]()
        sides: dict[int, CopySide] = {}
        for one, (name, start, _) in zip(told, names, strict=True):
            if isinstance(one, Message):
                error = protocol.parse_error(one, self.name)
                outcomes.append(error if isinstance(error, OSError) else OSError(str(error)))
                continue
            audited = _NOT_AUDITED
            if limit and one:
                with view[start : start + min(limit, one)] as part:
                    audited = self._compare(digests.pop(0) if digests else "", [part], one, name)
                self._audited.add((buffer.exporter, "read"))
            if one not in sides:
                sides[one] = replace(side, nbytes=one, copied=one if side.copied else 0)
            outcomes.append(self._record("read", one, audited, seconds, sides[one]))
        return outcomes

    def send(
        self,
        channel: Channel,
        view: memoryview,
        places: Sequence[Place],
        path: str,
        meter: Meter | None = None,
    ) -> Message:
        """Send the data of a request that was sent, and return the reply."""
        self.check(channel.receive_message())
        done, cursor, left = 0, _Cursor(view, places), sum(size for _, size in places)
        channel.announce(left)
        try:
            # Whole messages, between which an error of the node may come.
            while left and not channel.is_readable():
                for part in cursor.take(min(left, protocol.MOST_DATA)):
                    with part:
                        channel.send_data(part)
                        done, left = done + len(part), left - len(part)
                if meter is not None:
                    meter(done)
            channel.send(protocol.pack(end=True))
            return self.check(channel.receive_message())
        except OSError as error:
            number = error.errno or errno.EIO
            text = f"{error.strerror}; what the node holds of the range is undefined"
            raise TransferError(number, text, path, nbytes=done) from None

    # -- what both ends did

    def audit_limit(
        self, buffer: Buffer, terms: Terms, direction: Direction, places: Sequence[Place]
    ) -> int:
        """Return how many of the first bytes of a transfer to compare.

        Raises RouteUnavailable where all are to be, and destinations overlap.
        """
        ends = accumulate((start + size for start, size in sorted(places)), max)
        if direction == "read" and any(
            start < end
            for (start, size), end in zip(sorted(places)[1:], ends, strict=False)
            if size
        ):
            if terms.audit == "always":
                text = "audit='always' is impossible: destinations overlap"
                raise RouteUnavailable(text, self.name)
            return 0
        if terms.audit == "first" and (buffer.exporter, direction) not in self._audited:
            return protocol.AUDITED
        return OFFSET_MAX if terms.audit == "always" else 0

    def finish(
        self,
        reply: Message,
        direction: Direction,
        buffer: Buffer,
        view: memoryview,
        places: Sequence[Place],
        limit: int,
        path: str,
        begun: float,
    ) -> RemoteTransfer:
        """Return the record of a transfer from the reply, once its first bytes are compared.

        Args:
            reply: the node's.
            direction: "read" or "write".
            buffer: the buffer.
            view: its memory.
            places: where in the view the bytes are.
            limit: how many bytes to compare with the checksum of the other end.
            path: what the bytes are of, for errors.
            begun: a value of time.perf_counter().

        Raises IntegrityError.
        """
        nbytes, side = reply.number("nbytes"), protocol.parse_side(reply)
        audited, parts, left = _NOT_AUDITED, list[memoryview](), min(limit, nbytes)
        if left:
            for start, size in places:
                parts.append(view[start : start + min(size, left)])
                left -= len(parts[-1])
            audited = self._compare(reply.text("checksum"), parts, nbytes, path)
            self._audited.add((buffer.exporter, direction))
        return self._record(direction, nbytes, audited, time.perf_counter() - begun, side)

    def _compare(self, expected: str, parts: Sequence[memoryview], nbytes: int, path: str) -> str:
        """Compare memory with a checksum of the other end; return a sentence for the record."""
        digest, compared = hashlib.blake2b(digest_size=16), 0
        for part in parts:
            digest.update(part)
            compared += len(part)
            part.release()
        if digest.hexdigest() != expected:
            text = f"the first {compared} bytes differ from those at the other end, by checksum"
            raise IntegrityError(text, path)
        text = f"{format_size(compared)} compared by a checksum of the other end"
        return text if compared == nbytes else f"{text}; {format_size(nbytes)} were moved"

    def _record(
        self, direction: Direction, nbytes: int, audited: str, seconds: float, side: CopySide
    ) -> RemoteTransfer:
        return RemoteTransfer(
            nbytes, Route.STAGED, REASONS[direction], REJECTED, False, "no ring was used", seconds,
            1, 0, nbytes, audited, transport=self.transport, remote=side,
        )  # fmt: skip


class Reported(Exception):
    """An error that the node reports; the connection is in order."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Cursor:
    """The places of a view that bytes fill one after the other."""

    def __init__(self, view: memoryview, places: Sequence[Place]) -> None:
        self._view, self._places = view, places
        self._index = self._done = 0

    def take(self, size: int) -> Iterator[memoryview]:
        """Yield the places of the next bytes. Raises Malformed if there are not as many."""
        while size:
            if self._index == len(self._places):
                raise Malformed("more data came than was requested")
            start, length = self._places[self._index]
            part = min(size, length - self._done)
            if part:
                start += self._done
                yield self._view[start : start + part]
            self._done += part
            size -= part
            if self._done == length:
                self._index, self._done = self._index + 1, 0


def check_terms(buffer: Buffer, terms: Terms, transport: Transport, path: str) -> None:
    """Refuse terms that this end cannot meet, before anything is touched."""
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a transfer needs a dmabuf.Buffer, not {type(buffer).__name__}")
    if terms.require == "zero-copy":
        text = (
            f"no route for require='zero-copy': over {transport} the kernel copies between socket "
            "and buffer; use require='uncached'"
        )
        raise RouteUnavailable(text, path)
    if not terms.fence and buffer.is_dmabuf:
        text = "fence=False is for transfers without the CPU, and the CPU copies from a socket"
        raise RouteUnavailable(text, path)


@contextmanager
def mapped(
    buffer: Buffer, terms: Terms, direction: Direction, start: int, size: int
) -> Iterator[memoryview]:
    """Give a range of a buffer's memory, once the devices that use it have finished."""
    reads = direction == "write"
    if buffer.is_dmabuf:
        buffer.wait("read" if reads else "write", terms.timeout)
    with buffer.map("r" if reads else "rw", start, size) as view:
        yield view


def meter_of(progress: Progress | None, total: int) -> Meter | None:
    """Return what counts the bytes of a transfer for a progress function."""
    return None if progress is None else Meter(progress, total)

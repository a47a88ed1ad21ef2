"""The client's end of a connection: requests, and transfers between the node and a Buffer."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dmabuf.copying import CopySide, Meter
from dmabuf.errors import ClosedError, IntegrityError, RouteUnavailable
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel, Transport
from dmabuf.remote.protocol import Message, Reported
from dmabuf.remote.tcp import Place, Tcp
from dmabuf.sizes import OFFSET_MAX, format_size
from dmabuf.transfer import Direction, Plan, Progress, Route, Terms, Transfer, stopping

_REASONS: dict[Direction, str] = {
    "read": "the kernel copies from the socket's buffers into the buffer's mapping",
    "write": "the kernel copies from the buffer's mapping into the socket's buffers",
}
_NOT_AUDITED = "not audited: the first transfer was, or audit='off'"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTransfer(Transfer):
    """The record of a finished transfer between a Buffer here and a node.

    The fields of Transfer are about this end, `remote` is about the other one.
    """

    transport: Transport
    """What carried the bytes: "tcp", "tls" or "unix"."""
    remote: CopySide
    """How the bytes moved between the node's file or memory and its socket."""
    nodes: Mapping[str, int]
    """Bytes by the address of the node that they came from, or went to."""


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
        self.engine = Tcp(channel.transport)
        """What moves the bytes of a request."""
        self._channel = channel
        self._lock = threading.Lock()
        self._audited: set[tuple[str, Direction]] = set()

    @property
    def transport(self) -> Transport:
        """What carries the bytes."""
        return self.engine.transport

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
    def exchange(self, timeout: float | None) -> Iterator[Channel]:
        """Give the channel for requests and their replies.

        `timeout` is the most seconds that they may take; with None there is only the connection's
        own limit, of the time without any progress.
        """
        with self._lock:
            channel = self._channel
            if channel.closed:
                raise ClosedError(f"the connection to {self.name} is closed; connect again")
            if stopping.check is not None:
                stopping.check()
            channel.limit(timeout)
            try:
                yield channel
            except Reported as reported:
                raise reported.error from None
            except BaseException:
                channel.close()
                raise

    def ask(self, op: str, **fields: object) -> Message:
        """Make a request, and return its reply."""
        request = protocol.pack(op=op, **fields)
        with self.exchange(self._channel.timeout) as channel:
            channel.send(request)
            return channel.receive_reply()

    # -- transfers

    def move(
        self,
        direction: Direction,
        buffer: Buffer,
        places: Sequence[Place],
        path: str,
        terms: Terms,
        request: Mapping[str, object],
        progress: Progress | None = None,
    ) -> RemoteTransfer:
        """Move bytes between the node and a buffer.

        Args:
            direction: "read" or "write".
            buffer: the buffer.
            places: where in the buffer the bytes go or come from, one place after the other.
            path: what the bytes are of, for errors.
            terms: the caller's.
            request: the fields of the request.
            progress: as for `dmabuf.File`.

        Raises TransferError, IntegrityError, and the error of the node.
        """
        begun = time.perf_counter()
        first = min((start for start, _ in places), default=0)
        last = max((start + size for start, size in places), default=0)
        shifted = [(start - first, size) for start, size in places]
        meter = None if progress is None else Meter(progress, sum(size for _, size in places))
        limit = self.audit_limit(buffer, terms, direction, places)
        message = protocol.pack(**request, checksum=limit)
        with (
            mapped(buffer, terms, direction, first, last - first) as view,
            self.exchange(terms.timeout) as channel,
        ):
            channel.send(message)
            carry = self.engine.receive if direction == "read" else self.engine.send
            reply = carry(channel, view, shifted, path, meter)
            nbytes, side = reply.number("nbytes"), protocol.parse_side(reply)
            audited, parts, left = "", list[memoryview](), min(limit, nbytes)
            if left:
                for start, size in shifted:
                    parts.append(view[start : start + min(size, left)])
                    left -= len(parts[-1])
                audited = compare(reply.get("checksum", str), parts, nbytes, path)
                self.note_audit(buffer, direction)
        if meter is not None:
            meter.finish(nbytes)
        return self.record(direction, nbytes, audited, time.perf_counter() - begun, side)

    def audit_limit(
        self, buffer: Buffer, terms: Terms, direction: Direction, places: Sequence[Place]
    ) -> int:
        """Return how many of the first bytes of a transfer to compare.

        Raises RouteUnavailable where all are to be, and destinations overlap.
        """
        first = terms.audit == "first"
        if terms.audit == "off" or (first and (buffer.exporter, direction) in self._audited):
            return 0
        if direction == "read" and _overlap(places):
            if not first:
                text = "audit='always' is impossible: destinations overlap"
                raise RouteUnavailable(text, self.name)
            return 0
        return protocol.AUDITED if first else OFFSET_MAX

    def note_audit(self, buffer: Buffer, direction: Direction) -> None:
        """Remember that a transfer was compared, so that further ones need not be."""
        self._audited.add((buffer.exporter, direction))

    def record(
        self, direction: Direction, nbytes: int, audited: str, seconds: float, side: CopySide
    ) -> RemoteTransfer:
        """Return the record of a transfer; `audited` is "" where nothing was compared."""
        return RemoteTransfer(
            nbytes, Route.STAGED, _REASONS[direction], self.engine.rejected(side), False,
            "no ring was used", seconds, 1, 0, nbytes, audited or _NOT_AUDITED,
            transport=self.transport, remote=side, nodes={self.name: nbytes},
        )  # fmt: skip

    def plan(self, direction: Direction, there: Plan) -> RemotePlan:
        """Return the plan of a transfer from that of the node."""
        return RemotePlan(
            Route.STAGED, _REASONS[direction], self.engine.rejected(there),
            transport=self.transport, remote=there,
        )  # fmt: skip


def compare(expected: str, parts: Sequence[memoryview], nbytes: int, path: str) -> str:
    """Compare memory with a checksum of the other end, and return a sentence for the record.

    It releases the parts. `nbytes` is how many bytes were moved. Raises IntegrityError.
    """
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


def _overlap(places: Sequence[Place]) -> bool:
    end = 0
    for start, size in sorted(places):
        if size and start < end:
            return True
        end = max(end, start + size)
    return False


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

"""The client's end of a connection: requests, and transfers between the node and a Buffer."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from dmabuf.copying import CopySide, Meter
from dmabuf.errors import ClosedError, IntegrityError, RouteUnavailable
from dmabuf.memory import Buffer
from dmabuf.remote import nixl, protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.engine import Engine
from dmabuf.remote.nixl import Nixl
from dmabuf.remote.protocol import Message, Reported
from dmabuf.remote.ranges import Range, Ranges, total
from dmabuf.sizes import OFFSET_MAX, format_size
from dmabuf.transfer import Direction, Plan, Progress, Terms, Transfer, stopping

_ONLY = 'engine="tcp" was requested'
_NOT_AUDITED = "not audited: the first transfer was, or audit='off'"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTransfer(Transfer):
    """The record of a finished transfer between a Buffer here and a node.

    The fields of Transfer are about this end, `remote` is about the other one.
    """

    transport: str
    """What carried the bytes: "tcp", "tls" or "unix"; by NIXL "ucx_tcp" or "rc_verbs"."""
    remote: CopySide
    """How the bytes moved between the node's file or memory and its socket."""
    nodes: Mapping[str, int]
    """Bytes by the address of the node that they came from, or went to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePlan(Plan):
    """The route at this end, and the plan for the node's file."""

    transport: str
    remote: Plan


class Session:
    """A connection to a node. Thread-safe: one request at a time.

    A failure other than an error that the node reports closes it, because replies to the request
    may still be under way.
    """

    def __init__(self, channel: Channel) -> None:
        self.name = channel.name
        self.engine = Engine(channel.transport, _ONLY)
        """What moves the bytes of a request."""
        self._channel = channel
        self._lock = threading.Lock()
        self._audited: set[tuple[str, Direction]] = set()

    def use_nixl(self, *, trusted: bool, required: bool) -> None:
        """Have NIXL move the bytes, if both ends have it and the network allows it.

        Unless it is `required`, each end has a third of the connection's timeout to start it.

        Raises OSError if it is `required` and not possible.
        """
        start, taken = self._channel.timeout / (1 if required else 3), ""
        try:
            offered = nixl.transports(trusted=trusted)
            reply = self.ask("nixl", transports=offered, start=start)
            taken = reply.choice("transports", *offered)
            device = nixl.device_of(taken, self._channel.local_address)
            with ExitStack() as stack:
                made = Nixl(taken, device, start)
                stack.callback(made.close)
                self.ask("regions", metadata=made.metadata())
                stack.pop_all()
        except OSError as error:
            if required or self.closed:
                raise
            self.engine = self._by_socket(error.strerror)
            if taken:
                with suppress(OSError):  # the node ends its process, and reports that none is left
                    self.ask("nixl", transports=[])
        else:
            self.engine = made

    def revoke(self, buffer: Buffer) -> None:
        """Take a buffer from the node, after a request that another thread has in flight."""
        with self._lock:
            self.engine.revoke(buffer)

    def carrier(self, buffer: Buffer) -> Engine:
        """Return the engine for a buffer; in an exchange."""
        why_not = self.engine.grant(buffer)
        return self.engine if why_not is None else self._by_socket(why_not)

    def _by_socket(self, why_not: object) -> Engine:
        return Engine(self._channel.transport, f"NIXL is not used: {why_not}")

    def _drop(self) -> None:
        """Close the connection; when this returns, nobody writes to a buffer by it."""
        self._channel.close()
        self.engine.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed or has failed."""
        return self._channel.closed

    def close(self) -> None:
        """Close the connection, after a request that another thread has in flight."""
        with self._lock:
            self._drop()

    def forget(self) -> None:
        """Close a forked child's copy: replies belong to the parent."""
        self._lock = threading.Lock()
        self._channel.close()
        self.engine.forget()

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
                self._drop()
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
        places: Sequence[Range],
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
        begun, meter = time.perf_counter(), Meter(progress, total(places))
        limit = self.audit_limit(buffer, terms, direction, places)
        with (
            mapped(buffer, terms, direction, places) as (view, inside),
            self.exchange(terms.timeout) as channel,
        ):
            engine = self.carrier(buffer)
            about = engine.prepare(channel, buffer, places)
            channel.send(protocol.pack(**request, checksum=limit, **about))
            reply = engine.carry(direction, channel, view, inside, path, meter)
            nbytes, side = reply.number("nbytes"), protocol.parse_side(reply)
            audited = ""
            if limit and nbytes:
                compared = Ranges(inside).take(min(limit, nbytes))
                parts = [view[start : start + size] for start, size in compared]
                audited = compare(reply.get("checksum", str), parts, nbytes, path)
                self.note_audit(buffer, direction)
        meter.finish(nbytes)
        seconds = time.perf_counter() - begun
        return self.record(engine, direction, nbytes, audited, seconds, side)

    def audit_limit(
        self, buffer: Buffer, terms: Terms, direction: Direction, places: Sequence[Range]
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
        self,
        engine: Engine,
        direction: Direction,
        nbytes: int,
        audited: str,
        seconds: float,
        side: CopySide,
    ) -> RemoteTransfer:
        """Return the record of a transfer; `audited` is "" where nothing was compared."""
        return RemoteTransfer(
            nbytes, engine.route, engine.reason(direction), engine.rejected(side), engine.by_card,
            "no ring was used", seconds, 1, 0, 0 if engine.by_card else nbytes,
            audited or _NOT_AUDITED, transport=engine.transport, remote=side,
            nodes={self.name: nbytes},
        )  # fmt: skip

    def plan(self, direction: Direction, there: Plan) -> RemotePlan:
        """Return the plan of a transfer from that of the node."""
        engine = self.engine
        return RemotePlan(
            engine.route, engine.reason(direction), engine.rejected(there),
            transport=engine.transport, remote=there,
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


def _overlap(places: Sequence[Range]) -> bool:
    end = 0
    for start, size in sorted(places):
        if size and start < end:
            return True
        end = max(end, start + size)
    return False


def check_terms(buffer: Buffer, terms: Terms, engine: Engine, path: str) -> None:
    """Refuse terms that this end cannot meet, before anything is touched."""
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a transfer needs a dmabuf.Buffer, not {type(buffer).__name__}")
    if engine.by_card and buffer.pin_refusal is None:
        return
    if terms.require == "zero-copy":
        text = (
            f"no route for require='zero-copy': over {engine.transport} the CPU copies between "
            "socket and buffer; use require='uncached'"
        )
        raise RouteUnavailable(text, path)
    if not terms.fence and buffer.is_dmabuf:
        text = "fence=False is for transfers without the CPU, and the CPU copies from a socket"
        raise RouteUnavailable(text, path)


@contextmanager
def mapped(
    buffer: Buffer, terms: Terms, direction: Direction, places: Sequence[Range]
) -> Iterator[tuple[memoryview, list[Range]]]:
    """Give the memory of places, and where they are in it.

    Devices that use the buffer have finished then, and it cannot be closed meanwhile.
    """
    reads = direction == "write"
    first = min((start for start, _ in places), default=0)
    last = max((start + size for start, size in places), default=0)
    if buffer.is_dmabuf:
        buffer.wait("read" if reads else "write", terms.timeout)
    buffer.hold()
    try:
        with buffer.map("r" if reads else "r+", first, last - first) as view:
            yield view, [(start - first, size) for start, size in places]
    finally:
        buffer.release()

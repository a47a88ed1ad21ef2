"""A file of another node, with the verbs of dmabuf.File."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from dmabuf.copying import Source, Target
from dmabuf.errors import ClosedError, ShortReadError, Uncopyable, os_error
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.session import (
    REASONS,
    REJECTED,
    Place,
    RemotePlan,
    RemoteTransfer,
    Session,
    check_terms,
    mapped,
    meter_of,
)
from dmabuf.sizes import OFFSET_MAX, Size, parse_size
from dmabuf.transfer import (
    Direction,
    Plan,
    Prefer,
    Progress,
    Require,
    Route,
    Terms,
    Transfer,
    Verbs,
    segments_of,
    terms_of,
)


class RemoteFile(Verbs[RemoteTransfer], Uncopyable, instead="open its path again by another Node"):
    """A file below the directory that a node serves, opened by `Node.open`.

    Its methods take the arguments of `dmabuf.File`, and return a `RemoteTransfer`. `require` holds
    at both ends: "uncached" has the node read past its page cache, and "zero-copy" is refused,
    because the kernel copies between socket and buffer. `route` and `prefer` are about the node's
    file. `timeout` is also the most seconds without any progress, in place of the node's. `audit`
    compares with a checksum that the node makes of its file by plain reads: "first" the first 4 MiB
    of the first transfer in each direction, "always" all bytes.

    After an error under way, or an interrupt, the range of the buffer (of the file, for a write)
    has undefined content, and the connection is closed unless the node reported the error. Nothing
    writes to the buffer's memory any more when a call has returned.

    Thread-safe; transfers over one connection wait for each other.
    """

    def __init__(self, session: Session, path: str, mode: str, number: int) -> None:
        self.name = f"dmabuf://{session.name}/{path}"
        """Its URL, for messages."""
        self.mode = mode
        self._session, self._number = session, number
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it, or its connection, was closed."""
        return self._closed or self._session.closed

    @property
    def transport(self) -> str:
        """What carries its bytes: "tcp", "tls" or "unix"."""
        return self._session.transport

    @property
    def size(self) -> int:
        """Where the file ends now, in bytes."""
        self._check_open()
        return self._session.ask("size", file=self._number).number("size")

    @property
    def modified_ns(self) -> int:
        """When the file was last modified, in nanoseconds since 1970, by the node's clock."""
        self._check_open()
        return self._session.ask("size", file=self._number).number("modified_ns")

    def readable(self) -> bool:
        """Return whether bytes can be read from it into a buffer."""
        return self.mode in ("r", "r+")

    def writable(self) -> bool:
        """Return whether bytes can be written to it from a buffer."""
        return self.mode != "r"

    def flush(self) -> None:
        """Return when what was written is on the node's medium (fdatasync)."""
        self._check_open()
        self._session.ask("flush", file=self._number)

    def close(self) -> None:
        """Close it. Can be called again."""
        if not self.closed:
            self._closed = True
            with suppress(OSError, ClosedError):  # the node closes it with the connection
                self._session.ask("close", file=self._number)

    def commit(self, *, sync: bool = False) -> None:
        """Give a file of `Node.replacing` its name, with `sync` on the medium, and close it."""
        self._check_open()
        self._session.ask("commit", file=self._number, sync=sync)
        self._closed = True

    def __enter__(self) -> RemoteFile:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"mode={self.mode!r}"
        return f"<dmabuf.remote.RemoteFile {self.name!r} {state}>"

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.name} is closed")

    def _check(self, direction: Direction, buffer: Buffer, terms: Terms) -> None:
        self._check_open()
        if not (self.readable() if direction == "read" else self.writable()):
            verb = "reading" if direction == "read" else "writing"
            text = f"the file is not open for {verb}: mode={self.mode!r}"
            raise os_error(errno.EBADF, text, self.name)
        check_terms(buffer, terms, self._session.transport, self.name)

    def plan(
        self,
        buffer: Buffer,
        direction: Direction = "read",
        *,
        size: Size | None = None,
        file_offset: Size | None = None,
        buffer_offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        prefer: Prefer = "zero-copy",
        terms: Terms | None = None,
    ) -> RemotePlan:
        """Return the routes at both ends of a transfer with these arguments. It moves nothing.

        Raises:
            RouteUnavailable, OSError, ValueError: as the transfer itself would.
        """
        if direction not in ("read", "write"):
            raise ValueError(f"invalid direction={direction!r}: use 'read' or 'write'")
        terms = terms or terms_of(require, route, prefer)
        self._check(direction, buffer, terms)
        offset, (_, nbytes) = self._range(direction, buffer, size, file_offset, buffer_offset)
        reply = self._session.ask(
            "plan",
            file=self._number,
            direction=direction,
            offset=offset,
            size=nbytes,
            terms=protocol.terms_fields(terms),
        )
        route_there = Route(reply.text("route", *Route))
        there = Plan(route_there, reply.text("reason"), protocol.parse_reasons(reply))
        return RemotePlan(
            Route.STAGED,
            REASONS[direction],
            REJECTED,
            transport=self._session.transport,
            remote=there,
        )

    # -- transfers

    def _range(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
    ) -> tuple[int, Place]:
        offset = 0 if file_offset is None else parse_size(file_offset, "file_offset")
        start = parse_size(buffer_offset, "buffer_offset")
        nbytes = max(0, buffer.size - start) if size is None else parse_size(size)
        if direction == "read" and size is None:
            nbytes = min(nbytes, OFFSET_MAX - offset)  # the node cuts it at the end of the file
        if offset + nbytes > OFFSET_MAX:
            raise ValueError(f"file_offset={offset} size={nbytes} leaves the largest file offset")
        if start + nbytes > buffer.size:
            text = f"buffer_offset={start} size={nbytes} leaves the buffer"
            raise ValueError(f"{text} of {buffer.size} bytes")
        return offset, (start, nbytes)

    def _move_range(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
        terms: Terms,
        progress: Progress | None,
    ) -> RemoteTransfer:
        self._check(direction, buffer, terms)
        offset, place = self._range(direction, buffer, size, file_offset, buffer_offset)
        return self._move(direction, buffer, [(offset, place)], terms, progress, whole=False)

    def _move_segments(
        self,
        direction: Direction,
        buffer: Buffer,
        segments: object,
        terms: Terms,
        progress: Progress | None,
    ) -> RemoteTransfer:
        self._check(direction, buffer, terms)
        with segments_of(segments) as held:
            ranges = [
                self._range(direction, buffer, size, offset, start) for offset, start, size in held
            ]
        if len(ranges) > protocol.MOST_PAIRS:
            raise ValueError(f"{len(ranges)} segments: at most {protocol.MOST_PAIRS} in one call")
        return self._move(direction, buffer, ranges, terms, progress, whole=True)

    def _move(
        self,
        direction: Direction,
        buffer: Buffer,
        ranges: Sequence[tuple[int, Place]],
        terms: Terms,
        progress: Progress | None,
        *,
        whole: bool,
    ) -> RemoteTransfer:
        """Move ranges between the file and their places; `whole` refuses a read past its end."""
        session, begun = self._session, time.perf_counter()
        first = min((start for _, (start, _) in ranges), default=0)
        last = max((start + size for _, (start, size) in ranges), default=0)
        places = [(start - first, size) for _, (start, size) in ranges]
        meter = meter_of(progress, sum(size for _, size in places))
        limit = session.audit_limit(buffer, terms, direction, places)
        request = protocol.pack(
            op=direction,
            file=self._number,
            segments=[(offset, size) for offset, (_, size) in ranges],
            whole=whole,
            checksum=limit,
            terms=protocol.terms_fields(terms),
        )
        move = session.receive if direction == "read" else session.send
        with (
            mapped(buffer, terms, direction, first, last - first) as view,
            session.exchange(terms.timeout) as channel,
        ):
            channel.send(request)
            reply = move(channel, view, places, self.name, meter)
            done = session.finish(reply, direction, buffer, view, places, limit, self.name, begun)
        if meter is not None:
            meter.finish(done.nbytes)
        return done

    # -- an end of dmabuf.copy()

    def copy_source(self, offset: int, terms: Terms) -> Source:
        """Return this file as the source of a copy."""
        return _CopySource(self, offset, terms)

    def copy_target(self, offset: int, terms: Terms) -> Target:
        """Return this file as the target of a copy."""
        return _CopyTarget(self, offset, terms)


def _with_node(done: RemoteTransfer) -> Transfer:
    """Return a record whose reasons include those of the node, for the record of a copy."""
    there = f"over {done.transport}; at the node {done.remote.route}: {done.remote.reason}"
    return replace(done, rejected=dict.fromkeys(done.rejected, there))


class _CopySource(Source):
    def __init__(self, file: RemoteFile, offset: int, terms: Terms) -> None:
        super().__init__(file.name, terms, None)
        self._file, self._offset = file, offset
        self.total = max(0, file.size - offset)

    def plan(self, buffer: Buffer, size: int) -> Plan:
        """Return the route of the next `size` bytes; raises RouteUnavailable."""
        return self._file.plan(
            buffer, "read", size=size, file_offset=self._offset, terms=self.terms
        )

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Read the next bytes into the buffer, and return how many."""
        done = self._file.read_into(
            buffer, size, file_offset=self._offset, buffer_offset=at, terms=self.terms
        )
        self._offset += done.nbytes
        self.tally.add(_with_node(done))
        return done.nbytes

    def check_end(self, missing: int) -> None:
        """Raise ShortReadError: a file on a node has the size that it had."""
        raise ShortReadError(f"{self.name} ended {missing} bytes early: it shrank meanwhile")


class _CopyTarget(Target):
    def __init__(self, file: RemoteFile, offset: int, terms: Terms) -> None:
        super().__init__(file.name, terms, None)
        self._file, self._offset = file, offset

    def plan(self, buffer: Buffer, size: int) -> Plan:
        """Return the route of the next `size` bytes; raises RouteUnavailable."""
        return self._file.plan(
            buffer, "write", size=size, file_offset=self._offset, terms=self.terms
        )

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        """Write the next `size` bytes, from the buffer's offset `at`."""
        done = self._file.write_from(
            buffer, size, file_offset=self._offset, buffer_offset=at, terms=self.terms
        )
        self._offset += size
        self.tally.add(_with_node(done))

    def flush(self) -> None:
        """Return when the bytes are on the medium."""
        self._file.flush()

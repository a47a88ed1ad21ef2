"""A file of another node, with the verbs of dmabuf.File."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from contextlib import suppress

from dmabuf.copying import OffsetSource, OffsetTarget
from dmabuf.errors import ClosedError, Uncopyable, os_error
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.engine import Engine
from dmabuf.remote.protocol import Message
from dmabuf.remote.ranges import Range
from dmabuf.remote.session import RemotePlan, RemoteTransfer, Session, check_terms
from dmabuf.sizes import OFFSET_MAX, Size, parse_size
from dmabuf.transfer import Direction, Plan, Progress, Route, Terms, Verbs, segments_of


class RemoteFile(
    Verbs[RemoteTransfer, RemotePlan],
    Uncopyable,
    instead="open its path again by another Node",
):
    """A file below the directory that a node serves, opened by `Node.open`.

    Its methods take the arguments of `dmabuf.File`, and return a `RemoteTransfer`. `require` holds
    at both ends: "uncached" has the node read past its page cache, and "zero-copy" is refused,
    because the kernel copies between socket and buffer. `route` and `prefer` are about the node's
    file. `timeout` is also the most seconds that the whole transfer may take; the connection's own
    limits the time without any progress. `audit` compares with a checksum that the node makes of
    its file by plain reads: "first" the first 4 MiB of the first transfer in each direction,
    "always" all bytes.

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
    def node(self) -> str:
        """The address of its node."""
        return self._session.name

    @property
    def transport(self) -> str:
        """What carries its bytes: "tcp", "tls" or "unix"; by NIXL "ucx_tcp" or "rc_verbs"."""
        return self.engine.transport

    @property
    def engine(self) -> Engine:
        """What moves its bytes."""
        return self._session.engine

    @property
    def size(self) -> int:
        """Where the file ends now, in bytes."""
        return self._ask("size").number("size")

    @property
    def versions(self) -> Mapping[str, tuple[int, int]]:
        """By the address of its node, where it ends, and when it was last modified there.

        That is in bytes, and in nanoseconds since 1970 by the node's clock.
        """
        found = self._ask("size")
        return {self.node: (found.number("size"), found.number("modified_ns"))}

    def readable(self) -> bool:
        """Return whether bytes can be read from it into a buffer."""
        return self.mode in ("r", "r+")

    def writable(self) -> bool:
        """Return whether bytes can be written to it from a buffer."""
        return self.mode != "r"

    def flush(self) -> None:
        """Return when what was written is on the node's medium (fdatasync).

        Raises:
            OSError: something written since the file was opened is not; also if another call has
                raised that already. Open it and write again.
        """
        self._ask("flush")

    def close(self) -> None:
        """Close it. Can be called again."""
        if not self.closed:
            self._closed = True
            with suppress(OSError, ClosedError):  # the node closes it with the connection
                self._session.ask("close", file=self._number)

    def commit(self, *, sync: bool = False) -> None:
        """Give a file of `Node.replacing` its name, with `sync` on the medium, and close it."""
        self._ask("commit", sync=sync)
        self._closed = True

    def __enter__(self) -> RemoteFile:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"mode={self.mode!r}"
        return f"<dmabuf.remote.RemoteFile {self.name!r} {state}>"

    def _ask(self, op: str, **fields: object) -> Message:
        self._check_open()
        return self._session.ask(op, file=self._number, **fields)

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.name} is closed")

    def _check(self, direction: Direction, buffer: Buffer, terms: Terms) -> None:
        self._check_open()
        if not (self.readable() if direction == "read" else self.writable()):
            verb = "reading" if direction == "read" else "writing"
            text = f"the file is not open for {verb}: mode={self.mode!r}"
            raise os_error(errno.EBADF, text, self.name)
        check_terms(buffer, terms, self.engine, self.name)

    def _plan(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
        terms: Terms,
    ) -> RemotePlan:
        self._check(direction, buffer, terms)
        offset, _, nbytes = self._range(direction, buffer, size, file_offset, buffer_offset)
        return self.plan_range(direction, offset, nbytes, terms)

    def plan_range(self, direction: Direction, offset: int, size: int, terms: Terms) -> RemotePlan:
        """Return the plan for a range of the file."""
        about = protocol.terms_fields(terms)
        reply = self._ask("plan", direction=direction, offset=offset, size=size, terms=about)
        route, reason = reply.choice("route", *Route), reply.get("reason", str)
        return self._session.plan(direction, Plan(route, reason, protocol.parse_reasons(reply)))

    # -- transfers

    def _range(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
    ) -> tuple[int, int, int]:
        """Return the offset in the file, that in the buffer, and the size."""
        offset = 0 if file_offset is None else parse_size(file_offset, "file_offset")
        start, nbytes = buffer.check_range(buffer_offset, size)
        if direction == "read" and size is None:
            nbytes = min(nbytes, OFFSET_MAX - offset)  # the node cuts it at the end of the file
        if offset + nbytes > OFFSET_MAX:
            raise ValueError(f"file_offset={offset} size={nbytes} leaves the largest file offset")
        return offset, start, nbytes

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
        ranges = [self._range(direction, buffer, size, file_offset, buffer_offset)]
        return self.move(direction, buffer, ranges, terms, progress, whole=False)

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
        return self.move(direction, buffer, ranges, terms, progress, whole=True)

    def move(
        self,
        direction: Direction,
        buffer: Buffer,
        ranges: Sequence[Range],
        terms: Terms,
        progress: Progress | None,
        *,
        whole: bool,
    ) -> RemoteTransfer:
        """Move ranges: of each its offset in the file, that in the buffer, and its size.

        `whole` refuses a read past the end of the file.
        """
        request = {
            "op": direction,
            "file": self._number,
            "segments": [(offset, size) for offset, _, size in ranges],
            "whole": whole,
            "terms": protocol.terms_fields(terms),
        }
        places = [(start, size) for _, start, size in ranges]
        return self._session.move(direction, buffer, places, self.name, terms, request, progress)

    # -- an end of dmabuf.copy()

    def copy_source(self, offset: int, terms: Terms) -> OffsetSource:
        """Return this file as the source of a copy."""
        return OffsetSource(self.name, self, offset, terms, self.size)

    def copy_target(self, offset: int, terms: Terms) -> OffsetTarget:
        """Return this file as the target of a copy."""
        return OffsetTarget(self.name, self, offset, terms, self.flush)

"""File: what is on the other side of a Buffer."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from dmabuf import lone, span, transfer
from dmabuf.audit import Audit
from dmabuf.buffer import Buffer
from dmabuf.engine import Engine, Transfer
from dmabuf.errors import ClosedError, Uncopyable, os_error
from dmabuf.route import Direction, Plan, Prefer, Require, Route
from dmabuf.sizes import Size, parse_size
from dmabuf.target import Target, open_target
from dmabuf.transfer import Order

Mode = Literal["r", "w", "r+", "x"]


def open(  # noqa: A001 - the verb of the trade, used as dmabuf.open
    path: str | bytes | os.PathLike[str] | int,
    mode: Mode = "r",
    *,
    force: bool = False,
    engine: Engine | None = None,
) -> File:
    """Open a file, block device, pipe, FIFO, socket or character device for transfers.

    Args:
        path: a path; or a descriptor, which is duplicated and stays the caller's. Its O_SYNC,
            O_DSYNC and O_NOATIME hold on every route. Closing the File releases the POSIX locks
            that this process holds on that file, as closing any descriptor of it does (fcntl(2));
            open file description locks (F_OFD_SETLK) and flock(2) stay.
        mode: "r" reads; "w" writes, making the file or emptying a regular one; "r+" reads and
            writes what exists; "x" writes a file that must not exist yet. A descriptor's own
            access mode must allow it, and it is not emptied.
        force: write to a block device even where it is mounted or otherwise claimed.
        engine: what runs the transfers; by default the process's own.

    Raises:
        OSError: as open(2) has it, with the path; IsADirectoryError for a directory;
            errno EBUSY for a block device that is mounted and not forced.
        ValueError: an unknown mode.
    """
    return File(path, mode, force=force, engine=engine)


class File(Uncopyable, instead="open its path again where it is needed"):
    """What is read into a Buffer or written from one; make it with `dmabuf.open`.

    Safe to use from several threads: every offset is explicit and the file has no position of its
    own (a pipe or socket has, and two threads on one share it). After fork, the child's copy raises
    ClosedError.
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | int,
        mode: Mode = "r",
        *,
        force: bool = False,
        engine: Engine | None = None,
    ) -> None:
        self._target: Target = open_target(path, mode, force, engine)
        self.mode: str = mode
        """As it was opened: "r", "w", "r+" or "x"."""
        self.name = path if isinstance(path, int) else os.fsdecode(path)
        """The path, or the descriptor that was handed in."""

    def readable(self) -> bool:
        """Whether bytes can be read from it into a buffer."""
        return self._target.readable

    def writable(self) -> bool:
        """Whether bytes can be written to it from a buffer."""
        return self._target.writable

    def fileno(self) -> int:
        """The descriptor without O_DIRECT; it stays the File's."""
        self._target.check_open()
        return self._target.fd

    @property
    def kind(self) -> str:
        """One of "file", "block device", "NVMe character device", "character device", "pipe",
        "socket"."""
        return self._target.kind

    @property
    def size(self) -> int | None:
        """Where the file or device ends now, in bytes; None for a stream.

        Files of /proc and cgroups report 0, and are read all the same.
        """
        self._target.check_open()
        return None if self._target.stream else self._target.size()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._target.closed

    def close(self) -> None:
        """Close it; what the engine has registered of it goes too. Can be called again.

        A transfer that runs in another thread goes on to its end, and the descriptor with it.
        """
        self._target.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"mode={self.mode!r}"
        return f"<dmabuf.File {self._target.path!r} {state}>"

    def __enter__(self) -> File:
        self._target.check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_target"):
            self.close()

    # -- transfers

    def read_into(
        self,
        buffer: Buffer,
        size: Size | None = None,
        *,
        file_offset: Size | None = None,
        buffer_offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        prefer: Prefer = "zero-copy",
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
    ) -> Transfer:
        """Read from the file into the buffer.

        Args:
            buffer: where to.
            size: bytes; by default what the file has from `file_offset` on, as far as it fits.
            file_offset: where in the file, in bytes; 0 by default. A stream has none (ESPIPE).
            buffer_offset: where in the buffer, in bytes.
            require: "zero-copy", "uncached" or "any": which routes will do.
            route: the only route that will do.
            prefer: "fastest" takes a range that is in the page cache from there.
            timeout: seconds to wait for fences, and for the first byte of a stream. A device that
                is at work is not bounded.
            fence: False does not wait for the fences of devices that use the buffer. Refused where
                the CPU touches it (but for `native` and `direct` without unaligned edges), since
                its access waits.
            audit: "first" compares the first transfer of each direction between an exporter and a
                device by the `native` route, "always" every transfer by any route, "off" none, with
                what plain pread finds: see docs/audit.md.

        Returns:
            The record; its `nbytes` is less than `size` where the file ends before. Bytes of the
            buffer outside the requested range keep their content, and so do those of the range
            beyond `nbytes`, unless the file is truncated while the transfer runs.

        Raises:
            OSError: what the kernel refused, with errno, the path and the file offset; its
                `nbytes` is what arrived before that without a gap.
            TimeoutError: a device still used the buffer, or a stream did nothing, after `timeout`;
                nothing was touched.
            RouteUnavailable: no permitted route is possible, or none without the CPU for
                `fence=False`; or `audit="always"` has nothing to compare with.
            IntegrityError: a comparison showed that the bytes did not arrive.
            ValueError: a range outside the buffer or the largest file offset, or a closed file.
        """
        begun = time.perf_counter()
        target = self._target
        if (
            isinstance(size, int)
            and timeout is None
            and lone.permitted(require, route, prefer, audit)
        ):
            done = lone.move(
                target, buffer, "read", size, file_offset, buffer_offset, fence, route, audit, begun
            )
            if done is not None:
                return done
        ranges = self._range("read", buffer, size, file_offset, buffer_offset)
        order = Order(
            "read",
            buffer,
            ranges,
            require,
            route,
            prefer,
            timeout=timeout,
            fence=fence,
            audit=audit,
        )
        return transfer.carry_out(target, order, begun)

    def write_from(
        self,
        buffer: Buffer,
        size: Size | None = None,
        *,
        file_offset: Size | None = None,
        buffer_offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        prefer: Prefer = "zero-copy",
        sync: bool = False,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
    ) -> Transfer:
        """Write from the buffer to the file.

        A write past the end of a regular file allocates first; after a failure the file is cut
        back to the larger of its old size and the part that was written without a gap.

        Args:
            buffer: where from.
            size: bytes; by default all of the buffer from `buffer_offset` on.
            file_offset: where in the file, in bytes; 0 by default. A stream has none (ESPIPE).
            buffer_offset: where in the buffer, in bytes.
            require: "zero-copy", "uncached" or "any": which routes will do.
            route: the only route that will do.
            prefer: "fastest" writes a range that is in the page cache there.
            sync: return when the bytes are on the medium (fdatasync), not only handed over.
            timeout: seconds to wait for fences, and until a stream takes the first byte. A device
                that is at work is not bounded.
            fence: False does not wait for the fences of devices that use the buffer. Refused where
                the CPU touches it (but for `native` and `direct` without unaligned edges), since
                its access waits.
            audit: "first" compares the first transfer of each direction between an exporter and a
                device by the `native` route, "always" every transfer by any route, "off" none, with
                what plain pread finds: see docs/audit.md.

        Raises:
            OSError: what the kernel refused, with errno, the path and the file offset; its
                `nbytes` is what was written before that without a gap.
            TimeoutError: a device still used the buffer, or a stream did nothing, after `timeout`;
                nothing was touched.
            RouteUnavailable: no permitted route is possible, or none without the CPU for
                `fence=False`; or `audit="always"` has nothing to compare with.
            IntegrityError: a comparison showed that the bytes did not arrive.
            ValueError: a range outside the buffer or the largest file offset, or a closed file.
        """
        begun = time.perf_counter()
        target = self._target
        if (
            isinstance(size, int)
            and timeout is None
            and not sync
            and lone.permitted(require, route, prefer, audit)
        ):
            done = lone.move(
                target,
                buffer,
                "write",
                size,
                file_offset,
                buffer_offset,
                fence,
                route,
                audit,
                begun,
            )
            if done is not None:
                return done
        ranges = self._range("write", buffer, size, file_offset, buffer_offset)
        order = Order("write", buffer, ranges, require, route, prefer, sync, timeout, fence, audit)
        return transfer.carry_out(target, order, begun)

    def read_segments(
        self,
        buffer: Buffer,
        segments: Any,
        *,
        require: Require = "any",
        route: Route | str | None = None,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
    ) -> Transfer:
        """Read many ranges of the file to many places of the buffer, as one array of requests.

        Args:
            buffer: where to.
            segments: a buffer of native unsigned 8-byte integers, flat or of shape (n, 3), such as
                `array("Q")` or a NumPy uint64 array: file offset, buffer offset and size, in
                bytes, n times. Destinations that overlap end up with the bytes of either.
            require: "zero-copy" asks it of every segment.
            route: the only route that will do.
            timeout: seconds to wait for fences.
            fence: False does not wait for them; refused where any segment has unaligned edges.
            audit: as for `read_into`.

        Raises:
            ShortReadError: a segment reaches past the end of the file; names its index.
            TypeError: `segments` is no such buffer.
            OSError, RouteUnavailable, ValueError: as `read_into`.
        """
        begun = time.perf_counter()
        with self._segments("read", buffer, segments) as ranges:
            order = Order(
                "read", buffer, ranges, require, route, timeout=timeout, fence=fence, audit=audit
            )
            return transfer.carry_out(self._target, order, begun)

    def write_segments(
        self,
        buffer: Buffer,
        segments: Any,
        *,
        require: Require = "any",
        route: Route | str | None = None,
        sync: bool = False,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
    ) -> Transfer:
        """Write many ranges of the buffer to many places of the file, as one array of requests.

        Args:
            buffer: where from.
            segments: as for `read_segments`; ranges that overlap in the file are refused.
            require: "zero-copy" asks it of every segment.
            route: the only route that will do.
            sync: return when the bytes are on the medium.
            timeout: seconds to wait for fences.
            fence: False does not wait for them; refused where any segment has unaligned edges.
            audit: as for `read_into`.

        Raises:
            TypeError: `segments` is no such buffer.
            OSError, RouteUnavailable, ValueError: as `write_from`.
        """
        begun = time.perf_counter()
        with self._segments("write", buffer, segments) as ranges:
            order = Order(
                "write",
                buffer,
                ranges,
                require,
                route,
                sync=sync,
                timeout=timeout,
                fence=fence,
                audit=audit,
            )
            return transfer.carry_out(self._target, order, begun)

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
    ) -> Plan:
        """The route that a transfer with these arguments would take, and why; moves nothing.

        Raises:
            RouteUnavailable, OSError, ValueError: as the transfer itself would.
        """
        if direction not in ("read", "write"):
            raise ValueError(f"direction={direction!r}: 'read' or 'write'")
        ranges = self._range(direction, buffer, size, file_offset, buffer_offset)
        order = Order(direction, buffer, ranges, require, route, prefer)
        return transfer.plan_only(self._target, order)

    def _range(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
    ) -> span.Span:
        self._check(direction, buffer)
        start = self._file_offset(file_offset)
        buffer_offset = parse_size(buffer_offset, "buffer_offset")
        if size is not None:
            nbytes = parse_size(size)
        else:
            nbytes = max(0, buffer.size - buffer_offset)
            if direction == "read" and not self._target.stream:
                nbytes = max(0, min(nbytes, self._target.end() - start))
        return span.single(buffer, start, buffer_offset, nbytes)

    def _file_offset(self, file_offset: Size | None) -> int:
        if file_offset is None:
            return 0
        offset = parse_size(file_offset, "file_offset")
        if self._target.stream:
            text = f"{self._target.stream} has no offsets: leave file_offset out"
            raise os_error(errno.ESPIPE, text, self._target.path)
        return offset

    @contextmanager
    def _segments(self, direction: Direction, buffer: Buffer, segments: Any) -> Iterator[span.Span]:
        self._check(direction, buffer)
        if self._target.stream:
            text = f"{self._target.stream} has no offsets: use read_into and write_from"
            raise os_error(errno.ESPIPE, text, self._target.path)
        join = self._target.engine.joins
        with span.many(buffer, segments, direction, join=join) as ranges:
            yield ranges

    def _check(self, direction: Direction, buffer: Buffer) -> None:
        target = self._target
        target.check_open()
        if not isinstance(buffer, Buffer):
            raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
        if buffer.closed:
            raise ClosedError("the buffer is closed")
        if direction == "read" and not target.readable:
            text = "the file is not open for reading: open it with mode 'r' or 'r+'"
            raise os_error(errno.EBADF, text, target.path)
        if direction == "write" and not target.writable:
            text = "the file is not open for writing: open it with mode 'w', 'r+' or 'x'"
            raise os_error(errno.EBADF, text, target.path)
        if direction == "read" and not buffer._descriptor_writable:
            text = "the buffer is read-only: its dma-buf was handed over without write access"
            raise os_error(errno.EACCES, text, target.path)

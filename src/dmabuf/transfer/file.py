"""File: the other side of a Buffer in a transfer."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from dmabuf._core import ffi
from dmabuf.errors import SENDERS, Uncopyable, enable_sending, os_error
from dmabuf.kernel import process
from dmabuf.memory import Buffer
from dmabuf.sizes import Size, parse_size
from dmabuf.transfer.engine import Engine, default_engine
from dmabuf.transfer.link import Link
from dmabuf.transfer.links import Links
from dmabuf.transfer.plan import (
    SMALL,
    Audit,
    Direction,
    Plan,
    Prefer,
    Require,
    Route,
    Terms,
    Transfer,
    check_given,
    terms_of,
    with_nbytes,
)
from dmabuf.transfer.run import BLOCKING, Progress, Reporting, Segments, complete, segments_of
from dmabuf.transfer.target import Elsewhere, Target

Mode = Literal["r", "w", "r+", "x"]
Result = TypeVar("Result", covariant=True)
Planned = TypeVar("Planned", covariant=True, bound=Plan)

_OF_FILES = (set(dir(io.BufferedRandom)) - set(dir(object))) | {"pread", "pwrite", "readall"}


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
        mode: "r" reads; "w" writes, and creates the file or empties a regular one; "r+" reads and
            writes an existing file; "x" writes a file that must not exist yet. A descriptor's own
            access mode must allow it, and the file behind it is not emptied.
        force: write to a block device even where it is mounted or otherwise claimed.
        engine: what runs the transfers; by default the process's own.

    Raises:
        OSError: the errno of open(2), with the path; IsADirectoryError for a directory;
            errno EBUSY for a block device that is mounted and not forced.
        ValueError: an unknown mode.
    """
    return File(path, mode, force=force, engine=engine)


class Verbs(Generic[Result, Planned]):
    """The transfers between a file, here or on another node, and a Buffer: their arguments.

    `Result` is what a transfer returns: its record, or a coroutine of it. `Planned` is what `plan`
    returns.
    """

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
        terms: Terms | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Read from the file into the buffer.

        Args:
            buffer: the destination.
            size: bytes; by default what the file has from `file_offset` on, as far as it fits.
            file_offset: where in the file, in bytes; 0 by default. A stream has none (ESPIPE).
            buffer_offset: where in the buffer, in bytes.
            require: "zero-copy", "uncached" or "any": which routes are acceptable.
            route: the only acceptable route.
            prefer: "fastest" takes a range that is in the page cache from there.
            timeout: seconds to wait for fences, and for the first byte of a stream. The time that a
                device works is not bounded.
            fence: False does not wait for the fences of devices that use the buffer. Refused where
                the CPU copies (all but `native` and `direct` without unaligned edges), since its
                access waits.
            audit: "first" compares the first transfer of each direction between an exporter and a
                device by the `native` route, "always" every transfer by any route, "off" none, with
                what plain pread(2) reads: see docs/explanations/audit.md.
            terms: all of the keywords above in one record, in their place.
            progress: called with the bytes moved and the bytes asked for, about ten times a second
                and at the end; of streams, and in an event loop, at the end only. An exception from
                it stops the transfer.

        Returns:
            The record. Its `nbytes` is less than `size` where the file ends before. Bytes of the
            buffer outside the requested range keep their content, and so do those of the range
            beyond `nbytes`, unless the file is truncated while the transfer runs.

        Raises:
            TransferError: the kernel refused it under way, with errno, the path and the file
                offset; its `nbytes` is what arrived before that without a gap.
            TimeoutError: a device still used the buffer, or a stream did nothing, after `timeout`;
                nothing was touched.
            RouteUnavailable: no acceptable route is possible, or none without the CPU for
                `fence=False`; or `audit="always"` has nothing to compare with.
            IntegrityError: a comparison showed that the bytes did not arrive.
            ValueError: a range outside the buffer or the largest file offset, or a closed file.
        """
        if terms is not None or progress is not None:
            check_given(terms, progress)
        terms = terms or terms_of(require, route, prefer, timeout, fence, audit)
        return self._move_range("read", buffer, size, file_offset, buffer_offset, terms, progress)

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
        terms: Terms | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Write from the buffer to the file.

        A write past the end of a regular file allocates first; after a failure the file is cut
        back to the larger of its old size and the part that was written without a gap. Nobody else
        may write the range meanwhile: a request may be issued twice.

        Args:
            buffer: the source.
            size: bytes; by default all of the buffer from `buffer_offset` on.
            file_offset: where in the file, in bytes; 0 by default. A stream has none (ESPIPE).
            buffer_offset: where in the buffer, in bytes.
            require: "zero-copy", "uncached" or "any": which routes are acceptable.
            route: the only acceptable route.
            prefer: "fastest" writes a range that is in the page cache there.
            sync: return when the bytes are on the medium (fdatasync), not only in the kernel. After
                an error, `nbytes` counts only bytes that were flushed.
            timeout: seconds to wait for fences, and until a stream takes the first byte. The time
                that a device works is not bounded.
            fence: False does not wait for the fences of devices that use the buffer. Refused where
                the CPU copies (all but `native` and `direct` without unaligned edges), since its
                access waits.
            audit: as for `read_into`.
            terms: all of the keywords above in one record, in their place.
            progress: called with the bytes moved and the bytes asked for, about ten times a second
                and at the end; of streams, and in an event loop, at the end only. An exception from
                it stops the transfer.

        Raises:
            TransferError: the kernel refused it under way, with errno, the path and the file
                offset; its `nbytes` is what was written before that without a gap.
            TimeoutError: a device still used the buffer, or a stream did nothing, after `timeout`;
                nothing was touched.
            RouteUnavailable, IntegrityError, ValueError: as `read_into`.
        """
        if terms is not None or progress is not None:
            check_given(terms, progress)
        terms = terms or terms_of(require, route, prefer, timeout, fence, audit, sync)
        return self._move_range("write", buffer, size, file_offset, buffer_offset, terms, progress)

    def read_segments(
        self,
        buffer: Buffer,
        segments: object,
        *,
        require: Require = "any",
        route: Route | str | None = None,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
        terms: Terms | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Read many ranges of the file to many places of the buffer, as one array of requests.

        Args:
            buffer: the destination.
            segments: native unsigned 8-byte integers, flat or of shape (n, 3), such as `array("Q")`
                or a NumPy uint64 array: file offset, buffer offset and size, in bytes, n times.
                Destinations that overlap end up with the bytes of either segment.
            require: "zero-copy" asks it of every segment.
            route: the only acceptable route.
            timeout: seconds to wait for fences.
            fence: False does not wait for them; refused where any segment has unaligned edges.
            audit: as for `read_into`.
            terms: all of the keywords above in one record, in their place.
            progress: called with the bytes moved and the bytes asked for, about ten times a second
                and at the end; of streams, and in an event loop, at the end only. An exception from
                it stops the transfer.

        Raises:
            ShortReadError: a segment reaches past the end of the file; names its index.
            TypeError: `segments` is not such an array.
            OSError, RouteUnavailable, ValueError: as `read_into`.
        """
        if terms is not None or progress is not None:
            check_given(terms, progress)
        terms = terms or terms_of(require, route, "zero-copy", timeout, fence, audit)
        return self._move_segments("read", buffer, segments, terms, progress)

    def write_segments(
        self,
        buffer: Buffer,
        segments: object,
        *,
        require: Require = "any",
        route: Route | str | None = None,
        sync: bool = False,
        timeout: float | None = None,
        fence: bool = True,
        audit: Audit = "first",
        terms: Terms | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Write many ranges of the buffer to many places of the file, as one array of requests.

        Args:
            buffer: the source.
            segments: as for `read_segments`; ranges that overlap in the file are refused.
            require: "zero-copy" asks it of every segment.
            route: the only acceptable route.
            sync: return when the bytes are on the medium.
            timeout: seconds to wait for fences.
            fence: False does not wait for them; refused where any segment has unaligned edges.
            audit: as for `read_into`.
            terms: all of the keywords above in one record, in their place.
            progress: called with the bytes moved and the bytes asked for, about ten times a second
                and at the end; of streams, and in an event loop, at the end only. An exception from
                it stops the transfer.

        Raises:
            TypeError: `segments` is not such an array.
            OSError, RouteUnavailable, ValueError: as `write_from`.
        """
        if terms is not None or progress is not None:
            check_given(terms, progress)
        terms = terms or terms_of(require, route, "zero-copy", timeout, fence, audit, sync)
        return self._move_segments("write", buffer, segments, terms, progress)

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
    ) -> Planned:
        """Return the route that a transfer with these arguments would take, and why.

        It moves nothing. Of a file that can be read natively through its block device it writes the
        dirty pages out, which takes as long as fdatasync(2).

        Raises:
            RouteUnavailable, OSError, ValueError: as the transfer itself would.
        """
        if direction not in ("read", "write"):
            raise ValueError(f"invalid direction {direction!r}: use 'read' or 'write'")
        check_given(terms, None)
        terms = terms or terms_of(require, route, prefer)
        return self._plan(direction, buffer, size, file_offset, buffer_offset, terms)

    def _plan(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
        terms: Terms,
    ) -> Planned:
        raise NotImplementedError

    def _move_range(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
        terms: Terms,
        progress: Progress | None,
    ) -> Result:
        raise NotImplementedError

    def _move_segments(
        self,
        direction: Direction,
        buffer: Buffer,
        segments: object,
        terms: Terms,
        progress: Progress | None,
    ) -> Result:
        raise NotImplementedError


class BaseFile(Uncopyable, Verbs[Result, Plan]):
    """What `dmabuf.File` and `dmabuf.aio.File` have in common: the arguments of transfers.

    `Result` is what a transfer returns: its record, or a coroutine of it.
    """

    _shown: str

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | int,
        mode: Mode = "r",
        *,
        force: bool = False,
        engine: Engine | None = None,
    ) -> None:
        target = Target(path, mode, force, engine or default_engine(), travels=engine is None)
        self._hold(target, path if isinstance(path, int) else target.path, mode)

    def _hold(self, target: Target, name: str | int, mode: str) -> None:
        self.links = Links(target)
        """What is known about moving bytes between it and each buffer, for the other rooms."""
        self.mode: str = mode
        """The mode it was opened with: "r", "w", "r+" or "x"."""
        self.name = name
        """The path, or the descriptor that was handed in."""
        if "multiprocessing" in sys.modules:
            enable_sending()

    @property
    def target(self) -> Target:
        """The open file behind it, for the other rooms of the package."""
        return self.links.current()

    def readable(self) -> bool:
        """Return whether bytes can be read from it into a buffer."""
        return self.target.readable

    def writable(self) -> bool:
        """Return whether bytes can be written to it from a buffer."""
        return self.target.writable

    def fileno(self) -> int:
        """Return the descriptor without O_DIRECT. It stays the File's."""
        self.target.check_open()
        return self.links.plain()

    @property
    def kind(self) -> str:
        """One of "file", "block device", "NVMe character device", "character device", "pipe",
        "socket"."""
        return self.target.kind

    @property
    def size(self) -> int | None:
        """Where the file or device ends now, in bytes; None for a stream.

        Files of /proc and cgroups report 0, but can be read.
        """
        self.target.check_open()
        return None if self.target.stream else self.target.size()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.links.target.closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"mode={self.mode!r}"
        return f"<{self._shown} {self.links.target.path!r} {state}>"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            why = "; use read_into() and write_from() with a Buffer" if name in _OF_FILES else ""
            raise AttributeError(f"a File has no {name!r}{why}", name=name, obj=self)

    @process.finalizer
    def __del__(self) -> None:
        if "links" in self.__dict__ and self.links.target.fd >= 0:
            self.links.close()

    def _plan(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
        terms: Terms,
    ) -> Plan:
        link = self.links.get(buffer, direction)
        return link.plan(self.segment(buffer, direction, size, file_offset, buffer_offset), terms)

    # -- arguments

    def segment(
        self,
        buffer: Buffer,
        direction: Direction,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
    ) -> Segments:
        """Return the range that the arguments of a transfer name.

        Raises:
            ValueError, TypeError: a size or offset that cannot be; OSError: ESPIPE, a stream has no
                offsets.
        """
        start = 0
        if file_offset is not None:
            self.check_offsets()
            start = parse_size(file_offset, "file_offset")
        if type(buffer_offset) is not int or buffer_offset < 0:
            buffer_offset = parse_size(buffer_offset, "buffer_offset")
        if size is None:
            nbytes = max(0, buffer.size - buffer_offset)
            if direction == "read" and not self.target.stream:
                nbytes = max(0, min(nbytes, self.target.end() - start))
        else:
            nbytes = size if type(size) is int and size >= 0 else parse_size(size)
        try:
            return Segments(ffi.new("uint64_t[3]", (start, buffer_offset, nbytes)), 1, False)
        except OverflowError:
            text = f"buffer_offset={buffer_offset} size={nbytes} leaves the buffer"
            raise ValueError(f"{text} of {buffer.size} bytes") from None

    def check_offsets(self) -> None:
        """Raise ESPIPE where the file has no offsets."""
        if self.target.stream:
            text = f"{self.target.stream} has no offsets; use read_into and write_from without"
            raise os_error(errno.ESPIPE, text, self.target.path)


class File(
    BaseFile[Transfer],
    instead="only multiprocessing sends it, if imported first; else open its path again",
):
    """A file, device or stream that is read into a Buffer or written from one.

    Make it with `dmabuf.open`. It is safe to use from several threads: every offset is explicit,
    and the file has no position of its own. (A pipe or socket has one; two threads share it.)

    The child of a fork, and a process that multiprocessing sends it to, open its path again, with
    their default engine. Where that fails, each use of the File there raises the OSError; errno is
    ESTALE if another file has the path. Modes "w" and "x" become "r+" there, so nothing is emptied.
    A File of a stream, of a handed-in descriptor or with an own engine is not sent, and raises
    ClosedError after a fork.
    """

    _shown = "dmabuf.File"

    def __setstate__(self, state: tuple[str, Mode, bool, tuple[int, int]]) -> None:
        """Become the File that multiprocessing received, and open it if that is possible.

        An error here would reach nobody: multiprocessing.Pool loses the task that it unpickles.
        """
        path, mode, _, _ = state
        self._hold(Elsewhere(*state), path, mode)
        with suppress(OSError):
            self.links.current()

    def close(self) -> None:
        """Close it, and drop what the engine has registered of it. Can be called again.

        A transfer that runs in another thread goes on to its end, and the descriptor with it.
        """
        self.links.close()

    def __enter__(self) -> File:
        if self.links.target.owner != process.pid:
            self.target.check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _move_range(
        self,
        direction: Direction,
        buffer: Buffer,
        size: Size | None,
        file_offset: Size | None,
        buffer_offset: Size,
        terms: Terms,
        progress: Progress | None,
    ) -> Transfer:
        begun = time.perf_counter()
        link = self.links.known.get((id(buffer), direction))
        if link is None or link.buffer_ref() is not buffer:
            link = self.links.get(buffer, direction)
        if terms.plain and type(size) is int and size <= SMALL and progress is None:
            done = link.move_small(file_offset, buffer_offset, size, terms, begun)
            if done is not None:
                return done
        segments = self.segment(buffer, direction, size, file_offset, buffer_offset)
        if progress is not None:
            return _report(link, segments, terms, begun, progress)
        return complete(link.move(segments, terms, BLOCKING, begun))

    def _move_segments(
        self,
        direction: Direction,
        buffer: Buffer,
        segments: object,
        terms: Terms,
        progress: Progress | None,
    ) -> Transfer:
        begun = time.perf_counter()
        link = self.links.get(buffer, direction)
        self.check_offsets()
        with segments_of(segments) as held:
            if progress is not None:
                return _report(link, held, terms, begun, progress)
            return complete(link.move(held, terms, BLOCKING, begun))


def _report(
    link: Link, segments: Segments, terms: Terms, begun: float, progress: Progress
) -> Transfer:
    """Move the segments as `Link.move` does, and report progress."""
    total = sum(size for _, _, size in segments)
    done = complete(link.move(segments, terms, Reporting(progress, total), begun))
    try:
        progress(done.nbytes, done.nbytes)
    except BaseException as error:
        with_nbytes(error, done.nbytes)
        raise
    return done


SENDERS[File] = lambda file: (File.__new__, (File,), file.links.target.reopening())

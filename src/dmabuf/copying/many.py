"""Many files into one buffer, or out of it, by threads that each open, move and close one file.

Each transfer is that of a File. Threads, because open(2) cannot run beside other calls in any other
way. What is known of the first file serves the others on its mount: of those, one call of the core
opens, reads and closes each.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol, TypeVar

from dmabuf._core import lib
from dmabuf.copying.pipeline import Meter
from dmabuf.copying.replace import Replacement
from dmabuf.errors import os_error
from dmabuf.memory import Buffer
from dmabuf.sizes import OFFSET_MAX, Size, parse_size
from dmabuf.transfer import (
    SMALL,
    File,
    Link,
    Progress,
    Terms,
    Transfer,
    check_given,
    in_transfer,
    stopping,
)


class Moved(Protocol):
    """What became of an item that was moved: a Transfer, or anything else that counts bytes."""

    @property
    def nbytes(self) -> int:
        """How many bytes were moved."""


T = TypeVar("T")
M = TypeVar("M", bound=Moved)

DEPTH = 32
"""Files that are open at once, unless the caller asks for another number."""
_MOST = 256
_SLICE = 0.1
"""Seconds of one wait: a signal just before a system call does not interrupt the call."""


class FileRange(NamedTuple):
    """A range of one file and its place in a buffer; a plain tuple of four serves as well."""

    path: str | bytes | os.PathLike[str]
    file_offset: Size
    """Where in the file, in bytes."""
    size: Size
    """Bytes."""
    buffer_offset: Size
    """Where in the buffer, in bytes."""


class Range(NamedTuple):
    """A FileRange that was checked."""

    path: str
    file_offset: int
    size: int
    buffer_offset: int


AnyFileRange = FileRange | tuple[str | bytes | os.PathLike[str], Size, Size, Size]


def read_files(
    files: Iterable[AnyFileRange],
    buffer: Buffer,
    *,
    terms: Terms | None = None,
    queue_depth: int = DEPTH,
    progress: Progress | None = None,
) -> list[Transfer | OSError]:
    """Read a range of each of many files into a buffer, many of them at once.

    Args:
        files: for each file its path, the offset in it, the size, and the offset in the buffer, in
            bytes or as text such as "1MiB". Ranges that overlap in the buffer end up with the bytes
            of either file.
        buffer: the destination.
        terms: the conditions of each transfer; by default any route.
        queue_depth: files that are open at once, each in a thread, from 1 to 256.
        progress: called in this thread with the bytes of the files that are done and the sum of
            all, at most about ten times a second and at the end. An exception from it stops the
            call: no further file is begun.

    Returns:
        For each file, in the order of `files`, its Transfer, or the OSError of its failure. The
        `nbytes` of a Transfer is less than the size where the file ends before; the bytes of the
        buffer beyond it keep their content. The errors are those of `open` and `File.read_into`.

    Raises:
        ValueError: a range outside the buffer or the largest file offset, or the buffer is closed.
            Nothing was read.
        TypeError: a record that is not a path and three sizes.

    On KeyboardInterrupt no further file is opened, and the call raises it when the devices have
    finished with the buffer's memory.
    """
    check_given(terms, progress)
    terms, ranges = terms or Terms(), _check_ranges(files, buffer)
    with _first_link(ranges, buffer, terms) as link:

        @_naming_file
        def read(one: Range) -> Transfer:
            begun = time.perf_counter()
            path, offset, size, start = one
            if link is not None and size <= SMALL and (job := link.small_job()) is not None:
                name = os.fsencode(path)
                if lib.dmb_job_read_file(job, name, offset, start, size, terms.fence):
                    return link.small_record(size, terms, begun)
            _refuse_fifo(path)
            with File(path) as file:
                return file.read_into(
                    buffer, size, file_offset=offset, buffer_offset=start, terms=terms
                )

        total = sum(one.size for one in ranges)
        return in_threads(read, ranges, total, buffer, queue_depth, progress)


def write_files(
    files: Iterable[AnyFileRange],
    buffer: Buffer,
    *,
    terms: Terms | None = None,
    queue_depth: int = DEPTH,
    progress: Progress | None = None,
) -> list[Transfer | OSError]:
    """Write ranges of a buffer to many files, many of them at once; each appears whole or not.

    A file that exists is replaced when its new content is complete, and keeps its permissions,
    owner and attributes as far as that is allowed. After an error it is as it was before.

    Args:
        files: for each file its path, the offset in it, the size, and the offset in the buffer, in
            bytes or as text such as "1MiB". The file has zeros before the offset.
        buffer: the source.
        terms: the conditions of each transfer; by default any route. `sync=True` has each file and
            its name on the medium when the call returns.
        queue_depth: files that are open at once, each in a thread, from 1 to 256.
        progress: called in this thread with the bytes of the files that are done and the sum of
            all, at most about ten times a second and at the end. An exception from it stops the
            call: no further file is begun.

    Returns:
        For each file, in the order of `files`, its Transfer, or the OSError of its failure: those
        of `open` and `File.write_from`, and EBUSY where a file can be written and not replaced,
        such as a mount point.

    Raises:
        ValueError: a range outside the buffer or the largest file offset, two records of one path,
            or the buffer is closed. Nothing was written.
        TypeError: a record that is not a path and three sizes.

    On KeyboardInterrupt no further file is begun. The call raises it when the devices have finished
    with the buffer's memory; a file that was not complete by then is as it was before.
    """
    check_given(terms, progress)
    terms, ranges = terms or Terms(), _check_ranges(files, buffer)
    _check_paths_differ(ranges)

    @_naming_file
    def write(one: Range) -> Transfer:
        path, offset, size, start = one
        with _replacement(path) as place:
            if place.in_place is not None:
                text = f"the file cannot be replaced: {place.in_place}; use File.write_from"
                raise os_error(errno.EBUSY, text, path)
            with File(place.temporary, "w") as file:
                transfer = file.write_from(
                    buffer, size, file_offset=offset, buffer_offset=start, terms=terms
                )
            place.commit(None, sync=terms.sync)
            return transfer

    total = sum(one.size for one in ranges)
    return in_threads(write, ranges, total, buffer, queue_depth, progress)


def _naming_file(move: Callable[[Range], Transfer]) -> Callable[[Range], Transfer]:
    """Return a function whose errors have the file's path."""

    def named(one: Range) -> Transfer:
        try:
            return move(one)
        except OSError as error:
            error.filename = one.path
            raise

    return named


def _check_ranges(files: Iterable[AnyFileRange], buffer: Buffer) -> list[Range]:
    """Return the records with plain paths and sizes.

    Raises:
        ValueError, TypeError: one of them cannot be; names its index.
    """
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
    buffer.check_open()
    checked = []
    for index, record in enumerate(files):
        try:
            path, file_offset, size, buffer_offset = record
        except (TypeError, ValueError):
            text = "use (path, file_offset, size, buffer_offset)"
            raise TypeError(f"invalid record {index}, {record!r}: {text}") from None
        one = Range(
            os.fsdecode(path),
            parse_size(file_offset, "file_offset"),
            parse_size(size),
            parse_size(buffer_offset, "buffer_offset"),
        )
        if "\0" in one.path:
            raise ValueError(
                f"invalid record {index}: the path holds a null byte; use another path"
            )
        if one.buffer_offset + one.size > buffer.size or one.file_offset + one.size > OFFSET_MAX:
            raise ValueError(
                f"record {index} (file_offset={one.file_offset} buffer_offset={one.buffer_offset} "
                f"size={one.size}) leaves the buffer of {buffer.size} bytes or the largest file "
                "offset, 2^63-1"
            )
        checked.append(one)
    return checked


def _check_paths_differ(ranges: Sequence[Range]) -> None:
    """Raise ValueError for two records of one path: each would replace the other's file."""
    known: dict[str, int] = {}
    for index, one in enumerate(ranges):
        first = known.setdefault(os.path.abspath(one.path), index)
        if first != index:
            raise ValueError(f"records {first} and {index} write the same file, {one.path!r}")


def _replacement(path: str) -> Replacement:
    """Return the replacement of a file that `write_files` writes.

    Raises:
        OSError: the path names something other than a regular file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise os_error(errno.EISDIR, "a directory has no bytes to move: name a file", path)
    if not stat.S_ISREG(mode):
        text = "not a regular file, so it cannot be replaced: write it with File.write_from"
        raise os_error(errno.EINVAL, text, path)
    return Replacement(path, force=False, note=lambda _: None)


def _refuse_fifo(path: str) -> None:
    """Raise OSError(ESPIPE) for a FIFO, whose open(2) would wait for a writer."""
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise os_error(errno.ESPIPE, "a pipe has no offsets; use File.read_into", path)


@contextmanager
def _first_link(ranges: Sequence[Range], buffer: Buffer, terms: Terms) -> Iterator[Link | None]:
    """Yield the link of the first file, if its facts hold for other files too; otherwise None."""
    link = None
    if not terms.plain or len(ranges) < 2:
        yield None
        return
    try:
        _refuse_fifo(ranges[0].path)
        file = File(ranges[0].path)
    except OSError:
        yield None
        return
    with file:
        link = file.links.get(buffer, "read")
        known = link.small_job() is not None and file.target.direct().proven
        yield link if known else None


class _Stopped(BaseException):
    """Raised in a thread that waits for a device, because the call ends."""


def in_threads(
    move: Callable[[T], M],
    items: Sequence[T],
    total: int,
    buffer: Buffer,
    queue_depth: int,
    progress: Progress | None,
) -> list[M | OSError]:
    """Move every item, `queue_depth` at once, and return what became of each.

    After an exception other than an OSError, in this thread or another, no thread begins an item.
    It is raised when all threads have ended.

    Args:
        move: moves an item; called in any thread.
        items: what to move, in order.
        total: the sum of their bytes.
        buffer: kept open meanwhile.
        queue_depth: threads, from 1 to 256.
        progress: called in this thread with the bytes of the items that are done, and their sum.
    """
    if not 1 <= queue_depth <= _MOST:
        raise ValueError(f"invalid queue_depth {queue_depth}: use a number from 1 to {_MOST}")
    outcomes: list[M | OSError | None] = [None] * len(items)
    left = iter(enumerate(items))
    raised: list[BaseException] = []
    meter = Meter(progress, total)

    lock, done = threading.Lock(), 0

    def check() -> None:
        if raised:
            raise _Stopped

    def report() -> None:
        if progress is not None:
            meter(done)

    def work(report: Callable[[], object] = bool) -> None:
        nonlocal done
        try:
            for index, one in left:
                check()
                report()
                try:
                    outcomes[index] = moved = move(one)
                    with lock:
                        done += moved.nbytes
                except OSError as error:
                    outcomes[index] = error
        except BaseException as error:
            raised.append(error)

    def thread() -> None:
        stopping.check = check
        work()  # catches everything

    buffer.hold()
    try:
        # Inside another transfer, whose locks this thread may hold, no other thread can help.
        if queue_depth > 1 and len(items) > 1 and not in_transfer():
            _run(thread, min(queue_depth, len(items)), raised, report)
        work(report)  # what is left
        if not raised and progress is not None:
            meter.finish(done)
    finally:
        buffer.release()
    if raised:
        raise raised[0]
    return outcomes  # type: ignore[return-value] # each was set


def _run(
    work: Callable[[], None],
    count: int,
    raised: list[BaseException],
    report: Callable[[], object],
) -> None:
    """Run a function in threads; add to `raised`, which it checks, what interrupts this one.

    Each thread notes its begin and its end. Thread.is_alive() is not asked: in CPython 3.11 an
    interrupt of Thread.join() makes it return False while the thread still runs.
    """
    begun: list[None] = []
    ended: list[None] = []
    wake: SimpleQueue[None] = SimpleQueue()

    def run() -> None:
        begun.append(None)
        work()
        ended.append(None)
        wake.put(None)

    threads = [threading.Thread(target=run) for _ in range(count)]
    started = 0
    try:
        for one in threads:
            one.start()
            started += 1
    except RuntimeError:
        pass  # the system has no more threads: those that run do the work
    except BaseException as error:
        raised.append(error)
    # A thread that begins after `raised` was filled does nothing.
    while len(ended) < (len(begun) if raised else started):
        try:
            if stopping.check is not None and not raised:
                stopping.check()
            with suppress(Empty):
                wake.get(timeout=_SLICE)
            if not raised:
                report()
        except BaseException as error:
            raised.append(error)
    for one in threads[:started]:
        try:
            one.join()  # it has nothing left to do
        except BaseException as error:
            raised.append(error)

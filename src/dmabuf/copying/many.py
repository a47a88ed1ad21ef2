"""Many files into one buffer, or out of it, with a queue depth across them.

Each file is a File, and each transfer the coroutine of its Link, as for one file alone. What is
different is the waiting: a transfer that has started its requests is suspended, the next file is
opened meanwhile, and one loop resumes each transfer when the ring reports that it is done.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import stat
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from dmabuf._core import failure, ffi, lib
from dmabuf.copying.replace import Replacement
from dmabuf.errors import os_error
from dmabuf.kernel import fence
from dmabuf.memory import Buffer
from dmabuf.sizes import OFFSET_MAX, Size, parse_size
from dmabuf.transfer import BLOCKING, SMALL, Direction, Engine, File, Job, Link, Terms, Transfer

T = TypeVar("T")

DEPTH = 32
"""Files in flight, unless the caller asks for another number."""
_COMPLETIONS = 256
"""Transfers that one call of the core reports as done at most."""
_SLICE_MS = 100
"""Milliseconds of one wait. A signal that comes just before a system call does not interrupt it."""


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


Outcome = Transfer | OSError
"""What became of one file."""
AnyFileRange = FileRange | tuple[str | bytes | os.PathLike[str], Size, Size, Size]


def read_files(
    files: Iterable[AnyFileRange],
    buffer: Buffer,
    *,
    terms: Terms | None = None,
    queue_depth: int = DEPTH,
) -> list[Outcome]:
    """Read a range of each of many files into a buffer, many of them at once.

    Args:
        files: for each file its path, the offset in it, the size, and the offset in the buffer, in
            bytes or as text such as "1MiB". Ranges that overlap in the buffer end up with the bytes
            of either file.
        buffer: the destination.
        terms: what is asked of each transfer; by default any route.
        queue_depth: files that are open and in flight at once, from 1 to 4096.

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
    return _run(check_ranges(files, buffer), buffer, "read", terms or Terms(), queue_depth)


def write_files(
    files: Iterable[AnyFileRange],
    buffer: Buffer,
    *,
    terms: Terms | None = None,
    queue_depth: int = DEPTH,
) -> list[Outcome]:
    """Write ranges of a buffer to many files, many of them at once; each appears whole or not.

    A file that exists is replaced when its new content is complete, and keeps its permissions,
    owner and attributes as far as that is allowed. After an error it is as it was before.

    Args:
        files: for each file its path, the offset in it, the size, and the offset in the buffer, in
            bytes or as text such as "1MiB". The file has zeros before the offset.
        buffer: the source.
        terms: what is asked of each transfer; by default any route. `sync=True` has each file and
            its name on the medium when the call returns.
        queue_depth: files that are open and in flight at once, from 1 to 4096.

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
    ranges = check_ranges(files, buffer)
    check_paths_differ(ranges)
    return _run(ranges, buffer, "write", terms or Terms(), queue_depth)


def check_ranges(files: Iterable[AnyFileRange], buffer: Buffer) -> list[Range]:
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
            raise ValueError(f"invalid record {index}: the path holds a null byte")
        if one.buffer_offset + one.size > buffer.size or one.file_offset + one.size > OFFSET_MAX:
            raise ValueError(
                f"record {index} (file_offset={one.file_offset} buffer_offset={one.buffer_offset} "
                f"size={one.size}) leaves the buffer of {buffer.size} bytes or the largest file "
                "offset, 2^63-1"
            )
        checked.append(one)
    return checked


def check_paths_differ(ranges: Sequence[Range]) -> None:
    """Raise ValueError for two records of one path: each would replace the other's file."""
    known: dict[str, int] = {}
    for index, one in enumerate(ranges):
        first = known.setdefault(os.path.abspath(one.path), index)
        if first != index:
            raise ValueError(f"records {first} and {index} write the same file, {one.path!r}")


def replacement(path: str) -> Replacement:
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


def check_replaceable(place: Replacement, path: str) -> None:
    """Raise EBUSY for a file that would be written in place, and so could be left incomplete."""
    if place.in_place is not None:
        text = f"the file cannot be replaced: {place.in_place}; write it with File.write_from"
        raise os_error(errno.EBUSY, text, path)


def named(error: OSError, path: str) -> OSError:
    """Return the error of one file, with the path that the caller gave."""
    error.filename = path
    return error


class _Batch:
    """A batch of the core in flight. Awaiting it suspends the transfer until it is done."""

    __slots__ = ("core", "job", "nbytes")

    def __init__(self, job: Job | None = None) -> None:
        self.core: Any = ffi.new("struct dmb_batch **")
        self.job = job
        """What the core reads until the batch is destroyed."""
        self.nbytes = 0
        """Bytes that it has moved without a gap, once it is done."""

    def __await__(self) -> Generator[_Batch, None, None]:
        yield self

    def destroy(self) -> None:
        """Return when no device uses its memory, and free it."""
        core, self.core[0] = self.core[0], ffi.NULL
        lib.dmb_batch_destroy(core)


class _ManyEngine(Engine):
    """A ring of the calling thread, on which the transfers of many files run at once."""

    def __init__(self, queue_depth: int) -> None:
        super().__init__(queue_depth=queue_depth)
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._eventfd, select.POLLIN)
        self._done = ffi.new("struct dmb_done[]", _COMPLETIONS)
        self._count = ffi.new("uint32_t *")
        self._new_tag = itertools.count(1).__next__
        self.in_flight: dict[int, _Batch] = {}
        """Batches that are not done, by their tags."""
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        ring = self._rings[0]
        ring.refused = ring.refused or "the files that are in flight at once share the ring"
        rc = lib.dmb_ring_set_eventfd(ring.handle, self._eventfd)
        if rc:
            raise failure(-rc, "registering an eventfd with io_uring")

    def stop(self) -> None:
        """Submit nothing more, and cancel what can be cancelled."""
        for batch in self.in_flight.values():
            if batch.core[0]:
                lib.dmb_batch_stop(batch.core[0])

    def close(self) -> None:
        """Wait for what is in flight, and tear the ring down."""
        for batch in list(self.in_flight.values()):
            batch.destroy()
        super().close()
        eventfd, self._eventfd = self._eventfd, -1
        if eventfd >= 0:
            os.close(eventfd)

    # -- what the transfers wait for

    async def move_small(
        self, link: Link, one: Range, terms: Terms, begun: float
    ) -> Transfer | None:
        """Move a small aligned range by one request; None where it has to go by `Link.move`."""
        batch = _Batch()
        link.users.add(batch)
        try:
            job = link.small_job()
            if job is None:
                return None
            tag = self._new_tag()
            self.in_flight[tag] = batch
            try:
                _, offset, size, start = one
                handle = self._rings[0].handle
                if lib.dmb_job_start_small(
                    handle, job, offset, start, size, terms.fence, tag, batch.core
                ):
                    return None
                await batch
            finally:
                batch.destroy()
                self.in_flight.pop(tag, None)
        finally:
            link.users.discard(batch)
        if batch.nbytes != size:
            return None
        return link.small_record(size, terms, begun, "one small request gains nothing from it")

    async def run_job(self, job: Job) -> Job:
        """Run a job to its end beside others, and return it."""
        batch, tag = _Batch(job), self._new_tag()
        self.in_flight[tag] = batch
        try:
            self.start(job, batch.core, tag)
            await batch
            job.result = ffi.new("struct dmb_result *")
            lib.dmb_batch_get_result(batch.core[0], job.result)
        finally:
            batch.destroy()
            self.in_flight.pop(tag, None)
        return job

    # -- driving the ring

    def finished(self, *, wait: bool) -> list[_Batch]:
        """Submit what was started, and return the batches that are done.

        Args:
            wait: wait until there is one, for 100 ms at most.
        """
        ring = self._rings[0].handle
        rc = lib.dmb_ring_poll(ring, self._done, _COMPLETIONS, self._count)
        if not rc and not self._count[0] and wait and self._poll.poll(_SLICE_MS):
            os.eventfd_read(self._eventfd)
            rc = lib.dmb_ring_poll(ring, self._done, _COMPLETIONS, self._count)
        if rc:
            raise failure(-rc, "driving io_uring")
        done = []
        for index in range(self._count[0]):
            batch = self.in_flight[self._done[index].tag]
            batch.nbytes = self._done[index].nbytes
            done.append(batch)
        self._count[0] = 0
        return done


class _Waiter:
    """How the transfers of many files wait; a transfer.run.Waiter.

    Only requests of the ring suspend a transfer. Fences and calls block the thread, while the
    devices go on with what is in flight.
    """

    blocking = True

    def __init__(self, engine: _ManyEngine) -> None:
        self._engine = engine

    async def run(self, engine: Engine, job: Job) -> Job:
        """Run a job to its end."""
        return await self._engine.run_job(job)

    async def fences(
        self,
        fds: Sequence[int],
        access: fence.Access,
        timeout: float | None,
        spent: float,
        path: str,
    ) -> None:
        """Wait until the dma-bufs may be accessed."""
        await BLOCKING.fences(fds, access, timeout, spent, path)

    async def ready(
        self, fd: int, access: Literal["read", "write"], deadline: float | None, path: str
    ) -> None:
        """Wait until a stream can be read or written."""
        await BLOCKING.ready(fd, access, deadline, path)

    async def call(self, function: Callable[[], T]) -> T:
        """Make the call."""
        return function()


def _run(
    ranges: Sequence[Range], buffer: Buffer, direction: Direction, terms: Terms, queue_depth: int
) -> list[Outcome]:
    """Move every range, `queue_depth` files at once, and return what became of each."""
    engine = _ManyEngine(queue_depth)
    with engine:
        waiter, move = _Waiter(engine), _read if direction == "read" else _write
        outcomes: list[Outcome | None] = [None] * len(ranges)
        suspended: dict[_Batch, tuple[int, Coroutine[_Batch, None, Transfer]]] = {}
        left = iter(enumerate(ranges))
        buffer.hold()
        try:
            more = True
            while more or suspended:
                while more and len(suspended) < queue_depth:
                    index, one = next(left, (-1, None))
                    if one is None:
                        more = False
                        break
                    coroutine = move(one, buffer, engine, waiter, terms)
                    _step(index, coroutine, suspended, outcomes)
                for batch in engine.finished(wait=bool(suspended)):
                    _step(*suspended.pop(batch), suspended, outcomes)
        finally:
            try:
                engine.stop()
                for _, coroutine in suspended.values():
                    coroutine.close()
                engine.close()
            finally:
                buffer.release()
    return outcomes  # type: ignore[return-value] # each was set


def _step(
    index: int,
    coroutine: Coroutine[_Batch, None, Transfer],
    suspended: dict[_Batch, tuple[int, Coroutine[_Batch, None, Transfer]]],
    outcomes: list[Outcome | None],
) -> None:
    """Run a transfer until it is suspended or ends."""
    try:
        suspended[coroutine.send(None)] = index, coroutine
    except StopIteration as stop:
        outcomes[index] = stop.value
    except OSError as error:
        outcomes[index] = error


async def _read(
    one: Range, buffer: Buffer, engine: _ManyEngine, waiter: _Waiter, terms: Terms
) -> Transfer:
    try:
        with File(one.path, "r", engine=engine) as file:
            return await _move(file, "read", one, buffer, engine, waiter, terms)
    except OSError as error:
        raise named(error, one.path) from None


async def _write(
    one: Range, buffer: Buffer, engine: _ManyEngine, waiter: _Waiter, terms: Terms
) -> Transfer:
    try:
        with replacement(one.path) as place:
            check_replaceable(place, one.path)
            with File(place.temporary, "w", engine=engine) as file:
                transfer = await _move(file, "write", one, buffer, engine, waiter, terms)
            place.commit(None, sync=terms.sync)
            return transfer
    except OSError as error:
        raise named(error, one.path) from None


async def _move(
    file: File,
    direction: Direction,
    one: Range,
    buffer: Buffer,
    engine: _ManyEngine,
    waiter: _Waiter,
    terms: Terms,
) -> Transfer:
    begun = time.perf_counter()
    link = file.links.get(buffer, direction)
    if terms.plain and direction == "read" and one.size <= SMALL:
        done = await engine.move_small(link, one, terms, begun)
        if done is not None:
            return done
    segments = file.segment(buffer, direction, one.size, one.file_offset, one.buffer_offset)
    return await link.move(segments, terms, waiter, begun)

"""copy(): the bytes of any source to any target, through a bounded pool of buffers.

    source --read--> buffer of the pool --write--> target

A thread fills buffers from the source, and the calling thread empties them into the target, in
order. So signals are handled where Python handles them, and every wait for a peer is either in the
calling thread, which Ctrl-C interrupts, or a poll in slices, which the end of the copy ends. No
pool is needed where one end is memory.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dmabuf.copying.blocks import (
    Reader,
    check_block_count,
    check_block_size,
    make_pool,
    next_size,
    sizes_to_plan,
)
from dmabuf.copying.opening import Opener, SourceEnd, TargetEnd, check_distinct
from dmabuf.copying.record import Copy
from dmabuf.copying.sources import Memory, Source
from dmabuf.copying.targets import Target
from dmabuf.memory import Buffer
from dmabuf.sizes import Size, parse_size
from dmabuf.transfer import Prefer, Progress, Require, Route, Terms, check_given

_SLICE = 64 << 20
"""Bytes moved at once where one end is memory."""
_TICK = 0.1
"""Seconds between two calls of `progress`."""


def copy(
    src: SourceEnd,
    dst: TargetEnd,
    *,
    size: Size | None = None,
    src_offset: Size = 0,
    dst_offset: Size = 0,
    progress: Progress | None = None,
    require: Require = "any",
    route: Route | str | None = None,
    prefer: Prefer = "zero-copy",
    exporter: str = "auto",
    sync: bool = False,
    force: bool = False,
    block_size: int | str = "8MiB",
    blocks: int = 4,
) -> Copy:
    """Copy any source to any target, reading ahead while it writes.

    Either end can be a path; a `File`, `Buffer` or window of one; a descriptor, or an object that
    only has `fileno()`, such as a socket; or a binary file object of Python. The descriptor of a
    dma-buf is taken as a Buffer. Without memory at either end, the bytes go through a pool of
    `blocks` buffers of `block_size`, and nothing more is allocated.

    Plain files of Python (opened by `open(path, "rb")` and the like) are copied from their position
    on, which is advanced. All other file objects, such as a GzipFile, are read and written by their
    own methods, because their descriptor does not hold their content.

    A target given by its path is made or emptied, as by cp(1), once nothing more can be refused.
    Any other target keeps what lies beyond the copy. A regular target is allocated whole before it
    is written, if the source's size is known, so holes of a sparse source become zeros. After an
    error the unused part is given back, unless another program has extended the file, and the
    error's `nbytes` is the number of bytes that were copied without a gap.

    A regular file or block device is copied as far as it reached when the copy began. A stream is
    copied to its end, or until a target Buffer is full; its bytes are passed on to another stream
    as they come, and to anything else in whole blocks. Sockets that keep the borders of messages
    are refused.

    Thread-safe.

    Args:
        src: the source.
        dst: the target.
        size: bytes at most, as an int or text such as "1GiB"; by default all of the source.
        src_offset: where to begin in the source, in bytes, counted from the position of a plain
            Python file. A stream has no offset.
        dst_offset: where to begin in the target, in bytes, counted in the same way; a file given
            by its path then keeps what lies elsewhere.
        progress: a function that is called with the number of bytes written and the number
            expected (None if unknown), at most about ten times a second and at the end, in the
            calling thread. An exception from it stops the copy.
        require: "zero-copy", "uncached" or "any", for the reads and for the writes.
        route: the only route allowed, for both.
        prefer: "fastest" reads from the page cache what it holds.
        exporter: the exporter of the pool, as for `allocate`.
        sync: return when the bytes are on the medium.
        force: write to a block device even if it is mounted.
        block_size: bytes of one buffer of the pool, a multiple of 4096.
        blocks: number of buffers in the pool; with 1 nothing is read ahead.

    Raises:
        OSError: what the kernel refused. EINVAL if source and target are the same file, device or
            memory, and ENOSPC if the target is too small; both before anything changes.
        RouteUnavailable: a side has no permitted route. The target is unchanged, unless a stream
            ended in a last piece that has none.
        ShortReadError: the source shrank or was truncated during the copy.
        ValueError: an invalid size or offset, or an endless source without `size`.
    """
    begun = time.perf_counter()
    check_given(None, progress)
    block, blocks = check_block_size(block_size), check_block_count(blocks)
    most = None if size is None else parse_size(size)
    with ExitStack() as stack:
        opener = Opener(Terms(require, route, prefer), stack)
        source = opener.source(src, src_offset)
        if isinstance(source, Source) and source.endless and most is None:
            raise ValueError(f"{source.name} never ends: limit it with size")
        target = opener.target(dst, dst_offset, force=force)
        check_distinct(source, target)
        total, most = _expected(source, target, most)
        meter = Meter(progress, total)
        pool: list[Buffer] = []
        done = 0
        try:
            if isinstance(target, Memory):
                assert most is not None
                move = _between_memories if isinstance(source, Memory) else _into_memory
                done = move(source, target, most, meter)  # type: ignore[arg-type]
            elif isinstance(source, Memory):
                assert most is not None
                done = _from_memory(source, target, most, meter, sync)
            else:
                pool = make_pool(stack, exporter, most, block, blocks)
                done = _through_pool(source, target, pool, total, most, meter, sync)
            if sync and not isinstance(target, Memory):
                target.flush()
            meter.finish(done)
        except BaseException as error:
            done = getattr(error, "nbytes", 0)
            raise
        finally:
            opener.advance(done)
    read = None if isinstance(source, Memory) else source.tally.side()
    write = None if isinstance(target, Memory) else target.tally.side()
    by_cpu = done if isinstance(source, Memory) and isinstance(target, Memory) else 0
    return Copy(
        nbytes=done,
        seconds=time.perf_counter() - begun,
        read=read,
        write=write,
        copied=by_cpu + sum(side.copied for side in (read, write) if side),
        exporter=pool[0].exporter if pool else None,
        allocated=sum(buffer.size for buffer in pool),
    )


def _expected(
    source: Source | Memory, target: Target | Memory, most: int | None
) -> tuple[int | None, int | None]:
    """Return the bytes that will come (None if unknown), and the bytes at most."""
    total = source.size if isinstance(source, Memory) else source.total
    if total is not None:
        total = most = total if most is None else min(total, most)
    if isinstance(target, Memory):
        wanted = total if total is not None else most
        if wanted is not None and wanted > target.size:
            text = f"{wanted} bytes do not fit into the {target.size} of the buffer: give a size"
            raise OSError(errno.ENOSPC, text)
        most = target.size if most is None else most
    return total, most


class Meter:
    """Calls the caller's progress function, not too often."""

    def __init__(self, call: Progress | None, total: int | None) -> None:
        self._call = call
        self._total = total
        self._next = time.monotonic() + _TICK

    def __call__(self, done: int) -> None:
        """Call it, unless it was called a moment ago."""
        if self._call is not None and time.monotonic() >= self._next:
            with _at(done):
                self._call(done, self._total)
            self._next = time.monotonic() + _TICK

    def finish(self, done: int) -> None:
        """Call it a last time."""
        if self._call is not None:
            with _at(done):
                self._call(done, done)


@contextmanager
def _at(done: int) -> Iterator[None]:
    """Give an exception the bytes that were copied as its `nbytes`."""
    try:
        yield
    except BaseException as error:
        error.nbytes = done  # type: ignore[attr-defined]
        raise


@contextmanager
def _counting(done: int) -> Iterator[None]:
    """Add the bytes that were `done` before to an error's `nbytes`."""
    try:
        yield
    except BaseException as error:
        error.nbytes = done + getattr(error, "nbytes", 0)  # type: ignore[attr-defined]
        raise


class Writer:
    """Writes pieces to a target, one behind the other. A context manager.

    Entering it plans the route of every piece and gets the target ready; leaving it gives back
    what was allocated and not written.
    """

    def __init__(
        self, target: Target, buffer: Buffer, total: int | None, block: int, *, sync: bool = False
    ) -> None:
        self.done = 0
        """Bytes that the target has."""
        self._target = target
        self._total = total
        self._sync = sync
        self._sizes = [(buffer, size) for size in sizes_to_plan(total, block)]

    def __enter__(self) -> Writer:
        for buffer, size in self._sizes:
            self._target.plan(buffer, size)
        try:
            self._target.prepare(self._total)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        """Write the next `size` bytes, from the buffer's offset `at`."""
        with _counting(self.done):
            self._target.write(buffer, at, size)
        self.done += size

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            self._target.cut(self.done)
            return
        nbytes = getattr(error, "nbytes", self.done)
        try:
            self._target.cut(nbytes)
            if self._sync and nbytes and isinstance(error, Exception):
                self._target.flush()
        except OSError as failed:
            error.add_note(f"after the error: {failed}")
            nbytes = 0 if self._sync else nbytes
        error.nbytes = nbytes  # type: ignore[attr-defined]


def _through_pool(
    source: Source,
    target: Target,
    pool: list[Buffer],
    total: int | None,
    most: int | None,
    meter: Meter,
    sync: bool,
) -> int:
    block = pool[0].size
    for size in sizes_to_plan(total, block):
        source.plan(pool[0], size)
    ahead = len(pool) > 1 and source.any_thread
    reader = Reader(source, pool, most, whole=target.in_order is None, ahead=ahead)
    with Writer(target, pool[0], total, block, sync=sync) as writer, reader:
        while True:
            filled = reader.take()
            if filled.size:
                writer.write(filled.buffer, 0, filled.size)
                meter(writer.done)
            if filled.error is not None:
                filled.error.nbytes = writer.done  # type: ignore[attr-defined]
                raise filled.error
            if filled.last:
                return writer.done
            reader.give_back(filled.buffer)


def _into_memory(source: Source, target: Memory, most: int, meter: Meter) -> int:
    done = 0
    while done < most:
        wanted = next_size(most - done, _SLICE)
        with _counting(done):
            got = source.read(
                target.buffer, target.start + done, wanted,
                whole=True, more=done + wanted < most,
            )  # fmt: skip
        done += got
        if got < wanted:
            with _counting(done):
                source.check_end(wanted - got)
            break
        meter(done)
    return done


def _from_memory(source: Memory, target: Target, most: int, meter: Meter, sync: bool) -> int:
    with Writer(target, source.buffer, most, _SLICE, sync=sync) as writer:
        while writer.done < most:
            at = source.start + writer.done
            writer.write(source.buffer, at, next_size(most - writer.done, _SLICE))
            meter(writer.done)
    return writer.done


def _between_memories(source: Memory, target: Memory, most: int, meter: Meter) -> int:
    done = 0
    while done < most:
        size = min(most - done, _SLICE)
        with (
            source.buffer.map("r", source.start + done, size) as read,
            target.buffer.map("w", target.start + done, size) as write,
        ):
            write[:] = read
        done += size
        meter(done)
    return done

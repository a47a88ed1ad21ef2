"""copy(): any source to any target, through a bounded pool of buffers.

A thread fills the pool's buffers from the source, and the calling thread empties them to the
target, in order: so signals are answered where Python answers them, and what waits for a peer
without bound is either the calling thread, which Ctrl-C interrupts, or a poll that the end of the
copy wakes. Each side's transfer holds one of the default engine's two rings while it runs, and none
while it waits for the other side or for a peer.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from dmabuf import exporters
from dmabuf._ahead import Ahead, InTurn, piece, pieces_to_plan
from dmabuf._ends import Appender, Memory, Sink, Source, Terms
from dmabuf._leg import Leg
from dmabuf._opening import End, check_distinct, open_sink, open_source
from dmabuf.buffer import Buffer
from dmabuf.route import Prefer, Require, Route
from dmabuf.sizes import Size, as_int, parse_size, round_up

__all__ = ["Copy", "Leg", "copy"]

Progress = Callable[[int, int | None], object]

_PAGE = 4096
_SLICE = 64 << 20
"""Bytes moved at once where one end is memory, and so no pool is needed."""
_TICK = 0.1
"""Seconds between two calls of `progress`."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The record of one finished copy."""

    nbytes: int
    """Bytes copied."""
    seconds: float
    """From the call to its return."""
    read: Leg | None
    """How the bytes came; None where the source is memory, or empty."""
    write: Leg | None
    """How the bytes went; None where the target is memory, or the source was empty."""
    copied: int
    """Bytes that the CPU touched, both sides together; 0 is zero-copy."""
    exporter: str | None
    """What the pool's buffers were made by; None where none was needed."""
    allocated: int
    """Bytes of the pool."""


def copy(
    src: End,
    dst: End,
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

    Either may be a path; a `File`, `Buffer` or window of one; a descriptor, or an object with
    `fileno()`: a Python file, a socket. A dma-buf's descriptor is taken as a Buffer. Where neither
    end is memory the bytes go through a pool of `blocks` buffers of `block_size`, and no more is
    allocated whatever is moved.

    A target given by its path is made or emptied, as `cp` does, once nothing more can be refused;
    one given as a File or descriptor keeps what lies beyond the copy. A regular target is
    allocated whole before it is written where the source's size is known, so holes of a sparse
    source become zeros on the medium. After an error it is cut back to what was copied without a
    gap, and the error's `nbytes` tells how much that is.

    Of a regular file or block device, what it has when the copy begins is copied: what it grows
    meanwhile is not. A stream is copied to its end, or until a target Buffer is full; what has
    come of it goes on to another stream at once, and to anything else in whole blocks.

    Thread-safe; two copies at a time share the default engine's two rings.

    Args:
        src: where from.
        dst: where to.
        size: bytes at most, as an int or like "1GiB"; by default all of the source.
        src_offset: where to begin in the source, in bytes. A stream has none.
        dst_offset: where to begin in the target, in bytes; a file then keeps what lies elsewhere.
        progress: called with the bytes written and those expected (None where nobody knows), at
            most about ten times a second and at the end, in the calling thread. What it raises
            stops the copy.
        require: "zero-copy", "uncached" or "any", of the reads and of the writes.
        route: the only route that will do, for both.
        prefer: "fastest" takes what is in the page cache from there.
        exporter: what makes the pool, as for `allocate`.
        sync: return when the bytes are on the medium.
        force: write to a block device even where it is mounted.
        block_size: bytes of one buffer of the pool, a multiple of 4096.
        blocks: buffers in the pool; with 1 nothing is read ahead.

    Raises:
        OSError: what the kernel refused; EINVAL where source and target are the same file, device
            or memory, before anything is touched; ENOSPC where the target is too small.
        RouteUnavailable: a side has no permitted route; the target is as it was, unless a stream
            ended in a last piece that has none.
        ShortReadError: the source shrank meanwhile.
        ValueError: a size or offset that cannot be, or a source without an end and no `size`.
    """
    begun = time.perf_counter()
    block = check_block(block_size)
    blocks = check_blocks(blocks)
    most = None if size is None else parse_size(size)
    terms = Terms(require, route, prefer)
    with ExitStack() as stack:
        source = open_source(src, src_offset, terms, stack)
        if isinstance(source, Source) and source.endless and most is None:
            raise ValueError(f"{source.name} never ends: say how much of it with size")
        sink = open_sink(dst, dst_offset, terms, stack, force=force)
        check_distinct(source, sink)
        total, most = _expected(source, sink, most)
        meter = _Meter(progress, total)
        pool: list[Buffer] = []
        if isinstance(source, Memory):
            assert most is not None
            if isinstance(sink, Memory):
                done = _between_memories(source, sink, most, meter)
            else:
                done = _from_memory(source, sink, most, meter)
        elif isinstance(sink, Memory):
            assert most is not None
            done = _into_memory(source, sink, most, meter)
        else:
            pool = _make_pool(stack, exporter, most, block, blocks)
            done = _through_pool(source, sink, pool, total, most, meter)
        meter.finish(done)
        if sync and not isinstance(sink, Memory):
            sink.flush()
    read = source.tally.leg() if isinstance(source, Source) else None
    write = None if isinstance(sink, Memory) else sink.tally.leg()
    touched = done if isinstance(source, Memory) and isinstance(sink, Memory) else 0
    return Copy(
        nbytes=done,
        seconds=time.perf_counter() - begun,
        read=read,
        write=write,
        copied=touched + sum(leg.copied for leg in (read, write) if leg),
        exporter=pool[0].exporter if pool else None,
        allocated=sum(buffer.size for buffer in pool),
    )


def check_block(block_size: int | str) -> int:
    """The bytes of one buffer of a pool; raises ValueError."""
    block = parse_size(block_size, "block_size")
    if block % _PAGE or not _PAGE <= block <= 1 << 30:
        raise ValueError(f"block_size={block_size!r}: a multiple of 4096, from 4 KiB to 1 GiB")
    return block


def check_blocks(blocks: int) -> int:
    """The number of buffers of a pool; raises ValueError."""
    blocks = as_int(blocks, "blocks")
    if not 1 <= blocks <= 1024:
        raise ValueError(f"blocks={blocks}: from 1 to 1024 buffers")
    return blocks


def _expected(
    source: Source | Memory, sink: Sink | Appender | Memory, most: int | None
) -> tuple[int | None, int | None]:
    """Bytes that will come (None where nobody knows), and bytes at most."""
    total = source.size if isinstance(source, Memory) else source.total
    if total is not None:
        total = most = total if most is None else min(total, most)
    if isinstance(sink, Memory):
        wanted = total if total is not None else most
        if wanted is not None and wanted > sink.size:
            text = f"{wanted} bytes do not fit into the {sink.size} of the buffer: give a size"
            raise OSError(errno.ENOSPC, text)
        most = sink.size if most is None else most
    return total, most


class _Meter:
    """Calls the caller's progress function, not too often."""

    def __init__(self, call: Progress | None, total: int | None) -> None:
        self._call, self._total = call, total
        self._next = time.monotonic() + _TICK

    def __call__(self, done: int) -> None:
        if self._call is not None and time.monotonic() >= self._next:
            self._call(done, self._total)
            self._next = time.monotonic() + _TICK

    def finish(self, done: int) -> None:
        if self._call is not None:
            self._call(done, done)


# -- where one end is memory


def _into_memory(source: Source, sink: Memory, most: int, meter: _Meter) -> int:
    done = 0
    while done < most:
        wanted = piece(most - done, _SLICE)
        with _counting(done):
            got = source.read(sink.buffer, sink.start + done, wanted, whole=True, stop=None)
        done += got
        if got < wanted:
            with _counting(done):
                source.check_end(wanted - got)
            break
        meter(done)
    return done


def _from_memory(source: Memory, sink: Sink | Appender, most: int, meter: _Meter) -> int:
    with prepared(sink, source.buffer, most, _SLICE) as written:
        while written.done < most:
            at = source.start + written.done
            written.write(source.buffer, at, piece(most - written.done, _SLICE))
            meter(written.done)
    return written.done


def _between_memories(source: Memory, sink: Memory, most: int, meter: _Meter) -> int:
    done = 0
    while done < most:
        size = min(most - done, _SLICE)
        with (
            source.buffer.map("r", source.start + done, size) as read,
            sink.buffer.map("w", sink.start + done, size) as write,
        ):
            write[:] = read
        done += size
        meter(done)
    return done


# -- through the pool


class _Written:
    """Counts what the target has; an error of a write tells the whole."""

    def __init__(self, sink: Sink | Appender) -> None:
        self._sink = sink
        self.done = 0

    def write(self, buffer: Buffer, at: int, size: int) -> None:
        with _counting(self.done):
            self._sink.write(buffer, at, size)
        self.done += size


@contextmanager
def _counting(done: int) -> Iterator[None]:
    """Make an error's `nbytes` that of the copy, by adding what was `done` before."""
    try:
        yield
    except BaseException as error:
        error.nbytes = done + getattr(error, "nbytes", 0)  # type: ignore[attr-defined]
        raise


@contextmanager
def prepared(
    sink: Sink | Appender, buffer: Buffer, total: int | None, block: int
) -> Iterator[_Written]:
    """The target readied for `total` bytes, and after all cut to what has come."""
    for size in pieces_to_plan(total, block):
        sink.plan(buffer, size)
    written, start = _Written(sink), sink.offset
    sink.prepare(total)
    try:
        yield written
    except BaseException as error:
        whole = getattr(error, "nbytes", written.done)
        try:
            sink.cut(start + whole)
        except OSError as refused:
            error.add_note(f"the target could not be cut back: {refused}")
        error.nbytes = whole  # type: ignore[attr-defined]
        raise
    sink.cut(start + written.done)


def _make_pool(
    stack: ExitStack, exporter: str, most: int | None, block: int, blocks: int
) -> list[Buffer]:
    """The buffers, no more of them and no larger than what is going to come can use."""
    if most is not None:
        block = min(block, round_up(max(most, 1), _PAGE))
        blocks = min(blocks, 1 if most <= block else -(-most // block) + 1)
    return [
        stack.enter_context(exporters.allocate(block, exporter=exporter, name="dmabuf copy"))
        for _ in range(blocks)
    ]


def _through_pool(
    source: Source,
    sink: Sink | Appender,
    pool: list[Buffer],
    total: int | None,
    most: int | None,
    meter: _Meter,
) -> int:
    block = pool[0].size
    for size in pieces_to_plan(total, block):
        source.plan(pool[0], size)
    ahead = len(pool) > 1 and source.any_thread
    fill = (Ahead if ahead else InTurn)(source, pool, most, whole=sink.in_order is None)
    with prepared(sink, pool[0], total, block) as written, fill:
        while True:
            filled = fill.take()
            if filled.size:
                written.write(filled.buffer, 0, filled.size)
                meter(written.done)
            if filled.error is not None:
                filled.error.nbytes = written.done  # type: ignore[attr-defined]
                raise filled.error
            if filled.last:
                return written.done
            fill.give(filled.buffer)

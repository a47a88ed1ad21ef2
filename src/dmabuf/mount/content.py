"""The bytes of a file: read from a buffer, written to it, held while there may be more."""

from __future__ import annotations

import errno
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from dmabuf import _log
from dmabuf.buffer import Buffer
from dmabuf.errors import ClosedError
from dmabuf.sizes import round_up
from dmabuf.store import Store, as_trusted_as_may_be

Part = memoryview | bytes

_PAGE = 4096
_LEAST_MORE = 1 << 20
_MOST_MORE = 256 << 20
_ZEROS = bytes(1 << 20)
_COPIED = 8 << 20

_BLOCK = 8 << 20
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; not in Python's mmap

_lent: dict[int, weakref.ref[memoryview]] = {}  # by id: a reference's hash is its memory's
_touched: weakref.WeakKeyDictionary[Buffer, set[int]] = weakref.WeakKeyDictionary()


def _touch(buffer: Buffer, offset: int, size: int) -> None:
    """Fill the page tables of the blocks that are touched for the first time, each in one go.

    A fault a page was seen to take longer than the copy of the page.
    """
    memory = buffer._memory
    if memory is None or buffer._pin_refusal is not None:
        return
    known = _touched.setdefault(buffer, set())
    for block in range(offset // _BLOCK, (offset + size - 1) // _BLOCK + 1):
        if block not in known:
            known.add(block)
            start = block * _BLOCK
            advice = _MADV_POPULATE_WRITE if buffer.writable() else _MADV_POPULATE_READ
            with suppress(OSError):  # the pages then come one by one
                memory.madvise(advice, start, min(_BLOCK, buffer.size - start))


def put(buffer: Buffer, offset: int, data: Part) -> None:
    """Put bytes into a buffer."""
    if len(data) > _PAGE:
        _touch(buffer, offset, len(data))
    buffer.pwrite(data, offset)


def lend(buffer: Buffer, offset: int, size: int) -> Part:
    """Bytes of a buffer: its memory itself where the kernel can take them from there, else a copy.

    The CPU's access to the dma-buf begins here, and ends when the view is let go of.
    """
    if buffer._pin_refusal is not None:  # the kernel takes a reply from pages, and there are none
        return buffer.pread(size, offset)
    if size > _PAGE:
        _touch(buffer, offset, size)
    view = buffer._view(offset, size)
    if buffer.is_dmabuf:
        access = buffer._cpu_access(True, False, offset, size)
        access.__enter__()

        def end(reference: weakref.ref[memoryview]) -> None:
            del _lent[id(reference)]
            try:
                access.__exit__(None, None, None)
            except OSError as error:
                _log.info("ending the access to %r: %s", buffer, error)

        kept = weakref.ref(view, end)
        _lent[id(kept)] = kept
    return view


def zero(buffer: Buffer, start: int, end: int) -> None:
    """Zero bytes ``[start, end)``."""
    while start < end:
        size = min(end - start, len(_ZEROS))
        buffer.pwrite(memoryview(_ZEROS)[:size], start)
        start += size


def copy(source: Buffer, target: Buffer, start: int, size: int, target_start: int) -> None:
    """Copy bytes from one buffer to another, a part at a time."""
    for at in range(0, size, _COPIED):
        part = min(_COPIED, size - at)
        with source.map("r", start + at, part) as view:
            put(target, target_start + at, view)


class Growing:
    """Content whose length is not known yet: buffers without a name, one after the other.

    The store makes them, and counts them against its limit. ``first``, where it is given, is the
    memory that the file has so far.
    """

    def __init__(self, store: Store, mode: int, first: Buffer | None = None, length: int = 0):
        self.length = length
        self._store, self._mode = store, mode
        self._first = first
        self._buffers: list[Buffer] = [] if first is None else [first]
        self._starts: list[int] = [] if first is None else [0]
        self.capacity = self._reached = 0 if first is None else first.size

    def of(self, store: Store) -> bool:
        """Whether it is this connection that it has its memory by."""
        return store is self._store

    def reserve(self, end: int) -> None:
        """Have room for bytes up to ``end``. It takes as long as the memory takes to be made."""
        if end <= self.capacity:
            return
        needed = end - self.capacity
        more = needed
        if self.capacity:
            more = max(needed, min(max(_LEAST_MORE, self.capacity), _MOST_MORE))
        try:
            made = self._made(more)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM) or more == needed:
                raise
            made = self._made(needed)
        self._starts.append(self.capacity)
        self._buffers.append(made)
        self.capacity += made.size

    def _made(self, size: int) -> Buffer:
        create = partial(self._store.create, None, size, mode=self._mode)
        return as_trusted_as_may_be(create)

    def write(self, offset: int, data: Part) -> None:
        """Put bytes at an offset, for which there is room; what is left out before it is zero."""
        end = offset + len(data)
        self._zero(self.length, offset)
        view = memoryview(data)
        for buffer, start, size in self._parts(offset, len(data)):
            put(buffer, start, view[:size])
            view = view[size:]
        self.length, self._reached = max(self.length, end), max(self._reached, end)

    def resize(self, length: int) -> None:
        """Cut it short, or lengthen it with zeros for which there is room."""
        self._zero(self.length, length)
        self.length = length

    def read(self, offset: int, size: int) -> Part:
        """Bytes that are there."""
        parts = list(self._parts(offset, size))
        if len(parts) == 1:
            return lend(*parts[0])
        return b"".join(buffer.pread(size, start) for buffer, start, size in parts)

    def whole(self) -> Buffer:
        """One buffer with all of it, without a name: the one that there is, or a copy."""
        only = self._buffers[0] if len(self._buffers) == 1 else None
        length = max(self.length, 1)
        if only is not None and only is not self._first and only.size == round_up(length, _PAGE):
            return only
        made = self._made(length)
        try:
            at = 0
            for buffer, start, size in self._parts(0, self.length):
                copy(buffer, made, start, size, at)
                at += size
        except BaseException:
            self._store.discard(made)
            raise
        return made

    def become(self, whole: Buffer) -> None:
        """Have all of it in one buffer from now on, and let go of the memory that was there."""
        buffers, first = self._buffers, self._first
        if not any(buffer is whole for buffer in buffers):
            self._reached = self.length
        self._first, self._buffers, self._starts = None, [whole], [0]
        self.capacity = whole.size
        self._let_go([buffer for buffer in buffers if buffer is not whole], first)

    def discard(self) -> None:
        """Let go of all memory."""
        buffers, self._buffers, self._starts = self._buffers, [], []
        self.capacity = self.length = self._reached = 0
        self._let_go(buffers, self._first)

    def _let_go(self, buffers: list[Buffer], first: Buffer | None) -> None:
        for buffer in buffers:
            if buffer is first:
                buffer.close()
            else:
                with suppress(ConnectionError, ClosedError):  # it has let go of it by itself
                    self._store.discard(buffer)

    def _zero(self, start: int, end: int) -> None:
        end = min(end, self._reached)  # what was never touched is zero
        if start < end:
            for buffer, at, size in self._parts(start, end - start):
                zero(buffer, at, at + size)

    def _parts(self, offset: int, size: int) -> Iterator[tuple[Buffer, int, int]]:
        at = bisect_right(self._starts, offset) - 1
        while size:
            buffer, start = self._buffers[at], offset - self._starts[at]
            part = min(size, buffer.size - start)
            yield buffer, start, part
            offset, size, at = offset + part, size - part, at + 1

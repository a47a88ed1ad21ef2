"""The pool of a copy: its buffers, and how they are filled from the source."""

from __future__ import annotations

import math
import resource
import threading
import time
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from dmabuf.copying.sources import Source
from dmabuf.errors import ShortReadError
from dmabuf.memory import Buffer, allocate
from dmabuf.sizes import as_int, parse_size, round_up
from dmabuf.transfer import stopping

_PAGE = 4096
_SMALLEST_LAST = 1 << 20
_SLICE = 0.1
"""Seconds of one wait."""
_PATIENCE = 5.0
"""Seconds after which a stopped copy logs that it waits for a device."""


def check_block_size(block_size: int | str) -> int:
    """Return the bytes of one buffer of a pool; raises ValueError."""
    block = parse_size(block_size, "block_size")
    if block % _PAGE or not _PAGE <= block <= 1 << 30:
        raise ValueError(f"invalid block_size {block_size!r}: use a multiple of 4096 up to 1GiB")
    return block


def check_block_count(blocks: int) -> int:
    """Return the number of buffers of a pool; raises ValueError."""
    blocks = as_int(blocks, "blocks")
    if not 1 <= blocks <= 1024:
        raise ValueError(f"invalid blocks {blocks}: use a number from 1 to 1024")
    return blocks


def make_pool(
    stack: ExitStack, exporter: str, most: int | None, block: int, blocks: int
) -> list[Buffer]:
    """Allocate the buffers: no more and no larger ones than `most` bytes can use.

    None is larger than RLIMIT_FSIZE, which counts the files of shared memory too.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY:
        block = min(block, max(limit // _PAGE, 1) * _PAGE)
    if most is not None:
        block = min(block, round_up(max(most, 1), _PAGE))
        blocks = min(blocks, 1 if most <= block else -(-most // block) + 1)
    return [
        stack.enter_context(allocate(block, exporter=exporter, name="dmabuf copy"))
        for _ in range(blocks)
    ]


def next_size(left: int | None, block: int) -> int:
    """Return how many of the `left` bytes (None if unknown) to move next, at most a block.

    The last piece has 1 MiB or a quarter block, if there are as many bytes: a few bytes by
    themselves hold no whole block of the file, and could not take the route of the others.
    """
    last = min(_SMALLEST_LAST, block // 4) // _PAGE * _PAGE
    if left is None or left == block or left >= block + last:
        return block
    return left if left <= block else block - last


def sizes_to_plan(total: int | None, block: int) -> list[int]:
    """Return the sizes whose routes are those of all pieces: of the first and of the last."""
    if total is None:
        return [block]
    left = total if total <= 3 * block else total % block + 2 * block  # whole blocks until then
    while left > (last := next_size(left, block)):
        left -= last
    return sorted({next_size(total, block), left} - {0})


class Filled(NamedTuple):
    """A buffer filled from the source."""

    buffer: Buffer
    size: int
    """Bytes of the source in it."""
    last: bool
    """Whether the source has no more."""
    error: BaseException | None
    """The error that came after these bytes."""


class _Stopped(BaseException):
    """Raised in the thread of a Reader that waits for a peer, because the copy has ended."""


class Reader:
    """Fills buffers of the pool from the source. A context manager.

    With `ahead` a thread fills them as long as there are empty ones. Leaving the context stops the
    thread: a wait for a stream or a fence ends within 100 ms, and a transfer that a device works on
    by itself.
    """

    def __init__(
        self,
        source: Source,
        pool: list[Buffer],
        most: int | None,
        *,
        whole: bool,
        ahead: bool = False,
    ) -> None:
        self._source = source
        self._pool = pool
        self._left = most
        self._whole = whole
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._ended = False  # is_alive() is wrong after an interrupt of join() (CPython 3.11)
        self._end: SimpleQueue[None] = SimpleQueue()
        self._empty: SimpleQueue[Buffer | None] = SimpleQueue()
        self._full: SimpleQueue[Filled] = SimpleQueue()
        if ahead:
            self._thread = threading.Thread(target=self._run, name="dmabuf copy: reader")

    def take(self) -> Filled:
        """Return the next bytes of the source; signals are handled while it waits for them."""
        if self._thread is None:
            return self.fill(self._pool[0])
        while True:
            # In slices: a signal just before the wait does not interrupt it.
            if stopping.check is not None:
                stopping.check()
            with suppress(Empty):
                return self._full.get(timeout=_SLICE)

    def give_back(self, buffer: Buffer) -> None:
        """Let an emptied buffer be filled again."""
        self._empty.put(buffer)

    def fill(self, buffer: Buffer) -> Filled:
        """Read the next bytes of the source into a buffer."""
        wanted = next_size(self._left, buffer.size)
        if not wanted:
            return Filled(buffer, 0, True, None)
        source, more = self._source, self._left is None or self._left > wanted
        try:
            got = source.read(buffer, 0, wanted, whole=self._whole, more=more)
        except OSError as error:
            return Filled(buffer, getattr(error, "nbytes", 0), True, error)
        if self._left is not None:
            self._left -= got
        ended = got < wanted if self._whole or not source.in_order else not got
        if ended:
            try:
                source.check_end(wanted - got)
            except ShortReadError as error:
                return Filled(buffer, got, True, error)
        return Filled(buffer, got, ended or self._left == 0, None)

    def _check(self) -> None:
        if self._stopped:
            raise _Stopped

    def _run(self) -> None:
        try:
            self._fill_all()
        finally:
            self._ended = True
            self._end.put(None)

    def _fill_all(self) -> None:
        stopping.check = self._check
        while (buffer := self._empty.get()) is not None:
            try:
                filled = self.fill(buffer)
            except BaseException as error:
                filled = Filled(buffer, 0, True, error)
            self._full.put(filled)
            if filled.last:
                return

    def __enter__(self) -> Reader:
        if self._thread is not None:
            for buffer in self._pool:
                self._empty.put(buffer)
            try:
                self._thread.start()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exc: object) -> None:
        interruption, self._stopped = None, True
        while self._thread is not None:
            try:
                self._end_thread(self._thread)
            except KeyboardInterrupt as error:  # a second one: still wait for the thread
                interruption = error
        if interruption is not None and exc[:1] == (None,):
            raise interruption

    def _end_thread(self, thread: threading.Thread) -> None:
        self._empty.put(None)
        if thread.ident is not None:
            self._wait_for_end(_PATIENCE)
            if not self._ended:
                import logging

                text = "%s: waiting for the device to finish a read"
                logging.getLogger("dmabuf").warning(text, self._source.name)
                self._wait_for_end(math.inf)
            thread.join()
        self._thread = None

    def _wait_for_end(self, seconds: float) -> None:
        """Wait until the thread reads no more, or for so many seconds."""
        late = time.monotonic() + seconds
        while not self._ended and time.monotonic() < late:
            with suppress(Empty):
                self._end.get(timeout=_SLICE)

"""Filling buffers from a source: in turn with whoever empties them, or ahead, in a thread."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from dmabuf._ends import Source
from dmabuf.buffer import Buffer
from dmabuf.errors import ShortReadError
from dmabuf.steps import stopping

log = logging.getLogger("dmabuf")

_PAGE = 4096
_LAST = 1 << 20
_SLICE = 0.1
"""Seconds of one wait."""
_PATIENCE = 5.0
"""Seconds after which a copy that is stopped says what it waits for."""


def piece(left: int | None, block: int) -> int:
    """How much to move next of what is left (None where nobody knows), a block at most.

    The last piece has 1 MiB or a quarter block, where there is as much: a few bytes by themselves
    hold no whole block of the file, and could not go by the route that all the others took.
    """
    last = min(_LAST, block // 4) // _PAGE * _PAGE
    if left is None or left == block or left >= block + last:
        return block
    return left if left <= block else block - last


def pieces_to_plan(total: int | None, block: int) -> list[int]:
    """The sizes whose routes tell those of all pieces: the first and the last; none of nothing."""
    if total is None:
        return [block]
    left = total if total <= 3 * block else total % block + 2 * block  # whole ones until then
    while left > (last := piece(left, block)):
        left -= last
    return sorted({piece(total, block), left} - {0})


class Filled(NamedTuple):
    """A buffer with `size` bytes of the source, whether they are the last, and what came after."""

    buffer: Buffer
    size: int
    last: bool
    error: BaseException | None


class InTurn:
    """Fills a buffer when it is asked for one. A context manager."""

    def __init__(
        self, source: Source, pool: list[Buffer], most: int | None, *, whole: bool
    ) -> None:
        self._source, self._pool, self._left, self._whole = source, pool, most, whole
        self._wake: int | None = None

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def take(self) -> Filled:
        """The next bytes of the source."""
        return self.fill(self._pool[0])

    def give(self, buffer: Buffer) -> None:
        """A buffer has been emptied."""

    def fill(self, buffer: Buffer) -> Filled:
        """The next bytes of the source, in this buffer."""
        wanted = piece(self._left, buffer.size)
        if not wanted:
            return Filled(buffer, 0, True, None)
        source = self._source
        try:
            got = source.read(buffer, 0, wanted, whole=self._whole, stop=self._wake)
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


class Ahead(InTurn):
    """Fills buffers in a thread of its own, as long as there are empty ones.

    Whoever leaves its context stops the thread: a wait for a stream is woken, a transfer that a
    device is busy with ends by itself, and then the thread is joined.
    """

    def __init__(
        self, source: Source, pool: list[Buffer], most: int | None, *, whole: bool
    ) -> None:
        super().__init__(source, pool, most, whole=whole)
        self._empty: SimpleQueue[Buffer | None] = SimpleQueue()
        self._full: SimpleQueue[Filled] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dmabuf copy: reader")
        for buffer in pool:
            self._empty.put(buffer)

    def __enter__(self) -> InTurn:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._thread.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def take(self) -> Filled:
        """The next bytes of the source; waits for them, and a signal is answered meanwhile."""
        while True:
            # In slices: a signal that comes just before the wait does not interrupt it.
            if stopping.check is not None:
                stopping.check()
            with suppress(Empty):
                return self._full.get(timeout=_SLICE)

    def give(self, buffer: Buffer) -> None:
        """Let an emptied buffer be filled again."""
        self._empty.put(buffer)

    def __exit__(self, *exc: object) -> None:
        interruption = None
        while self._wake is not None:
            try:
                self._end(self._wake)
            except KeyboardInterrupt as error:  # a second one: the thread has to end all the same
                interruption = error
        if interruption is not None and exc[:1] == (None,):
            raise interruption

    def _end(self, wake: int) -> None:
        os.eventfd_write(wake, 1)
        self._empty.put(None)
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():
                log.warning("%s: waiting for the device to finish a read", self._source.name)
                self._thread.join()
        self._wake = None
        os.close(wake)

    def _run(self) -> None:
        while (buffer := self._empty.get()) is not None:
            try:
                filled = self.fill(buffer)
            except BaseException as error:
                filled = Filled(buffer, 0, True, error)
            self._full.put(filled)
            if filled.last:
                return

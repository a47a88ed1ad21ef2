"""What of the store's memory takes long, in threads: making it, and letting go of it."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from dmabuf.store import memory as _memory
from dmabuf.store.memory import Memory
from dmabuf.store.names import Names
from dmabuf.store.protocol import Refusal

log = logging.getLogger("dmabuf")

_MAKING, _FREEING = 4, 2  # threads
_SHARE = 0.1
"""Of the server's time, for asking whether removed memory is still in use."""


class Keeper:
    """Makes memory and frees it, for the server's loop, to which all of it but the work belongs.

    ``descriptors`` is how many the memory may have in all.
    """

    def __init__(self, names: Names[Memory], descriptors: int, later: Callable[..., None]) -> None:
        self._names, self._room, self._later = names, descriptors, later
        self._making = ThreadPoolExecutor(_MAKING, "dmabuf store: making")
        self._freeing = ThreadPoolExecutor(_FREEING, "dmabuf store: freeing")
        self._leaving: set[Future[None]] = set()
        self._credit, self._counted = _SHARE, time.monotonic()

    def make(
        self,
        size: int,
        exporter: str,
        name: str | None,
        huge_pages: bool | int,
        done: Callable[[Memory | Refusal], None],
    ) -> None:
        """Call ``done`` in the loop when there is memory, or cannot be."""
        before = list(self._leaving)

        def work() -> None:
            made: Memory | Refusal
            wait(before)  # what it was charged for others gave up: they have to be gone
            try:
                made = _memory.make(size, exporter, name, huge_pages)
            except OSError as error:
                what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
                made = Refusal(error.errno or errno.EIO, what or str(error))
            except (ValueError, TypeError) as error:
                made = Refusal(errno.EINVAL, str(error))
            self._later(self._made, made, done)

        self._making.submit(work)

    def _made(self, made: Memory | Refusal, done: Callable[[Memory | Refusal], None]) -> None:
        if isinstance(made, Memory):
            if made.descriptors > self._room:
                self._leave(made.close)
                made = Refusal(
                    errno.ENOSPC,
                    "the store has as many descriptors as it may (ulimit -Hn, or LimitNOFILE=)",
                )
            else:
                self._room -= made.descriptors
        done(made)

    def sweep(self) -> None:
        """Let go of removed memory that nobody else has.

        Whoever keeps much of it costs others at most a tenth of the time: then this does nothing.
        """
        now = time.monotonic()
        self._credit = min(self._credit + (now - self._counted) * _SHARE, _SHARE)
        self._counted = now
        if self._credit > 0:
            for kept in [kept for kept in self._names.removed if not kept.in_use()]:
                self._release(kept, kept.free)
            self._credit -= time.monotonic() - now

    def _release(self, kept: Memory, how: Callable[[], None]) -> None:
        self._names.forget(kept)
        self._room += kept.descriptors
        self._leave(how)

    def _leave(self, how: Callable[[], None]) -> None:
        leaving = self._freeing.submit(how)
        self._leaving.add(leaving)
        leaving.add_done_callback(lambda done: self._later(self._left, done))

    def _left(self, leaving: Future[None]) -> None:
        self._leaving.discard(leaving)
        if (error := leaving.exception()) is not None:
            log.error("dmabuf store: freeing memory: %s", error)

    def end(self) -> None:
        """Wait for what is being made; :meth:`release_all` comes after what that leaves to do."""
        self._making.shutdown()

    def release_all(self) -> None:
        """Let go of everything that was removed; others may still have it, and keep its content."""
        for kept in list(self._names.removed):
            self._release(kept, kept.close)
        self._freeing.shutdown()

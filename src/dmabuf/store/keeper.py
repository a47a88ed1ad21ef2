"""What of the store's memory takes long, in threads: making it, and letting go of it."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from dmabuf.store import memory as _memory
from dmabuf.store.marks import Marks
from dmabuf.store.memory import Memory
from dmabuf.store.names import Names
from dmabuf.store.pins import Pins
from dmabuf.store.protocol import Refusal
from dmabuf.store.threads import Threads

log = logging.getLogger("dmabuf")

_MAKING, _FREEING = 4, 2  # threads
_SHARE = 0.1
"""Of the server's time, for asking whether removed memory is still in use."""
_SLICE = 0.005
"""Seconds at most of looking at what was just removed, before others have their turn."""
_AT_LEAST = 16
"""What is asked when it is needed, however long others took before."""
_LOOK = 0.5
"""Seconds at least between looks at memory that was let go of and that others still refer to."""

T = TypeVar("T")


class Keeper:
    """Makes memory and frees it, for the server's loop, to which all of it but the work belongs.

    Memory counts until it is gone. ``descriptors`` is how many the memory may have in all.

    Raises OSError(EAGAIN) where there may be no threads.
    """

    def __init__(self, names: Names[Memory], descriptors: int, later: Callable[..., None]) -> None:
        self._names, self._room, self._later = names, descriptors, later
        self._making = Threads(_MAKING, "making")
        self._freeing = Threads(_FREEING, "freeing")
        self._marks = Marks(_FREEING)
        self._pins = Pins(later)
        self._new: deque[tuple[int, Memory]] = deque()
        """Just removed, each with the job of letting go of it."""
        self._going_on = False
        self._held: deque[Memory] = deque()
        """Removed, and in use when it was last asked."""
        self._failed: list[Memory] = []
        """Removed, and not to be let go of when that was last tried: there were no marks."""
        self._marked: dict[Memory, tuple[bytes, int]] = {}
        """Let go of, and referred to: its mark, and how many descriptors it had."""
        self._look_is_due, self._looked_at, self._look_took = False, time.monotonic(), 0.0
        self._tried_again_at = self._looked_at
        self._numbers = itertools.count()
        self._jobs: OrderedDict[int, None] = OrderedDict()
        """What is to be let go of, by number: the oldest comes first."""
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        """What is to be called when no job is left that is older than such a number."""
        self._ending = False
        self._credit, self._counted = _SHARE, time.monotonic()
        self._said = ""

    def make(
        self,
        size: int,
        exporter: str,
        name: str | None,
        huge_pages: bool | int,
        done: Callable[[Memory | Refusal], None],
    ) -> None:
        """Call ``done`` in the loop when there is memory, or cannot be."""

        def work() -> None:
            made: Memory | Refusal
            try:
                made = _memory.make(size, exporter, name, huge_pages)
            except OSError as error:
                what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
                made = Refusal(error.errno or errno.EIO, what or str(error))
            except (ValueError, TypeError) as error:
                made = Refusal(errno.EINVAL, str(error))
            self._later(self._made, made, done)

        self._making.do(work)

    def _made(self, made: Memory | Refusal, done: Callable[[Memory | Refusal], None]) -> None:
        if isinstance(made, Memory) and made.descriptors > self._room:
            self.settle(partial(self._fit, made, done))
        else:
            self._fit(made, done)

    def _fit(self, made: Memory | Refusal, done: Callable[[Memory | Refusal], None]) -> None:
        if isinstance(made, Refusal):
            done(made)
        elif made.descriptors <= self._room:
            self._room -= made.descriptors
            done(made)
        else:
            text = "the store has as many descriptors as it may (ulimit -Hn, or LimitNOFILE=)"
            self._free(made.close, lambda _: done(Refusal(errno.ENOSPC, text)))

    def settle(self, then: Callable[[], None]) -> None:
        """Call something in the loop when all that nobody has is gone, and counts no more."""
        self.sweep(at_once=True)
        if self._jobs and not self._ending:
            self._waiting.append((next(self._numbers), then))
        else:
            then()

    def sweep(self, at_once: bool = False) -> None:
        """Have what was removed, and nobody else has, be let go of; it counts until it is gone.

        Whoever keeps much of it costs others at most a tenth of the time: then not all is asked.
        """
        for kept in self._names.just_removed:
            self._new.append((self._job(), kept))
        self._names.just_removed.clear()
        if not self._going_on:
            self._look_at_new()
        self._pins.go_on()
        now = time.monotonic()
        self._credit = min(self._credit + (now - self._counted) * _SHARE, _SHARE)
        self._counted = now
        if at_once or now > self._tried_again_at + _LOOK:
            self._tried_again_at = now
            self._held.extendleft(self._failed)
            self._failed.clear()
        for asked in range(len(self._held)):
            if self._credit <= 0 and asked >= (_AT_LEAST if at_once else 0):
                break
            self._let_go_unless_used(self._job(), self._held.popleft())
            self._credit -= time.monotonic() - now
            now = time.monotonic()
        pause = self._look_took / _SHARE if self._look_took > 0.01 else 0 if at_once else _LOOK
        if self._marked and not self._look_is_due and now >= self._looked_at + pause:
            self._look_is_due, self._looked_at = True, now
            self._free(self._look, self._looked)

    def _look_at_new(self) -> None:
        """At some of them, and soon at the next."""
        end = time.monotonic() + _SLICE
        while self._new and time.monotonic() <= end:
            self._let_go_unless_used(*self._new.popleft())
        self._going_on = bool(self._new)
        if self._going_on:
            self._later(self._look_at_new)

    def _let_go_unless_used(self, job: int, kept: Memory) -> None:
        others = kept.others()
        if others is True or (others is None and not kept.can_be_marked(self._marks)):
            self._held.append(kept)
            self._finish(job)
        elif kept.had_by_strangers:
            self._pins.ask(kept, partial(self._unpinned, job, kept, kept.descriptors))
        else:
            self._free_memory(job, kept)

    def _unpinned(self, job: int, kept: Memory, descriptors: int, nobody: bool) -> None:
        if nobody:
            self._room += descriptors - kept.descriptors
            self._free_memory(job, kept)
        else:
            self._finish(job)

    def _free_memory(self, job: int, kept: Memory) -> None:
        left = partial(self._left, kept, kept.descriptors)
        self._free(partial(self._let_go, kept), left, job)

    def _let_go(self, kept: Memory) -> bytes | None:
        """The mark that is left of it, if one is; None where it is kept, for now. In a thread."""
        try:
            return kept.let_go(self._marks)
        except OSError as error:
            if str(error) != self._said:
                self._said = str(error)
                log.error("dmabuf store: removed memory is kept for now: %s", error)
            return None

    def _left(self, kept: Memory, descriptors: int, mark: bytes | None) -> None:
        if mark is None:
            self._failed.append(kept)
        elif mark:
            self._marked[kept] = mark, descriptors
        else:
            self._gone(kept, descriptors)

    def _gone(self, kept: Memory, descriptors: int) -> None:
        self._names.forget(kept)
        self._room += descriptors

    def _look(self) -> list[Memory]:
        """What nobody refers to any more. In a thread."""
        self._look_is_due = False  # who asks from now on has another look
        marked = self._marked.copy()
        began = time.monotonic()
        left = self._marks.left({mark for mark, _ in marked.values()})
        gone = [kept for kept, (mark, _) in marked.items() if mark not in left]
        self._look_took = time.monotonic() - began
        return gone

    def _looked(self, gone: list[Memory] | None) -> None:
        for kept in gone or ():
            if kept in self._marked:
                self._gone(kept, self._marked.pop(kept)[1])

    def _job(self) -> int:
        job = next(self._numbers)
        self._jobs[job] = None
        return job

    def _free(
        self, work: Callable[[], T], then: Callable[[T | None], None], job: int | None = None
    ) -> None:
        """Do something in a thread, and ``then`` something with what came of it in the loop."""
        number = job if job in self._jobs else self._job()

        def call() -> None:
            result = None
            try:
                result = work()
            except Exception:  # a mistake of ours
                log.exception("dmabuf store: freeing memory")
            self._later(self._freed, number, partial(then, result))

        self._freeing.do(call)

    def _freed(self, job: int, then: Callable[[], None]) -> None:
        then()
        self._finish(job)

    def _finish(self, job: int) -> None:
        self._jobs.pop(job, None)
        while self._waiting and self._waiting[0][0] < next(iter(self._jobs), math.inf):
            self._waiting.popleft()[1]()

    def end(self) -> None:
        """Wait for what is being made; :meth:`release_all` comes after what that leaves to do."""
        self._ending = True
        while self._waiting:
            self._waiting.popleft()[1]()
        self._making.end()

    def release_all(self) -> None:
        """Let go of everything that was removed; others may still have it, and keep its content."""
        self._pins.end()
        self._freeing.end()
        for kept in self._names.removed:
            kept.close()
        self._marks.close()

"""Who keeps the pages of a dma-buf that nobody has open: asked in a thread, the quick ones first.

An O_PATH descriptor (open(2)) keeps a dma-buf and has no part in its references. Of a udmabuf the
memory file behind it tells: F_SEAL_WRITE (fcntl(2)) is EBUSY while anything holds a page of it.
The kernel waits before it says so (mm/memfd.c, memfd_wait_for_pins()): 0.15 s, and 0.1 s more a
GiB, seen on Linux 7.3. It is quick where nothing does: 4 to 23 ms for 256 MiB, in the lab.

So those who keep memory make the question slow. Memory of users who just did so comes after that
of all others, and what is known to be kept comes last. Whoever waits for an answer has one within a
second: that it is kept, for now.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from dmabuf.store.threads import Threads

log = logging.getLogger("dmabuf")

_AT_ONCE = 64
_TOGETHER = 0.01
"""Seconds after which what is asked at once is to end."""
_SLOW = 0.05
"""Seconds; more is as bad as memory that is kept."""
_REMEMBERED = 10.0
"""Seconds for which users come after others."""
_WITHIN = 1.0
"""Seconds within which there is an answer."""
_PAUSE, _SHARE = 0.5, 0.1
"""Seconds at least after a question about kept memory, and how much of the time they may take."""


class Pinned(Protocol):
    """Memory, as far as this module looks at it."""

    @property
    def holders(self) -> Set[int]:
        """The users who had it, and could keep it."""

    def unpinned(self) -> bool:
        """Whether nobody does. Takes long where somebody does."""


@dataclass(eq=False, slots=True)
class _Question:
    memory: Pinned
    users: frozenset[int]
    answer: Callable[[bool], None]
    by: float
    told: bool = False

    def tell(self, free: bool) -> None:
        if free or not self.told:
            self.told = True
            self.answer(free)


class Pins:
    """Asks, in a thread. All else belongs to the server's loop.

    Raises OSError(EAGAIN) where there may be no thread.
    """

    def __init__(self, later: Callable[..., None]) -> None:
        self._later = later
        self._thread = Threads(1, "asking")
        self._asking = False
        self._new: deque[_Question] = deque()
        self._behind: deque[_Question] = deque()
        """Not asked either, and of users who were slow."""
        self._kept: deque[_Question] = deque()
        self._untold: deque[_Question] = deque()
        """All that may have had no answer yet, the oldest first."""
        self._slow: dict[frozenset[int], float] = {}
        """Until when users come after others."""
        self._not_before = 0.0

    def ask(self, memory: Pinned, answer: Callable[[bool], None]) -> None:
        """Call ``answer`` with True when nobody keeps the memory.

        And once with False before, where that is not so, or not found out within a second.
        """
        by = time.monotonic() + _WITHIN
        question = _Question(memory, frozenset(memory.holders), answer, by)
        self._new.append(question)
        self._untold.append(question)
        self.go_on()

    def go_on(self) -> None:
        """Ask what is next, and tell those who waited for long enough."""
        now = time.monotonic()
        while self._untold and (self._untold[0].told or now >= self._untold[0].by):
            self._untold.popleft().tell(False)
        if self._asking:
            return
        while self._new and now < self._slow.get(self._new[0].users, 0.0):
            self._behind.append(self._new.popleft())
        queue = self._new or self._behind
        if not queue and now >= self._not_before:
            queue = self._kept
        if queue:
            self._asking = True
            some = [queue.popleft() for _ in range(min(len(queue), _AT_ONCE))]
            self._thread.do(partial(self._ask, queue, some))

    def _ask(self, queue: deque[_Question], some: list[_Question]) -> None:
        """Those of some that do not take long."""
        began, free, took = time.monotonic(), True, 0.0
        asked: list[tuple[_Question, bool, float]] = []
        for question in some:
            before = time.monotonic()
            try:
                free = question.memory.unpinned()
            except Exception:  # a mistake of ours
                log.exception("dmabuf store: asking about memory")
                free = False
            took = time.monotonic() - before
            asked.append((question, free, took))
            if not free or before + took - began > _TOGETHER:
                break
        self._later(self._asked, queue, some[len(asked) :], asked)

    def _asked(
        self,
        queue: deque[_Question],
        rest: list[_Question],
        asked: list[tuple[_Question, bool, float]],
    ) -> None:
        self._asking = False
        queue.extendleft(reversed(rest))
        now = time.monotonic()
        for question, free, took in asked:
            if not free or took > _SLOW:
                self._slow[question.users] = now + _REMEMBERED
            if not free:
                self._kept.append(question)
                self._not_before = now + max(_PAUSE, took / _SHARE)
            question.tell(free)
        if not (self._new or self._behind):
            self._slow = {users: until for users, until in self._slow.items() if now < until}
        self.go_on()

    def end(self) -> None:
        """Wait for what is being asked."""
        self._thread.end()

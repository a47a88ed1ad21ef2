"""Who keeps the pages of a dma-buf that nobody has open: asked one at a time, in fair turns.

An O_PATH descriptor (open(2)) keeps a dma-buf and has no part in its references. Of a udmabuf the
memory file behind it tells: F_SEAL_WRITE (fcntl(2)) is EBUSY while anything holds a page of it.
The kernel waits 0.15 s before it says so (mm/memfd.c, memfd_wait_for_pins()), and is quick where
nothing does: 4 to 23 ms for 256 MiB, seen in the lab on Linux 6.12 and 7.3.

So those who keep memory make the question slow. They are to wait for it themselves: each set of
users who could be it has a turn after the other, and a pause after memory that is kept.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from dmabuf.store.threads import Threads

log = logging.getLogger("dmabuf")

_PAUSE = 0.5  # seconds


class Pinned(Protocol):
    """Memory, as far as this module looks at it."""

    @property
    def strangers(self) -> frozenset[int]:
        """The users who could keep it."""

    def unpinned(self) -> bool:
        """Whether nobody does. Takes long where somebody does."""


class _Turn:
    """What the same users could keep."""

    def __init__(self) -> None:
        self.waiting: deque[Pinned] = deque()
        """The last one is asked next."""
        self.answers: dict[Pinned, Callable[[bool], None]] = {}
        self.untold: set[Pinned] = set()
        """Those that had no answer yet."""
        self.not_before = 0.0


class Pins:
    """Asks, in a thread. All else belongs to the server's loop.

    Raises OSError(EAGAIN) where there may be no thread.
    """

    def __init__(self, later: Callable[..., None]) -> None:
        self._later = later
        self._thread = Threads(1, "asking")
        self._asking = False
        self._turns: dict[frozenset[int], _Turn] = {}
        """By who could keep it. The first is next, if its pause is over."""

    def ask(self, memory: Pinned, answer: Callable[[bool], None]) -> None:
        """Call ``answer`` with True when nobody keeps the memory.

        And once with False before, where that is not so yet or would take long to find out.
        """
        turn = self._turns.setdefault(memory.strangers, _Turn())
        turn.waiting.append(memory)
        turn.answers[memory] = answer
        if time.monotonic() < turn.not_before:
            answer(False)
        else:
            turn.untold.add(memory)
        self.go_on()

    def go_on(self) -> None:
        """Ask about the next, if it is time for one."""
        if self._asking:
            return
        now = time.monotonic()
        for users, turn in self._turns.items():
            if now >= turn.not_before:
                del self._turns[users]
                self._turns[users] = turn
                self._asking = True
                self._thread.do(partial(self._ask, turn, turn.waiting.pop()))
                return

    def _ask(self, turn: _Turn, memory: Pinned) -> None:
        free = False
        try:
            free = memory.unpinned()
        except Exception:  # a mistake of ours
            log.exception("dmabuf store: asking about memory")
        self._later(self._asked, turn, memory, free)

    def _asked(self, turn: _Turn, memory: Pinned, free: bool) -> None:
        self._asking = False
        if free:
            turn.untold.discard(memory)
            turn.answers.pop(memory)(True)
        else:
            turn.waiting.appendleft(memory)
            turn.not_before = time.monotonic() + _PAUSE
            untold, turn.untold = turn.untold, set()
            for one in untold:
                turn.answers[one](False)
        if not turn.waiting:
            del self._turns[memory.strangers]
        self.go_on()

    def end(self) -> None:
        """Wait for what is being asked."""
        self._thread.end()

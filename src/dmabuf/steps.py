"""What a transfer waits for, so that one that is planned and judged in one place can wait anywhere.

`transfer` writes a transfer down as a generator that yields these, and an engine's Job, and is sent
what came of each. `File` does each step on the spot; `aio` awaits it in its event loop.
"""

from __future__ import annotations

import errno
import select
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple, TypeVar, cast

from dmabuf import fence
from dmabuf.engine import Engine, Job, Outcome, this_thread
from dmabuf.errors import os_error

T = TypeVar("T")


_SLICE = 0.1
"""Seconds of one wait: a signal that comes just before it, and `stopping`, end it no later."""


class Stopping(threading.local):
    """How a thread that makes transfers for somebody else learns that it is to stop."""

    check: Callable[[], object] | None = None
    """Called ten times a second while it waits for a peer; what it raises ends the wait."""


stopping = Stopping()


class Fences(NamedTuple):
    """Until devices let dma-bufs be read or written."""

    fds: Sequence[int]
    access: fence.Access
    timeout: float | None
    spent: float
    path: str

    def here(self) -> None:
        """Wait; raises TimeoutError."""
        fence.wait(self.fds, self.access, self.timeout, spent=self.spent, path=self.path)


class Ready(NamedTuple):
    """Until a stream can be read or written; `deadline` is by time.monotonic, None for never."""

    fd: int
    access: Literal["read", "write"]
    deadline: float | None
    path: str

    @property
    def left(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def here(self) -> None:
        """Wait; raises TimeoutError."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN if self.access == "read" else select.POLLOUT)
        while True:
            if stopping.check is not None:
                stopping.check()
            left = self.left
            if poll.poll(1000 * (_SLICE if left is None else min(left, _SLICE))):
                return
            if self.deadline is not None and not self.left:
                raise self.late()

    def late(self) -> OSError:
        """The TimeoutError."""
        text = "the peer did nothing in time: give timeout= more, or look at what it waits for"
        return os_error(errno.ETIMEDOUT, text, self.path)


class Blocking(NamedTuple):
    """A system call that may take long and cannot be waited for by poll."""

    call: Callable[[], object]

    def here(self) -> None:
        """Make it."""
        self.call()


Step = Fences | Ready | Blocking
Steps = Generator[Job | Step, Outcome | None, T]
"""A transfer as it waits: for jobs, which are answered with their outcome, and for other steps."""


def here(steps: Steps[T], engine: Engine | None = None) -> T:
    """Do each step on the spot; what it raises is raised where the transfer waits for it."""
    nested, this_thread.in_transfer = this_thread.in_transfer, True
    try:
        step = next(steps)
        while True:
            try:
                outcome = _do(step, engine, nested)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(outcome)
    except StopIteration as stop:
        return cast(T, stop.value)
    finally:
        this_thread.in_transfer = nested


def _do(step: Job | Step, engine: Engine | None, nested: bool) -> Outcome | None:
    if isinstance(step, Job):
        assert engine is not None
        return engine.run(step, nested=nested)
    step.here()
    return None

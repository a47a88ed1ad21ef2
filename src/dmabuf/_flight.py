"""What is under way in an event loop and may not be left before it has landed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dmabuf._ffi import lib
from dmabuf._waits import Wake


class Flight:
    """Something under way that may not be left before it has landed."""

    __slots__ = ("closed", "keep", "landed", "owner", "wake")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.landed = False
        self.closed = False  # it was stopped, since its File or engine closes
        self.keep: Any = None  # memory that the core reads meanwhile
        self.wake: Wake | None = None  # made when the task waits

    def stop(self) -> None:
        """Have it land soon."""

    def drain(self) -> None:
        """Return when it has landed; blocks."""
        raise NotImplementedError


class BatchFlight(Flight):
    """A batch of the core."""

    __slots__ = ("batch",)

    batch: Any

    def stop(self) -> None:
        """Cancel what can be cancelled."""
        lib.dmb_batch_stop(self.batch)

    def drain(self) -> None:
        """In one call of the core."""
        lib.dmb_batch_drain(self.batch)
        self.landed = True


class CallFlight(Flight):
    """A call in a thread, which goes on to its end unless there is a `stop` to tell it."""

    __slots__ = ("_over", "_stop", "error")

    def __init__(self, owner: object, stop: Callable[[], object] | None) -> None:
        super().__init__(owner)
        self._stop = stop
        self.error: BaseException | None = None
        self._over = threading.Event()

    def run(self, call: Callable[[], object]) -> None:
        """In the thread."""
        try:
            call()
        except BaseException as error:
            self.error = error
        finally:
            self._over.set()

    def stop(self) -> None:
        """Tell it."""
        if self._stop is not None:
            self._stop()

    def drain(self) -> None:
        """Wait for the thread."""
        self.stop()
        self._over.wait()
        self.landed = True

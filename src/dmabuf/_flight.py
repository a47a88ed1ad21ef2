"""What is under way in an event loop and may not be left before it has landed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dmabuf._ffi import lib


class Flight:
    """Something under way that may not be left before it has landed."""

    tag = 0
    """Its number in its engine."""
    landed = False
    closed = False
    """It was stopped, since its File or engine closes."""
    nbytes = 0
    keep: Any = None
    """What is to outlive it."""
    trouble: OSError | None = None
    """Why its ring could not be driven."""
    wake: Any = None
    """Made when its task waits."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def stop(self) -> None:
        """Have it land soon."""

    def drain(self) -> None:
        """Return when it has landed; blocks."""
        raise NotImplementedError


class BatchFlight(Flight):
    """A batch of the core."""

    batch: Any = None

    def stop(self) -> None:
        """Cancel what can be cancelled."""
        if self.batch is not None:
            lib.dmb_batch_stop(self.batch)

    def drain(self) -> None:
        """In one call of the core."""
        if self.batch is not None:
            lib.dmb_batch_drain(self.batch)
        self.landed = True


class LoneFlight(Flight):
    """A lone request that does not just land: the core, which owns it, knows it by its tag."""

    def __init__(self, tag: int, ring: Any, wake: Any) -> None:
        super().__init__(None)
        self.tag, self.wake = tag, wake
        self._ring = ring

    def stop(self) -> None:
        """Cancel it if it can be; one that the core does not have, no device has."""
        if not lib.dmb_ring_stop_lone(self._ring.handle, self.tag):
            self.landed = True

    def drain(self) -> None:
        """In one call of the core."""
        lib.dmb_ring_drain_lone(self._ring.handle, self.tag)
        self.landed = True


class CallFlight(Flight):
    """A call in a thread, which goes on to its end unless there is a `stop` to tell it."""

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

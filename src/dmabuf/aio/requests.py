"""Requests: what coroutines wait for, and may not leave before it is complete."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dmabuf._core import ffi, lib
from dmabuf.aio.backend import Wakeup
from dmabuf.transfer import Job


class Request:
    """Something in flight in an event loop; it is waited for until it is complete."""

    owner: object
    """The waiter of its File."""
    tag = 0
    """Its number in its engine."""
    complete = False
    closed = False
    """Whether it was cancelled because its File or its engine was closed."""
    failure: OSError | None = None
    """Why its ring cannot be driven."""
    nbytes = 0
    """Bytes that it has moved, without a gap."""
    wakeup: Wakeup | None = None
    """What its task waits for, if it waits."""

    def cancel(self) -> None:
        """Make it complete soon."""

    def drain(self) -> None:
        """Return when it is complete; blocks the thread."""
        raise NotImplementedError

    def wake(self) -> None:
        """Wake its task, which looks whether it is complete."""
        if self.wakeup is not None and not self.wakeup.done():
            self.wakeup.set_result(None)

    def finish(self) -> None:
        """Mark it as complete and wake its task."""
        self.complete = True
        self.wake()


class Batch(Request):
    """A job on its way through a ring, as a batch of the core."""

    def __init__(self, owner: object, job: Job | None = None) -> None:
        self.owner = owner
        self.core: Any = ffi.new("struct dmb_batch **")
        self._job = job  # the core reads its segments and slots until the batch is destroyed

    def cancel(self) -> None:
        """Cancel what can be cancelled, and submit nothing more."""
        if self.core[0]:
            lib.dmb_batch_stop(self.core[0])
        else:  # an interrupt came before it was started
            self.finish()

    def drain(self) -> None:
        """Wait in one call of the core."""
        if self.core[0]:
            lib.dmb_batch_drain(self.core[0])
        self.complete = True


class Readiness(Request):
    """A descriptor that is waited for. No device has memory on its behalf."""

    ready = False

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def report(self, ready: bool) -> None:
        """Complete it: the descriptor is ready, or the time is up."""
        self.ready = ready
        self.finish()

    def cancel(self) -> None:
        """Complete it at once."""
        self.finish()

    def drain(self) -> None:
        """Complete it at once."""
        self.complete = True


class Call(Request):
    """A call in a thread, which runs to its end unless `cancel` can tell it to stop."""

    def __init__(
        self,
        owner: object,
        function: Callable[[], Any],
        cancel: Callable[[], object] | None,
    ) -> None:
        self.owner = owner
        self.result: Any = None
        self.error: BaseException | None = None
        self._function, self._cancel = function, cancel
        self._turn = [self]  # taken out by the thread that makes the call, or by `abandon`
        self._over = threading.Event()

    def run(self) -> None:
        """Make the call, in the thread, unless it was abandoned."""
        try:
            self._turn.pop()
        except IndexError:
            return
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error
        finally:
            self._over.set()

    def abandon(self) -> None:
        """Return when no thread makes the call, and none will; at once if it is complete."""
        try:
            self._turn.pop()
        except IndexError:  # a thread has begun it
            self.drain()

    def cancel(self) -> None:
        """Tell the call to stop."""
        if self._cancel is not None:
            self._cancel()

    def drain(self) -> None:
        """Wait for the thread."""
        self.cancel()
        self._over.wait()
        self.complete = True

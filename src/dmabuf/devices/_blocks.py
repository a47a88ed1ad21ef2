"""Pinned blocks of host memory that a device copies from and to, and that outlive its copies.

What is promised: no block is freed while a copy may still read or write it. `Blocks.settle` returns
once none can, whatever signals come meanwhile. Should exceptions come so fast that one gets past
it, the blocks outlive that: they are held in `_flying` until the device is known to be done. Where
the device cannot tell any more (it is lost), they are held for as long as the process lives.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol

from dmabuf import _process, exporters
from dmabuf.buffer import Buffer
from dmabuf.errors import BusyError, ClosedError, os_error
from dmabuf.pipeline import check_block, check_blocks
from dmabuf.sizes import format_size

log = logging.getLogger("dmabuf")

_PATIENCE = 5.0
"""Seconds after which a wait says what it waits for."""
_SHORTEST, _LONGEST = 20e-6, 1e-3
"""Seconds between two questions whether a copy has ended."""
_LOST = 3
"""Times in a row that a device fails to tell whether it is idle, to count as lost."""


class Copier(Protocol):
    """A device's own asynchronous copies between host memory and its memory.

    One `Staging` uses it, one thread at a time, though not always the same one. No method waits for
    a copy. What the runtime refuses is an OSError.
    """

    name: str
    """What the device is called in errors, such as "cuda:0"."""

    def pin(self, address: int, size: int) -> None:
        """Make ``size`` bytes of host memory at ``address`` good for asynchronous copies."""

    def unpin(self, address: int) -> None:
        """Take that back; nothing happens where the address was not pinned."""

    def to_device(self, device: int, host: int, size: int) -> object:
        """Begin to copy to the device, after every copy begun before; what `finished` takes.

        ``host`` is an address that was pinned, with no other copy under way.
        """

    def to_host(self, host: int, device: int, size: int) -> object:
        """Begin to copy from the device, likewise."""

    def finished(self, copy: Any) -> bool:
        """Whether a copy has ended well; an OSError where it failed, each time."""

    def idle(self) -> bool:
        """Whether no copy that was ever begun, one whose call failed included, may touch host
        memory any more, however each ended. An OSError where nobody can know."""

    def close(self) -> None:
        """Give back what it holds; no copy is under way."""


class Blocks:
    """A pool of pinned blocks, for one transfer at a time: that holds `lock`.

    After fork the child's copy raises ClosedError, as device runtimes do not survive a fork.
    """

    def __init__(self, copier: Copier, block_size: int | str, count: int) -> None:
        self.copier = copier
        self.lock = Lock()
        self.pool: list[Buffer] = []
        self.closed = False
        self._pid = _process.pid
        self._lost: BaseException | None = None
        try:
            self.size, count = check_block(block_size), check_blocks(count)
            while len(self.pool) < count:
                memory = exporters.allocate(self.size, exporter="memfd", name="dmabuf staging")
                self.pool.append(memory)
                copier.pin(address_of(memory), self.size)
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Copies may be under way from now on, until `settle`."""
        _flying.add(self)

    def settle(self) -> None:
        """Return when no copy is under way; what a signal raises meanwhile is raised then."""
        raised: BaseException | None = None
        failures = 0

        def idle() -> bool:
            nonlocal failures
            answer = self.copier.idle()
            failures = 0  # it can tell: what was raised was a signal's
            return answer

        while self in _flying and self._lost is None:
            try:
                wait_until(idle, f"{self.copier.name}: to end its copies")
                _flying.discard(self)
            except BaseException as error:
                raised = error
                failures += isinstance(error, Exception)
                if failures == _LOST:  # whatever led here has its own error
                    self._lost, raised = error, None
                    self._tell_lost()
        if raised is not None:
            raise raised

    def _tell_lost(self) -> None:
        log.error(
            "%s cannot tell whether its copies have ended (%s): %s of staging memory stays "
            "allocated while this process lives",
            self.copier.name,
            self._lost,
            format_size(sum(block.size for block in self.pool)),
        )

    def check_open(self) -> None:
        """Raise ClosedError after close, and in a fork's child."""
        if self.closed:
            raise ClosedError("the staging blocks are closed")
        if self._pid != _process.pid:
            text = f"they belong to process {self._pid}, which forked: make others in the child"
            raise ClosedError(f"the staging blocks cannot be used: {text}")

    def check_usable(self) -> None:
        """Raise what keeps a transfer from beginning; for the holder of `lock`."""
        self.check_open()
        self.settle()  # of a transfer that was left in spite of all
        if self._lost is not None:
            text = f"{self.copier.name} was lost ({self._lost}): begin anew in another process"
            raise os_error(errno.ENODEV, text)

    def close(self) -> None:
        """Unpin and free the blocks, and close the copier; again and again does nothing.

        Raises:
            BusyError: a transfer is running; nothing has changed.
            OSError: what the device refused; blocks that it would not unpin stay allocated.
        """
        if self.closed:
            return
        if self._pid != _process.pid:  # the device is the parent's, the mappings are ours
            while self.pool:
                self.pool.pop().close()
            self.closed = True
            return
        if not self.lock.acquire(blocking=False):
            raise BusyError("the staging blocks cannot be closed: a transfer is running")
        try:
            self.settle()
            failure = self._free() if self._lost is None else None
            self.closed = True
        finally:
            self.lock.release()
        if failure is not None:
            raise failure

    def _free(self) -> OSError | None:
        failure: OSError | None = None
        while self.pool:
            block = self.pool[-1]
            try:
                self.copier.unpin(address_of(block))
            except OSError as error:
                failure = failure or error
                _kept.append(block)
            else:
                block.close()
            self.pool.pop()
        self.copier.close()
        return failure


_flying: set[Blocks] = set()
"""Those with copies under way, which keeps them whatever else is dropped."""
os.register_at_fork(after_in_child=_flying.clear)
_kept: list[Buffer] = []
"""Blocks that the device would not unpin."""


def address_of(block: Buffer) -> int:
    """Where it is mapped."""
    address = block._address
    assert address is not None
    return address


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Ask until it is so; says what it waits for after 5 s. A signal's exception ends the wait."""
    pause, late = _SHORTEST, time.monotonic() + _PATIENCE
    while not done():
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
        if time.monotonic() >= late:
            log.warning("waiting for %s", what)
            late = float("inf")

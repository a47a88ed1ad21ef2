"""The pipeline between a File and memory that only its device can reach: staged, by copies.

Where neither the disk nor the CPU reaches a device's memory, the bytes pass through pinned blocks
of host memory: the disk fills one block while the device copies from the blocks before it, or
takes one while the device fills the blocks after it. `Staging` is that pipeline for any vendor; a
`Copier` makes the calls of a vendor's runtime. `dmabuf.devices.gpu` has the one for GPUs.

No call returns, and no block is freed, while a copy may access a block or the device's memory.
After an error or an interrupt no new copy begins, and the exception is raised once the copies in
flight have ended. Where the device cannot report that (it is lost), the blocks stay allocated
until the process ends.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Protocol

from dmabuf.copying import check_block_count, check_block_size
from dmabuf.devices import lifetime
from dmabuf.errors import BusyError, RouteUnavailable, ShortReadError, os_error
from dmabuf.memory import Buffer, allocate
from dmabuf.sizes import as_int, format_size, parse_size
from dmabuf.transfer import Direction, File, Plan, Require, Route, Terms, Transfer

__all__ = ["Copier", "Staging"]

log = logging.getLogger("dmabuf")

_PAGE = 4096
_PATIENCE = 5.0  # seconds of a wait until it is logged
_SHORTEST, _LONGEST = 20e-6, 1e-3  # seconds between two questions whether a copy has ended
_LOST = 3  # failures in a row to report whether it is idle, after which a device counts as lost
_REASONS = {
    ("read", Route.STAGED): "the disk fills pinned blocks, the device copies from them meanwhile",
    ("write", Route.STAGED): "the device copies to pinned blocks, the disk takes them meanwhile",
    ("read", Route.BUFFERED): "the page cache fills pinned blocks, the device copies from them",
    ("write", Route.BUFFERED): "the device copies to pinned blocks, the page cache takes them",
}
_NO_NATIVE = "a bare address is not a dma-buf"
_NO_DIRECT = "device memory has no host pages that O_DIRECT could pin"


class Copier(Protocol):
    """A device's own asynchronous copies between host memory and its memory.

    One `Staging` uses it, from one thread at a time, though not always the same one. No method
    waits for a copy. A refusal of the runtime is an OSError.
    """

    name: str
    """The name of the device in errors, such as "cuda:0"."""

    def pin(self, address: int, size: int) -> None:
        """Pin ``size`` bytes of host memory at ``address`` for asynchronous copies."""

    def unpin(self, address: int) -> None:
        """Unpin host memory; do nothing where the address is not pinned."""

    def to_device(self, device: int, host: int, size: int) -> object:
        """Begin a copy to the device, after every earlier copy; return it for `finished`.

        ``host`` lies in a pinned block, which no other copy uses.
        """

    def to_host(self, host: int, device: int, size: int) -> object:
        """Begin a copy from the device, after every earlier copy; return it for `finished`."""

    def finished(self, copy: object) -> bool:
        """Return whether a copy has ended well; raise OSError each time if it failed."""

    def idle(self) -> bool:
        """Return whether no copy can access host memory any more, however each of them ended.

        Copies whose call failed count too. Raise OSError where the device cannot report it.
        """

    def close(self) -> None:
        """Release the runtime's resources; no copy is in flight."""


class Staging(lifetime.DeviceHandle):
    """Pinned staging blocks, and the pipeline through them between a File and device memory.

    Thread-safe: the transfers of one Staging run one after the other. After a fork the child's
    copy raises ClosedError, as device runtimes do not survive a fork.
    """

    def __init__(self, copier: Copier, *, block_size: int | str = "8MiB", blocks: int = 4) -> None:
        """Allocate and pin the blocks. The Staging owns ``copier``, and closes it.

        Args:
            copier: the device's copies.
            block_size: bytes of one block, a multiple of 4096 from 4 KiB to 1 GiB.
            blocks: the number of blocks, from 1 to 1024; with 1 nothing overlaps.

        Raises:
            OSError: there is not enough memory, or the device refuses to pin it.
            ValueError: an invalid size or number.
        """
        self._copier = copier
        self._lock = threading.Lock()
        self._pool: list[Buffer] = []
        self._lost: BaseException | None = None
        try:
            self._block, blocks = check_blocks(block_size, blocks)
            while len(self._pool) < blocks:
                block = allocate(self._block, exporter="memfd", name="dmabuf staging")
                self._pool.append(block)
                copier.pin(_address(block), self._block)
        except BaseException:
            self._free()
            raise
        self._opened()

    def __repr__(self) -> str:
        size = format_size(sum(block.size for block in self._pool))
        state = "closed" if self._closed else f"{size} of {self._copier.name}"
        return f"<dmabuf.devices.staging.Staging {state}>"

    # -- transfers

    def read_into(
        self,
        file: File,
        address: int,
        size: int | str,
        *,
        file_offset: int | str = 0,
        require: Require = "any",
        route: Route | str | None = None,
        no_native: str = _NO_NATIVE,
    ) -> Transfer:
        """Read from a file into the device's memory.

        Args:
            file: the source.
            address: the first byte in the device's memory.
            size: bytes.
            file_offset: where to begin in the file, in bytes; 0 for a stream.
            require: "uncached" wants the file's side past the page cache, "any" accepts all;
                "zero-copy" is refused.
            route: "staged" or "buffered": the only route to accept.
            no_native: why the native route was passed over, for the record.

        Returns:
            The record. `copied` counts the bytes that the CPU touched, which does not include the
            device's copies. `nbytes` is less than `size` where the file ends earlier.

        Raises:
            OSError: the kernel or the device failed; `nbytes` of the error is what has arrived in
                the device's memory without a gap.
            RouteUnavailable: no permitted route is possible; nothing was changed.
            ShortReadError: the file shrank during the transfer.
            ClosedError: the Staging or the file is closed.
        """
        job = _Job(self._pool, file, "read", size, file_offset, require, route, no_native)
        with self._lock:
            self._check_usable()
            job.plan()
            job.done = self._guarded(partial(self._to_device, job, as_int(address, "address")))
        return job.record()

    def write_from(
        self,
        file: File,
        address: int,
        size: int | str,
        *,
        file_offset: int | str = 0,
        require: Require = "any",
        route: Route | str | None = None,
        sync: bool = False,
        no_native: str = _NO_NATIVE,
    ) -> Transfer:
        """Write from the device's memory to a file.

        Args:
            file: the target.
            address: the first byte in the device's memory.
            size: bytes.
            file_offset: where to begin in the file, in bytes; 0 for a stream.
            require: as for `read_into`.
            route: as for `read_into`.
            sync: return when the bytes are on the medium.
            no_native: as for `read_into`.

        Raises:
            OSError: the kernel or the device failed; `nbytes` of the error is what was written
                to the file without a gap.
            RouteUnavailable, ClosedError: as `read_into`.
        """
        job = _Job(self._pool, file, "write", size, file_offset, require, route, no_native)
        with self._lock:
            self._check_usable()
            job.plan()
            begin = as_int(address, "address")
            job.done = self._guarded(partial(self._to_host, job, begin, sync))
        return job.record()

    def _to_device(self, job: _Job, address: int) -> int:
        """Fill blocks from the file, and copy each to the device; return the bytes."""
        copies: deque[tuple[object, int]] = deque()
        done = 0
        try:
            begun = 0
            for number, (at, size) in enumerate(job.pieces()):
                if len(copies) == len(self._pool):
                    done += self._wait_for_oldest(copies)
                block, failure = self._pool[number % len(self._pool)], None
                try:
                    got = job.move(block, at, size)
                except BaseException as error:
                    got, failure = getattr(error, "nbytes", 0), error
                if got:
                    host, device = _address(block) + at, address + begun
                    copies.append((self._copier.to_device(device, host, got), got))
                    begun += got
                if failure is not None:
                    while copies:
                        done += self._wait_for_oldest(copies)
                    raise failure
                if got < size:
                    break
            while copies:
                done += self._wait_for_oldest(copies)
            job.check_end()
        except BaseException as error:
            self._wait_for_copies()
            with suppress(OSError):
                while copies and self._copier.finished(copies[0][0]):
                    done += copies.popleft()[1]
            error.nbytes = done  # type: ignore[attr-defined]
            raise
        return done

    def _to_host(self, job: _Job, address: int, sync: bool) -> int:
        """Fill blocks from the device, and write each to the file; return the bytes."""
        copies: deque[tuple[object, int, int, Buffer]] = deque()
        free, pieces = deque(self._pool), job.pieces()
        begun = done = 0
        try:
            while True:
                while free and (piece := next(pieces, None)) is not None:
                    (at, size), block = piece, free.popleft()
                    host = _address(block) + at
                    copy = self._copier.to_host(host, address + begun, size)
                    copies.append((copy, at, size, block))
                    begun += size
                if not copies:
                    return done
                self._await(copies[0][0])
                _, at, size, block = copies.popleft()
                job.move(block, at, size, sync=sync and begun == job.size and not copies)
                done += size
                free.append(block)
        except BaseException as error:
            error.nbytes = done + getattr(error, "nbytes", 0)  # type: ignore[attr-defined]
            raise

    def _wait_for_oldest(self, copies: deque[tuple[object, int]]) -> int:
        """Wait for the oldest copy, and return its bytes."""
        self._await(copies[0][0])
        return copies.popleft()[1]

    def _await(self, copy: object) -> None:
        wait_until(partial(self._copier.finished, copy), f"{self._copier.name}: to end a copy")

    # -- what is in flight

    def _guarded(self, move: Callable[[], int]) -> int:
        """Run a transfer; however it ends, return once no copy is in flight."""
        try:
            try:
                _in_flight.add(self)
                return move()
            finally:
                self._wait_for_copies()
        finally:
            self._wait_for_copies()  # an interrupt may have ended the first before it began

    def _wait_for_copies(self) -> None:
        """Return when no copy is in flight; raise the last interrupt that arrived meanwhile."""
        raised: BaseException | None = None
        failures = 0

        def idle() -> bool:
            nonlocal failures
            answer = self._copier.idle()
            failures = 0  # the device answers: an exception came from a signal
            return answer

        while self in _in_flight and self._lost is None:
            try:
                wait_until(idle, f"{self._copier.name}: to end its copies")
                _in_flight.discard(self)
            except BaseException as error:
                raised = error
                failures += isinstance(error, Exception)
                if failures == _LOST:  # the error that led here is raised instead
                    self._lost, raised = error, None
                    size = format_size(sum(block.size for block in self._pool))
                    text = "%s cannot report whether its copies have ended (%s): "
                    text += "%s of staging memory stays allocated until the process ends"
                    log.error(text, self._copier.name, error, size)
        if raised is not None:
            raise raised

    def _check_usable(self) -> None:
        self.check_open()
        self._wait_for_copies()  # for a transfer that several interrupts ended too early
        if self._lost is not None:
            text = f"use {self._copier.name}: the device was lost ({self._lost}); restart"
            raise os_error(errno.ENODEV, text)

    # -- the end

    def close(self) -> None:
        """Unpin and free the blocks, and close the copier. Closing again does nothing.

        Raises:
            BusyError: a transfer is running; nothing has changed.
            OSError: the device refuses; blocks that it does not unpin stay allocated.
        """
        if self._closed:
            return
        if self.forked:  # the device belongs to the parent, the mappings to this process
            self._closed = True
            while self._pool:
                self._pool.pop().close()
            return
        if not self._lock.acquire(blocking=False):
            raise BusyError(f"close {self!r}: a transfer is running; close it after that")
        try:
            self._wait_for_copies()
            self._closed = True
            if self._lost is None:
                self._free()
        finally:
            self._lock.release()

    def _free(self) -> None:
        failure: OSError | None = None
        while self._pool:
            block = self._pool[-1]
            try:
                self._copier.unpin(_address(block))
            except OSError as error:
                failure = failure or error
                _kept.append(block)
            else:
                block.close()
            self._pool.pop()
        self._copier.close()
        if failure is not None:
            raise failure


class _Job:
    """The file's side of one transfer: its pieces, its route and its record."""

    def __init__(
        self,
        pool: list[Buffer],
        file: File,
        direction: Direction,
        size: int | str,
        file_offset: int | str,
        require: Require,
        route: Route | str | None,
        no_native: str,
    ) -> None:
        self._started = time.perf_counter()
        if not isinstance(file, File):
            raise TypeError(f"a dmabuf.File is needed, not {type(file).__name__}: see dmabuf.open")
        Terms(require, route)
        self._pool, self._file, self._direction = pool, file, direction
        self.size, self._offset = parse_size(size), parse_size(file_offset, "file_offset")
        self._end = file.size  # None for a stream
        if direction == "read" and self._end and self._end > self._offset:
            self.size = min(self.size, self._end - self._offset)
        self._asked = f"require={require!r}" if route is None else f"route={str(route)!r}"
        self._zero_copy = require == "zero-copy" or route in (Route.NATIVE, Route.DIRECT)
        uncached = require == "uncached" or route == Route.STAGED
        self._require: Require = "uncached" if uncached else "any"
        self._route = Route.BUFFERED if route == Route.BUFFERED else None
        self._rejected = {Route.NATIVE: no_native, Route.DIRECT: _NO_DIRECT}
        self._told = {} if route is not None else self._rejected  # a forced route has no others
        self._disk: Plan | None = None
        self._last: Transfer | None = None
        self._moved = self._requests = self._reissues = self._copied = self._cached = 0
        self.done = 0

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the offset in a block, and the size, of each piece.

        The first piece lies in its block as in a page of the file, so that both are aligned alike;
        the others begin at a page. A last piece of less than two pages takes a part of the piece
        before it, as it might hold no whole block of the file.
        """
        block, left = self._pool[0].size, self.size
        at = self._offset % _PAGE
        while left:
            size = min(left, block - at)
            if size < left < size + 2 * _PAGE and block > 4 * _PAGE:
                size -= block // 2 // _PAGE * _PAGE
            yield at, size
            left, at = left - size, 0

    def plan(self) -> None:
        """Choose the route, and raise RouteUnavailable unless each kind of piece has one."""
        path = str(self._file.name)
        if self._zero_copy:
            why = "; ".join(f"{route}: {text}" for route, text in self._rejected.items())
            raise RouteUnavailable(f"no route for {self._asked}: {why}", path)
        pieces = list(self.pieces()) or [(0, 0)]
        kinds = {0: pieces[0], self.size - pieces[-1][1]: pieces[-1]}
        if len(pieces) > 2:
            kinds[pieces[0][1]] = pieces[1]
        for begin, (at, size) in kinds.items():
            plan = self._file.plan(
                self._pool[0],
                self._direction,
                size=size,
                file_offset=self._place(begin),
                buffer_offset=at,
                require=self._require,
                route=self._route,
            )
            self._disk = self._disk or plan
        device = self._file.kind in ("block device", "NVMe character device")
        end = self._offset + self.size
        if self._direction == "write" and device and self._end is not None and end > self._end:
            text = f"write {self.size} bytes at {self._offset}: the device ends at {self._end}"
            raise os_error(errno.ENOSPC, text, path)

    def _place(self, begin: int) -> int | None:
        """Return the file offset of a piece, None for a stream."""
        return (self._offset or None) if self._end is None else self._offset + begin

    def move(self, block: Buffer, at: int, size: int, *, sync: bool = False) -> int:
        """Move the next piece between the file and a block, and return its bytes."""
        file, place = self._file, self._place(self._moved)
        transfer: Callable[..., Transfer] = file.read_into
        if self._direction == "write":
            transfer = partial(file.write_from, sync=sync)
        how = {"require": self._require, "route": self._route}
        record = transfer(block, size, file_offset=place, buffer_offset=at, **how)
        self._last = record
        self._moved += record.nbytes
        self._requests += record.requests
        self._reissues += record.reissues
        self._copied += record.copied
        self._cached += record.nbytes * (record.route is Route.BUFFERED)
        return record.nbytes

    def check_end(self) -> None:
        """Raise ShortReadError if the file ended early because it shrank."""
        end = self._file.size
        if self._moved < self.size and self._end and end is not None and end < self._end:
            text = f"{self._file.name} shrank during the transfer: it ends at {end}, before at "
            raise ShortReadError(f"{text}{self._end}")

    def record(self) -> Transfer:
        """Return the record of the transfer."""
        if self._last is None:
            self.move(self._pool[0], 0, 0)
        assert self._last is not None and self._disk is not None
        route, planned = Route.STAGED, self._disk
        if 2 * self._cached > self._moved or (not self._moved and planned.route is Route.BUFFERED):
            route = Route.BUFFERED
        rejected = dict(self._told)
        if route is Route.BUFFERED and self._route is None:
            rejected[Route.STAGED] = planned.rejected.get(Route.STAGED, self._last.reason)
        return dataclasses.replace(
            self._last,
            nbytes=self.done,
            route=route,
            reason=_REASONS[self._direction, route],
            rejected=rejected,
            seconds=time.perf_counter() - self._started,
            requests=self._requests,
            reissues=self._reissues,
            copied=self._copied,
        )


def check_blocks(block_size: int | str, blocks: int) -> tuple[int, int]:
    """Return the size and the number of the blocks, or raise ValueError."""
    return check_block_size(block_size), check_block_count(blocks)


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Poll until ``done`` returns True; a wait of more than 5 s is logged. Signals interrupt it."""
    pause, late = _SHORTEST, time.monotonic() + _PATIENCE
    while not done():
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
        if time.monotonic() >= late:
            log.warning("waiting for %s", what)
            late = float("inf")


def _address(block: Buffer) -> int:
    address = lifetime.host_address(block)
    assert address is not None
    return address


_in_flight: set[Staging] = set()  # those with copies in flight, which keeps their blocks allocated
os.register_at_fork(after_in_child=_in_flight.clear)
_kept: list[Buffer] = []  # blocks that a device did not unpin

"""Files into memory that only its device reaches, and back: staged, by the device's own copies.

Where neither a disk nor the CPU reaches a device's memory, the bytes pass through pinned blocks of
host memory: the disk fills one while the device copies from those before it, or takes one while the
device fills those after it. `Staging` is that pipeline, and knows no vendor: what a runtime has to
do stands in `Copier`. `dmabuf.devices.cuda` fills it in for CUDA.

No call returns while a copy may still read or write a block, or the device's memory. After a
signal's exception, or an error at any point, no more copies begin, and it is raised once those
under way have ended.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from dmabuf._ahead import InTurn, piece, pieces_to_plan
from dmabuf._ends import Sink, Source, Terms
from dmabuf._leg import Leg
from dmabuf.buffer import Buffer
from dmabuf.devices._blocks import Blocks, Copier, address_of, wait_until
from dmabuf.engine import Transfer
from dmabuf.errors import Uncopyable
from dmabuf.file import File
from dmabuf.pipeline import prepared
from dmabuf.route import Direction, Plan, Question, Require, Route, choose
from dmabuf.sizes import Size, as_int, format_size, parse_size

__all__ = ["Copier", "Staging"]

_REASONS = {
    ("read", Route.STAGED): "the disk fills pinned blocks, the device copies from them meanwhile",
    ("write", Route.STAGED): "the device copies to pinned blocks, the disk takes them meanwhile",
    ("read", Route.BUFFERED): "the page cache fills pinned blocks, the device copies from them",
    ("write", Route.BUFFERED): "the device copies to pinned blocks, the page cache takes them",
}
_NO_NATIVE = "a bare address is no dma-buf"
_NO_PINNING = "device memory has no pages of the host's that O_DIRECT could pin"


class Staging(Uncopyable, instead="make another where it is needed"):
    """Pinned staging blocks, and the pipeline through them between a File and a device's memory.

    A context manager; one that is dropped without `close` closes itself with a ResourceWarning.
    Thread-safe: the transfers of one Staging go one after the other. After fork the child's copy
    raises ClosedError, as device runtimes do not survive a fork.
    """

    def __init__(self, copier: Copier, *, block_size: int | str = "8MiB", blocks: int = 4) -> None:
        """Allocate and pin the blocks; ``copier`` is this Staging's from then on, to its close.

        Args:
            copier: the device's copies.
            block_size: bytes of one block, a multiple of 4096.
            blocks: how many; with 1 nothing overlaps.

        Raises:
            OSError: the memory cannot be had, or the device refuses to pin it.
            ValueError: a size or number that cannot be.
        """
        self._blocks = Blocks(copier, block_size, blocks)

    def __repr__(self) -> str:
        if self.closed:
            return "<dmabuf.devices.staging.Staging closed>"
        size = format_size(sum(block.size for block in self._blocks.pool))
        return f"<dmabuf.devices.staging.Staging {size} of {self._blocks.copier.name}>"

    # -- transfers

    def read_into(
        self,
        file: File,
        address: int,
        size: int,
        *,
        file_offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        no_native: str = _NO_NATIVE,
    ) -> Transfer:
        """Read from a file into the device's memory.

        Args:
            file: where from.
            address: of the device's memory.
            size: bytes.
            file_offset: where in the file, in bytes.
            require: "uncached" wants the disk's side past the page cache; "zero-copy" cannot be.
            route: "staged" or "buffered": the only one that will do.
            no_native: why the native route was passed over, for the record.

        Returns:
            The record, with the blocks' route as its own: `copied` counts the bytes that the CPU
            touched, which the device's copies do not. `nbytes` is less than `size` where the file
            ends before.

        Raises:
            OSError: what the kernel or the device refused; its `nbytes` is what has arrived in the
                device's memory without a gap.
            RouteUnavailable: no permitted route is possible; nothing was touched.
            ShortReadError: the file shrank meanwhile.
            ClosedError: it was closed, or its process forked.
        """
        begun = time.perf_counter()
        address, size = as_int(address, "address"), parse_size(size)
        with self._blocks.lock:
            self._blocks.check_usable()
            terms = _terms(require, route)
            source = Source(_file(file), parse_size(file_offset, "file_offset"), terms)
            size = size if source.total is None else min(size, source.total)
            chosen = self._choose(source, "read", size, require, route, no_native)
            for each in pieces_to_plan(size, self._blocks.size):
                source.plan(self._blocks.pool[0], each)
            done = self._guarded(partial(self._to_device, source, address, size))
        return _record(chosen, "read", done, source.tally.leg(), begun)

    def write_from(
        self,
        file: File,
        address: int,
        size: int,
        *,
        file_offset: Size = 0,
        require: Require = "any",
        route: Route | str | None = None,
        sync: bool = False,
        no_native: str = _NO_NATIVE,
    ) -> Transfer:
        """Write from the device's memory to a file.

        Args:
            file: where to; what it grows by is allocated first, and cut back after an error.
            address: of the device's memory.
            size: bytes.
            file_offset: where in the file, in bytes.
            require: as for `read_into`.
            route: likewise.
            sync: return when the bytes are on the medium.
            no_native: likewise.

        Raises:
            OSError: what the kernel or the device refused; its `nbytes` is what the file has of it
                without a gap.
            RouteUnavailable, ClosedError: as `read_into`.
        """
        begun = time.perf_counter()
        address, size = as_int(address, "address"), parse_size(size)
        with self._blocks.lock:
            self._blocks.check_usable()
            sink = Sink(
                _file(file),
                parse_size(file_offset, "file_offset"),
                _terms(require, route),
                emptied=False,
            )
            chosen = self._choose(sink, "write", size, require, route, no_native)
            done = self._guarded(partial(self._to_host, sink, address, size))
            if sync:
                sink.flush()
        return _record(chosen, "write", done, sink.tally.leg(), begun)

    def _choose(
        self,
        end: Source | Sink,
        direction: Direction,
        size: int,
        require: Require,
        route: Route | str | None,
        no_native: str,
    ) -> Plan:
        """The route, by how the disk's side would go if all were permitted."""
        end.terms, terms = Terms(), end.terms
        try:
            leg = end.plan(self._blocks.pool[0], piece(size, self._blocks.size))
        finally:
            end.terms = terms
        uncached = leg.route is not Route.BUFFERED
        question = Question(
            direction,
            no_native=no_native,
            no_pinning=_NO_PINNING,
            no_direct_io=None if uncached else leg.rejected.get(Route.STAGED, leg.reason),
        )
        return choose(question, require=require, route=route, path=end.name)

    def _to_device(self, source: Source, address: int, size: int) -> int:
        fill = InTurn(source, self._blocks.pool, size, whole=True)
        flying: deque[tuple[object, int]] = deque()
        begun = done = turn = 0
        failure: BaseException | None = None
        try:
            last = not size
            while not last:
                if len(flying) == len(self._blocks.pool):
                    done += self._landed(flying)
                block = self._blocks.pool[turn % len(self._blocks.pool)]
                filled = fill.fill(block)
                last, failure = filled.last, filled.error
                if filled.size:
                    host = address_of(block)
                    copy = self._blocks.copier.to_device(address + begun, host, filled.size)
                    flying.append((copy, filled.size))
                    begun, turn = begun + filled.size, turn + 1
            while flying:
                done += self._landed(flying)
            if failure is not None:
                raise failure
        except BaseException as error:
            self._blocks.settle()
            with suppress(OSError):
                while flying and self._blocks.copier.finished(flying[0][0]):
                    done += flying.popleft()[1]
            error.nbytes = done  # type: ignore[attr-defined]
            raise
        return done

    def _to_host(self, sink: Sink, address: int, size: int) -> int:
        flying: deque[tuple[object, int, Buffer]] = deque()
        free = deque(self._blocks.pool)
        begun = 0
        with prepared(sink, self._blocks.pool[0], size, self._blocks.size) as written:
            while written.done < size:
                while free and begun < size:
                    block, each = free.popleft(), piece(size - begun, self._blocks.size)
                    copy = self._blocks.copier.to_host(address_of(block), address + begun, each)
                    flying.append((copy, each, block))
                    begun += each
                self._await(flying[0][0])
                _, each, block = flying.popleft()
                written.write(block, 0, each)
                free.append(block)
        return written.done

    def _landed(self, flying: deque[tuple[object, int]]) -> int:
        """Wait for the oldest copy; its bytes."""
        self._await(flying[0][0])
        return flying.popleft()[1]

    def _await(self, copy: object) -> None:
        wait_until(
            partial(self._blocks.copier.finished, copy),
            f"{self._blocks.copier.name}: to end a copy",
        )

    def _guarded(self, move: Callable[[], int]) -> int:
        """Run it; whatever happens, return once no copy is under way."""
        try:
            try:
                self._blocks.begin()
                return move()
            finally:
                self._blocks.settle()
        finally:
            self._blocks.settle()  # an interrupt may have come just before the first was at work

    # -- the end

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._blocks.closed

    def close(self) -> None:
        """Unpin and free the blocks, and close the copier; again and again does nothing.

        Raises:
            BusyError: a transfer is running; nothing has changed.
            OSError: what the device refused; blocks that it would not unpin stay allocated.
        """
        self._blocks.close()

    def __enter__(self) -> Staging:
        self._blocks.check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_blocks") and not self.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()


def _file(file: File) -> File:
    if not isinstance(file, File):
        raise TypeError(f"a dmabuf.File is needed, not {type(file).__name__}: see dmabuf.open")
    return file


def _terms(require: Require, route: Route | str | None) -> Terms:
    """What is asked of the disk's side."""
    if route == Route.BUFFERED:
        return Terms("any", Route.BUFFERED)
    return Terms("uncached" if require == "uncached" or route == Route.STAGED else "any")


def _record(
    chosen: Plan, direction: Direction, done: int, leg: Leg | None, begun: float
) -> Transfer:
    """The record; a disk's side that went by the page cache after all is not called staged."""
    leg = leg or Leg(0, chosen.route, "nothing was moved")
    rejected = dict(chosen.rejected)
    route = Route.BUFFERED if leg.route is Route.BUFFERED else Route.STAGED
    if route is not chosen.route and route is Route.BUFFERED:
        rejected[Route.STAGED] = leg.reason
    return Transfer(
        nbytes=done,
        route=route,
        reason=_REASONS[direction, route],
        rejected=rejected,
        registered=leg.registered,
        registration="of the staging blocks",
        seconds=time.perf_counter() - begun,
        requests=leg.requests,
        reissues=leg.reissues,
        copied=leg.copied,
    )

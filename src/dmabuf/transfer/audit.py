"""Audits: compare every byte of a transfer with the bytes that plain pread(2) reads.

A full-length completion does not prove that the bytes arrived. On one GPU with a patched kernel
2558 of 2560 reads into its memory completed in full, without an error, and changed nothing; round
trips and samples did not show it. So the first transfer by the `native` route in each direction
between each exporter and each device is audited:

- a read: the range to be overwritten, and no byte outside it, is poisoned through the CPU's
  mapping; after the transfer it must hold the bytes that plain pread(2) reads from the file;
- a write: plain pread(2) must read from the file the bytes that the CPU reads from the buffer.

Each direction is audited by itself, since a round trip hides which half is broken. Of the later
transfers by that route, some are audited in a sample of their pages, as often as SHARE of the time
that they take permits.

If a byte differs, the transfer raises IntegrityError with a report for the author of the driver.
The pair of exporter and device is then in quarantine: until the process ends, its transfers do not
take the route that failed.

An audit also fails if another program writes to the same range of the file during the transfer,
or a device to the same range of the buffer. Pass audit="off" if that is intended.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeAlias

from dmabuf._core import lib
from dmabuf.errors import IntegrityError, RouteUnavailable, os_error
from dmabuf.kernel import log
from dmabuf.memory import Buffer
from dmabuf.sizes import OFFSET_MAX, format_size
from dmabuf.transfer.compare import PAGE, Findings, Run
from dmabuf.transfer.engine import Engine, Job
from dmabuf.transfer.plan import AUDIT_OFF, NOT_AUDITED, Direction, Route, Terms, with_nbytes
from dmabuf.transfer.reference import BLOCK, Reference
from dmabuf.transfer.run import Segments, Waiter

LIMIT = 64 << 20
"""The maximum bytes of a first transfer that are compared."""
KEPT = 1 << 20
"""The maximum bytes of old content that are kept, to recognise stale bytes."""
SHARE = 0.02
"""How much of the time of a pair's transfers their samples may take."""
SAMPLES = 8
"""The pages of one sample."""
_SEARCHED = 16 << 20
"""Bytes of the buffer that are searched at once for bytes that went elsewhere."""

Extent: TypeAlias = Literal["first", "some", "all"]
Piece: TypeAlias = tuple[int, int, int, int]
"""Position in the transfer, file offset, buffer offset, size."""

NOTHING = "not audited: nothing was moved"


# -- pairs of exporter and device


class Ledger:
    """What audits showed of transfers in one direction between an exporter and a device."""

    __slots__ = ("_until", "busy", "moving", "passed", "sampling")

    def __init__(self) -> None:
        self.passed = False
        """Whether a transfer passed an audit."""
        self.moving = 0.0
        """Seconds in which at least one transfer after that ran."""
        self.sampling = 0.0
        """Seconds that their samples took."""
        self.busy = False
        """Whether a transfer is being audited in a sample now."""
        self._until = 0.0

    def ran(self, begun: float, ended: float) -> None:
        """Add the time of a transfer that has just ended, except what others have added already.

        Of many transfers at once each second counts once, so that samples stay rare.
        """
        self.moving += max(0.0, ended - max(begun, self._until))
        self._until = ended

    def due(self) -> bool:
        """Return whether the next transfer is to be audited in a sample of its pages."""
        return not self.busy and self.sampling <= SHARE * self.moving


class Pairs:
    """The audit results of this process for pairs of exporter and device. Thread-safe.

    Each operation is one step of a dict and needs no lock, which a fork could leave held. If two
    first transfers run at the same time, both are compared.
    """

    def __init__(self) -> None:
        self._ledgers: dict[tuple[str, str, Direction], Ledger] = {}
        self._quarantine: dict[tuple[str, str, Route], str] = {}

    def ledger(self, exporter: str, device: str, direction: Direction) -> Ledger:
        """Return the ledger of a pair and a direction."""
        key = exporter, device, direction
        return self._ledgers.get(key) or self._ledgers.setdefault(key, Ledger())

    def refusal(self, exporter: str, device: Callable[[], str], route: Route) -> str | None:
        """Return why a pair must not use a route; None if it may."""
        return self._quarantine.get((exporter, device(), route)) if self._quarantine else None

    def mark(self, exporter: str, device: str, why: str, route: Route = Route.NATIVE) -> None:
        """Rule out a route for a pair in both directions, until the process ends."""
        self._quarantine.setdefault((exporter, device, route), why)

    def forget(self) -> None:
        """Forget all results: for tests, and after a driver was replaced."""
        self._ledgers.clear()
        self._quarantine.clear()


PAIRS = Pairs()
"""The results of this process; a forked child inherits them."""


def device_of(fd: int) -> str:
    """Return the sysfs path, with bus and slot, of the device that holds a file's bytes.

    For a partition it is the path of the disk, whose controller moves the bytes.
    """
    status = os.fstat(fd)
    mode = status.st_mode
    number = status.st_rdev if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else status.st_dev
    kind = "char" if stat.S_ISCHR(mode) else "block"
    place = os.path.realpath(f"/sys/dev/{kind}/{os.major(number)}:{os.minor(number)}")
    return os.path.dirname(place) if os.path.exists(f"{place}/partition") else place


# -- whether a transfer can be compared


def obstacle(buffer: Buffer, segments: Segments, write: bool, fence: bool) -> str | None:
    """Return why a transfer cannot be compared; None if it can."""
    if buffer.address is None:
        return f"the CPU cannot map the buffer's memory: {buffer.map_refusal}"
    if not fence and buffer.is_dmabuf:
        return "fence=False, and the CPU's access to the buffer would wait for fences"
    if not write and segments.count > 1 and segments.overlap():
        return "destinations overlap, and may hold the bytes of either segment"
    return None


def check_possible(
    buffer: Buffer, segments: Segments, terms: Terms, stream: str | None, path: str, write: bool
) -> None:
    """Refuse audit="always" where there is nothing to compare with.

    `stream` names the kind of file where it can only be read or written in order.
    """
    if stream is not None:
        text = (
            f"audit='always' reads everything a second time, which {stream} does not allow; leave "
            "it out"
        )
        raise os_error(errno.ESPIPE, text, path)
    found = obstacle(buffer, segments, write, terms.fence)
    if found is not None and any(size for _, _, size in segments):
        raise RouteUnavailable(f"audit='always' is impossible: {found}", path)


# -- comparing one


class Check:
    """The comparison of one transfer: call `prepare` before it and `compare` after it.

    Uses a few MiB of memory, whatever the transfer's size, and less for a sample.
    """

    def __init__(
        self,
        buffer: Buffer,
        segments: Segments,
        reference: Reference,
        *,
        write: bool,
        file_size: int,
        extent: Extent,
        path: str,
        about: Callable[[], str],
    ) -> None:
        """Compare "all", at most LIMIT bytes of the "first", or "some" pages.

        `about` returns the beginning of a report.
        """
        self._buffer = buffer
        self._segments = segments
        self._reference = reference
        self._write = write
        self._end = OFFSET_MAX if write else file_size
        self._limit = LIMIT if extent == "first" else OFFSET_MAX
        self._path = path
        self._about = about
        total = sum(size for _, _, size in segments)
        self._unit = PAGE if extent == "some" else max(1, min(total, BLOCK))
        self._poison = b"" if write else os.urandom(self._unit) * 2
        self._before: dict[int, bytes] = {}  # by position
        self._sample = list(self._choose()) if extent == "some" else None

    def _choose(self) -> Iterator[Piece]:
        """Yield SAMPLES pages in order, one at random in each of as many equal parts.

        Fewer, and all of them, where the segments have fewer pages.
        """
        total = sum(-(-size // PAGE) for _, _, size in self._segments)
        edges = [number * total // SAMPLES for number in range(SAMPLES + 1)]
        chosen = [random.randrange(*part) for part in pairwise(edges) if part[0] < part[1]]
        chosen.reverse()
        position, pages = 0, 0
        for file_offset, offset, size in self._segments:
            count = -(-size // PAGE)
            while chosen and chosen[-1] < pages + count:
                start = (chosen.pop() - pages) * PAGE
                part = min(size - start, PAGE, self._end - file_offset - start)
                if part > 0:
                    yield position + start, file_offset + start, offset + start, part
            position, pages = position + size, pages + count

    def _pieces(self, nbytes: int) -> Iterator[Piece]:
        """Yield the blocks of the first bytes."""
        if self._sample is not None:
            yield from (one for one in self._sample if one[0] + one[3] <= nbytes)
            return
        position, left = 0, min(nbytes, self._limit)
        for file_offset, offset, size in self._segments:
            size = min(size, max(0, self._end - file_offset))
            while size and left:
                part = min(size, left, BLOCK)
                yield position, file_offset, offset, part
                position, file_offset, offset = position + part, file_offset + part, offset + part
                size, left = size - part, left - part

    def _bracket(self, *, write: bool) -> Any:
        first = min((start for _, start, _ in self._segments), default=0)
        last = max((start + size for _, start, size in self._segments), default=0)
        return self._buffer.cpu_access(True, write, first, last - first)

    def prepare(self) -> None:
        """Poison the range that a read overwrites; keep the bytes that a write replaces."""
        kept = 0
        if self._write:
            for position, file_offset, _, size in self._pieces(KEPT):
                held = self._reference.read(file_offset, size)
                self._before[position] = held.ljust(size, b"\0")
            return
        with self._bracket(write=True), self._buffer.view(0, self._buffer.size) as view:
            for position, _, offset, size in self._pieces(OFFSET_MAX):
                if kept < KEPT:
                    self._before[position] = bytes(view[offset : offset + size])
                    kept += size
                view[offset : offset + size] = self._poison_at(position, size)

    def _poison_at(self, position: int, size: int) -> bytes:
        start = position % self._unit
        return self._poison[start : start + size]

    def compare(self, nbytes: int) -> str:
        """Compare the first `nbytes` bytes, and return the sentence for the transfer's record.

        Raises:
            IntegrityError: a byte differs; `nbytes` counts the correct bytes before it, and
                `counts` the wrong bytes of each kind.
        """
        findings, compared, pages = Findings(), 0, 0
        pieces: list[Piece] = []  # those that differ
        if self._write:
            self._reference.flush()
        with self._bracket(write=False), self._buffer.view(0, self._buffer.size) as view:
            for position, file_offset, offset, size in self._pieces(nbytes):
                reference = self._reference.read(file_offset, size)
                held = bytes(view[offset : offset + size])
                if self._write:
                    wanted, got, poison = held, reference.ljust(size, b"\0"), None
                else:
                    # Another program may have truncated the file.
                    size = len(reference)
                    wanted, got, poison = reference, held[:size], self._poison_at(position, size)
                before = self._before.get(position, b"")[:size]
                if not findings.add(
                    position, wanted, got, poison, before if len(before) == size else None
                ):
                    pieces.append((position, file_offset, offset, size))
                compared, pages = compared + size, pages + 1
            if findings.first is not None and not self._write:
                findings.look_for(partial(self._find, view, pieces))
        if findings.first is not None:
            raise self._mismatch(findings, compared, pieces)
        text = f"every byte of {format_size(compared)} compared, read {self._reference.how}"
        if self._sample is not None:
            text = f"{pages} pages of {format_size(nbytes)} compared, read {self._reference.how}"
        elif compared != nbytes:
            text = f"{text}; {format_size(nbytes)} were moved"
        return text

    def _find(self, view: memoryview, pieces: Sequence[Piece], run: Run) -> int | None:
        """Return how far away in the buffer bytes lie that did not arrive; None if nowhere."""
        _, start = _places(run.position, pieces)
        used = [(offset, offset + size) for _, offset, size in self._segments]
        for at in range(0, len(view), _SEARCHED):
            here = bytes(view[at : at + _SEARCHED + len(run.wanted)]).find(run.wanted)
            if here >= 0 and not any(low <= at + here < high for low, high in used):
                return at + here - start
        return None

    def _mismatch(
        self, findings: Findings, compared: int, pieces: Sequence[Piece]
    ) -> IntegrityError:
        assert findings.first is not None
        verb = "written" if self._write else "read"
        offset, _ = _places(findings.first, pieces)
        text = (
            f"the kernel said that the bytes were {verb}, and {findings.wrong} of the {compared} "
            f"that were compared are wrong, the first at file offset {offset} "
            f"({findings.kind}): {findings}"
        )
        lines = [self._about(), f"compared: {compared} bytes, read {self._reference.how}"]
        if not self._write:
            lines.append(f"poison: {self._poison[:16].hex(' ')} ..., every {self._unit} bytes")
        for run in findings.runs:
            file_offset, buffer_offset = _places(run.position, pieces)
            lines.append(f"{run}: file offset {file_offset}, buffer offset {buffer_offset}")
            lines.append(f"  wanted {run.wanted[:16].hex(' ')}")
            lines.append(f"  found  {run.got[:16].hex(' ')}")
        report = "\n".join(lines)
        counts = {str(kind): count for kind, count in findings.counts.items()}
        error = IntegrityError(text, self._path, offset=offset, counts=counts, report=report)
        error.nbytes = findings.first if self._sample is None else 0
        return error


def _places(position: int, pieces: Sequence[Piece]) -> tuple[int, int]:
    """Return the offsets in the file and in the buffer of a position within pieces."""
    start, file_offset, offset, _ = max(one for one in pieces if one[0] <= position)
    return file_offset + position - start, offset + position - start


def _about(
    job: Job, segments: Segments, pair: tuple[str, str], direction: Direction, backend: str
) -> str:
    """Return the beginning of a report: the machine, the path of the bytes, and the range."""
    system = os.uname()
    offset, start, size = segments.at(0)
    more = f" and {segments.count - 1} more segments" if segments.count > 1 else ""
    return (
        f"{direction} by the {job.route} route, {backend}, Linux {system.release} "
        f"{system.machine}: {job.path}\n"
        f"exporter: {pair[0]}, {job.buffer.size} bytes in {len(job.buffer.slabs)} dma-bufs\n"
        f"device: {pair[1]}{_driver_of(pair[1])}\n"
        f"range: {size} bytes, file offset {offset}, buffer offset {start}{more}"
    )


def _driver_of(device: str) -> str:
    """Return the driver of a device in sysfs, such as `, driver nvme`."""
    while device.count("/") > 2:
        if os.path.exists(f"{device}/driver"):
            return f", driver {os.path.basename(os.path.realpath(f'{device}/driver'))}"
        device = os.path.dirname(device)
    return ""


# -- running one


class Audited(Protocol):
    """The open file behind a File, as far as audits use it."""

    engine: Engine

    def device(self) -> str:
        """Return the device that holds its bytes."""

    def reference(self) -> AbstractContextManager[Reference]:
        """Yield what reads it."""


@contextmanager
def _reading_again(path: str | None) -> Iterator[None]:
    """Give an OSError of the other descriptors a path, a sentence and `nbytes`: nothing is sure."""
    try:
        yield
    except IntegrityError:
        raise
    except OSError as error:
        text = f"audit: the file cannot be read again: {error.strerror}; audit='off' goes without"
        number = error.errno or errno.EIO
        raise with_nbytes(os_error(number, text, error.filename or path), 0) from None


async def run(
    job: Job,
    segments: Segments,
    terms: Terms,
    waiter: Waiter,
    target: Audited,
    move: Callable[[], Awaitable[None]],
) -> str:
    """Run a job, and compare its bytes where that is due; return what the record reports.

    Args:
        job: the job.
        segments: its segments.
        terms: the caller's terms.
        waiter: how to wait.
        target: the open file.
        move: runs the job.

    Raises:
        IntegrityError: a byte differs, and the pair's route is ruled out.
        RouteUnavailable: audit="always", and the file cannot be opened again.
    """
    write, native = job.core.direction == lib.DMB_WRITE, job.route is Route.NATIVE
    direction: Direction = "write" if write else "read"
    pair, begun = (job.buffer.exporter, target.device()), time.perf_counter()
    ledger = PAIRS.ledger(*pair, direction)
    extent: Extent = "some" if ledger.passed else "first"
    why = None
    if terms.audit == "off":
        why = AUDIT_OFF
    elif terms.audit == "always":
        extent = "all"
    elif ledger.passed and not ledger.due():
        why = f"not audited: the first {direction} of {pair[0]} on this device was"
    elif found := obstacle(job.buffer, segments, write, terms.fence):
        why = f"not audited: {found}"
    if why is not None:
        await move()
        if native and ledger.passed and why is not AUDIT_OFF:
            ledger.ran(begun, time.perf_counter())
        return why
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(target.reference())
        except OSError as error:
            text = f"the file cannot be opened again to read it ({error.strerror})"
            if terms.audit == "always":
                text = f"audit='always' is impossible: {text}"
                raise with_nbytes(RouteUnavailable(text, job.path), 0) from None
            await move()
            return f"not audited: {text}"
        if extent == "some":
            stack.callback(setattr, ledger, "busy", False)
            ledger.busy = True
        check = Check(
            job.buffer,
            segments,
            opened,
            write=write,
            file_size=job.measure.file_size,
            extent=extent,
            path=job.path,
            about=partial(_about, job, segments, pair, direction, target.engine.backend),
        )
        with _reading_again(job.path):
            await waiter.call(check.prepare)
        prepared = time.perf_counter()
        await move()
        moved = time.perf_counter()
        result = job.result
        cut_short = result.short_segment >= 0 and segments.whole
        if result.error or job.interruption or job.moved or cut_short:
            return NOT_AUDITED
        try:
            with _reading_again(job.path):
                text = await waiter.call(partial(check.compare, result.nbytes))
        except IntegrityError as error:
            if job.changed is not None and await waiter.call(job.changed):
                job.moved = True  # the file changed after the job, and the bytes were right
                return NOT_AUDITED
            if job.route is not Route.BUFFERED:
                PAIRS.mark(*pair, f"an audit found wrong bytes: {error.strerror}", job.route)
                log.error("%s\n%s", error, error.report)
            raise
        if native and extent == "some":
            ledger.ran(prepared, moved)
            ledger.sampling += time.perf_counter() - begun - (moved - prepared)
        ledger.passed = ledger.passed or (native and result.straight > 0)
        return text

"""Audits: compare every byte of a transfer with the bytes that plain pread(2) reads.

A full-length completion does not prove that the bytes arrived. On one GPU with a patched kernel
2558 of 2560 reads into its memory completed in full, without an error, and changed nothing; round
trips and samples did not show it. So the first transfer by the `native` route in each direction
between each exporter and each device is audited:

- a read: the range to be overwritten, and no byte outside it, is poisoned through the CPU's
  mapping; after the transfer it must hold the bytes that plain pread(2) reads from the file;
- a write: plain pread(2) must read from the file the bytes that the CPU reads from the buffer.

Each direction is audited by itself, since a round trip hides which half is broken. If a byte
differs, the transfer raises IntegrityError, and this process uses other routes for that pair of
exporter and device from then on.

An audit also fails if another program writes to the same range of the file during the transfer,
or a device to the same range of the buffer. Pass audit="off" if that is intended.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from dmabuf._core import lib
from dmabuf.errors import IntegrityError, RouteUnavailable, os_error
from dmabuf.memory import Buffer
from dmabuf.sizes import OFFSET_MAX, format_size
from dmabuf.transfer.compare import Findings
from dmabuf.transfer.engine import Job
from dmabuf.transfer.plan import AUDIT_OFF, NOT_AUDITED, Direction, Route, Terms, with_nbytes
from dmabuf.transfer.reference import BLOCK, Reference
from dmabuf.transfer.run import Segments, Waiter

LIMIT = 64 << 20
"""The maximum bytes of a first transfer that are compared."""
KEPT = 1 << 20
"""The maximum bytes of old content that are kept, to recognise stale bytes."""

NOTHING = "not audited: nothing was moved"


# -- pairs of exporter and device


class Pairs:
    """The audit results of this process for pairs of exporter and device. Thread-safe.

    Each operation is one step of a set or dict and needs no lock, which a fork could leave held. If
    two first transfers run at the same time, both are compared.
    """

    def __init__(self) -> None:
        self._shown: set[tuple[str, str, str]] = set()
        self._marked: dict[tuple[str, str], str] = {}

    def shown(self, exporter: str, device: str, direction: Direction) -> bool:
        """Return whether a transfer in that direction passed an audit."""
        return (exporter, device, direction) in self._shown

    def show(self, exporter: str, device: str, direction: Direction) -> None:
        """Record that a transfer in that direction passed an audit."""
        self._shown.add((exporter, device, direction))

    def refusal(self, exporter: str, device: str) -> str | None:
        """Return why a pair must not use the native route; None if it may."""
        return self._marked.get((exporter, device))

    def mark(self, exporter: str, device: str, why: str) -> None:
        """Rule out the native route for a pair in both directions, until the process ends."""
        self._marked.setdefault((exporter, device), why)

    def forget(self) -> None:
        """Forget all results: for tests, and after a driver was replaced."""
        self._shown.clear()
        self._marked.clear()


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


def why_not(
    buffer: Buffer,
    segments: Segments,
    terms: Terms,
    pair: tuple[str, str],
    direction: Direction,
) -> str | None:
    """Return why a transfer is not compared; None if it is.

    Args:
        buffer: its buffer.
        segments: its segments.
        terms: the caller's terms.
        pair: the exporter and the device.
        direction: "read" or "write".
    """
    if terms.audit == "off":
        return AUDIT_OFF
    if terms.audit == "always":
        return None
    if PAIRS.shown(*pair, direction):
        return f"not audited: the first {direction} of {pair[0]} on this device was"
    found = obstacle(buffer, segments, direction == "write", terms.fence)
    return found and f"not audited: {found}"


# -- comparing one


class Check:
    """The comparison of one transfer: call `prepare` before it and `compare` after it.

    Uses a few MiB of memory, whatever the transfer's size.
    """

    def __init__(
        self,
        buffer: Buffer,
        segments: Segments,
        reference: Reference,
        *,
        write: bool,
        file_size: int,
        limit: int | None,
        path: str,
    ) -> None:
        """Compare at most `limit` bytes; None compares all."""
        self._buffer = buffer
        self._segments = segments
        self._reference = reference
        self._write = write
        self._end = OFFSET_MAX if write else file_size
        self._limit = OFFSET_MAX if limit is None else limit
        self._path = path
        self._poison = b"" if write else os.urandom(BLOCK) * 2
        self._before = bytearray()

    def _pieces(self, nbytes: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (position, file offset, buffer offset, size) of each block of the first bytes."""
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
        if self._write:
            for _, file_offset, _, size in self._pieces(KEPT):
                held = self._reference.read(file_offset, size)
                self._before += held.ljust(size, b"\0")
            return
        with self._bracket(write=True), self._buffer.view(0, self._buffer.size) as view:
            for position, _, offset, size in self._pieces(OFFSET_MAX):
                if len(self._before) < KEPT:
                    self._before += view[offset : offset + size]
                view[offset : offset + size] = self._poison_at(position, size)

    def _poison_at(self, position: int, size: int) -> bytes:
        return self._poison[position % BLOCK :][:size]

    def compare(self, nbytes: int) -> str:
        """Compare the first `nbytes` bytes, and return the sentence for the transfer's record.

        Raises:
            IntegrityError: a byte differs; `nbytes` counts the correct bytes before it, and
                `counts` the wrong bytes of each kind.
        """
        findings, compared = Findings(), 0
        where: list[int] = []  # the file offset and position of the first piece that differs
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
                before = bytes(self._before[position : position + size])
                if not findings.add(
                    position, wanted, got, poison, before if len(before) == size else None
                ):
                    where = where or [file_offset, position]
                compared += size
        if findings.first is not None:
            raise self._mismatch(findings, compared, where[0] + findings.first - where[1])
        text = f"every byte of {format_size(compared)} compared, read {self._reference.how}"
        return text if compared == nbytes else f"{text}; {format_size(nbytes)} were moved"

    def _mismatch(self, findings: Findings, compared: int, offset: int) -> IntegrityError:
        verb = "written" if self._write else "read"
        text = (
            f"the kernel said that the bytes were {verb}, and {findings.wrong} of the {compared} "
            f"that were compared are wrong, the first at file offset {offset} "
            f"({findings.kind}): {findings}"
        )
        error = IntegrityError(text, self._path, offset=offset, counts=findings.counts)
        error.nbytes = findings.first or 0
        return error


# -- running one


async def run(
    job: Job,
    segments: Segments,
    terms: Terms,
    waiter: Waiter,
    pair: tuple[str, str],
    reference: Callable[[], AbstractContextManager[Reference]],
    move: Callable[[], Awaitable[None]],
) -> str:
    """Run a job, and compare its bytes where that is due; return what the record reports.

    Args:
        job: the job.
        segments: its segments.
        terms: the caller's terms.
        waiter: how to wait.
        pair: the exporter and the device.
        reference: yields what reads the file.
        move: runs the job.

    Raises:
        IntegrityError: a byte differs, and the pair's native route is ruled out.
        RouteUnavailable: audit="always", and the file cannot be opened again.
    """
    write, native = job.core.direction == lib.DMB_WRITE, job.route is Route.NATIVE
    direction: Direction = "write" if write else "read"
    obstacle = why_not(job.buffer, segments, terms, pair, direction)
    if obstacle is not None:
        await move()
        return obstacle
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(reference())
        except OSError as error:
            text = f"the file cannot be opened again to read it ({error.strerror})"
            if terms.audit == "always":
                text = f"audit='always' is impossible: {text}"
                raise with_nbytes(RouteUnavailable(text, job.path), 0) from None
            await move()
            return f"not audited: {text}"
        check = Check(
            job.buffer,
            segments,
            opened,
            write=write,
            file_size=job.measure.file_size,
            limit=None if terms.audit == "always" else LIMIT,
            path=job.path,
        )
        await waiter.call(check.prepare)
        await move()
        result = job.result
        cut_short = result.short_segment >= 0 and segments.whole
        if result.error or job.interruption or job.moved or cut_short:
            return NOT_AUDITED
        try:
            text = await waiter.call(partial(check.compare, result.nbytes))
        except IntegrityError as error:
            if job.changed is not None and await waiter.call(job.changed):
                job.moved = True  # the file changed after the job, and the bytes were right
                return NOT_AUDITED
            if native:
                PAIRS.mark(*pair, f"an audit found wrong bytes: {error.strerror}")
            raise
        if native and result.straight:
            PAIRS.show(*pair, direction)
        return text

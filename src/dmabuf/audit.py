"""Proof of arrival: a transfer compared, every byte, with what a known-good path finds.

A full-length completion does not prove that the bytes arrived. On one GPU with a patched kernel
2558 of 2560 reads into its memory completed in full, without an error, and changed nothing; round
trips and samples did not show it. So the first transfer of each direction between each exporter and
each device by the `native` route is not believed until it was shown:

- a read: the range that is about to be overwritten, and nothing beside it, is poisoned through the
  CPU's mapping; afterwards it holds what plain pread(2) finds in the file, or it does not;
- a write: plain pread(2) finds in the file what the CPU sees in the buffer, or it does not.

One direction at a time, since a round trip hides which half is broken. What does not compare is an
IntegrityError, and that pair of exporter and device goes another way from then on, in this process.

What it cannot tell apart: another program that writes to the same range of the file, or a device
to the same range of the buffer, meanwhile. Give audit="off" where that is meant to happen.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterator
from typing import Any, Literal

from dmabuf._ffi import ffi, lib
from dmabuf.buffer import Buffer
from dmabuf.compare import Findings
from dmabuf.errors import IntegrityError
from dmabuf.reference import BLOCK, Reference
from dmabuf.route import Direction
from dmabuf.sizes import OFFSET_MAX, format_size

Audit = Literal["first", "always", "off"]

LIMIT = 64 << 20
"""Bytes of a first transfer that are compared."""
KEPT = 1 << 20
"""Bytes of what a place held before that are kept, to tell stale ones from foreign ones."""

OFF = "not audited: audit='off'"
NOTHING = "not audited: nothing was moved"


def check_keyword(audit: str) -> None:
    """ValueError for anything but the three."""
    if audit not in ("first", "always", "off"):
        raise ValueError(f"audit={audit!r}: 'first', 'always' or 'off'")


# -- what is known of pairs


class Pairs:
    """What this process knows of pairs of exporter and device. Safe from any thread.

    Each entry is one step of a set or dict, so there is no lock to be left held by a fork. Two
    first transfers at the same time are both compared.
    """

    def __init__(self) -> None:
        self._shown: set[tuple[str, str, str]] = set()
        self._marked: dict[tuple[str, str], str] = {}

    def shown(self, exporter: str, device: str, direction: Direction) -> bool:
        """Whether a transfer of that direction was compared, and every byte was there."""
        return (exporter, device, direction) in self._shown

    def show(self, exporter: str, device: str, direction: Direction) -> None:
        """It was."""
        self._shown.add((exporter, device, direction))

    def refusal(self, exporter: str, device: str) -> str | None:
        """Why the native route is closed to a pair; None where it is open."""
        return self._marked.get((exporter, device))

    def mark(self, exporter: str, device: str, why: str) -> None:
        """Close it, for both directions, as long as the process lives."""
        self._marked.setdefault((exporter, device), why)

    def forget(self) -> None:
        """Know nothing again: for tests, and after a driver was replaced."""
        self._shown.clear()
        self._marked.clear()


PAIRS = Pairs()
"""Of this process; a fork's child inherits what was known."""


def device_of(fd: int) -> str:
    """Which device a file's bytes lie on: its place in sysfs, which names its bus and slot.

    A partition's is its disk's, whose controller moves the bytes of both.
    """
    status = os.fstat(fd)
    mode = status.st_mode
    number = status.st_rdev if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else status.st_dev
    kind = "char" if stat.S_ISCHR(mode) else "block"
    place = os.path.realpath(f"/sys/dev/{kind}/{os.major(number)}:{os.minor(number)}")
    return os.path.dirname(place) if os.path.exists(f"{place}/partition") else place


# -- whether a transfer can be compared


def obstacle(buffer: Buffer, segments: Any, count: int, write: bool, fence: bool) -> str | None:
    """Why a transfer cannot be compared; None where it can."""
    if buffer._address is None:
        return f"nothing else can see the buffer's memory: {buffer._map_refusal}"
    if not fence and buffer.is_dmabuf:
        return "fence=False, and the CPU's access to the buffer would wait for fences"
    if not write and count > 1 and _overlap(segments, count):
        return "destinations overlap, and hold the bytes of either segment"
    return None


def _overlap(segments: Any, count: int) -> bool:
    """Whether two segments overlap in the buffer: the core's check, with the offsets swapped."""
    swapped = array("Q", bytes(ffi.buffer(segments, 24 * count)))
    swapped[0::3], swapped[1::3] = swapped[1::3], swapped[0::3]
    bad = ffi.new("size_t *")
    with ffi.from_buffer("uint64_t[]", swapped) as triples:
        return bool(lib.dmb_segments_check(triples, count, OFFSET_MAX, True, bad))


# -- comparing one


class Check:
    """The comparison of one transfer: `prepare` before it, `compare` after.

    Takes a few MiB whatever the transfer's size.
    """

    def __init__(
        self,
        buffer: Buffer,
        segments: Any,
        count: int,
        reference: Reference,
        *,
        write: bool,
        file_size: int,
        limit: int | None,
        path: str,
    ) -> None:
        """`limit` is how many bytes are compared at most; None is all."""
        self._buffer = buffer
        self._segments = segments
        self._count = count
        self._reference = reference
        self._write = write
        self._end = OFFSET_MAX if write else file_size
        self._limit = OFFSET_MAX if limit is None else limit
        self._path = path
        self._poison = b"" if write else os.urandom(BLOCK) * 2
        self._before = bytearray()

    def _pieces(self, nbytes: int) -> Iterator[tuple[int, int, int, int]]:
        """(position, file offset, buffer offset, size) of the first bytes, a block at a time."""
        position, left = 0, min(nbytes, self._limit)
        for index in range(self._count):
            file_offset, offset, size = self._segments[3 * index : 3 * index + 3]
            size = min(size, max(0, self._end - file_offset))
            while size and left:
                part = min(size, left, BLOCK)
                yield position, file_offset, offset, part
                position, file_offset, offset = position + part, file_offset + part, offset + part
                size, left = size - part, left - part

    def _bracket(self, *, write: bool) -> Any:
        first = min((self._segments[3 * i + 1] for i in range(self._count)), default=0)
        last = max(
            (self._segments[3 * i + 1] + self._segments[3 * i + 2] for i in range(self._count)),
            default=0,
        )
        return self._buffer._cpu_access(True, write, first, last - first)

    def prepare(self) -> None:
        """Poison what a read is about to overwrite; look at what a write is about to replace."""
        if self._write:
            for _, file_offset, _, size in self._pieces(KEPT):
                held = self._reference.read(file_offset, size)
                self._before += held.ljust(size, b"\0")
            return
        with self._bracket(write=True), self._buffer._view(0, self._buffer.size) as view:
            for position, _, offset, size in self._pieces(OFFSET_MAX):
                if len(self._before) < KEPT:
                    self._before += view[offset : offset + size]
                view[offset : offset + size] = self._poison_at(position, size)

    def _poison_at(self, position: int, size: int) -> bytes:
        return self._poison[position % BLOCK :][:size]

    def compare(self, nbytes: int) -> str:
        """The sentence for the record of a transfer that moved so many bytes.

        Raises:
            IntegrityError: a byte is not what it should be; its `nbytes` is how many before it are,
                and `counts` how many are wrong in which way.
        """
        findings, compared = Findings(), 0
        where: list[int] = []  # the file offset and position of the first piece that differs
        if self._write:
            self._reference.flush()
        with self._bracket(write=False), self._buffer._view(0, self._buffer.size) as view:
            for position, file_offset, offset, size in self._pieces(nbytes):
                told = self._reference.read(file_offset, size)
                seen = bytes(view[offset : offset + size])
                if self._write:
                    wanted, got, poison = seen, told.ljust(size, b"\0"), None
                else:
                    # Where the file was cut off meanwhile, there is nothing to compare with.
                    size = len(told)
                    wanted, got, poison = told, seen[:size], self._poison_at(position, size)
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

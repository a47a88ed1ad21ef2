"""Compare bytes and classify those that differ. These functions have no side effects.

The kinds match known faults of hardware and drivers. A completion that moved nothing leaves the
poison; a mapping to the wrong pages shows other bytes, often zeros; caches that are not coherent
show the old bytes; a wrong offset shows the right bytes in the wrong place.
"""

from __future__ import annotations

import enum

CELL = 512
"""Bytes that are classified at once: the smallest block of storage."""
_SEARCHES = 8  # searches for shifted bytes; after them only known shifts are tried
_DISTINCT = 16  # fewer bytes than this would match somewhere by chance


class Mismatch(enum.StrEnum):
    """The kind of bytes that differ."""

    POISON = "unchanged"
    """Bytes that the audit wrote before the transfer, to detect that nothing arrived."""
    STALE = "stale"
    """Bytes that were there before."""
    ZEROS = "zeros"
    """Zeros instead of other bytes."""
    FOREIGN = "foreign"
    """Bytes of unknown origin."""
    SHIFTED = "shifted"
    """The right bytes in the wrong place."""
    OUTSIDE = "outside"
    """Changed bytes outside the range."""


def first_difference(one: bytes, other: bytes) -> int:
    """Return the index of the first byte that differs; the arguments have equal lengths."""
    low, high = 0, len(one)  # equal before `low`, different somewhere before `high`
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


class Findings:
    """The differences that one comparison found."""

    def __init__(self) -> None:
        self.counts: dict[Mismatch, int] = {}
        """The number of bytes that differ, by kind."""
        self.first: int | None = None
        """The position of the first byte that differs; None if none does."""
        self.kind: Mismatch | None = None
        """The kind of the first byte that differs."""
        self._shifts: list[int] = []
        self._searches = 0

    @property
    def wrong(self) -> int:
        """The number of bytes that differ."""
        return sum(self.counts.values())

    def add(
        self,
        position: int,
        wanted: bytes,
        got: bytes,
        poison: bytes | None = None,
        before: bytes | None = None,
    ) -> bool:
        """Compare a piece at `position`, and return whether all of it is the same.

        `poison` and `before`, as long as the piece, are earlier contents; None if unknown.
        """
        if wanted == got:
            return True
        if len(wanted) != len(got):
            raise ValueError(f"compare: {len(wanted)} and {len(got)} bytes; pass equal lengths")
        start = first_difference(wanted, got) // CELL * CELL
        for at in range(start, len(wanted), CELL):
            self._add_cell(position, at, wanted, got, poison, before)
        return False

    def _add_cell(
        self,
        position: int,
        at: int,
        wanted: bytes,
        got: bytes,
        poison: bytes | None,
        before: bytes | None,
    ) -> None:
        one, other = wanted[at : at + CELL], got[at : at + CELL]
        if one == other:
            return
        difference = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
        changed = difference.to_bytes(len(one), "little")
        start = at + len(changed) - len(changed.lstrip(b"\0"))
        end = at + len(changed.rstrip(b"\0"))
        part = got[start:end]
        if poison is not None and part == poison[start:end]:
            kind = Mismatch.POISON
        elif not part.strip(b"\0"):
            kind = Mismatch.ZEROS
        elif before is not None and part == before[start:end]:
            kind = Mismatch.STALE
        else:
            kind = Mismatch.SHIFTED if self._shifted(part, start, wanted) else Mismatch.FOREIGN
        self.count(kind, len(changed) - changed.count(0), position + start)

    def count(self, kind: Mismatch, nbytes: int, position: int) -> None:
        """Count bytes that differ, the first of them at `position`."""
        self.counts[kind] = self.counts.get(kind, 0) + nbytes
        if self.first is None or position < self.first:
            self.first, self.kind = position, kind

    def _shifted(self, part: bytes, start: int, wanted: bytes) -> bool:
        if len(part) < _DISTINCT:
            return False
        for shift in self._shifts:
            if start + shift >= 0 and wanted.startswith(part, start + shift):
                return True
        if self._searches == _SEARCHES:
            return False
        self._searches += 1
        where = wanted.find(part)
        if where >= 0:
            self._shifts.append(where - start)
        return where >= 0

    def __str__(self) -> str:
        """Return such as `4096 bytes unchanged, 512 bytes zeros`, most bytes first."""
        most = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{nbytes} bytes {kind}" for kind, nbytes in most)

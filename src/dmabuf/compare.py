"""Comparing bytes, and telling what kind of wrong those are that differ: pure.

The kinds are those that hardware and drivers are known for. A completion that moved nothing leaves
the poison; a mapping to the wrong pages shows something else, often zeros; caches that are not
coherent show what was there before; a wrong offset shows the right bytes in the wrong place.
"""

from __future__ import annotations

import enum

CELL = 512
"""Bytes that are judged at once: the smallest block of storage."""
_SEARCHES = 8  # for bytes that are in the wrong place; further ones are only tried at known shifts
_DISTINCT = 16  # fewer bytes than this are found somewhere by chance


class Mismatch(enum.StrEnum):
    """What kind of wrong the bytes are that differ."""

    POISON = "unchanged poison"
    """What was put there before the transfer to see whether it would arrive."""
    STALE = "stale"
    """What the place held before."""
    ZEROS = "zeros"
    """Zeros, where others belong."""
    FOREIGN = "foreign"
    """From nowhere that is known."""
    SHIFTED = "shifted"
    """The right bytes in the wrong place."""
    OUTSIDE = "outside"
    """Bytes beside the range were changed."""


def first_difference(one: bytes, other: bytes) -> int:
    """The index of the first byte that differs, of two equally long that do."""
    low, high = 0, len(one)  # equal before `low`, different somewhere before `high`
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


class Findings:
    """What was found to differ in one comparison, piece by piece."""

    def __init__(self) -> None:
        self.counts: dict[Mismatch, int] = {}
        """Bytes that differ, by kind."""
        self.first: int | None = None
        """The position of the first of them."""
        self.kind: Mismatch | None = None
        """The kind of the first of them."""
        self._shifts: list[int] = []
        self._searches = 0

    @property
    def wrong(self) -> int:
        """Bytes that differ."""
        return sum(self.counts.values())

    def add(
        self,
        position: int,
        wanted: bytes,
        got: bytes,
        poison: bytes | None = None,
        before: bytes | None = None,
    ) -> bool:
        """Compare a piece that stands at `position`; True where all of it is the same.

        `poison` and `before` are what the place held, as long as the piece, where that is known.
        """
        if wanted == got:
            return True
        if len(wanted) != len(got):
            raise ValueError(f"{len(wanted)} and {len(got)} bytes cannot be compared")
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
        """Note bytes that differ, the first of them at `position`."""
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
        """Such as `4096 bytes unchanged poison, 512 bytes zeros`, the most first."""
        most = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{nbytes} bytes {kind}" for kind, nbytes in most)

"""Compare bytes and classify those that differ. These functions have no side effects.

The kinds match known faults of hardware and drivers. A completion that moved nothing leaves the
poison; a mapping to the wrong pages shows other bytes, often zeros; caches that are not coherent
show the old bytes; a wrong offset shows the right bytes in the wrong place.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

CELL = 512
"""Bytes that are classified at once: the smallest block of storage."""
PAGE = 4096
"""Bytes that arrive whole: a part of them is `partial`, and a multiple of them `misdirected`."""
MOST_RUNS = 32
"""The maximum runs that are kept for a report."""
SAMPLE = 32
"""Bytes of the beginning of a run that are kept."""
_SEARCHES = 8  # searches for shifted bytes; after them only known shifts are tried
_DISTINCT = 16  # fewer bytes than this would match somewhere by chance


class Mismatch(enum.StrEnum):
    """The kind of bytes that differ."""

    POISON = "unchanged"
    """Bytes that the audit wrote before the transfer: nothing of the page arrived."""
    PARTIAL = "partial"
    """The same, where another part of the page arrived."""
    STALE = "stale"
    """Bytes that were there before."""
    ZEROS = "zeros"
    """Zeros instead of other bytes."""
    SHIFTED = "shifted"
    """The right bytes in the wrong place, at a distance that is not whole pages."""
    MISDIRECTED = "misdirected"
    """Bytes that belong to, or went to, a place whole pages away or outside the range."""
    FOREIGN = "foreign"
    """Bytes of unknown origin."""
    OUTSIDE = "outside"
    """Changed bytes outside the range."""


class Run(NamedTuple):
    """Bytes of one kind, one behind the other."""

    position: int
    size: int
    """From the first byte that differs to the last."""
    wrong: int
    """How many of them differ."""
    kind: Mismatch
    distance: int | None
    """How many bytes further on the place is where these bytes belong or went; None if unknown."""
    wanted: bytes
    """The first bytes that belong here."""
    got: bytes
    """The first bytes that are here."""

    def __str__(self) -> str:
        """Return such as `4096 bytes unchanged at 8192`."""
        text = f"{self.size} bytes {self.kind} at {self.position}"
        return text if self.distance is None else f"{text}, by {self.distance:+} bytes"


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
        self.runs: list[Run] = []
        """The first runs of one kind, at most MOST_RUNS."""
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
        for page in range(first_difference(wanted, got) // PAGE * PAGE, len(wanted), PAGE):
            cells = range(page, min(page + PAGE, len(wanted)), CELL)
            found = [self._classify(at, wanted, got, poison, before) for at in cells]
            arrived = any(
                run is None or run.size < min(CELL, len(wanted) - at) - _DISTINCT
                for at, run in zip(cells, found, strict=True)
            )
            for run in found:
                if run is not None:
                    if run.kind is Mismatch.POISON and arrived:
                        run = run._replace(kind=Mismatch.PARTIAL)
                    run = run._replace(position=position + run.position)
                    self.count(run.kind, run.wrong, run.position)
                    self._keep(run)
        return False

    def _classify(
        self, at: int, wanted: bytes, got: bytes, poison: bytes | None, before: bytes | None
    ) -> Run | None:
        """Return the bytes of a cell that differ, at their place in the piece; None if none do."""
        one, other = wanted[at : at + CELL], got[at : at + CELL]
        if one == other:
            return None
        difference = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
        changed = difference.to_bytes(len(one), "little")
        start = at + len(changed) - len(changed.lstrip(b"\0"))
        end = at + len(changed.rstrip(b"\0"))
        part, distance = got[start:end], None
        if poison is not None and part == poison[start:end]:
            kind = Mismatch.POISON
        elif not part.strip(b"\0"):
            kind = Mismatch.ZEROS
        elif before is not None and part == before[start:end]:
            kind = Mismatch.STALE
        else:
            distance = self._shift(part, start, wanted)
            kind = Mismatch.FOREIGN
            if distance is not None:
                kind = Mismatch.SHIFTED if distance % PAGE else Mismatch.MISDIRECTED
        wrong = len(changed) - changed.count(0)
        samples = wanted[start:end][:SAMPLE], part[:SAMPLE]
        return Run(start, end - start, wrong, kind, distance, *samples)

    def _shift(self, part: bytes, start: int, wanted: bytes) -> int | None:
        """Return how far from `start` the place is where bytes belong; None if there is none."""
        if len(part) < _DISTINCT:
            return None
        for shift in self._shifts:
            if start + shift >= 0 and wanted.startswith(part, start + shift):
                return shift
        if self._searches == _SEARCHES:
            return None
        self._searches += 1
        where = wanted.find(part)
        if where < 0:
            return None
        self._shifts.append(where - start)
        return where - start

    def look_for(self, find: Callable[[Run], int | None]) -> None:
        """Recognise bytes that did not arrive, and lie elsewhere.

        `find` returns how far from their place the first bytes of a run are; None if nowhere.
        """
        for number, run in enumerate(self.runs[:_SEARCHES]):
            here = run.kind in (Mismatch.POISON, Mismatch.PARTIAL, Mismatch.STALE)
            distance = find(run) if here and len(set(run.wanted)) >= _DISTINCT else None
            if distance is None:
                continue
            kind = Mismatch.MISDIRECTED
            self.runs[number] = run._replace(kind=kind, distance=distance)
            self.counts[run.kind] -= run.wrong
            self.counts[kind] = self.counts.get(kind, 0) + run.wrong
            self.kind = kind if run.position == self.first else self.kind
        self.counts = {kind: count for kind, count in self.counts.items() if count}

    def count(self, kind: Mismatch, nbytes: int, position: int) -> None:
        """Count bytes that differ, the first of them at `position`."""
        self.counts[kind] = self.counts.get(kind, 0) + nbytes
        if self.first is None or position < self.first:
            self.first, self.kind = position, kind

    def _keep(self, run: Run) -> None:
        """Keep a run for the report, as one with the last if it continues it."""
        last = self.runs[-1] if self.runs else None
        # A few bytes between the two may be right by chance.
        same = last and (last.kind, last.distance) == (run.kind, run.distance)
        if last and same and 0 <= run.position - last.position - last.size < _DISTINCT:
            size, wrong = run.position + run.size - last.position, last.wrong + run.wrong
            self.runs[-1] = last._replace(size=size, wrong=wrong)
            return
        if len(self.runs) < MOST_RUNS:
            self.runs.append(run)

    def __str__(self) -> str:
        """Return such as `4096 bytes unchanged, 512 bytes zeros`, most bytes first."""
        most = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{nbytes} bytes {kind}" for kind, nbytes in most)

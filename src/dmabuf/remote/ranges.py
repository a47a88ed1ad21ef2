"""Ranges of files and memory, which are cut where a message, a block or a limit ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Range = tuple[int, ...]
"""Where some bytes are, such as their offsets in a file and in a buffer, and then their size."""


class Ranges:
    """Ranges that are taken one after the other, in pieces of any size."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._left = iter(ranges)
        self._begun: Range | None = None

    def take(self, size: int) -> list[Range]:
        """Return the ranges of the next bytes: `size` of them, or all that are left."""
        taken = list[Range]()
        while size and (one := self._begun or next(self._left, None)) is not None:
            *starts, length = one
            part = min(size, length)
            if part:
                taken.append((*starts, part))
            rest = (*(start + part for start in starts), length - part)
            self._begun = rest if part < length else None
            size -= part
        return taken

    def pieces(self, size: int) -> Iterator[list[Range]]:
        """Yield all ranges that are left, in pieces of `size` bytes; the last has fewer."""
        return iter(lambda: self.take(size), [])


def total(ranges: Iterable[Range]) -> int:
    """Return the bytes of all ranges."""
    return sum(one[-1] for one in ranges)

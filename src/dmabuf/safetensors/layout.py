"""Where in a buffer the tensors of a file go, and the segments that bring them there; no I/O.

Bytes travel best where file and buffer agree modulo a page: whole pages then go straight into the
buffer. So the pages that hold the wanted tensors keep their place within a page, neighbouring pages
become one segment, and the first and last page of a segment are read whole. A tensor that such a
place would leave unaligned (after an odd header, or a tensor of a smaller dtype) gets a segment of
its own at the next aligned place, together with the tensors after it that the same shift aligns.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from dmabuf.sizes import round_up

UNIT = max(mmap.PAGESIZE, 4096)
"""The size in bytes modulo which offsets in file and buffer agree."""


@dataclass(slots=True)
class _Run:
    """Bytes of the file that go to one range of the buffer."""

    start: int
    end: int
    align: int
    shift: int = 0


def place(
    wanted: Iterable[tuple[int, int, int]], file_size: int, begin: int
) -> tuple[array[int], list[int], int]:
    """Give each tensor of a file its place in the buffer, from `begin` on.

    Args:
        wanted: of each tensor, by ascending offset: the offset in the file, the size, and the
            alignment in the buffer, a power of two; in bytes.
        file_size: in bytes.
        begin: the first offset in the buffer that may be used.

    Returns:
        The segments for `File.read_segments`, the offset of each tensor in the buffer (0 for one
        without bytes), and the end of the segments in the buffer.
    """
    straight, shifted = [_Run(0, -1, UNIT)], [_Run(0, -1, 0)]  # each begins with one of no bytes
    taken: list[tuple[int, _Run | None]] = []
    for offset, nbytes, align in wanted:
        end = offset + nbytes
        if not nbytes:
            taken.append((0, None))
            continue
        if align <= UNIT and offset % align == 0:
            run, start = straight[-1], offset - offset % UNIT
            end = min(round_up(end, UNIT), file_size)
            if start > run.end:
                run = _Run(start, end, UNIT)
                straight.append(run)
        else:
            run = shifted[-1]
            if run.end != offset or align > run.align or (offset - run.start) % align:
                run = _Run(offset, end, align)
                shifted.append(run)
        run.end = max(end, run.end)
        taken.append((offset, run))
    segments = array("Q")
    at = begin
    for run in (*straight[1:], *shifted[1:]):
        at = round_up(at, run.align)
        segments.extend((run.start, at, run.end - run.start))
        run.shift = at - run.start
        at += run.end - run.start
    return segments, [run.shift + offset if run else 0 for offset, run in taken], at

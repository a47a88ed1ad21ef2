"""Where in a buffer the tensors of a file go, and the segments that bring them there; pure.

Bytes travel best where file and buffer agree modulo a page: then whole pages go straight into the
buffer. So the pages that hold the wanted tensors keep their place within a page, those beside each
other become one segment, and a segment's first and last page is read whole. A tensor that such a
place would leave unaligned (a writer with an odd header, a dtype after one of another size) gets a
segment of its own, at the next aligned place, together with those after it that its shift aligns.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from dmabuf.sizes import round_up

UNIT = max(mmap.PAGESIZE, 4096)
"""What file and buffer offsets agree by, in bytes."""


@dataclass(slots=True)
class Wanted:
    """A tensor of a file, as far as its place matters; in bytes."""

    offset: int
    nbytes: int
    align: int
    """What its place in the buffer is to be a multiple of: a power of two."""
    place: int = 0
    """Where in the buffer; set by `place`."""


@dataclass(slots=True)
class _Run:
    """Bytes of the file that go to one range of the buffer."""

    start: int
    end: int
    members: list[Wanted] = field(default_factory=list)


def place(wanted: Iterable[Wanted], file_size: int, begin: int) -> tuple[array[int], int]:
    """Give each tensor of a file its place, from `begin` on.

    Returns:
        The segments, as `File.read_segments` takes them, and where in the buffer they end.
    """
    straight: list[_Run] = []
    shifted: list[_Run] = []
    for one in sorted(wanted, key=lambda one: one.offset):
        if not one.nbytes:
            one.place = 0
        elif one.align <= UNIT and one.offset % one.align == 0:
            start = one.offset // UNIT * UNIT
            end = min(round_up(one.offset + one.nbytes, UNIT), file_size)
            if not straight or start > straight[-1].end:
                straight.append(_Run(start, end))
            straight[-1].end = max(end, straight[-1].end)
            straight[-1].members.append(one)
        elif shifted and _follows(shifted[-1], one):
            shifted[-1].end += one.nbytes
            shifted[-1].members.append(one)
        else:
            shifted.append(_Run(one.offset, one.offset + one.nbytes, [one]))
    segments = array("Q")
    at = begin
    for runs in (straight, shifted):
        for run in runs:
            at = round_up(at, UNIT if runs is straight else run.members[0].align)
            segments.extend((run.start, at, run.end - run.start))
            for one in run.members:
                one.place = at + one.offset - run.start
            at += run.end - run.start
    return segments, at


def _follows(run: _Run, one: Wanted) -> bool:
    """Whether the tensor can come right after a run and is aligned there."""
    first = run.members[0]
    return (
        run.end == one.offset
        and one.align <= first.align
        and (one.offset - run.start) % one.align == 0
    )

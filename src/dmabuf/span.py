"""The ranges of a file and a buffer that a transfer covers, checked before anything is touched."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from dmabuf._ffi import failure, ffi, lib
from dmabuf.buffer import Buffer
from dmabuf.route import Direction
from dmabuf.sizes import OFFSET_MAX

_WANTED = (
    "segments: a buffer of native unsigned 8-byte integers, flat or of shape (n, 3), such as "
    "array('Q') or a NumPy uint64 array"
)


class Span(NamedTuple):
    """Segments, and what they reach from and to; all in bytes."""

    segments: Any
    """uint64_t[], three for each segment: file offset, buffer offset, size; neighbours joined."""
    count: int  # type: ignore[assignment] # of segments; hides what tuples count with
    nbytes: int
    file_start: int
    file_end: int
    buffer_start: int
    buffer_end: int
    whole: bool = False
    """Whether a read that meets the end of the file is an error, as it is for segments."""
    asked: Any = None
    """uint64_t[], the segments as the caller gave them; None for one range."""

    @property
    def file_size(self) -> int:
        """From the first byte of the file to the last."""
        return self.file_end - self.file_start

    @property
    def buffer_size(self) -> int:
        """From the first byte of the buffer to the last."""
        return self.buffer_end - self.buffer_start

    def file_ranges(self) -> list[tuple[int, int]]:
        """Return where in the file each segment begins and ends."""
        numbers = memoryview(ffi.buffer(self.segments, 24 * self.count)).cast("Q")
        offsets, sizes = numbers[0::3].tolist(), numbers[2::3].tolist()
        return [(start, start + size) for start, size in zip(offsets, sizes, strict=True)]

    def file_reached(self, nbytes: int) -> int:
        """How far in the file the first `nbytes` of the segments reach; 0 for none of them."""
        reached = 0
        for i in range(self.count):
            if nbytes <= 0:
                break
            offset, size = self.segments[3 * i], self.segments[3 * i + 2]
            reached = max(reached, offset + min(size, nbytes))
            nbytes -= size
        return reached

    def asked_index(self, nbytes: int) -> int:
        """Return the index of the caller's segment that holds the byte after the first `nbytes`."""
        sizes = () if self.asked is None else range(2, len(self.asked), 3)
        for index, at in enumerate(sizes):
            if nbytes < self.asked[at]:
                return index
            nbytes -= self.asked[at]
        return 0

    def file_offset(self, nbytes: int) -> int:
        """Where in the file the byte after the first `nbytes` of the segments lies."""
        for i in range(self.count):
            offset, size = self.segments[3 * i], self.segments[3 * i + 2]
            if nbytes < size:
                return int(offset + nbytes)
            nbytes -= size
        return self.file_end


def single(buffer: Buffer, file_offset: int, buffer_offset: int, size: int) -> Span:
    """One range.

    Raises:
        ValueError: it leaves the buffer or the largest file offset.
    """
    buffer._check_range(buffer_offset, size)
    if file_offset > OFFSET_MAX - size:
        raise ValueError(
            f"file_offset={file_offset} + size={size} is past the largest file offset, 2^63-1"
        )
    segments = ffi.new("uint64_t[3]", (file_offset, buffer_offset, size))
    return Span(
        segments, 1, size, file_offset, file_offset + size, buffer_offset, buffer_offset + size
    )


@contextmanager
def many(
    buffer: Buffer, segments: Any, direction: Direction, *, join: bool = True
) -> Iterator[Span]:
    """An array of ranges, which is held, so that it cannot be resized, until the block ends.

    Ranges that follow each other in the file and in the buffer are joined, unless `join` is false.

    Raises:
        TypeError, ValueError: it is no array of triples, or one of them is wrong; says which.
    """
    view = _as_triples(segments)
    count = view.nbytes // 24
    with view, ffi.from_buffer("uint64_t[]", view) as array:
        bad = ffi.new("size_t *")
        rc = lib.dmb_segments_check(array, count, buffer.size, direction == "write", bad)
        if rc:
            raise _refusal(-rc, bad[0], array, buffer)
        bounds = ffi.new("struct dmb_bounds *")
        lib.dmb_segments_bounds(array, count, bounds)
        moved, left = array, count
        if join and (left := lib.dmb_segments_join(array, count, ffi.NULL)) < count:
            moved = ffi.new("uint64_t[]", 3 * left)
            lib.dmb_segments_join(array, count, moved)
        yield Span(
            moved,
            left,
            bounds.nbytes,
            bounds.file_start,
            bounds.file_end,
            bounds.buffer_start,
            bounds.buffer_end,
            whole=True,
            asked=array,
        )


def _as_triples(segments: Any) -> memoryview:
    try:
        view = memoryview(segments)
    except TypeError:
        raise TypeError(f"{_WANTED}, not {type(segments).__name__}") from None
    if view.format.lstrip("@=") not in ("Q", "L") or view.itemsize != 8:
        raise TypeError(f"{_WANTED}, not one of format {view.format!r}")
    if not view.c_contiguous:
        raise TypeError(f"{_WANTED}, contiguous in memory")
    shape = view.shape or ()
    flat = len(shape) == 1 and shape[0] % 3 == 0
    if not flat and not (len(shape) == 2 and shape[1] == 3):
        raise ValueError(f"{_WANTED}, not of shape {shape}")
    return view


def _refusal(error: int, index: int, array: Any, buffer: Buffer) -> Exception:
    offset, start, size = array[3 * index : 3 * index + 3]
    which = f"segment {index} (file offset {offset}, buffer offset {start}, size {size})"
    if error == errno.ERANGE:
        return ValueError(
            f"{which} leaves the buffer of {buffer.size} bytes or the largest file offset, 2^63-1"
        )
    if error == errno.EEXIST:
        return ValueError(f"{which} overlaps another in the file: the outcome would be chance")
    return failure(error, "checking the segments")

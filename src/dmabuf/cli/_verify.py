"""Reading a target back from its device, and comparing every byte with the source."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from dmabuf import exporters
from dmabuf.buffer import Buffer
from dmabuf.compare import first_difference
from dmabuf.errors import IntegrityError, RouteUnavailable
from dmabuf.file import File
from dmabuf.route import Route

_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """The record of a comparison in which every byte was the same."""

    nbytes: int
    uncached: bool
    """Whether the target was read past the page cache, so from the device."""
    reason: str
    """How it was read, or why not past the page cache."""
    seconds: float


def compare(
    source: File,
    source_offset: int,
    target: File,
    target_offset: int,
    nbytes: int,
    *,
    exporter: str = "auto",
    progress: Callable[[int], object] = lambda done: None,
) -> Verified:
    """Compare `nbytes` of two files.

    Raises:
        IntegrityError: a byte differs, or the target ends early; names its offset.
    """
    begun = time.perf_counter()
    os.fdatasync(target.fileno())
    size = min(_BLOCK, max(nbytes, 1))
    refusal, done = None, 0
    with (
        exporters.allocate(size, exporter=exporter) as expected,
        exporters.allocate(size, exporter=exporter) as found,
    ):
        while done < nbytes:
            part = min(size, nbytes - done)
            source.read_into(expected, part, file_offset=source_offset + done)
            got, why = read_back(target, found, part, target_offset + done)
            refusal = refusal or why
            _check(target, expected, found, part, got, target_offset + done)
            done += part
            progress(done)
    reason = refusal or "read back from the device, past the page cache"
    return Verified(nbytes, refusal is None, reason, time.perf_counter() - begun)


def read_back(target: File, buffer: Buffer, size: int, offset: int) -> tuple[int, str | None]:
    """Read a part of the target past the page cache; the bytes read, and why if not that way."""
    try:
        record = target.read_into(buffer, size, file_offset=offset, require="uncached")
    except RouteUnavailable:
        why = target.plan(buffer, "read", size=size, file_offset=offset).rejected
        text = why.get(Route.STAGED) or why.get(Route.DIRECT) or "no route past it"
        # What is clean in the cache is dropped; tmpfs has nothing but the cache.
        os.posix_fadvise(target.fileno(), offset, size, os.POSIX_FADV_DONTNEED)
        record = target.read_into(buffer, size, file_offset=offset)
        return record.nbytes, f"flushed, dropped from the page cache, and read through it: {text}"
    return record.nbytes, None


def _check(target: File, expected: Buffer, found: Buffer, size: int, got: int, offset: int) -> None:
    if got < size:
        text = f"read back, it ends at {offset + got}: {size - got} bytes short"
        raise IntegrityError(text, str(target.name), offset=offset + got)
    wanted, seen = expected.pread(size, 0), found.pread(size, 0)
    if wanted == seen:
        return
    at = first_difference(wanted, seen)
    text = (
        f"read back, it differs from the source at offset {offset + at}: 0x{seen[at]:02x} and not "
        f"0x{wanted[at]:02x}"
    )
    raise IntegrityError(text, str(target.name), offset=offset + at)

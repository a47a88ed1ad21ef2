"""Lone small requests: one aligned range of a known file and buffer, in one pread or pwrite.

Most of a small request's time would go into the thought that a large one is worth. So what is
known of a file and a buffer after the first transfers is kept as a *lane*, which the core checks
a request against before it moves it. What a lane does not take (edges, the end of the file, a fence
that has not signalled, an error) goes the long way, which finds out why.
"""

from __future__ import annotations

from threading import get_ident
from time import perf_counter
from typing import Any

from dmabuf import _process, audit
from dmabuf._ffi import ffi, lib
from dmabuf.buffer import Buffer
from dmabuf.engine import NOT_AUDITED, Draft, Transfer
from dmabuf.route import ALLOWED, WHY_CHOSEN, Direction, Prefer, Require, Route
from dmabuf.sizes import Size
from dmabuf.target import Target

BYTES = 1 << 20
"""A request of at most so many bytes: for a larger one a ring is worth its cost."""
LANES = 64
"""A file remembers so many lanes."""
_DIRECT = Route.DIRECT
_ALONE = "no ring was used: one small request"


def permitted(
    require: Require, route: Route | str | None, prefer: Prefer, asked: audit.Audit
) -> bool:
    """Whether what is asked for permits a lone request."""
    if route is not None and route != Route.DIRECT:
        return False
    return prefer == "zero-copy" and asked in ("first", "off") and require in ALLOWED


class Lane:
    """The core's lane, and what the records of its transfers say."""

    __slots__ = ("_reason", "_rejected", "core", "slabs")

    def __init__(self, core: Any, slabs: Any, reason: str, no_native: str) -> None:
        self.core = core
        self.slabs = slabs  # which the core reads
        self._reason = reason
        self._rejected = {Route.NATIVE: no_native}

    def record(
        self,
        size: int,
        route: Route | str | None,
        asked: audit.Audit,
        begun: float,
        registration: str = _ALONE,
    ) -> Transfer:
        """The record of a request that moved all of its `size` bytes."""
        record: Any = Draft()
        record.nbytes = size
        record.route = _DIRECT
        record.reason = self._reason
        record.rejected = {} if route else self._rejected.copy()
        record.registered = False
        record.registration = registration
        record.seconds = perf_counter() - begun
        record.requests = 1
        record.reissues = record.copied = 0
        record.audited = NOT_AUDITED if asked == "first" else audit.OFF
        record.__class__ = Transfer
        return record  # type: ignore[no-any-return]


def lane(target: Target, buffer: Buffer, direction: Direction) -> Lane | None:
    """The lane for a request, made where there may be one; None where it goes the long way.

    The caller's token is in `target.lone` and `buffer._lone`, so nothing is closed from here on.
    Its numbers are plain ints: the long way knows which of all others to refuse.
    """
    number, engine = buffer._lone_number, target.engine
    if number is None or target._closed or engine._closed or target.pid != _process.pid:
        return None
    if (owner := engine._owner) is not None and owner != get_ident():  # check_usable says so
        return None
    lanes, key = target.lanes, number if direction == "read" else ~number
    found = lanes.get(key)
    if found is None:
        found = _make(target, buffer, direction)
        if found is not None:
            if len(lanes) >= LANES:  # of buffers that are gone, most likely
                lanes.clear()
            lanes[key] = found
    return found


def _make(target: Target, buffer: Buffer, direction: Direction) -> Lane | None:
    direct, write = target.direct_if_proven(), direction == "write"
    if (
        direct is None
        or (write and direct.no_writes)
        or buffer._pin_refusal is not None
        or buffer._address is None
    ):
        return None
    if not (target.writable if write else target.readable and buffer._descriptor_writable):
        return None
    no_native = target.no_native(buffer)
    if no_native is None:
        return None
    slabs = [slab.fd for slab in buffer.slabs] if buffer.is_dmabuf else []
    kept = ffi.new("int32_t[]", slabs) if slabs else ffi.NULL
    align = direct.alignment
    core = ffi.new(
        "struct dmb_lane *",
        {
            "fd": direct.fd,
            "direction": lib.DMB_WRITE if write else lib.DMB_READ,
            "unit": align.offset,
            "memory_align": align.memory,
            "most": BYTES,
            "base": buffer._address,
            "size": buffer.size,
            "file_size": 0 if target.kind == "file" else target.size(),
            "slabs": kept,
            "slab_size": buffer.slabs[0].size,
            "stale_cache": direct.stale_cache,
        },
    )
    return Lane(core, kept, WHY_CHOSEN[direction, Route.DIRECT], no_native)


def move(
    target: Target,
    buffer: Buffer,
    direction: Direction,
    size: Size,
    offset: Size | None,
    start: Size,
    fence: bool,
    route: Route | str | None,
    asked: audit.Audit,
    begun: float,
) -> Transfer | None:
    """Move a range by a lane; None where it has to go the long way, and nothing was moved."""
    if buffer.__class__ is not Buffer:
        return None
    if not (type(size) is type(start) is int and (offset is None or type(offset) is int)):
        return None
    token = object()
    try:
        target.lone.add(token)
        try:
            buffer._lone.add(token)
            found = lane(target, buffer, direction)
            if found is None:
                return None
            try:
                if not lib.dmb_lane_move(found.core, offset or 0, start, size, fence):
                    return None
            except (TypeError, OverflowError):  # negative, or no truth: the long way says so
                return None
        finally:
            buffer._lone.discard(token)
    finally:
        target.lone.discard(token)
        if target._closed:
            target.left()
    return found.record(size, route, asked, begun)

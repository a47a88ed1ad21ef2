"""A transfer: planned from facts, run by the engine, and judged by what came of it.

Where the kernel refuses what the plan rests on (EFAULT: the pages cannot be pinned; EINVAL: the
alignment was a guess), the fact is remembered and the transfer planned again, within what
`require=` permits. Moving the same bytes to the same place twice does no harm.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dmabuf import facts, stream
from dmabuf._ffi import failure, lib
from dmabuf.buffer import Buffer
from dmabuf.engine import Job, Outcome, Transfer
from dmabuf.errors import RouteUnavailable, ShortReadError, os_error
from dmabuf.route import (
    ALLOWED,
    WHY_CHOSEN,
    Direction,
    Plan,
    Prefer,
    Question,
    Require,
    Route,
    choose,
)
from dmabuf.span import Span
from dmabuf.target import Target

_LONE_BYTES = 1 << 20
"""One aligned request of at most so many bytes goes by pread or pwrite: a ring gains nothing."""
_MOSTLY_CACHED = 0.9
"""The part of a range that has to be in the page cache for prefer="fastest" to take it there."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a caller asked for."""

    direction: Direction
    buffer: Buffer
    span: Span
    require: Require
    route: Route | str | None
    prefer: Prefer = "zero-copy"
    sync: bool = False
    timeout: float | None = None


_NOTHING = Outcome(
    nbytes=0,
    copied=0,
    straight=0,
    requests=0,
    reissues=0,
    error=0,
    failed_straight=False,
    error_offset=0,
    short_segment=-1,
    registered=False,
    registration="no ring was used",
    interruption=None,
)


# -- planning


def plan(target: Target, order: Order) -> Plan:
    """The route that the order would take now, and why.

    Raises:
        RouteUnavailable: no permitted route is possible.
    """
    question = _question(target, order)
    return choose(question, require=order.require, route=order.route, path=target.path)


def _question(target: Target, order: Order) -> Question:
    if order.prefer not in ("zero-copy", "fastest"):
        raise ValueError(f"prefer={order.prefer!r}: 'zero-copy' or 'fastest'")
    buffer = order.buffer
    question = Question(order.direction, stream=target.stream, no_pinning=buffer._pin_refusal)
    if buffer._address is None:
        question = replace(question, no_mapping=buffer._map_refusal)
    if question.no_mapping or question.stream:
        return question
    direct = target.direct()
    if direct.refusal:
        return replace(question, no_direct_io=direct.refusal)
    if order.prefer == "fastest" and _is_cached(target, order.span):
        text = "the range is in the page cache, and prefer='fastest' takes it from there"
        return replace(question, cached=text)
    return _about_the_middle(target, order, question)


def _is_cached(target: Target, span: Span) -> bool:
    pages = target.cached_pages(span.file_start, span.file_size)
    return pages is not None and pages * facts.PAGE >= span.file_size * _MOSTLY_CACHED


def _about_the_middle(target: Target, order: Order, question: Question) -> Question:
    job = _job(target, order, Route.DIRECT)
    without, count = job.without_middle(), order.span.count
    if without < count:
        if without:
            text = f"{without} of the {count} segments have nothing that can go straight"
            question = replace(question, some_without_middle=text)
        return question
    staged = replace(job, route=Route.STAGED).without_middle()
    text = _why_no_middle(job, order.span, staged)
    return replace(question, no_middle=text, no_block=text if staged == count else None)


def _why_no_middle(job: Job, span: Span, staged: int) -> str:
    unit = max(job.offset_align, job.page) if job.write else job.offset_align
    if staged == span.count:
        return (
            f"nothing of it is a whole page of the file ({unit} bytes), and only whole ones may be "
            "written past the page cache"
        )
    first, last = -(-span.file_start // unit) * unit, span.file_end // unit * unit
    if span.count == 1 and (first >= last or first >= job.file_size // unit * unit):
        return (
            f"nothing of it is a whole block of the file ({unit} bytes) before the one that holds "
            "its end"
        )
    return (
        "file offset and memory address differ modulo the alignment that O_DIRECT asks for "
        f"({job.offset_align} bytes in the file, {job.memory_align} in memory): move the buffer "
        "offset"
    )


def _job(target: Target, order: Order, route: Route) -> Job:
    direct, span = target.direct(), order.span
    return Job(
        buffer=order.buffer,
        segments=span.segments,
        count=span.count,
        nbytes=span.nbytes,
        buffer_start=span.buffer_start,
        buffer_end=span.buffer_end,
        fd=target.fd if route is Route.BUFFERED else direct.fd,
        edge_fd=target.fd,
        offset_align=direct.alignment.offset,
        memory_align=direct.alignment.memory,
        page=facts.PAGE,
        file_size=target.size(),
        write=order.direction == "write",
        route=route,
        path=target.path,
    )


# -- running


def carry_out(target: Target, order: Order, begun: float) -> Transfer:
    """Run an order to its end; `begun` is when the caller was called, by perf_counter."""
    if target.stream is not None:
        return _carry_stream(target, order, begun)
    transfer = _lone(target, order, begun)
    if transfer is None and order.direction == "read":
        return _carry(target, order, begun)
    if transfer is None:
        plan(target, order)  # before the file is touched: no route leaves it as it was
        with _grown(target, order.span):
            transfer = _carry(target, order, begun)
    if order.sync:
        _sync(target)
        transfer = replace(transfer, seconds=time.perf_counter() - begun)
    return transfer


def _lone(target: Target, order: Order, begun: float) -> Transfer | None:
    """One small aligned request, by pread or pwrite: no ring, and no more thought than it takes.

    None where the order is anything else, or the request did not go through: then the long way
    says why.
    """
    span, buffer, write = order.span, order.buffer, order.direction == "write"
    if not 0 < span.nbytes <= _LONE_BYTES or span.count != 1 or order.prefer != "zero-copy":
        return None
    if order.route not in (None, Route.DIRECT) or order.require not in ALLOWED:
        return None
    direct = target.direct_if_proven()
    if direct is None or buffer._pin_refusal is not None or buffer._address is None:
        return None
    unit = max(direct.alignment.offset, facts.PAGE) if write else direct.alignment.offset
    address = buffer._address + span.buffer_start
    if span.file_start % unit or span.nbytes % unit or address % direct.alignment.memory:
        return None
    if span.file_end > target.size() // unit * unit:
        return None
    rc = lib.dmb_lone(write, direct.fd, address, span.nbytes, span.file_start)
    if rc != span.nbytes:
        return None
    return Transfer(
        nbytes=span.nbytes,
        route=Route.DIRECT,
        reason=WHY_CHOSEN[order.direction, Route.DIRECT],
        rejected={},
        registered=False,
        registration="no ring was used: one small request",
        seconds=time.perf_counter() - begun,
        requests=1,
        reissues=0,
        copied=0,
    )


def _carry(target: Target, order: Order, begun: float) -> Transfer:
    while True:
        chosen = plan(target, order)
        if order.span.nbytes == 0:
            return _record(chosen, chosen.route, chosen.reason, _NOTHING, begun)
        known = target.direct().refusal
        outcome = _run(target, order, chosen)
        if outcome.interruption is not None:
            raise _telling(outcome.interruption, outcome.nbytes)
        if not outcome.error or not _learn(target, order, chosen, outcome):
            break
    if outcome.error:
        raise _failure(target, order, outcome)
    if outcome.short_segment >= 0 and order.span.count != 1:
        text = f"{target.path} ends inside segment {outcome.short_segment}"
        raise ShortReadError(text, outcome.short_segment, outcome.nbytes)
    route, reason = _judge(target, order, chosen, outcome, known)
    return _record(chosen, route, reason, outcome, begun)


def _run(target: Target, order: Order, chosen: Plan) -> Outcome:
    job, span = _job(target, order, chosen.route), order.span
    watch = chosen.route is not Route.BUFFERED and target.cache_to_watch(
        span.file_start, span.file_size
    )
    if chosen.route is Route.DIRECT and _all_straight(job):
        outcome = target.engine.run(job)
    else:
        # READ too for a read: what is copied may begin and end within a cache line.
        with order.buffer._cpu_access(True, not job.write, span.buffer_start, span.buffer_size):
            outcome = target.engine.run(job)
    if watch and not outcome.error:
        target.saw_cache(span.file_start, span.file_size)
    return outcome


def _all_straight(job: Job) -> bool:
    """Whether it is one range without edges, so that no CPU touches the buffer."""
    if job.count != 1:
        return False
    offset, start, size = job.segments[0], job.segments[1], job.segments[2]
    unit = max(job.page, job.offset_align) if job.write else job.offset_align
    if offset % unit or size % unit or (job.address + start) % job.memory_align:
        return False
    return job.write or bool(offset + size <= job.file_size // unit * unit)


def _learn(target: Target, order: Order, chosen: Plan, outcome: Outcome) -> bool:
    """Whether an error says that the route cannot be had here, rather than that I/O failed."""
    if chosen.route is Route.BUFFERED:
        return False
    if outcome.error == errno.EFAULT and outcome.failed_straight:
        order.buffer._pin_refusal = (
            "the kernel cannot pin the pages behind the buffer's mapping (EFAULT on O_DIRECT): "
            "allocate a udmabuf or memfd for zero-copy"
        )
        return True
    return target.learn_from(outcome.error)


def _judge(
    target: Target, order: Order, chosen: Plan, outcome: Outcome, known: str | None
) -> tuple[Route, str]:
    """The route that was taken in truth, by what the middle did, and why."""
    refusal = target.direct().refusal
    if chosen.route is not Route.BUFFERED and refusal and not known:
        route, reason = Route.BUFFERED, refusal
    elif chosen.route is Route.DIRECT and not outcome.straight:
        route, reason = Route.STAGED, "the file ended before its first whole block"
    else:
        return chosen.route, chosen.reason
    if route not in ALLOWED[order.require]:
        text = f"the bytes have moved, but by the {route} route: {reason}"
        raise RouteUnavailable(text, target.path, route=chosen.route)
    return route, reason


def _failure(target: Target, order: Order, outcome: Outcome) -> OSError:
    verb = "reading" if order.direction == "read" else "writing"
    text = (
        f"{verb} {order.span.nbytes} bytes from file offset {order.span.file_start} on failed at "
        f"file offset {outcome.error_offset}, after {outcome.nbytes} whole bytes"
    )
    error = failure(outcome.error, text, target.path)
    _telling(error, outcome.nbytes)
    return error


def _telling(error: Any, nbytes: int) -> Any:
    """The exception, with how many bytes were moved before it without a gap as its `nbytes`."""
    error.nbytes = nbytes
    return error


def _record(chosen: Plan, route: Route, reason: str, outcome: Outcome, begun: float) -> Transfer:
    return Transfer(
        nbytes=outcome.nbytes,
        route=route,
        reason=reason,
        rejected=chosen.rejected,
        registered=outcome.registered,
        registration=outcome.registration,
        seconds=time.perf_counter() - begun,
        requests=outcome.requests,
        reissues=outcome.reissues,
        copied=outcome.copied,
    )


# -- writing


@contextmanager
def _grown(target: Target, span: Span) -> Iterator[None]:
    """A regular file long enough for the write; cut back to what is whole if that fails."""
    old = target.size()
    if target.kind == "block device" and span.file_end > old:
        text = f"the device ends at {old}, and the write would reach {span.file_end}"
        raise os_error(errno.ENOSPC, text, target.path)
    if span.file_end <= old or not span.nbytes:
        yield
        return
    try:
        _allocate(target, max(old, span.file_start), span.file_end)
        yield
    except BaseException as error:
        os.ftruncate(target.fd, max(old, span.file_reached(getattr(error, "nbytes", 0))))
        raise


def _allocate(target: Target, start: int, end: int) -> None:
    """Growing first: a write that grows the file was seen at half the speed of one that does not.

    A filesystem without fallocate(2) gets the length alone.
    """
    rc = lib.dmb_fallocate(target.fd, start, end - start)
    if rc in (-errno.EOPNOTSUPP, -errno.ENOSYS):
        os.ftruncate(target.fd, end)
    elif rc:
        text = f"growing the file to {end} bytes, before anything was written"
        raise _telling(failure(-rc, text, target.path), 0)


def _sync(target: Target) -> None:
    try:
        os.fdatasync(target.fd)
    except OSError as error:
        text = f"flushing to the medium failed: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, target.path) from error


# -- streams


def _carry_stream(target: Target, order: Order, begun: float) -> Transfer:
    chosen = plan(target, order)
    span, buffer, read = order.span, order.buffer, order.direction == "read"
    with (
        buffer._cpu_access(True, read, span.buffer_start, span.nbytes),
        buffer._view(span.buffer_start, span.nbytes) as view,
    ):
        move = stream.read_all if read else stream.write_all
        done, requests = move(target.fd, view, order.timeout, target.path)
    outcome = replace(_NOTHING, nbytes=done, copied=done, requests=requests)
    return _record(chosen, chosen.route, chosen.reason, outcome, begun)

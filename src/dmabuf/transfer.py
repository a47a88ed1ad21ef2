"""A transfer: planned from facts, run by the engine, and judged by what came of it.

Where the kernel refuses what the plan rests on (EFAULT: the pages cannot be pinned; EINVAL: the
alignment was a guess), the fact is remembered and the transfer planned again, within what
`require=` permits. Moving the same bytes to the same place twice does no harm.
"""

from __future__ import annotations

import errno
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from dmabuf import audit, facts, fence, growth, nvme, stream
from dmabuf._ffi import failure
from dmabuf.buffer import Buffer
from dmabuf.engine import NOT_AUDITED, NOTHING, Job, Outcome, Transfer
from dmabuf.errors import IntegrityError, RouteUnavailable, ShortReadError, os_error
from dmabuf.route import (
    ALLOWED,
    Direction,
    Plan,
    Prefer,
    Question,
    Require,
    Route,
    choose,
)
from dmabuf.span import Span
from dmabuf.steps import Blocking, Fences, Steps, here
from dmabuf.target import GONE, Target

_WHY_NATIVE_FAILED = {
    errno.ENODEV: (
        "the device does not accept the dma-buf any more, although it was registered again: the "
        "device was removed, or its controller is reset again and again"
    ),
    errno.EAGAIN: (
        "its exporter went on moving the dma-buf (EAGAIN), until there was no use in asking again: "
        "something else wants the memory that it lies in"
    ),
}
"""What errors mean that only the native route has."""
_WHY_STALE = {
    errno.EBUSY: (
        "the page cache may keep old bytes of the written range (EBUSY): unmap the device "
        "elsewhere, or use another route"
    ),
}
"""What they mean once the native route has moved the bytes."""
RENEWALS = 16
"""How often a transfer registers its dma-buf again: a controller may be reset many times."""
_AFTER_RESETS = {
    errno.ENOENT: errno.ENODEV,
    errno.ENODEV: errno.ENODEV,
    errno.EIO: errno.EIO,
    errno.ECANCELED: errno.EIO,
}
"""What native requests answer after a controller reset, and the error where that does not end."""
_MOSTLY_CACHED = 0.9
"""The part of a range that has to be in the page cache for prefer="fastest" to take it there."""


class Order(NamedTuple):
    """What a caller asked for."""

    direction: Direction
    buffer: Buffer
    span: Span
    require: Require
    route: Route | str | None
    prefer: Prefer = "zero-copy"
    sync: bool = False
    timeout: float | None = None
    fence: bool = True
    audit: audit.Audit = "first"


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
        question = question._replace(no_mapping=buffer._map_refusal)
    if question.stream:
        return question
    if target.namespace is not None:
        _check_whole_blocks(target, order)
        text = "NVMe passthrough goes past the page cache: a passthrough device has none"
        question = question._replace(no_page_cache=text)
    direct = target.direct()
    refusal = direct.refusal or (direct.no_writes if order.direction == "write" else None)
    if refusal:
        return question._replace(no_direct_io=refusal)
    if not order.span.nbytes:
        return question._replace(no_native="nothing is asked for")
    question = _about_native(target, order, question)
    if order.prefer == "fastest" and _is_cached(target, order.span):
        text = "the range is in the page cache, and prefer='fastest' takes it from there"
        return question._replace(cached=text)
    return _about_the_middle(target, order, question)


def _check_whole_blocks(target: Target, order: Order) -> None:
    """Refuse a write of less than whole blocks: there is no page cache to complete them."""
    span = order.span
    if order.direction == "read":
        return
    if not _job(target, order, Route.DIRECT)._replace(memory_align=1).with_edges():
        return
    for i in range(span.count):
        offset, size = span.segments[3 * i], span.segments[3 * i + 2]
        target.check_write(offset, size)


def _about_native(target: Target, order: Order, question: Question) -> Question:
    """Whether the target moves this dma-buf itself; on kernels without, two comparisons."""
    if not order.buffer.is_dmabuf:
        return question._replace(no_native="the buffer is a memfd, which is no dma-buf")
    job = _job(target, order, Route.NATIVE)
    refusal = target.native_refusal(job)
    if refusal is not None:
        return question._replace(no_native=refusal)
    if question.no_mapping and job.with_edges():
        text = (
            f"part of it is no whole block of the file ({job.offset_align} bytes) at a buffer "
            f"offset that the device takes (a multiple of {job.memory_align}), and the CPU cannot "
            "map this dma-buf to move that part"
        )
        return question._replace(no_native_middle=text)
    all_of_it, some = _missing_middle(job, order.span)
    return question._replace(no_native_middle=all_of_it, some_without_native_middle=some)


def _missing_middle(job: Job, span: Span) -> tuple[str | None, str | None]:
    """Why nothing can go straight, or that some of the segments cannot."""
    # Nothing can go straight from an empty file: that many segments have a size.
    count = job._replace(write=False, file_size=0).without_middle()
    without = job.without_middle()
    if without == count:
        staged = job._replace(route=Route.STAGED).without_middle()
        return _why_no_middle(job, span, count, staged), None
    if without:
        return None, f"{without} of the {count} segments have nothing that can go straight"
    return None, None


def _is_cached(target: Target, span: Span) -> bool:
    pages = target.cached_pages(span.file_start, span.file_size)
    return pages is not None and pages * facts.PAGE >= span.file_size * _MOSTLY_CACHED


def _about_the_middle(target: Target, order: Order, question: Question) -> Question:
    job = _job(target, order, Route.DIRECT)
    all_of_it, some = _missing_middle(job, order.span)
    question = question._replace(no_middle=all_of_it, some_without_middle=some)
    if all_of_it is None or order.direction == "read":
        return question
    count = job._replace(write=False, file_size=0).without_middle()
    staged = job._replace(route=Route.STAGED).without_middle()
    return question._replace(no_block=all_of_it if staged == count else None)


def _why_no_middle(job: Job, span: Span, count: int, staged: int) -> str:
    unit = max(job.offset_align, job.page) if job.write else job.offset_align
    if staged == count:
        return (
            f"it does not begin and end at blocks of the file ({job.offset_align} bytes), and "
            f"holds no whole page ({unit} bytes) that may be written past the page cache"
        )
    end = span.file_end if job.write else min(span.file_end, job.file_size)
    if count == 1 and -(-span.file_start // unit) >= end // unit:
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
    job = Job(
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
        page=target.namespace.block if target.namespace else facts.PAGE,
        file_size=target.end(),
        write=order.direction == "write",
        route=route,
        path=target.path,
        by_workers=direct.by_workers,
        in_memory=direct.in_memory,
        on_zram=direct.on_zram,
        stale_cache=direct.stale_cache,
        namespace=target.namespace,
    )
    if route is Route.DIRECT and target.no_slots and job.off_the_block():
        return job._replace(no_slots=target.no_slots)
    return job


# -- running


# A transfer holds its file and its buffer by a token in a set of each. Python answers signals after
# a call has returned, and an exception there may skip what follows in the same block; so each token
# is added and taken away by one call, in a block of its own.


def carry_out(target: Target, order: Order, begun: float) -> Transfer:
    """Run an order to its end; `begun` is when the caller was called, by perf_counter."""
    token = object()
    try:
        target.lone.add(token)
        try:
            order.buffer._lone.add(token)
            check_usable(target, order)
            if target.stream is not None:
                return here(carry_stream(target, order, begun), target.engine)
            return here(carry(target, order, begun), target.engine)
        finally:
            order.buffer._lone.discard(token)
    finally:
        target.lone.discard(token)
        if target.closed:
            target.left()


def plan_only(target: Target, order: Order) -> Plan:
    """Return the route that the order would take now; moves nothing.

    Raises:
        RouteUnavailable: no permitted route is possible.
    """
    token = object()
    try:
        target.lone.add(token)
        try:
            order.buffer._lone.add(token)
            target.check_open()
            order.buffer._check_held()
            return plan(target, order)
        finally:
            order.buffer._lone.discard(token)
    finally:
        target.lone.discard(token)
        if target.closed:
            target.left()


def check_usable(target: Target, order: Order) -> None:
    """Raise unless the file and the buffer, which the caller holds, are open and all is valid."""
    target.check_open()
    order.buffer._check_held()
    fence.check_timeout(order.timeout)
    check_audit(target, order)


def carry(target: Target, order: Order, begun: float) -> Steps[Transfer]:
    """Plan an order, have it done step by step, and judge what came of it."""
    if order.direction == "read":
        return (yield from _carry(target, order, begun))
    # Before the file is touched: no route, or a wait in vain, leaves it as it was.
    yield from _await_fences(target, order, plan(target, order), begun)
    with ExitStack() as stack:
        grown = _grown(target, order.span)
        if grown is not None:
            yield Blocking(partial(stack.enter_context, grown))
        transfer = yield from _carry(target, order, begun)
    if order.sync:
        yield Blocking(target.flush)
        transfer = replace(transfer, seconds=time.perf_counter() - begun)
    return transfer


def _carry(target: Target, order: Order, begun: float) -> Steps[Transfer]:
    renewals, failed = 0, (0, -1)
    while True:
        chosen = plan(target, order)
        if order.span.nbytes == 0 or _starts_past_the_end(target, order):
            if order.span.nbytes and order.span.whole:
                first = order.span.asked_index(0)
                raise ShortReadError(f"{target.path} ends before segment {first}", first, 0)
            record = _record(chosen, chosen.route, chosen.reason, NOTHING, begun)
            return replace(record, audited=_not_audited(order, audit.NOTHING))
        yield from _await_fences(target, order, chosen, begun)
        known = target.direct().refusal
        outcome, audited = yield from _run_audited(target, order, chosen)
        if outcome.interruption is not None:
            raise _telling(outcome.interruption, outcome.nbytes)
        _check_there(target, order, chosen, outcome)
        if chosen.route is Route.NATIVE and outcome.failed_straight:
            before, failed = failed, (outcome.error, outcome.error_offset)
            if outcome.error in _AFTER_RESETS and renewals < RENEWALS:
                bad_medium = outcome.error == errno.EIO and failed == before
                renewals += 1
                if not bad_medium and target.engine.renew_native(order.buffer, target.direct().fd):
                    continue
            error = _AFTER_RESETS.get(outcome.error, outcome.error)
            outcome = outcome._replace(error=error)
        if not outcome.error or not _learn(target, order, chosen, outcome):
            break
    if outcome.error:
        raise _failure(target, order, chosen, outcome)
    if outcome.short_segment >= 0 and order.span.whole:
        index = order.span.asked_index(outcome.nbytes)
        text = f"{target.path} ends inside segment {index}"
        raise ShortReadError(text, index, outcome.nbytes)
    route, reason = _judge(target, order, chosen, outcome, known)
    return replace(_record(chosen, route, reason, outcome, begun), audited=audited)


def _starts_past_the_end(target: Target, order: Order) -> bool:
    """Whether it reads nothing: far past the end, whole blocks would leave the range of offsets."""
    if order.direction == "write" or order.span.count != 1:
        return False
    return order.span.file_start >= target.end()


def _run(target: Target, order: Order, chosen: Plan) -> Steps[Outcome]:
    job, span = _job(target, order, chosen.route), order.span
    watch = chosen.route is not Route.BUFFERED and target.cache_to_watch(
        span.file_start, span.file_size
    )
    if order.direction == "read" and target.hides_its_size():
        return (yield from _read_to_the_end(target, order))
    if chosen.route in ALLOWED["zero-copy"] and not job.with_edges():
        outcome = yield job
    else:
        # READ too for a read: what is copied may begin and end within a cache line.
        with order.buffer._cpu_access(True, not job.write, span.buffer_start, span.buffer_size):
            outcome = yield job
    assert outcome is not None
    if watch and not outcome.error:
        target.saw_cache(span.file_start, span.file_size)
    return outcome


def _read_to_the_end(target: Target, order: Order) -> Steps[Outcome]:
    """Read a file that hides its size, each segment until a read returns nothing."""
    span, outcome = order.span, NOTHING
    with order.buffer._cpu_access(True, True, span.buffer_start, span.buffer_size):
        for index in range(span.count):
            offset, start, size = span.segments[3 * index : 3 * index + 3]
            with order.buffer._view(start, size) as view:
                done, requests, error = yield from _read_at(target.fd, view, offset)
            outcome = outcome._replace(
                nbytes=outcome.nbytes + done,
                copied=outcome.copied + done,
                requests=outcome.requests + requests,
            )
            if error:
                return outcome._replace(error=error, error_offset=offset + done)
            if done < size:
                return outcome._replace(short_segment=index)
    return outcome


def _read_at(fd: int, view: memoryview, offset: int) -> Steps[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    yield Blocking(lambda: found.append(stream.read_at(fd, view, offset)))
    return found[0]


def _check_there(target: Target, order: Order, chosen: Plan, outcome: Outcome) -> None:
    """Raise ENODEV where the device is gone: the kernel says EIO, ENOSPC, or that the file ends."""
    if target.namespace is not None:
        gone = outcome.error == errno.ENODEV and not outcome.nvme_status
    else:
        gone = (bool(outcome.error) or outcome.short_segment >= 0) and target.gone()
    if gone:
        if not outcome.error:
            outcome = outcome._replace(error_offset=order.span.file_offset(outcome.nbytes))
        raise _failure(target, order, chosen, outcome._replace(error=errno.ENODEV), GONE)


def _learn(target: Target, order: Order, chosen: Plan, outcome: Outcome) -> bool:
    """Whether an error says that the route cannot be had here, rather than that I/O failed."""
    if chosen.route is Route.BUFFERED:
        return False
    if chosen.route is Route.NATIVE and outcome.failed_straight:
        return target.learn_about_native(order.buffer, outcome.error)
    if outcome.error == errno.EFAULT and outcome.failed_straight:
        order.buffer._pin_refusal = (
            "the kernel cannot pin the pages behind the buffer's mapping (EFAULT on O_DIRECT): "
            "allocate a udmabuf or memfd for zero-copy"
        )
        return True
    if order.direction == "read" and outcome.error_offset >= target.end():
        return False  # past the end: says nothing about the file
    registered = outcome.registered and target.namespace is None
    if (
        outcome.error == errno.EINVAL
        and registered
        and _job(target, order, chosen.route).off_the_block()
    ):
        target.learn_about_slots()
        return True
    return target.learn_from(outcome.error)


def _judge(
    target: Target, order: Order, chosen: Plan, outcome: Outcome, known: str | None
) -> tuple[Route, str]:
    """The route that was taken in truth, by what the middle did, and why."""
    refusal = target.direct().refusal
    if chosen.route is not Route.BUFFERED and refusal and not known:
        route, reason = Route.BUFFERED, refusal
    elif chosen.route in ALLOWED["zero-copy"] and not outcome.straight:
        route, reason = Route.STAGED, "the file ended before its first whole block"
    else:
        return chosen.route, chosen.reason
    if route not in ALLOWED[order.require]:
        text = f"the bytes have moved, but by the {route} route: {reason}"
        error = RouteUnavailable(text, target.path, route=chosen.route)
        raise _telling(error, outcome.nbytes)
    return route, reason


def _failure(
    target: Target, order: Order, chosen: Plan, outcome: Outcome, gone: str | None = None
) -> OSError:
    verb = "reading" if order.direction == "read" else "writing"
    text = (
        f"{verb} {order.span.nbytes} bytes from file offset {order.span.file_start} on failed at "
        f"file offset {outcome.error_offset}, after {outcome.nbytes} whole bytes"
    )
    why = gone
    if outcome.nvme_status:
        why = nvme.status_text(outcome.nvme_status)
    elif why is None and chosen.route is Route.NATIVE:
        by_route = _WHY_NATIVE_FAILED if outcome.failed_straight else _WHY_STALE
        why = by_route.get(outcome.error)
    if why is not None:
        error = os_error(outcome.error, f"{text}: {why}", target.path)
    else:
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


# -- proof of arrival: see audit.py


def check_audit(target: Target, order: Order) -> None:
    """Refuse audit="always" where there is nothing to compare with, before anything is touched."""
    audit.check_keyword(order.audit)
    if order.audit != "always":
        return
    if target.stream is not None:
        text = (
            f"audit='always' reads everything a second time, and {target.stream} is gone by then: "
            "leave it out"
        )
        raise os_error(errno.ESPIPE, text, target.path)
    obstacle = _obstacle(order)
    if obstacle is not None and order.span.nbytes:
        raise RouteUnavailable(f"audit='always' is not to be had: {obstacle}", target.path)


def _obstacle(order: Order) -> str | None:
    span, write = order.span, order.direction == "write"
    return audit.obstacle(order.buffer, span.segments, span.count, write, order.fence)


def _not_audited(order: Order, why: str = NOT_AUDITED) -> str:
    """What the record says where nothing was to be compared."""
    return audit.OFF if order.audit == "off" else why


def _run_audited(target: Target, order: Order, chosen: Plan) -> Steps[tuple[Outcome, str]]:
    """Run the plan, and compare where that is due; what the record says of it comes with it."""
    native, always = chosen.route is Route.NATIVE, order.audit == "always"
    if not always and (not native or order.audit == "off"):
        outcome = yield from _run(target, order, chosen)
        return outcome, _not_audited(order)
    pair = order.buffer.exporter, target.device()
    if not always and audit.PAIRS.shown(*pair, order.direction):
        text = f"not audited: the first {order.direction} of {pair[0]} on this device was"
        return (yield from _run(target, order, chosen)), text
    obstacle = _obstacle(order)
    if obstacle is not None:
        return (yield from _run(target, order, chosen)), f"not audited: {obstacle}"
    span, write = order.span, order.direction == "write"
    with ExitStack() as stack:
        try:
            reference = stack.enter_context(target.reference())
        except OSError as error:
            text = f"the file may not be opened again to read it ({error.strerror})"
            if always:
                refused = RouteUnavailable(f"audit='always' is not to be had: {text}", target.path)
                raise _telling(refused, 0) from None
            return (yield from _run(target, order, chosen)), f"not audited: {text}"
        check = audit.Check(
            order.buffer,
            span.segments,
            span.count,
            reference,
            write=write,
            file_size=target.end(),
            limit=None if always else audit.LIMIT,
            path=target.path,
        )
        yield Blocking(check.prepare)
        outcome = yield from _run(target, order, chosen)
        if outcome.error or outcome.interruption or (outcome.short_segment >= 0 and span.whole):
            return outcome, NOT_AUDITED
        try:
            found: list[str] = []
            yield Blocking(lambda: found.append(check.compare(outcome.nbytes)))
            text = found[0]
        except IntegrityError as error:
            if native:
                audit.PAIRS.mark(*pair, f"an audit found it wanting: {error.strerror}")
            raise
        if native and outcome.straight:
            audit.PAIRS.show(*pair, order.direction)
        return outcome, text


# -- fences


def _fences(target: Target, order: Order, begun: float) -> Steps[None]:
    """Until devices let the buffer be read (to be written out) or written (by what is read in)."""
    span, read = order.span, order.direction == "read"
    fds = order.buffer._touched(span.buffer_start, span.buffer_size)
    if not fds:
        return
    spent = time.perf_counter() - begun
    try:
        yield Fences(fds, "write" if read else "read", order.timeout, spent, target.path)
    except TimeoutError as error:
        raise _telling(error, 0) from None


def _left(order: Order, begun: float) -> float | None:
    """Seconds of the order's timeout that are left."""
    if order.timeout is None:
        return None
    return max(0.0, order.timeout - (time.perf_counter() - begun))


def _await_fences(target: Target, order: Order, chosen: Plan, begun: float) -> Steps[None]:
    """Wait, or see that the caller's `fence=False` can be granted, before anything is touched."""
    if order.fence:
        yield from _fences(target, order, begun)
        return
    if not order.span.nbytes or not order.buffer._is_dmabuf:
        return
    zero_copy = chosen.route in ALLOWED["zero-copy"]
    if not zero_copy or _job(target, order, chosen.route).with_edges():
        raise RouteUnavailable(
            "fence=False is for transfers without the CPU, whose access always waits for fences: "
            f"this one goes by the {chosen.route} route"
            + (", with unaligned edges" if zero_copy else ""),
            target.path,
            route=chosen.route,
            plan=chosen,
        )


# -- writing


def _grown(target: Target, span: Span) -> AbstractContextManager[None] | None:
    """A target long enough for the write; a file is cut back to what is whole if that fails."""
    if not span.nbytes:
        return None
    if target.kind == "file":
        return growth.growing(target.fd, target.path, span.file_ranges(), span.file_reached)
    if span.file_end > target.size():
        text = f"the device ends at {target.size()}, and the write would reach {span.file_end}"
        raise _telling(os_error(errno.ENOSPC, text, target.path), 0)
    return None


# -- streams


def carry_stream(
    target: Target, order: Order, begun: float, *, nowait: bool = False
) -> Steps[Transfer]:
    """As `carry`, for what is read and written in order; `nowait` has every wait in the steps."""
    chosen = plan(target, order)
    yield from _await_fences(target, order, chosen, begun)
    span, buffer, read = order.span, order.buffer, order.direction == "read"
    with (
        buffer._cpu_access(True, read, span.buffer_start, span.nbytes),
        buffer._view(span.buffer_start, span.nbytes) as view,
    ):
        move = stream.reading if read else stream.writing
        left = _left(order, begun)
        done, requests = yield from move(target.fd, view, left, target.path, nowait=nowait)
    outcome = NOTHING._replace(nbytes=done, copied=done, requests=requests)
    record = _record(chosen, chosen.route, chosen.reason, outcome, begun)
    return replace(record, audited=_not_audited(order))

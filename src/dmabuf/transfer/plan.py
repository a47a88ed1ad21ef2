"""Routes, terms, plans and records of transfers.

The routes, best first, are native, direct, staged and buffered. A Plan holds the reason why each
better route is not used, so no fallback is silent.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from dmabuf.errors import RouteUnavailable
from dmabuf.kernel import fence

Direction = Literal["read", "write"]
Require = Literal["zero-copy", "uncached", "any"]
Prefer = Literal["zero-copy", "fastest"]
Audit = Literal["first", "always", "off"]

SMALL = 1 << 20
"""Bytes of a request that may go by one system call without a ring."""

NOT_AUDITED = "not audited: only the native route is, unless audit='always'"
AUDIT_OFF = "not audited: audit='off'"


class Route(enum.StrEnum):
    """How bytes travel between a File and a Buffer."""

    NATIVE = "native"
    """The target device accesses the dma-buf, registered with io_uring. The CPU copies nothing.
    The only route for memory that the CPU cannot map."""
    DIRECT = "direct"
    """The target device accesses the pages behind the buffer. The CPU copies nothing."""
    STAGED = "staged"
    """The device accesses staging blocks, and the CPU copies them at the same time: one copy."""
    BUFFERED = "buffered"
    """The kernel copies between the page cache and the buffer's mapping: one copy."""


ROUTES = tuple(Route)

ALLOWED: Mapping[Require, frozenset[Route]] = {
    "zero-copy": frozenset({Route.NATIVE, Route.DIRECT}),
    "uncached": frozenset({Route.NATIVE, Route.DIRECT, Route.STAGED}),
    "any": frozenset(Route),
}
ZERO_COPY = ALLOWED["zero-copy"]

REASONS = {
    ("read", Route.NATIVE): "the device writes into the dma-buf, registered with io_uring",
    ("write", Route.NATIVE): "the device reads from the dma-buf, registered with io_uring",
    ("read", Route.DIRECT): "the device writes into the pages behind the buffer",
    ("write", Route.DIRECT): "the device reads from the pages behind the buffer",
    ("read", Route.STAGED): "the device fills staging blocks, the CPU copies from them meanwhile",
    ("write", Route.STAGED): "the CPU fills staging blocks, the device takes them meanwhile",
    ("read", Route.BUFFERED): "the kernel copies into the buffer's mapping",
    ("write", Route.BUFFERED): "the kernel copies from the buffer's mapping",
}


@dataclass(frozen=True, slots=True)
class Terms:
    """The caller's conditions for a transfer.

    Raises:
        ValueError: a value is not one of those listed below.
    """

    require: Require = "any"
    """Which routes are acceptable: "zero-copy" (native, direct), "uncached" (also staged) or
    "any"."""
    route: Route | str | None = None
    """The only acceptable route; None for the best one."""
    prefer: Prefer = "zero-copy"
    """"fastest" reads a range that is in the page cache from there."""
    timeout: float | None = None
    """Seconds to wait for fences, and for the first byte of a stream; None waits without limit.
    It does not limit how long the device works."""
    fence: bool = True
    """False to not wait for the fences of devices that use the buffer."""
    audit: Audit = "first"
    """"first" compares the first native transfer of each pair of exporter and device, "always"
    every transfer, "off" none."""
    sync: bool = False
    """True to return from a write only when the bytes are on the medium (fdatasync)."""
    plain: bool = field(init=False, default=False, repr=False, compare=False)
    """Whether one small request may skip planning under these terms."""

    def __post_init__(self) -> None:
        check("require", self.require, tuple(ALLOWED))
        check("prefer", self.prefer, ("zero-copy", "fastest"))
        check("audit", self.audit, ("first", "always", "off"))
        if self.route is not None:
            check("route", self.route, tuple(route.value for route in Route))
            object.__setattr__(self, "route", Route(self.route))
        fence.check_timeout(self.timeout)
        plain = (
            self.route in (None, Route.DIRECT)
            and self.prefer == "zero-copy"
            and self.timeout is None
            and self.audit != "always"
            and not self.sync
        )
        object.__setattr__(self, "plain", plain)


def check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value of an argument is one of those allowed."""
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"invalid {name} {value!r}: use one of {names}")


def check_given(terms: object, progress: object) -> None:
    """Raise TypeError unless terms are Terms or None, and progress can be called or is None."""
    if terms is not None and not isinstance(terms, Terms):
        raise TypeError(f"terms must be a dmabuf.Terms, not {type(terms).__name__}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function, not {type(progress).__name__}")


terms_of = lru_cache(maxsize=256)(Terms)
"""Return the Terms for keyword arguments; equal ones are cached."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The route of a transfer, and the reasons for it and against each better route."""

    route: Route
    reason: str
    rejected: Mapping[Route, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        lines = [f"{self.route}: {self.reason}"]
        lines += [f"  not {route}: {why}" for route, why in self.rejected.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Transfer:
    """The record of one finished transfer."""

    nbytes: int
    """Bytes moved, without a gap."""
    route: Route
    """The route actually used, by all bytes except edges that the CPU copied."""
    reason: str
    """Why this route was used."""
    rejected: Mapping[Route, str]
    """Why each better route was not used."""
    registered: bool
    """Whether the buffer's pages were registered (pinned once) with io_uring."""
    registration: str
    """Why they were registered or not."""
    seconds: float
    """Seconds from the call to its return."""
    requests: int
    """Requests that the kernel completed."""
    reissues: int
    """Requests issued again after EAGAIN or EINTR."""
    copied: int
    """Bytes that the CPU copied."""
    audited: str = NOT_AUDITED
    """How the bytes were compared with those that plain pread(2) reads, or why they were not."""

    def __str__(self) -> str:
        rate = f", {self.nbytes / self.seconds / 1e6:,.0f} MB/s" if self.seconds else ""
        return (
            f"{self.nbytes:,} bytes {self.route} in {self.seconds * 1000:,.1f} ms{rate}, "
            f"{self.copied:,} copied by the CPU: {self.reason}"
        )


def why_nothing_straight(core: Any, measure: Any, *, write: bool) -> str:
    """Return why no byte of measured segments can go straight between file and memory.

    `core` is the core's struct dmb_job, and `measure` its struct dmb_measure.
    """
    block, align = core.offset_align, core.memory_align
    unit = max(block, core.page) if write else block
    if write and measure.staged.without_straight == measure.count:
        return (
            f"it does not begin and end at blocks of the file ({block} bytes), and holds no whole "
            f"page ({unit} bytes) that can be written without the page cache"
        )
    end = measure.file_end if write else min(measure.file_end, measure.file_size)
    if measure.count == 1 and -(-measure.file_start // unit) >= end // unit:
        return (
            f"nothing of it is a whole block of the file ({unit} bytes) before the one that holds "
            "its end"
        )
    return (
        f"file offset and memory address differ modulo O_DIRECT's alignment ({block} in the file, "
        f"{align} in memory); move the buffer offset"
    )


def plan_in_order(direction: Direction, what: str, terms: Terms, path: str | None) -> Plan:
    """Return the plan for a file that can only be read or written in order.

    `what` names the kind of file, such as "a pipe".

    Raises:
        RouteUnavailable: the terms exclude the buffered route.
    """
    why = f"{what} is read and written in order, by the kernel's copy"
    better: dict[Route, str] = {Route.NATIVE: why, Route.DIRECT: why, Route.STAGED: why}
    if terms.route not in (None, Route.BUFFERED):
        raise no_route(terms, {Route(terms.route): why}, path)
    if terms.require != "any":
        refused = f"require={terms.require!r} does not permit it"
        raise no_route(terms, better | {Route.BUFFERED: refused}, path)
    return Plan(Route.BUFFERED, REASONS[direction, Route.BUFFERED], {} if terms.route else better)


class Draft:
    """A mutable Transfer, which is faster to fill in than the frozen one."""

    __slots__ = Transfer.__slots__


def no_route(terms: Terms, rejected: Mapping[Route, str], path: str | None) -> RouteUnavailable:
    """Return the error for terms that no route meets."""
    routes: dict[str, list[str]] = {}
    for route, text in rejected.items():
        routes.setdefault(text, []).append(route)
    why = "; ".join(f"{', '.join(those)}: {text}" for text, those in routes.items())
    wanted = f"route={str(terms.route)!r}" if terms.route else f"require={terms.require!r}"
    return RouteUnavailable(f"no route for {wanted}: {why}", path, route=terms.route)


def with_nbytes(error: Any, nbytes: int) -> Any:
    """Set how many bytes were moved before an exception as its `nbytes`, and return it."""
    error.nbytes = nbytes
    return error

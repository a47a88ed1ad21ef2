"""Which way bytes travel between a File and a Buffer, and why: pure, from facts.

The ranking, best first, is `native`, `direct`, `staged`, `buffered`. A route is passed over for a
reason, and the reason stands in the Plan: nothing falls back silently.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dmabuf.errors import RouteUnavailable

Direction = Literal["read", "write"]
Require = Literal["zero-copy", "uncached", "any"]
Prefer = Literal["zero-copy", "fastest"]


class Route(enum.StrEnum):
    """How bytes travel between a File and a Buffer."""

    NATIVE = "native"
    """The target device, through the dma-buf's own mapping, registered with io_uring: no CPU copy.
    The only one for memory that the CPU cannot map."""
    DIRECT = "direct"
    """The target device, into the pages behind the buffer: no CPU copy."""
    STAGED = "staged"
    """The device into staging blocks and the CPU from there, overlapped: one copy."""
    BUFFERED = "buffered"
    """The kernel, from or to the page cache, straight into the mapping: one copy."""


ALLOWED: Mapping[Require, frozenset[Route]] = {
    "zero-copy": frozenset({Route.NATIVE, Route.DIRECT}),
    "uncached": frozenset({Route.NATIVE, Route.DIRECT, Route.STAGED}),
    "any": frozenset(Route),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The route a transfer takes, why, and why each better one was passed over."""

    route: Route
    reason: str
    rejected: Mapping[Route, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        lines = [f"{self.route}: {self.reason}"]
        lines += [f"  not {route}: {why}" for route, why in self.rejected.items()]
        return "\n".join(lines)


class Question(NamedTuple):
    """The facts that decide a route; each refusal is a sentence, or None for no objection."""

    direction: Direction
    stream: str | None = None
    """What the file is where it can only be read or written in order: "a pipe", "a socket"."""
    no_direct_io: str | None = None
    """Why O_DIRECT cannot be had for the file."""
    no_native: str | None = None
    """Why the dma-buf cannot be registered for the file."""
    no_page_cache: str | None = None
    """Why nothing can go through the page cache."""
    no_pinning: str | None = None
    """Why the buffer's pages cannot be pinned."""
    no_mapping: str | None = None
    """Why the CPU cannot map the buffer."""
    no_middle: str | None = None
    """Why nothing of the range can go straight between file and buffer."""
    some_without_middle: str | None = None
    """That some of the segments have nothing that can go straight."""
    no_native_middle: str | None = None
    """Why nothing of the range can go straight between file and dma-buf."""
    some_without_native_middle: str | None = None
    """That some of the segments have nothing that can go straight between file and dma-buf."""
    no_block: str | None = None
    """Why nothing of the range can go past the page cache at all."""
    cached: str | None = None
    """That the range lies in the page cache, where the caller prefers what is fastest."""


WHY_CHOSEN = {
    ("read", Route.NATIVE): "the device writes into the dma-buf, registered with io_uring",
    ("write", Route.NATIVE): "the device reads from the dma-buf, registered with io_uring",
    ("read", Route.DIRECT): "the device writes into the pages behind the buffer",
    ("write", Route.DIRECT): "the device reads from the pages behind the buffer",
    ("read", Route.STAGED): "the device fills staging blocks, the CPU copies from them meanwhile",
    ("write", Route.STAGED): "the CPU fills staging blocks, the device takes them meanwhile",
    ("read", Route.BUFFERED): "the kernel copies into the buffer's mapping",
    ("write", Route.BUFFERED): "the kernel copies from the buffer's mapping",
}


def objections(question: Question, require: Require) -> dict[Route, str | None]:
    """Why each route cannot be taken, best route first; None where it can."""
    q = question
    strict = q.some_without_middle if require == "zero-copy" else None
    strict_native = q.some_without_native_middle if require == "zero-copy" else None
    stream = q.stream and f"{q.stream} is read and written in order, by the kernel's copy"
    uncached = stream or q.no_direct_io or q.cached
    by_cpu = q.no_mapping or uncached or q.no_block
    return {
        Route.NATIVE: uncached or q.no_native or q.no_native_middle or strict_native,
        Route.DIRECT: by_cpu or q.no_pinning or q.no_middle or strict,
        Route.STAGED: by_cpu,
        Route.BUFFERED: q.no_page_cache or q.no_mapping,
    }


def choose(
    question: Question,
    *,
    require: Require = "any",
    route: Route | str | None = None,
    path: str | None = None,
) -> Plan:
    """The best route that the facts and the caller permit.

    Args:
        question: the facts.
        require: "zero-copy" (direct), "uncached" (also staged) or "any".
        route: the only route to consider.
        path: the file, for the error.

    Raises:
        RouteUnavailable: no permitted route is possible; says why for each.
        ValueError: `require` or `route` is not one of those above.
    """
    check_require(require)
    forced = None if route is None else _route(route)
    rejected: dict[Route, str] = {}
    for candidate, objection in objections(question, require).items():
        if forced is not None and candidate is not forced:
            continue
        if objection is None and candidate not in ALLOWED[require]:
            objection = f"require={require!r} does not permit it"
        if objection is None:
            reason = WHY_CHOSEN[question.direction, candidate]
            return Plan(candidate, reason, rejected)
        rejected[candidate] = objection
    why = "; ".join(f"{candidate}: {text}" for candidate, text in rejected.items())
    wanted = f"route={forced.value!r}" if forced else f"require={require!r}"
    raise RouteUnavailable(f"no route for {wanted}: {why}", path, route=forced)


def check_require(require: object) -> None:
    """Raises ValueError for what is none of "zero-copy", "uncached" and "any"."""
    if require not in ALLOWED:
        raise ValueError(f"require={require!r}: one of {', '.join(map(repr, ALLOWED))}")


def _route(route: Route | str) -> Route:
    try:
        return Route(route)
    except ValueError:
        names = ", ".join(repr(known.value) for known in Route)
        raise ValueError(f"route={route!r}: one of {names}") from None

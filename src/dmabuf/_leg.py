"""Leg: one side of a copy, added up from its transfers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dmabuf.engine import Transfer
from dmabuf.route import Plan, Route

_NONE: Mapping[Route, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Leg:
    """One side of a copy: how the bytes came from the source, or how they went to the target."""

    nbytes: int
    """Bytes moved on this side."""
    route: Route
    """How most of them travelled."""
    reason: str
    """Why by this route."""
    rejected: Mapping[Route, str] = field(default_factory=lambda: _NONE)
    """Why each better route was passed over."""
    routes: Mapping[Route, int] = field(default_factory=dict)
    """Bytes by each route: more than one where the end of a file had to go another way."""
    registered: bool = False
    """Whether pages were registered (pinned once) with io_uring on this side."""
    requests: int = 0
    """Requests that the kernel completed."""
    reissues: int = 0
    """Requests issued again after EAGAIN or EINTR."""
    copied: int = 0
    """Bytes that the CPU touched."""
    seconds: float = 0.0
    """Time spent in this side's transfers; the other side's run meanwhile."""


class Tally:
    """Adds up the transfers of one side."""

    def __init__(self) -> None:
        self._records: dict[Route, Transfer] = {}
        self._routes: dict[Route, int] = {}
        self._requests = self._reissues = self._copied = 0
        self._seconds = 0.0
        self._registered = False

    def add(self, record: Transfer) -> None:
        """Count one finished transfer."""
        if not record.nbytes:
            return
        self._records.setdefault(record.route, record)
        self._routes[record.route] = self._routes.get(record.route, 0) + record.nbytes
        self._requests += record.requests
        self._reissues += record.reissues
        self._copied += record.copied
        self._seconds += record.seconds
        self._registered |= record.registered

    def add_in_order(self, plan: Plan, nbytes: int, requests: int, begun: float) -> None:
        """Count bytes that were read or written in order, since `begun` by perf_counter."""
        self.add(
            Transfer(
                nbytes=nbytes,
                route=plan.route,
                reason=plan.reason,
                rejected=plan.rejected,
                registered=False,
                registration="no ring was used",
                seconds=time.perf_counter() - begun,
                requests=requests,
                reissues=0,
                copied=nbytes,
            )
        )

    def leg(self) -> Leg | None:
        """The sum; None where nothing was moved."""
        if not self._routes:
            return None
        route = max(self._routes, key=self._routes.__getitem__)
        return Leg(
            nbytes=sum(self._routes.values()),
            route=route,
            reason=self._records[route].reason,
            rejected=self._records[route].rejected,
            routes=MappingProxyType(dict(self._routes)),
            registered=self._registered,
            requests=self._requests,
            reissues=self._reissues,
            copied=self._copied,
            seconds=self._seconds,
        )

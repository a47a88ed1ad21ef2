"""The record of a copy: what each side did, added up from its transfers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dmabuf.transfer import Plan, Route, Transfer


@dataclass(frozen=True, slots=True)
class CopySide:
    """How the bytes of a copy came from the source, or how they went to the target."""

    nbytes: int
    """Bytes moved on this side."""
    route: Route
    """The route of most of them."""
    reason: str
    """Why they took it."""
    rejected: Mapping[Route, str] = field(default_factory=dict)
    """Why each better route was not taken."""
    routes: Mapping[Route, int] = field(default_factory=dict)
    """Bytes by route. The end of a file can take another route than the rest."""
    registered: bool = False
    """Whether io_uring had pages registered on this side."""
    requests: int = 0
    """Requests that the kernel completed."""
    reissues: int = 0
    """Requests issued again after EAGAIN or EINTR."""
    copied: int = 0
    """Bytes that the CPU touched."""
    seconds: float = 0.0
    """Time spent in this side's transfers, which overlap with the other side's."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The record of a finished copy."""

    nbytes: int
    """Bytes copied."""
    seconds: float
    """Time from the call to its return."""
    read: CopySide | None
    """The source's side; None if the source is memory, or empty."""
    write: CopySide | None
    """The target's side; None if the target is memory, or the source was empty."""
    copied: int
    """Bytes that the CPU touched, on both sides together; 0 means zero-copy."""
    exporter: str | None
    """The exporter of the pool's buffers; None if no pool was needed."""
    allocated: int
    """Bytes of the pool."""


class Tally:
    """Adds up the transfers of one side."""

    def __init__(self) -> None:
        self._first: dict[Route, Transfer | CopySide] = {}
        self._routes: dict[Route, int] = {}
        self._registered = False
        self._requests = self._reissues = self._copied = 0
        self._seconds = 0.0

    def add(self, transfer: Transfer | CopySide) -> None:
        """Count a finished transfer, or one side of a copy."""
        if not transfer.nbytes:
            return
        self._first.setdefault(transfer.route, transfer)
        self._routes[transfer.route] = self._routes.get(transfer.route, 0) + transfer.nbytes
        self._registered |= transfer.registered
        self._requests += transfer.requests
        self._reissues += transfer.reissues
        self._copied += transfer.copied
        self._seconds += transfer.seconds

    def add_in_order(self, plan: Plan, nbytes: int, requests: int, begun: float) -> None:
        """Count bytes that the CPU moved in order since `begun`, a value of perf_counter()."""
        self.add(
            Transfer(
                nbytes, plan.route, plan.reason, plan.rejected,
                registered=False, registration="no ring was used",
                seconds=time.perf_counter() - begun, requests=requests, reissues=0, copied=nbytes,
            )
        )  # fmt: skip

    def side(self) -> CopySide | None:
        """Return the sum; None if nothing was moved."""
        if not self._routes:
            return None
        route = max(self._routes, key=self._routes.__getitem__)
        return CopySide(
            nbytes=sum(self._routes.values()),
            route=route,
            reason=self._first[route].reason,
            rejected=self._first[route].rejected,
            routes=MappingProxyType(dict(self._routes)),
            registered=self._registered,
            requests=self._requests,
            reissues=self._reissues,
            copied=self._copied,
            seconds=self._seconds,
        )

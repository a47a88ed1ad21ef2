"""The record of a copy, told to people and to programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dmabuf.cli import _output
from dmabuf.cli._verify import Verified
from dmabuf.pipeline import Copy, Leg
from dmabuf.route import ALLOWED, Route


def as_json(record: Copy, verified: Verified | None) -> dict[str, Any]:
    """The result for programs; keys are only ever added."""
    return {
        "nbytes": record.nbytes,
        "seconds": record.seconds,
        "read": _leg_as_json(record.read),
        "write": _leg_as_json(record.write),
        "copied": record.copied,
        "exporter": record.exporter,
        "allocated": record.allocated,
        "verified": None if verified is None else asdict(verified),
    }


def _leg_as_json(leg: Leg | None) -> dict[str, Any] | None:
    if leg is None:
        return None
    return {
        "nbytes": leg.nbytes,
        "route": leg.route.value,
        "reason": leg.reason,
        "rejected": {route.value: why for route, why in leg.rejected.items()},
        "routes": {route.value: nbytes for route, nbytes in leg.routes.items()},
        "registered": leg.registered,
        "requests": leg.requests,
        "reissues": leg.reissues,
        "copied": leg.copied,
        "seconds": leg.seconds,
    }


def sentence(record: Copy, verified: Verified | None, exporter: str | None = None) -> str:
    """The result for people, in a line; a second for the comparison.

    ``exporter`` is that of a buffer which is one of the ends.
    """
    if not record.nbytes:
        return "0 B: there was nothing to copy"
    speed = _output.decimal(record.nbytes / max(record.seconds, 1e-9), "B/s")
    text = f"{_output.decimal(record.nbytes)} in {record.seconds:.2f} s, {speed}: "
    ways = [f"read {_way(record.read)}"] if record.read else []
    ways += [f"written {_way(record.write)}"] if record.write else []
    text += ", ".join([*ways, exporter or str(record.exporter)])
    if verified is not None:
        how = (
            verified.reason
            if verified.uncached
            else f"though not past the cache: {verified.reason}"
        )
        text += f"\nverified: every byte is the same, {how}"
    return text


def _way(leg: Leg) -> str:
    """A route with its reason; where the CPU copies, with why it has to."""
    why = leg.reason
    if leg.route not in ALLOWED["zero-copy"]:
        why = leg.rejected.get(Route.DIRECT) or leg.rejected.get(Route.NATIVE) or why
    return f"{leg.route} ({why})"

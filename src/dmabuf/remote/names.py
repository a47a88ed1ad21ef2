"""Names of a node's store, fetched many at a time: the next requests are always under way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.protocol import Malformed, Reported
from dmabuf.remote.session import (
    Engine,
    RemoteTransfer,
    Session,
    check_terms,
    compare,
    mapped,
)
from dmabuf.store import check_name
from dmabuf.transfer import Terms

_AT_ONCE = 128
"""Names in one request.

So few that the kernel holds a request that the node does not read while it sends data: else both
ends would wait for each other."""
_AHEAD = 2
"""Requests under way."""

Outcome = RemoteTransfer | OSError


class Wanted(NamedTuple):
    """A name, and the place in the buffer for its content."""

    name: str
    start: int
    room: int


def fetch(
    session: Session, wanted: Sequence[Wanted], buffer: Buffer, terms: Terms
) -> list[Outcome]:
    """Copy the contents of names into a buffer, and return the outcome of each, in their order.

    Of the first transfer of a connection, which is compared, the first name has a request alone.
    """
    check_terms(buffer, terms, session.engine, session.name)
    for name, start, room in wanted:
        check_name(name)
        if start + room > buffer.size:
            text = f"fetch {name!r}: buffer_offset={start} size={room} leaves the buffer"
            raise ValueError(f"{text} of {buffer.size} bytes")
    if not wanted:
        return []
    limit = session.audit_limit(buffer, terms, "read", [one[1:] for one in wanted])
    always = terms.audit == "always"
    head = 1 if limit and not always else 0
    batches = [wanted[:head]] * head
    batches += [wanted[at : at + _AT_ONCE] for at in range(head, len(wanted), _AT_ONCE)]
    limits = [limit if always or not index else 0 for index in range(len(batches))]
    outcomes: list[Outcome] = []
    first = min(start for _, start, _ in wanted)
    last = max(start + room for _, start, room in wanted)
    with (
        mapped(buffer, terms, "read", first, last - first) as view,
        session.exchange(terms.timeout) as channel,
    ):
        engine = session.carrier(buffer)
        requests = iter(
            [
                protocol.pack(
                    op="fetch",
                    names=[(name, room) for name, _, room in batch],
                    checksum=most,
                    **engine.prepare(channel, buffer, [one[1:] for one in batch]),
                )
                for batch, most in zip(batches, limits, strict=True)
            ]
        )
        for request in islice(requests, _AHEAD):
            channel.send(request)
        for batch, most in zip(batches, limits, strict=True):
            places = [Wanted(name, start - first, room) for name, start, room in batch]
            try:
                found = _receive(session, engine, channel, view, places, most)
            except Reported:
                if len(batches) > 1:  # whose replies are under way
                    channel.close()
                raise
            if most and any(isinstance(one, RemoteTransfer) for one in found):
                session.note_audit(buffer, "read")
            outcomes += found
            for request in islice(requests, 1):
                channel.send(request)
    return outcomes


def _receive(
    session: Session,
    engine: Engine,
    channel: Channel,
    view: memoryview,
    batch: Sequence[Wanted],
    limit: int,
) -> list[Outcome]:
    """Receive the reply to a request, with the contents; compare the first bytes of each."""
    begun, places, end = time.perf_counter(), list[tuple[int, int]](), -1
    told = channel.receive_reply().outcomes("names")
    if len(told) != len(batch):
        raise Malformed("other names were answered than requested")
    for one, (_, start, room) in zip(told, batch, strict=True):
        if not isinstance(one, int):
            continue
        if one > room:
            raise Malformed("more data came than was requested")
        if start == end:  # received at once
            places[-1] = places[-1][0], places[-1][1] + one
        else:
            places.append((start, one))
        end = start + one
    reply = engine.receive(channel, view, places, batch[0].name)
    side, digests = protocol.parse_side(reply), iter(reply.get("checksum", str).split())
    seconds, outcomes = time.perf_counter() - begun, list[Outcome]()
    records: dict[tuple[int, str], RemoteTransfer] = {}
    for one, (name, start, _) in zip(told, batch, strict=True):
        if not isinstance(one, int):
            error = protocol.parse_error(one, session.name)
            outcomes.append(error if isinstance(error, OSError) else OSError(str(error)))
            continue
        audited = ""
        if limit:
            part = view[start : start + min(limit, one)]
            audited = compare(next(digests, ""), [part], one, name)
        if (one, audited) not in records:  # equal ones share a record
            there = replace(side, nbytes=one, copied=min(side.copied, one))
            records[one, audited] = session.record(engine, "read", one, audited, seconds, there)
        outcomes.append(records[one, audited])
    return outcomes

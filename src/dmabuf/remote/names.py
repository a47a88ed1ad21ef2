"""Names of a node's store, fetched many at a time: the next requests are always under way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import NamedTuple

from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.engine import Engine
from dmabuf.remote.protocol import Malformed, Reported
from dmabuf.remote.ranges import Range
from dmabuf.remote.session import RemoteTransfer, Session, check_terms, compare, mapped
from dmabuf.sizes import Size
from dmabuf.store import check_name
from dmabuf.transfer import Terms

_AT_ONCE = 128
"""Names in one request.

So few that the kernel holds a request that the node does not read while it sends data: else both
ends would wait for each other."""
_AHEAD = 2
"""Requests under way."""

Outcome = RemoteTransfer | OSError


class _Batch(NamedTuple):
    """The names of one request."""

    names: Sequence[str]
    places: Sequence[Range]
    """For each its place in the buffer."""
    inside: Sequence[Range]
    """For each its place in the view."""
    limit: int
    """How many of the first bytes of each to compare."""


def fetch(
    session: Session,
    wanted: Iterable[tuple[str, Size, Size | None]],
    buffer: Buffer,
    terms: Terms,
) -> list[Outcome]:
    """Copy the contents of names into a buffer, and return the outcome of each, in their order.

    `wanted` are names, each with the offset in the buffer and the bytes of room there. Of the first
    transfer of a connection, which is compared, the first name has a request alone.
    """
    check_terms(buffer, terms, session.engine, session.name)
    names, places = list[str](), list[Range]()
    for name, offset, size in wanted:
        names.append(check_name(name))
        places.append(buffer.check_range(offset, size))
    if not names:
        return []
    limit, always = session.audit_limit(buffer, terms, "read", places), terms.audit == "always"
    alone = 1 if limit and not always else 0
    outcomes, batches = list[Outcome](), list[_Batch]()
    with (
        mapped(buffer, terms, "read", places) as (view, inside),
        session.exchange(terms.timeout) as channel,
    ):
        for at, end in pairwise((*range(alone), *range(alone, len(names), _AT_ONCE), len(names))):
            most = limit if always or not at else 0
            batches.append(_Batch(names[at:end], places[at:end], inside[at:end], most))
        engine = session.carrier(buffer)
        requests = iter([_pack(engine, channel, buffer, batch) for batch in batches])
        for request in islice(requests, _AHEAD):
            channel.send(request)
        for batch in batches:
            try:
                found = _receive(session, engine, channel, view, batch)
            except Reported:
                if len(batches) > 1:  # whose replies are under way
                    channel.close()
                raise
            if batch.limit and any(isinstance(one, RemoteTransfer) for one in found):
                session.note_audit(buffer, "read")
            outcomes += found
            for request in islice(requests, 1):
                channel.send(request)
    return outcomes


def _pack(engine: Engine, channel: Channel, buffer: Buffer, batch: _Batch) -> bytes:
    wanted = [(name, room) for name, (_, room) in zip(batch.names, batch.places, strict=True)]
    about = engine.prepare(channel, buffer, batch.places)
    return protocol.pack(op="fetch", names=wanted, checksum=batch.limit, **about)


def _receive(
    session: Session, engine: Engine, channel: Channel, view: memoryview, batch: _Batch
) -> list[Outcome]:
    """Receive the reply to a request, with the contents; compare the first bytes of each."""
    begun, places, end = time.perf_counter(), list[Range](), -1
    told = channel.receive_reply().outcomes("names")
    if len(told) != len(batch.names):
        raise Malformed("other names were answered than requested")
    for one, (start, room) in zip(told, batch.inside, strict=True):
        if not isinstance(one, int):
            continue
        if one > room:
            raise Malformed("more data came than was requested")
        if start == end:  # received at once
            places[-1] = places[-1][0], places[-1][1] + one
        else:
            places.append((start, one))
        end = start + one
    reply = engine.carry("read", channel, view, places, batch.names[0])
    side, digests = protocol.parse_side(reply), iter(reply.get("checksum", str).split())
    seconds, outcomes = time.perf_counter() - begun, list[Outcome]()
    records: dict[tuple[int, str], RemoteTransfer] = {}
    for one, name, (start, _) in zip(told, batch.names, batch.inside, strict=True):
        if not isinstance(one, int):
            error = protocol.parse_error(one, session.name)
            outcomes.append(error if isinstance(error, OSError) else OSError(str(error)))
            continue
        audited = ""
        if batch.limit:
            part = view[start : start + min(batch.limit, one)]
            audited = compare(next(digests, ""), [part], one, name)
        if (one, audited) not in records:  # equal ones share a record
            there = replace(side, nbytes=one, copied=min(side.copied, one))
            records[one, audited] = session.record(engine, "read", one, audited, seconds, there)
        outcomes.append(records[one, audited])
    return outcomes

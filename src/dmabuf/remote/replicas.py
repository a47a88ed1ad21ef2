"""A file that several nodes serve: its ranges are spread over them, and a node may fail."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TypeVar

from dmabuf.copying import Tally, in_threads
from dmabuf.errors import (
    ClosedError,
    IntegrityError,
    RouteUnavailable,
    ShortReadError,
    TransferError,
    os_error,
)
from dmabuf.memory import Buffer, allocate
from dmabuf.remote.engine import Engine
from dmabuf.remote.file import RemoteFile
from dmabuf.remote.ranges import Range, Ranges, total
from dmabuf.remote.session import RemotePlan, RemoteTransfer
from dmabuf.transfer import Direction, Progress, Terms, stopping

log = logging.getLogger("dmabuf.remote")

_PIECE = 16 << 20
"""Bytes of a request to one node, at most."""
_SAMPLES = 16
_SAMPLE = 4096
"""Bytes of a sample by which the files of nodes are compared."""
_SLICE = 0.1

T = TypeVar("T")


class ReplicaFile(RemoteFile):
    """A file that several nodes serve, opened for reading by the Node of several addresses.

    A transfer is cut into requests of at most 16 MiB. Each node has one at a time, so that a fast
    node reads more. If a node fails, another one repeats its request; the call fails when no node
    is left. `RemoteTransfer.nodes` has what came from each.

    A node that fails is not used again. A node that stalls has failed after the `timeout` of the
    connection.
    """

    def __init__(self, files: Sequence[RemoteFile], path: str, end: int) -> None:
        self.name = f"dmabuf://{','.join(one.node for one in files)}/{path}"
        self.mode = "r"
        self._files = files
        self._end = end

    @property
    def closed(self) -> bool:
        """Whether it, or every connection, was closed."""
        return all(one.closed for one in self._files)

    @property
    def node(self) -> str:
        """The addresses of its nodes."""
        return ",".join(one.node for one in self._files)

    @property
    def engine(self) -> Engine:
        """What moves the bytes of the first node that is left."""
        return (self._living() or self._files)[0].engine

    @property
    def size(self) -> int:
        """Where the file ends now, in bytes, at the first node that is left."""
        return self._first(lambda one: one.size)

    @property
    def versions(self) -> Mapping[str, tuple[int, int]]:
        """As of RemoteFile, of all nodes that are left."""
        found = dict[str, tuple[int, int]]()
        for one in self._living():
            with suppress(OSError, ClosedError):
                found |= one.versions
        self._check_open()
        return found

    def flush(self) -> None:
        """Return: nothing was written."""
        self._check_open()

    def close(self) -> None:
        """Close it. Can be called again."""
        for one in self._files:
            one.close()

    def _living(self) -> list[RemoteFile]:
        return [one for one in self._files if not one.closed]

    def _first(self, call: Callable[[RemoteFile], T]) -> T:
        """Return what a call returns for the first node whose connection survives it."""
        for one in self._living():
            try:
                return call(one)
            except (OSError, ClosedError):
                if not one.closed or self.closed:
                    raise
        raise ClosedError(f"{self.name} is closed")

    def plan_range(self, direction: Direction, offset: int, size: int, terms: Terms) -> RemotePlan:
        """Return the plan for a range of the file at the first node that is left."""
        return self._first(lambda one: one.plan_range(direction, offset, size, terms))

    def move(
        self,
        direction: Direction,
        buffer: Buffer,
        ranges: Sequence[Range],
        terms: Terms,
        progress: Progress | None,
        *,
        whole: bool,
    ) -> RemoteTransfer:
        """Move ranges between the file and their places; `whole` refuses a read past its end."""
        begun = time.perf_counter()
        pieces = list(Ranges(self._within(ranges, whole=whole)).pieces(_PIECE))
        if not pieces:
            return self._first(
                lambda one: one.move(direction, buffer, (), terms, progress, whole=True)
            )
        if buffer.is_dmabuf:
            buffer.wait("write", terms.timeout)  # a device that is late is no fault of a node
        team = _Team(self._living(), direction, buffer, terms)
        nbytes = sum(map(total, pieces))
        found = list[RemoteTransfer]()
        for one in in_threads(team.move, pieces, nbytes, buffer, len(team.files), progress):
            if isinstance(one, OSError):
                raise one
            assert isinstance(one, RemoteTransfer)
            found.append(one)
        tally, nodes, audited = Tally(), dict[str, int](), dict[str, str]()
        for one in found:
            tally.add(one.remote)
            for node, moved in one.nodes.items():
                nodes[node] = nodes.get(node, 0) + moved
                audited.setdefault(node, f"from {node}: {one.audited}")
        return replace(
            found[0], nbytes=nbytes, copied=nbytes, requests=len(found), nodes=nodes,
            audited="; ".join(audited.values()), remote=tally.side() or found[0].remote,
            seconds=time.perf_counter() - begun,
        )  # fmt: skip

    def _within(self, ranges: Iterable[Range], *, whole: bool) -> Iterator[Range]:
        for index, (offset, start, size) in enumerate(ranges):
            here = min(size, max(0, self._end - offset))
            if whole and here < size:
                text = f"the file of {self._end} bytes ends before the end of segment {index}"
                raise ShortReadError(text, index)
            yield offset, start, here


class _Team:
    """The nodes that share a transfer."""

    def __init__(
        self, files: Sequence[RemoteFile], direction: Direction, buffer: Buffer, terms: Terms
    ) -> None:
        self.files, self._direction, self._buffer, self._terms = files, direction, buffer, terms
        self._until = None if terms.timeout is None else time.monotonic() + terms.timeout
        self._idle: SimpleQueue[RemoteFile] = SimpleQueue()
        for one in files:
            self._idle.put(one)
        self._failure: OSError | None = None

    def move(self, piece: Sequence[Range]) -> RemoteTransfer:
        """Move a piece by the next node that is idle; another one repeats it if that fails."""
        while self._failure is None:
            if stopping.check is not None:
                stopping.check()
            with suppress(Empty):
                file, terms = self._idle.get(timeout=_SLICE), self._terms
                if self._until is not None:
                    terms = replace(terms, timeout=max(0.0, self._until - time.monotonic()))
                try:
                    done = file.move(self._direction, self._buffer, piece, terms, None, whole=True)
                    self._idle.put(file)
                    return done
                except (OSError, ShortReadError, ClosedError) as error:
                    self._give_up(file, error)
        raise self._failure

    def _give_up(self, file: RemoteFile, error: Exception) -> None:
        file.close()
        log.warning("%s: not used any more: %s", file.name, str(error))  # without its frames
        if isinstance(error, RouteUnavailable | IntegrityError):  # no other node mends that
            self._failure = error
        elif self._failure is None and all(one.closed for one in self.files):
            text = f"no node is left; the last one: {getattr(error, 'strerror', None) or error}"
            number = getattr(error, "errno", None) or errno.EIO
            self._failure = TransferError(number, text, file.name, nbytes=0)


def open_replicas(open_one: Iterable[Callable[[], RemoteFile]], path: str) -> ReplicaFile:
    """Open a file at each node, and return one file for all that have it.

    Args:
        open_one: for each node, what opens its file.
        path: of the file, for messages.

    Raises OSError: ESTALE, the files differ in size, or in one of 16 samples of 4 KiB; that of the
    first node, if no node can open it.
    """
    found, failures = dict[RemoteFile, tuple[int, bytes]](), list[Exception]()
    with ExitStack() as stack:
        for call in open_one:
            try:
                file = call()
                stack.callback(file.close)
                found[file] = file.size, _samples(file)
            except (OSError, ShortReadError, ClosedError) as error:
                log.warning("%s: not used: %s", path, str(error))
                failures.append(error)
        if not found:
            raise failures[0]
        first = next(iter(found))
        for file, about in found.items():
            if about != found[first]:
                text = f"the file differs from that at {first.node}; serve the same at each node"
                raise os_error(errno.ESTALE, text, file.name)
        stack.pop_all()
    return ReplicaFile([*found], path, found[first][0])


def _samples(file: RemoteFile) -> bytes:
    """Return the samples of a file."""
    size = file.size
    length = min(_SAMPLE, size)
    ranges = [
        ((size - length) * index // (_SAMPLES - 1), index * _SAMPLE, length)
        for index in range(_SAMPLES)
    ]
    with allocate(_SAMPLES * _SAMPLE, exporter="memfd") as buffer:
        file.move("read", buffer, ranges, Terms(audit="off"), None, whole=True)
        return buffer.pread(buffer.size, 0)

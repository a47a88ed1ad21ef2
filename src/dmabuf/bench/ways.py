"""The ways of moving bytes between a file and a Buffer: our routes, and how people do it today.

Each moves the same blocks to or from the same Buffer. `run` moves many, and returns when the last
is there; of a write, when all of it is on the medium (fdatasync). `single` is for the latency of
one block.
"""

from __future__ import annotations

import errno
import mmap
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from dmabuf._ffi import ffi
from dmabuf.buffer import Buffer
from dmabuf.engine import Engine, Job, Outcome
from dmabuf.errors import RouteUnavailable, os_error
from dmabuf.file import File, Mode
from dmabuf.route import Direction, Route

TODAY = ("copy", "bounce", "mmap")
"""How people do it today, the one that is compared with first."""

LONG = {
    ("read", "copy"): "cold buffered read and copy",
    ("read", "bounce"): "O_DIRECT into a bounce and copy",
    ("read", "mmap"): "mmap and copy",
    ("write", "copy"): "copy and buffered write",
    ("write", "bounce"): "copy into a bounce and O_DIRECT",
    ("write", "mmap"): "copy into mmap",
}
"""What each of them does."""


@dataclass(frozen=True, slots=True)
class Place:
    """Both ends, and the range of the file that belongs to the buffer from its byte 0 on."""

    file: File
    buffer: Buffer
    start: int
    size: int

    @property
    def path(self) -> str:
        """The file's name, for errors."""
        return self.file._target.path


class Timed(Engine):
    """An engine that keeps how long each request of its last job took."""

    joins = False  # each block is a request
    latencies: array[int] = array("Q")
    """Nanoseconds, in the order of the segments."""

    def run(self, job: Job, *, nested: bool = False) -> Outcome:
        """As any engine does."""
        self.latencies = array("Q", bytes(8 * job.count))
        timed = job._replace(latencies=ffi.from_buffer("uint64_t[]", self.latencies))
        return super().run(timed, nested=nested)


class Way(ABC):
    """One way, in one direction and with one size of block."""

    name: str

    def __init__(self, place: Place, direction: Direction, block: int) -> None:
        self._place = place
        self._write = direction == "write"
        self._block = block

    def begin(self) -> None:  # noqa: B027 - most need none
        """What comes before a run and is not part of it."""

    def end(self) -> None:  # noqa: B027
        """What comes after a run and is not part of it."""

    @abstractmethod
    def run(self, segments: array[int]) -> None:
        """Move blocks: triples of file offset, buffer offset and size.

        Raises:
            RouteUnavailable: it turned out that they do not go this way.
        """

    @abstractmethod
    def single(self) -> AbstractContextManager[Callable[[int, int], None]]:
        """What moves one block between a file offset and a buffer offset, flushing nothing."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""


class ByRoute(Way):
    """A route of ours: one array of requests by `read_segments` or `write_segments`."""

    def __init__(
        self, place: Place, direction: Direction, block: int, route: Route, engine: Timed
    ) -> None:
        super().__init__(place, direction, block)
        self.name = route.value
        self._engine = engine
        self._route = route
        mode: Mode = "r+" if place.file.writable() else "r"
        self._file = File(place.file.fileno(), mode, engine=engine)
        self.registered = False
        """Whether the last run's buffer was registered with io_uring."""
        try:
            self._file.plan(
                place.buffer,
                direction,
                size=place.size,
                file_offset=place.start,
                route=route,
            )
        except BaseException:
            self._file.close()
            raise

    def run(self, segments: array[int]) -> None:
        """As one array."""
        buffer, route = self._place.buffer, self._route
        if self._write:
            record = self._file.write_segments(
                buffer, segments, route=route, sync=True, audit="off"
            )
        else:
            record = self._file.read_segments(buffer, segments, route=route, audit="off")
        if record.route is not route:
            raise RouteUnavailable(record.rejected.get(route, record.reason), self._place.path)
        self.registered = record.registered

    @property
    def latencies(self) -> array[int]:
        """Nanoseconds of each request of the last run, from being made to its completion."""
        return self._engine.latencies

    @contextmanager
    def single(self) -> Iterator[Callable[[int, int], None]]:
        """By `read_into` or `write_from`."""
        move = self._file.write_from if self._write else self._file.read_into
        buffer, block, route = self._place.buffer, self._block, self._route

        def one(offset: int, at: int) -> None:
            move(buffer, block, file_offset=offset, buffer_offset=at, route=route, audit="off")

        yield one

    def close(self) -> None:
        """Close its File."""
        self._file.close()


class _Today(Way):
    """One thread, one block after the other, with what Python's os and mmap have."""

    def run(self, segments: array[int]) -> None:
        """One after the other, inside one bracket of CPU access to the buffer."""
        move = self._put if self._write else self._get
        with self._place.buffer.map("r" if self._write else "w") as view:
            for i in range(0, len(segments), 3):
                move(view, segments[i], segments[i + 1])
        if self._write:
            self._flush()

    @contextmanager
    def single(self) -> Iterator[Callable[[int, int], None]]:
        """Inside a bracket that is held open: the copy and the system call alone."""
        with self._place.buffer.map("r" if self._write else "w") as view:
            yield partial(self._put if self._write else self._get, view)

    @abstractmethod
    def _get(self, view: memoryview, offset: int, at: int) -> None: ...

    @abstractmethod
    def _put(self, view: memoryview, offset: int, at: int) -> None: ...

    def _flush(self) -> None:
        os.fdatasync(self._place.file.fileno())


class Copying(_Today):
    """pread or pwrite of a block of memory of one's own, and a copy."""

    def __init__(self, place: Place, direction: Direction, block: int, name: str, fd: int) -> None:
        super().__init__(place, direction, block)
        self.name = name
        self._fd = fd
        self._memory = mmap.mmap(-1, block)  # page-aligned, as O_DIRECT wants it
        self._memory.write(bytes(block))  # no first touch in a run
        self._bounce = memoryview(self._memory)

    def _get(self, view: memoryview, offset: int, at: int) -> None:
        self._check(os.preadv(self._fd, [self._bounce], offset), offset)
        view[at : at + self._block] = self._bounce

    def _put(self, view: memoryview, offset: int, at: int) -> None:
        self._bounce[:] = view[at : at + self._block]
        self._check(os.pwritev(self._fd, [self._bounce], offset), offset)

    def _check(self, done: int, offset: int) -> None:
        if done != self._block:
            text = f"{done} of {self._block} bytes were moved at offset {offset}"
            raise os_error(errno.EIO, text, self._place.path)

    def close(self) -> None:
        """Give the memory back."""
        self._bounce.release()
        self._memory.close()


class Mapping(_Today):
    """mmap of the file, and a copy; the mapping is made anew for each run."""

    name = "mmap"

    def begin(self) -> None:
        """Map the range."""
        place = self._place
        access = mmap.ACCESS_WRITE if self._write else mmap.ACCESS_READ
        self._memory = mmap.mmap(place.file.fileno(), place.size, access=access, offset=place.start)
        self._view = memoryview(self._memory)

    def end(self) -> None:
        """Unmap it: mapped pages cannot be dropped."""
        self._view.release()
        self._memory.close()

    def _get(self, view: memoryview, offset: int, at: int) -> None:
        offset -= self._place.start
        view[at : at + self._block] = self._view[offset : offset + self._block]

    def _put(self, view: memoryview, offset: int, at: int) -> None:
        offset -= self._place.start
        self._view[offset : offset + self._block] = view[at : at + self._block]

    def close(self) -> None:
        """Nothing is held between runs."""


def by_route(
    place: Place, direction: Direction, block: int, engine: Timed
) -> tuple[list[ByRoute], dict[str, str]]:
    """The routes there are, and why each other is not to be had."""
    ways, refused = [], {}
    for route in Route:
        try:
            ways.append(ByRoute(place, direction, block, route, engine))
        except RouteUnavailable as refusal:
            refused[route.value] = refusal.reason.partition(f"{route}: ")[2] or refusal.reason
    return ways, refused


def today(place: Place, direction: Direction, block: int) -> tuple[list[Way], dict[str, str]]:
    """The ways that people do it today, and why one is not to be had."""
    direct = place.file._target.direct()
    ways: list[Way] = [Copying(place, direction, block, "copy", place.file.fileno())]
    if not direct.refusal:
        ways.append(Copying(place, direction, block, "bounce", direct.fd))
    ways.append(Mapping(place, direction, block))
    return ways, {"bounce": direct.refusal} if direct.refusal else {}

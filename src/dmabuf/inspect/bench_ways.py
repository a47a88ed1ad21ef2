"""The ways to move bytes between a file and a Buffer: our routes, and what people use today.

Each way moves the same blocks to or from the same Buffer. `run` moves many and returns when the
last has arrived; a write has then reached the medium (fdatasync). `one` moves one block, unflushed.
"""

from __future__ import annotations

import errno
import mmap
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from dmabuf.errors import RouteUnavailable, os_error
from dmabuf.kernel import files
from dmabuf.memory import Buffer
from dmabuf.transfer import Direction, Engine, File, Mode, Route

TODAY = {
    "copy": ("a buffered read and a copy", "a copy and a buffered write"),
    "bounce": ("O_DIRECT into a bounce buffer and a copy", "a copy and O_DIRECT from a bounce"),
    "mmap": ("mmap and a copy", "a copy into mmap"),
}
"""What people use today, and how it reads and writes; the first is the baseline."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file, a buffer, and the range of the file that corresponds to the whole buffer."""

    file: File
    buffer: Buffer
    name: str
    start: int
    size: int


class Way(ABC):
    """A way in one direction, for one block size."""

    def __init__(self, name: str, place: Place, direction: Direction, block: int) -> None:
        self.name = name
        self.registered = False
        """Whether the buffer was registered with io_uring in the last run."""
        self._place = place
        self._write = direction == "write"
        self._block = block

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Prepare a run, outside the measured time."""
        yield

    @abstractmethod
    def run(self, segments: array[int]) -> None:
        """Move blocks: triples of file offset, buffer offset and size.

        Raises:
            RouteUnavailable: the blocks did not go this way.
        """

    @abstractmethod
    def one(self) -> AbstractContextManager[Callable[[int, int], object]]:
        """Return what moves one block between a file offset and a buffer offset."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release what the way holds."""


class ByRoute(Way):
    """A route: all blocks by one call of `read_segments` or `write_segments`."""

    def __init__(
        self, place: Place, direction: Direction, block: int, route: Route, engine: Engine
    ) -> None:
        super().__init__(route.value, place, direction, block)
        self._route = route
        mode: Mode = "r+" if place.file.writable() else "r"
        self._file = File(place.file.fileno(), mode, engine=engine)
        try:
            self._file.plan(
                place.buffer, direction, size=place.size, file_offset=place.start, route=route
            )
        except BaseException:
            self._file.close()
            raise

    def run(self, segments: array[int]) -> None:
        """Move blocks as one array."""
        buffer, route = self._place.buffer, self._route
        if self._write:
            record = self._file.write_segments(
                buffer, segments, route=route, sync=True, audit="off"
            )
        else:
            record = self._file.read_segments(buffer, segments, route=route, audit="off")
        if record.route is not route:
            raise RouteUnavailable(record.rejected.get(route, record.reason), self._place.name)
        self.registered = record.registered

    def one(self) -> AbstractContextManager[Callable[[int, int], object]]:
        """Return a call of `read_into` or `write_from`."""
        move = self._file.write_from if self._write else self._file.read_into
        buffer, block, route = self._place.buffer, self._block, self._route

        def one(offset: int, at: int) -> None:
            move(buffer, block, file_offset=offset, buffer_offset=at, route=route, audit="off")

        return nullcontext(one)

    def close(self) -> None:
        """Close the File."""
        self._file.close()


class _Today(Way):
    """One thread that moves one block after the other with Python's os and mmap."""

    def run(self, segments: array[int]) -> None:
        """Move blocks one after the other, inside one bracket of CPU access."""
        with self.one() as move:
            for i in range(0, len(segments), 3):
                move(segments[i], segments[i + 1])
        if self._write:
            os.fdatasync(self._place.file.fileno())

    @contextmanager
    def one(self) -> Iterator[Callable[[int, int], object]]:
        """Return a copy and a system call, inside a bracket that stays open."""
        with self._place.buffer.map("r" if self._write else "w") as view:
            yield partial(self._put if self._write else self._get, view)

    @abstractmethod
    def _get(self, view: memoryview, offset: int, at: int) -> None: ...

    @abstractmethod
    def _put(self, view: memoryview, offset: int, at: int) -> None: ...


class _Copying(_Today):
    """pread or pwrite of a block of private memory, and a copy."""

    def __init__(
        self, name: str, place: Place, direction: Direction, block: int, fd: int, owned: bool
    ) -> None:
        super().__init__(name, place, direction, block)
        self._fd, self._owned = fd, owned
        self._memory = mmap.mmap(-1, block)  # page-aligned, as O_DIRECT requires
        self._memory.write(bytes(block))  # so that no page is touched first in a run
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
            raise os_error(errno.EIO, text, self._place.name)

    def close(self) -> None:
        """Free the memory and close an own descriptor."""
        self._bounce.release()
        self._memory.close()
        if self._owned:
            os.close(self._fd)


class _Mapping(_Today):
    """mmap of the file, made anew for each run, and a copy."""

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Map the range during a run only: mapped pages cannot be dropped from the cache."""
        place = self._place
        access = mmap.ACCESS_WRITE if self._write else mmap.ACCESS_READ
        with (
            mmap.mmap(place.file.fileno(), place.size, access=access, offset=place.start) as memory,
            memoryview(memory) as self._view,
        ):
            yield

    def _get(self, view: memoryview, offset: int, at: int) -> None:
        offset -= self._place.start
        view[at : at + self._block] = self._view[offset : offset + self._block]

    def _put(self, view: memoryview, offset: int, at: int) -> None:
        offset -= self._place.start
        self._view[offset : offset + self._block] = view[at : at + self._block]


def by_route(
    place: Place, direction: Direction, block: int, engine: Engine
) -> tuple[list[Way], dict[str, str]]:
    """Return the available routes, and why each other is not available."""
    ways: list[Way] = []
    refused = {}
    for route in Route:
        try:
            ways.append(ByRoute(place, direction, block, route, engine))
        except RouteUnavailable as refusal:
            refused[route.value] = refusal.reason.partition(f"{route}: ")[2] or refusal.reason
    return ways, refused


def today(place: Place, direction: Direction, block: int) -> tuple[list[Way], dict[str, str]]:
    """Return what people use today, and why one of it is not available."""
    fd, file = place.file.fileno(), place.file
    kind = files.kind_of(os.fstat(fd).st_mode)
    assert kind is not None
    direct = files.open_direct(fd, kind, file.writable(), file.readable())
    ways: list[Way] = [_Copying("copy", place, direction, block, fd, False)]
    if direct.refusal is None:
        ways.append(_Copying("bounce", place, direction, block, direct.fd, True))
    ways.append(_Mapping("mmap", place, direction, block))
    return ways, {"bounce": direct.refusal} if direct.refusal else {}

"""The data of a request at the node's end: between ranges of a file, blocks, and the client."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from dmabuf.copying import Reader, Source
from dmabuf.errors import ShortReadError
from dmabuf.memory import Buffer, allocate
from dmabuf.remote.channel import Channel
from dmabuf.remote.protocol import Malformed
from dmabuf.remote.ranges import Range, Ranges, total
from dmabuf.transfer import File, Terms

BLOCK = 8 << 20
_BLOCKS = 3
_SMALL_BLOCK = 256 << 10
_POOLS = 8
"""Sets of staging blocks that are kept for all clients; further clients get small ones."""


def staging_blocks(size: int = BLOCK, count: int = _BLOCKS) -> list[Buffer]:
    """Return new blocks of memory between a file and a client."""
    with ExitStack() as stack:
        made = [
            stack.enter_context(allocate(size, exporter="memfd", name="dmabuf remote"))
            for _ in range(count)
        ]
        stack.pop_all()
        return made


def free(blocks: Sequence[Buffer]) -> None:
    """Free staging blocks."""
    for block in blocks:
        block.close()


class Pools:
    """The staging blocks of all clients."""

    def __init__(self) -> None:
        self._idle: deque[list[Buffer]] = deque([] for _ in range(_POOLS))
        """Sets that no client uses; one that was never used is empty."""

    @contextmanager
    def take(self, nbytes: int) -> Iterator[list[Buffer]]:
        """Give blocks for a request of so many bytes."""
        pool: list[Buffer] | None = None
        if nbytes > _SMALL_BLOCK:
            with suppress(IndexError):
                pool = self._idle.pop()
        if pool is None:
            small = staging_blocks(_SMALL_BLOCK, 2)
            try:
                yield small
            finally:
                free(small)
            return
        try:
            pool.extend([] if pool else staging_blocks())
            yield pool
        finally:
            self._idle.append(pool)

    def close(self) -> None:
        """Free the memory."""
        for pool in self._idle:
            free(pool)


class Data:
    """The data of one request, to the client or from it: by the socket of the connection.

    A subclass has another way, and uses the channel only for messages.
    """

    by_card = False
    """Whether a network card moves it, without the CPU."""

    def __init__(self, channel: Channel, pools: Pools) -> None:
        self.channel, self._pools = channel, pools
        self._left = 0  # bytes that the client announced, and whose message has not begun
        self._message = 0  # bytes left of the present message

    @property
    def takes_files(self) -> bool:
        """Whether `send_content` takes descriptors."""
        return self.channel.sends_files

    def blocks(self, nbytes: int) -> AbstractContextManager[list[Buffer]]:
        """Give staging blocks for so many bytes."""
        return self._pools.take(nbytes)

    def begin(self, sizes: Sequence[int]) -> None:
        """Take in the sizes of the ranges of the request."""
        self._left = sum(sizes)

    # -- to the client

    def announce(self) -> None:
        """Begin to send."""
        self.channel.announce(self._left)

    def send_block(self, block: Buffer, size: int) -> None:
        """Send the first bytes of a block."""
        if size:
            with block.map("r", 0, size) as view:
                self.channel.send_data(view)

    def send_content(self, content: int | memoryview, size: int) -> tuple[int, int]:
        """Send a memory file or memory; return the number of calls, and the bytes copied for it."""
        if isinstance(content, int):
            return self.channel.send_file(content, 0, size)[1], 0
        self.channel.send_data(content)
        return 1, size

    def flush(self) -> None:
        """Send what `send_content` has kept back."""

    # -- from the client

    def read(self, block: Buffer, at: int, size: int) -> None:
        """Receive the next bytes into a block; in any thread."""
        with block.map("w", at, size) as view:
            self.read_into(view)

    def read_into(self, view: memoryview) -> None:
        """Receive the next bytes, as many as fit into the view."""
        done = 0
        while done < len(view):
            if not self._message:
                self._message = self._next()
                self._left -= self._message
                if self._left < 0:
                    raise Malformed("the client sent more data than it announced")
            with view[done : done + self._message] as part:
                before = self.channel.received
                try:
                    self.channel.read_into(part)
                finally:
                    self._message -= self.channel.received - before
                done += len(part)

    def _next(self) -> int:
        found = self.channel.receive()
        if not isinstance(found, int):
            raise Malformed("the client sent less data than it announced")
        return found

    def moved(self, size: int) -> None:
        """Report to a client that does not count what it sends."""

    def finish(self) -> None:
        """Receive the message that ends the data."""
        if self._message or not self.channel.receive_message().get("end", bool):
            raise Malformed("the client sent more data than it announced")

    def drain(self) -> None:
        """Receive what the client still sends before it reads that its request failed."""
        scratch = memoryview(bytearray(_SMALL_BLOCK))
        while True:
            while self._message:
                with scratch[: self._message] as part:
                    self._message -= len(part)
                    self.channel.read_into(part)
            found = self.channel.receive()
            if not isinstance(found, int):
                return
            self._message = found


def _segments(ranges: Sequence[Range], at: int) -> array[int]:
    """Return the segments between ranges of a file and a buffer from `at` on."""
    found = array("Q")
    for offset, size in ranges:
        found.extend((offset, at, size))
        at += size
    return found


class FileRanges(Source):
    """Ranges of a file, one after the other."""

    def __init__(self, file: File, ranges: Sequence[Range], terms: Terms) -> None:
        super().__init__(str(file.name), terms, None)
        self._file, self._left = file, Ranges(ranges)

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Read the next bytes into the buffer, and return how many."""
        segments = _segments(self._left.take(size), at)
        try:
            self.tally.add(self._file.read_segments(buffer, segments, terms=self.terms))
        except ShortReadError:  # the file had the bytes when the request came
            raise ShortReadError("the file shrank while it was read") from None
        return size


class FromClient(Source):
    """The data of a client, which is written to ranges of a file."""

    def __init__(self, data: Data, terms: Terms) -> None:
        super().__init__(data.channel.name, terms, None)
        self._data = data

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Receive the next bytes into the buffer, and return how many."""
        self._data.read(buffer, at, size)
        return size

    def write_all(self, file: File, ranges: Sequence[Range], pool: list[Buffer]) -> None:
        """Write all of it to ranges of a file, receiving ahead."""
        left, most, done = Ranges(ranges), total(ranges), 0
        if not most:
            return
        with Reader(self, pool, most, whole=True, ahead=most > pool[0].size) as reader:
            while done < most:
                filled = reader.take()
                if filled.error is not None:
                    raise filled.error
                try:
                    moved = file.write_segments(
                        filled.buffer, _segments(left.take(filled.size), 0), terms=self.terms
                    )
                except OSError as error:
                    error.nbytes = done + getattr(error, "nbytes", 0)  # type: ignore[attr-defined]
                    raise
                self.tally.add(moved)
                self._data.moved(filled.size)
                done += filled.size
                reader.give_back(filled.buffer)

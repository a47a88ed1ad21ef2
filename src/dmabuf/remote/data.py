"""The data of a request at the node's end: between ranges of a file, blocks, and the client.

The client is reached through the socket of the connection, or by NIXL in its pump.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence

from dmabuf.copying import Reader, Source
from dmabuf.errors import ShortReadError
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.nixl import BLOCK, Mover
from dmabuf.remote.protocol import Malformed
from dmabuf.remote.ranges import Range, Ranges, total
from dmabuf.transfer import File, Terms

_SCRATCH = 256 << 10


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
        self._file, self._ranges = file, Ranges(ranges)

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Read the next bytes into the buffer, and return how many."""
        taken = self._ranges.take(size)
        if len(taken) == 1:
            [(offset, size)] = taken
            done = self._file.read_into(
                buffer, size, file_offset=offset, buffer_offset=at, terms=self.terms
            )
        else:
            done = self._file.read_segments(buffer, _segments(taken, at), terms=self.terms)
        self.tally.add(done)
        return done.nbytes

    def check_end(self, missing: int) -> None:
        """Raise ShortReadError: the file had the bytes when the request came."""
        raise ShortReadError("the file shrank while it was read")


class SocketSource(Source):
    """The data that a client sends after its request."""

    def __init__(self, channel: Channel, size: int, terms: Terms) -> None:
        super().__init__(channel.name, terms, None)
        self._channel, self._left = channel, size
        self._message = 0  # bytes left of the present one

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Receive the next bytes into the buffer, and return how many."""
        with buffer.map("w", at, size) as view:
            self.read_into(view)
        return size

    def read_into(self, view: memoryview) -> None:
        """Receive the next bytes, as many as fit into the view."""
        done = 0
        while done < len(view):
            if not self._message:
                self._next()
            with view[done : done + self._message] as part:
                before = self._channel.received
                try:
                    self._channel.read_into(part)
                finally:
                    self._message -= self._channel.received - before
                done += len(part)

    def _next(self) -> None:
        found = self._channel.receive()
        if not isinstance(found, int):
            raise Malformed("the client sent less data than it announced")
        if found > self._left:
            raise Malformed("the client sent more data than it announced")
        self._message, self._left = found, self._left - found

    def moved(self, size: int) -> None:
        """Do nothing: the client counts what it sends."""

    def finish(self) -> None:
        """Receive the message that ends the data."""
        if self._message or not self._channel.receive_message().get("end", bool):
            raise Malformed("the client sent more data than it announced")

    def drain(self) -> None:
        """Receive what the client still sends before it reads that its request failed."""
        scratch = memoryview(bytearray(_SCRATCH))
        while True:
            while self._message:
                self.read_into(scratch[: min(self._message, len(scratch))])
            found = self._channel.receive()
            if not isinstance(found, int):
                return
            self._message = found


class Far:
    """The places in a client's pump of the data of a request, one after the other."""

    def __init__(self, channel: Channel, mover: Mover, ranges: Sequence[Range]) -> None:
        self.name, self.by_card, self.blocks = channel.name, mover.by_card, mover.blocks
        self._channel, self._mover, self._ranges = channel, mover, Ranges(ranges)
        self._filled = 0  # bytes of the first block that `write_content` has yet to move

    def moved(self, size: int) -> None:
        """Tell the client that so many bytes have moved."""
        self._channel.send(protocol.pack(moved=size))

    def write(self, block: Buffer, size: int) -> None:
        """Write the first bytes of a block to the next places."""
        if size:
            self._mover.move_block(
                "WRITE", block, 0, self._ranges.take(size), self._channel.keep_waiting
            )
            self.moved(size)

    def read(self, block: Buffer, at: int, size: int) -> None:
        """Read the next places into a block; in any thread."""
        self._mover.move_block("READ", block, at, self._ranges.take(size))

    def write_content(self, content: int | memoryview, size: int) -> int:
        """Write a memory file or memory to the next places; return the bytes copied to do so.

        What is smaller than a block is collected in one, until `flush`.
        """
        if isinstance(content, int) and size >= BLOCK:
            self.flush()
            [(address, _)] = self._ranges.take(size)
            self._mover.write_file(content, size, address, self._channel.keep_waiting)
            self.moved(size)
            return 0
        done, block = 0, self.blocks[0]
        while done < size:
            part = min(size - done, block.size - self._filled)
            with block.map("rw", self._filled, part) as view:
                if not isinstance(content, int):
                    view[:] = content[done : done + part]
                elif os.preadv(content, [view], done) != part:
                    raise ShortReadError("the memory file shrank while it was read")
            done, self._filled = done + part, self._filled + part
            if self._filled == block.size:
                self.flush()
        return size

    def flush(self) -> None:
        """Write what was collected."""
        filled, self._filled = self._filled, 0
        self.write(self.blocks[0], filled)


class FarSource(Source):
    """The data of a client that NIXL fetches."""

    def __init__(self, far: Far, terms: Terms) -> None:
        super().__init__(far.name, terms, None)
        self._far = far
        self.moved = far.moved

    def read(self, buffer: Buffer, at: int, size: int, *, whole: bool, more: bool) -> int:
        """Fetch the next bytes into a block, and return how many."""
        self._far.read(buffer, at, size)
        return size

    def read_into(self, view: memoryview) -> None:
        """Fetch the next bytes, as many as fit into the view."""
        block = self._far.blocks[0]
        for at in range(0, len(view), block.size):
            with view[at : at + block.size] as part:
                self._far.read(block, 0, len(part))
                with block.map("r", 0, len(part)) as fetched:
                    part[:] = fetched
                self.moved(len(part))

    def finish(self) -> None:
        """Do nothing: no message ends the data."""

    drain = finish


def write_all(
    file: File,
    ranges: Sequence[Range],
    terms: Terms,
    data: SocketSource | FarSource,
    pool: list[Buffer],
) -> None:
    """Write the data of a client to ranges of a file, receiving ahead."""
    left, most, done = Ranges(ranges), total(ranges), 0
    if not most:
        return
    with Reader(data, pool, most, whole=True, ahead=most > pool[0].size) as reader:
        while done < most:
            filled = reader.take()
            if filled.error is not None:
                raise filled.error
            taken = left.take(filled.size)
            try:
                if len(taken) == 1:
                    [(offset, size)] = taken
                    moved = file.write_from(filled.buffer, size, file_offset=offset, terms=terms)
                else:
                    moved = file.write_segments(filled.buffer, _segments(taken, 0), terms=terms)
            except OSError as error:
                error.nbytes = done + getattr(error, "nbytes", 0)  # type: ignore[attr-defined]
                raise
            data.tally.add(moved)
            data.moved(filled.size)
            done += filled.size
            reader.give_back(filled.buffer)

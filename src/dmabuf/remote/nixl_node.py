"""Engine nixl at the node's end: a pump that writes to the client's pump and reads from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from dmabuf.errors import ShortReadError
from dmabuf.memory import Buffer
from dmabuf.remote import protocol
from dmabuf.remote.channel import Channel
from dmabuf.remote.data import BLOCK, Data, free, staging_blocks
from dmabuf.remote.nixl import is_rdma
from dmabuf.remote.protocol import Malformed
from dmabuf.remote.pump import Operation, Part, Pump
from dmabuf.remote.ranges import Range, Ranges


class NixlEnd:
    """The pump for one client, and the staging blocks that it moves bytes from and to.

    The blocks are of this connection alone: its peer can reach what the pump has mapped.
    """

    def __init__(self, transports: str, device: str | None, start: float, timeout: float) -> None:
        self.by_card = is_rdma(transports)
        self._timeout = timeout
        self.pump = Pump(transports, device, start)
        self._blocks: list[Buffer] = []
        self._at: dict[int, int] = {}

    def close(self) -> None:
        """End the pump, and free the memory."""
        self.pump.close()
        free(self._blocks)
        self._blocks = []

    @property
    def blocks(self) -> list[Buffer]:
        """The staging blocks."""
        if not self._blocks:
            made = staging_blocks()
            try:
                for block in made:
                    region = self.pump.grant(block.fileno(), block.size, writable=True)
                    self._at[id(block)] = region.address
            except BaseException:
                free(made)
                raise
            self._blocks = made
        return self._blocks

    def move_block(
        self,
        operation: Operation,
        block: Buffer,
        at: int,
        there: Sequence[Range],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Move bytes between a block from `at` on and ranges of addresses in the client's pump."""
        local, parts = self._at[id(block)] + at, list[Part]()
        for remote, size in there:
            parts.append(Part(local, remote, size))
            local += size
        self.pump.move(operation, parts, self._timeout, tick)

    def write_file(self, fd: int, size: int, address: int, tick: Callable[[], None]) -> None:
        """Write a memory file to an address of the client's pump."""
        region = self.pump.grant(fd, size, writable=self.by_card)  # as the card registers it
        self.pump.move("WRITE", [Part(region.address, address, size)], self._timeout, tick)
        self.pump.revoke(region)


class NixlData(Data):
    """The data of one request, which the node's pump writes to places in the client's or reads."""

    takes_files = True

    def __init__(self, channel: Channel, nixl: NixlEnd, addresses: Sequence[int]) -> None:
        self.channel, self.by_card = channel, nixl.by_card
        self._nixl, self._addresses = nixl, addresses
        self._filled = 0  # bytes of the first block that `send_content` has yet to move

    def blocks(self, nbytes: int) -> AbstractContextManager[list[Buffer]]:
        """Give the staging blocks that the pump has mapped."""
        return nullcontext(self._nixl.blocks)

    def begin(self, sizes: Sequence[int]) -> None:
        """Take in the sizes of the ranges of the request."""
        if len(sizes) != len(self._addresses):
            raise Malformed("another number of addresses than of ranges")
        self._places = Ranges(zip(self._addresses, sizes, strict=True))

    def announce(self) -> None:
        """Do nothing: no data goes through the channel."""

    def moved(self, size: int) -> None:
        """Tell the client that so many bytes have moved."""
        self.channel.send(protocol.pack(moved=size))

    def send_block(self, block: Buffer, size: int) -> None:
        """Write the first bytes of a block to the next places."""
        if size:
            tick = self.channel.keep_waiting
            self._nixl.move_block("WRITE", block, 0, self._places.take(size), tick)
            self.moved(size)

    def send_content(self, content: int | memoryview, size: int) -> tuple[int, int]:
        """Write a memory file or memory to the next places.

        What is smaller than a block is collected in one, until `flush`.
        """
        if isinstance(content, int) and size >= BLOCK:
            self.flush()
            [(address, _)] = self._places.take(size)
            self._nixl.write_file(content, size, address, self.channel.keep_waiting)
            self.moved(size)
            return 1, 0
        done, block = 0, self._nixl.blocks[0]
        while done < size:
            part = min(size - done, block.size - self._filled)
            with block.map("r+", self._filled, part) as view:
                if not isinstance(content, int):
                    view[:] = content[done : done + part]
                elif os.preadv(content, [view], done) != part:
                    raise ShortReadError("the memory file shrank while it was read")
            done, self._filled = done + part, self._filled + part
            if self._filled == block.size:
                self.flush()
        return 1, size

    def flush(self) -> None:
        """Write what was collected."""
        filled, self._filled = self._filled, 0
        self.send_block(self._nixl.blocks[0], filled)

    def read(self, block: Buffer, at: int, size: int) -> None:
        """Read the next places into a block; in any thread."""
        self._nixl.move_block("READ", block, at, self._places.take(size))

    def read_into(self, view: memoryview) -> None:
        """Read the next places, as many bytes as fit into the view."""
        block = self._nixl.blocks[0]
        for at in range(0, len(view), block.size):
            with view[at : at + block.size] as part:
                self.read(block, 0, len(part))
                with block.map("r", 0, len(part)) as fetched:
                    part[:] = fetched
                self.moved(len(part))

    def finish(self) -> None:
        """Do nothing: no message ends the data."""

    drain = finish

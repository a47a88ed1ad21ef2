"""A device whose copies end when a test lets them, and which notices what would harm it."""

import ctypes
from collections import deque
from dataclasses import dataclass

BASE = 0x7F00_0000_0000
"""Where the device's memory begins: no address of the host's."""


@dataclass(eq=False)
class Copying:
    """One copy that was begun."""

    number: int
    host: int
    device: int
    size: int
    to_device: bool
    before: bytes = b""
    ended: bool = False
    error: OSError | None = None


class FakeDevice:
    """A `Copier` whose memory is a bytearray.

    Copies end in order: each call of `finished` or `idle` counts, and the oldest ends after ``lag``
    of them. ``events`` lists what happened; ``broken`` lists what would harm a real device: memory
    that was unpinned, changed or reused during a copy.

    ``fail_begin`` and ``fail_end`` have the OSError of the copy with that number, ``fail_pin`` and
    ``fail_unpin`` those of the calls so counted. From the copy ``lost_at`` on nothing ends, and
    every call fails.
    """

    name = "fake:0"

    def __init__(self, size: int, lag: int = 2) -> None:
        self.memory = bytearray(size)
        self.lag, self.asked = lag, 0
        self.flying: deque[Copying] = deque()
        self.pinned: dict[int, int] = {}
        self.pins = self.unpins = self.begun = 0
        self.events: list[tuple[str, int]] = []
        self.broken: list[str] = []
        self.fail_begin: dict[int, OSError] = {}
        self.fail_end: dict[int, OSError] = {}
        self.fail_pin: dict[int, OSError] = {}
        self.fail_unpin: dict[int, OSError] = {}
        self.lost_at: int | None = None
        self.closed = 0

    # -- Copier

    def pin(self, address: int, size: int) -> None:
        self.pins += 1
        if self.pins in self.fail_pin:
            raise self.fail_pin[self.pins]
        self.pinned[address] = size

    def unpin(self, address: int) -> None:
        if address not in self.pinned:
            return
        self.unpins += 1
        if any(address <= copy.host < address + self.pinned[address] for copy in self.flying):
            self.broken.append("unpinned under a copy")
        if self.unpins in self.fail_unpin:
            raise self.fail_unpin[self.unpins]
        del self.pinned[address]

    def to_device(self, device: int, host: int, size: int) -> Copying:
        return self._begin(device, host, size, True)

    def to_host(self, host: int, device: int, size: int) -> Copying:
        return self._begin(device, host, size, False)

    def finished(self, copy: Copying) -> bool:
        if not copy.ended:
            self._step()
        if copy.error is not None:
            raise copy.error
        return copy.ended

    def idle(self) -> bool:
        self._step()
        return not self.flying

    def close(self) -> None:
        if self.flying:
            self.broken.append("closed under a copy")
        self.closed += 1

    # -- how it works

    def _begin(self, device: int, host: int, size: int, to_device: bool) -> Copying:
        start = device - BASE
        assert start >= 0 and start + size <= len(self.memory) and size > 0
        if not any(a <= host and host + size <= a + n for a, n in self.pinned.items()):
            self.broken.append("a copy of memory that is not pinned")
        if any(copy.host == host for copy in self.flying):
            self.broken.append("two copies of one block")
        copy = Copying(self.begun, host, start, size, to_device)
        self.begun += 1
        if copy.number in self.fail_begin:
            raise self.fail_begin[copy.number]
        copy.before = ctypes.string_at(host, size)
        self.flying.append(copy)
        self.events.append(("begin", copy.number))
        return copy

    def _step(self) -> None:
        if not self.flying:
            return
        if self.lost_at is not None and self.flying[0].number >= self.lost_at:
            raise OSError(5, "the device has fallen off the bus")
        self.asked += 1
        if self.asked < self.lag:
            return
        self.asked, copy = 0, self.flying.popleft()
        if ctypes.string_at(copy.host, copy.size) != copy.before:
            self.broken.append(f"the block of copy {copy.number} changed under it")
        copy.error = self.fail_end.get(copy.number)
        if copy.error is None:
            end = copy.device + copy.size
            if copy.to_device:
                self.memory[copy.device : end] = copy.before
            else:
                ctypes.memmove(copy.host, bytes(self.memory[copy.device : end]), copy.size)
        copy.ended = True
        self.events.append(("end", copy.number))

    def check(self) -> None:
        """Nothing was harmed, and nothing is under way."""
        assert self.broken == []
        assert not self.flying

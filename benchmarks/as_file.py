"""What a read(2) or write(2) costs on the files that as_file() makes, beside a copy in memory.

    .venv/bin/python benchmarks/as_file.py

FUSE is measured on a dma-buf where there is an exporter of them, else on a memfd in its place.
"""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable

import dmabuf
from dmabuf import _as_file

SIZE = 64 << 20
SIZES = (4 << 10, 64 << 10, 1 << 20)
ROUNDS = 7


def microseconds(call: Callable[[int], object], size: int) -> float:
    """The median of some rounds; each goes through the file once, up to 2000 calls."""
    offsets = range(0, min(SIZE, 2000 * size), size)
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for offset in offsets:
            call(offset)
        taken.append((time.perf_counter() - begun) / len(offsets) * 1e6)
    return statistics.median(taken)


def measure(what: str, read: Callable[..., object], write: Callable[..., object]) -> None:
    """``read`` and ``write`` are called with a block and an offset."""
    for size in SIZES:
        block = memoryview(bytearray(os.urandom(size)))
        told = []
        for call in (read, write):
            taken = microseconds(functools.partial(call, block), size)
            told.append(f"{taken:8.1f} us {size / taken / 1e3:6.2f} GB/s")
        print(f"{what:8} {size >> 10:5} KiB   read {told[0]}   write {told[1]}")


def measure_file(what: str, fd: int) -> None:
    """pread and pwrite of a descriptor."""
    measure(
        what,
        lambda block, offset: os.preadv(fd, [block], offset),
        lambda block, offset: os.pwrite(fd, block, offset),
    )


def measure_copies(view: memoryview) -> None:
    """The least that either can cost: one copy."""

    def read(block: memoryview, offset: int) -> None:
        block[:] = view[offset : offset + len(block)]

    def write(block: memoryview, offset: int) -> None:
        view[offset : offset + len(block)] = block

    measure("memcpy", read, write)


def main() -> None:
    """Measure all three."""
    print(f"Linux {platform.release()}, {platform.machine()}, Python {platform.python_version()}")
    with dmabuf.allocate(SIZE) as buffer:
        with buffer.map("rw") as view:
            measure_copies(view)
        slabs = [(slab.fd, slab.size, buffer.is_dmabuf) for slab in buffer.slabs]
        begun = time.perf_counter()
        root = _as_file._start(slabs, True)
        fd = os.open(f"/proc/self/fd/{root}", os.O_RDWR | os.O_CLOEXEC)
        print(f"fuse     made in {(time.perf_counter() - begun) * 1e3:.0f} ms ({buffer.exporter})")
        os.close(root)
        measure_file("fuse", fd)
        os.close(fd)
    with dmabuf.allocate(SIZE, exporter="memfd") as buffer, dmabuf.as_file(buffer) as file:
        measure_file(file.way, file.fileno())


if __name__ == "__main__":
    main()

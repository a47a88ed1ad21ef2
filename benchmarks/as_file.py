"""Measure the cost of read(2) and write(2) on the files of as_file(), beside a copy in memory.

    .venv/bin/python benchmarks/as_file.py

FUSE is measured on a dma-buf if the machine has an exporter, otherwise on a memfd.
"""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable

import dmabuf
from dmabuf.memory import serve_by_fuse

SIZE = 64 << 20
SIZES = (4 << 10, 64 << 10, 1 << 20)
ROUNDS = 7


def microseconds(call: Callable[[int], object], size: int) -> float:
    """Return the median of several rounds; each is one pass over the file, at most 2000 calls."""
    offsets = range(0, min(SIZE, 2000 * size), size)
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for offset in offsets:
            call(offset)
        taken.append((time.perf_counter() - begun) / len(offsets) * 1e6)
    return statistics.median(taken)


def measure(what: str, read: Callable[..., object], write: Callable[..., object]) -> None:
    """Measure ``read`` and ``write``, which are called with a block and an offset."""
    for size in SIZES:
        block = memoryview(bytearray(os.urandom(size)))
        told = []
        for call in (read, write):
            taken = microseconds(functools.partial(call, block), size)
            told.append(f"{taken:8.1f} us {size / taken / 1e3:6.2f} GB/s")
        print(f"{what:8} {size >> 10:5} KiB   read {told[0]}   write {told[1]}")


def measure_file(what: str, fd: int) -> None:
    """Measure pread(2) and pwrite(2) of a descriptor."""
    measure(
        what,
        lambda block, offset: os.preadv(fd, [block], offset),
        lambda block, offset: os.pwrite(fd, block, offset),
    )


def measure_copies(view: memoryview) -> None:
    """Measure the lower bound of either: one copy."""

    def read(block: memoryview, offset: int) -> None:
        block[:] = view[offset : offset + len(block)]

    def write(block: memoryview, offset: int) -> None:
        view[offset : offset + len(block)] = block

    measure("memcpy", read, write)


def main() -> None:
    """Measure all three and print the table."""
    print(f"Linux {platform.release()}, {platform.machine()}, Python {platform.python_version()}")
    with dmabuf.allocate(SIZE) as buffer:
        with buffer.map("r+") as view:
            measure_copies(view)
        slabs = [(slab.fd, slab.size, buffer.is_dmabuf) for slab in buffer.slabs]
        begun = time.perf_counter()
        root = serve_by_fuse(slabs, True)
        fd = os.open(f"/proc/self/fd/{root}", os.O_RDWR | os.O_CLOEXEC)
        print(f"fuse     made in {(time.perf_counter() - begun) * 1e3:.0f} ms ({buffer.exporter})")
        os.close(root)
        measure_file("fuse", fd)
        os.close(fd)
    with dmabuf.allocate(SIZE, exporter="memfd") as buffer, dmabuf.as_file(buffer) as file:
        measure_file(file.way, file.fileno())


if __name__ == "__main__":
    main()

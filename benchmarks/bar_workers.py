"""Workers of bars.py, each a process: `python benchmarks/bar_workers.py NAME TARGET`.

Each prints JSON: bytes a second, or seconds of a request. The caller drops the page cache before.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import time
from array import array
from collections.abc import Callable

from common import GIB, MIB, PAGE

ROUNDS, READS = 20, 100


def lone(target: str) -> dict[str, float]:
    """Compare read_into of 4 KiB with preadv(2), O_DIRECT into a mapped buffer, in turn."""
    import dmabuf

    fd = os.open(target, os.O_RDONLY | os.O_DIRECT)
    with dmabuf.allocate(MIB) as buffer, dmabuf.open(target) as file, mmap.mmap(-1, MIB) as memory:
        slots = [memoryview(memory)[at : at + PAGE] for at in range(0, MIB, PAGE)]
        places = range(0, file.size or 0, PAGE)
        dice = random.Random(1)

        def ours(offsets: list[int]) -> None:
            for slot, offset in enumerate(offsets):
                file.read_into(buffer, PAGE, file_offset=offset, buffer_offset=slot * PAGE)

        def theirs(offsets: list[int]) -> None:
            for slot, offset in enumerate(offsets):
                os.preadv(fd, [slots[slot]], offset)

        first = file.read_into(buffer, PAGE)  # proves O_DIRECT; later reads use the small path
        assert first.route == "direct", first
        taken = {"ours": 0.0, "theirs": 0.0}
        for number in range(ROUNDS):
            for name, read in (("ours", ours), ("theirs", theirs))[:: number % 2 * 2 - 1]:
                offsets = dice.choices(places, k=READS)  # so the disk's cache helps neither
                begun = time.perf_counter()
                read(offsets)
                taken[name] += time.perf_counter() - begun
        slots.clear()
    os.close(fd)
    return {name: seconds / ROUNDS / READS for name, seconds in taken.items()}


def _whole(target: str, route: str) -> dict[str, float]:
    from dmabuf import Engine, allocate
    from dmabuf import open as open_file  # loads the engine, which `import dmabuf` leaves out

    with allocate(GIB) as buffer:
        begun = time.perf_counter()
        with Engine() as engine, open_file(target, engine=engine) as file:
            transfer = file.read_into(buffer, GIB, route=route)
        seconds = time.perf_counter() - begun
        assert transfer.nbytes == GIB, transfer
        assert transfer.route == route, transfer
    return {"speed": GIB / seconds}


def direct(target: str) -> dict[str, float]:
    """Read 1 GiB by the direct route into a prefaulted buffer; opening and pinning count."""
    return _whole(target, "direct")


def staged(target: str) -> dict[str, float]:
    """Read 1 GiB by the staged route."""
    return _whole(target, "staged")


def _copying(target: str, flags: int, size: int) -> dict[str, float]:
    import dmabuf

    # A bounce buffer of the size of a request, on its own pages.
    with dmabuf.allocate(GIB) as buffer, buffer.map("r+") as view, mmap.mmap(-1, size) as bounce:
        bounce.write(bytes(size))
        with memoryview(bounce) as block:
            begun = time.perf_counter()
            fd = os.open(target, os.O_RDONLY | flags)
            for at in range(0, GIB, size):
                if os.preadv(fd, [block], at) != size:
                    raise OSError(f"{target} ends before {at + size}")
                view[at : at + size] = block
            os.close(fd)
            return {"speed": GIB / (time.perf_counter() - begun)}


def cold_copy(target: str) -> dict[str, float]:
    """Read 1 GiB in blocks of 1 MiB through the page cache, and copy each into the buffer."""
    return _copying(target, 0, MIB)


def serial(target: str) -> dict[str, float]:
    """Read 1 GiB with O_DIRECT in blocks of the staged route, and copy, without overlap."""
    from dmabuf.transfer.engine import STAGED_BLOCK

    return _copying(target, os.O_DIRECT, STAGED_BLOCK)


def thousand(target: str) -> dict[str, float]:
    """Make 1,000 transfers of 1 MiB between random places of the target and a 1 GiB buffer.

    Every other one is by read_segments, which takes a ring: one by read_into may do without.
    """
    import dmabuf

    dice = random.Random(1)
    moved = 0
    with dmabuf.allocate(GIB) as buffer, dmabuf.open(target) as file:
        for number in range(1000):
            offset, place = (dice.randrange(GIB // MIB) * MIB for _ in range(2))
            if number % 2:
                transfer = file.read_segments(buffer, array("Q", [offset, place, MIB]))
            else:
                transfer = file.read_into(buffer, MIB, file_offset=offset, buffer_offset=place)
            moved += transfer.nbytes
    return {"moved": moved}


WORKERS: dict[str, Callable[[str], dict[str, float]]] = {
    worker.__name__: worker for worker in (lone, direct, staged, cold_copy, serial, thousand)
}

if __name__ == "__main__":
    json.dump(WORKERS[sys.argv[1]](sys.argv[2]), sys.stdout)

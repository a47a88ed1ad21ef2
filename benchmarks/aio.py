"""Reads of 4 KiB at 256 in flight: `dmabuf.aio` beside `read_segments`, on one target.

    python benchmarks/aio.py [--backend trio] [--count 20000] TARGET

TARGET is a file or block device, which is only read. Prints the machine, then time and processor
time of each read, and the ratio of the two in the same run: the best of `--rounds`.
"""

import argparse
import array
import os
import platform
import random
import sys
import time

import anyio

import dmabuf
from dmabuf import aio

SIZE = 4096


class Meter:
    """Wall and processor microseconds a read, the best of several rounds."""

    def __init__(self) -> None:
        self.wall = self.cpu = float("inf")

    def add(self, wall: float, cpu: float, count: int) -> None:
        """One round of `count` reads."""
        self.wall = min(self.wall, wall / count * 1e6)
        self.cpu = min(self.cpu, cpu / count * 1e6)


async def by_aio(path: str, buffer: dmabuf.Buffer, offsets: list[int], flight: int) -> None:
    """Tasks that read one after the other, `flight` of them at a time."""
    todo = iter(enumerate(offsets))

    async def worker(file: aio.File, slots: int) -> None:
        for number, offset in todo:
            at = number % slots * SIZE
            await file.read_into(buffer, SIZE, file_offset=offset, buffer_offset=at)

    async with await aio.open(path) as file, anyio.create_task_group() as group:
        await file.read_into(buffer, SIZE)  # opens with O_DIRECT, and looks at the page cache
        for _ in range(flight):
            group.start_soon(worker, file, buffer.size // SIZE)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--flight", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    how = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}")
    print(f"Python {sys.version.split()[0]}, anyio on {how.backend}, {how.target}")
    with dmabuf.Engine(queue_depth=how.flight) as engine:
        run(how, engine)


def run(how: argparse.Namespace, engine: dmabuf.Engine) -> None:
    """Both, in turn, round by round."""
    buffer = dmabuf.allocate(how.flight * 4 * SIZE, exporter="memfd")
    segments, loop = Meter(), Meter()
    with buffer, dmabuf.open(how.target, engine=engine) as file:
        dice = random.Random(1)
        offsets = [dice.randrange((file.size or 0) // SIZE) * SIZE for _ in range(how.count)]
        slots = buffer.size // SIZE
        triples = [(offset, n % slots * SIZE, SIZE) for n, offset in enumerate(offsets)]
        flat = array.array("Q", [number for triple in triples for number in triple])
        for _ in range(how.rounds):
            cpu, wall = time.process_time(), time.perf_counter()
            file.read_segments(buffer, flat)
            segments.add(time.perf_counter() - wall, time.process_time() - cpu, how.count)
            cpu, wall = time.process_time(), time.perf_counter()
            anyio.run(by_aio, how.target, buffer, offsets, how.flight, backend=how.backend)
            loop.add(time.perf_counter() - wall, time.process_time() - cpu, how.count)
    for name, meter in (("read_segments", segments), ("aio", loop)):
        print(f"{name:15} {meter.wall:7.1f} us and {meter.cpu:7.1f} us of CPU a read")
    print(f"aio takes {loop.wall / segments.wall:.2f} times the time of read_segments")


if __name__ == "__main__":
    main()

"""Compare reads of 4 KiB with 256 in flight by `dmabuf.aio` with `read_segments`, on one target.

    python benchmarks/aio.py [--backend trio] [--count 20000] [--json] TARGET

TARGET is a file or block device, which is only read. Prints the machine; time and processor time of
a read by each, and of the event loop with the same tasks and no reads; and the ratio of the first
two in the same run. Each figure is the best of `--rounds`.
"""

from __future__ import annotations

import argparse
import array
import dataclasses
import json
import random
import time
from importlib import metadata

import anyio
from common import PAGE, machine

import dmabuf
from dmabuf import aio
from dmabuf.aio.backend import Wakeup, call_soon, wakeup_factory


@dataclasses.dataclass
class Meter:
    """Wall and processor microseconds of a read, the best of several rounds."""

    wall: float = float("inf")
    cpu: float = float("inf")

    def add(self, wall: float, cpu: float, count: int) -> None:
        """Add one round of `count` reads."""
        self.wall = min(self.wall, wall / count * 1e6)
        self.cpu = min(self.cpu, cpu / count * 1e6)


async def by_aio(path: str, buffer: dmabuf.Buffer, offsets: list[int], flight: int) -> None:
    """Run `flight` tasks, each of which reads one block after the other."""
    todo = iter(enumerate(offsets))

    async def worker(file: aio.File, slots: int) -> None:
        for number, offset in todo:
            at = number % slots * PAGE
            await file.read_into(buffer, PAGE, file_offset=offset, buffer_offset=at)

    async with await aio.open(path) as file, anyio.create_task_group() as group:
        await file.read_into(buffer, PAGE)  # opens with O_DIRECT, and checks the page cache
        for _ in range(flight):
            group.start_soon(worker, file, buffer.size // PAGE)


async def loop_alone(count: int, flight: int) -> None:
    """Run the same tasks with one wakeup of the event loop in place of each read."""
    new_wake, soon = wakeup_factory(), call_soon()
    todo, waiting = iter(range(count)), list[Wakeup]()

    def wake_them() -> None:
        woken = waiting.copy()
        waiting.clear()
        for wake in woken:
            wake.set_result(None)

    async def worker() -> None:
        for _ in todo:
            wake = new_wake()
            if not waiting:
                soon(wake_them)
            waiting.append(wake)
            await wake

    async with anyio.create_task_group() as group:
        for _ in range(flight):
            group.start_soon(worker)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--flight", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="only the figures")
    how = parser.parse_args()
    with dmabuf.Engine(queue_depth=how.flight) as engine:
        meters = run(how, engine)
    if how.json:
        print(json.dumps({name: dataclasses.asdict(meter) for name, meter in meters.items()}))
        return
    packages = ["anyio"] if how.backend == "asyncio" else ["anyio", "trio"]
    print("\n".join(machine([f"{name} {metadata.version(name)}" for name in packages])))
    for name, meter in meters.items():
        print(f"{name:15} {meter.wall:7.1f} us and {meter.cpu:7.1f} us of CPU a read")
    ratio = meters["aio"].wall / meters["read_segments"].wall
    print(f"aio on {how.backend} takes {ratio:.2f} times the time of read_segments")


def run(how: argparse.Namespace, engine: dmabuf.Engine) -> dict[str, Meter]:
    """Measure both in turn, round by round."""
    buffer = dmabuf.allocate(how.flight * 4 * PAGE, exporter="memfd")
    anyio.run(anyio.sleep, 0, backend=how.backend)  # loads it: some 50 ms on asyncio, 100 on trio
    segments, loop, alone = Meter(), Meter(), Meter()
    with buffer, dmabuf.open(how.target, engine=engine) as file:
        if not (pages := (file.size or 0) // PAGE):
            raise SystemExit(f"{how.target} has less than {PAGE} bytes to read")
        dice = random.Random(1)
        offsets = [dice.randrange(pages) * PAGE for _ in range(how.count)]
        slots = buffer.size // PAGE
        triples = [(offset, n % slots * PAGE, PAGE) for n, offset in enumerate(offsets)]
        flat = array.array("Q", [number for triple in triples for number in triple])
        file.read_segments(buffer, flat[: 3 * how.flight])  # opens, pins, checks the page cache
        for _ in range(how.rounds):
            cpu, wall = time.process_time(), time.perf_counter()
            file.read_segments(buffer, flat)
            segments.add(time.perf_counter() - wall, time.process_time() - cpu, how.count)
            cpu, wall = time.process_time(), time.perf_counter()
            anyio.run(by_aio, how.target, buffer, offsets, how.flight, backend=how.backend)
            loop.add(time.perf_counter() - wall, time.process_time() - cpu, how.count)
            cpu, wall = time.process_time(), time.perf_counter()
            anyio.run(loop_alone, how.count, how.flight, backend=how.backend)
            alone.add(time.perf_counter() - wall, time.process_time() - cpu, how.count)
    return {"read_segments": segments, "aio": loop, "the loop alone": alone}


if __name__ == "__main__":
    main()

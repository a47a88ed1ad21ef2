"""What a look at all the machine's dma-bufs costs: many processes with many descriptors.

    python benchmarks/census.py                          2000 processes of 50 descriptors
    python benchmarks/census.py --processes 100 --json

Beside it, in turns, what the kernel alone takes for the same reading: listing every process's
descriptors, reading where each leads, and reading every process's mappings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common import machine, stop_tidily

import dmabuf
from dmabuf import system


@contextmanager
def processes(number: int, descriptors: int) -> Iterator[None]:
    """So many, that sleep; the last of their descriptors is a dma-buf where there is udmabuf."""
    try:
        buffer = dmabuf.allocate(1 << 20, exporter="udmabuf")
    except OSError:
        buffer = None
    wake, hold = os.pipe()
    pids = []
    try:
        for _ in range(number):
            pid = os.fork()
            if pid == 0:
                os.close(hold)
                while len(os.listdir("/proc/self/fd")) <= descriptors:
                    os.open("/dev/null", os.O_RDONLY)
                os.read(wake, 1)  # until the parent closes it, or ends
                os._exit(0)
            pids.append(pid)
        yield
    finally:
        os.close(hold)
        os.close(wake)
        for pid in pids:
            os.waitpid(pid, 0)
        if buffer is not None:
            buffer.close()


def kernel_alone() -> None:
    """The same reading, with nothing made of it."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                os.readlink(f"/proc/{pid}/fd/{fd}")
            with open(f"/proc/{pid}/maps", "rb", buffering=0) as maps:
                maps.readall()
        except OSError:  # it has gone, or is not ours
            continue


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of wall clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2000, metavar="N")
    parser.add_argument("--descriptors", type=int, default=50, metavar="N", help="of each")
    parser.add_argument("--looks", type=int, default=11, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    stop_tidily()
    ways: dict[str, Callable[[], object]] = {
        "census": system.census,
        "the same reading": kernel_alone,
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with processes(options.processes, options.descriptors):
        found = system.census()
        for _ in range(options.looks):
            for name, work in ways.items():
                rounds[name].append(spent(work))
    figures = {
        name: {
            "ms": statistics.median(wall for wall, _ in one),
            "worst ms": max(wall for wall, _ in one),
            "processor ms": statistics.median(cpu for _, cpu in one),
        }
        for name, one in rounds.items()
    }
    seen = {
        "processes": found.processes,
        "hidden": found.hidden,
        "descriptors": options.descriptors,
        "buffers": len(found.buffers),
        "holders": sum(len(buffer.holders) for buffer in found.buffers),
    }
    if options.json:
        print(json.dumps({"machine": machine(), "seen": seen, "figures": figures}, indent=2))
        return 0
    print("\n".join(machine()))
    print(", ".join(f"{value} {key}" for key, value in seen.items()))
    for name, figure in figures.items():
        cells = ", ".join(f"{value:.1f} {unit}" for unit, value in figure.items())
        print(f"{name:<17} {cells}, of {options.looks} looks")
    return 0


if __name__ == "__main__":
    sys.exit(main())

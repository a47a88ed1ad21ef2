"""Measure the cost of a census of dma-bufs with many processes and many descriptors.

    python benchmarks/census.py                          2000 processes of 50 descriptors
    python benchmarks/census.py --processes 100 --json

In turn, it measures the kernel's part alone: list the descriptors of every process, read where each
leads, and read the mappings of every process.
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
from dmabuf.inspect import take_census


@contextmanager
def processes(number: int, descriptors: int) -> Iterator[None]:
    """Start processes that sleep; their last descriptor is a dma-buf if there is udmabuf."""
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
                os.read(wake, 1)  # until the parent closes it or ends
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
    """Read the same files, and discard what was read."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                os.readlink(f"/proc/{pid}/fd/{fd}")
            with open(f"/proc/{pid}/maps", "rb", buffering=0) as maps:
                maps.readall()
        except OSError:  # it has ended, or is another user's
            continue


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Return milliseconds of wall clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def main() -> int:
    """Measure and print; return the exit status."""
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
        "census": take_census,
        "the same reading": kernel_alone,
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with processes(options.processes, options.descriptors):
        found = take_census()
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

"""The measurements of bars.py: dmabuf and its counterpart, one pair at a time."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import report
from beside_fio import run_fio
from beside_peers import Loaders
from common import GIB, FailedError, SkippedError, cached, run
from ours import Measure, run_ours
from targets import huge_pages

Cold = Callable[[], str]
"""Returns the path of the target, which has no page in the page cache."""
Pair = Callable[[Cold, int], tuple[float, float]]
"""Measures the pair with a number; returns the figures of dmabuf and of the counterpart."""
Side = Callable[[str], float]

HERE = Path(__file__).parent
WORKERS = str(HERE / "bar_workers.py")


def by_turns(ours: Side, theirs: Side) -> Pair:
    """Return a pair of two processes; dmabuf is first in every other pair."""

    def pair(path: Cold, number: int) -> tuple[float, float]:
        if number % 2:
            mine = ours(path())
            return mine, theirs(path())
        other = theirs(path())
        return ours(path()), other

    return pair


# -- requests beside fio and beside a C loop


def beside_fio(measure: Measure, direct: bool) -> Pair:
    """Return a pair of speeds beside fio, in bytes a second."""
    return by_turns(
        lambda path: run_ours(path, measure).speed,
        lambda path: run_fio(path, measure, direct).speed,
    )


def cpu_beside_fio(measure: Measure, direct: bool) -> Pair:
    """Return a pair of CPU seconds for each GiB, less those of a process without requests."""
    idle, moved = measure.idle(), measure.total / GIB

    def ours(path: str) -> float:
        return (run_ours(path, measure).process.cpu - run_ours(path, idle).process.cpu) / moved

    def theirs(path: str) -> float:
        whole, less = (run_fio(path, one, direct).process.cpu for one in (measure, idle))
        return (whole - less) / moved

    return by_turns(ours, theirs)


@functools.cache
def loop() -> str:
    """Compile the C loop once; return its path."""
    folder = tempfile.mkdtemp(prefix="dmabuf-bench-")
    atexit.register(shutil.rmtree, folder)
    try:
        run(["cc", "-O2", "-o", f"{folder}/loop", str(HERE / "loop.c"), "-luring"])
    except FailedError as error:
        raise SkippedError(f"loop.c: {error}: apt-get install libc6-dev liburing-dev") from None
    return f"{folder}/loop"


def beside_loop(measure: Measure) -> Pair:
    """Return a pair of speeds beside a C program with the same list of requests."""
    needed = measure.footprint >> 21 if measure.huge_pages else 0
    numbers = (measure.depth, measure.window, measure.total, int(measure.huge_pages))

    def ours(path: str) -> float:
        with huge_pages(needed):
            return run_ours(path, measure).speed

    def theirs(path: str) -> float:
        with huge_pages(needed):
            command = [loop(), path, *map(str, numbers)]
            return float(run(command, stdin=measure.segments().tobytes()).output)

    return by_turns(ours, theirs)


# -- speed, latency and the page cache


def _worker(name: str, path: str) -> dict[str, float]:
    output = run([sys.executable, WORKERS, name, path]).output
    answer: dict[str, float] = json.loads(output)
    return answer


def speeds(ours: str, theirs: str) -> Pair:
    """Return a pair of speeds of two workers, in bytes a second."""
    return by_turns(
        lambda path: _worker(ours, path)["speed"], lambda path: _worker(theirs, path)["speed"]
    )


def lone(path: Cold, _number: int) -> tuple[float, float]:
    """Measure the seconds of one read of 4 KiB; the worker interleaves both sides."""
    answer = _worker("lone", path())
    return answer["ours"], answer["theirs"]


def pages_left(name: str) -> Pair:
    """Return a pair of page counts in the page cache after a read, by dmabuf and a plain one."""

    def after(worker: str, path: str) -> float:
        _worker(worker, path)
        return float(cached(path))

    return by_turns(functools.partial(after, name), functools.partial(after, "cold_copy"))


def awaited(figure: str, backend: str) -> Pair:
    """Return a pair of microseconds of a 4 KiB read: awaited, 256 in flight, and read_segments."""

    def pair(path: Cold, _number: int) -> tuple[float, float]:
        command = [
            sys.executable,
            str(HERE / "aio.py"),
            "--json",
            "--rounds",
            "1",
            "--backend",
            backend,
        ]
        answer = json.loads(run([*command, path()]).output)
        return answer["aio"][figure], answer["read_segments"][figure]

    return pair


# -- beside other loaders


def beside_loaders(loaders: Loaders, place: str) -> Pair:
    """Return a pair of loading speeds: dmabuf, and the fastest other loader of the same round."""

    def pair(_path: Cold, number: int) -> tuple[float, float]:
        ours, theirs = report.sooner(loaders.round(place, number))
        return loaders.size / ours, loaders.size / theirs

    return pair


def cpu_beside_loaders(loaders: Loaders, place: str) -> Pair:
    """Return a pair of CPU seconds for each GiB: dmabuf, and the least of the cached loaders."""

    def pair(_path: Cold, number: int) -> tuple[float, float]:
        ours, theirs = report.cheaper(loaders.round(place, number))
        return ours / (loaders.size / GIB), theirs / (loaders.size / GIB)

    return pair


# -- the cost of the package itself


def import_cost(_path: Cold, _number: int) -> tuple[float, float]:
    """Measure milliseconds of `import dmabuf` and of a bare interpreter, nine starts in turn."""
    taken: dict[str, list[float]] = {"import dmabuf": [], "pass": []}
    for _ in range(9):
        for source, milliseconds in taken.items():
            begun = time.perf_counter()
            run([sys.executable, "-c", source])
            milliseconds.append(1e3 * (time.perf_counter() - begun))
    ours, bare = (statistics.median(milliseconds) for milliseconds in taken.values())
    return ours, bare


def registrations(path: Cold, _number: int) -> tuple[float, float]:
    """Count registrations of memory in 1,000 transfers, with strace."""
    command = ["strace", "-f", "-qq", "-e", "trace=io_uring_register", "-o", "/dev/stdout",
               sys.executable, WORKERS, "thousand", path()]  # fmt: skip
    trace = run(command).output
    filled = [line for line in trace.splitlines() if "BUFFERS" in line and "iov_base=0x" in line]
    return len(filled), 1000

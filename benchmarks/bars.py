"""Each figure that dmabuf is held to, measured beside what it is compared with, in one run.

    python benchmarks/bars.py                           all, on disk, tmpfs and (as root) zram
    python benchmarks/bars.py --list
    python benchmarks/bars.py --only lone,staged --targets disk,zram --pairs 5

Five interleaved pairs of processes each; a line has the median of the pairs' ratios, the lowest and
the highest, the bar, and the medians of both sides. The huge pages that a measure needs are set
aside for it, as root, and given back. What cannot be measured here is skipped, with the reason.
The bars against other loaders are in beside_peers.py.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bar_workers
from beside_fio import READ, SMALL, WRITE, bar_of, run_fio
from common import (
    GIB,
    MIB,
    FailedError,
    Spread,
    cached,
    drop,
    fio_version,
    machine,
    no_zram,
    targets,
)
from common import run as run_process
from ours import Measure, run_ours


class SkippedError(Exception):
    """Cannot be measured here; says why, and how it could be."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One pair: what is held against the bar, and the two figures behind it."""

    value: float
    ours: float
    theirs: float

    @classmethod
    def ratio(cls, ours: float, theirs: float) -> Sample:
        """Ours by theirs."""
        return cls(ours / theirs, ours, theirs)


@dataclasses.dataclass(frozen=True)
class Bar:
    """What one figure is to be, on one target."""

    key: str
    target: str
    text: str
    limit: float
    pair: Callable[[str], Sample]
    unit: str = ""
    scale: float = 1
    at_least: bool = True
    pairs: int | None = None

    def met(self, value: float) -> bool:
        """Whether a value will do."""
        return value >= self.limit if self.at_least else value <= self.limit


# -- requests beside fio and beside a C loop


def beside_fio(measure: Measure, direct: bool, path: str) -> Sample:
    """Bytes a second."""
    theirs = run_fio(path, measure, direct)
    return Sample.ratio(run_ours(path, measure).speed, theirs.speed)


def cpu_beside_fio(measure: Measure, direct: bool, path: str) -> Sample:
    """CPU seconds a GiB of the requests: the process, less one that moves next to nothing."""
    idle, moving = measure.idle(), measure.total / GIB
    theirs = run_fio(path, measure, direct).process.cpu - run_fio(path, idle, direct).process.cpu
    ours = run_ours(path, measure).process.cpu - run_ours(path, idle).process.cpu
    return Sample.ratio(ours / moving, theirs / moving)


def whole_cpu_beside_fio(measure: Measure, direct: bool, path: str) -> Sample:
    """CPU seconds a GiB of the whole process, the start of the interpreter included."""
    theirs = run_fio(path, measure, direct).process.cpu
    ours, moving = run_ours(path, measure).process.cpu, measure.total / GIB
    return Sample.ratio(ours / moving, theirs / moving)


@functools.cache
def loop() -> str:
    """The C loop, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SkippedError("no C compiler: apt-get install gcc liburing-dev")
    source = Path(__file__).with_name("loop.c")
    folder = tempfile.mkdtemp(prefix="dmabuf-bench-")
    atexit.register(shutil.rmtree, folder)
    program = f"{folder}/loop"
    try:
        run_process([compiler, "-O2", "-o", program, str(source), "-luring"])
    except FailedError as error:
        raise SkippedError(f"{source.name} does not compile: {error}") from None
    return program


def beside_loop(measure: Measure, path: str) -> Sample:
    """Bytes a second, ours and a C program's with the same list of requests."""
    needed = measure.footprint >> 21 if measure.huge_pages else 0
    with huge_pages(needed):
        numbers = (measure.depth, measure.window, measure.total, int(measure.huge_pages))
        command = [loop(), path, *map(str, numbers)]
        theirs = run_process(command, stdin=measure.segments().tobytes())
        return Sample.ratio(run_ours(path, measure).speed, float(theirs.output))


@contextlib.contextmanager
def huge_pages(needed: int) -> Iterator[None]:
    """So many free huge pages of 2 MiB, set aside if they are not, and given back."""
    folder = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    if not needed:
        yield
        return
    if not folder.exists():
        raise SkippedError("this kernel has no huge pages of 2 MiB")
    free, total = (int((folder / name).read_text()) for name in ("free_hugepages", "nr_hugepages"))
    if free >= needed:
        yield
        return
    try:
        (folder / "nr_hugepages").write_text(str(total + needed - free))
    except OSError as error:
        raise SkippedError(
            f"huge pages: {error.strerror}: sysctl vm.nr_hugepages={needed}"
        ) from None
    try:
        if int((folder / "free_hugepages").read_text()) < needed:
            raise SkippedError(f"no {needed} huge pages to be had: memory is short or in pieces")
        yield
    finally:
        (folder / "nr_hugepages").write_text(str(total))


# -- what arrives how soon


def _worker(name: str, path: str) -> dict[str, float]:
    drop(path)
    output = run_process([sys.executable, bar_workers.__file__, name, path]).output
    answer: dict[str, float] = json.loads(output)
    return answer


def _seconds(name: str, path: str) -> float:
    return _worker(name, path)["seconds"]


def lone(path: str) -> Sample:
    """Seconds of one read of 4 KiB."""
    answer = _worker("lone", path)
    return Sample.ratio(answer["ours"], answer["theirs"])


def faster_than(other: str, name: str, path: str) -> Sample:
    """How many times the speed of another."""
    theirs, ours = _seconds(other, path), _seconds(name, path)
    return Sample(theirs / ours, GIB / ours, GIB / theirs)


def sooner(path: str) -> Sample:
    """1 - t/t_copy: how much of a cold read and copy is saved."""
    theirs, ours = _seconds("cold_copy", path), _seconds("direct", path)
    return Sample(1 - ours / theirs, GIB / ours, GIB / theirs)


def pages_left(name: str, path: str) -> Sample:
    """Pages in the page cache after a read, ours and a plain one's."""
    counts = []
    for worker in (name, "cold_copy"):
        _worker(worker, path)
        counts.append(float(cached(path)))
    return Sample(counts[0], *counts)


# -- what the package itself costs


def import_cost(_path: str) -> Sample:
    """Milliseconds of `import dmabuf` over a bare interpreter, of eleven starts each."""
    taken: dict[str, list[float]] = {"import dmabuf": [], "pass": []}
    for _ in range(11):
        for source, seconds in taken.items():
            begun = time.perf_counter()
            run_process([sys.executable, "-c", source])
            seconds.append(time.perf_counter() - begun)
    ours, bare = (statistics.median(seconds) for seconds in taken.values())
    return Sample(1e3 * (ours - bare), 1e3 * ours, 1e3 * bare)


def registrations(path: str) -> Sample:
    """How often the kernel was asked to register memory, of 1,000 transfers, by strace."""
    if shutil.which("strace") is None:
        raise SkippedError("strace is missing: apt-get install strace")
    command = ["strace", "-f", "-qq", "-e", "trace=io_uring_register", "-o", "/dev/stdout",
               sys.executable, bar_workers.__file__, "thousand", path]  # fmt: skip
    trace = run_process(command).output
    filled = [line for line in trace.splitlines() if "BUFFERS" in line and "data=NULL" not in line]
    return Sample(len(filled), len(filled), 1000)


# -- the list


def bars() -> list[Bar]:
    """All of them."""
    found = []
    for target in ("disk", "tmpfs", "zram"):
        for measure in (READ, WRITE, SMALL):
            pair = functools.partial(beside_fio, measure, target != "tmpfs")
            unit, scale = ("GB/s", 1e9) if measure.block == MIB else ("kIOPS", 4096e3)
            limit = bar_of(target, measure)
            found.append(Bar("fio", target, f"{measure.name}, by fio", limit, pair, unit, scale))
        for measure in (READ, WRITE):
            for name, how in (("", cpu_beside_fio), (" with start-up", whole_cpu_beside_fio)):
                pair = functools.partial(how, measure, target != "tmpfs")
                text = f"CPU a GiB{name}, {measure.name}, by fio"
                found.append(Bar("cpu", target, text, 1.05, pair, "s/GiB", at_least=False))
    for target in ("disk", "zram"):
        for rand, block, depth in ((False, MIB, 32), (True, 4096, 64)):
            for huge in (False, True):
                size = "1 MiB" if block == MIB else "4 KiB random"
                text = f"1 GiB destination, {size}{', huge pages' if huge else ''}, by a C loop"
                measure = Measure(text, False, rand, block, depth, 2 * GIB, GIB, huge)
                pair = functools.partial(beside_loop, measure)
                unit, scale = ("GB/s", 1e9) if block == MIB else ("kIOPS", 4096e3)
                found.append(Bar("loop", target, text, 0.95, pair, unit, scale))
    for target, limit in (("disk", 1.3), ("zram", 4)):
        text = "4 KiB, depth 1, read_into, by preadv"
        found.append(Bar("lone", target, text, limit, lone, "us", 1e-6, at_least=False))
    found += [
        Bar("sooner", "zram", "sooner than a cold read and copy", 0.4, sooner, "GB/s", 1e9),
        Bar("staged", "zram", "staged, by a serial read-then-copy", 1.35,
            functools.partial(faster_than, "serial", "staged"), "GB/s", 1e9),
        Bar("staged", "disk", "staged, by direct", 0.97,
            functools.partial(faster_than, "direct", "staged"), "GB/s", 1e9),
        Bar("import", "disk", "import dmabuf, less a bare interpreter", 40, import_cost,
            "ms", at_least=False),
        Bar("register", "disk", "times memory is registered, 1,000 transfers of 1 MiB", 1,
            registrations, "of transfers", at_least=False, pairs=1),
    ]  # fmt: skip
    for target in ("disk", "zram"):
        for route in ("direct", "staged"):
            pair = functools.partial(pages_left, route)
            text = f"pages in the page cache after {route}"
            found.append(Bar("pages", target, text, 0, pair, "pages", at_least=False, pairs=1))
    return found


def measure_bar(bar: Bar, path: str, pairs: int) -> dict[str, object]:
    """All the pairs of one bar; a row for the report."""
    samples = [bar.pair(path) for _ in range(bar.pairs or pairs)]
    value = Spread.of([sample.value for sample in samples])
    return {
        "key": bar.key, "target": bar.target, "measure": bar.text, "bar": bar.limit,
        "at_least": bar.at_least, "value": value.median, "spread": [value.low, value.high],
        "met": bar.met(value.median), "unit": bar.unit,
        "ours": statistics.median(sample.ours for sample in samples) / bar.scale,
        "theirs": statistics.median(sample.theirs for sample in samples) / bar.scale,
    }  # fmt: skip


def show(bar: Bar, row: dict[str, object]) -> str:
    """One line of the report."""
    low, high = row["spread"]  # type: ignore[misc]
    value = f"{row['value']:.2f} ({low:.2f} to {high:.2f})"
    verdict = "met   " if row["met"] else "MISSED"
    limit = f"{'at least' if bar.at_least else 'at most'} {bar.limit:g}"
    sides = f"{row['ours']:.2f} | {row['theirs']:.2f} {bar.unit}"
    return f"{verdict} {bar.target:5} {bar.text:52} {value:22} {limit:13}  {sides}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = bars()
    keys = list(dict.fromkeys(bar.key for bar in every))
    parser.add_argument("--only", default=",".join(keys), help="bars by key, commas between")
    parser.add_argument("--match", default="", help="only those whose text has this")
    parser.add_argument("--targets", default="disk,tmpfs,zram")
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the bars and their keys")
    arguments = parser.parse_args()
    only, names = arguments.only.split(","), arguments.targets.split(",")
    if unknown := set(only) - set(keys):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not among {', '.join(keys)}")
    chosen = [
        bar for bar in every
        if bar.key in only and bar.target in names and arguments.match in bar.text
    ]  # fmt: skip
    if arguments.list:
        for bar in chosen:
            print(f"{bar.key:9} {bar.target:6} {bar.text}")
        return
    header, rows = machine([fio_version()]), []
    if not arguments.json:
        print("\n".join(header), f"\nmedians of {arguments.pairs} pairs; ours | the other")
    with targets(arguments.dir, GIB, [bar.target for bar in chosen]) as paths:
        for bar in chosen:
            try:
                if bar.target not in paths:
                    raise SkippedError(no_zram() or "no such target")
                row = measure_bar(bar, paths[bar.target], arguments.pairs)
                line = show(bar, row)
            except (SkippedError, FailedError) as error:
                row = {"key": bar.key, "target": bar.target, "measure": bar.text}
                row["skipped"] = str(error)
                line = f"skipped {bar.target:5} {bar.text}: {error}"
            rows.append(row)
            if not arguments.json:
                print(line, flush=True)
    if arguments.json:
        json.dump({"machine": header, "rows": rows}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()

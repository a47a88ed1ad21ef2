"""Measure each performance bar of dmabuf beside its counterpart, in one run.

    python benchmarks/bars.py                           all, on disk, tmpfs and (as root) zram
    python benchmarks/bars.py --list
    python benchmarks/bars.py --only 'import,lone,loop-*' --targets disk,zram --pairs 3

Each bar takes five interleaved pairs of processes; dmabuf is first in every other pair. The target
is dropped from the page cache before each process. A line has the median of the pairs' ratios with
the lowest and the highest, the bar, and the medians of both sides. CPU seconds are by wait4(2),
less those of a process without requests; beside_fio.py prints those of whole processes.

As root it makes zram devices and reserves huge pages, and removes them at the end. A bar that
cannot be measured here is skipped, with the reason. The bars beside other loaders need them: run
`make .venv-peers/ready`, then `.venv-peers/bin/python benchmarks/bars.py`.

Exit status: 0 if every measured bar is met, 1 if one is not or a measurement failed, 2 for invalid
arguments, 128 + N after signal N.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import json
import statistics
import sys
from collections.abc import Callable
from operator import sub, truediv
from typing import Any

from bar_pairs import (
    Pair,
    awaited,
    beside_fio,
    beside_loaders,
    beside_loop,
    cpu_beside_fio,
    cpu_beside_loaders,
    import_cost,
    lone,
    pages_left,
    registrations,
    speeds,
)
from beside_fio import READ, SMALL, WRITE, bar_of
from beside_peers import Loaders
from common import (
    GIB,
    MIB,
    PAGE,
    FailedError,
    SkippedError,
    Spread,
    fio_version,
    machine,
    names,
    stop_tidily,
)
from ours import Measure
from peers import PEERS
from targets import Targets

LOADERS = ["dmabuf-direct", *(name for name in PEERS if not name.startswith("dmabuf"))]
NOWHERE = "-"
"""The target of bars that need none."""
GBS, KIOPS, US = ("GB/s", 1e9), ("kIOPS", PAGE * 1e3), ("us", 1e-6)


def saved(ours: float, theirs: float) -> float:
    """Return the part of the counterpart's time that dmabuf saves, 1 - t/t_copy, of two speeds."""
    return 1 - theirs / ours


def alone(ours: float, _theirs: float) -> float:
    """Return the figure of dmabuf; the other is printed for comparison."""
    return ours


@dataclasses.dataclass(frozen=True)
class Bar:
    """A limit for one figure, on one target."""

    key: str
    target: str
    text: str
    limit: float
    pair: Pair
    unit: tuple[str, float] = ("", 1)
    """The name of the unit, and its size in the unit of the pair."""
    of: Callable[[float, float], float] = truediv
    """Computes the value that the limit is for, from the figures of dmabuf and the counterpart."""
    at_least: bool = True
    pairs: int | None = None

    def met(self, value: float) -> bool:
        """Return whether a value is within the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


at_most = functools.partial(Bar, at_least=False)


def beside_others() -> list[Bar]:
    """Return the bars of requests beside fio and beside a C loop."""
    found = []
    for target in ("disk", "tmpfs", "zram"):
        direct = target != "tmpfs"
        for key, measure in (("read", READ), ("write", WRITE), ("random", SMALL)):
            unit, limit = GBS if measure.block == MIB else KIOPS, bar_of(target, measure) or 0
            pair = beside_fio(measure, direct)
            found.append(Bar(key, target, f"{measure.name}, by fio", limit, pair, unit))
        for key, measure in (("cpu-read", READ), ("cpu-write", WRITE)):
            text, pair = f"CPU a GiB, {measure.name}, by fio", cpu_beside_fio(measure, direct)
            found.append(at_most(key, target, text, 1.05, pair, ("s/GiB", 1)))
    for target in ("disk", "zram"):
        for key, name, rand, block, depth, total, unit in (
            ("loop-1m", "1 MiB", False, MIB, 32, 4 * GIB, GBS),
            ("loop-4k", "4 KiB random", True, PAGE, 64, GIB, KIOPS),
        ):
            for huge in (False, True):
                text = f"1 GiB destination, {name}{', huge pages' if huge else ''}, by a C loop"
                measure = Measure(text, False, rand, block, depth, total, GIB, huge_pages=huge)
                end = "-huge" if huge else ""
                found.append(Bar(key + end, target, text, 0.95, beside_loop(measure), unit))
    return found


def alike() -> list[Bar]:
    """Return the bars of routes, small requests and event loops."""
    found = []
    for target, limit in (("disk", 1.3), ("zram", 4)):
        text = "4 KiB, depth 1, read_into, by preadv"
        found.append(at_most("lone", target, text, limit, lone, US))
    text = "sooner than a cold buffered read and copy"
    found.append(Bar("sooner", "zram", text, 0.4, speeds("direct", "cold_copy"), GBS, saved))
    text = "staged, by a serial read-then-copy"
    found.append(Bar("staged", "zram", text, 1.35, speeds("staged", "serial"), GBS))
    text = "staged, by direct"
    found.append(Bar("staged", "disk", text, 0.97, speeds("staged", "direct"), GBS))
    for backend in ("asyncio", "trio"):
        text = f"aio, 4 KiB, 256 in flight, CPU a read, {backend}"
        pair = awaited("cpu", backend)
        found.append(at_most("aio-cpu", "zram", text, 25, pair, ("us", 1), alone))
        text = f"aio, 4 KiB, 256 in flight, {backend}, by read_segments"
        found.append(at_most("aio", "disk", text, 2.5, awaited("wall", backend), ("us", 1)))
    return found


def loading(loaders: Loaders) -> list[Bar]:
    """Return the bars of loading a cold 2 GiB file into existing memory, beside other loaders."""
    found = []
    for target, limit, where in (("zram", 1.3, " on ext4"), ("disk", 1, "")):
        text = f"2 GiB file{where}, direct, by the fastest loader"
        found.append(Bar("peers", target, text, limit, beside_loaders(loaders, target), GBS))
    text = "2 GiB file, CPU, by the cheapest buffered loader"
    pair = cpu_beside_loaders(loaders, "disk")
    found.append(at_most("peers-cpu", "disk", text, 0.2, pair, ("s/GiB", 1)))
    return found


def costs() -> list[Bar]:
    """Return the bars of the page cache, registrations and the import."""
    found = []
    for target in ("disk", "zram"):
        for route in ("direct", "staged"):
            text = f"pages in the page cache after {route}"
            pair = pages_left(route)
            found.append(at_most("pages", target, text, 0, pair, ("pages", 1), alone, pairs=1))
    text = "import dmabuf, less a bare interpreter"
    found.append(at_most("import", NOWHERE, text, 40, import_cost, ("ms", 1), sub))
    text = "times memory is registered, 1,000 transfers of 1 MiB"
    unit = ("of transfers", 1)
    found.append(at_most("registered", "disk", text, 1, registrations, unit, alone, pairs=1))
    return found


def measure_bar(bar: Bar, targets: Targets, pairs: int) -> dict[str, Any]:
    """Measure all pairs of one bar; return a row of the report."""
    cold = functools.partial(targets.path, bar.target)
    sides = [bar.pair(cold, number) for number in range(bar.pairs or pairs)]
    value = Spread.of([bar.of(ours, theirs) for ours, theirs in sides])
    name, scale = bar.unit
    ours, theirs = (statistics.median(side) / scale for side in zip(*sides, strict=True))
    return {
        "value": value.median, "spread": [value.low, value.high], "met": bar.met(value.median),
        "ours": ours, "theirs": theirs, "unit": name,
    }  # fmt: skip


def show(row: dict[str, Any]) -> str:
    """Return one line of the report."""
    head = f"{row['target']:5} {row['measure']:52}"
    for kind in ("skipped", "failed"):
        if kind in row:
            return f"{kind:7} {head} {row[kind]}"
    verdict = "met" if row["met"] else "NOT met"
    limit = f"{'at least' if row['at_least'] else 'at most'} {row['bar']:g}"
    value = str(Spread(row["value"], *row["spread"]))
    sides = f"{row['ours']:.2f} | {row['theirs']:.2f} {row['unit']}"
    return f"{verdict:7} {head} {value:24} {limit:13}  {sides}"


def measured(bar: Bar, targets: Targets, pairs: int) -> dict[str, Any]:
    """Return the row of a bar that was measured, skipped, or failed."""
    row: dict[str, Any] = {
        "key": bar.key, "target": bar.target, "measure": bar.text, "bar": bar.limit,
        "at_least": bar.at_least,
    }  # fmt: skip
    try:
        return row | measure_bar(bar, targets, pairs)
    except SkippedError as error:
        return row | {"skipped": str(error)}
    except FailedError as error:
        return row | {"failed": str(error)}


def header() -> list[str]:
    """Return the lines about the machine, with the version of fio if it is installed."""
    try:
        return machine([fio_version()])
    except SkippedError:
        return machine(["no fio"])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="KEYS", help="keys of --list; * is any")
    parser.add_argument("--targets", type=names(Targets.NAMES), default=list(Targets.NAMES),
                        help="of disk,tmpfs,zram")  # fmt: skip
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the bars and their keys")
    arguments = parser.parse_args()
    loaders = Loaders(arguments.dir, 2 * GIB, LOADERS)
    every = [*beside_others(), *loading(loaders), *alike(), *costs()]
    patterns = arguments.only.split(",")
    for pattern in patterns:
        if not fnmatch.filter([bar.key for bar in every], pattern):
            parser.error(f"--only: no bar is called {pattern}: --list has their keys")
    chosen = [
        bar for bar in every
        if bar.target in (NOWHERE, *arguments.targets)
        and any(fnmatch.fnmatchcase(bar.key, pattern) for pattern in patterns)
    ]  # fmt: skip
    if arguments.list:
        for bar in chosen:
            print(f"{bar.key:12} {bar.target:6} {bar.text}")
        return 0
    stop_tidily()
    about, rows = header(), []
    if not arguments.json:
        print("\n".join(about), f"\nmedians of {arguments.pairs} pairs; ours | the other")
    with Targets(arguments.dir, GIB) as targets, loaders:
        for bar in chosen:
            rows.append(measured(bar, targets, arguments.pairs))
            if not arguments.json:
                print(show(rows[-1]), flush=True)
    if arguments.json:
        json.dump({"machine": about, "rows": rows}, sys.stdout, indent=2)
    skipped = sum("skipped" in row for row in rows)
    met = sum(row.get("met", False) for row in rows)
    missed = len(rows) - met - skipped
    print(f"{met} met, {missed} NOT met, {skipped} skipped", file=sys.stderr)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

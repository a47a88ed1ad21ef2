"""Compare dmabuf with fio: same target, block size, depth, data and footprint, in one run.

    python benchmarks/beside_fio.py                  disk, tmpfs and (as root) zram
    python benchmarks/beside_fio.py --dir /mnt/nvme --pairs 5 --json

Each measure is five interleaved pairs of processes, one of fio and one of dmabuf; the ratio is the
median of the pairs' ratios. CPU seconds are those of the whole process by wait4(2), start-up and
io_uring's workers included. fio reuses queue depth x block bytes of memory, so dmabuf does too; a
1 GiB destination is measured as well. Targets are filled with random bytes, and are read and
written past the page cache if possible.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

from common import (
    GIB,
    MIB,
    PAGE,
    SkippedError,
    Spread,
    fio_version,
    machine,
    names,
    run,
    stop_tidily,
)
from ours import Measure, Run, run_ours
from targets import Targets

READ = Measure("1 MiB read, depth 32", False, False, MIB, 32, 4 * GIB)
WRITE = Measure("1 MiB write, depth 32", True, False, MIB, 32, 2 * GIB)
SMALL = Measure("4 KiB random read, depth 64", False, True, PAGE, 64, GIB)
LARGE = Measure("1 MiB read, depth 32, 1 GiB destination", False, False, MIB, 32, 4 * GIB, GIB)
BARS: dict[Measure, float | None] = {READ: 0.98, WRITE: 0.98, SMALL: 0.95, LARGE: None}


def bar_of(target: str, measure: Measure) -> float | None:
    """Return the ratio to fio's speed that is required; None if the two are not comparable."""
    return 0.9 if (target, measure) == ("disk", SMALL) else BARS[measure]


def run_fio(target: str, measure: Measure, direct: bool) -> Run:
    """Run one process of fio, with io_uring, registered buffers and registered files."""
    kind = ("rand" if measure.rand else "") + ("write" if measure.write else "read")
    # fio cannot move nothing, so its idle run is one window, as the untimed start of dmabuf is.
    total = measure.block * measure.depth + measure.total
    command = [
        "fio", "--name=beside", f"--filename={target}", f"--rw={kind}", f"--bs={measure.block}",
        f"--iodepth={measure.depth}", "--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1",
        f"--direct={int(direct)}", f"--size={measure.span}", f"--io_size={total}",
        # Shared memory, as in dmabuf: memory of malloc may be in transparent huge pages, for which
        # the disk of a virtual machine needs far fewer segments.
        "--mem=mmapshared",
        "--norandommap=1", "--randrepeat=1", "--scramble_buffers=0", "--thread=1",
        "--invalidate=0", "--fallocate=none", "--allow_mounted_write=1", "--output-format=json",
    ]  # fmt: skip
    process = run(command + ["--readonly"] * (not measure.write))
    report = json.loads(process.output[process.output.index("{") :])
    job: dict[str, Any] = report["jobs"][0]["write" if measure.write else "read"]
    return Run(job["bw_bytes"], process)


def compare(targets: Targets, name: str, measure: Measure, pairs: int) -> dict[str, Any]:
    """Measure interleaved pairs; return medians and the spread of the ratio."""
    ours, fios = [], []
    for _ in range(pairs):
        path = targets.path(name)
        fios.append(run_fio(path, measure, direct=name != "tmpfs"))
        ours.append(run_ours(path, measure))
    ratio = Spread.of([a.speed / b.speed for a, b in zip(ours, fios, strict=True)])
    gibs = measure.total / GIB
    return {
        "target": name,
        "measure": measure.name,
        "route": ours[-1].route,
        "ours": statistics.median(run.speed for run in ours),
        "fio": statistics.median(run.speed for run in fios),
        "ratio": ratio.median,
        "spread": [ratio.low, ratio.high],
        "cpu_ours": statistics.median(run.process.cpu for run in ours) / gibs,
        "cpu_fio": statistics.median(run.process.cpu for run in fios) / gibs,
        "bar": bar_of(name, measure),
    }


def show(row: dict[str, Any], block: int) -> str:
    """Return one line of the table."""
    unit, scale = ("kIOPS", 1e3 * block) if block < MIB else ("GB/s ", 1e9)
    bar = "" if row["bar"] is None else f"  bar {row['bar']}"
    return (
        f"{row['target']:6} {row['measure']:40} {row['ours'] / scale:7.2f} "
        f"{row['fio'] / scale:7.2f} {unit} ratio {Spread(row['ratio'], *row['spread'])}{bar}"
        f"  CPU s/GiB {row['cpu_ours']:.2f} {row['cpu_fio']:.2f}  {row['route']}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", type=names(Targets.NAMES), default=list(Targets.NAMES),
                        metavar="TARGETS", help="of disk,tmpfs,zram")  # fmt: skip
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    stop_tidily()
    try:
        header = machine([fio_version()])
    except SkippedError as error:
        sys.exit(str(error))
    rows = []
    if not arguments.json:
        print("\n".join(header))
        print(f"{'':47} {'dmabuf':>7} {'fio':>7}   median of {arguments.pairs} pairs")
    with Targets(arguments.dir, GIB) as targets:
        for name in arguments.only:
            try:
                targets.path(name)
            except SkippedError as error:
                print(f"{name}: skipped: {error}", file=sys.stderr)
                continue
            for measure in BARS:
                row = compare(targets, name, measure, arguments.pairs)
                rows.append(row)
                if not arguments.json:
                    print(show(row, measure.block), flush=True)
    if arguments.json:
        json.dump({"machine": header, "rows": rows}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()

"""dmabuf beside fio: the same target, block size, depth, data and footprint, in one run.

    python benchmarks/beside_fio.py                  disk, tmpfs and (as root) zram
    python benchmarks/beside_fio.py --dir /mnt/nvme --pairs 5 --json

Each measure is five interleaved pairs of processes, one of fio and one of ours; the ratio is the
median of the pairs' ratios. CPU seconds are those of the whole process, start-up and io_uring's
workers included, by wait4(2). fio reads into and writes from queue depth x block bytes that it
uses again and again, so ours does too; a 1 GiB destination stands beside it. Targets are filled
with random bytes, and everything is read and written past the page cache where that is possible.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB = 1 << 30
SIZE = GIB


@dataclasses.dataclass(frozen=True)
class Measure:
    """What both sides do: `total` bytes in requests of `block`, `depth` of them in flight."""

    name: str
    write: bool
    rand: bool
    block: int
    depth: int
    total: int
    bar: float
    footprint: int = 0

    @property
    def window(self) -> int:
        """Bytes of memory that the requests use again and again."""
        return self.footprint or self.block * self.depth


MEASURES = (
    Measure("1 MiB read, depth 32", False, False, 1 << 20, 32, 4 * GIB, 0.95),
    Measure("1 MiB write, depth 32", True, False, 1 << 20, 32, 2 * GIB, 0.95),
    Measure("4 KiB random read, depth 64", False, True, 4096, 64, GIB, 0.85),
    Measure("1 MiB read, depth 32, 1 GiB destination", False, False, 1 << 20, 32, 4 * GIB, 0, GIB),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: bytes a second, and CPU seconds a GiB."""

    speed: float
    cpu: float


# -- ours, in a process of its own


def worker(target: str, measure: Measure) -> None:
    """Do the measure's requests through read_segments or write_segments; print bytes a second."""
    import dmabuf

    engine = dmabuf.Engine(queue_depth=measure.depth, block_size=measure.block)
    with dmabuf.allocate(measure.window) as buffer:
        buffer.pwrite(random.Random(2).randbytes(min(buffer.size, 64 << 20)), 0)
        with dmabuf.open(target, "r+", force=True, engine=engine) as file:
            move = file.write_segments if measure.write else file.read_segments
            segments = _segments(measure, file.size or SIZE)
            move(buffer, segments[: 3 * 64])  # the first touch and the pinning, as fio's set-up
            done = 0
            seconds = 0.0
            while done < measure.total:
                transfer = move(buffer, segments)
                done += transfer.nbytes
                seconds += transfer.seconds
            json.dump({"speed": done / seconds, "route": transfer.route}, sys.stdout)


def _segments(measure: Measure, size: int) -> array[int]:
    count = min(size, SIZE) // measure.block
    places = range(count)
    order = random.Random(1).choices(places, k=count) if measure.rand else places
    slots = measure.window // measure.block
    segments = array("Q")
    for i, place in enumerate(order):
        segments.extend((place * measure.block, i % slots * measure.block, measure.block))
    return segments


def run_ours(target: str, measure: Measure) -> tuple[Run, str]:
    """One process of ours; the run and the route it took."""
    command = [sys.executable, __file__, "--worker", target, measure.name]
    output, cpu = _timed(command)
    answer = json.loads(output)
    return Run(answer["speed"], cpu / (measure.total / GIB)), answer["route"]


# -- fio


def run_fio(target: str, measure: Measure, direct: bool) -> Run:
    """One process of fio, with io_uring, registered buffers and registered files."""
    kind = ("rand" if measure.rand else "") + ("write" if measure.write else "read")
    command = [
        "fio", "--name=beside", f"--filename={target}", f"--rw={kind}", f"--bs={measure.block}",
        f"--iodepth={measure.depth}", "--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1",
        f"--direct={int(direct)}", f"--size={SIZE}", f"--io_size={measure.total}",
        "--norandommap=1", "--randrepeat=1", "--thread=1", "--output-format=json",
        "--invalidate=0", "--fallocate=none", "--allow_mounted_write=1",
    ]  # fmt: skip
    output, cpu = _timed(command)
    report = json.loads(output[output.index("{") :])
    job: dict[str, Any] = report["jobs"][0]["write" if measure.write else "read"]
    return Run(job["bw_bytes"], cpu / (measure.total / GIB))


def _timed(command: list[str]) -> tuple[str, float]:
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command[0]} failed with status {process.returncode}")
        output.seek(0)
        return output.read(), usage.ru_utime + usage.ru_stime


# -- targets


def fill(path: str) -> None:
    """Put SIZE random bytes there, none of them left in the page cache."""
    source = random.Random(0)
    with open(path, "r+b" if Path(path).exists() else "wb", buffering=0) as file:
        for _ in range(SIZE // (8 << 20)):
            file.write(source.randbytes(8 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def targets(directory: str) -> Iterator[dict[str, str]]:
    """Names of targets and their paths; removed in the end."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name, where in (("disk", directory), ("tmpfs", "/dev/shm")):
            folder = tempfile.mkdtemp(prefix="dmabuf-bench-", dir=where)
            stack.callback(shutil.rmtree, folder)
            found[name] = f"{folder}/target"
        control = Path("/sys/class/zram-control")
        if os.geteuid() == 0 and control.exists():
            number = (control / "hot_add").read_text().strip()
            stack.callback((control / "hot_remove").write_text, number)
            Path(f"/sys/block/zram{number}/disksize").write_text(str(SIZE))
            found["zram"] = f"/dev/zram{number}"
        for path in found.values():
            fill(path)
        yield found


# -- the report


def machine() -> list[str]:
    """What was measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine(),
    )  # fmt: skip
    fio = subprocess.run(["fio", "--version"], capture_output=True, text=True).stdout.strip()
    return [
        f"machine  {os.cpu_count()} x {cpu}",
        f"kernel   {platform.release()} {platform.machine()}",
        f"versions {fio}, dmabuf {_version()}, Python {platform.python_version()}",
    ]


def _version() -> str:
    from importlib.metadata import version

    return version("dmabuf")


def compare(target: str, measure: Measure, pairs: int, direct: bool) -> dict[str, Any]:
    """Interleaved pairs; medians, and the spread of the ratio."""
    ours, fios, route = [], [], ""
    for _ in range(pairs):
        fios.append(run_fio(target, measure, direct))
        run, route = run_ours(target, measure)
        ours.append(run)
    ratios = [a.speed / b.speed for a, b in zip(ours, fios, strict=True)]
    return {
        "measure": measure.name,
        "route": route,
        "ours": statistics.median(run.speed for run in ours),
        "fio": statistics.median(run.speed for run in fios),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "cpu_ours": statistics.median(run.cpu for run in ours),
        "cpu_fio": statistics.median(run.cpu for run in fios),
        "bar": measure.bar,
    }


def show(target: str, row: dict[str, Any], block: int) -> str:
    """One line of the table."""
    unit, scale = ("kIOPS", 1e3 * block) if block < 1 << 20 else ("GB/s ", 1e9)
    verdict = "" if not row["bar"] else f"  bar {row['bar']}"
    low, high = row["spread"]
    return (
        f"{target:6} {row['measure']:40} {row['ours'] / scale:7.2f} {row['fio'] / scale:7.2f} "
        f"{unit} ratio {row['ratio']:.2f} ({low:.2f} to {high:.2f}){verdict}  CPU s/GiB "
        f"{row['cpu_ours']:.2f} {row['cpu_fio']:.2f}  {row['route']}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", help="targets, with commas between: disk,tmpfs,zram")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        target, name = arguments.worker
        worker(target, next(measure for measure in MEASURES if measure.name == name))
        return
    if shutil.which("fio") is None:
        sys.exit("fio is missing: apt-get install fio")
    rows = []
    if not arguments.json:
        print("\n".join(machine()))
        print(f"{'':47} {'dmabuf':>7} {'fio':>7}   median of {arguments.pairs} pairs")
    with targets(arguments.dir) as found:
        for name, path in found.items():
            if arguments.only and name not in arguments.only.split(","):
                continue
            for measure in MEASURES:
                row = compare(path, measure, arguments.pairs, direct=name != "tmpfs")
                rows.append({"target": name} | row)
                if not arguments.json:
                    print(show(name, row, measure.block), flush=True)
    if arguments.json:
        json.dump({"machine": machine(), "rows": rows}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()

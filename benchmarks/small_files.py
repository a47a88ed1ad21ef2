"""Small files: opening, moving 256 KiB and closing; and thousands of files in one call.

    python benchmarks/small_files.py                  on the disk of the current directory
    python benchmarks/small_files.py --folder /mnt/nvme --files 4000 --rounds 7

The first part takes turns, file by file, between dmabuf and the three system calls open with
O_DIRECT, preadv or pwritev, and close, into the same memory, in one process. It prints the medians
of wall time (perf_counter) and CPU time (thread_time) of one file, and their ratios.

The second part takes turns between one call of read_files, a loop of the three system calls, and
fio on one file of 1 GiB with the same block size and queue depth. It prints the medians of the
rates, their lowest and highest, and the ratios. The bars are at least 2 times the loop and 0.9 of
fio.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import GIB, MIB, machine

import dmabuf

SIZE = 256 << 10


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=".", help="where the files are made (default: .)")
    parser.add_argument("--files", type=int, default=4000, help="files of the second part")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each part")
    parser.add_argument("--queue-depth", type=int, default=32, help="files at once (default: 32)")
    parser.add_argument("--part", choices=["one", "many"], help="only this part")
    args = parser.parse_args()
    print("\n".join(machine()))
    folder = Path(tempfile.mkdtemp(prefix="dmabuf-small-", dir=args.folder))
    try:
        if args.part != "many":
            one_at_a_time(folder, args.rounds)
        if args.part != "one":
            many_at_once(folder, args.files, args.rounds, args.queue_depth)
    finally:
        shutil.rmtree(folder)


def make(folder: Path, count: int) -> list[str]:
    """Return the paths of new files of random bytes, on the medium and out of the page cache."""
    data, paths = os.urandom(SIZE), []
    for index in range(count):
        path = str(folder / f"file-{index}")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, data)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        paths.append(path)
    return paths


# -- one file after the other


def one_at_a_time(folder: Path, rounds: int) -> None:
    """Print what one file costs, beside the three system calls."""
    paths = make(folder, 200)
    with dmabuf.allocate(SIZE) as buffer, buffer.map("r+") as memory:

        def read(path: str) -> None:
            with dmabuf.open(path) as file:
                file.read_into(buffer, SIZE)

        def write(path: str) -> None:
            with dmabuf.open(path, "r+") as file:
                file.write_from(buffer, SIZE)

        def plain_read(path: str) -> None:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            os.preadv(fd, [memory], 0)
            os.close(fd)

        def plain_write(path: str) -> None:
            fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            os.pwritev(fd, [memory], 0)
            os.close(fd)

        for name, ours, theirs in (("read", read, plain_read), ("write", write, plain_write)):
            ours(paths[0])
            mine, other = Costs(), Costs()
            for turn in range(rounds):
                for index, path in enumerate(paths):
                    if (index + turn) % 2:
                        mine.measure(ours, path)
                    else:
                        other.measure(theirs, path)
            print(
                f"{name:6} 256 KiB: {mine} dmabuf, {other} three system calls; "
                f"ratio {mine.wall / other.wall:.2f} of time (bar 1.3), "
                f"{mine.cpu / other.cpu:.2f} of CPU (bar 2)"
            )


class Costs:
    """Wall and CPU times of one call, in microseconds."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def measure(self, function: Callable[[str], None], path: str) -> None:
        """Add the cost of one call."""
        wall, cpu = time.perf_counter(), time.thread_time()
        function(path)
        self._cpu.append((time.thread_time() - cpu) * 1e6)
        self._wall.append((time.perf_counter() - wall) * 1e6)

    @property
    def wall(self) -> float:
        """The median of the wall times."""
        return statistics.median(self._wall)

    @property
    def cpu(self) -> float:
        """The median of the CPU times."""
        return statistics.median(self._cpu)

    def __str__(self) -> str:
        return f"{self.wall:.0f} us and {self.cpu:.0f} us CPU"


# -- many files


def many_at_once(folder: Path, count: int, rounds: int, depth: int) -> None:
    """Print the rates of read_files, of a loop, and of fio."""
    paths = make(folder, count)
    large = folder / "large"
    with large.open("wb") as file:
        for _ in range(GIB // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    with dmabuf.allocate(count * SIZE) as buffer, buffer.map("r+") as memory:
        memory[:] = bytes(len(memory))  # its pages exist before anything is measured
        records = [(path, 0, SIZE, index * SIZE) for index, path in enumerate(paths)]

        def ours() -> float:
            begun = time.perf_counter()
            done = dmabuf.read_files(records, buffer, queue_depth=depth)
            seconds = time.perf_counter() - begun
            if any(isinstance(one, OSError) or one.nbytes != SIZE for one in done):
                raise SystemExit("not every file was read")
            return count * SIZE / MIB / seconds

        def loop() -> float:
            begun = time.perf_counter()
            for path, _, size, start in records:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                os.preadv(fd, [memory[start : start + size]], 0)
                os.close(fd)
            return count * SIZE / MIB / (time.perf_counter() - begun)

        ways: dict[str, Callable[[], float]] = {
            "read_files": ours,
            "loop": loop,
            "fio": lambda: fio(large, depth),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                rates[name].append(ways[name]())
    for name, each in rates.items():
        middle = statistics.median(each)
        print(f"{name:10} {middle:7.0f} MiB/s ({min(each):.0f} to {max(each):.0f})")
    for name, bar in (("loop", 2.0), ("fio", 0.9)):
        pairs = [mine / other for mine, other in zip(rates["read_files"], rates[name], strict=True)]
        print(
            f"read_files / {name}: {statistics.median(pairs):.2f} "
            f"({min(pairs):.2f} to {max(pairs):.2f}), bar {bar}"
        )


def fio(path: Path, depth: int) -> float:
    """Return fio's rate of reading one file once, in MiB a second."""
    done = subprocess.run(
        ["fio", "--name=one", f"--filename={path}", "--size=1G", f"--bs={SIZE}", "--rw=randread",
         "--direct=1", "--ioengine=io_uring", f"--iodepth={depth}", "--readonly",
         "--output-format=json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / MIB


if __name__ == "__main__":
    main()

"""What the benchmarks share: the machine, processes and what they cost, targets, the page cache."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20


def machine(versions: Sequence[str] = ()) -> list[str]:
    """What was measured on: processors, kernel, and versions of what took part."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine(),
    )  # fmt: skip
    ours = f"dmabuf {metadata.version('dmabuf')}", f"Python {platform.python_version()}"
    return [
        f"machine  {os.cpu_count()} x {model}, {total_memory() / GIB:.0f} GiB",
        f"kernel   {platform.release()} {platform.machine()}",
        f"versions {', '.join((*versions, *ours))}",
    ]


def total_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fio_version() -> str:
    """As fio tells it; the program ends where there is none."""
    if shutil.which("fio") is None:
        sys.exit("fio is missing: apt-get install fio")
    return subprocess.run(["fio", "--version"], capture_output=True, text=True).stdout.strip()


# -- processes


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that has ended: what it wrote, and by wait4(2) what it cost, threads included."""

    output: str
    cpu: float
    """Seconds, user and system."""
    peak: int
    """The most memory it had resident, in bytes."""


class FailedError(Exception):
    """A process ended with another status than 0; the last line that it wrote is the reason."""


def run(
    command: Sequence[str], *, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> Process:
    """Run a command to its end. Raises FailedError."""
    env = dict(os.environ if env is None else env)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling is no part of what is measured
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
    ):
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=output, stderr=errors, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = (errors.read() or output.read()).strip().splitlines()
            name = Path(command[0]).name
            raise FailedError(lines[-1] if lines else f"{name}: exit status {process.returncode}")
        cpu = usage.ru_utime + usage.ru_stime
        return Process(output.read(), cpu, usage.ru_maxrss * 1024)


# -- figures


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of several runs, between the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of measured values."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """As in "0.99 (0.95 to 1.03)"."""
        numbers = (f"{number:.{digits}f}" for number in (self.median, self.low, self.high))
        return "{} ({} to {})".format(*numbers)


# -- the page cache


def drop(path: str) -> None:
    """No page of a file or device in the page cache, and seen to be so.

    Raises FailedError where pages stay: something has the file mapped, or keeps writing to it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(20):
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached(path):
                return
            time.sleep(0.05)  # pages under writeback, or in a CPU's list of fresh ones
    finally:
        os.close(fd)
    raise FailedError(f"{cached(path)} pages of {path} stay in the page cache")


def cached(path: str) -> int:
    """Pages of a file or device in the page cache, by cachestat(2) of Linux 6.5."""
    from dmabuf import facts

    fd = os.open(path, os.O_RDONLY)
    try:
        pages = facts.cached_pages(fd, 0, os.lseek(fd, 0, os.SEEK_END))
    finally:
        os.close(fd)
    if pages is None:
        raise FailedError("this kernel has no cachestat(2) (Linux 6.5 has)")
    return pages


# -- targets


def fill(path: str, size: int) -> None:
    """Put random bytes there, none of them left in the page cache."""
    source = random.Random(0)
    with open(path, "r+b" if Path(path).exists() else "wb", buffering=0) as file:
        for start in range(0, size, 8 * MIB):
            file.write(source.randbytes(min(8 * MIB, size - start)))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def no_zram() -> str | None:
    """Why no zram device can be made; None where one can."""
    if os.geteuid() != 0:
        return "only root may make a zram device"
    if not Path("/sys/class/zram-control").exists():
        return "this kernel has no zram: modprobe zram"
    return None


@contextlib.contextmanager
def zram(size: int) -> Iterator[str]:
    """A zram device, taken away in the end; its content is kept in memory."""
    control = Path("/sys/class/zram-control")
    number = (control / "hot_add").read_text().strip()
    try:
        device = f"/dev/zram{number}"
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        # The last close of a block device empties its page cache: not before we have looked.
        with open(device, "rb", buffering=0):
            yield device
    finally:
        _let_go(control / "hot_remove", number)


def _let_go(remove: Path, number: str) -> None:
    # A worker of io_uring drops its reference to a device after the process has ended.
    for _ in range(100):
        try:
            remove.write_text(number)
            return
        except OSError:
            time.sleep(0.05)
    remove.write_text(number)


@contextlib.contextmanager
def zram_folder(size: int) -> Iterator[str]:
    """A folder on a fresh ext4 on a zram device of so many bytes."""
    with zram(size) as device, tempfile.TemporaryDirectory(prefix="dmabuf-bench-") as folder:
        run(["mkfs.ext4", "-q", "-F", "-m", "0", device])
        run(["mount", device, folder])
        try:
            yield folder
        finally:
            run(["umount", folder])


@contextlib.contextmanager
def folder_in(directory: str) -> Iterator[str]:
    """A folder of the benchmark's own, removed in the end."""
    folder = tempfile.mkdtemp(prefix="dmabuf-bench-", dir=directory)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def targets(directory: str, size: int, wanted: Sequence[str]) -> Iterator[dict[str, str]]:
    """Names of targets and their paths, filled: of disk, tmpfs and zram those that can be had."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name, where in (("disk", directory), ("tmpfs", "/dev/shm")):
            if name in wanted:
                found[name] = stack.enter_context(folder_in(where)) + "/target"
        if "zram" in wanted and no_zram() is None:
            found["zram"] = stack.enter_context(zram(size))
        for path in found.values():
            fill(path, size)
        yield found

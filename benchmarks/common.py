"""Shared by the benchmarks: the machine, processes and their cost, the page cache."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20
PAGE = 4096


class SkippedError(Exception):
    """The measurement is impossible here; the message has the reason and the fix."""


class FailedError(Exception):
    """A measurement failed; the message has the reason."""


def machine(versions: Sequence[str] = ()) -> list[str]:
    """Return lines about processors, kernel, interpreter and versions."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine(),
    )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    call = min(timeit.repeat("f()", "def f(): pass", number=100_000, repeat=5)) / 100_000
    return [
        f"machine     {os.cpu_count()} x {model}, {memory / GIB:.0f} GiB",
        f"kernel      {platform.release()} {platform.machine()}",
        f"interpreter {platform.python_implementation()} {platform.python_version()}, "
        f"{platform.python_compiler()}, {call * 1e9:.0f} ns a call of nothing",
        f"versions    {', '.join(('dmabuf ' + metadata.version('dmabuf'), *versions))}",
    ]


def fio_version() -> str:
    """Return the version that fio reports. Raises SkippedError without fio."""
    return run(["fio", "--version"]).output.strip()


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a type for argparse: a list of known names, separated by commas."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return found

    return parse


# -- processes


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_tidily() -> None:
    """Make signals end the program so that devices, mounts and folders are removed."""

    def stop(number: int, _frame: object) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # cleaning up must not be interrupted
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, stop)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Defer signals to the end of the block, so that cleanup covers all that it made."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in before:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, lambda each, _frame: came.append(each))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that has ended: its output, and its cost by wait4(2), threads included."""

    output: str
    cpu: float
    """Seconds, user and system."""
    peak: int
    """The maximum of resident memory, in bytes."""


def run(
    command: Sequence[str], *, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> Process:
    """Run a command to its end.

    Raises FailedError with the last line that it wrote, SkippedError where it is not installed.
    """
    if shutil.which(command[0]) is None:
        raise SkippedError(f"{command[0]} is not installed")
    env = dict(os.environ if env is None else env)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling must not be measured
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
    ):
        given.write(stdin)
        given.seek(0)
        process = None
        try:
            with signals_held():
                process = subprocess.Popen(
                    command, stdin=given, stdout=output, stderr=errors, env=env
                )
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # a signal: the target is about to be removed
            if process is not None:
                process.kill()
                process.wait()
            raise
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
    """The median of several runs, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of measured values."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        """Return text such as "0.99 (0.95 to 1.03)"."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


# -- the page cache


def drop(path: str) -> None:
    """Drop a file or device from the page cache, and check that no page is left.

    Raises FailedError where pages stay: something has the file mapped, or keeps writing to it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(20):
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached(path):
                return
            time.sleep(0.05)  # pages under writeback, or in a CPU's list of new pages
    finally:
        os.close(fd)
    raise FailedError(f"{cached(path)} pages of {path} stay in the page cache")


def cached(path: str) -> int:
    """Return the number of cached pages of a file or device, by cachestat(2) of Linux 6.5."""
    from dmabuf.kernel import files

    fd = os.open(path, os.O_RDONLY)
    try:
        pages = files.cached_pages(fd, 0, os.lseek(fd, 0, os.SEEK_END))
    finally:
        os.close(fd)
    if pages is None:
        raise SkippedError("this kernel has no cachestat(2) (Linux 6.5 has)")
    return pages

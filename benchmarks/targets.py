"""The targets of benchmarks: files on disk and tmpfs, and zram devices."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import MIB, FailedError, SkippedError, drop, run


def fill(path: str, size: int) -> None:
    """Write random bytes to a file or device."""
    source = random.Random(0)
    with open(path, "r+b" if Path(path).exists() else "wb", buffering=0) as file:
        for start in range(0, size, 8 * MIB):
            file.write(source.randbytes(min(8 * MIB, size - start)))
        os.fsync(file.fileno())


@contextlib.contextmanager
def zram(size: int) -> Iterator[str]:
    """Make a zram device, and remove it at the end. Raises SkippedError if that is impossible."""
    control = Path("/sys/class/zram-control")
    if os.geteuid() != 0:
        raise SkippedError("only root may make a zram device")
    if not control.exists():
        raise SkippedError("this kernel has no zram: modprobe zram")
    number = (control / "hot_add").read_text().strip()
    try:
        device = f"/dev/zram{number}"
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        # The last close of a block device empties its page cache, which is examined before.
        with open(device, "rb", buffering=0):
            yield device
    finally:
        _let_go(lambda: (control / "hot_remove").write_text(number))


def _let_go(take_away: Callable[[], object]) -> None:
    # A worker of io_uring releases a device or file after the process has ended.
    for _ in range(100):
        try:
            take_away()
            return
        except (OSError, FailedError):
            time.sleep(0.05)
    take_away()


@contextlib.contextmanager
def zram_folder(size: int) -> Iterator[str]:
    """Make a folder on a new ext4 on a zram device of `size` bytes."""
    with zram(size) as device, tempfile.TemporaryDirectory(prefix="dmabuf-bench-") as folder:
        run(["mkfs.ext4", "-q", "-F", "-m", "0", device])
        run(["mount", device, folder])
        try:
            yield folder
        finally:
            _let_go(lambda: run(["umount", folder]))


@contextlib.contextmanager
def folder_in(directory: str, size: int) -> Iterator[str]:
    """Make a folder, and remove it at the end.

    Raises SkippedError if the directory has less than `size` bytes free.
    """
    if not os.access(directory, os.W_OK):
        raise SkippedError(f"{directory} cannot be written to")
    if (free := shutil.disk_usage(directory).free) < size:
        raise SkippedError(f"{directory} has {free / MIB:.0f} MiB free, {size / MIB:.0f} needed")
    folder = tempfile.mkdtemp(prefix="dmabuf-bench-", dir=directory)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class Targets(contextlib.ExitStack):
    """Files and devices of `size` random bytes by name, made when first asked for."""

    NAMES = ("disk", "tmpfs", "zram")

    def __init__(self, directory: str, size: int) -> None:
        super().__init__()
        self._directory, self._size = directory, size
        self._paths: dict[str, str] = {}

    def path(self, name: str) -> str:
        """Return the path of a target without cached pages. Raises SkippedError."""
        if name not in self._paths:
            if name == "zram":
                path = self.enter_context(zram(self._size))
            else:
                where = "/dev/shm" if name == "tmpfs" else self._directory
                path = self.enter_context(folder_in(where, self._size)) + "/target"
            fill(path, self._size)
            self._paths[name] = path
        if name != "tmpfs":  # its files are page cache only
            drop(self._paths[name])
        return self._paths[name]


@contextlib.contextmanager
def huge_pages(needed: int) -> Iterator[None]:
    """Reserve free huge pages of 2 MiB, and release them at the end."""
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
        raise SkippedError(f"{error.strerror}: sysctl vm.nr_hugepages={needed}") from None
    try:
        if int((folder / "free_hugepages").read_text()) < needed:
            raise SkippedError(f"no {needed} huge pages to be had: memory is short or in pieces")
        yield
    finally:
        _let_go(lambda: _set_pages(folder / "nr_hugepages", total))


def _set_pages(file: Path, number: int) -> None:
    # Pages in use become surplus, and go when a worker of io_uring releases them.
    file.write_text(str(number))
    if (there := int(file.read_text())) != number:
        raise FailedError(f"vm.nr_hugepages stays at {there}: it was {number}")

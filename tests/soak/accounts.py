"""The kernel resources and the memory of this process, as figures to compare."""

import ctypes
import gc
import os
import re
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.guards import required
from tests.resources import held

BUFINFO = Path("/sys/kernel/debug/dma_buf/bufinfo")
MOST = {"blocks": 5_000, "allocated_kb": 4 << 10, "resident_kb": 16 << 10}
"""How much the figures that vary may grow, whatever the number of transfers.

Python's blocks grow by about 4,100 when two threads first transfer at once and so make the shared
engine's second ring: the numbers of its unused slots.
"""
_FIXED = (
    "descriptors",
    "mappings",
    "threads",
    "pinned_kb",
    "locked_kb",
    "registered",
    "dma_bufs",
    "huge_pages",
)


@dataclass(frozen=True)
class Account:
    """The figures: those in `_FIXED` must be equal, the others may grow by `MOST`."""

    descriptors: tuple[str, ...]
    mappings: tuple[str, ...]
    threads: int
    pinned_kb: int
    """Memory that io_uring pinned for this process (VmPin)."""
    locked_kb: int
    registered: int
    """Buffers and files in the tables of this process's rings, by their fdinfo."""
    dma_bufs: str
    """Of the whole machine, in the lab only: elsewhere other programs change it."""
    huge_pages: str
    """Free ones of the whole machine, in the lab only."""
    blocks: int
    """Blocks of memory of Python's allocator."""
    allocated_kb: int
    """Memory of malloc(3) in all arenas, which the core and Python use."""
    resident_kb: int

    @classmethod
    def take(cls) -> "Account":
        """Take the figures now."""
        descriptors, mappings = held()
        # The interpreter's cache of attributes keeps their names, and is filled by chance.
        getattr(sys, "_clear_internal_caches", sys._clear_type_cache)()
        gc.collect()
        status = _table(Path("/proc/self/status"))
        return cls(
            tuple(descriptors),
            tuple(mappings),
            threading.active_count(),
            status.get("VmPin", 0),
            status.get("VmLck", 0),
            sum(map(_registered, os.listdir("/proc/self/fdinfo"))),
            *_of_the_machine(),
            sys.getallocatedblocks(),
            _allocated_kb(),
            _table(Path("/proc/self/smaps_rollup"))["Rss"],  # VmRSS is from approximate counters
        )

    def settled(self, patience: float = 30.0) -> "Account":
        """Return the account when it equals this one in `_FIXED`, or after `patience` seconds."""
        end = time.monotonic() + patience
        while (now := Account.take()).differences(self) and time.monotonic() < end:
            time.sleep(0.02)
        return now

    def differences(self, before: "Account") -> list[str]:
        """Return the differences in `_FIXED`, as sentences."""
        pairs = ((name, getattr(before, name), getattr(self, name)) for name in _FIXED)
        return [f"{name}: {was} before, {now} after" for name, was, now in pairs if was != now]

    def growth(self, before: "Account") -> dict[str, int]:
        """Return the growth of the figures in `MOST`."""
        return {name: getattr(self, name) - getattr(before, name) for name in MOST}

    def __str__(self) -> str:
        return (
            f"{len(self.descriptors)} descriptors, {len(self.mappings)} shared mappings, "
            f"{self.threads} thread(s), {self.pinned_kb} kB pinned, {self.locked_kb} kB locked, "
            f"{self.registered} registered, dma-bufs: {self.dma_bufs}, free huge pages: "
            f"{self.huge_pages}, {self.blocks} Python blocks, {self.allocated_kb} kB by malloc, "
            f"{self.resident_kb} kB resident"
        )


def _of_the_machine() -> tuple[str, str]:
    """Return debugfs' total of dma-bufs, and the number of free huge pages."""
    if not required("hugepages"):
        return "not looked at", "not looked at"
    free = Path("/proc/meminfo").read_text().split("HugePages_Free:")[-1].split()[0]
    return BUFINFO.read_text().splitlines()[-1], free


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if row[-1] == "kB"}


def _allocated_kb() -> int:
    """Return the kB that malloc has in use, after it returned its free pages to the kernel."""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    libc.malloc_trim(0)
    with tempfile.TemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fdopen(os.dup(file.fileno()), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        file.seek(0)
        text = file.read().decode().rpartition("</heap>")[2]
    sizes = {kind: int(size) for kind, size in re.findall(r'type="(\w+)"[^>]* size="(\d+)"', text)}
    free = sizes.get("fast", 0) + sizes["rest"]  # glibc 2.43 has no fast bins
    return (sizes["current"] + sizes["mmap"] - free) >> 10


def _registered(fd: str) -> int:
    """Return the number of entries in a ring's tables; 0 for a descriptor of anything else."""
    try:
        text = Path("/proc/self/fdinfo", fd).read_text()
    except OSError:  # that of the listing
        return 0
    entries = text.partition("UserFiles:")[2].partition("PollList:")[0]
    # An empty slot for a buffer is <none>, and on Linux 6.12 the range that no memory has.
    return len(re.findall(r"^ +\d+: (?!<none>|0xf{16}/)", entries, re.MULTILINE))

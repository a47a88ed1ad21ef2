"""What a process holds of the kernel's and of Python's memory, as figures to compare."""

import gc
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.resources import held

BUFINFO = Path("/sys/kernel/debug/dma_buf/bufinfo")
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
    """The first eight come back exactly; the rest may vary a little, see `Account.growth`."""

    descriptors: tuple[str, ...]
    mappings: tuple[str, ...]
    threads: int
    pinned_kb: int
    """What io_uring has pinned for this process (VmPin)."""
    locked_kb: int
    registered: int
    """Buffers and files in the tables of this process's rings, by their fdinfo."""
    dma_bufs: str
    """Of the whole machine, where debugfs tells."""
    huge_pages: str
    """Free ones of the whole machine."""
    blocks: int
    """Of memory that Python's objects take, by its allocator."""
    resident_kb: int

    @classmethod
    def take(cls) -> "Account":
        """Look now; once what a worker lets go of a moment later has gone."""
        descriptors, mappings = held()
        gc.collect()
        status = _table(Path("/proc/self/status"))
        return cls(
            tuple(descriptors),
            tuple(mappings),
            threading.active_count(),
            status.get("VmPin", 0),
            status.get("VmLck", 0),
            sum(map(_registered, os.listdir("/proc/self/fdinfo"))),
            BUFINFO.read_text().splitlines()[-1] if os.access(BUFINFO, os.R_OK) else "not told",
            Path("/proc/meminfo").read_text().split("HugePages_Free:")[-1].split()[0],
            sys.getallocatedblocks(),
            status["VmRSS"],
        )

    def settled(self, patience: float = 2.0) -> "Account":
        """The account now, or as soon as it is this one in all that comes back exactly."""
        end = time.monotonic() + patience
        while (now := Account.take()).differences(self) and time.monotonic() < end:
            time.sleep(0.02)
        return now

    def differences(self, before: "Account") -> list[str]:
        """What came back differently, as sentences."""
        pairs = ((name, getattr(before, name), getattr(self, name)) for name in _FIXED)
        return [f"{name}: {was} before, {now} after" for name, was, now in pairs if was != now]

    def growth(self, before: "Account") -> tuple[int, int]:
        """Blocks and KiB more than before."""
        return self.blocks - before.blocks, self.resident_kb - before.resident_kb

    def __str__(self) -> str:
        return (
            f"{len(self.descriptors)} descriptors, {len(self.mappings)} shared mappings, "
            f"{self.threads} thread(s), {self.pinned_kb} kB pinned, {self.locked_kb} kB locked, "
            f"{self.registered} registered, dma-bufs: {self.dma_bufs}, {self.huge_pages} free huge "
            f"pages, {self.blocks} blocks, {self.resident_kb} kB resident"
        )


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if row[-1] == "kB"}


def _registered(fd: str) -> int:
    """Entries of a ring's tables; 0 for anything that is no ring."""
    try:
        text = Path("/proc/self/fdinfo", fd).read_text()
    except OSError:  # the listing's own
        return 0
    entries = text.partition("UserFiles:")[2].partition("PollList:")[0]
    return len(re.findall(r"^ +\d+: (?!<none>)", entries, re.MULTILINE))

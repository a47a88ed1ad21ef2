"""The kernel resources that this process holds, to compare before and after a test."""

import gc
import os
from pathlib import Path


def held() -> tuple[list[str], list[str]]:
    """Return the targets of open descriptors, and the mappings of memfds and dma-bufs."""
    gc.collect()
    descriptors = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            descriptors.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # that of the listing
            continue
    maps = Path("/proc/self/maps").read_text().splitlines()
    shared = [line.split()[-1] for line in maps if "/memfd:" in line or "/dmabuf:" in line]
    return sorted(descriptors), sorted(shared)


def pinned() -> str:
    """Return how much memory the rings of this process pin, as /proc/self/status reports it."""
    status = Path("/proc/self/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("VmPin"))

"""What a process holds of the kernel's: to compare before and after."""

import gc
import os
from pathlib import Path


def held() -> tuple[list[str], list[str]]:
    """The open descriptors and the mappings of memfds and dma-bufs, each as what it refers to."""
    gc.collect()
    descriptors = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            descriptors.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    maps = Path("/proc/self/maps").read_text().splitlines()
    shared = [line.split()[-1] for line in maps if "/memfd:" in line or "/dmabuf:" in line]
    return sorted(descriptors), sorted(shared)

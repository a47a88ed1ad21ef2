"""What was measured on: the machine, the target and its device, told before any figure."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dmabuf.audit import device_of


def machine() -> dict[str, Any]:
    """CPU, memory, kernel and versions."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "dmabuf": version("dmabuf"),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    """As /proc/cpuinfo names it; the architecture where that has no such line, as on ARM."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def device(fd: int) -> str | None:
    """The block device that a file's bytes lie on, with its model; None where there is none."""
    place = device_of(fd)
    if not os.path.isdir(place):
        return None
    name = os.path.basename(place)
    with suppress(OSError):
        model = Path(place, "device/model").read_text(encoding="utf-8", errors="replace").strip()
        return f"{name} ({model})" if model else name
    return name

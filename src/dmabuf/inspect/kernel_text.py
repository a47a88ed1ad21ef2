"""Parsers of what the kernel writes about dma-bufs and processes. Nothing is read here.

A holder may set a dma-buf's label to any bytes but NUL, newlines included. Each parser therefore
starts from text of the kernel that a label cannot reach.
"""

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from dmabuf.kernel import proc


class Entry(NamedTuple):
    """A dma-buf in debugfs."""

    inode: int
    size: int
    exporter: str
    name: str | None
    references: int
    devices: tuple[str, ...]
    """One name for each attachment."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping of a dma-buf in /proc/PID/maps."""

    address: int
    nbytes: int
    device: int
    """st_dev of the filesystem."""
    inode: int
    name: str | None


class Status(NamedTuple):
    """A process in /proc/PID/stat."""

    command: str
    state: str
    kernel: bool
    """True for a kernel thread."""
    threads: int
    started: int
    """Start time in clock ticks after boot."""


# The numbers are longer than any label (DMA_BUF_NAME_LEN is 32), so no label can forge an entry.
_ENTRY = re.compile(
    r"(?P<size>[0-9]{8,})\t[0-9a-f]{8,}\t[0-9a-f]{8,}\t(?P<count>[0-9]{8,})\t(?P<exporter>[^\t]+)\t"
    r"(?P<inode>[0-9]{8,})\t(?P<name>.*)",
    re.DOTALL,
)
_ATTACHED = "\tAttached Devices:"
_ATTACHED_END = re.compile(r"Total ([0-9]{1,9}) devices attached")
_FENCE = re.compile(r"\t[a-z]+ fence:.*", re.DOTALL)


def entries(text: str) -> dict[int, Entry]:
    """Parse /sys/kernel/debug/dma_buf/bufinfo; entries by inode (dma_buf_debug_show).

    An entry is read from its end: its last line counts the devices in the lines above.
    """
    lines = text.split("\n")
    heads = [(number, match) for number, match in enumerate(map(_ENTRY.fullmatch, lines)) if match]
    found = {}
    ends = [number for number, _ in heads[1:]] + [len(lines)]
    for (number, match), end in zip(heads, ends, strict=False):
        label, devices = _body(lines[number + 1 : end])
        name = "\n".join([match["name"], *label])
        entry = Entry(
            int(match["inode"]),
            int(match["size"]),
            match["exporter"],
            None if name == "<none>" else name,
            int(match["count"]),
            devices,
        )
        found[entry.inode] = entry
    return found


def _body(lines: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split what follows an entry's first line into the rest of the label and the devices."""
    for last in range(len(lines) - 1, -1, -1):
        total = _ATTACHED_END.fullmatch(lines[last])
        first = last - int(total[1]) if total else -1
        if first > 0 and lines[first - 1] == _ATTACHED:
            label = lines[: first - 1]
            while label and _FENCE.fullmatch(label[-1]):
                label.pop()
            return label, tuple(line.removeprefix("\t") for line in lines[first:last])
    return [], ()


def mappings(text: str) -> list[Mapping]:
    """Parse a process's maps; return the mappings whose path is that of a dma-buf.

    An ordinary file may have such a path; its device differs. A newline in a label is written as
    \\012 (seq_path).
    """
    found = []
    for line in text.split("\n"):
        fields = line.split(None, 5)
        if len(fields) < 6 or not fields[5].startswith(proc.DMABUF_PATH):
            continue
        start, _, end = fields[0].partition("-")
        major, _, minor = fields[3].partition(":")
        try:
            found.append(
                Mapping(
                    int(start, 16),
                    int(end, 16) - int(start, 16),
                    os.makedev(int(major, 16), int(minor, 16)),
                    int(fields[4]),
                    fields[5].removeprefix(proc.DMABUF_PATH).replace("\\012", "\n") or None,
                )
            )
        except (ValueError, OverflowError):
            continue
    return found


_PF_KTHREAD = 0x00200000  # include/linux/sched.h


def status(text: str) -> Status | None:
    """Parse a process's stat; None if the text is cut. The command may contain any text."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    try:
        return Status(
            head.partition("(")[2],
            fields[0],
            bool(int(fields[6]) & _PF_KTHREAD),
            int(fields[17]),
            int(fields[19]),
        )
    except (IndexError, ValueError):
        return None

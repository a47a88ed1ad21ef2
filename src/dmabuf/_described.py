"""What the kernel writes of dma-bufs in its text files. Parsers alone: nothing is read here.

Whoever holds a dma-buf sets its label, and any byte but NUL may stand in it, newlines too. So each
parser takes what the kernel wrote around a label from where a label cannot reach.
"""

import os
import re
from typing import NamedTuple

PREFIX = "/dmabuf:"
"""How the path of a dma-buf begins in /proc (dmabuffs_dname in drivers/dma-buf/dma-buf.c)."""


class Description(NamedTuple):
    """A dma-buf in /proc/PID/fdinfo; what a kernel does not write is None."""

    exporter: str
    name: str | None
    inode: int | None
    size: int | None
    """Bytes."""
    references: int | None
    """To its file: by descriptors, by mappings, and the kernel's own."""


class Entry(NamedTuple):
    """A dma-buf in the kernel's own list; what a list does not tell is None."""

    inode: int
    size: int
    exporter: str
    name: str | None = None
    references: int | None = None
    devices: tuple[str, ...] | None = None
    """The devices that are attached, one for each attachment."""


class Mapping(NamedTuple):
    """A mapping in /proc/PID/maps."""

    address: int
    nbytes: int
    device: int
    """st_dev of the filesystem of dma-bufs."""
    inode: int
    name: str | None


class Status(NamedTuple):
    """A process in /proc/PID/stat."""

    command: str
    state: str
    kernel: bool
    """It is a thread of the kernel's."""
    threads: int
    started: int
    """Clock ticks after boot: with the number it tells a process from a later one."""


def description(text: str) -> Description | None:
    """A descriptor's fdinfo; None where it is no dma-buf.

    Only a dma-buf's names an exporter, and the label is its end (dma_buf_show_fdinfo).
    """
    head, labelled, label = text.partition("\nname:\t")
    fields = dict(line.split(":", 1) for line in head.split("\n") if ":" in line)
    if "exp_name" not in fields:
        return None
    return Description(
        fields["exp_name"].strip(),
        label.removesuffix("\n") if labelled else None,
        _number(fields.get("ino")),
        _number(fields.get("size")),
        _number(fields.get("count")),
    )


# Longer than any label, so that no label is taken for one (DMA_BUF_NAME_LEN is 32).
_ENTRY = re.compile(
    r"(?P<size>[0-9]{8,})\t[0-9a-f]{8,}\t[0-9a-f]{8,}\t(?P<count>[0-9]{8,})\t(?P<exporter>[^\t]+)\t"
    r"(?P<inode>[0-9]{8,})\t(?P<name>.*)",
    re.DOTALL,
)
_ATTACHED = "\tAttached Devices:"
_ATTACHED_END = re.compile(r"Total ([0-9]{1,9}) devices attached")
_FENCE = re.compile(r"\t[a-z]+ fence:.*", re.DOTALL)


def entries(text: str) -> dict[int, Entry]:
    """What /sys/kernel/debug/dma_buf/bufinfo has, by inode (dma_buf_debug_show).

    An entry is read from its end: the last line counts the devices in the lines above it.
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
    """Between two entries' first lines: the rest of the label, and the attached devices."""
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
    """The mappings in a process's maps whose path is that of a dma-buf.

    A file may have such a path too: the device tells. Newlines in labels are written as \\012 there
    (seq_path).
    """
    found = []
    for line in text.split("\n"):
        fields = line.split(None, 5)
        if len(fields) < 6 or not fields[5].startswith(PREFIX):
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
                    fields[5].removeprefix(PREFIX).replace("\\012", "\n") or None,
                )
            )
        except (ValueError, OverflowError):
            continue
    return found


_PF_KTHREAD = 0x00200000  # include/linux/sched.h


def status(text: str) -> Status | None:
    """A process's stat; None where it is not whole. Its command may contain anything."""
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


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() else None

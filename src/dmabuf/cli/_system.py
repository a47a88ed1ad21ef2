"""The dma-bufs of the whole machine, for `dmabuf ls --system` and `dmabuf top`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dmabuf import system
from dmabuf.cli import _output, _table
from dmabuf.cli._output import printable
from dmabuf.sizes import format_size
from dmabuf.system import Census, Holder, Process, SystemBuffer, Total

FORMAT = 1
"""Of the JSON: keys are only added to it; what would change a meaning counts this up."""

_SHOWN = 8
"""Of one process's descriptors, where people read."""


def look(process: str | None = None, exporter: str | None = None) -> Census:
    """Look at the machine; of its buffers take those that are held by `process`, of `exporter`."""
    found = system.census()
    if process is not None:
        found = found.of(lambda one: any(is_meant(by.process, process) for by in one.holders))
    if exporter is not None:
        found = found.of(lambda one: one.exporter == exporter)
    return found


def is_meant(process: Process | None, wanted: str | None) -> bool:
    """Whether `wanted`, a number or a command, means the process; None means any."""
    if process is None or wanted is None:
        return wanted is None
    return wanted in (str(process.pid), process.command)


def run(*, process: str | None, exporter: str | None, json: bool) -> None:
    """Look, and tell.

    Raises:
        OSError: there is nothing to look at.
    """
    found = look(process, exporter)
    if json:
        _output.say_json(as_json(found))
        return
    for text in _tables(found):
        _output.say(text + "\n")
    _output.say(headline(found))
    tell_refusals(found)


def headline(found: Census) -> str:
    """What it all comes to."""
    return f"{_count(len(found.buffers), 'dma-buf')}, {size(found.total.nbytes, found)}"


def tell_refusals(found: Census) -> None:
    """What could not be seen."""
    for refusal in found.refusals:
        _output.note(f"note: {printable(refusal)}")


def _tables(found: Census) -> Iterator[str]:
    if not found.buffers:
        return
    yield _table.drawn(
        "",
        ("inode", "size", "exporter", "name", "held by", "attached devices"),
        [_row(buffer, found) for buffer in found.buffers],
        left=(2, 3, 4, 5),
        folded=(3, 4, 5),
    )
    processes = [
        (process_of(process, found), *figures(total, found), size(total.share, found))
        for process, total in found.by_process().items()
    ]
    yield _table.drawn("by process", ("process", "buffers", "size", "share"), processes)
    exporters = [
        (exporter_of(exporter), *figures(total, found))
        for exporter, total in found.by_exporter().items()
    ]
    yield _table.drawn("by exporter", ("exporter", "buffers", "size"), exporters)


def _row(buffer: SystemBuffer, found: Census) -> tuple[str, ...]:
    held = [f"{process_of(by.process, found)} ({_by_what(by)})" for by in buffer.holders]
    if buffer.unseen or not held:
        held.append(f"{_elsewhere(found)} ({buffer.unseen or '?'})")
    devices = None if buffer.devices is None else ", ".join(map(printable, buffer.devices))
    return (
        str(buffer.inode),
        ("" if buffer.exact else ">=") + format_size(buffer.size),
        exporter_of(buffer.exporter),
        printable(buffer.name or ""),
        ", ".join(held),
        "?" if devices is None else devices,
    )


def _by_what(holder: Holder) -> str:
    shown = " ".join(map(str, holder.fds[:_SHOWN]))
    more = len(holder.fds) - _SHOWN
    parts = [f"fd {shown}" + (f" and {more} more" if more > 0 else "")] if holder.fds else []
    parts += [_count(len(holder.mappings), "mapping")] if holder.mappings else []
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _elsewhere(found: Census) -> str:
    """Who has what no process was seen to have."""
    return "kernel" if found.complete else "not seen"


def process_of(process: Process | None, found: Census) -> str:
    """A process, for people."""
    return _elsewhere(found) if process is None else printable(str(process))


def exporter_of(exporter: str | None) -> str:
    """An exporter, for people."""
    return "?" if exporter is None else printable(exporter)


def figures(total: Total, found: Census) -> tuple[str, str]:
    """How many buffers, and how large, for people."""
    return str(total.buffers), size(total.nbytes, found)


def size(nbytes: int, found: Census) -> str:
    """A total, for people."""
    return ("" if all(one.exact for one in found.buffers) else ">=") + format_size(nbytes)


def as_json(found: Census) -> dict[str, Any]:
    """One look, for programs."""
    return {
        "format": FORMAT,
        "buffers": [_buffer_as_json(buffer) for buffer in found.buffers],
        "total": total_as_json(found.total),
        "by_process": [
            process_as_json(process) | total_as_json(total)
            for process, total in found.by_process().items()
        ],
        "by_exporter": [
            {"exporter": exporter} | total_as_json(total)
            for exporter, total in found.by_exporter().items()
        ],
        **seen_as_json(found),
    }


def _buffer_as_json(buffer: SystemBuffer) -> dict[str, Any]:
    return {
        "inode": buffer.inode,
        "size": buffer.size,
        "exact": buffer.exact,
        "exporter": buffer.exporter,
        "name": buffer.name,
        "references": buffer.references,
        "unseen": buffer.unseen,
        "holders": [
            process_as_json(by.process)
            | {
                "fds": by.fds,
                "mappings": [{"address": one.address, "size": one.nbytes} for one in by.mappings],
            }
            for by in buffer.holders
        ],
        "devices": buffer.devices,
    }


def process_as_json(process: Process | None) -> dict[str, Any]:
    """A process, for programs; its number is null for what no process was seen to hold."""
    if process is None:
        return {"pid": None, "started": None, "command": None}
    return {"pid": process.pid, "started": process.started, "command": process.command}


def total_as_json(total: Total) -> dict[str, int]:
    """A total or a growth, for programs."""
    return {"size": total.nbytes, "buffers": total.buffers, "share": total.share}


def seen_as_json(found: Census) -> dict[str, Any]:
    """How much of the machine was seen, for programs."""
    return {
        "processes": found.processes,
        "hidden": found.hidden,
        "complete": found.complete,
        "refusals": found.refusals,
    }

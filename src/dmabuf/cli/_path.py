"""What one path can do: facts and plans in both directions, and nothing of it changed."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from dmabuf import _sysfs, exporters, facts, nvme
from dmabuf.buffer import Buffer
from dmabuf.errors import RouteUnavailable
from dmabuf.file import File
from dmabuf.machine import Answer
from dmabuf.route import ALLOWED, Direction, Plan, Question, choose

_SIZE = 8 << 20
"""Bytes of the transfers that are planned."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The route that bytes would take in one direction."""

    ok: bool
    """Whether there is one."""
    zero_copy: bool
    route: str | None
    reason: str
    """Why by this route, or why by none."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Why each better route was passed over."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a path is and can do."""

    path: str
    kind: str
    filesystem: str | None
    size: int | None
    """Bytes; None for what has no size."""
    direct: Answer
    """Whether it takes O_DIRECT."""
    memory_alignment: int | None
    """What O_DIRECT asks of addresses, in bytes."""
    offset_alignment: int | None
    """What O_DIRECT asks of offsets and lengths, in bytes."""
    read: Outlook
    write: Outlook


def examine(path: str) -> Report:
    """Find out about a path, into and from a buffer that `allocate` makes here.

    A directory is examined by a file without a name in it, which is gone at the end. What opening
    might disturb (a FIFO, a socket, a character device) is not opened.

    Raises:
        OSError: the path is not there, or cannot be looked at.
    """
    status = os.stat(path)
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        return _examine_directory(path)
    kind = facts.kind_of(mode)
    if kind is None:
        raise OSError(22, "neither a file, directory, device, pipe nor socket", path)
    if nvme.is_namespace(status):
        kind = "NVMe character device"
    with exporters.allocate(_SIZE) as buffer:
        if kind in facts.STREAMS:
            return _examine_stream(path, kind)
        return _examine_file(path, kind, buffer)


def _examine_stream(path: str, kind: facts.Kind) -> Report:
    what = facts.STREAMS[kind]
    plans = [_outlook(choose(Question(way, stream=what))) for way in ("read", "write")]
    for index, (flag, verb) in enumerate(((os.R_OK, "read"), (os.W_OK, "written"))):
        if not os.access(path, flag, effective_ids=True):
            plans[index] = Outlook(False, False, None, f"may not be {verb} by this user")
    direct = Answer("O_DIRECT", False, f"{what} has none")
    return Report(path, kind, None, None, direct, None, None, plans[0], plans[1])


def _examine_file(path: str, kind: facts.Kind, buffer: Buffer) -> Report:
    with File(path, "r") as file:  # the caller hears of what cannot even be read
        read = _plan(file, buffer, "read")
        direct = file._target.direct()
        size = file.size
    write = _plan_of_writing(path, buffer)
    return _report(path, kind, size, direct, read, write)


def _plan_of_writing(path: str, buffer: Buffer) -> Outlook:
    """The plan of writing to what exists: opened for both, so neither made nor emptied."""
    try:
        with File(path, "r+") as file:
            return _plan(file, buffer, "write")
    except OSError as error:
        return Outlook(False, False, None, str(error.strerror))


def _examine_directory(path: str) -> Report:
    with exporters.allocate(_SIZE) as buffer:
        try:
            with tempfile.TemporaryFile(dir=path) as temporary:
                os.ftruncate(temporary.fileno(), _SIZE)
                with File(temporary.fileno(), "r+") as file:
                    read, write = _plan(file, buffer, "read"), _plan(file, buffer, "write")
                    direct = file._target.direct()
        except OSError as error:
            text = f"no file can be made in it: {error.strerror}"
            none = Outlook(False, False, None, text)
            refused = facts.Direct(-1, facts.Alignment(1, 1), text)
            return _report(path, "directory", None, refused, none, none)
    return _report(path, "directory", None, direct, read, write)


def _plan(file: File, buffer: Buffer, direction: Direction) -> Outlook:
    size: int = _SIZE
    if direction == "read":
        size = min(_SIZE, file.size or 0)
        if size == 0:
            return Outlook(True, False, None, "it is empty: there is nothing to read")
    elif file.kind in ("block device", "NVMe character device"):
        size = min(_SIZE, file.size or 0)
    try:
        return _outlook(file.plan(buffer, direction, size=size))
    except RouteUnavailable as error:
        return Outlook(False, False, None, error.reason)


def _outlook(plan: Plan) -> Outlook:
    rejected = {route.value: why for route, why in plan.rejected.items()}
    return Outlook(
        True, plan.route in ALLOWED["zero-copy"], plan.route.value, plan.reason, rejected
    )


def _report(
    path: str, kind: str, size: int | None, direct: facts.Direct, read: Outlook, write: Outlook
) -> Report:
    if direct.refusal is None:
        memory, offset = direct.alignment.memory, direct.alignment.offset
        text = f"addresses by {memory}, offsets and lengths by {offset} bytes"
        name = "passthrough" if kind == "NVMe character device" else "O_DIRECT"
        answer = Answer(name, True, text)
        return Report(path, kind, filesystem(path), size, answer, memory, offset, read, write)
    answer = Answer("O_DIRECT", False, direct.refusal)
    return Report(path, kind, filesystem(path), size, answer, None, None, read, write)


def filesystem(path: str) -> str | None:
    """The type of the filesystem that a path is on, by the mount that it lies under."""
    real = os.path.realpath(path)
    best: tuple[int, str] | None = None
    with suppress(OSError):
        for point, _, kind, _ in _sysfs.mounts():
            inside = point == "/" or real == point or real.startswith(point + "/")
            if inside and (best is None or len(point) >= best[0]):
                best = len(point), kind
    return best and best[1]


Format = Literal[1]


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs."""

    def one(outlook: Outlook) -> dict[str, Any]:
        return {
            "ok": outlook.ok,
            "zero_copy": outlook.zero_copy,
            "route": outlook.route,
            "reason": outlook.reason,
            "rejected": dict(outlook.rejected),
        }

    return {
        "path": report.path,
        "kind": report.kind,
        "filesystem": report.filesystem,
        "size": report.size,
        "direct": {
            "ok": report.direct.ok,
            "detail": report.direct.detail,
            "memory_alignment": report.memory_alignment,
            "offset_alignment": report.offset_alignment,
        },
        "read": one(report.read),
        "write": one(report.write),
    }

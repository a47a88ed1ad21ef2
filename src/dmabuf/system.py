"""The dma-bufs of the whole machine: who holds each, and how much that comes to.

    >>> from dmabuf import system
    >>> census = system.census()
    >>> for process, total in census.by_process().items():
    ...     print(process, total.nbytes)

All of it is read from /proc and, where they may be read, from debugfs or the statistics in sysfs.
No buffer is opened, mapped or synchronised, and no reference to one is kept.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from dmabuf import _described, _procfs
from dmabuf._described import Mapping

__all__ = ["Census", "Holder", "Mapping", "Process", "SystemBuffer", "Total", "census"]


_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Process:
    """A process; equal to what it was in an earlier census, whatever it calls itself now."""

    pid: int
    started: int
    """Clock ticks after boot: a later process with the same number has another."""
    command: str = field(compare=False)
    """What it calls itself, 15 bytes at most, of any kind."""

    def __str__(self) -> str:
        return f"{self.command}[{self.pid}]"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, and by what it holds a buffer."""

    process: Process
    fds: tuple[int, ...] = ()
    mappings: tuple[Mapping, ...] = ()

    @property
    def references(self) -> int:
        """How many these are."""
        return len(self.fds) + len(self.mappings)


@dataclass(frozen=True, slots=True)
class SystemBuffer:
    """A dma-buf somewhere on the machine."""

    inode: int
    """Its number, which no other dma-buf has until the next boot."""
    size: int
    """Bytes; at least so many where not `exact`."""
    exact: bool
    """False where nothing but mappings was to be seen, which need not be of all of it."""
    exporter: str | None
    """None where nothing but mappings was to be seen."""
    name: str | None
    """Its label, which anyone who holds it may set to anything."""
    references: int | None
    """To it in all; None where the kernel did not tell."""
    holders: tuple[Holder, ...]
    devices: tuple[str, ...] | None
    """The devices that are attached to it; None where the kernel did not tell."""

    @property
    def unseen(self) -> int:
        """References that no process was seen to have.

        The kernel's own, for an importer, an exporter's handle, a registration with io_uring or a
        message under way, and those of processes that could not be looked into.
        """
        seen = sum(holder.references for holder in self.holders)
        return max(0, (self.references or 0) - seen)


@dataclass(frozen=True, slots=True)
class Total:
    """What some buffers come to, each counted once."""

    nbytes: int = 0
    buffers: int = 0
    share: int = 0
    """Bytes, of which a buffer's are divided evenly among the processes that hold it."""

    def __sub__(self, other: Total) -> Total:
        """How much more it is than it was."""
        return Total(
            self.nbytes - other.nbytes, self.buffers - other.buffers, self.share - other.share
        )

    def plus(self, buffer: SystemBuffer) -> Total:
        """With one more buffer."""
        share = buffer.size // max(1, len(buffer.holders))
        return Total(self.nbytes + buffer.size, self.buffers + 1, self.share + share)


@dataclass(frozen=True, slots=True)
class Census:
    """What one look at the machine found."""

    buffers: tuple[SystemBuffer, ...]
    """The largest first."""
    processes: int
    """How many processes there were, the kernel's threads not counted."""
    hidden: int
    """How many of them could not be looked into."""
    complete: bool
    """Every process was looked into: what is `unseen` is the kernel's."""
    refusals: tuple[str, ...]
    """What could not be seen, why, and how to see it."""

    @property
    def total(self) -> Total:
        """What all of it comes to."""
        return _totals((None, buffer) for buffer in self.buffers).get(None, Total())

    def by_process(self) -> dict[Process | None, Total]:
        """What each process holds, the most first; None is what no process was seen to hold."""
        return _totals(
            (process, buffer)
            for buffer in self.buffers
            for process in (_processes(buffer) or [None])
        )

    def by_exporter(self) -> dict[str | None, Total]:
        """What each exporter has made, the most first."""
        return _totals((buffer.exporter, buffer) for buffer in self.buffers)

    def of(self, keep: Callable[[SystemBuffer], object]) -> Census:
        """The same look, at those buffers alone that `keep` is true of."""
        return replace(self, buffers=tuple(filter(keep, self.buffers)))


def _totals(pairs: Iterable[tuple[_Key, SystemBuffer]]) -> dict[_Key, Total]:
    totals: dict[_Key, Total] = {}
    for key, buffer in pairs:
        totals[key] = totals.get(key, Total()).plus(buffer)
    return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))


def _processes(buffer: SystemBuffer) -> list[Process | None]:
    return [holder.process for holder in buffer.holders]


def census(root: str = "/") -> Census:
    """Look at every dma-buf that this user may see; nothing of a buffer is touched.

    ``root`` is the folder that has ``proc`` and ``sys``. Processes and buffers that come or go
    meanwhile are no error, and may be missing. Of processes that this user may not look into
    (ptrace(2), "access mode checking") only their number is found out, and buffers that no process
    was seen to hold come from debugfs, which is root's; ``refusals`` has what was missed.

    Not seen at all are descriptors of a thread that keeps its own (``CLONE_THREAD`` without
    ``CLONE_FILES``), and mappings whose driver shows another file in their place, as some GPUs' do.

    Raises:
        OSError: there is no /proc.
    """
    return _Look(root).all()


@dataclass(slots=True)
class _Found:
    """What is known of a buffer so far."""

    told: _described.Description | _described.Entry | None = None
    mapped: int = 0
    label: str | None = None
    held: dict[Process, tuple[list[int], list[Mapping]]] = field(default_factory=dict)

    def by(self, process: Process) -> tuple[list[int], list[Mapping]]:
        """Where to note what a process holds it by."""
        return self.held.setdefault(process, ([], []))


class _Look:
    """One look."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._found: dict[int, _Found] = {}
        self._mapped: list[tuple[Process, Mapping]] = []
        self._device: int | None = None  # of the filesystem of dma-bufs
        self._processes = self._hidden = 0

    def all(self) -> Census:
        """Everything there is."""
        listed, refusal = _procfs.listed(self._root)
        pids = self._pids()
        for pid in pids:
            self._visit(pid)
        for process, mapping in self._mapped:
            if self._is_dma_buf(mapping, listed):
                found = self._found.setdefault(mapping.inode, _Found())
                found.by(process)[1].append(mapping)
                found.mapped = max(found.mapped, mapping.nbytes)
                found.label = mapping.name
        if listed is not None and self._found.keys() != listed.keys():
            # What no process has must have been there all the time: it may have changed hands.
            again = _procfs.listed(self._root)[0] or {}
            for inode in listed.keys() & again.keys():
                self._found.setdefault(inode, _Found())
            listed |= again
        buffers = (
            _buffer(inode, found, (listed or {}).get(inode)) for inode, found in self._found.items()
        )
        unlisted = _procfs.unlisted(self._root, pids)
        refusals = [self._undecided(listed), unlisted, self._refused(), refusal]
        return Census(
            tuple(sorted(buffers, key=lambda buffer: (-buffer.size, buffer.inode))),
            self._processes,
            self._hidden,
            not self._hidden and unlisted is None,
            tuple(refusal for refusal in refusals if refusal is not None),
        )

    def _pids(self) -> list[str]:
        folder = os.path.join(self._root, "proc")
        pids = [name for name in os.listdir(folder) if name.isdecimal()]
        if not pids:
            raise OSError(errno.ENOENT, "has no processes: mount -t proc proc /proc", folder)
        return sorted(pids, key=int)

    def _visit(self, pid: str) -> None:
        """Note what a process holds."""
        folder = os.path.join(self._root, "proc", pid)
        try:
            if not self._look_into(folder, folder):
                status = _procfs.status(folder)
                if status is None or status.kernel:
                    return
                if status.state == "Z" and status.threads > 1:  # its first thread alone has ended
                    tasks = os.path.join(folder, "task")
                    for tid in [tid for tid in os.listdir(tasks) if tid != pid][:1]:
                        self._look_into(os.path.join(tasks, tid), folder)
        except PermissionError:
            if _procfs.may_hold(folder):
                self._processes += 1
                self._hidden += 1
        except OSError as error:
            if error.errno not in _procfs.VANISHED:
                raise
        else:
            self._processes += 1

    def _look_into(self, folder: str, owner: str) -> bool:
        """Note what a process or thread holds; whether it has descriptors or memory at all."""
        fds = os.listdir(os.path.join(folder, "fd"))
        held = [one for fd in fds if (one := self._descriptor(folder, fd)) is not None]
        text = _procfs.text(os.path.join(folder, "maps"))
        mapped = _described.mappings(text) if _described.PREFIX in text else []
        status = _procfs.status(owner) if held or mapped else None
        if status is not None:
            process = Process(int(os.path.basename(owner)), status.started, status.command)
            for inode, fd, told in held:
                found = self._found.setdefault(inode, _Found())
                found.told = told
                found.by(process)[0].append(fd)
            self._mapped += [(process, mapping) for mapping in mapped]
        return bool(fds or text)

    def _descriptor(self, folder: str, fd: str) -> tuple[int, int, _described.Description] | None:
        """A descriptor's inode, number and description, None where it is no dma-buf."""
        path = os.path.join(folder, "fd", fd)
        try:
            if not os.readlink(path).startswith(_described.PREFIX):
                return None  # as nearly all
            told = _described.description(_procfs.text(os.path.join(folder, "fdinfo", fd)))
            if told is None:
                return None  # a file of that name
        except OSError as error:
            if error.errno not in _procfs.VANISHED:
                raise
            return None
        inode = told.inode
        if inode is None or self._device is None:
            with suppress(OSError):  # it is gone
                status = os.stat(path)  # the filesystem's own: no exporter is asked
                inode = status.st_ino if inode is None else inode
                if status.st_ino == inode:
                    self._device = status.st_dev
        return None if inode is None else (inode, int(fd), told)

    def _is_dma_buf(self, mapping: Mapping, listed: dict[int, _described.Entry] | None) -> bool:
        """Whether it is known to be one, and no file of that name."""
        if self._device is not None:
            return mapping.device == self._device
        return listed is not None and mapping.inode in listed

    def _undecided(self, listed: dict[int, _described.Entry] | None) -> str | None:
        if not self._mapped or self._device is not None or listed is not None:
            return None
        return (
            f"mappings ({len(self._mapped)}) that may be of dma-bufs, or of files called like one, "
            "are left out: any dma-buf's descriptor that you may look at tells them apart, as does "
            "the kernel's list"
        )

    def _refused(self) -> str | None:
        if not self._hidden:
            return None
        return (
            f"{self._hidden} of {self._processes} processes could not be looked into, and what they"
            " hold is missing or not told as theirs: root, or CAP_SYS_PTRACE, sees all"
        )


def _buffer(inode: int, found: _Found, entry: _described.Entry | None) -> SystemBuffer:
    told = found.told or entry
    size = told.size if told and told.size is not None else entry.size if entry else None
    return SystemBuffer(
        inode,
        found.mapped if size is None else size,
        size is not None,
        told.exporter if told else None,
        told.name if told else found.label,
        told.references if told else None,
        tuple(
            Holder(process, tuple(sorted(fds)), tuple(maps))
            for process, (fds, maps) in sorted(found.held.items(), key=lambda item: item[0].pid)
        ),
        entry.devices if entry else None,
    )

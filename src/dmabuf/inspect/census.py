"""The census: every dma-buf on the machine, the processes that hold it, and totals.

Everything is read from /proc and debugfs. No buffer is opened, mapped or synchronised, and the
census keeps no reference to one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from dmabuf.inspect import kernel_text
from dmabuf.inspect.kernel_text import Entry, Mapping
from dmabuf.kernel import proc

__all__ = ["Census", "Holder", "Mapping", "Process", "SystemBuffer", "Total", "take_census"]

_VANISHED = (errno.ENOENT, errno.ESRCH)  # read(2) of a process or descriptor that has gone
_BUFINFO = "sys/kernel/debug/dma_buf/bufinfo"
_FIRST_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO in include/linux/proc_ns.h

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Process:
    """A process. It compares equal across censuses, even if it changes its command name."""

    pid: int
    started: int
    """Start time in clock ticks after boot: distinguishes a later process with the same pid."""
    command: str = field(compare=False)
    """The command name, at most 15 bytes; the process chooses it freely."""

    def __str__(self) -> str:
        return f"{self.command}[{self.pid}]"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a buffer, with its descriptors and mappings."""

    process: Process
    fds: tuple[int, ...] = ()
    mappings: tuple[Mapping, ...] = ()

    @property
    def references(self) -> int:
        """The number of descriptors and mappings."""
        return len(self.fds) + len(self.mappings)


@dataclass(frozen=True, slots=True)
class SystemBuffer:
    """A dma-buf of any process or driver on the machine."""

    inode: int
    """The inode number: unique until the next boot."""
    size: int
    """Size in bytes; a lower bound if `exact` is false."""
    exact: bool
    """False if only mappings were visible, which may not cover the whole buffer."""
    exporter: str | None
    """The exporter; None if only mappings were visible."""
    name: str | None
    """The label. Any holder may set it to any text."""
    references: int | None
    """All references to the buffer; None if the kernel does not report them."""
    holders: tuple[Holder, ...]
    devices: tuple[str, ...] | None
    """The attached devices; None if the kernel does not report them."""

    @property
    def unseen(self) -> int:
        """The number of references that belong to no visible process.

        They belong to the kernel (an importer, an exporter's handle, an io_uring registration, a
        message in flight) or to processes that could not be examined.
        """
        seen = sum(holder.references for holder in self.holders)
        return max(0, (self.references or 0) - seen)


@dataclass(frozen=True, slots=True)
class Total:
    """The sum over some buffers, each counted once."""

    nbytes: int = 0
    buffers: int = 0
    share: int = 0
    """Bytes, with each buffer divided evenly among the processes that hold it."""

    def __sub__(self, other: Total) -> Total:
        """Return the growth from `other` to this total."""
        return Total(
            self.nbytes - other.nbytes, self.buffers - other.buffers, self.share - other.share
        )

    def plus(self, buffer: SystemBuffer) -> Total:
        """Return the total with one more buffer."""
        share = buffer.size // max(1, len(buffer.holders))
        return Total(self.nbytes + buffer.size, self.buffers + 1, self.share + share)


@dataclass(frozen=True, slots=True)
class Census:
    """The result of one look at the machine."""

    buffers: tuple[SystemBuffer, ...]
    """All visible buffers, the largest first."""
    processes: int
    """The number of processes, kernel threads excluded."""
    hidden: int
    """The number of processes that could not be examined."""
    complete: bool
    """True if every process was examined: then `unseen` references are the kernel's."""
    refusals: tuple[str, ...]
    """What could not be seen: cause and fix."""

    @property
    def total(self) -> Total:
        """The total of all buffers."""
        return _totals((None, buffer) for buffer in self.buffers).get(None, Total())

    def by_process(self) -> dict[Process | None, Total]:
        """Return the total of each process, the largest first; None is "no visible process"."""

        def holders(buffer: SystemBuffer) -> list[Process | None]:
            return [holder.process for holder in buffer.holders]

        return _totals(
            (process, buffer) for buffer in self.buffers for process in (holders(buffer) or [None])
        )

    def by_exporter(self) -> dict[str | None, Total]:
        """Return the total of each exporter, the largest first."""
        return _totals((buffer.exporter, buffer) for buffer in self.buffers)

    def of(self, keep: Callable[[SystemBuffer], object]) -> Census:
        """Return the same census, reduced to the buffers for which `keep` is true."""
        return replace(self, buffers=tuple(filter(keep, self.buffers)))


def _totals(pairs: Iterable[tuple[_Key, SystemBuffer]]) -> dict[_Key, Total]:
    totals: dict[_Key, Total] = {}
    for key, buffer in pairs:
        totals[key] = totals.get(key, Total()).plus(buffer)
    return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))


def take_census(root: str = "/") -> Census:
    """Return every dma-buf that this user may see.

    ``root`` is the directory that contains ``proc`` and ``sys``. Processes and buffers that appear
    or vanish during the census are not an error. Other users' processes need CAP_SYS_PTRACE
    (ptrace(2), "access mode checking"); buffers without a visible process and attached devices need
    debugfs, which only root may read. ``refusals`` lists what was missed.

    Never visible are descriptors of a thread with its own table (``CLONE_THREAD`` without
    ``CLONE_FILES``), and mappings for which the driver shows another file, as some GPUs do.

    Raises:
        OSError: /proc is missing.
    """
    return _Look(root).all()


@dataclass(slots=True)
class _Found:
    """What is known about a buffer so far."""

    info: proc.DmabufInfo | None = None
    mapped: int = 0
    label: str | None = None
    held: dict[Process, tuple[list[int], list[Mapping]]] = field(default_factory=dict)

    def by(self, process: Process) -> tuple[list[int], list[Mapping]]:
        return self.held.setdefault(process, ([], []))


class _Look:
    """One census in progress."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._proc = os.path.join(root, "proc")
        self._found: dict[int, _Found] = {}
        self._mapped: list[tuple[Process, Mapping]] = []
        self._device: int | None = None  # st_dev of the dma-buf filesystem
        self._processes = self._hidden = 0

    def all(self) -> Census:
        listed, no_list = self._read_bufinfo()
        pids = sorted(filter(str.isdecimal, os.listdir(self._proc)), key=int)
        if not pids:
            raise OSError(errno.ENOENT, "has no processes: mount -t proc proc /proc", self._proc)
        for pid in pids:
            self._visit(pid)
        for process, mapping in self._mapped:
            if self._is_dmabuf(mapping, listed):
                found = self._found.setdefault(mapping.inode, _Found())
                found.by(process)[1].append(mapping)
                found.mapped = max(found.mapped, mapping.nbytes)
                found.label = mapping.name
        if listed is not None and self._found.keys() != listed.keys():
            # A buffer without a process must be in both lists: it may have changed hands meanwhile.
            again = self._read_bufinfo()[0] or {}
            for inode in listed.keys() & again.keys():
                self._found.setdefault(inode, _Found())
            listed |= again
        buffers = [
            _buffer(inode, found, (listed or {}).get(inode)) for inode, found in self._found.items()
        ]
        partial = self._why_partial(pids)
        refusals = (self._undecided(listed), partial, self._refused(), no_list)
        return Census(
            tuple(sorted(buffers, key=lambda buffer: (-buffer.size, buffer.inode))),
            self._processes,
            self._hidden,
            not self._hidden and partial is None,
            tuple(filter(None, refusals)),
        )

    def _read_bufinfo(self) -> tuple[dict[int, Entry] | None, str | None]:
        """Return the kernel's list of dma-bufs, or the reason why it cannot be read."""
        path = os.path.join(self._root, _BUFINFO)
        debugfs = os.path.join(self._root, "sys/kernel/debug")
        try:
            return kernel_text.entries(_read(path)), None
        except OSError as error:
            if error.errno == errno.EACCES:
                why = f"{error.strerror}; {_as_root()}"
            elif error.errno == errno.EPERM:
                why = f"{error.strerror}: the kernel is locked down (kernel_lockdown(7))"
            elif error.errno != errno.ENOENT:
                why = str(error.strerror)
            elif os.path.isdir(debugfs) and os.listdir(debugfs):
                why = "the kernel was built without it; use one with CONFIG_DEBUG_FS"
            else:
                why = f"debugfs is not mounted; mount -t debugfs debugfs {debugfs}"
        return None, f"attached devices and buffers without a process need {path}: {why}"

    def _why_partial(self, pids: list[str]) -> str | None:
        """Return why /proc may not list every process."""
        if "1" not in pids:
            return f"{self._proc} hides other users' processes (hidepid); run with CAP_SYS_PTRACE"
        for pid in ("1", "self"):
            with suppress(OSError):
                if os.readlink(os.path.join(self._proc, pid, "ns/pid")) == _FIRST_NAMESPACE:
                    return None
                return f"{self._proc} lists only this container's processes; run outside of it"
        return None

    def _visit(self, pid: str) -> None:
        """Record what a process holds."""
        folder = os.path.join(self._proc, pid)
        try:
            if not self._examine(folder, folder):
                status = _status(folder)
                if status is None or status.kernel:
                    return
                if status.state == "Z" and status.threads > 1:  # only its first thread has ended
                    tasks = os.path.join(folder, "task")
                    for tid in [tid for tid in os.listdir(tasks) if tid != pid][:1]:
                        self._examine(os.path.join(tasks, tid), folder)
        except PermissionError:
            if _may_hold(folder):
                self._processes += 1
                self._hidden += 1
        except OSError as error:
            if error.errno not in _VANISHED:
                raise
        else:
            self._processes += 1

    def _examine(self, folder: str, owner: str) -> bool:
        """Record what a process or thread holds; return whether it has descriptors or memory."""
        fds = os.listdir(os.path.join(folder, "fd"))
        held = [one for fd in fds if (one := self._descriptor(folder, fd)) is not None]
        text = _read(os.path.join(folder, "maps"))
        mapped = kernel_text.mappings(text) if proc.DMABUF_PATH in text else []
        status = _status(owner) if held or mapped else None
        if status is not None:
            process = Process(int(os.path.basename(owner)), status.started, status.command)
            for inode, fd, info in held:
                found = self._found.setdefault(inode, _Found())
                found.info = info
                found.by(process)[0].append(fd)
            self._mapped += [(process, mapping) for mapping in mapped]
        return bool(fds or text)

    def _descriptor(self, folder: str, fd: str) -> tuple[int, int, proc.DmabufInfo] | None:
        """Return a descriptor's inode, number and fdinfo; None if it is not a dma-buf."""
        path = os.path.join(folder, "fd", fd)
        try:
            if not os.readlink(path).startswith(proc.DMABUF_PATH):
                return None
            info = proc.parse_fdinfo(_read(os.path.join(folder, "fdinfo", fd)))
        except OSError as error:
            if error.errno not in _VANISHED:
                raise
            return None
        if info is None:
            return None  # an ordinary file with such a path
        inode = info.inode
        if inode is None or self._device is None:
            with suppress(OSError):  # the descriptor has gone
                status = os.stat(path)  # answered by the filesystem, not by the exporter
                inode = status.st_ino if inode is None else inode
                if status.st_ino == inode:
                    self._device = status.st_dev
        return None if inode is None else (inode, int(fd), info)

    def _is_dmabuf(self, mapping: Mapping, listed: dict[int, Entry] | None) -> bool:
        """Return whether a mapping is a dma-buf's and not that of a file with such a path."""
        if self._device is not None:
            return mapping.device == self._device
        return listed is not None and mapping.inode in listed

    def _undecided(self, listed: dict[int, Entry] | None) -> str | None:
        if not self._mapped or self._device is not None or listed is not None:
            return None
        return (
            f"{len(self._mapped)} mappings may be of dma-bufs or of files with such names and are "
            f"left out; {_as_root()}"
        )

    def _refused(self) -> str | None:
        if not self._hidden:
            return None
        return (
            f"{self._hidden} of {self._processes} processes could not be examined: permission "
            "denied; run with CAP_SYS_PTRACE"
        )


def _buffer(inode: int, found: _Found, entry: Entry | None) -> SystemBuffer:
    info, size, exporter, name, references = found.info, None, None, found.label, None
    if entry is not None:
        size, exporter, name, references = entry.size, entry.exporter, entry.name, entry.references
    if info is not None:
        size = entry.size if info.size is None and entry else info.size
        exporter, name, references = info.exporter, info.name, info.references
    return SystemBuffer(
        inode,
        found.mapped if size is None else size,
        size is not None,
        exporter,
        name,
        references,
        tuple(
            Holder(process, tuple(sorted(fds)), tuple(maps))
            for process, (fds, maps) in sorted(found.held.items(), key=lambda item: item[0].pid)
        ),
        entry.devices if entry else None,
    )


def _as_root() -> str:
    """Return what to do where only root may read; root itself may be confined by a container."""
    return "run as root" if os.geteuid() else "refused to root too: run outside this container"


def _read(path: str) -> str:
    """Return a file's text; a byte that is not UTF-8 becomes a lone surrogate, as in file names."""
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.readall())


def _status(folder: str) -> kernel_text.Status | None:
    """Return the parsed stat of a process; None if it has vanished."""
    try:
        return kernel_text.status(_read(os.path.join(folder, "stat")))
    except OSError as error:
        if error.errno not in _VANISHED:
            raise
        return None


def _may_hold(folder: str) -> bool:
    """Return whether a process that may not be examined can hold anything."""
    try:
        status = _status(folder)
    except PermissionError:
        return True
    if status is None:
        return False
    return not status.kernel and (status.state != "Z" or status.threads > 1)

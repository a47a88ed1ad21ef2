"""Reading what /proc and /sys have of the whole machine's dma-bufs and processes.

`root` is the folder that has both.
"""

from __future__ import annotations

import errno
import os

from dmabuf import _described, _sysfs

_DEBUGFS = "sys/kernel/debug"
_BUFINFO = f"{_DEBUGFS}/dma_buf/bufinfo"
_STATISTICS = "sys/kernel/dmabuf/buffers"
_FIRST_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO in include/linux/proc_ns.h

VANISHED = (errno.ENOENT, errno.ESRCH)
"""What reading of a process, or of its descriptor, gives once it is gone."""


def listed(root: str) -> tuple[dict[int, _described.Entry] | None, str | None]:
    """The kernel's own list of dma-bufs, or what it has of one, and why it has no more."""
    path = os.path.join(root, _BUFINFO)
    try:
        return _described.entries(text(path)), None
    except OSError as error:
        problem = error
    known = _statistics(root)
    missed = (
        "attached devices"
        if known is not None
        else "attached devices, and buffers of no process seen,"
    )
    debugfs = os.path.join(root, _DEBUGFS)
    if problem.errno == errno.EACCES:
        why = f"{problem.strerror}: look as root"
    elif problem.errno == errno.EPERM:
        why = f"{problem.strerror}: the kernel is locked down (kernel_lockdown(7))"
    elif problem.errno != errno.ENOENT:
        why = str(problem.strerror)
    elif os.path.isdir(debugfs) and os.listdir(debugfs):
        why = "this kernel has no such file: one with CONFIG_DEBUG_FS has it"
    else:
        why = f"debugfs is not mounted: mount -t debugfs debugfs {debugfs}"
    return known, f"{missed} are told in {path} alone: {why}"


def _statistics(root: str) -> dict[int, _described.Entry] | None:
    """What a kernel with CONFIG_DMABUF_SYSFS_STATS, as Android's, tells anyone."""
    folder = os.path.join(root, _STATISTICS)
    try:
        inodes = os.listdir(folder)
    except OSError:
        return None
    listed = {}
    for inode in inodes:
        size = _sysfs.number(folder, inode, "size")
        exporter = _sysfs.read(folder, inode, "exporter_name").strip()
        if inode.isdecimal() and size is not None:
            listed[int(inode)] = _described.Entry(int(inode), size, exporter)
    return listed


def unlisted(root: str, pids: list[str]) -> str | None:
    """Why there may be processes that /proc does not list."""
    proc = os.path.join(root, "proc")
    if "1" not in pids:
        return (
            f"{proc} does not list the processes of others (hidepid): root, or CAP_SYS_PTRACE, "
            "sees all"
        )
    for pid in ("1", "self"):
        try:
            namespace = os.readlink(os.path.join(proc, pid, "ns/pid"))
        except OSError:
            continue
        if namespace != f"pid:[{_FIRST_NAMESPACE}]":
            return f"{proc} has the processes of this container alone: look from outside of it"
        break
    return None


def text(path: str) -> str:
    """A file's text; a byte that is not UTF-8 is a lone surrogate, as in names of files."""
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.readall())


def status(folder: str) -> _described.Status | None:
    """What a process says of itself; None where it has vanished."""
    try:
        return _described.status(text(os.path.join(folder, "stat")))
    except OSError as error:
        if error.errno not in VANISHED:
            raise
        return None


def may_hold(folder: str) -> bool:
    """Whether a process that may not be looked into can hold anything."""
    try:
        told = status(folder)
    except PermissionError:
        return True
    if told is None:
        return False
    return not told.kernel and (told.state != "Z" or told.threads > 1)

"""Where the bytes of a file lie on its block device: FIEMAP, and the signs that they have moved.

ext4 and xfs map files to one block device, that of `st_dev`, except for files of xfs on a realtime
device. FIEMAP (linux/fiemap.h) reports the extents, and flags those whose bytes are not, or not
as they are read from the file, in blocks of their own.

A change of a file changes its ctime, but not at once: the kernel's clock for timestamps ticks every
1 to 10 ms, and on ext4 with inodes of 128 bytes every second. So a state is only of use if its
ctime is older than the clock (`State.shows_changes`): any later change then has another ctime.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from typing import NamedTuple

from dmabuf.errors import os_error
from dmabuf.kernel import files, proc, uapi

_BATCH = 128
"""Extents that one ioctl returns at most."""
_SECOND = 1_000_000_000
_CLOCK_REALTIME_COARSE = 5  # <linux/time.h>, the clock of timestamps


class Extent(NamedTuple):
    """A part of a file that is allocated."""

    offset: int
    """In the file, in bytes."""
    place: int
    """On the block device, in bytes."""
    size: int
    flags: int
    """FIEMAP_EXTENT_*, but for LAST and MERGED, which depend on the request."""

    @property
    def written(self) -> bool:
        """Whether it has bytes; else it reads as zeros."""
        return not self.flags & uapi.FIEMAP_EXTENT_UNWRITTEN


class State(NamedTuple):
    """What changes when a file does."""

    size: int
    modified: int
    """mtime in nanoseconds."""
    changed: int
    """ctime in nanoseconds."""

    def shows_changes(self) -> bool:
        """Return whether any change from now on makes another state."""
        now = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        if self.changed % _SECOND == 0:  # perhaps timestamps of whole seconds
            now = now // _SECOND * _SECOND
        return self.changed < now


_REFUSED = (
    (uapi.FIEMAP_EXTENT_DATA_INLINE, "the file's bytes are inside its inode, without blocks"),
    (uapi.FIEMAP_EXTENT_DATA_ENCRYPTED, "the file is encrypted: the device holds other bytes"),
    (uapi.FIEMAP_EXTENT_ENCODED, "the file is compressed: the device holds other bytes"),
    (
        uapi.FIEMAP_EXTENT_NOT_ALIGNED | uapi.FIEMAP_EXTENT_DATA_TAIL,
        "the file's bytes do not begin at blocks of the device",
    ),
    (
        uapi.FIEMAP_EXTENT_UNKNOWN | uapi.FIEMAP_EXTENT_DELALLOC,
        "part of it has no place on the device yet: another program is writing the file",
    ),
)
_REFUSED_FILES = (
    (uapi.FS_ENCRYPT_FL, "the file is encrypted: the device holds other bytes"),
    (uapi.FS_COMPR_FL, "the file is compressed: the device holds other bytes"),
    (uapi.FS_VERITY_FL, "the file has fs-verity, which checks what is read through the filesystem"),
    (uapi.FS_JOURNAL_DATA_FL, "the file's bytes may be in the journal (chattr +j)"),
)


def state_of(fd: int) -> State:
    """Return the present state of a file."""
    status = os.fstat(fd)
    return State(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def extents_of(fd: int, start: int, end: int, *, flush: bool) -> list[Extent]:
    """Return the extents of a range of a file, in ascending order.

    Args:
        fd: the file.
        start: where the range begins, in bytes.
        end: where it ends; more than `start`.
        flush: whether to write the file's dirty pages to the device first (FIEMAP_FLAG_SYNC).

    Raises:
        OSError: EOPNOTSUPP, with the reason, where the device does not have the file's bytes;
            another errno of the ioctl.
    """
    _check_file(fd)
    found: list[Extent] = []
    head, one = uapi.FIEMAP_STRUCT, uapi.FIEMAP_EXTENT_STRUCT
    while start < end:
        answer = bytearray(head.size + _BATCH * one.size)
        flags = uapi.FIEMAP_FLAG_SYNC if flush else 0
        head.pack_into(answer, 0, start, end - start, flags, 0, _BATCH, 0)
        uapi.ioctl(fd, uapi.FS_IOC_FIEMAP, answer)
        count = head.unpack_from(answer)[3]
        last = count < _BATCH
        for fields in one.iter_unpack(answer[head.size : head.size + count * one.size]):
            offset, place, size, flags = fields[0], fields[1], fields[2], fields[5]
            _check_extent(flags)
            last = last or bool(flags & uapi.FIEMAP_EXTENT_LAST)
            flags &= ~(uapi.FIEMAP_EXTENT_LAST | uapi.FIEMAP_EXTENT_MERGED)
            found.append(Extent(offset, place, size, flags))
            start = offset + size
        if last:
            break
    return found


def _check_file(fd: int) -> None:
    """Raise OSError(EOPNOTSUPP) if the bytes of a file are not in extents as they are read."""
    if files.filesystem_of(fd) == uapi.XFS:
        attributes = bytearray(uapi.FSXATTR_STRUCT.size)
        uapi.ioctl(fd, uapi.FS_IOC_FSGETXATTR, attributes)
        if uapi.FSXATTR_STRUCT.unpack(attributes)[0] & uapi.FS_XFLAG_REALTIME:
            raise _refusal("the file is on the realtime device of its xfs")
    answer = bytearray(struct.calcsize("l"))
    uapi.ioctl(fd, uapi.FS_IOC_GETFLAGS, answer)
    flags = struct.unpack_from("=I", answer)[0]
    for flag, why in _REFUSED_FILES:
        if flags & flag:
            raise _refusal(why)


def _check_extent(flags: int) -> None:
    for flag, why in _REFUSED:
        if flags & flag:
            raise _refusal(why)


def _refusal(why: str) -> OSError:
    return os_error(errno.EOPNOTSUPP, why, None)


def open_device(fd: int) -> tuple[int, str]:
    """Open the block device that holds a file, for reading with O_DIRECT.

    Returns:
        the descriptor, and the path of the device's node.

    Raises:
        OSError: with the reason; EACCES and EPERM, this user may not read the device.
    """
    if files.filesystem_of(fd) not in (uapi.EXT4, uapi.XFS):
        raise _refusal("a file is read natively from ext4 and xfs only, which have one device")
    number = os.fstat(fd).st_dev
    path = _node_of(number)
    try:
        if os.stat(path).st_rdev != number:
            raise FileNotFoundError(errno.ENOENT, "it is another device")
        device = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        fix = {
            errno.EACCES: "be root, or in the group of the node, or use a store's Store.load()",
            errno.EPERM: "give the container the device",
        }.get(error.errno or 0, "it has to be in /dev")
        text = (
            f"reading a file natively needs read permission on its block device {path} "
            f"({error.strerror}): {fix}"
        )
        raise os_error(error.errno or errno.EACCES, text, path) from None
    status = os.fstat(device)
    if stat.S_ISBLK(status.st_mode) and status.st_rdev == number:
        return device, path
    os.close(device)
    raise _refusal(f"{path} is not the block device of the file's filesystem")


def _node_of(number: int) -> str:
    """Return the path of a block device's node, by the name that sysfs has."""
    folder = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    for line in proc.read(folder, "uevent").splitlines():
        if line.startswith("DEVNAME="):
            return "/dev/" + line.removeprefix("DEVNAME=")
    raise _refusal("the filesystem has no block device of its own in sysfs")

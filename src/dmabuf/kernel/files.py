"""Facts about one file, found by trying: its kind, its size, and how it takes O_DIRECT."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import struct
import time
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from dmabuf._core import address_of, check, failure, ffi, lib
from dmabuf.errors import os_error
from dmabuf.kernel import uapi

Kind = Literal[
    "file", "block device", "NVMe character device", "character device", "pipe", "socket"
]

PAGE = mmap.PAGESIZE
_RACES = 100
"""How often a path is opened again because something above it was renamed."""
STREAMS: dict[str, str] = {
    "pipe": "a pipe",
    "socket": "a socket",
    "character device": "a character device",
}


class Alignment(NamedTuple):
    """The alignment that O_DIRECT requires of requests, in bytes; each is a power of two."""

    memory: int
    offset: int


_NO_ALIGNMENT = Alignment(1, 1)


class Direct(NamedTuple):
    """How a file takes O_DIRECT: a descriptor and its alignment, or the reason why it does not."""

    fd: int
    alignment: Alignment
    refusal: str | None
    proven: bool = False
    """Whether requests are known to bypass the page cache; else the filesystem only claims it."""
    no_writes: str | None = None
    """Why writes do not use O_DIRECT although reads do."""
    on_zram: bool = False
    """Whether the CPU moves all bytes of the device."""
    in_memory: bool = False
    """Whether the file is nothing but page cache, as on tmpfs."""
    stale_cache: bool = False
    """Whether old bytes may be in the page cache when an asynchronous write is done.

    So it is on block devices and FUSE, and unknown of most filesystems.
    """


def kind_of(mode: int) -> Kind | None:
    """Return the kind of a file by its `st_mode`; None if it cannot be read, as a directory."""
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISBLK(mode):
        return "block device"
    if stat.S_ISCHR(mode):
        return "character device"
    if stat.S_ISFIFO(mode):
        return "pipe"
    return "socket" if stat.S_ISSOCK(mode) else None


def size_of(fd: int, kind: Kind) -> int:
    """Return the size of a file or block device in bytes."""
    if kind == "file":
        return os.fstat(fd).st_size
    answer = bytearray(8)
    uapi.ioctl(fd, uapi.BLKGETSIZE64, answer)
    return int(struct.unpack("=Q", answer)[0])


_filesystems: dict[int, int] = {}
"""The filesystem's type (statfs(2)) on each mount, by the mount's unique number."""
_MOST_MOUNTS = 1024


def status_of(fd: int) -> Any:
    """Return the core's struct dmb_stat of an open file.

    Raises:
        OSError: as fstat(2).
    """
    status = ffi.new("struct dmb_stat *")
    rc = lib.dmb_stat(fd, status)
    if rc:
        raise failure(-rc, "examining a file")
    return status


def is_file_on_disk(fd: int) -> bool:
    """Return whether it is a regular file whose filesystem is on a block device.

    It waits neither for a FUSE server nor for a network.

    Raises:
        OSError: as statx(2).
    """
    mode = int(lib.dmb_mode_on_disk(fd))
    if mode < 0:
        raise failure(-mode, "examining a file")
    return stat.S_ISREG(mode)


def filesystem_of(fd: int, mount: int | None = None) -> int:
    """Return the type of the filesystem of a file, as statfs(2) reports it.

    It is remembered by mount: statfs(2) counts free blocks, and a mount keeps its filesystem.
    `mount` is that of `status_of`, if the caller knows it.
    """
    mount = status_of(fd).mount if mount is None else mount
    known = _filesystems.get(mount)
    if known is None:
        known = int(lib.dmb_statfs_type(fd))
        if mount:
            if len(_filesystems) >= _MOST_MOUNTS:
                _filesystems.clear()
            _filesystems[mount] = known
    return known


def kept_in_memory(fd: int) -> str | None:
    """Return the name of the filesystem if its files exist in the page cache only, else None."""
    return uapi.MEMORY_FILESYSTEMS.get(filesystem_of(fd))


def open_direct(fd: int, kind: Kind, writable: bool, readable: bool) -> Direct:
    """Open the file behind `fd` again with O_DIRECT, if possible.

    The file is reopened through /proc, so `fd` keeps its flags. The alignment is that of statx(2)
    (STATX_DIOALIGN, Linux 6.1), or found by trying if statx does not report it.
    """
    none = _NO_ALIGNMENT
    filesystem = filesystem_of(fd) if kind == "file" else 0
    memory = uapi.MEMORY_FILESYSTEMS.get(filesystem)
    if memory:
        text = f"{memory} keeps its files in the page cache: O_DIRECT is accepted and ignored there"
        return Direct(-1, none, text, in_memory=True)
    if filesystem == uapi.FUSE:
        text = "a FUSE server copies every byte of its files, with or without O_DIRECT"
        return Direct(-1, none, text)
    access = os.O_RDWR if readable and writable else os.O_WRONLY if writable else os.O_RDONLY
    try:
        direct = _reopen(fd, access | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return Direct(-1, none, why_not_direct(error))
    kept = False
    try:
        found = _judge(direct, kind, filesystem, readable)
        kept = found.fd >= 0
        return found
    finally:
        if not kept:  # refused, or a signal handler raised
            os.close(direct)


def set_o_direct(fd: int, status: Any) -> Direct | None:
    """Give a descriptor O_DIRECT that no other program or thread shares; None where it is in doubt.

    It takes two system calls less than `open_direct`, and works where ext4 or xfs states the
    alignment.

    Args:
        fd: a regular file, opened without the flags that F_SETFL (fcntl(2)) sets.
        status: what `status_of` returned for it.
    """
    memory, offset = status.memory_align, status.offset_align
    if not memory or not 0 < offset < PAGE:  # not stated, or it may be zram
        return None
    filesystem = _filesystems.get(status.mount) or filesystem_of(fd, status.mount)
    if filesystem not in uapi.HONEST_ABOUT_DIRECT_IO:
        return None
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        return None
    return Direct(fd, Alignment(memory, offset), None, True)


def without_o_direct(fd: int) -> None:
    """Take O_DIRECT from a descriptor that was opened without flags of fcntl(2) F_SETFL."""
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)


def _judge(direct: int, kind: Kind, filesystem: int, readable: bool) -> Direct:
    """Return what a file opened with O_DIRECT takes; the descriptor is -1 where it is refused."""
    none, answer = _NO_ALIGNMENT, ffi.new("uint32_t[2]")
    stated = lib.dmb_statx_dio(direct, answer)
    if stated == -errno.EOPNOTSUPP:
        text = (
            "the filesystem accepts O_DIRECT and does not do it for this file, as statx says: ext4 "
            "with data=journal is one, files with encryption or fs-verity may be others"
        )
        return Direct(-1, none, text)
    alignment = Alignment(*answer) if stated == 0 and answer[0] and answer[1] else None
    if alignment is None and filesystem == uapi.OVERLAYFS:
        text = (
            "overlayfs accepts O_DIRECT, and the filesystem below does not state that it does it, "
            "as tmpfs and btrfs: keep the file outside the overlay, on a volume"
        )
        return Direct(-1, none, text)
    proven = kind != "file" or (alignment is not None and filesystem in uapi.HONEST_ABOUT_DIRECT_IO)
    if alignment is None:
        alignment = _tried_alignment(direct, readable, size_of(direct, kind))
    if alignment is None:
        text = "the filesystem opened the file with O_DIRECT and refused every aligned read: EINVAL"
        return Direct(-1, none, text)
    on_zram = alignment.offset >= PAGE and _on_zram(direct, kind)
    if on_zram:
        alignment = alignment._replace(memory=max(alignment.memory, PAGE))
    no_writes = _why_no_writes(direct) if filesystem == uapi.BTRFS else None
    drops = filesystem in uapi.DROP_AFTER_DIRECT_WRITES
    return Direct(
        direct,
        alignment,
        None,
        proven,
        no_writes,
        on_zram,
        stale_cache=not drops,
    )


def _reopen(fd: int, flags: int) -> int:
    """Open the file behind `fd` again, with its O_SYNC, O_DSYNC and, where permitted, O_NOATIME."""
    had = fcntl.fcntl(fd, fcntl.F_GETFL)
    flags |= had & (os.O_SYNC | os.O_DSYNC)
    path = f"/proc/self/fd/{fd}"
    try:
        return os.open(path, flags | had & os.O_NOATIME)
    except PermissionError:  # only the file's owner may have O_NOATIME
        return os.open(path, flags)


def _why_no_writes(fd: int) -> str | None:
    """Return why writes do not use O_DIRECT: btrfs with checksums or copies; None if they do.

    The page cache does not show it: btrfs mostly drops the pages that it has written.
    """
    if _keeps_copies(fd):
        return (
            "btrfs may take what is written through the page cache, O_DIRECT or not, where it "
            "keeps more than one copy of data: convert that to single or raid0 (btrfs balance "
            "start -dconvert=single), or keep the file on another filesystem"
        )
    if _release() >= (7, 3):
        return None
    flags = bytearray(struct.calcsize("l"))
    with suppress(OSError):
        uapi.ioctl(fd, uapi.FS_IOC_GETFLAGS, flags)
    if struct.unpack_from("=I", flags)[0] & uapi.FS_NOCOW_FL:
        return None
    return (
        "before Linux 7.3 btrfs may take what is written to a file with checksums through the page "
        "cache, O_DIRECT or not: switch them off while it is empty (chattr +C), or keep the file "
        "on another filesystem"
    )


def _keeps_copies(fd: int) -> bool:
    """Return whether a btrfs keeps more than one copy of data; False if it does not report it."""
    head, space = uapi.BTRFS_SPACE_INFO_STRUCT, uapi.BTRFS_SPACE_STRUCT
    most = 64
    told = bytearray(head.size + most * space.size)
    head.pack_into(told, 0, most, 0)
    try:
        uapi.ioctl(fd, uapi.BTRFS_IOC_SPACE_INFO, told)
    except OSError:
        return False
    count = min(head.unpack_from(told)[1], most)
    spaces = space.iter_unpack(bytes(told[head.size : head.size + count * space.size]))
    return any(
        flags & uapi.BTRFS_DATA and flags & uapi.BTRFS_MORE_THAN_ONE_COPY for flags, _, _ in spaces
    )


def _release() -> tuple[int, ...]:
    """Return the kernel's release, such as (7, 3)."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def _on_zram(fd: int, kind: Kind) -> bool:
    """Return whether zram stores the bytes, which reports an alignment that it does not support.

    If a block is a page, zram treats every piece of a request as a whole page of memory
    (is_partial_io in drivers/block/zram/zram_drv.c). Memory that is not page-aligned makes such
    pieces, and bytes beside them, in memory or on the device, are overwritten.
    """
    status = os.fstat(fd)
    device = status.st_rdev if kind == "block device" else status.st_dev
    try:
        link = os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    except OSError:
        return False
    return "/block/zram" in link


def try_claim(device: str) -> OSError | None:
    """Claim a block device, and give it back; return the error, EBUSY if it is mounted or claimed.

    Another thread or program that tries this has the device for a moment, too. So EBUSY counts only
    if it comes for a third of a second.
    """
    pauses = iter([0.001] * 20 + [0.01] * 30)
    while True:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            return None
        except OSError as error:
            pause = next(pauses, None)
            if error.errno != errno.EBUSY or pause is None:
                return error
        time.sleep(pause)


def why_not_direct(error: OSError) -> str:
    """Return why a file has no descriptor with O_DIRECT, by the error of open(2)."""
    if error.errno == errno.EINVAL:
        return (
            "the filesystem does not support O_DIRECT (open: EINVAL): keep the file on one that "
            "does, such as ext4, xfs or a block device"
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "/proc is not mounted, and the file is reopened through it for O_DIRECT: mount it"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"the file may not be opened again for O_DIRECT ({error.strerror}): it was passed as a "
            "descriptor, and this user has no permission on the file"
        )
    return f"opening the file with O_DIRECT failed: {error.strerror}"


def _tried_alignment(fd: int, readable: bool, size: int) -> Alignment | None:
    """Return the smallest alignment that a read accepts; a page if the file cannot be tried."""
    if not readable or size == 0:
        return Alignment(PAGE, PAGE)
    with mmap.mmap(-1, 2 * PAGE) as memory, memoryview(memory) as view:
        for align in (1 << bits for bits in range(9, PAGE.bit_length())):  # 512 to a page
            try:
                os.preadv(fd, [view[align : 2 * align]], align)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return Alignment(PAGE, PAGE)
            else:
                return Alignment(align, align)
    return None


def open_beneath(folder: int, path: str, flags: int, mode: int = 0) -> int:
    """Open a path below a folder's descriptor, and return the new descriptor.

    Raises OSError: EXDEV for a path that leads out of the folder, absolute ones included, by ".."
    or a symbolic link either; ENOSYS before Linux 5.6 (openat2(2)).
    """
    name = os.fsencode(path)
    if b"\0" in name:
        raise os_error(errno.EINVAL, "a path has no zero byte", path)
    flags |= os.O_CLOEXEC
    for _ in range(_RACES):
        fd = int(lib.dmb_open_beneath(folder, name, flags, mode))
        if fd != -errno.EAGAIN:  # something above was renamed meanwhile, and the path has ".."
            break
    return check(fd, "open", path)


def cached_pages(fd: int, offset: int, size: int) -> int | None:
    """Return how many pages of a range are in the page cache.

    None where the kernel does not report it: cachestat(2) needs Linux 6.5. A file of overlayfs has
    no pages of its own there, so its mapping is examined, which is one of the file below.
    """
    if size == 0:
        return None
    if filesystem_of(fd) == uapi.OVERLAYFS:
        return _mapped_pages(fd, offset, size)
    answer = ffi.new("uint64_t *")
    return None if lib.dmb_cachestat(fd, offset, size, answer) else int(answer[0])


def _mapped_pages(fd: int, offset: int, size: int) -> int | None:
    """Return how many pages of a range mincore(2) reports; None where it cannot be mapped."""
    start = offset // PAGE * PAGE
    try:
        end = min(offset + size, os.fstat(fd).st_size)
        if end <= start:
            return 0
        with mmap.mmap(fd, end - start, prot=mmap.PROT_READ, offset=start) as memory:
            pages = ffi.new("uint8_t[]", -(-len(memory) // PAGE))
            if lib.dmb_resident(address_of(memory), len(memory), pages):
                return None
            return sum(page & 1 for page in bytes(ffi.buffer(pages)))
    except OSError:
        return None

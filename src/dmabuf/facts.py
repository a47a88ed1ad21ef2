"""What is so about this machine and about one file: found by doing, frozen, never printed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import struct
from contextlib import suppress
from typing import Literal, NamedTuple

from dmabuf import _uapi
from dmabuf._ffi import ffi, lib
from dmabuf._mapping import address_of

Kind = Literal[
    "file", "block device", "NVMe character device", "character device", "pipe", "socket"
]

PAGE = mmap.PAGESIZE
STREAMS: dict[str, str] = {
    "pipe": "a pipe",
    "socket": "a socket",
    "character device": "a character device",
}


class Alignment(NamedTuple):
    """What O_DIRECT asks of a file's requests, in bytes, each a power of two."""

    memory: int
    offset: int


class Direct(NamedTuple):
    """Whether a file takes O_DIRECT: a descriptor and its alignment, or the reason why not."""

    fd: int
    alignment: Alignment
    refusal: str | None
    proven: bool = False
    """Whether it is known, and not only said, that requests go past the page cache."""
    by_workers: bool = False
    """Whether it takes no request without a thread that waits, as zram."""
    no_writes: str | None = None
    """Why writes are not to be had all the same."""
    on_zram: bool = False
    """Whether a processor moves the bytes, in all that the device does."""
    in_memory: bool = False
    """Whether the file is nothing but page cache, as on tmpfs."""
    stale_cache: bool = False
    """Whether old bytes may be in the page cache when an asynchronous write is done.

    So it is on block devices and FUSE, and unknown of most filesystems.
    """


def kind_of(mode: int) -> Kind | None:
    """The kind of a file by its `st_mode`; None for what nothing can be read from."""
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
    """Where a file or block device ends, in bytes."""
    if kind == "file":
        return os.fstat(fd).st_size
    answer = bytearray(8)
    _uapi.ioctl(fd, _uapi.BLKGETSIZE64, answer)
    return int(struct.unpack("=Q", answer)[0])


def kept_in_memory(fd: int) -> str | None:
    """The filesystem whose files are the page cache, where this is one."""
    filesystem = lib.dmb_statfs_type(fd)
    return _uapi.MEMORY_FILESYSTEMS.get(filesystem)


def open_direct(fd: int, kind: Kind, writable: bool, readable: bool) -> Direct:
    """Open the file behind `fd` again with O_DIRECT, if it can be.

    The file is reopened through /proc, so `fd` keeps its flags. The alignment comes from
    statx(2)'s STATX_DIOALIGN (Linux 6.1), and from trying where that is silent.
    """
    none = Alignment(1, 1)
    memory = kind == "file" and kept_in_memory(fd)
    if memory:
        text = f"{memory} keeps its files in the page cache: O_DIRECT is accepted and ignored there"
        return Direct(-1, none, text, in_memory=True)
    filesystem = lib.dmb_statfs_type(fd) if kind == "file" else 0
    if filesystem == _uapi.FUSE:
        text = "a FUSE server copies every byte of its files, with or without O_DIRECT"
        return Direct(-1, none, text)
    access = os.O_RDWR if readable and writable else os.O_WRONLY if writable else os.O_RDONLY
    try:
        direct = _reopen(fd, access | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return Direct(-1, none, _why_not_direct(error))
    kept = False
    try:
        found = _judged(fd, direct, kind, filesystem, readable)
        kept = found.fd >= 0
        return found
    finally:
        if not kept:  # refused, or a signal handler raised
            os.close(direct)


def _judged(fd: int, direct: int, kind: Kind, filesystem: int, readable: bool) -> Direct:
    none, answer = Alignment(1, 1), ffi.new("uint32_t[2]")
    stated = lib.dmb_statx_dio(direct, answer, answer + 1)
    if stated == -errno.EOPNOTSUPP:
        text = (
            "the filesystem accepts O_DIRECT and does not do it for this file, as statx says: ext4 "
            "with data=journal is one, files with encryption or fs-verity may be others"
        )
        return Direct(-1, none, text)
    alignment = Alignment(*answer) if stated == 0 and answer[0] and answer[1] else None
    if alignment is None and filesystem == _uapi.OVERLAYFS:
        text = (
            "overlayfs accepts O_DIRECT, and the filesystem below does not state that it does it, "
            "as tmpfs and btrfs: keep the file outside the overlay, on a volume"
        )
        return Direct(-1, none, text)
    proven = kind != "file" or (alignment is not None and _keeps_its_word(fd))
    if alignment is None:
        alignment = _tried_alignment(direct, readable, size_of(direct, kind))
    if alignment is None:
        text = "the filesystem opened the file with O_DIRECT and refused every aligned read: EINVAL"
        return Direct(-1, none, text)
    on_zram = _on_zram(direct, kind)
    if on_zram:
        alignment = alignment._replace(memory=max(alignment.memory, PAGE))
    by_workers = kind == "block device" and _waits(direct)
    no_writes = _why_no_writes(fd) if kind == "file" else None
    drops = kind == "file" and lib.dmb_statfs_type(fd) in _uapi.DROP_AFTER_DIRECT_WRITES
    return Direct(
        direct,
        alignment,
        None,
        proven,
        by_workers,
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


def _waits(fd: int) -> bool:
    """Whether a block device refuses a read that may not wait: preadv2(2)'s RWF_NOWAIT."""
    with mmap.mmap(-1, PAGE) as memory:
        try:
            os.preadv(fd, [memory], 0, os.RWF_NOWAIT)
        except OSError as error:
            return error.errno == errno.EOPNOTSUPP
    return False


def _keeps_its_word(fd: int) -> bool:
    """Whether the filesystem does O_DIRECT where statx(2) says that it does.

    What answers in ext4 (ext4_dio_alignment) and xfs (xfs_report_dioalign) looks at the same flags
    of the file as the I/O does.
    """
    return lib.dmb_statfs_type(fd) in _uapi.HONEST_ABOUT_DIRECT_IO


def _why_no_writes(fd: int) -> str | None:
    """Why a file that is read by O_DIRECT is not written so: btrfs with checksums, or copies.

    The page cache does not tell: btrfs drops from it what it has written, most times all of it.
    """
    if lib.dmb_statfs_type(fd) != _uapi.BTRFS:
        return None
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
        _uapi.ioctl(fd, _uapi.FS_IOC_GETFLAGS, flags)
    if struct.unpack_from("=I", flags)[0] & _uapi.FS_NOCOW_FL:
        return None
    return (
        "before Linux 7.3 btrfs may take what is written to a file with checksums through the page "
        "cache, O_DIRECT or not: switch them off while it is empty (chattr +C), or keep the file "
        "on another filesystem"
    )


def _keeps_copies(fd: int) -> bool:
    """Whether a btrfs has data in a profile other than single and raid0; False if it won't tell."""
    head, space = _uapi.BTRFS_SPACE_INFO_STRUCT, _uapi.BTRFS_SPACE_STRUCT
    most = 64
    told = bytearray(head.size + most * space.size)
    head.pack_into(told, 0, most, 0)
    try:
        _uapi.ioctl(fd, _uapi.BTRFS_IOC_SPACE_INFO, told)
    except OSError:
        return False
    count = min(head.unpack_from(told)[1], most)
    spaces = space.iter_unpack(bytes(told[head.size : head.size + count * space.size]))
    return any(
        flags & _uapi.BTRFS_DATA and flags & _uapi.BTRFS_MORE_THAN_ONE_COPY
        for flags, _, _ in spaces
    )


def _release() -> tuple[int, ...]:
    """The kernel's, as (7, 3)."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def _on_zram(fd: int, kind: Kind) -> bool:
    """Whether the bytes are kept by zram, which states an alignment that it does not keep to.

    Where a block is a page, zram takes every piece of a request for a whole page of memory
    (is_partial_io in drivers/block/zram/zram_drv.c), and memory that is not page-aligned makes
    such pieces: the bytes around it in memory, or in the device, were seen to be overwritten.
    """
    status = os.fstat(fd)
    device = status.st_rdev if kind == "block device" else status.st_dev
    try:
        link = os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    except OSError:
        return False
    return "/block/zram" in link


def _why_not_direct(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return (
            "the filesystem does not support O_DIRECT (open: EINVAL): keep the file on one that "
            "does, such as ext4, xfs or a block device"
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "/proc is not mounted, and the file is reopened through it for O_DIRECT: mount it"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"the file may not be opened again for O_DIRECT ({error.strerror}): it was handed over "
            "as a descriptor, and this user has no permission on it"
        )
    return f"opening the file with O_DIRECT failed: {error.strerror}"


def _tried_alignment(fd: int, readable: bool, size: int) -> Alignment | None:
    """The smallest alignment that a read takes; a page where the file cannot be tried."""
    if not readable or size == 0:
        return Alignment(PAGE, PAGE)
    with mmap.mmap(-1, 2 * PAGE) as memory, memoryview(memory) as view:
        for align in (512, 1024, 2048, PAGE):
            try:
                os.preadv(fd, [view[align : 2 * align]], align)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return Alignment(PAGE, PAGE)
            else:
                return Alignment(align, align)
    return None


def cached_pages(fd: int, offset: int, size: int) -> int | None:
    """Return how many pages of a range are in the page cache.

    None where the kernel does not report it: cachestat(2) needs Linux 6.5. A file of overlayfs has
    no pages of its own there, so its mapping is examined, which is one of the file below.
    """
    if size == 0:
        return None
    if lib.dmb_statfs_type(fd) == _uapi.OVERLAYFS:
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

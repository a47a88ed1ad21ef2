"""Opening the two ends of a copy: anything with bytes, and never the same thing twice."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import ExitStack
from typing import Protocol

from dmabuf import exporters, nvme
from dmabuf._ends import Appender, Memory, Sink, Source, Terms
from dmabuf.buffer import Buffer, Window
from dmabuf.errors import os_error
from dmabuf.exporters import foreign
from dmabuf.file import File
from dmabuf.sizes import Size, parse_size


class HasFileno(Protocol):
    """A Python file, a socket, or anything else with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


End = str | bytes | os.PathLike[str] | int | HasFileno | File | Buffer | Window
"""What may be copied from and to."""


def open_source(end: End, offset: Size, terms: Terms, stack: ExitStack) -> Source | Memory:
    """The end to read; what is opened for it closes with the stack."""
    offset = parse_size(offset, "src_offset")
    memory = _memory(end, offset, stack)
    if memory is not None:
        return memory
    if isinstance(end, File):
        return Source(end, offset, terms)
    path = _path(end)
    if path is None:
        file = File(_descriptor(end), "r")
    elif _is_fifo(path):
        # Opened without waiting for a writer, who may be waiting for us at the other end; the
        # first poll waits for him.
        file = _file_of(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "r", path)
    else:
        file = File(path, "r")
    return Source(stack.enter_context(file), offset, terms)


def open_sink(
    end: End, offset: Size, terms: Terms, stack: ExitStack, *, force: bool
) -> Sink | Appender | Memory:
    """The end to write, unchanged as yet; what is opened for it closes with the stack."""
    offset = parse_size(offset, "dst_offset")
    memory = _memory(end, offset, stack)
    if memory is not None:
        return memory
    if isinstance(end, File):
        return Sink(end, offset, terms, emptied=False)
    path = _path(end)
    if path is None:
        fd = _descriptor(end)
        if _appends(fd):
            own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            stack.callback(os.close, own)
            return Appender(own, terms)
        file = File(fd, "w", force=force)
        return Sink(stack.enter_context(file), offset, terms, emptied=False)
    fd, made = _create(path)
    file = stack.enter_context(_file_of(fd, "w", path, force=force))
    sink = Sink(file, offset, terms, emptied=not offset)
    if made:
        stack.callback(lambda: None if sink.begun else os.unlink(path))
    return sink


def _create(path: str) -> tuple[int, bool]:
    """A descriptor of a file to write, and whether it is new.

    It is not emptied yet: it may be the source, or its route not be to be had.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags, 0o666), False


def _file_of(fd: int, mode: str, path: str, *, force: bool = False) -> File:
    """A File of a descriptor that we opened by its path, and hand over."""
    try:
        file = File(fd, mode, force=force)  # type: ignore[arg-type]
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)
    file._target.path = file.name = path
    return file


def _memory(end: End, offset: int, stack: ExitStack) -> Memory | None:
    """The end as memory; None where it is a file."""
    if isinstance(end, Window):
        end.size  # noqa: B018 - a closed one raises
        end._check_open()
        buffer, start, size = end.buffer, end.offset, end.size
    elif isinstance(end, Buffer):
        end._check_open()
        buffer, start, size = end, 0, end.size
    elif isinstance(end, File) or _path(end) is not None:
        return None
    else:
        fd = _descriptor(end)
        if not _may_be_dmabuf(fd) or foreign.identify(fd) is None:
            return None
        buffer = stack.enter_context(exporters.from_fd(fd))
        start, size = 0, buffer.size
    if offset > size:
        raise ValueError(f"offset {offset} is past the end of the buffer at {size}")
    return Memory(buffer, start + offset, size - offset)


def _may_be_dmabuf(fd: int) -> bool:
    return stat.S_IFMT(os.fstat(fd).st_mode) in (0, stat.S_IFREG)


def _path(end: End) -> str | None:
    return os.fsdecode(end) if isinstance(end, str | bytes | os.PathLike) else None


def _descriptor(end: End) -> int:
    if hasattr(end, "flush") and hasattr(end, "fileno"):
        end.flush()  # what Python holds back of it comes before
    number = end.fileno() if hasattr(end, "fileno") else end
    if isinstance(number, bool) or not isinstance(number, int):
        kinds = "a path, File, Buffer, window, descriptor or object with fileno()"
        raise TypeError(f"{kinds} can be copied, not {type(end).__name__}")
    try:
        os.fstat(number)
    except OverflowError:
        raise OSError(errno.EBADF, f"descriptor {number}: {os.strerror(errno.EBADF)}") from None
    except OSError as error:
        raise OSError(error.errno, f"descriptor {number}: {error.strerror}") from None
    return number


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False  # opening it tells why


def _appends(fd: int) -> bool:
    """Whether it is a file that is written at its end only."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    mode = os.fstat(fd).st_mode
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    return bool(flags & os.O_APPEND) and writable and (stat.S_ISREG(mode) or stat.S_ISBLK(mode))


# -- the same thing twice


def check_distinct(source: Source | Memory, sink: Sink | Appender | Memory) -> None:
    """OSError(EINVAL) where source and target are one: the copy would destroy what it reads."""
    if isinstance(source, Memory) or isinstance(sink, Memory):
        if isinstance(source, Memory) and isinstance(sink, Memory):
            _check_memories(source, sink)
        return
    target = sink.fd if isinstance(sink, Appender) else sink.file.fileno()
    if same_file(os.fstat(source.file.fileno()), os.fstat(target)):
        text = "source and target are the same file: copying would destroy it"
        raise os_error(errno.EINVAL, text, sink.name)


def _check_memories(source: Memory, sink: Memory) -> None:
    def identity(memory: Memory) -> set[tuple[int, int]]:
        stats = [os.fstat(slab.fd) for slab in memory.buffer.slabs]
        return {(one.st_dev, one.st_ino) for one in stats}

    apart = (
        source.start + source.size <= sink.start or sink.start + sink.size <= source.start
    ) and source.buffer is sink.buffer
    if not apart and identity(source) & identity(sink):
        raise OSError(errno.EINVAL, "source and target are the same memory")


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two are one file, FIFO or device, or a disk and a partition or passthrough of it."""
    disks = _disk(one), _disk(other)
    if disks[0] is not None and disks[1] is not None:
        places = [_sysfs_place(disk) for disk in disks if disk is not None]
        return disks[0] == disks[1] or any(a.startswith(f"{b}/") for a, b in (places, places[::-1]))
    if stat.S_IFMT(one.st_mode) != stat.S_IFMT(other.st_mode):
        return False
    whole = stat.S_ISREG(one.st_mode) or stat.S_ISFIFO(one.st_mode)
    return whole and os.path.samestat(one, other)


def _disk(status: os.stat_result) -> int | None:
    """The number of a block device, or of the one that a namespace's character device is also."""
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev
    return nvme.disk_number(status) if nvme.is_namespace(status) else None


def _sysfs_place(device: int) -> str:
    """Where a block device stands in sysfs: a partition stands within its disk."""
    return os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")

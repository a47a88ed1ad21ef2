"""Open the two ends of a copy, and refuse a copy of something onto itself."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

from dmabuf.copying import objects
from dmabuf.copying.objects import ObjectSource, ObjectTarget, Readable, Writable
from dmabuf.copying.sources import Memory, Source, file_source
from dmabuf.copying.targets import AppendTarget, FileTarget, Target
from dmabuf.errors import ClosedError, os_error
from dmabuf.kernel import nvme
from dmabuf.memory import Buffer, Window, foreign, from_fd
from dmabuf.sizes import Size, parse_size
from dmabuf.transfer import File, Mode, Terms


class HasFileno(Protocol):
    """An object with a descriptor, such as a socket."""

    def fileno(self) -> int:
        """Return the descriptor."""


@runtime_checkable
class HasEnds(Protocol):
    """An object that makes its own ends of copies, such as a file of another node."""

    def copy_source(self, offset: int, terms: Terms) -> Source:
        """Return it as what a copy reads, from an offset in bytes on."""

    def copy_target(self, offset: int, terms: Terms) -> Target:
        """Return it as what a copy writes, from an offset in bytes on."""


_Either = str | bytes | os.PathLike[str] | int | File | Buffer | Window | HasFileno | HasEnds
SourceEnd = _Either | Readable
"""What a copy can read."""
TargetEnd = _Either | Writable
"""What a copy can write."""


class Opener:
    """Opens the ends of one copy. What it opens closes with `stack`."""

    def __init__(self, terms: Terms, stack: ExitStack) -> None:
        self._terms = terms
        self._stack = stack
        self._advances: list[Callable[[int], object]] = []

    def advance(self, nbytes: int) -> None:
        """Leave the ends that are Python files behind the bytes that were copied."""
        for advance in self._advances:
            advance(nbytes)

    def source(self, end: SourceEnd, offset: Size) -> Source | Memory:
        """Open the end to read."""
        offset = parse_size(offset, "src_offset")
        if isinstance(end, HasEnds):
            return end.copy_source(offset, self._terms)
        memory = self._memory(end, offset)
        if memory is not None:
            return memory
        if isinstance(end, File):
            return file_source(end, offset, self._terms)
        path = _path(end)
        if path is not None:
            file = File(path) if not _is_fifo(path) else _open_fifo(path)
            return file_source(self._stack.enter_context(file), offset, self._terms)
        plain, start = self._plain(end, offset)
        if plain is not None and start is None and not isinstance(end, io.FileIO):
            plain = None  # it may hold bytes of the stream already
        if plain is None and isinstance(end, Readable):
            return ObjectSource(end, offset, self._terms)
        file = self._stack.enter_context(File(_descriptor(end), "r"))
        return file_source(file, offset + (start or 0), self._terms)

    def target(self, end: TargetEnd, offset: Size, *, force: bool) -> Target | Memory:
        """Open the end to write, which is not changed yet."""
        offset = parse_size(offset, "dst_offset")
        if isinstance(end, HasEnds):
            return end.copy_target(offset, self._terms)
        memory = self._memory(end, offset)
        if memory is not None:
            return memory
        if isinstance(end, File):
            return FileTarget(end, offset, self._terms)
        path = _path(end)
        if path is not None:
            fd, made = _create(path)
            file = self._stack.enter_context(_take(fd, "w", path, force=force))
            target = FileTarget(file, offset, self._terms, emptied=not offset)
            if made:
                self._stack.callback(lambda: None if target.begun else os.unlink(path))
            return target
        if objects.plain_file(end) is None and isinstance(end, Writable):
            objects.refuse_text(end)
            return ObjectTarget(end, offset, self._terms)
        fd = _descriptor(end)
        if _appends(fd):
            if (plain := objects.plain_file(end)) is not None:
                plain.flush()
                self._advances.append(lambda _: plain.seek(0, os.SEEK_END))
            fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            self._stack.callback(os.close, fd)
            return AppendTarget(fd, self._terms)
        _, start = self._plain(end, offset)
        file = self._stack.enter_context(File(fd, "w", force=force))
        return FileTarget(file, offset + (start or 0), self._terms)

    def _plain(self, end: object, offset: int) -> tuple[objects.PlainFile | None, int | None]:
        """Return a plain Python file with its position, and have the copy advance it."""
        objects.refuse_text(end)
        plain = objects.plain_file(end)
        if plain is None:
            return None, None
        if plain.writable():
            plain.flush()
        start = objects.position(plain)
        if start is not None:
            self._advances.append(lambda nbytes: plain.seek(start + offset + nbytes))
        return plain, start

    def _memory(self, end: object, offset: int) -> Memory | None:
        if isinstance(end, Buffer | Window) and end.closed:
            raise ClosedError("the buffer or window to copy is closed")
        if isinstance(end, Window):
            buffer, start, size = end.buffer, end.offset, end.size
        elif isinstance(end, Buffer):
            buffer, start, size = end, 0, end.size
        else:
            fd = end if isinstance(end, int) else _fileno(end)
            if fd is None or not _is_dmabuf(fd):
                return None
            buffer = self._stack.enter_context(from_fd(fd))
            start, size = 0, buffer.size
        if offset > size:
            raise ValueError(f"offset {offset} is past the end of the buffer at {size}")
        return Memory(buffer, start + offset, size - offset)


def _path(end: object) -> str | None:
    return os.fsdecode(end) if isinstance(end, str | bytes | os.PathLike) else None


def _fileno(end: object) -> int | None:
    """Return the descriptor of an object that holds its content; None for files and paths."""
    if isinstance(end, File) or not hasattr(end, "fileno"):
        return None
    if isinstance(end, Readable | Writable) and objects.plain_file(end) is None:
        return None
    return end.fileno()  # type: ignore[no-any-return]


def _is_dmabuf(fd: int) -> bool:
    fd = _descriptor(fd)
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    return kind in (0, stat.S_IFREG) and foreign.identify(fd) is not None


def _descriptor(end: object) -> int:
    number = end.fileno() if hasattr(end, "fileno") else end
    if isinstance(number, bool) or not isinstance(number, int):
        kinds = "a path, File, Buffer, window, descriptor or file object"
        raise TypeError(f"{kinds} can be copied, not {type(end).__name__}")
    try:
        os.fstat(number)
    except OverflowError:
        raise OSError(errno.EBADF, f"descriptor {number}: {os.strerror(errno.EBADF)}") from None
    except OSError as error:
        raise OSError(error.errno, f"descriptor {number}: {error.strerror}") from None
    return number


def _create(path: str) -> tuple[int, bool]:
    """Return a descriptor of a file to write, and whether it is new.

    It is not emptied yet: it may turn out to be the source, or to have no permitted route.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags, 0o666), False


def _open_fifo(path: str) -> File:
    """Open a FIFO to read, without waiting for a writer: the first poll does.

    The writer may be waiting for this copy to open its other end.
    """
    return _take(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "r", path)


def _take(fd: int, mode: Mode, path: str, *, force: bool = False) -> File:
    """Make a descriptor that was opened by its path a File of that name."""
    try:
        file = File(fd, mode, force=force)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)
    file.target.path = file.name = path
    return file


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False  # opening it reports why


def _appends(fd: int) -> bool:
    """Return whether it is a file that is written at its end only."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    mode = os.fstat(fd).st_mode
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    return bool(flags & os.O_APPEND) and writable and (stat.S_ISREG(mode) or stat.S_ISBLK(mode))


# -- the same thing twice


def check_distinct(source: Source | Memory, target: Target | Memory) -> None:
    """Raise OSError(EINVAL) for a copy onto itself, which would destroy what it reads."""
    if isinstance(source, Memory) and isinstance(target, Memory):
        _check_memories(source, target)
    if isinstance(source, Memory) or isinstance(target, Memory):
        return
    one, other = source.status, target.status
    if one is not None and other is not None and same_file(one, other):
        text = "source and target are the same file: copying would destroy it"
        raise os_error(errno.EINVAL, text, target.name)


def _check_memories(source: Memory, target: Memory) -> None:
    def identity(memory: Memory) -> set[tuple[int, int]]:
        stats = [os.fstat(slab.fd) for slab in memory.buffer.slabs]
        return {(one.st_dev, one.st_ino) for one in stats}

    apart = source.buffer is target.buffer and (
        source.start + source.size <= target.start or target.start + target.size <= source.start
    )
    if not apart and identity(source) & identity(target):
        raise OSError(errno.EINVAL, "source and target are the same memory")


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Return whether two are one file, FIFO or disk, or a disk and a partition of it."""
    disks = [_disk_number(one), _disk_number(other)]
    if None not in disks:
        first, second = (_sysfs_folder(disk) for disk in disks if disk is not None)
        return first == second or first.startswith(f"{second}/") or second.startswith(f"{first}/")
    if stat.S_IFMT(one.st_mode) != stat.S_IFMT(other.st_mode):
        return False
    whole = stat.S_ISREG(one.st_mode) or stat.S_ISFIFO(one.st_mode)
    return whole and os.path.samestat(one, other)


def _disk_number(status: os.stat_result) -> int | None:
    """Return the number of a block device, or of the one behind an NVMe character device."""
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev
    return nvme.disk_number(status) if nvme.is_namespace(status) else None


def _sysfs_folder(device: int) -> str:
    """Return the folder of a block device in sysfs; a partition's lies in its disk's."""
    return os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")

"""Target: an open file, device or stream as transfers see it, and what they have learnt of it.

The file is held open twice where it can be: once as it was asked for, and once with O_DIRECT,
which is how bytes travel without the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from dmabuf import _log, _process, audit, facts, nvme
from dmabuf.buffer import Buffer
from dmabuf.engine import Engine, Job, default_engine
from dmabuf.errors import ClosedError, os_error
from dmabuf.reference import Reference, open_reference
from dmabuf.ring import why_not_native
from dmabuf.sizes import OFFSET_MAX

if TYPE_CHECKING:
    from dmabuf.lone import Lane

FLAGS: dict[str, int] = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT,
    "r+": os.O_RDWR,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
}

GONE = "the device was pulled, or its driver let go of it: open it again when it is back"


class Target:
    """An open file. Its facts may be learnt from any thread: each is replaced whole."""

    def __init__(
        self, path: str | bytes | os.PathLike[str] | int, mode: str, force: bool, engine: Engine
    ) -> None:
        self.fd = -1
        if mode not in FLAGS:
            raise ValueError(f"mode={mode!r}: one of 'r', 'w', 'r+', 'x'")
        self.path = f"descriptor {path}" if isinstance(path, int) else os.fsdecode(path)
        self.readable = mode in ("r", "r+")
        self.writable = mode != "r"
        self.engine = engine
        self.pid = _process.pid
        self._closed = False
        self.lone: set[object] = set()  # transfers under way, each by a token of its own
        self.lanes: dict[int, Lane] = {}  # by the buffer's number, ~number to write: see lone.py
        self._lock = threading.RLock()  # the collector may close a File at any allocation
        self._direct: facts.Direct | None = None
        self._no_native: WeakKeyDictionary[Buffer, str] = WeakKeyDictionary()
        self._cache_watched = False
        self.no_slots: str | None = None
        """Why memory that is less aligned than the file's blocks is not registered."""
        self._device: str | None = None
        self._had_bytes = False
        if isinstance(path, bool):
            raise TypeError("a path or a descriptor is needed, not bool")
        if isinstance(path, int):
            self.fd = _duplicate(path, mode)
        else:
            self.fd = _open(self.path, FLAGS[mode] | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            self.kind, self.namespace = self._identify()
            self._check_flags()
            self._without_o_direct()
            self._check_claim(force)
            self._had_bytes = self.kind == "block device" and self.size() > 0
            if mode == "w" and self.kind == "file" and not isinstance(path, int):
                os.ftruncate(self.fd, 0)
        except BaseException:
            os.close(self.fd)
            self.fd = -1
            raise

    def _identify(self) -> tuple[facts.Kind, nvme.Namespace | None]:
        mode = os.fstat(self.fd).st_mode
        if stat.S_ISDIR(mode):
            text = "a directory has no bytes to move: name a file"
            raise os_error(errno.EISDIR, text, self.path)
        kind = facts.kind_of(mode)
        if kind is None:
            raise os_error(errno.EINVAL, "neither a file, device, pipe nor socket", self.path)
        if kind == "character device":
            namespace = nvme.namespace(self.fd, self.path)
            return (kind, None) if namespace is None else ("NVMe character device", namespace)
        return kind, None

    def _check_flags(self) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        if flags & os.O_PATH:
            text = "the descriptor was opened with O_PATH, which moves no bytes: open it without"
            raise os_error(errno.EBADF, text, self.path)
        if self.writable and flags & os.O_APPEND and self.stream is None:
            text = "the descriptor was opened with O_APPEND, which ignores offsets: open it without"
            raise os_error(errno.EINVAL, text, self.path)

    def _without_o_direct(self) -> None:
        """Edges and the buffered route need a descriptor without it; the caller's keeps it."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        if self.stream is not None or not flags & os.O_DIRECT:
            return
        kept = flags & (os.O_ACCMODE | os.O_SYNC | os.O_NOATIME)
        try:
            plain = os.open(f"/proc/self/fd/{self.fd}", kept | os.O_CLOEXEC)
        except OSError as error:
            text = (
                "the descriptor has O_DIRECT, and the file may not be opened again without it "
                f"({error.strerror}): hand in one without O_DIRECT"
            )
            raise os_error(error.errno or errno.EINVAL, text, self.path) from None
        os.dup2(plain, self.fd, inheritable=False)
        os.close(plain)

    def _check_claim(self, force: bool) -> None:
        """Refuse to write to a block device that is mounted: O_EXCL answers EBUSY there."""
        if self.namespace is not None and self.writable and not force:
            nvme.check_claim(self.namespace, self.path)
        if self.kind != "block device" or not self.writable or force:
            return
        try:
            os.close(os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY:
                return
            text = (
                "the block device is mounted, or claimed by swap, LVM or another program: writing "
                "to it would destroy what is there; unmount it, or pass force=True"
            )
            raise os_error(errno.EBUSY, text, self.path) from None

    @property
    def stream(self) -> str | None:
        """What it is where it can only be read or written in order, such as "a pipe"."""
        return facts.STREAMS.get(self.kind)

    def size(self) -> int:
        """Where the file or device ends now, in bytes; not for streams.

        Raises:
            OSError: ENODEV, a block device that was taken away. The kernel calls its size 0 then,
                and reads end as at the end of a file.
        """
        if self.namespace is not None:
            return self.namespace.size
        size = facts.size_of(self.fd, self.kind)
        if not size and self._had_bytes:
            error = os_error(errno.ENODEV, GONE, self.path)
            error.nbytes = 0  # type: ignore[attr-defined]
            raise error
        return size

    def hides_its_size(self) -> bool:
        """Return whether the file reports size 0 and may have bytes, as all of /proc.

        A file that takes O_DIRECT, or is nothing but page cache, reports its true size.
        """
        if self.kind != "file" or self.size():
            return False
        direct = self.direct()
        return direct.refusal is not None and not direct.in_memory

    def end(self) -> int:
        """Return where reads end at the latest: the size, or the largest offset if it is hidden."""
        return OFFSET_MAX if self.hides_its_size() else self.size()

    def gone(self) -> bool:
        """Whether it is a block device that was taken away, as a whole disk or a partition of it.

        A disk has no size any more; a partition keeps its own, and sysfs lists it no longer.
        """
        if not self._had_bytes:
            return False
        number = os.fstat(self.fd).st_rdev
        listed = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
        return not facts.size_of(self.fd, self.kind) or (
            os.path.isdir("/sys/dev/block") and not os.path.exists(listed)
        )

    def device(self) -> str:
        """Which device its bytes lie on: what an audit of the native route speaks of."""
        if self._device is None:
            self._device = audit.device_of(self.fd)
        return self._device

    @contextmanager
    def reference(self) -> Iterator[Reference]:
        """Its bytes by a path that is known to be good, whatever mode it was opened with.

        Raises:
            OSError: this user may not read it.
        """
        if self.namespace is None:
            with open_reference(self.fd, self.direct().refusal) as reference:
                yield reference
            return
        reference = nvme.NamespaceReference(self.fd, self.namespace)
        try:
            yield reference
        finally:
            reference.close()

    def check_write(self, offset: int, size: int) -> None:
        """Raise OSError(EINVAL) where a write of the range can never be, whatever the buffer."""
        if self.namespace is not None:
            nvme.check_whole_blocks(self.namespace, offset, size, self.path)

    def flush(self) -> None:
        """Return when what was written is on the medium."""
        number, why = 0, ""
        try:
            if self.namespace is not None:
                nvme.flush(self.fd, self.namespace)
            else:
                os.fdatasync(self.fd)
        except OSError as error:
            number, why = error.errno or errno.EIO, error.strerror or ""
        if number == errno.ENODEV or self.gone():  # flushing what is left, nothing, succeeds
            number, why = errno.ENODEV, GONE
        if number:
            failed = os_error(number, f"flushing to the medium failed: {why}", self.path)
            failed.nbytes = 0  # type: ignore[attr-defined] # nobody knows which are there
            raise failed

    def check_open(self) -> None:
        """Raise ClosedError once it is closed, and in a fork's child."""
        if self._closed:
            raise ClosedError(f"the file is closed: {self.path}")
        if self.pid != _process.pid:
            raise ClosedError(
                f"{self.path} was opened by process {self.pid}, which forked: open it again here"
            )

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def left(self) -> None:
        """Close the descriptors if it was closed, and no transfer uses them any more."""
        if self.pid != _process.pid:  # a forked child: a thread it lacks may have the lock
            return
        with self._lock:
            if self._closed and not self.lone:
                self._close()

    def close(self) -> None:
        """Close both descriptors, once no transfer uses them; their registrations go too."""
        if self.pid != _process.pid:  # a fork's child: nobody will release its copy of the lock
            self._closed = True
            self._close()
            return
        with self._lock:
            self._closed = True
            self.left()

    def _close(self) -> None:
        """Close them; where a signal handler's exception interrupts it, it can be called again."""
        self.lanes.clear()
        direct = self._direct.fd if self._direct else -1
        fds = [fd for fd in (self.fd, direct) if fd >= 0]
        if self.pid == _process.pid:
            for fd in fds:
                self.engine.forget_file(fd)
        closing = map(os.close, fds)
        self.fd, self._direct = -1, None  # no call, so no such exception, between this and any()
        any(closing)

    # -- O_DIRECT, and what transfers have found out about it

    def direct(self) -> facts.Direct:
        """The descriptor with O_DIRECT and its alignment, or why there is none."""
        direct = self._direct
        if direct is not None:
            return direct
        # Without the lock, since it allocates: a destructor that runs then may wait for another
        # thread's transfer, and that for the lock.
        if self.namespace is not None:
            alignment = facts.Alignment(self.namespace.memory_align, self.namespace.block)
            own = fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0)
            direct = facts.Direct(own, alignment, None)
        else:
            direct = facts.open_direct(
                self.fd, self.kind, writable=self.writable, readable=self.readable
            )
        with self._lock:
            if self._direct is None:
                self._direct = direct
        if self._direct is not direct and direct.fd >= 0:  # another thread was sooner
            os.close(direct.fd)
        return self._direct

    def direct_if_proven(self) -> facts.Direct | None:
        """O_DIRECT, once it is known or was seen to be what it says; else None."""
        direct = self._direct
        if direct is None or direct.refusal or not (direct.proven or self._cache_watched):
            return None
        if self.namespace is not None:
            return None  # takes commands, and neither pread nor pwrite
        return direct

    def no_native(self, buffer: Buffer) -> str | None:
        """Why the native route is out of the question for a buffer, whatever the range."""
        if not buffer.is_dmabuf:
            return "the buffer is a memfd, which is no dma-buf"
        if self.namespace is not None:
            return (
                "NVMe passthrough moves no registered dma-bufs (EOPNOTSUPP): the namespace's block "
                "device does, where the kernel can"
            )
        known = self.engine.no_native() or self._no_native.get(buffer)
        return known or audit.PAIRS.refusal(buffer.exporter, self.device())

    def native_refusal(self, job: Job) -> str | None:
        """Why the native route cannot take a job; None where it can, and is registered for it."""
        known = self.no_native(job.buffer)
        if known is not None:
            return known
        refused = self.engine.native_refusal(job)
        if refused is None:
            return None
        if refused.errno != errno.ENOSPC:  # slots come free
            self._no_native[job.buffer] = refused.why
        return refused.why

    def learn_about_native(self, buffer: Buffer, error: int) -> bool:
        """Whether the errno of a native request rules the route out for a buffer.

        ENOMEM and EFAULT say that the device cannot map or reach the dma-buf, EINVAL and EOPNOTSUPP
        that it takes no such request.
        """
        if error in (errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.EOPNOTSUPP):
            self._no_native[buffer] = why_not_native(error)
            _log.info("%s: no native route: %s", self.path, self._no_native[buffer])
            return True
        return False

    def rule_out_direct(self, refusal: str) -> None:
        """O_DIRECT was tried and is not to be had, for the sentence's reason."""
        _log.info("%s: %s", self.path, refusal)
        self._direct = self.direct()._replace(refusal=refusal)
        self.lanes.clear()

    def learn_about_slots(self) -> None:
        """Registered memory was refused, and may be taken unregistered."""
        self.no_slots = (
            "this kernel refuses registered memory that is less aligned than the file's blocks "
            "(EINVAL), and takes it unregistered"
        )
        _log.info("%s: %s", self.path, self.no_slots)

    def learn_from(self, error: int) -> bool:
        """Whether the errno of a first O_DIRECT request taught something worth another try."""
        if error not in (errno.EINVAL, errno.EOPNOTSUPP) or self.namespace is not None:
            return False
        direct = self.direct()
        if min(direct.alignment.offset, direct.alignment.memory) < facts.PAGE:
            coarse = facts.Alignment(
                max(direct.alignment.memory, facts.PAGE), max(direct.alignment.offset, facts.PAGE)
            )
            _log.info("%s: alignment of %s was refused: trying %s", self.path, direct, coarse)
            self._direct = direct._replace(alignment=coarse)
            self.lanes.clear()
        else:
            name = errno.errorcode[error]
            self.rule_out_direct(f"the filesystem refused an aligned O_DIRECT request ({name})")
        return True

    def cached_pages(self, offset: int, size: int) -> int | None:
        """Pages of a range in the page cache; None where the kernel does not tell."""
        return facts.cached_pages(self.fd, offset, size)

    def cache_to_watch(self, offset: int, size: int) -> bool:
        """Whether to look if the next transfer of a range leaves the page cache alone.

        btrfs accepts O_DIRECT and goes through the cache all the same for what it has compressed.
        A range that has more than a few pages there already cannot show it.
        """
        if self._cache_watched or self.kind != "file":
            return False
        pages = self.cached_pages(offset, size)
        return pages is not None and pages * facts.PAGE <= size // 4

    def saw_cache(self, offset: int, size: int) -> None:
        """Look, after the transfer."""
        pages = self.cached_pages(offset, size) or 0
        self._cache_watched = True
        if pages * facts.PAGE >= size // 2 > 0 and not self._passes_by(offset + size // 2):
            self.rule_out_direct(
                "the filesystem accepted O_DIRECT and went through the page cache all the same "
                "(btrfs does for what it has compressed): keep the file on another, "
                "or switch that off for it"
            )

    def _passes_by(self, offset: int) -> bool:
        """Whether an O_DIRECT read of the page there leaves the page cache without it.

        It is asked where pages came during a transfer: somebody else may have had them read, or the
        kernel ahead of him.
        """
        start = offset // facts.PAGE * facts.PAGE
        with suppress(OSError), open_reference(self.fd) as reference:
            for _ in range(3):
                os.posix_fadvise(self.fd, start, facts.PAGE, os.POSIX_FADV_DONTNEED)
                reference.read(start, facts.PAGE)
                if self.cached_pages(start, facts.PAGE) == 0:
                    return True
        return False


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags, 0o666)
    except PermissionError as error:
        raise nvme.explained(error, path) from None


def _duplicate(fd: int, mode: str) -> int:
    try:
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, ValueError, OverflowError):
        text = "no such descriptor is open"
        raise os_error(errno.EBADF, text, f"descriptor {fd}") from None
    if access not in (FLAGS[mode] & os.O_ACCMODE, os.O_RDWR):
        has = "reading" if access == os.O_RDONLY else "writing"
        text = f"the descriptor is open for {has} only, and mode={mode!r} needs more"
        raise os_error(errno.EBADF, text, f"descriptor {fd}")
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def open_target(
    path: str | bytes | os.PathLike[str] | int, mode: str, force: bool, engine: Engine | None
) -> Target:
    """Open a path, or duplicate a descriptor, for transfers by an engine."""
    return Target(path, mode, force, engine or default_engine())

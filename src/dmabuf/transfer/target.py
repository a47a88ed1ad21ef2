"""Target: an open file, device or stream, and the facts that transfers have found out about it.

Bytes travel without the page cache through a descriptor with O_DIRECT, and through it by another
without. A file that was opened here by its path on ext4 or xfs has one descriptor, which gets
O_DIRECT, until one without is needed. Any other is opened a second time for O_DIRECT.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dmabuf.errors import ClosedError, os_error
from dmabuf.kernel import files, log, nvme, proc, process
from dmabuf.memory import Buffer, far
from dmabuf.sizes import OFFSET_MAX
from dmabuf.transfer import audit
from dmabuf.transfer.engine import Engine
from dmabuf.transfer.layout import ONLY_READS, Disk, Layout, disk_of
from dmabuf.transfer.plan import Route
from dmabuf.transfer.reference import NamespaceReference, Reference, open_reference
from dmabuf.transfer.ring import why_not_native
from dmabuf.transfer.run import Segments

FLAGS: dict[str, int] = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT,
    "r+": os.O_RDWR,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
}

GONE = "the device was pulled, or its driver was unbound: open it again when it is back"


class Target:
    """An open file. Any thread may update its facts: each is replaced as a whole."""

    fd = -1
    closed = False
    """Whether the File was closed. The descriptors stay until the last transfer has ended."""
    kind: files.Kind = "file"
    namespace: nvme.Namespace | None = None
    stream: str | None = None
    """What it is where it can only be read or written in order, such as "a pipe"."""
    had_bytes = False
    """Whether it is a block device, which had a size when it was opened."""
    direct_refusal: str | None = None
    """Why O_DIRECT is impossible, as far as that is known."""
    cache_watched = False
    """Whether O_DIRECT was seen to pass by the page cache."""
    no_slots: str | None = None
    """Why memory that is less aligned than the file's blocks must not be registered."""
    by_device = False
    """Whether dma-bufs can be registered for the block device of the file at most, not for it."""
    _direct: files.Direct | None = None
    _disk: Disk | str | None = None
    """The open block device that holds the file, or why it cannot be had; None: not opened yet."""
    _native_limit: int | None = None
    _plain = -1
    """Another descriptor without O_DIRECT, once one was needed beside `fd`."""
    _no_native: weakref.WeakKeyDictionary[Buffer, str] | None = None
    _no_peer: weakref.WeakKeyDictionary[Buffer, str] | None = None
    _device: str | None = None
    _identity: tuple[int, int] | None = None
    """The device and inode of a file that is not open here."""

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | int,
        mode: str,
        force: bool,
        engine: Engine,
        *,
        travels: bool = False,
    ) -> None:
        self.travels = travels and not isinstance(path, int)
        """Whether another process may open the path again."""
        self._reopening = "r" if mode == "r" else "r+", force
        if mode not in FLAGS:
            raise ValueError(f"invalid mode {mode!r}: use one of 'r', 'w', 'r+', 'x'")
        if isinstance(path, bool):
            raise TypeError("a path or a descriptor is needed, not bool")
        if not isinstance(engine, Engine):
            raise TypeError(f"a dmabuf.Engine is needed, not {type(engine).__name__}")
        self.readable = mode in ("r", "r+")
        self.writable = mode != "r"
        self.engine = engine
        self.pid = self.owner = process.pid
        """The process whose transfers may begin: process.pid, or it was forked; 0 once closed."""
        self._lock = threading.RLock()  # the collector may close a File at any allocation
        self._flushing = threading.RLock()
        self._flushes = itertools.count(1)
        """Numbers for flushes, and for writes that wait for one."""
        self._flushed = 0
        """The number of the last flush that succeeded."""
        self._failures = 0
        """How many flushes have failed."""
        self._failure = 0, ""
        """The errno and text of the last failure."""
        if isinstance(path, int):
            self.path = f"descriptor {path}"
            self.fd = _duplicate(path, mode)
        else:
            self.path = path if type(path) is str else os.fsdecode(path)
            try:
                self.fd = os.open(self.path, FLAGS[mode] | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
            except PermissionError as error:
                raise nvme.explained(error, self.path) from None
        try:
            self._status = status = files.status_of(self.fd)
            regular = stat.S_ISREG(status.mode)
            self._private = regular and not isinstance(path, int)
            """Whether nobody else has the descriptor `fd`."""
            if not regular:
                self.kind, self.namespace = self._identify(status.mode)
                self.stream = files.STREAMS.get(self.kind)
                self.travels = self.travels and self.stream is None
            if not self._private:
                self._check_flags()
                self._without_o_direct()
            if not regular:
                self._check_claim(force)
                self.had_bytes = self.kind == "block device" and self.size() > 0
            elif mode == "w" and self._private and status.allocated:
                os.ftruncate(self.fd, 0)
        except BaseException:
            os.close(self.fd)
            self.fd = -1
            raise

    def _identify(self, mode: int) -> tuple[files.Kind, nvme.Namespace | None]:
        if stat.S_ISDIR(mode):
            text = "a directory has no bytes to move: name a file"
            raise os_error(errno.EISDIR, text, self.path)
        kind = files.kind_of(mode)
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
        """Reopen a file without O_DIRECT, for edges; the caller's descriptor keeps the flag."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        if self.stream is not None or not flags & os.O_DIRECT:
            return
        kept = flags & (os.O_ACCMODE | os.O_SYNC | os.O_NOATIME)
        try:
            plain = os.open(f"/proc/self/fd/{self.fd}", kept | os.O_CLOEXEC)
        except OSError as error:
            text = (
                "the descriptor has O_DIRECT, and the file cannot be opened again without it "
                f"({error.strerror}); pass one without O_DIRECT"
            )
            raise os_error(error.errno or errno.EINVAL, text, self.path) from None
        os.dup2(plain, self.fd, inheritable=False)
        os.close(plain)

    def _check_claim(self, force: bool) -> None:
        """Raise if a block device to write to is mounted: open(2) with O_EXCL returns EBUSY."""
        if self.namespace is not None and self.writable and not force:
            nvme.check_claim(self.namespace, self.path)
        if self.kind != "block device" or not self.writable or force:
            return
        refusal = files.try_claim(f"/proc/self/fd/{self.fd}")
        if refusal is not None and refusal.errno == errno.EBUSY:
            text = (
                "the block device is mounted, or claimed by swap, LVM or another program: writing "
                "to it would destroy what is there; unmount it, or pass force=True"
            )
            raise os_error(errno.EBUSY, text, self.path)

    def plain(self) -> int:
        """Return the descriptor without O_DIRECT, which is opened now if there is none yet."""
        if self._plain >= 0:
            return self._plain
        if not self._private or self.direct().fd != self.fd:
            return self.fd
        access = FLAGS["r+" if self.readable and self.writable else "w" if self.writable else "r"]
        with self._lock:
            direct = self._direct
            if self._plain < 0 and direct is not None and direct.fd == self.fd:
                try:
                    flags = access & os.O_ACCMODE | os.O_CLOEXEC
                    self._plain = os.open(f"/proc/self/fd/{self.fd}", flags)
                except OSError as error:  # then all goes through the page cache
                    self._direct = direct._replace(fd=-1)
                    self.rule_out_direct(files.why_not_direct(error))
                    files.without_o_direct(self.fd)
        return self._plain if self._plain >= 0 else self.fd

    def size(self) -> int:
        """Return the present size of the file or device in bytes; not for streams.

        Raises:
            OSError: ENODEV, the block device was removed. The kernel then reports size 0, and reads
                end as at the end of a file.
        """
        if self.namespace is not None:
            return self.namespace.size
        size = files.size_of(self.fd, self.kind)
        if not size and self.had_bytes:
            error = os_error(errno.ENODEV, GONE, self.path)
            error.nbytes = 0  # type: ignore[attr-defined]
            raise error
        return size

    def hides_its_size(self) -> bool:
        """Return whether the file reports size 0 and may have bytes, as files in /proc do.

        A file that supports O_DIRECT, or is kept in memory as on tmpfs, reports its true size.
        """
        if self.kind != "file" or self.size():
            return False
        direct = self.direct()
        return direct.refusal is not None and not direct.in_memory

    def end(self) -> int:
        """Return where reads end at the latest: the size, or the largest offset if it is hidden."""
        return OFFSET_MAX if self.hides_its_size() else self.size()

    def gone(self, result: Any = None) -> bool:
        """Return whether the file is a device that was removed.

        A removed disk has size 0. A partition keeps its size but is missing from sysfs; before that
        its disk has size 0, and requests already fail. `result` is that of the C core: passthrough
        to a removed namespace answers ENODEV, and no NVMe status.
        """
        if self.namespace is not None:
            return result is not None and result.error == errno.ENODEV and not result.nvme_status
        if not self.had_bytes:
            return False
        number = os.fstat(self.fd).st_rdev
        listed = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
        return (
            not files.size_of(self.fd, self.kind)
            or (os.path.isdir("/sys/dev/block") and not os.path.exists(listed))
            or proc.number(listed, "../size") == 0
        )

    def lost_path(self, result: Any) -> str | None:
        """Return why no path leads to an NVMe character device now; "" if one does again.

        The kernel refuses passthrough with EINVAL or EAGAIN then; this corrects the error in
        `result`. None where the error has another cause.
        """
        unclear = (errno.EINVAL, errno.EAGAIN)
        if self.namespace is None or result.error not in unclear:
            return None
        lost = None if result.nvme_status else nvme.no_path(os.fstat(self.fd).st_rdev)
        if result.error == errno.EAGAIN:
            result.error = errno.EBUSY  # the core has issued it again for long enough
        if lost is None:
            return None
        number, why = lost
        result.error = number or result.error
        return why

    def device(self) -> str:
        """Return the device that holds the file's bytes, as a path in sysfs."""
        if self._device is None:
            self._device = audit.device_of(self.fd)
        return self._device

    @contextmanager
    def reference(self) -> Iterator[Reference]:
        """Yield a Reference that reads the file, whatever mode it was opened with.

        Raises:
            OSError: this user has no permission to read the file.
        """
        if self.namespace is None:
            with open_reference(self.fd, self.direct().refusal) as reference:
                yield reference
            return
        reference = NamespaceReference(self.fd, self.namespace, self.path)
        try:
            yield reference
        finally:
            reference.close()

    def check_write(self, offset: int, size: int) -> None:
        """Raise OSError(EINVAL) if the range is not whole blocks of an NVMe character device."""
        if self.namespace is not None:
            nvme.check_whole_blocks(self.namespace, offset, size, self.path)

    def begin_write(self) -> int:
        """Return how many flushes have failed before a write that begins now, for `flush`."""
        if self.stream is None:
            self.direct()  # opened now, because a descriptor reports what failed while it was open
        return self._failures

    def flush(self, failures: int | None = None, *, metadata: bool = False) -> None:
        """Return when the written bytes are on the medium.

        The kernel reports bytes that it could not write out once for each open file, to the flush
        that ends first. So threads flush one after the other, and a failure is raised for every
        write that had begun before it.

        Args:
            failures: what `begin_write` returned before the first byte was written; 0 for all bytes
                since the file was opened. None: only a failure of this flush is raised.
            metadata: also what is not needed to read the bytes, such as blocks that were freed
                (fsync instead of fdatasync).
        """
        written = next(self._flushes)
        with self._flushing:
            before = self._failures if failures is None else failures
            if metadata or self._flushed < written:  # no other thread's flush has begun since
                begun = next(self._flushes)
                try:
                    self._flush(os.fsync if metadata else os.fdatasync)
                    self._flushed = begun
                except OSError as error:  # no call before this is recorded: a handler may raise
                    self._failures += 1
                    self._failure = error.errno or errno.EIO, error.strerror or ""
            number, why = self._failure if self._failures != before else (0, "")
        if why == os.strerror(errno.ENODEV) or self.gone():  # fdatasync succeeds if it is gone
            number, why = errno.ENODEV, GONE
        if number:
            failed = os_error(number, f"flushing to the medium failed: {why}", self.path)
            failed.nbytes = 0  # type: ignore[attr-defined] # the kernel does not report how many
            raise failed

    def _flush(self, sync: Callable[[int], None]) -> None:
        if self.namespace is not None:
            nvme.flush(self.fd, self.namespace)
            return
        # Not the descriptor by which the core flushes edges, which takes the errors of edges.
        direct = self.direct().fd
        sync(direct if direct >= 0 else self.fd)

    def check_open(self) -> None:
        """Raise ClosedError if the file is closed, or was opened before a fork."""
        if self.closed:
            raise ClosedError(f"the file is closed: {self.path}")
        if self.pid != process.pid:
            raise ClosedError(
                f"{self.path} was opened by process {self.pid}, which forked: open it again here"
            )

    def reopening(self) -> tuple[str, str, bool, tuple[int, int]]:
        """Return the path, mode, force and identity by which another process opens the file again.

        Raises:
            TypeError: it has no path, or an engine that the other process has not.
            ClosedError: it is closed.
        """
        if self.closed:
            self.check_open()
        if not self.travels:
            what = self.stream or "a handed-in descriptor or own engine"
            raise TypeError(f"send a File to another process: it has {what}; open it there")
        identity = self._identity or identity_of(self.fd)
        return os.path.abspath(self.path), *self._reopening, identity

    def abandon(self) -> None:
        """Close the descriptors in the child of a fork, where no thread releases a lock."""
        self._lock, self._flushing = threading.RLock(), threading.RLock()
        self.close()

    def close(self) -> None:
        """Close the descriptors, and remove them from the engine's tables.

        Can be called again if an exception of a signal handler interrupted the call.
        """
        self.closed, self.owner = True, 0
        with self._lock:
            direct = self._direct.fd if self._direct else -1
            fds = {self.fd, direct, self._plain}
            fds.discard(-1)
            if self.pid == process.pid:
                self.engine.forget_files(fds)
            closing = map(os.close, fds)
            # No call, so no exception, between this and any().
            self.fd, self._plain, self._direct = -1, -1, None
            any(closing)
            self._disk = None  # which closes the device after the last file on it

    # -- facts about O_DIRECT and the native route

    def direct(self) -> files.Direct:
        """Return the descriptor with O_DIRECT and its alignment, or why there is none."""
        direct = self._direct
        if direct is not None:
            return direct
        # Not under the lock, because this allocates: a destructor that runs then may wait for
        # another thread's transfer, and that thread for the lock.
        if self.namespace is not None:
            alignment = files.Alignment(self.namespace.memory_align, self.namespace.block)
            own = fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0)
            direct = files.Direct(own, alignment, None)
        else:
            known = files.set_o_direct(self.fd, self._status) if self._private else None
            direct = known or files.open_direct(
                self.fd, self.kind, writable=self.writable, readable=self.readable
            )
        with self._lock:
            if self._direct is None:
                if self.namespace is None:
                    self.direct_refusal, self.cache_watched = direct.refusal, direct.proven
                self._direct = direct
            elif direct.fd == self.fd and self._direct.fd != self.fd:  # given up meanwhile
                files.without_o_direct(self.fd)
        if self._direct is not direct and direct.fd not in (-1, self.fd):  # another thread's
            os.close(direct.fd)
        return self._direct

    def no_direct(self, buffer: Buffer) -> str | None:
        """Return why the file's device cannot access the buffer's pages; None if it can."""
        return buffer.pin_refusal or (self._no_peer and self._no_peer.get(buffer)) or None

    def learn_about_memory(self, buffer: Buffer, error: int) -> bool:
        """Record an errno of a direct request that is about the memory; return whether it is."""
        if error == errno.EFAULT:
            buffer.map_refusal = far.loss_of(buffer)
            buffer.pin_refusal = buffer.map_refusal or (
                "the kernel cannot pin the pages behind the buffer's mapping (EFAULT); allocate it "
                'with exporter="udmabuf" or "memfd"'
            )
            return True
        # Pinning fails with EREMOTEIO where the driver cannot, mapping with that or EINVAL.
        if buffer.peer is None or error not in (errno.EREMOTEIO, errno.EINVAL):
            return False
        if self._no_peer is None:
            self._no_peer = weakref.WeakKeyDictionary()
        from dmabuf.kernel import pci  # only where it is needed

        self._no_peer[buffer] = pci.why_not_peers(buffer.peer, self.device())
        log.info("%s: %s", self.path, self._no_peer[buffer])
        return True

    def no_native(self, buffer: Buffer, *, write: bool) -> str | None:
        """Return why no range of a buffer can take the native route; None if one may."""
        if not buffer.is_dmabuf:
            kind = "a memfd" if buffer.exporter == "memfd" else f"memory of {buffer.exporter}"
            return f"the buffer is {kind}, which is not a dma-buf"
        if self.namespace is not None:
            return (
                "NVMe passthrough cannot use registered dma-bufs (EOPNOTSUPP); open the "
                "namespace's block device instead"
            )
        known = self.engine.no_native() or (self._no_native and self._no_native.get(buffer))
        if write and self.by_device:
            known = known or ONLY_READS
        return known or audit.PAIRS.refusal(buffer.exporter, self.device, Route.NATIVE)

    def register_native(self, buffer: Buffer, start: int, end: int, *, write: bool) -> str | None:
        """Register a part of a dma-buf for the file or its block device; return why not."""
        why = self.no_native(buffer, write=write)  # an audit may have ruled the pair out meanwhile
        if why is not None:
            return why
        refusal = None
        if not self.by_device:
            refusal = self.engine.native_refusal(buffer, self.direct().fd, start, end)
            if refusal and self.kind == "file" and refusal.errno == errno.EOPNOTSUPP:
                self.by_device = True
        if self.by_device:
            disk = ONLY_READS if write else self.disk()
            if isinstance(disk, str):
                return disk
            refusal = disk.native_refusal(buffer, start, end)
        if refusal is None:
            return None
        if refusal.errno != errno.ENOSPC:  # slots become free again
            self.rule_out_native(buffer, refusal.why)
        return refusal.why

    def request_limit(self) -> int:
        """Return the maximum bytes of a passthrough or native request; 0 if it is not known."""
        if self.namespace is not None:
            return self.namespace.limit
        if self._native_limit is None:
            kib = proc.number(self.device(), "queue/max_hw_dmabuf_sectors_kb")
            self._native_limit = (kib or 0) << 10
        return self._native_limit

    def rule_out_native(self, buffer: Buffer, why: str) -> None:
        """Remember why a dma-buf cannot be registered for the file."""
        if self._no_native is None:
            self._no_native = weakref.WeakKeyDictionary()
        self._no_native[buffer] = why

    def disk(self) -> Disk | str:
        """Return the open block device that holds the file, or why it cannot be read."""
        disk = self._disk
        if disk is None:
            try:
                disk = disk_of(self.engine, self.fd)
            except OSError as error:
                disk = str(error.strerror)
            self._disk = disk
        return disk

    def layout(self, segments: Segments, measure: Any) -> Layout | str:
        """Return where measured segments lie on the file's device, or why it cannot be read.

        It writes the file's dirty pages out first. The buffer was registered for the device before.
        """
        disk = self.disk()
        assert isinstance(disk, Disk)
        try:
            return Layout(self.direct(), disk, segments, measure)
        except OSError as error:
            return str(error.strerror)

    def learn_about_native(self, buffer: Buffer, error: int) -> bool:
        """Record an errno of a native request; return whether it rules the route out.

        ENOMEM and EFAULT mean that the device cannot map or reach the dma-buf, EINVAL and
        EOPNOTSUPP that the device does not support such requests.
        """
        if error in (errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.EOPNOTSUPP):
            self.rule_out_native(buffer, why_not_native(error))
            log.info("%s: no native route: %s", self.path, why_not_native(error))
            return True
        return False

    def rule_out_direct(self, refusal: str) -> None:
        """Record why O_DIRECT does not work for the file."""
        log.info("%s: %s", self.path, refusal)
        self._direct = self.direct()._replace(refusal=refusal)
        self.direct_refusal = refusal

    def learn_about_slots(self) -> None:
        """Record that the kernel refused less aligned registered memory."""
        self.no_slots = (
            "this kernel refuses registered memory that is less aligned than the file's blocks "
            "(EINVAL)"
        )
        log.info("%s: %s", self.path, self.no_slots)

    def learn_from(self, error: int) -> bool:
        """Record the errno of a first O_DIRECT request; return whether to plan again."""
        if error not in (errno.EINVAL, errno.EOPNOTSUPP) or self.namespace is not None:
            return False
        direct = self.direct()
        if min(direct.alignment.offset, direct.alignment.memory) < files.PAGE:
            coarse = files.Alignment(
                max(direct.alignment.memory, files.PAGE), max(direct.alignment.offset, files.PAGE)
            )
            log.info("%s: alignment of %s was refused: trying %s", self.path, direct, coarse)
            self._direct = direct._replace(alignment=coarse)
        else:
            name = errno.errorcode[error]
            self.rule_out_direct(f"the filesystem refused an aligned O_DIRECT request ({name})")
        return True

    def cached_pages(self, offset: int, size: int) -> int | None:
        """Return how many pages of a range are in the page cache; None if that is unknown."""
        return files.cached_pages(self.fd, offset, size)

    def cache_to_watch(self, offset: int, size: int) -> bool:
        """Return whether to check that the next transfer of a range bypasses the page cache.

        btrfs accepts O_DIRECT but goes through the cache for compressed data. The check is
        impossible if much of the range is in the cache before the transfer.
        """
        if self.cache_watched or self.kind != "file":
            return False
        pages = self.cached_pages(offset, size)
        return pages is not None and pages * files.PAGE <= size // 4

    def saw_cache(self, offset: int, size: int) -> None:
        """Check after the transfer, and rule O_DIRECT out if it went through the page cache."""
        pages = self.cached_pages(offset, size) or 0
        self.cache_watched = True
        if pages * files.PAGE >= size // 2 > 0 and not self._passes_by(offset + size // 2):
            self.rule_out_direct(
                "the filesystem accepted O_DIRECT but used the page cache, as btrfs does for "
                "compressed files; turn compression off for the file"
            )

    def _passes_by(self, offset: int) -> bool:
        """Return whether an O_DIRECT read of the page at an offset bypasses the page cache.

        Pages that appeared during a transfer may come from another program or from its readahead.
        """
        start = offset // files.PAGE * files.PAGE
        with suppress(OSError), open_reference(self.fd) as reference:
            for _ in range(3):
                os.posix_fadvise(self.fd, start, files.PAGE, os.POSIX_FADV_DONTNEED)
                reference.read(start, files.PAGE)
                if self.cached_pages(start, files.PAGE) == 0:
                    return True
        return False


class Elsewhere(Target):
    """A file that another process has open, and that `Links.current` opens here.

    The arguments are what `reopening` returned there.
    """

    def __init__(self, path: str, mode: str, force: bool, identity: tuple[int, int]) -> None:
        self.path, self._reopening, self._identity = path, (mode, force), identity
        self.travels = True
        self.pid = self.owner = 0
        self._lock = threading.RLock()


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


def identity_of(fd: int) -> tuple[int, int]:
    """Return the device and inode of an open file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def check_identity(target: Target, identity: tuple[int, int]) -> None:
    """Close a target and raise OSError(ESTALE) unless it is the file with a device and inode."""
    if identity_of(target.fd) != identity:
        target.close()
        text = (
            "open the file again in another process: the path is another file's now; "
            "to use that one, open the path there"
        )
        raise os_error(errno.ESTALE, text, target.path)

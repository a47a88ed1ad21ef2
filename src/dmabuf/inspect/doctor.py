"""The doctor: what this machine and a path support, with the reason and the fix for each "no".

Nothing is concluded from a version number. Each answer comes from trying: a ring is made, a page is
pinned, a buffer is allocated, and where that fails the kernel's error becomes the reason.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import resource
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from dmabuf._core import address_of, ffi, lib
from dmabuf.errors import RouteUnavailable
from dmabuf.inspect.answer import Answer
from dmabuf.inspect.doctor_devices import examine_confinement, examine_devices, examine_extras
from dmabuf.kernel import files, nvme, proc
from dmabuf.memory import Buffer, allocate, capacity, exporters, far
from dmabuf.sizes import format_size
from dmabuf.transfer import (
    ALLOWED,
    Direction,
    File,
    Plan,
    Terms,
    no_native_kernel,
    plan_in_order,
    why_no_uring,
)

# <linux/io_uring.h>
_COOP_TASKRUN = 1 << 8
_SINGLE_ISSUER = 1 << 12
_DEFER_TASKRUN = 1 << 13

_CAP_IPC_LOCK = 14  # <linux/capability.h>
_MOST_PINNED = 256 << 20  # the largest limit that is tested by pinning more
_PLANNED = 8 << 20  # bytes of the transfers that are planned for a path


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine supports for this process."""

    release: str
    """The kernel release, from uname(2)."""
    architecture: str
    page_size: int
    kernel: tuple[Answer, ...]
    """System calls that make transfers better."""
    io_uring: tuple[Answer, ...]
    exporters: tuple[Answer, ...]
    limits: tuple[Answer, ...]
    devices: tuple[Answer, ...]
    """Nodes of devices that dmabuf supports, FUSE, and the libraries of GPUs."""
    extras: tuple[Answer, ...]
    """The optional packages of each extra, with their versions."""
    confinement: tuple[Answer, ...]
    """The container, seccomp filter and user namespace of this process."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The route that bytes would take in one direction."""

    ok: bool
    """Whether there is a route."""
    zero_copy: bool
    route: str | None
    reason: str
    """Why this route, or why none."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Why each better route was passed over."""


@dataclass(frozen=True, slots=True)
class PathReport:
    """What a path is and supports."""

    path: str
    kind: str
    filesystem: str | None
    size: int | None
    """Bytes; None if the file has no size."""
    direct: Answer
    """Whether the file takes O_DIRECT."""
    memory_alignment: int | None
    """The alignment of addresses that O_DIRECT needs, in bytes."""
    offset_alignment: int | None
    """The alignment of offsets and lengths that O_DIRECT needs, in bytes."""
    read: Outlook
    write: Outlook


def examine_machine() -> Machine:
    """Return what this machine supports. Changes nothing.

    It opens device nodes and GPUs, and closes them again.
    """
    return Machine(
        release=platform.release(),
        architecture=platform.machine(),
        page_size=mmap.PAGESIZE,
        kernel=(_cachestat(), _dioalign(), _populate()),
        io_uring=tuple(_io_uring()),
        exporters=tuple(_exporters()),
        limits=(_memlock(), _nofile(), _available_memory()),
        devices=tuple(examine_devices()),
        extras=tuple(examine_extras()),
        confinement=tuple(examine_confinement()),
    )


# -- the kernel


def _cachestat() -> Answer:
    try:
        fd = os.memfd_create("dmabuf doctor", os.MFD_CLOEXEC)
    except OSError as error:
        return Answer("cachestat", False, f"not tried: memfd_create: {error.strerror}")
    try:
        os.write(fd, b"x")
        works = files.cached_pages(fd, 0, 1) is not None
    finally:
        os.close(fd)
    if works:
        return Answer("cachestat", True, "reports what is in the page cache")
    text = "missing (Linux 6.5): O_DIRECT through the page cache goes unnoticed"
    return Answer("cachestat", False, text)


def _dioalign() -> Answer:
    def reports(path: str) -> bool:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                answer = ffi.new("uint32_t[2]")
                return not lib.dmb_statx_dio(fd, answer) and bool(answer[0])
            finally:
                os.close(fd)
        return False

    seen = next(filter(reports, (sys.executable, __file__, "/etc/passwd")), None)
    if seen:
        return Answer("statx DIOALIGN", True, f"reports O_DIRECT's alignment, as for {seen}")
    text = "no file tried reports it (Linux 6.1, and the filesystem must): found by trying"
    return Answer("statx DIOALIGN", False, text)


def _populate() -> Answer:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        rc = lib.dmb_populate(address_of(memory), len(memory))
    if rc == 0:
        return Answer("populate", True, "fills page tables at once (MADV_POPULATE_WRITE)")
    return Answer("populate", False, f"{os.strerror(-rc)}: first use of a buffer is slow")


# -- io_uring


@contextmanager
def _ring(flags: int) -> Iterator[tuple[Any, Any]]:
    """Make a ring of the core; yield it and its features."""
    handle = ffi.new("struct dmb_ring **")
    rc = lib.dmb_ring_create(lib.DMB_BACKEND_URING, 8, flags, handle)
    if rc:
        raise OSError(-rc, why_no_uring(-rc))
    try:
        info = ffi.new("struct dmb_ring_info *")
        lib.dmb_ring_get_info(handle[0], info)
        yield handle[0], info
    finally:
        lib.dmb_ring_destroy(handle[0])


def _io_uring() -> Iterator[Answer]:
    refusal = lib.dmb_uring_probe()
    if refusal:
        text = f"{why_no_uring(-refusal)}; threads take its place"
        yield Answer("io_uring", False, text, _uring_fix())
        return
    try:
        with _ring(0) as (ring, info):
            yield Answer("io_uring", True, "a ring was made; transfers use it")
            yield _registered_buffers(ring, info)
            yield _registered_files(ring, info)
            yield _registered_dmabufs(ring)
            yield _setup("COOP_TASKRUN", info.setup_flags & _COOP_TASKRUN, "the default engine")
        with _ring(lib.DMB_RING_SINGLE_ISSUER) as (ring, info):
            owned = info.setup_flags & _SINGLE_ISSUER and info.setup_flags & _DEFER_TASKRUN
            yield _setup("DEFER_TASKRUN", owned, "an Engine of your own")
    except OSError as error:
        yield Answer("io_uring", False, str(error.strerror), _uring_fix())


def _uring_fix() -> str:
    disabled = proc.number("/proc/sys/kernel/io_uring_disabled")
    if disabled:
        return f"sysctl kernel.io_uring_disabled=0 (it is {disabled})"
    return "a seccomp profile that allows io_uring_setup, io_uring_enter and io_uring_register"


def _registered_buffers(ring: Any, info: Any) -> Answer:
    rc = info.buffer_table
    if not rc:
        with mmap.mmap(-1, mmap.PAGESIZE) as memory:
            rc = lib.dmb_ring_register_buffer(ring, 0, address_of(memory), len(memory))
            lib.dmb_ring_register_buffer(ring, 0, 0, 0)
    if rc == 0:
        return Answer("registered buffers", True, "memory is pinned once, not for each request")
    return Answer("registered buffers", False, os.strerror(-rc), "see the memlock limit")


def _registered_files(ring: Any, info: Any) -> Answer:
    rc = info.file_table
    if not rc:
        fd = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
        try:
            rc = lib.dmb_ring_register_file(ring, 0, fd)
            lib.dmb_ring_register_file(ring, 0, -1)
        finally:
            os.close(fd)
    detail = os.strerror(-rc) if rc else "a file is looked up once, not for each request"
    return Answer("registered files", rc == 0, detail)


def _registered_dmabufs(ring: Any) -> Answer:
    rc = lib.dmb_ring_probe_native(ring)
    if rc == 0:
        text = "the native route: devices that support it move bytes to and from a dma-buf"
        return Answer("registered dma-bufs", True, text)
    return Answer("registered dma-bufs", False, no_native_kernel(-rc))


def _setup(name: str, taken: int, whose: str) -> Answer:
    detail = "fewer interruptions" if taken else "the kernel refused it: a little slower"
    return Answer(name, bool(taken), f"{detail}; for {whose}")


# -- exporters


def _exporters() -> Iterator[Answer]:
    yield _allocated("udmabuf", "udmabuf", f"chosen by auto; zero-copy{_udmabuf_limits()}")
    with suppress(OSError):  # without udmabuf the answer above has the reason
        if exporters.maps_large_pages():
            yield Answer("udmabuf of huge pages", True, "importers and the CPU see the right bytes")
        else:
            no, fix = exporters.NO_HUGE_PAGES, exporters.NO_HUGE_PAGES_FIX
            yield Answer("udmabuf of huge pages", False, no, fix)
    names = exporters.heap_names()
    for name in names:
        yield _allocated(f"dma-heap {name}", name, "a dma-heap, staged to; only by its name")
    if not names:
        fix = "a kernel with CONFIG_DMABUF_HEAPS_SYSTEM"
        yield Answer("dma-heap", False, f"{exporters.HEAPS} is missing or empty", fix)
    yield _allocated("memfd", "memfd", "shared memory, zero-copy, but not a dma-buf")
    for node in capacity.nodes_without_processors():
        moves = "ZONE_MOVABLE: memfd only" if capacity.has_movable(node) else "of ordinary memory"
        yield Answer(f"NUMA node {node}", True, f"no processors, {moves}; by numa_node={node}")
    for name in far.names():
        yield Answer(name, True, "zero-copy, but not a dma-buf; only by its name")
    for size in capacity.huge_page_sizes("/"):
        name = f"huge pages of {format_size(size)}"
        yield _allocated(name, "memfd", "a buffer was made of one", size)


def _allocated(name: str, exporter: str, detail: str, huge_page: int = 0) -> Answer:
    """Answer whether an exporter makes a buffer of one page."""
    size = huge_page or mmap.PAGESIZE
    try:
        allocate(size, exporter=exporter, huge_pages=huge_page or False).close()
    except (OSError, ValueError) as error:
        where = getattr(error, "filename", None)
        text = getattr(error, "strerror", None) or str(error)
        text, _, fix = text.removeprefix("not tried: ").partition(" (")
        why = f"{where}: {text}" if where else text
        return Answer(name, False, why, fix.removesuffix(")") or None)
    return Answer(name, True, detail)


def _udmabuf_limits() -> str:
    """Return the limits of the udmabuf module, as far as they can be read."""
    folder = os.path.dirname(exporters.UDMABUF_SIZE_LIMIT)
    limits = []
    for name, unit in (("size_limit_mb", " MiB a buffer"), ("list_limit", " items")):
        number = proc.number(folder, name)
        if number is not None:
            limits.append(f"{number}{unit}")
    return f"; at most {', '.join(limits)}" if limits else ""


# -- limits


def _memlock() -> Answer:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    fix = "ulimit -l unlimited, LimitMEMLOCK=infinity in a systemd unit, or CAP_IPC_LOCK"
    if limit == resource.RLIM_INFINITY:
        return Answer("pinned memory", True, "RLIMIT_MEMLOCK is unlimited")
    may = _has_capability(_CAP_IPC_LOCK)
    text = f"RLIMIT_MEMLOCK is {format_size(limit)}, {'with' if may else 'without'} CAP_IPC_LOCK"
    if not may or limit >= _MOST_PINNED:
        text += ": larger buffers are used without registration"
        return Answer("pinned memory", may, text, None if may else fix)
    try:
        exceeded = _pin(limit + mmap.PAGESIZE)
    except OSError as error:
        return Answer("pinned memory", may, f"{text}; not tried: {error.strerror}")
    if exceeded == 0:
        return Answer("pinned memory", True, f"{text}: more than that was pinned")
    text += f", which does not count in this user namespace ({os.strerror(-exceeded)})"
    return Answer("pinned memory", False, text, fix)


def _pin(size: int) -> int:
    """Return 0 if so much memory can be pinned, or -errno."""
    with _ring(0) as (ring, info), mmap.mmap(-1, size) as memory:
        if info.buffer_table:
            return int(info.buffer_table)
        rc = int(lib.dmb_ring_register_buffer(ring, 0, address_of(memory), size))
        lib.dmb_ring_register_buffer(ring, 0, 0, 0)
        return rc


def _has_capability(number: int) -> bool:
    for line in proc.read("/proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _nofile() -> Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"RLIMIT_NOFILE is {soft}: a buffer takes one for each slab, a file up to two"
    enough = soft >= 256
    return Answer("descriptors", enough, text, None if enough else f"ulimit -n {min(hard, 4096)}")


def _available_memory() -> Answer:
    figures = capacity.memory_figures()
    if not figures:
        text = "neither /proc/meminfo nor a cgroup reports it"
        return Answer("memory", False, text, "mount -t proc proc /proc")
    have, where = min(figures)
    enough = have >= 64 << 20
    return Answer("memory", enough, f"{format_size(have)} for new buffers, by {where}")


# -- a path


def examine_path(path: str) -> PathReport:
    """Return what a path supports for a buffer that `allocate` makes on this machine.

    In a directory, a file without a name is examined. A FIFO, socket or character device is not
    opened, because that could disturb its other end. Nothing is changed.

    Raises:
        OSError: the path does not exist or may not be examined.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        return _examine_directory(path)
    kind: str | None = files.kind_of(status.st_mode)
    if kind is None:
        text = "neither a file, directory, device, pipe nor socket"
        raise OSError(errno.EINVAL, text, path)
    if kind in files.STREAMS and not nvme.is_namespace(status):
        return _examine_stream(path, kind)
    with allocate(_PLANNED) as buffer:
        with File(path, "r") as file:
            kind, size = file.kind, file.size
            direct, alignment = _direct(file)
            read = _plan(file, buffer, "read")
        try:
            with File(path, "r+") as file:  # for both, so that nothing is made or emptied
                write = _plan(file, buffer, "write")
        except OSError as error:
            write = Outlook(False, False, None, str(error.strerror))
    return PathReport(path, kind, filesystem(path), size, direct, *alignment, read, write)


def _examine_stream(path: str, kind: str) -> PathReport:
    plans = []
    directions: tuple[tuple[Direction, int, str], ...]
    directions = ("read", os.R_OK, "read"), ("write", os.W_OK, "written")
    for direction, flag, verb in directions:
        if os.access(path, flag, effective_ids=True):
            plans.append(_outlook(plan_in_order(direction, files.STREAMS[kind], Terms(), path)))
        else:
            plans.append(Outlook(False, False, None, f"may not be {verb} by this user"))
    direct = Answer("O_DIRECT", False, f"{files.STREAMS[kind]} does not take it")
    return PathReport(path, kind, None, None, direct, None, None, *plans)


def _examine_directory(path: str) -> PathReport:
    with allocate(_PLANNED) as buffer:
        try:
            with tempfile.TemporaryFile(dir=path) as temporary:
                os.ftruncate(temporary.fileno(), _PLANNED)
                with File(temporary.fileno(), "r+") as file:
                    read, write = _plan(file, buffer, "read"), _plan(file, buffer, "write")
                    direct, alignment = _direct(file)
        except OSError as error:
            text = f"no file can be made in it: {error.strerror}"
            read = write = Outlook(False, False, None, text)
            direct, alignment = Answer("O_DIRECT", False, text), (None, None)
    name = filesystem(path)
    return PathReport(path, "directory", name, None, direct, *alignment, read, write)


def _direct(file: File) -> tuple[Answer, tuple[int | None, int | None]]:
    """Answer whether a file takes O_DIRECT, and with which alignments."""
    memory: int | None
    offset: int | None
    kind = files.kind_of(os.fstat(file.fileno()).st_mode)
    assert kind is not None
    if kind == "character device" and (namespace := nvme.namespace(file.fileno(), str(file.name))):
        name, memory, offset = "passthrough", namespace.memory_align, namespace.block
    else:
        found = files.open_direct(file.fileno(), kind, file.writable(), file.readable())
        if found.refusal is not None:
            return Answer("O_DIRECT", False, found.refusal), (None, None)
        os.close(found.fd)
        name, (memory, offset) = "O_DIRECT", found.alignment
    text = f"addresses by {memory}, offsets and lengths by {offset} bytes"
    return Answer(name, True, text), (memory, offset)


def _plan(file: File, buffer: Buffer, direction: Direction) -> Outlook:
    size = min(_PLANNED, file.size or 0)
    if direction == "write" and file.kind == "file":
        size = _PLANNED
    if size == 0:
        return Outlook(True, False, None, "it is empty: there is nothing to read")
    try:
        return _outlook(file.plan(buffer, direction, size=size))
    except RouteUnavailable as error:
        return Outlook(False, False, None, error.reason)


def _outlook(plan: Plan) -> Outlook:
    rejected = {route.value: why for route, why in plan.rejected.items()}
    zero_copy = plan.route in ALLOWED["zero-copy"]
    return Outlook(True, zero_copy, plan.route.value, plan.reason, rejected)


def filesystem(path: str) -> str | None:
    """Return the type of the filesystem that a path lies on, from the innermost mount."""
    real = os.path.realpath(path)
    best: tuple[int, str] | None = None
    with suppress(OSError):
        for mount in proc.mounts():
            inside = mount.point == "/" or (real + "/").startswith(mount.point + "/")
            if inside and (best is None or len(mount.point) >= best[0]):
                best = len(mount.point), mount.kind
    return best and best[1]

"""What is so about this machine: found by doing, frozen, never printed.

Nothing is concluded from a version number: a ring is made, a page is pinned, a buffer is allocated,
and where that fails the kernel's own answer becomes the reason.
"""

from __future__ import annotations

import mmap
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmabuf import _sysfs, exporters, facts
from dmabuf._ffi import ffi, lib
from dmabuf._mapping import address_of
from dmabuf.exporters import _memory, heap, udmabuf
from dmabuf.ring import no_native_kernel, why_no_uring
from dmabuf.sizes import format_size

# <linux/io_uring.h>
_COOP_TASKRUN = 1 << 8
_SINGLE_ISSUER = 1 << 12
_DEFER_TASKRUN = 1 << 13

_CAP_IPC_LOCK = 14  # <linux/capability.h>
_MOST_PINNED = 256 << 20  # what the pinning limit is tried with at most


@dataclass(frozen=True, slots=True)
class Answer:
    """One thing that a machine can do or not."""

    name: str
    ok: bool
    detail: str
    """What was found, or why it is not to be had."""
    fix: str | None = None
    """What would change that, where something would."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine can do, for this process."""

    release: str
    """The kernel's, as uname(2) tells it."""
    architecture: str
    page_size: int
    kernel: tuple[Answer, ...]
    """System calls that transfers gain from."""
    io_uring: tuple[Answer, ...]
    exporters: tuple[Answer, ...]
    limits: tuple[Answer, ...]


def probe() -> Machine:
    """Find out what this machine can do. Takes a few milliseconds, and leaves nothing behind."""
    return Machine(
        release=platform.release(),
        architecture=platform.machine(),
        page_size=mmap.PAGESIZE,
        kernel=(_cachestat(), _dioalign(), _populate()),
        io_uring=tuple(_io_uring()),
        exporters=tuple(_exporters()),
        limits=(_memlock(), _nofile(), _available_memory()),
    )


# -- the kernel


def _cachestat() -> Answer:
    try:
        fd = os.memfd_create("dmabuf doctor", os.MFD_CLOEXEC)
    except OSError as error:
        return Answer("cachestat", False, f"not tried: memfd_create: {error.strerror}")
    try:
        os.write(fd, b"x")
        works = facts.cached_pages(fd, 0, 1) is not None
    finally:
        os.close(fd)
    if works:
        return Answer("cachestat", True, "what is in the page cache can be seen")
    text = "not there (Linux 6.5): O_DIRECT that goes through the page cache is not noticed"
    return Answer("cachestat", False, text)


def _dioalign() -> Answer:
    def tells(path: str) -> bool:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                answer = ffi.new("uint32_t[2]")
                return not lib.dmb_statx_dio(fd, answer, answer + 1) and bool(answer[0])
            finally:
                os.close(fd)
        return False

    seen = next(filter(tells, (sys.executable, __file__, "/etc/passwd")), None)
    if seen:
        return Answer("statx DIOALIGN", True, f"O_DIRECT's alignment is told, as for {seen}")
    text = (
        "told for no file that was tried (Linux 6.1, and the filesystem has a say): found by trying"
    )
    return Answer("statx DIOALIGN", False, text)


def _populate() -> Answer:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        rc = lib.dmb_populate(address_of(memory), len(memory))
    if rc == 0:
        return Answer("populate", True, "page tables are filled at once (MADV_POPULATE_WRITE)")
    return Answer("populate", False, f"{os.strerror(-rc)}: first use of a buffer is slow")


# -- io_uring


@contextmanager
def _ring(flags: int) -> Iterator[tuple[Any, Any]]:
    """A ring of the core and what it turned out to have; OSError where there is none."""
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
            yield Answer("io_uring", True, "a ring was made; transfers go by it")
            yield _registered_buffers(ring, info)
            yield _registered_files(ring, info)
            yield _registered_dmabufs(ring)
            yield _setup("COOP_TASKRUN", info.setup_flags & _COOP_TASKRUN, "the default engine")
        with _ring(lib.DMB_RING_SINGLE_ISSUER) as (ring, info):
            owned = info.setup_flags & _SINGLE_ISSUER and info.setup_flags & _DEFER_TASKRUN
            yield _setup("DEFER_TASKRUN", owned, "an Engine of one's own")
    except OSError as error:
        yield Answer("io_uring", False, str(error.strerror), _uring_fix())


def _uring_fix() -> str:
    with suppress(OSError):
        path = "/proc/sys/kernel/io_uring_disabled"
        disabled = Path(path).read_text(encoding="ascii").strip()
        if disabled != "0":
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
        text = "the native route: a device that can moves bytes to and from a dma-buf by itself"
        return Answer("registered dma-bufs", True, text)
    return Answer("registered dma-bufs", False, no_native_kernel(-rc))


def _setup(name: str, taken: int, whose: str) -> Answer:
    detail = "fewer interruptions" if taken else "the kernel refused it: a little slower"
    return Answer(name, bool(taken), f"{detail}; for {whose}")


# -- exporters


def _exporters() -> Iterator[Answer]:
    yield _allocated("udmabuf", _udmabuf_limits, "chosen by auto; zero-copy")
    yield from _udmabuf_huge_pages()
    names = heap.names()
    for name in names:
        yield _allocated(name, lambda: "", "a dma-heap, staged to: by its name only", "dma-heap ")
    if not names:
        fix = "a kernel with CONFIG_DMABUF_HEAPS_SYSTEM"
        yield Answer("dma-heap", False, f"{heap.FOLDER} is not there or empty", fix)
    yield _allocated("memfd", lambda: "", "shared memory, zero-copy, but no dma-buf")
    yield from _huge_pages()


def _allocated(name: str, limits: Callable[[], str], what: str, prefix: str = "") -> Answer:
    try:
        exporters.allocate(mmap.PAGESIZE, exporter=name).close()
    except (OSError, ValueError) as error:
        where = getattr(error, "filename", None)
        text = getattr(error, "strerror", None) or str(error)
        text, _, fix = text.partition(" (")
        detail = f"{where}: {text}" if where else text
        return Answer(prefix + name, False, detail, fix.removesuffix(")") or None)
    return Answer(prefix + name, True, "; ".join(filter(None, (what, limits()))))


def _udmabuf_limits() -> str:
    """The module's parameters, as far as they can be read."""
    told = []
    for name, unit in (("size_limit_mb", " MiB a buffer"), ("list_limit", " items")):
        with suppress(OSError):
            path = Path(os.path.dirname(udmabuf.SIZE_LIMIT), name)
            told.append(path.read_text(encoding="ascii").strip() + unit)
    return f"at most {', '.join(told)}" if told else ""


def _udmabuf_huge_pages() -> Iterator[Answer]:
    name = "udmabuf of huge pages"
    with suppress(OSError):  # there is no udmabuf at all, and the answer before says why
        if udmabuf.maps_large_pages():
            yield Answer(name, True, "importers see the right bytes, by DMA and by the CPU")
        else:
            yield Answer(name, False, udmabuf.NO_HUGE_PAGES, udmabuf.NO_HUGE_PAGES_FIX)


def _huge_pages() -> Iterator[Answer]:
    for size in _memory._huge_page_sizes("/"):
        name = f"huge pages of {format_size(size)}"
        try:
            exporters.allocate(size, exporter="memfd", huge_pages=size).close()
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or str(error)
            text, _, fix = text.removeprefix("not tried: ").partition(" (")
            yield Answer(name, False, text, fix.removesuffix(")") or None)
        else:
            yield Answer(name, True, "a buffer was made of one")


# -- limits


def _memlock() -> Answer:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    may = _effective_capability(_CAP_IPC_LOCK)
    fix = "ulimit -l unlimited, LimitMEMLOCK=infinity in a systemd unit, or CAP_IPC_LOCK"
    if limit == resource.RLIM_INFINITY:
        return Answer("pinned memory", True, "RLIMIT_MEMLOCK is unlimited")
    told = f"RLIMIT_MEMLOCK is {format_size(limit)}, {'with' if may else 'without'} CAP_IPC_LOCK"
    if not may or limit >= _MOST_PINNED:
        unregistered = "larger buffers are used without registration"
        return Answer("pinned memory", may, f"{told}: {unregistered}", None if may else fix)
    try:
        exceeded = _pin(limit + mmap.PAGESIZE)
    except OSError as error:
        return Answer("pinned memory", may, f"{told}; not tried: {error.strerror}")
    if exceeded == 0:
        return Answer("pinned memory", True, f"{told}: more than that was pinned")
    text = f"{told}, which does not count in this user namespace ({os.strerror(-exceeded)})"
    return Answer("pinned memory", False, text, fix)


def _pin(size: int) -> int:
    """0, or -errno: whether so much can be pinned."""
    with _ring(0) as (ring, info), exporters.allocate(size, exporter="memfd") as buffer:
        if info.buffer_table:
            return int(info.buffer_table)
        rc = int(lib.dmb_ring_register_buffer(ring, 0, buffer._address, buffer.size))
        lib.dmb_ring_register_buffer(ring, 0, 0, 0)
        return rc


def _effective_capability(number: int) -> bool:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _nofile() -> Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"RLIMIT_NOFILE is {soft}: a buffer takes a descriptor for each slab, a file two"
    enough = soft >= 256
    return Answer("descriptors", enough, text, None if enough else f"ulimit -n {min(hard, 4096)}")


def _available_memory() -> Answer:
    figures = list(_memory._cgroup_figures("/"))
    table = _memory._table(_sysfs.read("/", "proc/meminfo"))
    if "MemAvailable" in table:
        figures.append((table["MemAvailable"], "MemAvailable in /proc/meminfo"))
    if not figures:
        return Answer("memory", False, "neither /proc/meminfo nor a cgroup tells", "mount /proc")
    have, where = min(figures)
    enough = have >= 64 << 20
    return Answer("memory", enough, f"{format_size(have)} for new buffers, by {where}")

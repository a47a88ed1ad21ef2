"""Shared helpers of the tests: data and poison, comparisons by plain pread, and block devices."""

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dmabuf
from dmabuf.transfer.ring import Ring
from tests.core import ffi, lib
from tests.emulation import Filter as Filter
from tests.emulation import in_the_middle as in_the_middle

PAGE = os.sysconf("SC_PAGESIZE")


def pattern(size: int, seed: int) -> bytes:
    """Return bytes that differ from any shift or swap of their blocks."""
    return random.Random(seed).randbytes(size)


_POISON = pattern(1 << 20, 0xDEAD)


def poison(size: int) -> bytes:
    """Return the content that a destination gets before a transfer."""
    return (_POISON * (size // len(_POISON) + 1))[:size]


def assert_same(got: bytes, expected: bytes, what: str) -> None:
    """Compare every byte; the error names the first that differs."""
    if got == expected:
        return
    assert len(got) == len(expected), f"{what}: {len(got)} bytes, not {len(expected)}"
    first = next(i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1])
    wrong = sum(a != b for a, b in zip(got, expected, strict=True))
    raise AssertionError(f"{what}: {wrong} bytes differ, the first at {first}")


@contextlib.contextmanager
def raises_errno(number: int, match: str | None = None, **attributes: object) -> Iterator[object]:
    """Expect an OSError with this errno, whose text matches, and which has these attributes."""
    import pytest  # here, because child processes import this module too

    with pytest.raises(OSError, match=match) as caught:
        yield caught
    error = caught.value
    found = {name: getattr(error, name) for name in attributes}
    assert (error.errno, found) == (number, attributes), repr(error)


def whole(fd: int, limit: int | None = None) -> bytes:
    """Return a whole file or block device, or its first `limit` bytes, by plain pread."""
    size = os.lseek(fd, 0, os.SEEK_END)
    size = size if limit is None else min(size, limit)
    parts, offset = [], 0
    while offset < size:
        part = os.pread(fd, min(size - offset, 1 << 24), offset)
        assert part
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def fill(fd: int, data: bytes, offset: int = 0) -> None:
    """Write `data` by plain pwrite."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + (1 << 24)], offset + done)


def drop_cache(fd: int) -> None:
    """Flush a file and drop its pages from the page cache."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cached(fd: int, offset: int = 0, size: int = 0) -> int:
    """Return the number of pages of a range in the page cache, by cachestat(2)."""
    answer = ffi.new("uint64_t *")
    rc = lib.dmb_cachestat(fd, offset, size or os.lseek(fd, 0, os.SEEK_END), answer)
    assert rc == 0, os.strerror(-rc)
    return int(answer[0])


def read_and_compare(
    file: dmabuf.File,
    reference: int,
    buffer: dmabuf.Buffer,
    size: int,
    file_offset: int = 0,
    buffer_offset: int = 0,
    **how: object,
) -> dmabuf.Transfer:
    """Read into a poisoned buffer and compare all of it, also around the range, with os.pread."""
    expected = bytearray(poison(buffer.size))
    there = os.pread(reference, size, file_offset)
    expected[buffer_offset : buffer_offset + len(there)] = there
    buffer.pwrite(poison(buffer.size), 0)
    transfer = file.read_into(
        buffer, size, file_offset=file_offset, buffer_offset=buffer_offset, **how
    )
    assert_same(buffer.pread(buffer.size, 0), bytes(expected), f"the buffer after {transfer}")
    assert transfer.nbytes == len(there)
    return transfer


def write_and_compare(
    file: dmabuf.File,
    reference: int,
    buffer: dmabuf.Buffer,
    size: int,
    file_offset: int = 0,
    buffer_offset: int = 0,
    limit: int | None = None,
    uncached: bool = False,
    **how: object,
) -> dmabuf.Transfer:
    """Write from a buffer and compare the whole file, also around the range, by os.pread.

    `limit` compares only the first bytes; `uncached` compares what reached the medium.
    """
    before = whole(reference, limit)
    content = poison(buffer.size)
    buffer.pwrite(content, 0)
    transfer = file.write_from(
        buffer, size, file_offset=file_offset, buffer_offset=buffer_offset, **how
    )
    end = file_offset + size if size else 0
    expected = bytearray(before) + bytes(max(0, end - len(before)))
    expected[file_offset : file_offset + size] = content[buffer_offset : buffer_offset + size]
    if uncached:
        drop_cache(reference)
    assert_same(whole(reference, limit), bytes(expected), f"the file after {transfer}")
    assert_same(buffer.pread(buffer.size, 0), content, "the buffer that was written from")
    assert transfer.nbytes == size
    return transfer


def ranges(seed: int, count: int, limit: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (file offset, buffer offset, size) at and beside blocks, pages and both ends."""
    dice = random.Random(seed)

    def near(top: int) -> int:
        mark = dice.choice([0, 512, 1024, PAGE, 2 * PAGE, 16384, 65536, top, dice.randint(0, top)])
        by = dice.choice([0, 0, 0, -1, 1, -512, 512, -PAGE, PAGE, 3])
        return min(max(mark + by, 0), top)

    yield 0, 0, min(limit, size)
    for number in range(1, count):
        file_offset = near(limit)
        # Half of them agree modulo a page, so that something can go straight.
        buffer_offset = near(size)
        if number % 2:
            buffer_offset = min(buffer_offset // PAGE * PAGE + file_offset % PAGE, size)
        yield file_offset, buffer_offset, near(min(limit - file_offset, size - buffer_offset))


def exercise(
    path: str | os.PathLike[str],
    buffer: dmabuf.Buffer,
    engine: dmabuf.Engine,
    *,
    routes: tuple[str, ...],
    limit: int,
    rounds: int = 12,
    seed: int = 1,
) -> set[str]:
    """Read and write a file or device in many ways, compare each, and return the routes chosen.

    The file has at least `limit` bytes, and its first `limit` bytes are overwritten.
    """
    reference = os.open(path, os.O_RDWR)
    chosen = set()
    try:
        fill(reference, pattern(limit, seed))
        drop_cache(reference)
        with dmabuf.open(path, "r+", engine=engine) as file:
            for number, where in enumerate(ranges(seed, rounds, limit, buffer.size)):
                file_offset, buffer_offset, size = where
                for route in (None, *routes):
                    how = {
                        "file_offset": file_offset,
                        "buffer_offset": buffer_offset,
                        "route": route,
                    }
                    for verb in ("read", "write"):
                        try:
                            plan = file.plan(buffer, verb, size=size, **how)
                        except dmabuf.RouteUnavailable:
                            assert route is not None
                            continue
                        if verb == "read":
                            transfer = read_and_compare(file, reference, buffer, size, **how)
                        else:
                            deep = number % 4 == 0
                            how |= {"limit": limit, "uncached": deep}
                            transfer = write_and_compare(file, reference, buffer, size, **how)
                        assert transfer.route is plan.route
                        assert transfer.rejected == plan.rejected
                        assert route is None or transfer.route == route
                        chosen |= {str(transfer.route)} if route is None and size else set()
    finally:
        os.close(reference)
    return chosen


def together(function: Callable[[int], object], count: int = 8) -> None:
    """Run function(0), function(1), ... in threads at the same time; raise the first exception."""
    start = threading.Barrier(count)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait()
            function(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def in_child(source: str, *arguments: object, timeout: float = 300) -> str:
    """Run Python source in its own process and return its standard output; it must exit with 0."""
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run(*command: object) -> str:
    """Run a program and return its standard output; it must exit with 0."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


PATIENCE = 120.0
"""Seconds until a test gives up on a state that takes moments, unless something is broken."""


def wait_until(condition: Callable[[], object], what: str = "the expected state") -> None:
    """Return when a condition is true; fail the test after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {PATIENCE} s"
        time.sleep(0.01)


# -- devices; all need root


def let_go(release: Callable[[], object]) -> None:
    """Release a device, as soon as the kernel has dropped its references to it.

    A worker of io_uring posts a completion before it drops its reference to the file, so a device
    can be busy for a moment after its last descriptor was closed. On Linux 6.12 the reference can
    wait until the thread of a ring enters the kernel for it again.
    """

    def released() -> bool:
        try:
            release()
        except (OSError, AssertionError) as error:
            if "busy" not in str(error):
                raise
            gc.unfreeze()  # which conftest.py froze, or they would not be listed
            for ring in gc.get_objects():
                if isinstance(ring, Ring) and ring.handle:
                    lib.dmb_ring_run_deferred(ring.handle)  # refused to all but the ring's owner
            return False
        return True

    wait_until(released, "the release of a busy device")


@contextlib.contextmanager
def loop_device(image: Path, size: int, block: int = 512) -> Iterator[str]:
    """Make a loop device over a new image, and return its path."""
    with image.open("wb") as file:
        file.truncate(size)
    device = run("losetup", "--find", "--show", "--sector-size", block, image)
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def partition(disk: str, start: int, size: int) -> Iterator[str]:
    """Make a partition of a disk without a table (BLKPG), and return its path."""
    fd = os.open(disk, os.O_RDWR)

    def request(operation: int) -> None:
        part = struct.pack("=qqi64s64s4x", start, size, 7, b"", b"")
        data = ctypes.create_string_buffer(part, len(part))
        argument = struct.pack("=iii4xQ", operation, 0, len(part), ctypes.addressof(data))
        fcntl.ioctl(fd, 0x1269, argument)  # BLKPG

    try:
        request(1)  # BLKPG_ADD_PARTITION
        try:
            yield f"{disk}p7"
        finally:
            request(2)  # BLKPG_DEL_PARTITION
    finally:
        os.close(fd)


@contextlib.contextmanager
def zram(size: int) -> Iterator[str]:
    """Make a compressed disk in memory with 4096-byte blocks, and return its path."""
    control = Path("/sys/class/zram-control")
    number = (control / "hot_add").read_text().strip()
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        node = Path(f"/dev/zram{number}")
        if not node.exists():
            major, minor = Path(f"/sys/block/zram{number}/dev").read_text().split(":")
            os.mknod(node, 0o600 | 0o060000, os.makedev(int(major), int(minor)))
        yield str(node)
    finally:
        let_go(lambda: (control / "hot_remove").write_text(number))


@contextlib.contextmanager
def mounted(
    device: str, filesystem: str, folder: Path, *options: str, how: str = "defaults"
) -> Iterator[Path]:
    """Make a filesystem on a device and mount it; `options` are for mkfs, `how` is for mount."""
    quiet = ["-F", "-q"] if filesystem == "ext4" else ["-f", "-q"]
    if filesystem == "btrfs":
        quiet = ["-f"]
    run(f"mkfs.{filesystem}", *quiet, *options, device)
    folder.mkdir(exist_ok=True)
    run("mount", "-t", filesystem, "-o", how, device, folder)
    try:
        yield folder
    finally:
        let_go(lambda: run("umount", folder))
        # A program that has copied the mounts meanwhile (unshare -m) keeps the device till it ends.
        wait_until(lambda: not is_claimed(device), f"{device} without a mount")


def is_claimed(device: str) -> bool:
    """Return whether a filesystem or another user of a block device has it for itself."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def swap_blocks(path: Path, donor: Path, size: int) -> None:
    """Swap a file's first blocks with new ones of `donor` (EXT4_IOC_MOVE_EXT), as e4defrag does.

    The file's bytes and its ctime stay the same.
    """
    with path.open("r+b") as file, donor.open("w+b") as other:
        os.posix_fallocate(other.fileno(), 0, size)
        count = size // PAGE
        move = bytearray(struct.pack("=IIQQQQ", 0, other.fileno(), 0, 0, count, 0))
        fcntl.ioctl(file, 0xC028660F, move)
    assert struct.unpack_from("=Q", move, 32)[0] == count, "blocks that have moved"


def has_program(name: str) -> bool:
    """Return whether a program is installed."""
    return shutil.which(name) is not None

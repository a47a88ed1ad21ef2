"""What the tests of transfers share: poison, references by os.pread, and devices to test on."""

import contextlib
import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dmabuf
from dmabuf._ffi import ffi, lib
from dmabuf.ring import Ring

PAGE = os.sysconf("SC_PAGESIZE")


def pattern(size: int, seed: int) -> bytes:
    """Bytes that no shift or swap of blocks leaves equal."""
    return random.Random(seed).randbytes(size)


_POISON = pattern(1 << 20, 0xDEAD)


def poison(size: int) -> bytes:
    """What a destination holds before a transfer."""
    return (_POISON * (size // len(_POISON) + 1))[:size]


def assert_same(got: bytes, expected: bytes, what: str) -> None:
    """Compare every byte, and name the first that differs."""
    if got == expected:
        return
    assert len(got) == len(expected), f"{what}: {len(got)} bytes, not {len(expected)}"
    first = next(i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1])
    wrong = sum(a != b for a, b in zip(got, expected, strict=True))
    raise AssertionError(f"{what}: {wrong} bytes differ, the first at {first}")


def whole(fd: int, limit: int | None = None) -> bytes:
    """All of a file or block device, or its first `limit` bytes, by plain pread."""
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
    """Write all of it by plain pwrite."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + (1 << 24)], offset + done)


def drop_cache(fd: int) -> None:
    """No page of the file in the page cache, and none dirty."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cached(fd: int, offset: int = 0, size: int = 0) -> int:
    """Pages of a range in the page cache, by cachestat(2)."""
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
    """read_into a poisoned buffer against os.pread, bytes around the range included."""
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
    """write_from a buffer against os.pread of the whole file, bytes around the range included.

    `limit` compares the first bytes only; `uncached` what has reached the medium.
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
    """Triples (file offset, buffer offset, size) at and beside blocks, pages and both ends."""
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
    """Read and write a file or device in many ways, each compared; the routes that were chosen.

    Its first `limit` bytes are overwritten, and the file is at least that long.
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


class Filter:
    """The core's seam: a function sees each completion of an engine and answers its result."""

    def __init__(self, engine: dmabuf.Engine, function) -> None:
        self.seen: list[tuple[int, int, int]] = []

        @ffi.callback("int32_t(void *, const struct dmb_completion *)", error=-5)
        def filtered(_arg: object, completion) -> int:
            self.seen.append((completion.offset, completion.size, completion.result))
            return function(completion)

        self._callback, self._engine = filtered, engine

    def __enter__(self) -> "Filter":
        for ring in self._engine._all_rings():
            lib.dmb_ring_set_filter(ring.handle, self._callback, ffi.NULL)
        return self

    def __exit__(self, *exc: object) -> None:
        for ring in self._engine._all_rings():
            if ring.handle is not None:
                lib.dmb_ring_set_filter(ring.handle, ffi.NULL, ffi.NULL)


def together(function: Callable[[int], object], count: int = 8) -> None:
    """Run function(0), function(1) ..., all at once; the first exception is raised."""
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


def in_child(source: str, *arguments: object, timeout: float = 60) -> str:
    """Run Python source in a process of its own; its standard output, once it exits with 0."""
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
    """Run a program of the system; its standard output."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


# -- devices; all need root


def let_go(release: Callable[[], object]) -> None:
    """Take a device away, once the kernel has let go of it too.

    A worker of io_uring posts a completion first and drops its reference to the file after, so a
    device may be busy for a moment when the last descriptor has been closed. An engine of this
    thread's own has to come by for that: on Linux 6.12 it was seen to be put off until then.
    """
    for _ in range(200):
        try:
            release()
        except (OSError, AssertionError) as error:
            if "busy" not in str(error):
                raise
            time.sleep(0.01)
            for ring in gc.get_objects():
                if isinstance(ring, Ring) and ring.handle and ring._owner == threading.get_ident():
                    lib.dmb_ring_settle(ring.handle)
        else:
            return
    release()


@contextlib.contextmanager
def loop_device(image: Path, size: int, block: int = 512) -> Iterator[str]:
    """A loop device over a new image; its path."""
    with image.open("wb") as file:
        file.truncate(size)
    device = run("losetup", "--find", "--show", "--sector-size", block, image)
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def zram(size: int) -> Iterator[str]:
    """A compressed disk in memory, with blocks of 4096 bytes; its path."""
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
    """A fresh filesystem on a device, mounted; `options` are those of mkfs, `how` of mount."""
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


def has_program(name: str) -> bool:
    """Whether a program is installed."""
    return shutil.which(name) is not None

"""Devices and filesystems that a host can have: loop and zram disks, ext4 and xfs on them.

All need root, and the device or the program: each says so where it is skipped.
"""

import asyncio
import contextlib
import errno
import itertools
import mmap
import os
import sys
from array import array

import pytest

import dmabuf
from dmabuf import Engine, Route, aio
from dmabuf.kernel import files
from dmabuf.transfer.target import GONE
from tests.guards import demand, needs
from tests.support import (
    PAGE,
    Filter,
    assert_same,
    cached,
    drop_cache,
    exercise,
    fill,
    loop_device,
    mounted,
    partition,
    pattern,
    poison,
    raises_errno,
    run,
    together,
    wait_until,
    whole,
    zram,
)

MIB = 1 << 20
LIMIT = 300 << 10
ALL = ("direct", "staged", "buffered")


@pytest.fixture(scope="module")
def buf():
    with dmabuf.allocate(LIMIT, exporter="memfd") as buffer:
        yield buffer


@pytest.fixture(scope="module", params=["auto", "threads"])
def engine(request):
    with Engine(queue_depth=5, block_size="16KiB", backend=request.param) as made:
        yield made


@needs("loop")
@pytest.mark.parametrize("block", [512, 4096])
def test_a_loop_device(tmp_path, buf, engine, block):
    with loop_device(tmp_path / "image", 4 << 20, block) as device:
        with dmabuf.open(device) as file:
            assert (file.kind, file.size) == ("block device", 4 << 20)
            assert file.target.direct().alignment.offset == block
        chosen = exercise(device, buf, engine, routes=ALL, limit=LIMIT)
        assert "direct" in chosen


@needs("zram")
def test_zram(buf, engine):
    """It states that memory need be aligned to 512 bytes only, and then spoils what is beside."""
    with zram(4 << 20) as device:
        with dmabuf.open(device) as file:
            assert file.target.direct().alignment == files.Alignment(PAGE, 4096)
        assert "direct" in exercise(device, buf, engine, routes=ALL, limit=LIMIT)


_KERNEL_THREADS = """
import sys
from pathlib import Path

import dmabuf

buf = dmabuf.allocate("32MiB", exporter="memfd")
engine = dmabuf.Engine(queue_depth=16, block_size="256KiB")
with buf, dmabuf.open(sys.argv[1], engine=engine) as file:
    record = file.read_into(buf, "32MiB", route=sys.argv[2])
    assert (record.nbytes, record.route) == (32 << 20, sys.argv[2])
    threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
print(sum(name.startswith("iou-wrk") for name in threads))
"""


def _kernel_threads(target, route="direct"):
    """How many of the kernel's threads have worked for io_uring after a large read."""
    return int(run(sys.executable, "-c", _KERNEL_THREADS, str(target), route))


@needs("zram", "io_uring")
def test_zram_is_staged_without_the_kernel_s_threads():
    """Threads of ours read, and copy what they have in their processor's cache."""
    with zram(64 << 20) as device:
        run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=32", "oflag=direct")
        assert _kernel_threads(device, "staged") == 0


@needs("loop", "io_uring")
def test_a_device_that_takes_requests_at_once_needs_no_thread(tmp_path):
    with loop_device(tmp_path / "image", 32 << 20) as device:
        assert _kernel_threads(device) == 0


@needs("loop")
def test_the_end_of_a_device(tmp_path, buf):
    with loop_device(tmp_path / "image", 1 << 20) as device:
        reference = os.open(device, os.O_RDWR)
        fill(reference, pattern(1 << 20, 1))
        with dmabuf.open(device, "r+") as file:
            end = (1 << 20) - 1000
            assert file.read_into(buf, 5000, file_offset=end).nbytes == 1000
            assert buf.pread(1000, 0) == pattern(1 << 20, 1)[end:]
            assert file.read_into(buf, file_offset=end).nbytes == 1000
            with raises_errno(errno.ENOSPC, filename=device) as caught:
                file.write_from(buf, 5000, file_offset=end)
            assert caught.value.nbytes == 0 and "the device ends at 1048576" in str(caught.value)
            with raises_errno(errno.ENOSPC):
                file.write_segments(buf, _triple(1 << 20, 0, 1))
        assert_same(whole(reference), pattern(1 << 20, 1), "the device")
        os.close(reference)


@needs("loop")
@pytest.mark.parametrize(
    ("kind", "verb", "sync"),
    [
        ("disk", "read", False),
        ("disk", "write", False),
        ("disk", "write", True),
        ("partition", "read", False),
        ("partition", "write", True),
    ],
)
def test_a_device_that_is_gone_under_a_transfer(tmp_path, buf, engine, kind, verb, sync):
    """Its size is 0 then, as of a drive that was pulled: after a request, or before the flush.

    A partition keeps its size until it is removed, and a loop device still writes there.
    """
    image, numbers = tmp_path / "image", itertools.count(1)  # workers complete at the same time

    def gone():
        os.truncate(image, 0)  # a write in flight may have made it longer again
        run("losetup", "--set-capacity", disk)
        return run("blockdev", "--getsize64", disk) == "0"

    def vanish(completion):
        if next(numbers) == (-(-LIMIT // engine.block_size) if sync else 1):
            wait_until(gone, "a disk without bytes")
        return completion.result

    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(loop_device(image, LIMIT))
        device = disk
        if kind == "partition":
            device = stack.enter_context(partition(disk, 0, LIMIT))
        file = stack.enter_context(dmabuf.open(device, "r+", engine=engine))
        with (
            Filter(vanish),
            raises_errno(errno.ENODEV, GONE, filename=device) as caught,
        ):
            if verb == "read":
                file.read_into(buf, route="direct")
            else:
                file.write_from(buf, route="direct", sync=sync)
        assert caught.value.nbytes < LIMIT and (not sync or caught.value.nbytes == 0)
        calls = [lambda: file.read_into(buf), lambda: file.write_from(buf), lambda: file.size]
        for call in calls if kind == "disk" else calls[:1]:
            with raises_errno(errno.ENODEV, GONE, filename=device, nbytes=0):
                call()


def _triple(*numbers):
    return array("Q", numbers)


@needs("loop")
def test_a_device_is_opened_by_many_at_once(tmp_path):
    """Whether it is mounted is found out by a claim, which must not refuse the others."""
    with loop_device(tmp_path / "image", 1 << 20) as device:

        def open_often(_):
            for _ in range(200):
                dmabuf.open(device, "r+").close()

        together(open_often, 4)


@needs("ext4")
def test_a_mounted_device_is_not_written(tmp_path, buf):
    with loop_device(tmp_path / "image", 4 << 20) as device:
        with mounted(device, "ext4", tmp_path / "mount") as folder:
            (folder / "precious").write_bytes(b"precious")
            for mode in ("w", "r+"):
                with raises_errno(errno.EBUSY, "unmount it, or pass force=True", filename=device):
                    dmabuf.open(device, mode)
            with dmabuf.open(device) as file:
                assert file.read_into(buf, 4096).nbytes == 4096
            with dmabuf.open(device, "r+", force=True) as file:
                assert file.writable()
        with dmabuf.open(device, "r+") as file:
            assert file.write_from(buf, 100).nbytes == 100


FILESYSTEMS = [
    pytest.param("ext4", ["-b", "1024"], 512, marks=[], id="ext4 of 1 KiB blocks"),
    pytest.param("ext4", ["-b", "4096"], 4096, marks=[], id="ext4 of 4 KiB sectors"),
    pytest.param("xfs", [], 512, marks=[], id="xfs"),
]


@needs("ext4", "xfs")
@pytest.mark.parametrize(("kind", "options", "block"), FILESYSTEMS)
def test_filesystems(tmp_path, buf, engine, kind, options, block):
    size = (320 if kind == "xfs" else 16) << 20
    with (
        loop_device(tmp_path / "image", size, block) as device,
        mounted(device, kind, tmp_path / "mount", *options) as folder,
    ):
        path = folder / "file"
        path.write_bytes(bytes(LIMIT))
        assert "direct" in exercise(path, buf, engine, routes=ALL, limit=LIMIT, rounds=8)
        grown = folder / "grown"
        buf.pwrite(poison(LIMIT), 0)
        for route in (None, *ALL):
            with dmabuf.open(grown, "w", engine=engine) as file:
                where = {"file_offset": 777, "buffer_offset": 777}
                transfer = file.write_from(buf, LIMIT - 1234, route=route, **where)
            expected = bytes(777) + poison(LIMIT)[777 : LIMIT - 457]
            assert_same(grown.read_bytes(), expected, f"{transfer}")


@needs("ext4", "xfs")
@pytest.mark.parametrize(("kind", "options", "block"), FILESYSTEMS)
def test_small_requests_past_a_file_s_cached_pages(tmp_path, buf, kind, options, block):
    """Nothing need be seen to leave the cache alone where statx(2) is known to be right."""
    size = (320 if kind == "xfs" else 16) << 20
    with (
        loop_device(tmp_path / "image", size, block) as device,
        mounted(device, kind, tmp_path / "mount", *options) as folder,
    ):
        path = folder / "file"
        path.write_bytes(pattern(LIMIT, 1))
        with dmabuf.open(path, "r+") as file:
            assert cached(file.fileno()) == LIMIT // PAGE
            for done in (
                file.read_into(buf, PAGE, file_offset=2 * PAGE, buffer_offset=2 * PAGE),
                file.write_from(buf, PAGE, file_offset=PAGE, buffer_offset=2 * PAGE),
            ):
                assert done.route is Route.DIRECT and "one small request" in done.registration
        page = pattern(LIMIT, 1)[2 * PAGE : 3 * PAGE]
        assert_same(buf.pread(PAGE, 2 * PAGE), page, "the buffer")
        expected = pattern(LIMIT, 1)[:PAGE] + page + pattern(LIMIT, 1)[2 * PAGE :]
        assert_same(path.read_bytes(), expected, "the file")


@needs("ext4")
@pytest.mark.parametrize("route", [None, *ALL])
def test_a_full_disk(tmp_path, route):
    """Nothing is written, nothing else is lost, and there is room again."""
    with (
        loop_device(tmp_path / "image", 4 << 20) as device,
        mounted(device, "ext4", tmp_path / "mount") as folder,
    ):
        other = folder / "other"
        other.write_bytes(pattern(100_000, 1))
        path = folder / "file"
        path.write_bytes(b"old")
        free = _free(folder)
        with (
            dmabuf.allocate(8 << 20, exporter="memfd") as buffer,
            dmabuf.open(path, "r+") as file,
        ):
            for offset in (0, 3 * PAGE, 64 << 20):
                with pytest.raises(OSError, match="growing the file") as caught:
                    file.write_from(buffer, file_offset=offset, route=route)
                error = caught.value
                assert (error.errno, error.filename) == (errno.ENOSPC, str(path))
                assert error.nbytes == 0
                assert path.read_bytes() == b"old"
        run("sync", "-f", folder)
        assert _free(folder) >= free - 65536
        assert_same(other.read_bytes(), pattern(100_000, 1), "the other file")


@needs("loop", "ext4")
@pytest.mark.parametrize("extents", [True, False])
def test_holes_of_a_file_on_a_full_disk(tmp_path, extents):
    """Their blocks are there before the first byte is written, where ext4 can have them so."""
    options = [] if extents else ["-O", "^extents,^64bit"]
    with (
        loop_device(tmp_path / "image", 8 << 20) as device,
        mounted(device, "ext4", tmp_path / "mount", *options) as folder,
        dmabuf.allocate(8 << 20, exporter="memfd") as buffer,
    ):
        path = folder / "file"
        path.write_bytes(pattern(MIB, 1))
        os.truncate(path, 64 << 20)
        buffer.pwrite(pattern(8 << 20, 2), 0)
        with dmabuf.open(path, "r+") as file:
            assert file.write_from(buffer, MIB, file_offset=2 * MIB).nbytes == MIB
            match = "allocating a hole's blocks" if extents else "No space left"
            with raises_errno(errno.ENOSPC, match, filename=str(path)) as caught:
                file.write_from(buffer, 8 << 20, file_offset=8 << 20)
            if extents:
                assert caught.value.nbytes == 0
            assert path.stat().st_size == 64 << 20
            assert file.write_from(buffer, MIB, file_offset=0).nbytes == MIB
        with path.open("rb") as file:
            assert_same(file.read(MIB), pattern(8 << 20, 2)[:MIB], "what was there, overwritten")
            assert_same(file.read(MIB), bytes(MIB), "a hole")
            assert_same(file.read(MIB), pattern(8 << 20, 2)[:MIB], "a hole, written")
            assert_same(file.read(5 * MIB), bytes(5 * MIB), "a hole")


def _free(folder):
    return os.statvfs(folder).f_bfree * os.statvfs(folder).f_bsize


@needs("xfs")
def test_a_disk_that_fills_while_a_hole_is_written(tmp_path):
    """But on ext4 nothing is allocated first: ENOSPC comes from the writes themselves."""
    with (
        loop_device(tmp_path / "image", 320 << 20) as device,
        mounted(device, "xfs", tmp_path / "mount") as folder,
    ):
        with (folder / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, _free(folder) - (4 << 20))
        path = folder / "sparse"
        with path.open("wb") as plain:
            plain.truncate(8 << 20)
        with (
            dmabuf.allocate(8 << 20, exporter="memfd") as buffer,
            Engine(queue_depth=2, block_size="64KiB") as engine,
            dmabuf.open(path, "r+", engine=engine) as file,
        ):
            buffer.pwrite(poison(8 << 20), 0)
            with pytest.raises(OSError) as caught:
                file.write_from(buffer)
            error = caught.value
            assert (error.errno, error.filename) == (errno.ENOSPC, str(path))
            assert 0 < error.nbytes < 4 << 20
            assert file.size == 8 << 20
            got = file.read_into(buffer, error.nbytes)
            assert got.nbytes == error.nbytes
            assert_same(buffer.pread(got.nbytes, 0), poison(got.nbytes), "what is whole")


@needs("ext4")
def test_a_file_larger_than_the_filesystem_has(tmp_path, buf):
    with (
        loop_device(tmp_path / "image", 4 << 20) as device,
        mounted(device, "ext4", tmp_path / "mount", "-b", "1024") as folder,
        dmabuf.open(folder / "file", "w") as file,
    ):
        with pytest.raises(OSError) as caught:
            file.write_from(buf, file_offset=1 << 50)
        assert caught.value.errno == errno.EFBIG and file.size == 0


@needs("ext4")
def test_ext4_that_journals_data_is_not_called_direct(tmp_path, buf):
    with (
        loop_device(tmp_path / "image", 16 << 20) as device,
        mounted(device, "ext4", tmp_path / "mount", how="data=journal") as folder,
    ):
        path = folder / "file"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        fill(fd, pattern(LIMIT, 1))
        drop_cache(fd)
        os.close(fd)
        with dmabuf.open(path) as file:
            first = file.read_into(buf)
            assert first.route is Route.BUFFERED
            assert "O_DIRECT" in first.rejected.get(Route.DIRECT, first.reason)
            assert "O_DIRECT" in file.plan(buf).rejected[Route.DIRECT]
        assert_same(buf.pread(LIMIT, 0), pattern(LIMIT, 1), "the buffer")


# -- what others read of a target while it is written


class Racing:
    """A reader of a target whose reads begin before each write is done, and end after it.

    The page cache then has what the target held before, as the filter of an engine arranges by the
    image below the target. `mapped`: the reader has mapped the target, so its pages stay in use.
    """

    def __init__(self, image, target, mapped):
        self._image = os.open(image, os.O_RDWR)
        self.plain = os.open(target, os.O_RDWR)
        self._old = whole(self.plain)
        self._map = mmap.mmap(self.plain, len(self._old)) if mapped else None

    def __call__(self, completion):
        size, offset = completion.size, completion.offset
        if completion.direction == 1 and completion.result == size:
            new = os.pread(self._image, size, offset)
            os.pwrite(self._image, self._old[offset : offset + size], offset)
            os.pread(self.plain, size, offset)
            if self._map is not None:
                assert self._map[offset : offset + size : PAGE]
            os.pwrite(self._image, new, offset)
        return completion.result

    def medium(self):
        """What the target holds, whatever the page cache has."""
        return whole(self._image)

    def close(self):
        if self._map is not None:
            self._map.close()
        os.close(self._image)
        os.close(self.plain)


@pytest.fixture
def racing(tmp_path):
    """(path, a function that begins the race): a target of 1 MiB that others read."""
    demand("io_uring", "loop")
    image, racers = tmp_path / "image", []
    with loop_device(image, 1 << 20) as path:
        image.write_bytes(pattern(1 << 20, 1))

        def begin(mapped):
            racers.append(Racing(image, path, mapped))
            return racers[-1]

        yield path, begin
        for racer in racers:
            racer.close()


def _by_file(target, buffer, size, racer, route):
    with (
        Engine(queue_depth=4, block_size="64KiB") as engine,
        Filter(racer),
        dmabuf.open(target, "r+", engine=engine) as file,
    ):
        record = file.write_from(buffer, size, file_offset=PAGE, route=route)
        assert record.route == (route or Route.DIRECT)


def _by_aio(target, buffer, size, racer, route):
    async def write():
        async with await aio.open(target, "r+") as file:
            with Filter(racer):
                for _ in range(2):  # the first learns about the file
                    await file.write_from(buffer, size, file_offset=PAGE, route=route)

    asyncio.run(write())


def _by_copy(target, buffer, size, racer, _route):
    with Filter(racer):
        dmabuf.copy(buffer, target, size=size, dst_offset=PAGE)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("move", "size", "route"),
    [
        pytest.param(_by_file, LIMIT - 300, None, id="direct"),
        pytest.param(_by_file, LIMIT - 300, "staged", id="staged"),
        pytest.param(_by_file, 3 * 512, "staged", id="blocks"),
        pytest.param(_by_aio, LIMIT - 300, None, id="aio"),
        pytest.param(_by_aio, PAGE, None, id="aio, one request"),
        pytest.param(_by_copy, LIMIT - 300, None, id="copy"),
    ],
)
def test_what_others_read_meanwhile_is_not_stale(racing, buf, move, size, route, mapped):
    target, begin = racing
    buf.pwrite(pattern(LIMIT, 2), 0)
    racer = begin(mapped)
    move(target, buf, size, racer, route)
    expected = bytearray(pattern(1 << 20, 1))
    expected[PAGE : PAGE + size] = pattern(LIMIT, 2)[:size]
    assert_same(racer.medium(), expected, "the medium")
    assert_same(whole(racer.plain), expected, "the page cache")
    with dmabuf.open(target, "r+") as file:
        file.write_from(buf, 100, file_offset=PAGE + 7, buffer_offset=7, sync=True)
    assert_same(racer.medium(), expected, "the medium, after a write through the cache")


@needs("loop")
@pytest.mark.parametrize("route", ["direct", "staged"])
@pytest.mark.parametrize("size", [512, 2560, PAGE + 1024])
def test_blocks_that_are_no_pages_are_written_as_a_whole(tmp_path, buf, engine, route, size):
    """A write that begins and ends at blocks has no edges: nothing of it is in the page cache."""
    with loop_device(tmp_path / "image", 1 << 20) as device:
        fill(fd := os.open(device, os.O_RDWR), pattern(1 << 20, 1))
        drop_cache(fd)
        buf.pwrite(pattern(LIMIT, 2), 0)
        with dmabuf.open(device, "r+", engine=engine) as file:
            where = {"file_offset": 512 * 13, "buffer_offset": 1024}
            record = file.write_from(buf, size, route=route, **where)
        assert record.copied == (0 if route == "direct" else size)
        assert cached(fd) == 0
        expected = bytearray(pattern(1 << 20, 1))
        expected[512 * 13 : 512 * 13 + size] = pattern(LIMIT, 2)[1024 : 1024 + size]
        assert_same(whole(fd), expected, "the device")
        os.close(fd)

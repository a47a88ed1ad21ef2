"""What transfers do to the page cache, and take from it."""

import errno
import os

import pytest

import dmabuf
from dmabuf import Route
from dmabuf.kernel import files
from tests.core import ffi, lib
from tests.support import PAGE, Filter, assert_same, cached, drop_cache, in_child, pattern, poison

SIZE = 1 << 20


def _cachestat_missing():
    return lib.dmb_cachestat(0, 0, 1, ffi.new("uint64_t *")) == -errno.ENOSYS


pytestmark = pytest.mark.skipif(_cachestat_missing(), reason="needs cachestat(2), of Linux 6.5")


@pytest.fixture
def cold(tmp_path):
    """(path, descriptor) of SIZE bytes, none of them cached."""
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    fd = os.open(path, os.O_RDWR)
    drop_cache(fd)
    assert cached(fd) == 0
    yield path, fd
    os.close(fd)


RANGES = [(0, SIZE), (1, SIZE - 2), (PAGE, PAGE), (700, 9000), (SIZE - 100, 100)]


@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("route", ["direct", "staged"])
def test_reads_leave_it_alone(cold, buf, route, where):
    path, fd = cold
    offset, size = where
    with dmabuf.open(path) as file:
        at = offset % PAGE
        try:
            file.read_into(
                buf, min(size, SIZE - at), file_offset=offset, buffer_offset=at, route=route
            )
        except dmabuf.RouteUnavailable:
            assert (route, where) == ("direct", RANGES[-1])
    assert cached(fd) == 0


@pytest.mark.parametrize("where", [*RANGES[:-1], (SIZE + 5, 20_000)])
@pytest.mark.parametrize("route", ["direct", "staged"])
def test_writes_leave_it_alone(cold, buf, route, where):
    """Their edges go through it, and are written out and dropped again."""
    path, fd = cold
    offset, size = where
    with dmabuf.open(path, "r+") as file:
        at = offset % PAGE
        file.write_from(
            buf, min(size, SIZE - at), file_offset=offset, buffer_offset=at, route=route
        )
        assert file.plan(buf).route is Route.DIRECT  # and O_DIRECT was not taken for a sham
    assert cached(fd) == 0


def test_what_is_cached_is_not_stale(cold, buf):
    """A plain reader sees what was written past the cache, and we see what a writer left in it."""
    path, fd = cold
    os.pread(fd, SIZE, 0)
    with dmabuf.open(path, "r+") as file:
        file.write_from(buf, SIZE - 100, file_offset=50, buffer_offset=50)
        expected = pattern(SIZE, 1)[:50] + poison(SIZE)[50:-50] + pattern(SIZE, 1)[-50:]
        assert_same(os.pread(fd, SIZE, 0), expected, "the file")
        os.pwrite(fd, b"dirty", 12345)
        file.read_into(buf, route="direct")
        assert buf.pread(5, 12345) == b"dirty"


def test_prefer_fastest(cold, buf):
    path, fd = cold
    with dmabuf.open(path) as file:
        assert file.plan(buf, prefer="fastest").route is Route.DIRECT
        assert file.read_into(buf, prefer="fastest").route is Route.DIRECT
        os.pread(fd, SIZE, 0)
        assert cached(fd) == SIZE // PAGE
        assert file.plan(buf).route is Route.DIRECT
        plan = file.plan(buf, prefer="fastest")
        assert plan.route is Route.BUFFERED
        assert "in the page cache" in plan.rejected[Route.DIRECT]
        buf.pwrite(poison(SIZE), 0)
        hot = file.read_into(buf, prefer="fastest")
        assert (hot.route, hot.rejected) == (plan.route, plan.rejected)
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")
        with pytest.raises(dmabuf.RouteUnavailable, match="prefer='fastest'"):
            file.read_into(buf, prefer="fastest", require="zero-copy")


def test_half_of_it_cached_is_not_enough(cold, buf):
    path, fd = cold
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, SIZE // 2, 0)
    with dmabuf.open(path) as file:
        assert file.plan(buf, prefer="fastest").route is Route.DIRECT
        assert file.plan(buf, size=SIZE // 4, prefer="fastest").route is Route.BUFFERED


def _make_unknown(monkeypatch):
    """Have all files on a filesystem of which nothing is known."""
    monkeypatch.setattr(files, "_filesystems", {})
    monkeypatch.setattr(lib, "dmb_statfs_type", lambda _fd: 0)


@pytest.fixture
def through_the_cache(cold, monkeypatch):
    """A filesystem that takes O_DIRECT and does as it likes, made of a good one and the cache.

    Called with how often the file is in the page cache before the kernel is asked about it.
    """
    _, fd = cold
    real = lib.dmb_cachestat
    _make_unknown(monkeypatch)

    def arrange(times):
        left = [times]

        def cachestat(*arguments):
            if left[0]:
                left[0] -= 1
                os.pread(fd, SIZE, 0)
                os.pread(fd, SIZE, SIZE)
            return real(*arguments)

        monkeypatch.setattr(lib, "dmb_cachestat", cachestat)

    return arrange


class Arranged:
    """A completion filter that has the cache filled once the bytes have moved."""

    def __init__(self, arrange, times):
        self._arrange, self._times = arrange, times

    def __call__(self, completion):
        if self._times:
            self._arrange(self._times)
            self._times = 0
        return completion.result


@pytest.mark.parametrize("there", [0, SIZE // PAGE // 4])
def test_o_direct_that_goes_through_the_cache_is_called_buffered(
    cold, there, buf, through_the_cache
):
    """A few pages are there before: finding out the alignment may have brought them."""
    path, fd = cold
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, there * PAGE, 0)
    assert cached(fd) == there
    with dmabuf.open(path) as file:
        assert file.plan(buf).route is Route.DIRECT
        with Filter(Arranged(through_the_cache, 1000)):
            first = file.read_into(buf)
        assert first.route is Route.BUFFERED
        assert "but used the page cache" in first.reason
        plan = file.plan(buf)
        assert plan.route is Route.BUFFERED
        assert "btrfs does for compressed files" in plan.rejected[Route.STAGED]
        with pytest.raises(dmabuf.RouteUnavailable, match="used the page cache"):
            file.read_into(buf, require="uncached")
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


def test_and_what_was_required_says_so_after_the_first(cold, buf, through_the_cache):
    path, _ = cold
    with dmabuf.open(path, "r+") as file:
        with (
            Filter(Arranged(through_the_cache, 1000)),
            pytest.raises(dmabuf.RouteUnavailable, match="the bytes have moved") as caught,
        ):
            file.write_from(buf, require="zero-copy", file_offset=SIZE)
        assert caught.value.nbytes == SIZE
        assert file.size == 2 * SIZE  # what has moved stays
    assert_same(path.read_bytes()[SIZE:], poison(SIZE), "the file")


def test_pages_that_somebody_else_had_read_do_not_count(cold, buf, through_the_cache):
    """A neighbour's buffered read, with what the kernel reads ahead of it."""
    path, _ = cold
    with dmabuf.open(path) as file:
        with Filter(Arranged(through_the_cache, 1)):
            assert file.read_into(buf).route is Route.DIRECT
        assert file.plan(buf).route is Route.DIRECT
    with dmabuf.open(path, "w") as file:
        assert file.write_from(buf).route is Route.DIRECT


def test_btrfs_with_checksums_is_not_written_past_the_cache(cold, buf, monkeypatch):
    """What was read of it does not make small writes go past it."""
    path, _ = cold
    _make_unknown(monkeypatch)
    real = files.open_direct

    def open_direct(*args, **how):
        return real(*args, **how)._replace(proven=True, no_writes="sums")

    monkeypatch.setattr(files, "open_direct", open_direct)
    with dmabuf.open(path, "r+") as file:
        for _ in range(2):
            assert file.read_into(buf, PAGE).route is Route.DIRECT
            buf.pwrite(poison(SIZE), 0)
            written = file.write_from(buf, PAGE)
            assert (written.route, written.rejected[Route.DIRECT]) == (Route.BUFFERED, "sums")
            with pytest.raises(dmabuf.RouteUnavailable, match="sums"):
                file.write_from(buf, PAGE, require="uncached")
    assert_same(path.read_bytes(), poison(SIZE)[:PAGE] + pattern(SIZE, 1)[PAGE:], "the file")


def test_kernels_without_cachestat_are_believed(cold, buf, monkeypatch):
    path, _ = cold
    monkeypatch.setattr(files, "cached_pages", lambda *_: None)
    with dmabuf.open(path) as file:
        assert file.read_into(buf).route is Route.DIRECT
        assert file.plan(buf, prefer="fastest").route is Route.DIRECT


_BOUND = """
import sys, dmabuf
def status(name):
    line = [line for line in open("/proc/self/status") if line.startswith(name)][0]
    return int(line.split()[1]) << 10
size, route, verb = 256 << 20, sys.argv[2], sys.argv[3]
with dmabuf.open(sys.argv[1], "r+") as file, dmabuf.allocate(size, exporter="memfd") as buffer:
    file.read_into(buffer, 4096) # the engine, the rings
    resident, mapped = status("VmRSS"), status("VmSize")
    how = {} if route == "chosen" else {"route": route}
    if verb == "read":
        assert file.read_into(buffer, **how).nbytes == size
    else:
        assert file.write_from(buffer, **how).nbytes == size
    print(status("VmHWM") - resident, status("VmPeak") - mapped)
"""


@pytest.mark.parametrize("how", [("staged", "read"), ("staged", "write"), ("chosen", "read")])
def test_memory_is_bounded_by_depth_times_block(tmp_path, how):
    """256 MiB of holes through a default engine of 32 requests of 1 MiB."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(256 << 20)
    resident, mapped = map(int, in_child(_BOUND, path, *how).split())
    bound = (32 << 20) + (4 << 20) if how[0] == "staged" else 4 << 20
    assert resident <= bound
    assert mapped <= bound + (4 << 20)

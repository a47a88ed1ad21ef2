"""Waiting for real fences: vgem's, which a test attaches and signals as it likes."""

import errno
import mmap
import os
import select
import threading
import time
from contextlib import contextmanager

import pytest

import dmabuf
from dmabuf import RouteUnavailable
from dmabuf.kernel import uapi
from dmabuf.memory import allocate, from_fd
from tests.guards import needs
from tests.kernel.vgem import PATIENCE
from tests.resources import held
from tests.support import assert_same, pattern, poison, raises_errno

PAGE = mmap.PAGESIZE
SIZE = 256 << 10  # 256 x 256 pixels of 4 bytes


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def buf(card):
    with from_fd(card.fd) as buffer:
        assert buffer.size == SIZE
        yield buffer


def signalled(fd):
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


@contextmanager
def timed_out(at_least):
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="a device still") as caught:
        yield caught
    assert time.monotonic() - begun >= at_least
    assert caught.value.errno == errno.ETIMEDOUT


# -- Buffer.wait


@needs("vgem")
def test_a_writer_holds_off_everyone(card, buf):
    buf.wait("read", 0)
    buf.wait("write", 0)
    job = card.job("write")
    for direction in ("read", "write"):
        with timed_out(0):
            buf.wait(direction, timeout=0)
        with timed_out(0.05):
            buf.wait(direction, timeout=0.05)
    card.done(job)
    buf.wait("read", 0)
    buf.wait("write", 0)


@needs("vgem")
def test_a_reader_holds_off_writers_only(card, buf):
    job = card.job("read")
    buf.wait("read", 0)
    with timed_out(0.05):
        buf.wait("write", 0.05)
    with card.ending(job):
        buf.wait("write", PATIENCE)


@needs("vgem")
def test_a_wait_lasts_until_the_last_job(card, buf):
    first, second = card.job("read"), card.job("read")
    with card.ending(first, second):
        buf.wait("write")


@needs("vgem")
def test_threads_wait_beside_each_other(card, buf):
    job, ended = card.job("write"), []

    def wait(direction):
        buf.wait(direction, PATIENCE)
        ended.append(direction)

    threads = [threading.Thread(target=wait, args=[way]) for way in ("read", "write") * 4]
    for thread in threads:
        thread.start()
    assert ended == []
    card.done(job)
    for thread in threads:
        thread.join()
    assert len(ended) == 8


# -- CPU access


@needs("vgem")
@pytest.mark.device_table("DRM GPU", "fence")
def test_cpu_access_waits_by_itself(card, buf):
    with card.ending(card.job("write")):
        buf.pread(1, 0)
    job = card.job("read")
    with buf.map("r"):
        pass  # beside another reader
    with card.ending(job), buf.map("r+"):
        assert not card.fences


# -- transfers into and out of a device's memory


@pytest.fixture
def drive():
    """A drive's first bytes, as they are wanted."""
    path = os.environ["DMABUF_TEST_NVME0"]
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, pattern(SIZE, 1), 0)
    os.fsync(fd)
    with dmabuf.open(path, "r+") as file:
        yield file, fd
    os.close(fd)


@needs("vgem", "nvme")
@pytest.mark.parametrize("route", ["staged", "buffered"])
@pytest.mark.parametrize("size", [SIZE, PAGE + 5])
@pytest.mark.device_table("DRM GPU", "fence", "read")
def test_a_read_waits_for_all_who_use_the_buffer(card, buf, drive, route, size):
    file, _ = drive
    buf.pwrite(poison(SIZE), 0)
    for access in ("read", "write"):
        job = card.job(access)
        with timed_out(0.05) as caught:
            file.read_into(buf, size, route=route, timeout=0.05)
        assert (caught.value.nbytes, caught.value.filename) == (0, file.name)
        card.done(job)
        assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer after a wait in vain")
    with card.ending(card.job("read")):
        assert file.read_into(buf, size, route=route, timeout=PATIENCE).nbytes == size
    assert buf.pread(SIZE, 0) == pattern(SIZE, 1)[:size] + poison(SIZE)[size:]


@needs("vgem")
@pytest.mark.device_table("DRM GPU", "fence", "write")
def test_a_write_waits_for_those_who_write_the_buffer(card, buf, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"as it was")
    buf.pwrite(pattern(SIZE, 2), 0)
    with dmabuf.open(path, "r+") as file:
        job, before = card.job("write"), path.stat()
        with timed_out(0.05) as caught:
            file.write_from(buf, timeout=0.05)
        assert caught.value.nbytes == 0
        after = path.stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        card.done(job)
        job = card.job("read")
        assert file.write_from(buf, timeout=0).nbytes == SIZE  # beside another reader
        card.done(job)
        with card.ending(card.job("write")):
            file.write_from(buf)
    assert path.read_bytes() == pattern(SIZE, 2)


@needs("vgem")
def test_start_comes_after_the_wait(card, buf, path, monkeypatch):
    real, pending = uapi.ioctl, []

    def ioctl(fd, request, argument):
        if request == uapi.DMA_BUF_IOCTL_SYNC:
            pending.append(set(card.fences))
        return real(fd, request, argument)

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    with dmabuf.open(path) as file, card.ending(card.job("write")):
        file.read_into(buf)
    assert pending == [set(), set()]


@needs("vgem")
def test_without_fences_is_refused_where_the_cpu_copies(card, buf, path):
    job = card.job("write")
    with dmabuf.open(path) as file, pytest.raises(RouteUnavailable, match="fence=False"):
        file.read_into(buf, fence=False)
    card.done(job)
    assert buf.pread(SIZE, 0) == bytes(SIZE)


# -- sync files


@needs("vgem")
def test_export_is_a_snapshot_of_one_direction(card, buf):
    idle = buf.export_fence("write")
    job = card.job("read")
    readable, writable = buf.export_fence("read"), buf.export_fence("write")
    assert [signalled(fd) for fd in (idle, readable, writable)] == [True, True, False]
    assert not any(os.get_inheritable(fd) for fd in (idle, readable, writable))
    card.done(job)
    later = card.job("read")
    assert signalled(writable)
    card.done(later)
    for fd in (idle, readable, writable):
        os.close(fd)


@needs("vgem", "udmabuf")
@pytest.mark.parametrize("access", ["read", "write"])
def test_import_carries_a_fence_to_another_buffer(card, access):
    with allocate(SIZE, exporter="udmabuf") as buf:
        fence, fd = card.sync_file()
        buf.import_fence(fd, access)
        os.close(fd)
        with timed_out(0):
            buf.wait("write", 0)
        if access == "read":
            buf.wait("read", 0)
        else:
            with timed_out(0):
                buf.wait("read", 0)
        again = buf.export_fence("write")
        assert not signalled(again)
        card.done(fence)
        assert signalled(again)
        os.close(again)
        buf.wait("write", 0)


@needs("vgem")
def test_what_is_no_sync_file_is_refused(buf):
    for fd in (0, buf.fileno(), 1 << 20):
        with raises_errno(errno.EINVAL, "not a sync file"):
            buf.import_fence(fd)
    with raises_errno(errno.EBADF, "descriptor -1"):
        buf.import_fence(-1)


@needs("vgem", "udmabuf", "root")
def test_several_slabs(card, udmabuf_limit, path):
    mib = 1 << 20
    udmabuf_limit(1)
    with allocate(3 * mib, exporter="udmabuf") as buf, dmabuf.open(path) as file:
        assert len(buf.slabs) == 3
        idle = buf.export_fence("write")
        assert signalled(idle)
        os.close(idle)
        handles = [card.handle_of(slab.fd) for slab in buf.slabs]
        jobs = [card.job("write", handles[0]), card.job("write", handles[2])]
        merged = buf.export_fence("read")
        with timed_out(0.05):
            buf.wait("read", 0.05)
        assert file.read_into(buf, buffer_offset=mib, timeout=0).nbytes == SIZE
        with timed_out(0):
            file.read_into(buf, buffer_offset=mib - 1, timeout=0)
        card.done(jobs[0])
        assert not signalled(merged)
        with timed_out(0):
            buf.wait("read", 0)
        with card.ending(jobs[1]):
            buf.wait("read", PATIENCE)
        assert signalled(merged)
        os.close(merged)
        fence, fd = card.sync_file()
        buf.import_fence(fd, "write")
        os.close(fd)
        for slab in buf.slabs:
            with from_fd(slab.fd) as part, timed_out(0):
                part.wait("read", 0)
        card.done(fence)
        buf.wait("write", 0)


# -- the routes without the CPU: a udmabuf that a device is said to use

ZERO_COPY = ("native", "direct")
by_either = pytest.mark.parametrize("route", [None, "direct"])


@pytest.fixture
def udma(card):
    """A udmabuf of poison, and a function that makes a device use it until `card.done`."""
    with allocate(SIZE, exporter="udmabuf") as buffer:
        buffer.write(poison(SIZE))

        def occupy(access="write"):
            fence, fd = card.sync_file()
            buffer.import_fence(fd, access)
            os.close(fd)
            return fence

        yield buffer, occupy


@needs("vgem", "udmabuf", "nvme")
@by_either
@pytest.mark.parametrize("size", [SIZE, PAGE, PAGE + 5], ids=["ring", "lone", "edges"])
@pytest.mark.device_table("udmabuf", "fence", "read", "zero-copy")
def test_a_direct_read_waits(card, udma, drive, size, route):
    (buf, occupy), (file, _) = udma, drive
    assert file.plan(buf, size=size, route=route).route in ZERO_COPY
    for access in ("read", "write"):
        fence = occupy(access)
        with timed_out(0.05) as caught:
            file.read_into(buf, size, route=route, timeout=0.05)
        assert caught.value.nbytes == 0
        card.done(fence)
        assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer after a wait in vain")
    with card.ending(occupy("read")):
        transfer = file.read_into(buf, size, route=route, timeout=PATIENCE)
    assert transfer.nbytes == size and transfer.route in ZERO_COPY
    assert_same(
        buf.pread(SIZE, 0), pattern(SIZE, 1)[:size] + poison(SIZE)[size:], "the buffer after all"
    )


@needs("vgem", "udmabuf", "nvme")
@by_either
@pytest.mark.parametrize("size", [SIZE, PAGE, PAGE + 5], ids=["ring", "lone", "edges"])
@pytest.mark.device_table("udmabuf", "fence", "write", "zero-copy")
def test_a_direct_write_waits(card, udma, drive, size, route):
    (buf, occupy), (file, fd) = udma, drive
    fence = occupy("write")
    with timed_out(0.05):
        file.write_from(buf, size, route=route, timeout=0.05)
    assert_same(os.pread(fd, SIZE, 0), pattern(SIZE, 1), "the drive after a wait in vain")
    card.done(fence)
    fence = occupy("read")
    assert file.write_from(buf, size, route=route, timeout=0).route in ZERO_COPY
    card.done(fence)
    with card.ending(occupy("write")):
        file.write_from(buf, size, route=route)
    assert_same(
        os.pread(fd, SIZE, 0), poison(SIZE)[:size] + pattern(SIZE, 1)[size:], "the drive after all"
    )


@needs("vgem", "udmabuf", "nvme")
@by_either
@pytest.mark.parametrize("size", [SIZE, PAGE], ids=["ring", "lone"])
def test_a_direct_transfer_need_not_wait(card, udma, drive, size, route):
    (buf, occupy), (file, fd) = udma, drive
    fence = occupy("write")
    how = {"route": route, "fence": False}
    assert file.read_into(buf, size, **how).route in ZERO_COPY
    assert file.write_from(buf, size, file_offset=SIZE, **how).route in ZERO_COPY
    with timed_out(0):
        buf.wait("read", 0)  # the device still uses it
    assert os.pread(fd, size, SIZE) == pattern(SIZE, 1)[:size]
    with pytest.raises(RouteUnavailable, match="unaligned edges"):
        file.read_into(buf, PAGE + 5, **how)
    card.done(fence)


@needs("vgem")
def test_a_buffer_may_be_closed_with_a_fence_pending(card):
    before = held()
    job = card.job("write")
    with from_fd(card.fd) as buf, timed_out(0):
        buf.wait("read", 0)  # leaves the kernel a callback, and nothing of ours
    assert held() == before
    card.done(job)

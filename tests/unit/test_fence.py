"""Fences, on slabs whose descriptors are eventfds: poll is real, only the ioctls are fakes.

An eventfd of 0 cannot be read (a writer's fence is pending), and one that is full cannot be written
(somebody's is). Unlike a dma-buf's, the two states exclude each other, so each test sees which of
them a wait is for.
"""

import errno
import io
import os
import select
import signal
import socket
import threading
import time
from array import array
from contextlib import contextmanager

import pytest

import dmabuf
from dmabuf import Buffer, RouteUnavailable, Slab
from dmabuf.errors import BusyError, ClosedError
from dmabuf.kernel import fence, uapi
from dmabuf.memory import exporters
from tests.resources import held
from tests.support import PAGE, assert_same, drop_cache, pattern, poison, raises_errno, wait_until

FULL = (1 << 64) - 2
SIZE = 64 * PAGE
BIT = {"read": select.POLLIN, "write": select.POLLOUT}


pytestmark = pytest.mark.usefixtures("leaves_nothing")


def hold(fd, direction):
    """A fence that keeps the slab from being read, or from being written."""
    release(fd)
    if direction == "read":
        os.eventfd_read(fd)
    else:
        os.eventfd_write(fd, FULL - 1)


def release(fd):
    """Neither direction is held: the counter is 1."""
    os.eventfd_write(fd, 1) if not is_ready(fd, "read") else os.eventfd_read(fd)
    if not is_ready(fd, "read"):
        os.eventfd_write(fd, 1)


def is_ready(fd, direction):
    poll = select.poll()
    poll.register(fd, BIT[direction])
    return bool(poll.poll(0))


class Kernel:
    """Takes SYNC, and makes, merges and takes sync files, which are eventfds of 0."""

    def __init__(self):
        self.starts, self.imports, self.merges = [], [], []
        self.error, self.errors_after = 0, 0

    def ioctl(self, fd, request, argument):
        if request == uapi.DMA_BUF_IOCTL_SYNC:
            flags = uapi._SYNC.unpack(argument)[0]
            if not flags & uapi.DMA_BUF_SYNC_END:
                self.starts.append((fd, flags, is_ready(fd, "read"), is_ready(fd, "write")))
            return
        if self.error:
            self.errors_after -= 1
            if self.errors_after < 0:
                raise OSError(self.error, os.strerror(self.error))
        if request == uapi.DMA_BUF_IOCTL_EXPORT_SYNC_FILE:
            flags, nothing = uapi.DMA_BUF_SYNC_FILE_STRUCT.unpack(argument)
            assert nothing == -1
            made = os.eventfd(flags, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            argument[:] = uapi.DMA_BUF_SYNC_FILE_STRUCT.pack(flags, made)
        elif request == uapi.DMA_BUF_IOCTL_IMPORT_SYNC_FILE:
            self.imports.append((fd, *uapi.DMA_BUF_SYNC_FILE_STRUCT.unpack(argument)))
        else:
            assert request == uapi.SYNC_IOC_MERGE
            name, other, _, flags, pad = uapi.SYNC_MERGE_STRUCT.unpack(argument)
            assert name.rstrip(b"\0") and (flags, pad) == (0, 0)
            total = os.eventfd_read(fd) + os.eventfd_read(other)
            made = os.eventfd(total, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.merges.append(total)
            argument[:] = uapi.SYNC_MERGE_STRUCT.pack(name, other, made, 0, 0)


@pytest.fixture
def kernel(monkeypatch):
    fake = Kernel()
    monkeypatch.setattr(uapi, "ioctl", fake.ioctl)
    return fake


@contextmanager
def fenced(slabs=1, pin_refusal=None):
    """A Buffer that takes itself for dma-bufs, over the memory of a memfd."""
    fd, memory, _ = exporters.make_memory(SIZE, name=None, huge_pages=False, numa_node=None)
    os.close(fd)
    size = SIZE // slabs
    made = [
        Slab(os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK), i * size, size) for i in range(slabs)
    ]
    with Buffer(made, memory, exporter="fake", reason="", pin_refusal=pin_refusal) as buffer:
        yield buffer


@pytest.fixture
def buf(kernel):
    with fenced() as buffer:
        yield buffer


@pytest.fixture
def four(kernel):
    with fenced(slabs=4) as buffer:
        yield buffer


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(pattern(SIZE, 1))
    return path


def later(action, *arguments, seconds=0.05):
    timer = threading.Timer(seconds, action, arguments)
    timer.start()
    return timer


@contextmanager
def timed_out(at_least, match="a device still"):
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=match) as caught:
        yield caught
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - begun >= at_least


# -- the kernel's interface


def test_the_ioctls():
    assert uapi.DMA_BUF_IOCTL_EXPORT_SYNC_FILE == 0xC0086202
    assert uapi.DMA_BUF_IOCTL_IMPORT_SYNC_FILE == 0x40086203
    assert uapi.SYNC_IOC_MERGE == 0xC0303E03


# -- Buffer.wait


@pytest.mark.parametrize("direction", ["read", "write"])
def test_wait_is_for_the_fences_of_its_direction(buf, direction):
    other = {"read": "write", "write": "read"}[direction]
    assert buf.wait(direction) is None
    hold(buf.fileno(), other)
    assert buf.wait(direction, timeout=0) is None
    hold(buf.fileno(), direction)
    with timed_out(0):
        buf.wait(direction, timeout=0)
    with timed_out(0.05):
        buf.wait(direction, 0.05)
    timer = later(release, buf.fileno())
    buf.wait(direction, timeout=60)
    assert is_ready(buf.fileno(), direction)
    timer.join()


def test_reading_is_the_default_and_for_ever(buf):
    hold(buf.fileno(), "write")
    buf.wait()
    hold(buf.fileno(), "read")
    timer = later(release, buf.fileno())
    buf.wait()
    assert is_ready(buf.fileno(), "read")
    timer.join()


def test_the_error_says_what_to_look_at(buf, four):
    hold(buf.fileno(), "read")
    with timed_out(0, "a device still writes this buffer after 0 s: its job has not signalled"):
        buf.wait("read", 0)
    hold(buf.fileno(), "write")
    with timed_out(0, "a device still uses this buffer"):
        buf.wait("write", 0)
    hold(four.slabs[1].fd, "write")
    hold(four.slabs[3].fd, "write")
    with timed_out(0.01, "2 of the 4 slabs needed after 0.01 s"):
        four.wait("write", 0.01)


@pytest.fixture
def polls(monkeypatch):
    """The timeouts, in milliseconds, of the calls of poll(2) that wait."""
    given, real = [], select.poll

    class Poll:
        def __init__(self):
            self._real = real()

        def __getattr__(self, name):
            return getattr(self._real, name)

        def poll(self, ms=None):
            given.extend([ms] if ms else [])
            return self._real.poll(ms)

    monkeypatch.setattr(select, "poll", Poll)
    return given


def test_one_deadline_for_all_slabs(four, polls):
    for slab in four.slabs:
        hold(slab.fd, "read")
    timers = [
        later(release, slab.fd, seconds=0.05 * number)
        for number, slab in enumerate(reversed(four.slabs[1:]), 1)
    ]
    with timed_out(0.3, "of the 4 slabs"):
        four.wait("read", timeout=0.3)
    for timer in timers:
        timer.join()
    # Not 0.3 s more with each that signals, and asleep until one does.
    assert polls == sorted(set(polls), reverse=True) and polls[0] <= 300
    assert len(polls) <= 4
    release(four.slabs[0].fd)
    four.wait("read", timeout=0)


@pytest.mark.parametrize("timeout", [1e300, float("inf"), 1 << 70])
def test_a_timeout_longer_than_poll_takes(buf, timeout):
    hold(buf.fileno(), "read")
    timer = later(release, buf.fileno())
    buf.wait("read", timeout)
    timer.join()


@pytest.mark.parametrize("make", [lambda: dmabuf.allocate(PAGE, exporter="memfd"), None])
def test_arguments_that_cannot_be(kernel, make):
    with make() if make else fenced() as buffer:
        for timeout in (-1, -0.001, float("nan")):
            with pytest.raises(ValueError, match="invalid timeout"):
                buffer.wait("read", timeout)
        with pytest.raises(TypeError):
            buffer.wait("read", "1")
        for direction in ("rw", "", None, b"read"):
            for call in (
                lambda how: buffer.wait(how),
                lambda how: buffer.export_fence(how),
                lambda how: buffer.import_fence(0, how),
            ):
                with pytest.raises(ValueError, match="'read' or 'write'"):
                    call(direction)


def test_a_memfd_has_no_fences():
    with dmabuf.allocate(PAGE, exporter="memfd") as buffer:
        assert buffer.wait("read") is buffer.wait("write", 0) is None
        for call in (buffer.export_fence, lambda: buffer.import_fence(0)):
            with pytest.raises(io.UnsupportedOperation, match="memfd is not a dma-buf") as caught:
                call()
            assert isinstance(caught.value, OSError) and caught.value.errno == errno.EOPNOTSUPP


def test_after_close(buf):
    buf.close()
    for call in (buf.wait, buf.export_fence, lambda: buf.import_fence(0)):
        with pytest.raises(ClosedError):
            call()


def is_idle(buf):
    """Whether nobody holds the buffer."""
    try:
        buf.lend("a device")
    except BusyError:
        return False
    buf.take_back("a device")
    return True


def test_it_cannot_be_closed_under_a_wait(buf):
    hold(buf.fileno(), "read")
    thread = threading.Thread(target=buf.wait, daemon=True)
    thread.start()
    while is_idle(buf):
        time.sleep(0.001)
    try:
        with pytest.raises(BusyError):
            buf.close()
    finally:
        release(buf.slabs[0].fd)
    thread.join()
    assert is_idle(buf)


def test_a_descriptor_that_someone_closed(kernel):
    fd = os.eventfd(1)
    os.close(fd)
    with raises_errno(errno.EBADF, "is closed"):
        fence.wait([fd], "read", 1)


# -- signals


@contextmanager
def alarms(handler, first, interval=0.0):
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, first, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_what_a_handler_raises_ends_the_wait(buf):
    hold(buf.fileno(), "read")
    with alarms(_interrupt, 0.05), pytest.raises(KeyboardInterrupt):
        buf.wait("read")
    buf.wait("write", 0)
    assert is_idle(buf)


def test_after_a_handler_the_wait_goes_on_for_what_is_left(buf):
    hold(buf.fileno(), "read")
    rang = []
    with alarms(lambda *_: rang.append(1), 0.02, 0.02), timed_out(0.3):
        buf.wait("read", 0.3)  # it would never end if each signal began it anew
    assert len(rang) > 1
    timer = later(release, buf.fileno(), seconds=0.1)
    with alarms(lambda *_: rang.append(1), 0.02, 0.02):
        buf.wait("read")
    timer.join()


# -- sync files


@pytest.mark.parametrize(("direction", "flag"), [("read", 1), ("write", 2)])
def test_export_merges_the_slabs(kernel, buf, four, direction, flag):
    one = buf.export_fence(direction)
    assert (os.eventfd_read(one), kernel.merges) == (flag, [])
    merged = four.export_fence(direction)
    assert os.eventfd_read(merged) == 4 * flag
    assert not os.get_inheritable(merged)
    os.close(one)
    os.close(merged)


@pytest.mark.parametrize("after", range(7))
def test_an_export_that_fails_leaves_nothing_open(kernel, four, after):
    before = held()
    kernel.error, kernel.errors_after = errno.EMFILE, after
    with raises_errno(errno.EMFILE):
        four.export_fence()
    assert held() == before


@pytest.mark.parametrize(("how", "flag"), [((), 2), (("write",), 2), (("read",), 1)])
def test_import_adds_to_every_slab(kernel, four, how, flag):
    assert four.import_fence(7, *how) is None
    assert kernel.imports == [(slab.fd, flag, 7) for slab in four.slabs]


def test_what_is_no_sync_file(kernel, buf):
    kernel.error = errno.EINVAL
    with raises_errno(errno.EINVAL, "descriptor 7: not a sync file"):
        buf.import_fence(7)
    with pytest.raises(TypeError):
        buf.import_fence("7")
    for number in (-1, 1 << 31):
        with raises_errno(errno.EBADF, f"descriptor {number}: Bad file descriptor"):
            buf.import_fence(number)


def test_a_kernel_that_exchanges_none(kernel, buf):
    kernel.error = errno.ENOTTY
    for call in (buf.export_fence, lambda: buf.import_fence(7)):
        with raises_errno(errno.ENOTTY, r"Linux 6\.0"):
            call()


# -- transfers

ROUTES = ["direct", "staged", "buffered"]
WAYS = [
    pytest.param({"route": route, "size": size}, id=f"{route}-{size}")
    for route in ROUTES
    for size in (SIZE, SIZE - 5)
] + [pytest.param({"size": 2 * PAGE}, id="lone")]


@pytest.fixture
def proven(source):
    """A File whose O_DIRECT has been seen to work: lone requests take the short way."""
    with dmabuf.open(source, "r+") as file, dmabuf.allocate(SIZE, exporter="memfd") as scratch:
        drop_cache(file.fileno())
        if file.read_into(scratch, 2 * PAGE).route != "direct":
            pytest.skip("the filesystem of the temporary folder takes no O_DIRECT")
        yield file


@pytest.mark.parametrize("how", WAYS)
def test_a_read_waits_until_it_may_write(proven, source, buf, kernel, how):
    buf.pwrite(poison(SIZE), 0)
    hold(buf.fileno(), "write")
    with timed_out(0.05) as caught:
        proven.read_into(buf, **how, timeout=0.05)
    assert (caught.value.nbytes, caught.value.filename) == (0, str(source))
    assert "after 0.05 s" in str(caught.value)  # as it was given, whatever was spent before
    assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer after a wait in vain")
    timer = later(release, buf.fileno())
    kernel.starts.clear()
    moved = proven.read_into(buf, **how, timeout=60)
    timer.join()
    assert moved.nbytes == how["size"]
    assert all(write for _, _, _, write in kernel.starts)  # START came when nobody was left
    straight = how in (WAYS[0].values[0], WAYS[-1].values[0])
    assert bool(kernel.starts) != straight
    assert buf.pread(how["size"], 0) == pattern(SIZE, 1)[: how["size"]]


@pytest.mark.parametrize("how", WAYS)
def test_a_write_waits_until_it_may_read(proven, source, buf, kernel, how):
    buf.pwrite(poison(SIZE), 0)
    hold(buf.fileno(), "read")
    with timed_out(0.05) as caught:
        proven.write_from(buf, **how, timeout=0.05)
    assert caught.value.nbytes == 0
    assert_same(source.read_bytes(), pattern(SIZE, 1), "the file after a wait in vain")
    timer = later(release, buf.fileno())
    kernel.starts.clear()
    proven.write_from(buf, **how, timeout=60)
    timer.join()
    assert all(read for _, _, read, _ in kernel.starts)
    hold(buf.fileno(), "write")  # those who read it too do not matter
    assert proven.write_from(buf, **how, timeout=0).nbytes == how["size"]
    release(buf.fileno())
    assert source.read_bytes()[: how["size"]] == poison(SIZE)[: how["size"]]


@pytest.mark.parametrize("size", [SIZE, SIZE - 5])
def test_a_wait_in_vain_grows_no_file(tmp_path, buf, size):
    path = tmp_path / "grows"
    path.write_bytes(b"as it was")
    hold(buf.fileno(), "read")
    with dmabuf.open(path, "r+") as file:
        before = os.stat(path)
        with timed_out(0):
            file.write_from(buf, size, timeout=0)
        with timed_out(0):
            file.write_segments(buf, array("Q", [PAGE, 0, PAGE]), timeout=0)
        with alarms(_interrupt, 0.05), pytest.raises(KeyboardInterrupt):
            file.write_from(buf, size)
    after = os.stat(path)
    assert (after.st_size, after.st_blocks, after.st_mtime_ns) == (
        before.st_size,
        before.st_blocks,
        before.st_mtime_ns,
    )


def test_only_the_slabs_that_are_touched(proven, four):
    slab = SIZE // 4
    hold(four.slabs[2].fd, "write")
    assert proven.read_into(four, 2 * slab, timeout=0).nbytes == 2 * slab
    assert proven.read_into(four, slab, buffer_offset=3 * slab, timeout=0).nbytes == slab
    assert proven.read_into(four, 0, buffer_offset=2 * slab, timeout=0).nbytes == 0
    with timed_out(0, "uses 1 of the 2 slabs needed"):
        proven.read_into(four, 2, buffer_offset=2 * slab - 1, timeout=0)
    segments = array("Q", [0, 0, PAGE, PAGE, 3 * slab, PAGE])  # what lies between counts
    with timed_out(0):
        proven.read_segments(four, segments, timeout=0)
    release(four.slabs[2].fd)


def test_segments_wait_too(proven, buf):
    segments = array("Q", [0, 0, PAGE, PAGE, 2 * PAGE, PAGE])
    hold(buf.fileno(), "write")
    with timed_out(0):
        proven.read_segments(buf, segments, timeout=0)
    assert proven.write_segments(buf, segments, timeout=0).nbytes == 2 * PAGE
    hold(buf.fileno(), "read")
    with timed_out(0):
        proven.write_segments(buf, segments, timeout=0)
    assert proven.read_segments(buf, segments, timeout=0).nbytes == 2 * PAGE
    release(buf.fileno())


def test_a_stream_waits_before_it_takes_anything(buf, kernel):
    ours, theirs = socket.socketpair()
    with ours, theirs, dmabuf.open(theirs.fileno(), "r+") as file:
        ours.send(b"once")
        buf.pwrite(poison(8), 0)
        hold(buf.fileno(), "write")
        with timed_out(0.01):
            file.read_into(buf, 4, timeout=0.01)
        assert buf.pread(8, 0) == poison(8)
        hold(buf.fileno(), "read")
        with timed_out(0.01):
            file.write_from(buf, 4, timeout=0.01)
        release(buf.fileno())
        assert file.read_into(buf, 4, timeout=60).nbytes == 4
        assert buf.pread(4, 0) == b"once"
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)


def test_fences_and_the_first_byte_share_a_timeout(buf, polls):
    ours, theirs = socket.socketpair()
    with ours, theirs, dmabuf.open(theirs.fileno(), "r") as file:
        hold(buf.fileno(), "write")

        def release_half_way():
            wait_until(lambda: polls)
            time.sleep(0.5)
            release(buf.fileno())

        timer = later(release_half_way, seconds=0)
        with timed_out(1, "timed out|the peer|a device"):
            file.read_into(buf, 4, timeout=1)
        timer.join()
    assert sum(polls[1:]) < 600  # what the fence has left of it


def test_no_route_is_told_before_any_wait(tmp_path, source, kernel):
    with fenced(pin_refusal="it is a test") as buffer, dmabuf.open(source, "r+") as file:
        hold(buffer.fileno(), "write")
        with pytest.raises(RouteUnavailable, match="it is a test"):
            file.read_into(buffer, require="zero-copy")
        with pytest.raises(ValueError, match="leaves the buffer of 262144 bytes"):
            file.read_into(buffer, SIZE + 1)


def test_a_timeout_is_checked_though_nothing_is_waited_for(source):
    with dmabuf.open(source) as file, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        for timeout in (-1, float("nan")):
            with pytest.raises(ValueError, match="invalid timeout"):
                file.read_into(buffer, timeout=timeout)


# -- fence=False


@pytest.mark.parametrize("size", [2 * PAGE, SIZE - PAGE])
@pytest.mark.parametrize("sync", [False, True])
def test_without_fences_where_no_cpu_touches_the_buffer(proven, source, buf, kernel, size, sync):
    hold(buf.fileno(), "write")
    assert proven.read_into(buf, size, fence=False).route == "direct"
    release(buf.fileno())
    assert buf.pread(size, 0) == pattern(size, 1)
    buf.pwrite(poison(SIZE), 0)
    hold(buf.fileno(), "read")
    kernel.starts.clear()
    assert proven.write_from(buf, size, fence=False, sync=sync).route == "direct"
    assert kernel.starts == []
    assert source.read_bytes() == poison(SIZE)[:size] + pattern(SIZE, 1)[size:]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"route": "staged"}, "staged route"),
        ({"route": "buffered"}, "buffered route"),
        ({"size": SIZE - 5}, "direct route, with unaligned edges"),
        ({"size": 2 * PAGE, "buffer_offset": 1}, "staged route"),
    ],
)
def test_fence_false_is_refused_where_the_cpu_has_a_part(proven, source, buf, kernel, how, why):
    buf.pwrite(poison(SIZE), 0)
    before = os.stat(source)
    kernel.starts.clear()
    for move in (proven.read_into, proven.write_from):
        with pytest.raises(RouteUnavailable, match=f"fence=False .*{why}") as caught:
            move(buf, **how, fence=False)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert str(caught.value.plan.route) in why
    assert kernel.starts == []
    assert buf.pread(SIZE, 0) == poison(SIZE)
    assert os.stat(source).st_mtime_ns == before.st_mtime_ns
    assert source.read_bytes() == pattern(SIZE, 1)


def test_a_refusal_grows_no_file(tmp_path, buf):
    path = tmp_path / "grows"
    path.touch()
    with dmabuf.open(path, "r+") as file, pytest.raises(RouteUnavailable, match="fence=False"):
        file.write_from(buf, SIZE - 5, fence=False)
    assert path.stat().st_size == 0


def test_segments_without_fences(proven, source, buf, kernel):
    straight = array("Q", [PAGE, 0, PAGE, 4 * PAGE, 2 * PAGE, 3 * PAGE, 0, 0, 0])
    hold(buf.fileno(), "write")
    kernel.starts.clear()
    assert proven.read_segments(buf, straight, fence=False).nbytes == 4 * PAGE
    assert kernel.starts == []
    release(buf.fileno())
    assert buf.pread(PAGE, 0) == pattern(SIZE, 1)[PAGE : 2 * PAGE]
    assert buf.pread(3 * PAGE, 2 * PAGE) == pattern(SIZE, 1)[4 * PAGE : 7 * PAGE]
    hold(buf.fileno(), "read")
    assert proven.write_segments(buf, straight, fence=False).nbytes == 4 * PAGE
    for index in range(6):
        crooked = array("Q", straight)
        crooked[index] += 1 if index % 3 < 2 else -1
        with pytest.raises(RouteUnavailable, match="fence=False"):
            proven.read_segments(buf, crooked, fence=False)
        with pytest.raises(RouteUnavailable, match="fence=False"):
            proven.write_segments(buf, crooked, fence=False)
    release(buf.fileno())


def test_fence_false_is_refused_for_a_stream(buf):
    ours, theirs = socket.socketpair()
    with ours, theirs, dmabuf.open(theirs.fileno(), "r") as file:
        ours.send(b"once")
        with pytest.raises(RouteUnavailable, match="this one is buffered"):
            file.read_into(buf, 4, fence=False)
        assert theirs.recv(4) == b"once"


def test_fence_false_is_nothing_to_refuse_for_a_memfd(source):
    with dmabuf.open(source) as file, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        for route in ("staged", "buffered"):
            assert file.read_into(buffer, SIZE - 5, route=route, fence=False).route == route


def test_a_memfd_is_not_polled(source, monkeypatch):
    def poll():
        raise AssertionError("polled")

    monkeypatch.setattr(fence.select, "poll", poll)
    with dmabuf.open(source) as file, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        for size in (2 * PAGE, SIZE, SIZE - 5):
            assert file.read_into(buffer, size, timeout=0).nbytes == size


def test_copy_waits_at_a_buffer(source, tmp_path, buf):
    hold(buf.fileno(), "write")
    timer = later(release, buf.fileno())
    assert dmabuf.copy(source, buf).nbytes == SIZE
    timer.join()
    assert buf.pread(SIZE, 0) == pattern(SIZE, 1)
    hold(buf.fileno(), "read")
    timer = later(release, buf.fileno())
    assert dmabuf.copy(buf, tmp_path / "out").nbytes == SIZE
    timer.join()
    assert (tmp_path / "out").read_bytes() == pattern(SIZE, 1)

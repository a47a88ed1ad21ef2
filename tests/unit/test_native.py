"""The native route, on threads that emulate it: what is registered, and every way it can fail.

The emulation (csrc/emulate.c) maps the dma-buf and answers as the kernel with the series does. The
kernel's own answers are injected where completions are seen, by the core's filter.
"""

import errno
import mmap
import os
import random
import threading

import pytest

import dmabuf
from dmabuf import Route, _uapi
from dmabuf._ffi import lib
from dmabuf.buffer import Buffer, Slab
from dmabuf.ring import Ring
from tests.guards import needs
from tests.support import (
    PAGE,
    Filter,
    assert_same,
    exercise,
    loop_device,
    mounted,
    pattern,
    poison,
    together,
)
from tests.unit.fake_kernel import FakeKernel

SIZE = 300 * 1024


class Emulating(dmabuf.Engine):
    _flags = lib.DMB_RING_EMULATE_NATIVE


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(_uapi, "ioctl", FakeKernel().ioctl)


@pytest.fixture
def engine():
    with Emulating(backend="threads", queue_depth=5, block_size=8192) as engine:
        yield engine


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    os.sync()
    return path


def memory(size):
    fd = os.memfd_create("dma-buf")
    os.ftruncate(fd, size)
    return fd


@pytest.fixture
def buf():
    """A dma-buf that the CPU can map, as far as anyone can tell."""
    fd = memory(SIZE)
    with Buffer([Slab(fd, 0, SIZE)], mmap.mmap(fd, SIZE), exporter="fake", reason="a test") as buf:
        yield buf


@pytest.fixture
def far():
    """Three dma-bufs in one Buffer, none of which the CPU can map."""
    sizes = (64 * 1024, 64 * 1024, 32 * 1024)
    slabs = [Slab(memory(size), 64 * 1024 * i, size) for i, size in enumerate(sizes)]
    for slab in slabs:
        os.pwrite(slab.fd, poison(slab.size), 0)
    with Buffer(slabs, None, exporter="far", reason="a test", map_refusal="not by the CPU") as far:
        yield far


def content(buffer):
    return b"".join(os.pread(slab.fd, slab.size, 0) for slab in buffer.slabs)


def test_every_byte_in_both_directions(path, buf, engine):
    routes = ("native", "direct", "staged", "buffered")
    chosen = exercise(path, buf, engine, routes=routes, limit=SIZE, rounds=24)
    assert "native" in chosen


def test_slabs_of_memory_that_the_cpu_cannot_map(path, far, engine):
    data = path.read_bytes()
    with dmabuf.open(path, "r+", engine=engine) as file:
        start, size = 60 * 1024, 80 * 1024
        transfer = file.read_into(far, size, file_offset=4096, buffer_offset=start)
        assert transfer.route is Route.NATIVE and transfer.copied == 0 and transfer.registered
        assert transfer.nbytes == size
        expected = bytearray(b"".join(poison(slab.size) for slab in far.slabs))
        expected[start : start + size] = data[4096 : 4096 + size]
        assert content(far) == bytes(expected)
        file.write_from(far, size, file_offset=128 * 1024, buffer_offset=start)
    expected = bytearray(data)
    expected[128 * 1024 : 128 * 1024 + size] = data[4096 : 4096 + size]
    assert path.read_bytes() == bytes(expected)


@pytest.mark.parametrize(("file_offset", "size"), [(1, 4096), (0, 4097), (SIZE - 4096, 4000)])
def test_no_route_is_left_for_edges_that_the_cpu_cannot_reach(path, far, engine, file_offset, size):
    before = content(far)
    with dmabuf.open(path, engine=engine) as file:
        with pytest.raises(dmabuf.RouteUnavailable, match="the CPU cannot map this dma-buf") as e:
            file.read_into(far, size, file_offset=file_offset)
        assert "not by the CPU" in str(e.value) and e.value.filename == str(path)
        with pytest.raises(dmabuf.RouteUnavailable):
            file.plan(far, size=size, file_offset=file_offset)
    assert content(far) == before


def test_the_stock_kernel_says_so(path, buf):
    with dmabuf.open(path) as file:
        plan = file.plan(buf)
        assert plan.route is Route.DIRECT
        assert "dma-buf registered buffers" in plan.rejected[Route.NATIVE]
        with pytest.raises(dmabuf.RouteUnavailable, match="registered buffers"):
            file.read_into(buf, route="native")
        assert file.read_into(buf).rejected == plan.rejected


def test_a_storm_of_eagain_within_the_bound(path, buf, engine):
    left = [40]

    def answer(completion):
        if completion.straight and left[0]:
            left[0] -= 1
            return -errno.EAGAIN
        return completion.result

    with dmabuf.open(path, engine=engine) as file, Filter(engine, answer):
        transfer = file.read_into(buf)
    assert transfer.route is Route.NATIVE and transfer.reissues == 40
    assert content(buf) == path.read_bytes()


def test_a_storm_of_eagain_without_end(path, buf, engine):
    def answer(completion):
        return -errno.EAGAIN if completion.straight else completion.result

    with (
        dmabuf.open(path, engine=engine) as file,
        Filter(engine, answer),
        pytest.raises(BlockingIOError, match="exporter went on moving the dma-buf") as caught,
    ):
        file.read_into(buf)
    assert caught.value.nbytes == 0


RESETS = {
    errno.ENOENT: errno.ENODEV,
    errno.ENODEV: errno.ENODEV,
    errno.EIO: errno.EIO,
    errno.ECANCELED: errno.EIO,
}
"""What requests answer after a controller reset, and the error where that goes on."""


def resetting(resets, number):
    """A filter by which the controller is reset under so many requests, each at another offset."""

    def answer(completion):
        if completion.straight and len(seen) < resets and completion.offset not in seen:
            seen.append(completion.offset)
            return -number
        return completion.result

    seen = []
    return answer


@pytest.mark.parametrize("number", RESETS)
@pytest.mark.parametrize("verb", ["read", "write"])
def test_many_controller_resets_in_one_transfer(path, buf, verb, number):
    """The dma-buf is registered again after each, up to 16 times."""
    with (
        Emulating(backend="threads", queue_depth=1, block_size=8192) as engine,
        dmabuf.open(path, "r+", engine=engine) as file,
        Filter(engine, resetting(16, number)),
    ):
        move = file.read_into if verb == "read" else file.write_from
        record = move(buf)
        assert (record.route, record.nbytes) == (Route.NATIVE, SIZE)
    assert content(buf) == path.read_bytes()


def test_a_reset_under_many_threads(path):
    """Who registers again takes no slot from the others, whose requests go on with it."""

    class Shared(Emulating):
        def __init__(self):
            self._owner = None
            self._setup(4, 4096, "threads", most_rings=2)

    dice, guard = random.Random(9), threading.Lock()
    resets = [0]

    def answer(completion):
        with guard:
            if completion.straight and resets[0] < 100 and dice.random() < 0.05:
                resets[0] += 1
                return -errno.ENOENT
        return completion.result

    part, data = 36 * 1024, path.read_bytes()

    def read(number):
        at = number * part
        for _ in range(50):
            os.pwrite(fd, poison(part), at)
            transfer = file.read_into(buf, part, file_offset=at, buffer_offset=at)
            assert transfer.route is Route.NATIVE
            assert_same(os.pread(fd, part, at), data[at : at + part], "a part")

    fd = memory(SIZE)
    with (
        Shared() as engine,
        Buffer([Slab(fd, 0, SIZE)], mmap.mmap(fd, SIZE), exporter="fake", reason="a test") as buf,
        dmabuf.open(path, engine=engine) as file,
    ):
        file.read_into(buf)
        with engine._growing:
            engine._rings.append(engine._new_ring())
        with Filter(engine, answer):
            together(read)
    assert resets[0] == 100


@pytest.mark.parametrize(("number", "expected"), RESETS.items())
def test_a_device_that_is_gone(path, buf, engine, number, expected):
    def answer(completion):
        return -number if completion.straight else completion.result

    with dmabuf.open(path, engine=engine) as file, Filter(engine, answer):
        with pytest.raises(OSError) as caught:
            file.read_into(buf)
        error = caught.value
        assert (error.errno, error.filename, error.nbytes) == (expected, str(path), 0)
        assert expected != errno.ENODEV or "the device was removed, or" in str(error)
        buf.pwrite(poison(SIZE), 0)
    with dmabuf.open(path, engine=engine) as file:
        assert file.read_into(buf).route is Route.NATIVE


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_first_request_that_rules_the_route_out(path, buf, engine, number):
    asked = []

    def answer(completion):
        asked.append(completion.straight)
        return completion.result if completion.offset % 8192 == 1 else -number

    with dmabuf.open(path, engine=engine) as file:
        with (
            Filter(engine, answer),
            pytest.raises(dmabuf.RouteUnavailable, match="native"),
        ):
            file.read_into(buf, route="native")
        transfer = file.read_into(buf)
        assert transfer.route is Route.DIRECT
        assert transfer.rejected[Route.NATIVE] == file.plan(buf).rejected[Route.NATIVE]
    assert asked and content(buf) == path.read_bytes()


def test_short_completions_go_on(path, buf, engine):
    def answer(completion):
        if completion.straight and completion.size == 8192 and completion.result == 8192:
            return 4096
        return completion.result

    with dmabuf.open(path, engine=engine) as file, Filter(engine, answer):
        transfer = file.read_into(buf, 256 * 1024)
    assert transfer.nbytes == 256 * 1024 and transfer.requests > 32
    assert content(buf)[: 256 * 1024] == path.read_bytes()[: 256 * 1024]


def test_a_bad_block_is_named(path, buf, engine):
    bad = 33 * 4096

    def answer(completion):
        if completion.offset <= bad < completion.offset + completion.size:
            return -errno.EIO
        return completion.result

    buf.pwrite(poison(SIZE), 0)
    with (
        dmabuf.open(path, engine=engine) as file,
        Filter(engine, answer),
        pytest.raises(OSError, match=f"file offset {bad}, after {bad} whole") as caught,
    ):
        file.read_into(buf)
    assert caught.value.errno == errno.EIO and caught.value.nbytes == bad
    assert content(buf)[:bad] == path.read_bytes()[:bad]


def test_slabs_that_are_registered_in_part(path, far, engine, monkeypatch):
    take = Ring.take_dmabuf_slot

    def taking(ring, dmabuf_fd, target):
        return -errno.EOPNOTSUPP if dmabuf_fd == far.slabs[1].fd else take(ring, dmabuf_fd, target)

    monkeypatch.setattr(Ring, "take_dmabuf_slot", taking)
    with dmabuf.open(path, engine=engine) as file:
        assert file.read_into(far, 64 * 1024).route is Route.NATIVE
        with pytest.raises(dmabuf.RouteUnavailable, match="does not move dma-bufs itself"):
            file.read_into(far, 68 * 1024)


def mappings():
    with open("/proc/self/maps") as maps:
        return sum("memfd:dma-buf" in line for line in maps)


def test_closing_either_side_clears_the_slots(path, engine):
    before = mappings()
    fd = memory(SIZE)
    buf = Buffer([Slab(fd, 0, SIZE)], None, exporter="far", reason="", map_refusal="no")
    with dmabuf.open(path, engine=engine) as file:
        file.read_into(buf, 4 * PAGE)
        file.read_into(buf, 4 * PAGE)
        assert mappings() == before + 1
    assert mappings() == before
    with dmabuf.open(path, engine=engine) as file:
        file.read_into(buf, 4 * PAGE)
        assert mappings() == before + 1
        buf.close()
        assert mappings() == before


def test_a_read_only_dma_buf_is_not_written(path, engine):
    fd = memory(SIZE)
    buf = Buffer(
        [Slab(fd, 0, SIZE)], None, exporter="far", reason="", map_refusal="no", writable=False
    )
    with buf, dmabuf.open(path, "r+", engine=engine) as file:
        with pytest.raises(PermissionError):
            file.read_into(buf, 4096)
        assert file.write_from(buf, 4096).route is Route.NATIVE
    assert path.read_bytes()[:4096] == bytes(4096)


def test_a_reset_leaves_every_slab_its_slot(path, far, engine):
    """Other transfers have requests on their way that name it."""
    resets = [1]

    def answer(completion):
        if completion.straight and resets[0]:
            resets[0] -= 1
            return -errno.ENOENT
        return completion.result

    with dmabuf.open(path, engine=engine) as file:
        file.read_into(far)
        slots = engine._rings[0].native(far, file._target.direct().fd).slots
        before = list(slots)
        for slab in far.slabs:
            os.pwrite(slab.fd, poison(slab.size), 0)
        with Filter(engine, answer):
            assert file.read_into(far).route is Route.NATIVE
        assert not resets[0] and list(slots) == before
    assert content(far) == path.read_bytes()[: far.size]


def test_files_that_were_closed_leave_nothing_with_a_buffer(path, buf, engine):
    for _ in range(20):
        with dmabuf.open(path, engine=engine) as file:
            assert file.read_into(buf).route is Route.NATIVE
        assert len(buf._on_close_callbacks) <= 1
    assert not buf._on_close_callbacks


def test_engines_that_were_closed_leave_nothing_with_a_buffer(path, buf):
    for _ in range(3):
        with Emulating(backend="threads") as engine, dmabuf.Engine(block_size=4096) as other:
            file, again = dmabuf.open(path, engine=engine), dmabuf.open(path, engine=other)
            file.read_into(buf)
            again.read_into(buf, 256 * 1024)
        assert not buf._on_close_callbacks
        file.close()
        again.close()


def test_more_slabs_than_the_table_has_slots(path, engine):
    """Nothing is registered then, and what was missing may be there the next time."""
    ring, count = engine._rings[0], 6
    slabs = [Slab(memory(PAGE), PAGE * i, PAGE) for i in range(count)]
    many = Buffer(slabs, None, exporter="far", reason="a test", map_refusal="not by the CPU")
    kept, ring._free_buffers = ring._free_buffers, ring._free_buffers[: count - 1]
    with many, dmabuf.open(path, engine=engine) as file:
        free = list(ring._free_buffers)
        with pytest.raises(dmabuf.RouteUnavailable, match="6 more slabs, and 5 slots are free"):
            file.read_into(many)
        assert ring._free_buffers == free
        assert file.read_into(many, (count - 1) * PAGE).route is Route.NATIVE
        with pytest.raises(dmabuf.RouteUnavailable, match="close other buffers"):
            file.read_into(many)
        ring._free_buffers.append(kept[-1])
        assert file.read_into(many).route is Route.NATIVE
        assert content(many) == path.read_bytes()[: many.size]


@needs("ext4")
@pytest.mark.parametrize("size", [512, 2560, PAGE + 1024])
def test_blocks_that_are_no_pages_are_written_as_a_whole(tmp_path, far, engine, size):
    """They have no edges, so nothing is left for the CPU, which cannot map this buffer."""
    with (
        loop_device(tmp_path / "image", 16 << 20) as device,
        mounted(device, "ext4", tmp_path / "mount") as folder,
    ):
        path = folder / "file"
        path.write_bytes(pattern(SIZE, 1))
        expected = bytearray(pattern(SIZE, 1))
        expected[512 * 13 : 512 * 13 + size] = content(far)[1024 : 1024 + size]
        with dmabuf.open(path, "r+", engine=engine) as file:
            where = {"file_offset": 512 * 13, "buffer_offset": 1024}
            record = file.write_from(far, size, route="native", **where)
        assert (record.route, record.nbytes, record.copied) == (Route.NATIVE, size, 0)
        assert_same(path.read_bytes(), bytes(expected), "the file")

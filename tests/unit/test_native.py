"""The native route, emulated: what is registered, and every way it can fail.

The emulation (csrc/tests/testing.c) maps the dma-buf and answers as the kernel with the series
does. The kernel's other answers are injected where completions are seen.
"""

import contextlib
import errno
import gc
import os
import resource
import threading
import weakref

import anyio
import pytest

import dmabuf
from dmabuf import Route, aio
from tests import emulation
from tests.core import lib
from tests.guards import needs
from tests.support import (
    PAGE,
    PATIENCE,
    Filter,
    assert_same,
    exercise,
    in_child,
    loop_device,
    mounted,
    pattern,
    poison,
    raises_errno,
)
from tests.unit.lying import content, dma_buf

SIZE = 300 * 1024


pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture
def engine():
    with emulation.engine(backend="threads", queue_depth=5, block_size=8192) as engine:
        yield engine


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    os.sync()
    return path


@pytest.fixture
def buf():
    """A dma-buf that the CPU can map, as far as anyone can tell."""
    with dma_buf(SIZE) as buf:
        yield buf


@pytest.fixture
def far():
    """Three dma-bufs in one Buffer, none of which the CPU can map."""
    with dma_buf(64 * 1024, 64 * 1024, 32 * 1024, exporter="far", mapped=False) as far:
        for slab in far.slabs:
            os.pwrite(slab.fd, poison(slab.size), 0)
        yield far


@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_every_byte_in_both_directions(path, buf, backend):
    routes = ("native", "direct", "staged", "buffered")
    with emulation.engine(backend=backend, queue_depth=5, block_size=8192) as engine:
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

    with dmabuf.open(path, engine=engine) as file, Filter(answer):
        transfer = file.read_into(buf)
    assert transfer.route is Route.NATIVE and transfer.reissues == 40
    assert content(buf) == path.read_bytes()


def test_a_storm_of_eagain_without_end(path, buf, engine):
    def answer(completion):
        return -errno.EAGAIN if completion.straight else completion.result

    with (
        dmabuf.open(path, engine=engine) as file,
        Filter(answer),
        pytest.raises(dmabuf.TransferError, match="exporter went on moving the dma-buf") as caught,
    ):
        file.read_into(buf)
    assert (caught.value.errno, caught.value.nbytes) == (errno.EAGAIN, 0)


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
        emulation.engine(backend="threads", queue_depth=1, block_size=8192) as engine,
        dmabuf.open(path, "r+", engine=engine) as file,
        Filter(resetting(16, number)),
    ):
        move = file.read_into if verb == "read" else file.write_from
        record = move(buf)
        assert (record.route, record.nbytes) == (Route.NATIVE, SIZE)
    assert content(buf) == path.read_bytes()


_RESETS = """
import errno, random, sys, threading
from tests import emulation
from tests.support import Filter, assert_same, poison, together
from tests.unit.lying import dma_buf
import os, dmabuf
from dmabuf.kernel import uapi
from tests.unit.fake_kernel import FakeKernel
uapi.ioctl = FakeKernel().ioctl
path, part = sys.argv[1], 36 * 1024
data = open(path, "rb").read()
dice, guard, resets = random.Random(9), threading.Lock(), [0]

def answer(completion):
    with guard:
        if completion.straight and resets[0] < 100 and dice.random() < 0.05:
            resets[0] += 1
            return -errno.ENOENT
    return completion.result

def read(number):
    at = number * part
    for _ in range(50):
        os.pwrite(buf.slabs[0].fd, poison(part), at)
        transfer = file.read_into(buf, part, file_offset=at, buffer_offset=at)
        assert transfer.route == "native"
        assert_same(os.pread(buf.slabs[0].fd, part, at), data[at : at + part], "a part")

with emulation.native(), dma_buf(len(data)) as buf, dmabuf.open(path) as file:
    file.read_into(buf)
    with Filter(answer):
        together(read)
        while resets[0] < 100:
            read(0)
"""


def test_a_reset_under_many_threads(path):
    """Who registers again takes no slot from the others, whose requests go on with it.

    In a program of its own, whose default engine emulates the native route.
    """
    in_child(_RESETS, path)


@pytest.mark.parametrize(("number", "expected"), RESETS.items())
def test_a_device_that_is_gone(path, buf, engine, number, expected):
    def answer(completion):
        return -number if completion.straight else completion.result

    registered = []
    with (
        dmabuf.open(path, engine=engine) as file,
        Filter(answer),
        emulation.registrar(lambda *_: registered.append(True) or 0),
    ):
        with pytest.raises(OSError) as caught:
            file.read_into(buf)
        assert len(registered) == 17 or number == errno.EIO  # a bad medium answers that, too
        error = caught.value
        assert (error.errno, error.filename, error.nbytes) == (expected, str(path), 0)
        assert expected != errno.ENODEV or "the device was removed, or" in str(error)
        buf.pwrite(poison(SIZE), 0)
    with dmabuf.open(path, engine=engine) as file:
        assert file.read_into(buf).route is Route.NATIVE


def test_old_pages_that_stay_in_the_cache_after_a_write(path, buf, engine):
    """The core reports EBUSY where it cannot drop them."""

    def answer(completion):
        return -errno.EBUSY if completion.straight else completion.result

    with (
        dmabuf.open(path, "r+", engine=engine) as file,
        Filter(answer),
        raises_errno(errno.EBUSY, "the page cache may keep old bytes of the range", nbytes=0),
    ):
        file.write_from(buf)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_first_request_that_rules_the_route_out(path, buf, engine, number):
    asked = []

    def answer(completion):
        asked.append(completion.straight)
        return completion.result if completion.offset % 8192 == 1 else -number

    with dmabuf.open(path, engine=engine) as file:
        with (
            Filter(answer),
            pytest.raises(dmabuf.RouteUnavailable, match="native"),
        ):
            file.read_into(buf, route="native")
        transfer = file.read_into(buf)
        assert transfer.route is Route.DIRECT
        assert transfer.rejected[Route.NATIVE] == file.plan(buf).rejected[Route.NATIVE]
        assert asked and content(buf) == path.read_bytes()
        with dma_buf(SIZE) as other, Filter(answer):  # each buffer is tried by itself
            del asked[:]
            with pytest.raises(dmabuf.RouteUnavailable, match="native"):
                file.read_into(other, route="native")
            assert asked


def test_short_completions_go_on(path, buf, engine):
    def answer(completion):
        if completion.straight and completion.size == 8192 and completion.result == 8192:
            return 4096
        return completion.result

    with dmabuf.open(path, engine=engine) as file, Filter(answer):
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
        Filter(answer),
        pytest.raises(OSError, match=f"file offset {bad}, after {bad} bytes: ") as caught,
    ):
        file.read_into(buf)
    assert caught.value.errno == errno.EIO and caught.value.nbytes == bad
    assert content(buf)[:bad] == path.read_bytes()[:bad]


def test_slabs_that_are_registered_in_part(path, far, engine):
    def answer(dmabuf_fd, _target):
        return -errno.ENOMEM if dmabuf_fd == far.slabs[1].fd else 0

    with dmabuf.open(path, engine=engine) as file, emulation.registrar(answer):
        assert file.read_into(far, 64 * 1024).route is Route.NATIVE
        with pytest.raises(dmabuf.RouteUnavailable, match="could not map the dma-buf"):
            file.read_into(far, 68 * 1024)


def mappings():
    with open("/proc/self/maps") as maps:
        return sum("memfd:dma-buf" in line for line in maps)


def test_closing_either_side_clears_the_slots(path, engine):
    before = mappings()
    buf = dma_buf(SIZE, mapped=False)
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


@pytest.mark.parametrize("closed", ["buffer", "file"])
def test_an_event_loop_goes_on_while_a_dma_buf_is_unregistered(run, path, monkeypatch, closed):
    asked, may_go_on, real = threading.Event(), threading.Event(), lib.dmb_ring_register_dmabuf

    def register(ring, slot, dmabuf_fd, target_fd):
        if dmabuf_fd < 0:
            asked.set()
            assert may_go_on.wait(PATIENCE)
        return real(ring, slot, dmabuf_fd, target_fd)

    async def main():
        before = mappings()
        buf, other = dma_buf(SIZE, mapped=False), dma_buf(SIZE, mapped=False)
        file = await aio.open(path)
        assert (await file.read_into(buf, 4 * PAGE)).route is Route.NATIVE
        monkeypatch.setattr(lib, "dmb_ring_register_dmabuf", register)
        buf.close() if closed == "buffer" else await file.aclose()
        await anyio.to_thread.run_sync(asked.wait, PATIENCE)
        async with await aio.open(path) as file:
            assert (await file.read_into(other, 4 * PAGE)).route is Route.NATIVE
            assert content(other)[: 4 * PAGE] == path.read_bytes()[: 4 * PAGE]
            may_go_on.set()
        buf.close()
        other.close()
        while mappings() > before:
            await anyio.sleep(0.01)

    with emulation.native():
        run(main)


def test_a_read_only_dma_buf_is_not_written(path, engine):
    buf = dma_buf(SIZE, mapped=False, writable=False)
    with buf, dmabuf.open(path, "r+", engine=engine) as file:
        with pytest.raises(PermissionError):
            file.read_into(buf, 4096)
        assert file.write_from(buf, 4096).route is Route.NATIVE
    assert path.read_bytes()[:4096] == bytes(4096)


@pytest.mark.parametrize("size", [160 * 1024, 64 * 1024])  # of all slabs, and of the first
def test_a_reset_leaves_every_slab_its_slot(path, far, engine, monkeypatch, size):
    """Other transfers have requests on their way that name it."""
    resets, slots, real = [1], [], lib.dmb_ring_register_dmabuf

    def register(ring, slot, dmabuf_fd, target_fd):
        slots.append((slot, dmabuf_fd))
        return real(ring, slot, dmabuf_fd, target_fd)

    def answer(completion):
        if completion.straight and resets[0]:
            resets[0] -= 1
            return -errno.ENOENT
        return completion.result

    monkeypatch.setattr(lib, "dmb_ring_register_dmabuf", register)
    with dmabuf.open(path, engine=engine) as file:
        file.read_into(far, size)
        before, old = list(slots), b"".join(poison(slab.size) for slab in far.slabs)
        for slab in far.slabs:
            os.pwrite(slab.fd, poison(slab.size), 0)
        with Filter(answer):
            assert file.read_into(far, size).route is Route.NATIVE
        assert not resets[0] and slots == before + before
    assert content(far) == path.read_bytes()[:size] + old[size:]


@pytest.mark.parametrize("closed", ["file", "engine"])
def test_what_was_closed_leaves_nothing_with_a_buffer(path, buf, closed):
    """Neither memory nor mappings grow with the files and engines that a buffer was used with."""
    before = mappings()
    for _ in range(20):
        engine = emulation.engine(backend="threads")
        file = dmabuf.open(path, engine=engine)
        assert file.read_into(buf).route is Route.NATIVE
        if closed == "file":
            file.close()
        else:
            engine.close()
        gone = weakref.ref(engine)
        file.close()
        engine.close()
        del file, engine
        gc.collect()
        assert gone() is None and mappings() == before


def test_more_slabs_than_the_table_has_slots(path, engine, monkeypatch):
    """Nothing is registered then, and what was missing may be there the next time."""
    count = lib.DMB_BUFFER_SLOTS
    path.write_bytes(pattern((count + 1) * PAGE, 2))
    with contextlib.ExitStack() as stack:
        most, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = count + 1000
        if limit < needed:
            pytest.skip(f"needs {needed} descriptors: raise the hard limit of RLIMIT_NOFILE")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(most, needed), limit))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (most, limit))
        many = stack.enter_context(dma_buf(*[PAGE] * count, mapped=False))
        one = stack.enter_context(dma_buf(PAGE, mapped=False))
        file = stack.enter_context(dmabuf.open(path, engine=engine))
        assert file.read_into(one).route is Route.NATIVE
        match = f"{count} more slabs, and {count - 1} slots are free.*close other buffers"
        with pytest.raises(dmabuf.RouteUnavailable, match=match):
            file.read_into(many)
        assert file.read_into(many, (count - 1) * PAGE).route is Route.NATIVE
        with pytest.raises(dmabuf.RouteUnavailable, match="1 more slabs, and 0 slots are free"):
            file.read_into(many)
        one.close()
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

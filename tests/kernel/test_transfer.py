"""What only a whole kernel shows of transfers: bad sectors, slabs, memory, slow devices."""

import asyncio
import errno
import mmap
import os
import signal
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Engine, Route, aio
from tests.guards import needs
from tests.kernel.conftest import heap_read_only, native, null_blk, vgem, without_native
from tests.kernel.test_exporters import through_dmabuf
from tests.support import (
    PAGE,
    Filter,
    assert_same,
    drop_cache,
    fill,
    pattern,
    poison,
    raises_errno,
    read_and_compare,
    write_and_compare,
)

SIZE = 256 << 10
ROUTES = ["direct", "staged"]


@pytest.fixture(scope="module", params=["auto", "threads"])
def engine(request):
    with Engine(queue_depth=4, block_size="16KiB", backend=request.param) as made:
        yield made


# -- alignment


@needs("nvme", "udmabuf")
@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("injected", [False, True], ids=["as it is", "refused once"])
def test_memory_less_aligned_than_the_blocks(verb, injected):
    """Linux 6.12 refuses such memory where it is registered, and takes it where it is not."""
    path, size, at = os.environ["DMABUF_TEST_NVME1"], 17 << 16, 512
    refusals = [-errno.EINVAL] if injected else []
    with (
        open(path, "r+b", buffering=0) as reference,
        dmabuf.allocate(size + PAGE, exporter="udmabuf") as buffer,
        Engine(queue_depth=4, block_size="16KiB") as engine,
        dmabuf.open(path, "r+", engine=engine) as file,
        without_native(file, buffer),
        Filter(lambda done: refusals.pop() if refusals else done.result),
    ):
        compare = read_and_compare if verb == "read" else write_and_compare
        for _ in range(2):
            how = {"buffer_offset": at, "require": "zero-copy"}
            how |= {"limit": 2 * size} if verb == "write" else {}
            done = compare(file, reference.fileno(), buffer, size, **how)
            assert (done.route, done.copied) == (Route.DIRECT, 0)
            told = "less aligned than the file's blocks" in done.registration
            assert done.registered != told
            assert told or not injected
        aligned = compare(file, reference.fileno(), buffer, size, **(how | {"buffer_offset": 0}))
        assert aligned.registered and aligned.copied == 0


# -- bad sectors

BAD = (100 * 512, 101 * 512, 400 * 512)
"""The first bytes of the sectors that fail."""


@pytest.fixture(
    scope="module",
    params=[("auto", 0), ("auto", 1), ("threads", 0)],
    ids=["io_uring", "io_uring-partial", "threads"],
)
def bad(request):
    """(path, engine): a disk of 512-byte blocks with bad ones; it may do a part of a request."""
    backend, partial = request.param
    settings = {"blocksize": 512, "badblocks": "+100-101"}
    # Linux 6.12 has only the one behaviour, which it has no setting for.
    if "badblocks_partial_io" in Path("/sys/kernel/config/nullb/features").read_text():
        settings["badblocks_partial_io"] = partial
    with (
        null_blk("dmabuf-bad", 1 << 20, **settings) as path,
        Engine(queue_depth=4, block_size="16KiB", backend=backend) as engine,
    ):
        Path("/sys/kernel/config/nullb/dmabuf-bad/badblocks").write_text("+400-400")
        yield path, engine


def sectors(path, start, stop):
    """The good ones of [start, stop), one by one, past the page cache: {offset: bytes}."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, PAGE) as memory, memoryview(memory) as view:
        found = {}
        for offset in range(start, stop, 512):
            if offset not in BAD:
                assert os.preadv(fd, [view[:512]], offset) == 512
                found[offset] = memory[:512]
    os.close(fd)
    return found


def first_bad(start):
    return min(offset for offset in (start, *BAD) if offset >= start and offset // 512 * 512 in BAD)


@needs("null_blk")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("start", [0, 700, 99 * 512, BAD[0], 102 * 512])
def test_a_bad_sector_read(bad, buf, route, start):
    path, engine = bad
    where = {"file_offset": start, "buffer_offset": start % PAGE, "route": route}
    with dmabuf.open(path, engine=engine) as file, pytest.raises(OSError) as caught:
        file.read_into(buf, SIZE - 9000, **where)
    error, at = caught.value, first_bad(start)
    assert (error.errno, error.filename, error.nbytes) == (errno.EIO, path, at - start)
    assert f"at file offset {at}, after {at - start} bytes: " in str(error)
    got = buf.pread(SIZE, start % PAGE)
    for offset, data in sectors(path, -(-start // 512) * 512, at).items():
        assert got[offset - start : offset - start + 512] == data, offset


@needs("null_blk")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("start", [0, BAD[0] // PAGE * PAGE, -(-BAD[1] // PAGE) * PAGE])
def test_a_bad_sector_written(bad, buf, route, start):
    path, engine = bad
    with dmabuf.open(path, "r+", engine=engine) as file, pytest.raises(OSError) as caught:
        file.write_from(buf, SIZE - start, file_offset=start, route=route)
    error, at = caught.value, first_bad(start)
    assert (error.errno, error.filename, error.nbytes) == (errno.EIO, path, at - start)
    for offset, data in sectors(path, start, at).items():
        assert data == poison(SIZE)[offset - start : offset - start + 512], offset


@needs("null_blk")
@pytest.mark.parametrize("how", ["threads", "edges", "asyncio"])
def test_each_synced_write_to_a_bad_sector_fails(buf, how):
    """The kernel reports one failed write-back to one of those that wait for it."""
    part, count, rounds = 64 << 10, 4, 25

    def write(number, file):
        if how == "edges" and number % 2:
            where = {"file_offset": part * number + 3, "buffer_offset": 3, "route": "direct"}
            return file.write_from(buf, part - 7, **where)
        return file.write_from(buf, part, file_offset=part * number, route="buffered", sync=True)

    def writes(number):
        for _ in range(rounds):
            with raises_errno(errno.EIO):
                write(number, file)

    async def in_a_loop():
        async with await aio.open(path, "r+") as file:
            for _ in range(rounds):
                made = [write(number, file) for number in range(count)]
                for error in await asyncio.gather(*made, return_exceptions=True):
                    assert isinstance(error, OSError) and error.errno == errno.EIO, error

    with null_blk("dmabuf-flush", 1 << 20, blocksize=512) as path:
        Path(path).read_bytes()  # no write reads a bad block first
        marks = Path("/sys/kernel/config/nullb/dmabuf-flush/badblocks")
        for number in range(count):  # in the last block, which is an edge where there are edges
            bad = part * (number + 1) // 512 - 1
            marks.write_text(f"+{bad}-{bad}")
        if how == "asyncio":
            asyncio.run(in_a_loop())
            return
        with dmabuf.open(path, "r+") as file, ThreadPoolExecutor(count) as pool:
            list(pool.map(writes, range(count)))


@needs("null_blk")
def test_segments_around_a_bad_sector(bad, buf):
    path, engine = bad
    around = [(n * 512, n * 512, 512) for n in range(98, 104)]
    flat = array("Q", [number for triple in around for number in triple])
    with dmabuf.open(path, engine=engine) as file:
        with pytest.raises(OSError) as caught:
            file.read_segments(buf, flat)
        assert caught.value.errno == errno.EIO and caught.value.nbytes == 2 * 512
        assert f"at file offset {BAD[0]}, " in str(caught.value)
        assert file.read_segments(buf, flat[:6]).nbytes == 1024


# -- memory


@needs("udmabuf", "nvme", "root")
def test_transfers_across_slabs(engine, udmabuf_limit):
    """Four udmabufs of 1 MiB, one mapping: nothing is seen of where one ends."""
    udmabuf_limit(1)
    path = os.environ["DMABUF_TEST_NVME0"]
    reference = os.open(path, os.O_RDWR)
    fill(reference, pattern((3 << 20) + PAGE, 1))
    drop_cache(reference)
    with (
        dmabuf.allocate((3 << 20) + PAGE, exporter="udmabuf") as buffer,
        dmabuf.open(path, "r+", engine=engine) as file,
    ):
        assert [slab.size for slab in buffer.slabs] == [1 << 20] * 3 + [PAGE]
        for where in ((512, (1 << 20) - 512), (100, (1 << 20) - 3996)):
            for route in (None, "direct", "staged", "buffered"):
                how = {"file_offset": where[0], "buffer_offset": where[1], "route": route}
                size = (2 << 20) + 1000
                read_and_compare(file, reference, buffer, size, **how)
                seen = b"".join(through_dmabuf(slab) for slab in buffer.slabs)
                assert_same(seen, buffer.pread(buffer.size, 0), "through the dma-bufs")
            how["route"] = None
            transfer = write_and_compare(
                file, reference, buffer, size, limit=4 << 20, uncached=True, **how
            )
            assert transfer.route is (Route.NATIVE if native(buffer, engine) else Route.DIRECT)
    os.close(reference)


@needs("dma_heap", "vgem", "nvme")
@pytest.mark.parametrize("kind", ["dma-heap", "vgem"])
@pytest.mark.device_table("dma-heap", "read", "write")
def test_memory_that_turns_out_not_to_be_pinned(kind, engine):
    """The kernel's own EFAULT: what was not known of the buffer is learnt, and remembered."""
    path = os.environ["DMABUF_TEST_NVME0"]
    reference = os.open(path, os.O_RDWR)
    fill(reference, pattern(SIZE, 1))
    drop_cache(reference)
    made = vgem(SIZE) if kind == "vgem" else dmabuf.allocate(SIZE, exporter="system")
    with (
        made as buffer,
        dmabuf.open(path, "r+", engine=engine) as file,
        without_native(file, buffer),
    ):

        def forget_the_refusal():
            buffer.pin_refusal = None
            file.links.refresh()

        for verb in (read_and_compare, write_and_compare):
            forget_the_refusal()
            more = {"limit": SIZE} if verb is write_and_compare else {}
            transfer = verb(file, reference, buffer, SIZE, **more)
            assert transfer.route is Route.STAGED
            assert "EFAULT" in transfer.rejected[Route.DIRECT]
            assert 'exporter="udmabuf" or "memfd"' in file.plan(buffer).rejected[Route.DIRECT]
            with pytest.raises(dmabuf.RouteUnavailable, match="EFAULT"):
                file.read_into(buffer, require="zero-copy")
        forget_the_refusal()
        with pytest.raises(dmabuf.RouteUnavailable, match="EFAULT"):
            file.read_into(buffer, 4096, route="direct")
    os.close(reference)


@needs("dma_heap", "vgem", "nvme")
@pytest.mark.parametrize("kind", ["dma-heap", "vgem"])
def test_read_only_dma_bufs(kind, engine):
    path = os.environ["DMABUF_TEST_NVME1"]
    made = vgem(SIZE, os.O_RDONLY) if kind == "vgem" else heap_read_only(SIZE)
    with made as buffer, dmabuf.open(path, "r+", engine=engine) as file:
        for call in (file.read_into, file.plan):
            with pytest.raises(PermissionError, match="the buffer is read-only") as caught:
                call(buffer)
            assert (caught.value.errno, caught.value.filename) == (errno.EACCES, path)
        content = buffer.pread(SIZE, 0)
        for route in (None, "staged", "buffered"):
            fd = os.open(path, os.O_RDWR)
            fill(fd, poison(SIZE))
            drop_cache(fd)
            expected = route or ("native" if native(buffer, engine) else "staged")
            assert file.write_from(buffer, route=route).route == expected
            assert_same(os.pread(fd, SIZE, 0), content, "the drive")
            os.close(fd)


@needs("dma_heap", "nvme")
def test_registration_of_memory_without_pages_is_not_tried(engine):
    path = os.environ["DMABUF_TEST_NVME0"]
    with (
        dmabuf.allocate(4 << 20, exporter="system") as buffer,
        dmabuf.open(path, engine=engine) as file,
        without_native(file, buffer),
    ):
        transfer = file.read_into(buffer)
        assert (transfer.route, transfer.registered) == (Route.STAGED, False)


# -- a slow device


@needs("null_blk", "io_uring")
@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("backend", ["io_uring", "threads"])
def test_an_interrupt_waits_for_the_device_and_no_more(buf, verb, backend):
    """64 requests of 0.2 s, two at a time; after the interrupt only those in flight complete."""
    settings = {"irqmode": 2, "completion_nsec": 200_000_000, "queue_mode": 2}

    def stop(number, frame):
        fired.append(completed())
        if len(fired) < 3:  # a third one could replace the exception on its way to the caller
            raise KeyboardInterrupt

    def completed():
        """The requests that the device has completed, by its statistics."""
        counts = Path("/sys/block", Path(path).name, "stat").read_text().split()
        return int(counts[0]) + int(counts[4])

    fired = []
    with null_blk("dmabuf-slow", 2 << 20, **settings) as path:
        before = signal.signal(signal.SIGALRM, stop)
        try:
            with (
                Engine(queue_depth=2, block_size=4096, backend=backend) as engine,
                dmabuf.open(path, "r+", engine=engine) as file,
            ):
                signal.setitimer(signal.ITIMER_REAL, 0.5, 0.05)  # and again while it drains
                with pytest.raises(KeyboardInterrupt) as caught:
                    if verb == "read":
                        file.read_into(buf)
                    else:
                        file.write_from(buf)
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert completed() <= fired[0] + 2
                assert caught.value.nbytes % 4096 == 0 and caught.value.nbytes < SIZE // 2
                assert file.read_into(buf, 4096).nbytes == 4096
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    buf.close()  # BusyError if anything still held it

"""Every kind of buffer with every kind of target, each way by itself, every byte compared."""

import os
import subprocess

import pytest

import dmabuf
from dmabuf import Engine, Route
from tests.guards import needs
from tests.kernel.conftest import BUFFERS, PINNED, native, null_blk, without_native
from tests.kernel.test_exporters import through_dmabuf
from tests.support import (
    PAGE,
    assert_same,
    cached,
    drop_cache,
    exercise,
    fill,
    loop_device,
    mounted,
    pattern,
    poison,
    zram,
)

LIMIT = 96 << 10
ALL = ("direct", "staged", "buffered")

everything = needs("udmabuf", "dma_heap", "vgem", "hugepages", "nvme")


@pytest.fixture(
    scope="module",
    params=[
        *((kind, "auto") for kind in ("udmabuf", "huge pages", "dma-heap")),
        *((kind, "threads") for kind in ("udmabuf", "vgem")),
    ],
    ids="-".join,
)
def pair(request):
    """(a buffer, an engine): io_uring with some kinds of buffers, threads with others."""
    kind, backend = request.param
    with (
        BUFFERS[kind](LIMIT) as buffer,
        Engine(queue_depth=4, block_size="16KiB", backend=backend) as engine,
    ):
        buffer.kind = kind
        yield buffer, engine


@pytest.fixture
def buf(pair):
    return pair[0]


@pytest.fixture
def engine(pair):
    return pair[1]


def best(buffer):
    return "direct" if buffer.kind in PINNED else "staged"


def check(path, buffer, engine, rounds=5, best=best):
    routes = ALL if buffer.kind in PINNED else ALL[1:]
    rounds = rounds if buffer.size == LIMIT else 2  # all of a huge page is compared each time
    chosen = exercise(path, buffer, engine, routes=routes, limit=LIMIT, rounds=rounds)
    assert best(buffer) in chosen
    if buffer.kind not in PINNED:
        assert "direct" not in chosen
        with dmabuf.open(path) as file:
            with (
                without_native(file, buffer),
                pytest.raises(dmabuf.RouteUnavailable, match="no pages to pin") as caught,
            ):
                file.read_into(buffer, 4096, require="zero-copy")
            assert 'allocate with exporter="udmabuf"' in str(caught.value)
    if buffer.is_dmabuf:
        seen = b"".join(through_dmabuf(slab) for slab in buffer.slabs)
        assert_same(seen, buffer.pread(buffer.size, 0), "what the dma-buf itself shows")


@everything
@pytest.mark.device_table("NVMe block device", "read", "write", "zero-copy")
@pytest.mark.parametrize("drive", ["DMABUF_TEST_NVME0", "DMABUF_TEST_NVME1"])
def test_nvme(drive, buf, engine):
    path = os.environ[drive]
    with dmabuf.open(path) as file:
        block = 512 if drive.endswith("0") else 4096
        assert file.target.direct().alignment.offset == block
    check(path, buf, engine, best=lambda buf: "native" if native(buf, engine) else best(buf))


@everything
@needs("null_blk")
@pytest.mark.parametrize("block", [512, 4096])
def test_null_blk(buf, engine, block):
    with null_blk("dmabuf-test", 4 << 20, blocksize=block) as path:
        check(path, buf, engine, rounds=3)


@everything
@needs("scsi_debug")
def test_a_disk_of_512_byte_blocks(scsi, buf, engine):
    check(scsi, buf, engine, rounds=3)


@everything
@needs("zram")
def test_zram(buf, engine):
    with zram(4 << 20) as path:
        check(path, buf, engine, rounds=3)


@needs("btrfs")
@pytest.mark.parametrize("checksums", [True, False])
def test_btrfs(checksums, tmp_path):
    """Reads go past the page cache; writes do with checksums since Linux 7.3, without on any."""
    before = tuple(map(int, os.uname().release.split(".")[:2])) < (7, 3)
    data = pattern(16 << 20, 71)
    with (
        loop_device(tmp_path / "image", 160 << 20) as device,
        mounted(device, "btrfs", tmp_path / "mount") as folder,
        dmabuf.allocate(len(data), exporter="memfd") as buffer,
    ):
        path = folder / "file"
        path.touch()
        if not checksums:
            subprocess.run(["chattr", "+C", path], check=True)
        with dmabuf.open(path, "r+") as file:
            buffer.pwrite(data, 0)
            for size in (len(data), PAGE, len(data)):
                drop_cache(file.fileno())
                written = file.write_from(buffer, size)
                if checksums and before:
                    assert written.route is Route.BUFFERED
                    assert "btrfs" in written.rejected[Route.DIRECT]
                    with pytest.raises(dmabuf.RouteUnavailable, match=r"chattr \+C"):
                        file.write_from(buffer, require="uncached")
                else:
                    assert written.route is Route.DIRECT
                    assert cached(file.fileno()) == 0
            assert_same(path.read_bytes(), data, "the file")
            drop_cache(file.fileno())
            buffer.pwrite(poison(len(data)), 0)
            assert file.read_into(buffer, require="zero-copy").route is Route.DIRECT
            assert_same(buffer.pread(len(data), 0), data, "the buffer")
            assert cached(file.fileno()) == 0


@needs("btrfs")
def test_btrfs_that_compresses(tmp_path):
    """Reads by O_DIRECT that are none: seen at the first."""
    data = b"compressible" * (1 << 16)
    with (
        loop_device(tmp_path / "image", 160 << 20) as device,
        mounted(device, "btrfs", tmp_path / "mount", how="compress-force") as folder,
        dmabuf.allocate(len(data), exporter="memfd") as buffer,
    ):
        path = folder / "file"
        path.write_bytes(data)
        buffer.pwrite(poison(buffer.size), 0)
        with dmabuf.open(path) as file:
            drop_cache(file.fileno())
            first = file.read_into(buffer, len(data))
            assert cached(file.fileno()) * PAGE >= len(data)
            assert first.route is file.plan(buffer).route is Route.BUFFERED
            assert "compressed" in first.reason
        assert_same(buffer.pread(len(data), 0), data, "the buffer")


@needs("loop")
def test_a_loop_device_of_512_byte_blocks(tmp_path):
    """Where edges in flight beside the middle were seen to lose data: many odd writes."""
    with (
        loop_device(tmp_path / "image", 4 << 20, 512) as device,
        dmabuf.allocate(LIMIT, exporter="memfd") as buffer,
        Engine(queue_depth=4, block_size="16KiB") as engine,
    ):
        exercise(device, buffer, engine, routes=ALL, limit=LIMIT, rounds=16, seed=3)


@everything
def test_two_drives_at_once(buf):
    """From one drive into the buffer and on to the other, by the default engine's two rings."""
    one, other = os.environ["DMABUF_TEST_NVME0"], os.environ["DMABUF_TEST_NVME1"]
    size = LIMIT - LIMIT % 4096
    fd = os.open(one, os.O_RDWR)
    fill(fd, pattern(size, 9))
    drop_cache(fd)
    with dmabuf.open(one) as source, dmabuf.open(other, "r+") as sink:
        route = "native" if native(buf) else best(buf)
        assert source.read_into(buf, size).route == route
        assert sink.write_from(buf, size, sync=True).route == route
    os.close(fd)
    fd = os.open(other, os.O_RDONLY)
    assert_same(os.pread(fd, size, 0), pattern(size, 9), "the other drive")
    os.close(fd)

"""dmabuf.aio on a whole kernel: drives by block and by character device, and vgem's real fences."""

import functools
import time

import anyio
import pytest

import dmabuf
from dmabuf import aio
from tests.guards import needs
from tests.kernel.conftest import BUFFERS, null_blk
from tests.kernel.nvme_drive import everything
from tests.kernel.vgem import PATIENCE
from tests.support import assert_same, pattern, poison, whole

SIZE = 96 << 10
PIECE = 4096


@pytest.fixture(params=["disk", "node"])
def target(request, drive):
    return getattr(drive, request.param)


by_each_route = pytest.mark.parametrize("kind", ["udmabuf", "dma-heap"])


@everything
@by_each_route
def test_reads_at_once(run, drive, target, kind):
    data = pattern(SIZE, 3)
    drive.write(data)

    async def main():
        async with await aio.open(target) as file, anyio.create_task_group() as group:
            for at in reversed(range(0, SIZE, PIECE)):
                group.start_soon(
                    functools.partial(
                        file.read_into, buffer, PIECE, file_offset=at, buffer_offset=at
                    )
                )

    with BUFFERS[kind](SIZE) as buffer:
        buffer.pwrite(poison(SIZE), 0)
        run(main)
        assert_same(buffer.pread(SIZE, 0), data, "the buffer")


@everything
@by_each_route
def test_writes_at_once(run, drive, target, kind):
    data = pattern(SIZE, 4)
    drive.write(poison(SIZE))

    async def main():
        async with await aio.open(target, "r+") as file, anyio.create_task_group() as group:
            for at in reversed(range(0, SIZE, PIECE)):
                group.start_soon(
                    functools.partial(
                        file.write_from, buffer, PIECE, file_offset=at, buffer_offset=at
                    )
                )

    with BUFFERS[kind](SIZE) as buffer:
        buffer.pwrite(data, 0)
        run(main)
        assert_same(drive.read(SIZE), data, "the drive")
        assert_same(buffer.pread(SIZE, 0), data, "the buffer")


@everything
def test_a_transfer_waits_for_a_device_and_the_loop_goes_on(run, drive, card):
    data = pattern(PIECE, 5)
    drive.write(data)

    async def main():
        turns = 0
        with dmabuf.from_fd(card.fd) as buffer:
            fence = card.job("write")
            with card.ending(fence):
                async with await aio.open(drive.disk) as file, anyio.create_task_group() as group:

                    async def transfer():
                        await file.read_into(buffer, PIECE)
                        assert not card.fences
                        group.cancel_scope.cancel()

                    group.start_soon(transfer)
                    while True:
                        turns += 1
                        await anyio.sleep(0.005)
            assert_same(buffer.pread(PIECE, 0), data, "the buffer")
        return turns

    assert run(main) > 1


@everything
def test_a_device_that_is_never_done(run, drive, card):
    async def main():
        with dmabuf.from_fd(card.fd) as buffer:
            before = buffer.pread(PIECE, 0)
            fence = card.job("write")
            begun = time.monotonic()
            async with await aio.open(drive.disk) as file:
                with pytest.raises(TimeoutError):
                    await aio.wait(buffer, "read", timeout=0.05)
                with pytest.raises(TimeoutError):
                    await file.read_into(buffer, PIECE, timeout=0.05)
                with anyio.move_on_after(0.05) as scope:
                    await file.read_into(buffer, PIECE)
                assert scope.cancelled_caught
            assert time.monotonic() - begun < PATIENCE
            card.done(fence)
            assert_same(buffer.pread(PIECE, 0), before, "the buffer")

    run(main)


@needs("udmabuf", "io_uring", "null_blk")
def test_more_requests_than_the_kernel_looks_at_in_one_go():
    """To a device that blocks, so that the kernel's workers issue all of them again."""
    part = 8 << 20
    size = 8 * part

    async def main():
        async with await aio.open(path, "r+") as file, anyio.create_task_group() as group:
            for at in range(0, size, part):
                where = {"file_offset": at, "buffer_offset": at, "route": "direct"}
                group.start_soon(functools.partial(file.write_from, buffer, part, **where))

    with (
        null_blk("dmabuf-many", size, blocksize=512) as path,
        dmabuf.allocate(size, exporter="udmabuf") as buffer,
    ):
        buffer.pwrite(poison(size), 0)
        anyio.run(main)
        with open(path, "rb", buffering=0) as disk:
            assert buffer.pread(size, 0) == whole(disk.fileno())

"""The native route on the kernel at hand.

On one with the series "Add dmabuf read/write via io_uring" every buffer goes native to an NVMe
namespace, every byte compared. On any other, the same transfers say why not and go another way.
`lab/run --kernel IMAGE -- python3 -m pytest tests/kernel/test_native.py` runs them there.
"""

import os

import pytest

import dmabuf
from dmabuf import Route
from dmabuf.transfer.engine import default_engine
from tests.guards import needs
from tests.kernel.conftest import BUFFERS, null_blk
from tests.support import exercise, pattern

LIMIT = 96 << 10
OURS = ("native", "direct", "staged", "buffered")

everything = needs("udmabuf", "dma_heap", "vgem", "hugepages", "nvme")


@pytest.fixture
def native():
    """Whether this kernel has dma-buf registered buffers."""
    return default_engine().no_native() is None


def dma_bufs():
    return [kind for kind in BUFFERS if kind != "memfd"]


@everything
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", dma_bufs())
def test_every_byte(kind, number, native):
    path = os.environ[f"DMABUF_TEST_NVME{number}"]
    with (
        BUFFERS[kind](LIMIT) as buffer,
        dmabuf.Engine(queue_depth=4, block_size="16KiB") as engine,
    ):
        chosen = exercise(path, buffer, engine, routes=OURS, limit=LIMIT, rounds=8)
    assert ("native" in chosen) == native


@everything
@pytest.mark.parametrize("kind", dma_bufs())
def test_the_plan(kind, native):
    with BUFFERS[kind](LIMIT) as buffer, dmabuf.open(os.environ["DMABUF_TEST_NVME0"]) as file:
        plan = file.plan(buffer)
        if native:
            assert plan.route is Route.NATIVE and not plan.rejected
        else:
            why = "no dma-buf registered buffers" if buffer.is_dmabuf else "is not a dma-buf"
            assert why in plan.rejected[Route.NATIVE]
            with pytest.raises(dmabuf.RouteUnavailable, match=why):
                file.read_into(buffer, route="native")


@needs("null_blk", "udmabuf")
def test_a_target_that_does_not_take_dma_bufs(native):
    with (
        null_blk("dmabuf_native", 1 << 20) as path,
        BUFFERS["udmabuf"](LIMIT) as buffer,
        dmabuf.open(path, "r+") as file,
    ):
        transfer = file.read_into(buffer)
        assert transfer.route is Route.DIRECT
        expected = "does not move dma-bufs itself" if native else "no dma-buf registered buffers"
        assert expected in transfer.rejected[Route.NATIVE]


@everything
def test_slabs_are_a_slot_each(native):
    parameter = "/sys/module/udmabuf/parameters/size_limit_mb"
    with open(parameter) as file:
        before = file.read()
    try:
        with open(parameter, "w") as file:
            file.write("1")
        buffer = dmabuf.allocate("3MiB", exporter="udmabuf")
    finally:
        with open(parameter, "w") as file:
            file.write(before)
    data = pattern(2 << 20, 7)
    with buffer, dmabuf.open(os.environ["DMABUF_TEST_NVME0"], "r+") as file:
        assert len(buffer.slabs) == 3
        buffer.pwrite(data, 512 << 10)
        transfer = file.write_from(buffer, 2 << 20, buffer_offset=512 << 10)
        assert transfer.route is (Route.NATIVE if native else Route.DIRECT)
        buffer.pwrite(bytes(3 << 20), 0)
        file.read_into(buffer, 2 << 20, buffer_offset=512 << 10)
        assert buffer.pread(3 << 20, 0) == bytes(512 << 10) + data + bytes(512 << 10)

"""`dmabuf bench` on real drives, with real dma-bufs, and on a disk that is slow."""

import json
import os

import pytest

from dmabuf.memory import exporters
from dmabuf.transfer.engine import default_engine
from tests.guards import needs
from tests.kernel.conftest import null_blk
from tests.kernel.nvme_drive import everything
from tests.unit.command import dmabuf as command


def rows(told):
    return {
        (group["direction"], group["block"], row["way"]): row
        for group in told["groups"]
        for row in group["ways"]
    }


@needs("udmabuf", "dma_heap", "nvme", "io_uring")
@pytest.mark.parametrize(("exporter", "number"), [("udmabuf", 0), ("system", 1)])
def test_bench_a_drive(exporter, number, capsys):
    native = default_engine().no_native() is None
    device = os.environ[f"DMABUF_TEST_NVME{number}"]
    region = ("--region", "16MiB+32MiB", "--destroy")
    ended = command(capsys, "bench", "--quick", "--json", "--exporter", exporter, *region, device)
    assert (ended.status, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert told["rounds"] >= 1
    assert told["buffer"]["exporter"] == exporter
    assert told["why_not_cold"] is told["why_not_visible"] is None
    possible = {"staged", "buffered", "copy", "bounce", "mmap"}
    possible |= {"native"} if native else set()
    possible |= {"direct"} if exporter == "udmabuf" else set()
    found = rows(told)
    assert set(found) == {
        (direction, block, way)
        for direction in ("read", "write")
        for block in (4096, 1 << 20)
        for way in possible
    }
    for (_, _, way), row in found.items():
        assert row["cached_pages_before"] == 0
        if way in ("native", "direct", "staged", "bounce"):
            assert row["cached_pages_after"] == 0, way
    best = next(way for way in ("native", "direct", "staged") if way in possible)
    assert told["headlines"][0].startswith(f"read 1 MiB: {best} x32 is ")


@everything
def test_a_namespace_is_measured_by_its_disk(drive, capsys):
    ended = command(capsys, "bench", "--quick", drive.node)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.endswith(f"today need; name {drive.disk}, the same namespace\n")


@needs("udmabuf", "hugepages", "nvme")
@pytest.mark.parametrize("exporter", ["auto", "udmabuf"])
def test_huge_pages(exporter, capsys):
    few = ("--seconds", 2, "--rounds", 1, "--size", "4MiB", "--block", "1MiB", "--depth", 4)
    how = ("--exporter", exporter, "--huge-pages", "2MiB")
    ended = command(capsys, "bench", "--json", *few, *how, os.environ["DMABUF_TEST_NVME0"])
    right = exporters.maps_large_pages()
    if exporter == "udmabuf" and not right:
        assert (ended.status, ended.out) == (1, "")
        message = json.loads(ended.err)["message"]
        assert "may get wrong bytes" in message and 'exporter="memfd"' in message
        return
    assert (ended.status, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert told["buffer"]["huge_pages"] == "2MiB"
    assert told["buffer"]["exporter"] == ("udmabuf" if right else "memfd")
    assert right or "may get wrong bytes" in told["buffer"]["reason"]
    assert ("read", 1 << 20, "direct") in rows(told)


@needs("null_blk")
def test_quick_on_a_slow_disk(capsys):
    with null_blk("slow", 64 << 20, mbps=20) as device:
        ended = command(
            capsys, "bench", "--quick", "--json", "--region", "0+64MiB", "--destroy", device
        )
    assert (ended.status, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert told["rounds"] >= 1
    speeds = [row["bytes_per_second"] for key, row in rows(told).items() if key[1] == 1 << 20]
    assert max(speeds) < 100e6, "it was slow"

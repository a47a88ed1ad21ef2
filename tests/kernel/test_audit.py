"""Proof of arrival with real dma-bufs and drives, and `dmabuf verify` on them."""

import json
import os

import pytest

import dmabuf
from dmabuf import Route
from dmabuf.transfer.engine import default_engine
from tests.guards import needs
from tests.kernel.conftest import BUFFERS
from tests.support import pattern
from tests.unit.command import dmabuf as command

SIZE = 192 << 10
everything = needs("udmabuf", "dma_heap", "vgem", "hugepages", "nvme")


@everything
@pytest.mark.parametrize("kind", BUFFERS)
def test_every_kind_of_memory_can_be_compared(kind):
    with (
        BUFFERS[kind](SIZE) as buffer,
        dmabuf.open(os.environ["DMABUF_TEST_NVME0"], "r+") as file,
    ):
        buffer.pwrite(pattern(SIZE, 1), 0)
        assert "every byte of 192 KiB" in file.write_from(buffer, SIZE, audit="always").audited
        for route in Route:
            try:
                file.plan(buffer, size=SIZE - 512, file_offset=512, buffer_offset=512, route=route)
            except dmabuf.RouteUnavailable:
                continue
            transfer = file.read_into(
                buffer, SIZE - 512, file_offset=512, buffer_offset=512, route=route, audit="always"
            )
            assert transfer.route is route and "every byte" in transfer.audited
        assert buffer.pread(SIZE, 0) == pattern(SIZE, 1)


@everything
def test_the_first_native_transfer_of_a_pair():
    native = default_engine().no_native() is None
    with (
        BUFFERS["dma-heap"](SIZE) as buffer,
        dmabuf.open(os.environ["DMABUF_TEST_NVME0"], "r+") as file,
        dmabuf.open(os.environ["DMABUF_TEST_NVME1"], "r+") as other,
    ):
        for transfer in (file.read_into, file.write_from, other.read_into):
            assert ("every byte" in transfer(buffer, SIZE).audited) == native
            assert "every byte" not in transfer(buffer, SIZE).audited


@everything
@pytest.mark.parametrize(("exporter", "number"), [("udmabuf", 0), ("system", 1)])
def test_verify_a_drive(exporter, number, capsys):
    native = default_engine().no_native() is None
    ended = command(
        capsys, "verify", "--rounds", 4, "--seed", 1, "--exporter", exporter, "--json",
        "--region", "16MiB+4MiB", "--destroy", os.environ[f"DMABUF_TEST_NVME{number}"],
    )  # fmt: skip
    assert (ended.status, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert told["ok"] and told["exporter"] == exporter
    for row in told["results"]:
        possible = {"native": native, "direct": exporter == "udmabuf"}.get(row["route"], True)
        assert (row["transfers"] > 2) == possible, row

"""Memory of an NVMe drive (CMB), read and written by drives on either side of a PCIe switch."""

import errno
import io
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

import dmabuf
from tests.guards import needs, nvme_drive, peer_address, since
from tests.support import (
    assert_same,
    drop_cache,
    fill,
    pattern,
    poison,
    raises_errno,
    read_and_compare,
    write_and_compare,
)

EXPORTER = f"p2pmem:{peer_address()}"
FOLDER = Path(f"/sys/bus/pci/devices/{peer_address()}/p2pmem")
MIB = 1 << 20
SIZE = 4 * MIB

pytestmark = since((6, 13), "Debian's kernels have PCI_P2PDMA")  # at 7.3; their 6.12 has not


@pytest.fixture
def buffer() -> Iterator[dmabuf.Buffer]:
    free = (FOLDER / "available").read_text()
    with dmabuf.allocate(SIZE, exporter=EXPORTER) as made:
        yield made
    assert (FOLDER / "available").read_text() == free


@pytest.fixture
def plain(request: pytest.FixtureRequest) -> Iterator[io.FileIO]:
    """A drive by its serial number, with bytes that are not in the page cache."""
    with open(str(nvme_drive(request.param)), "r+b", buffering=0) as drive:
        fill(drive.fileno(), pattern(SIZE, 1), 0)
        drop_cache(drive.fileno())
        yield drive


@needs("p2pmem")
def test_memory_of_a_drive_is_a_zeroed_buffer(buffer: dmabuf.Buffer) -> None:
    assert (buffer.size, buffer.exporter, buffer.is_dmabuf) == (SIZE, EXPORTER, False)
    assert_same(buffer.pread(SIZE, 0), bytes(SIZE), "zeroed")
    buffer.pwrite(poison(SIZE), 0)
    assert_same(buffer.pread(SIZE, 0), poison(SIZE), "written by the CPU")


@pytest.mark.device_table("NVMe controller memory (CMB)", "read", "write", "zero-copy")
@needs("p2pmem")
@pytest.mark.parametrize("plain", ["lab-peer", "lab-cmb"], indirect=True)
def test_drives_behind_the_switch_reach_it(buffer: dmabuf.Buffer, plain: io.FileIO) -> None:
    fd = plain.fileno()
    with dmabuf.open(str(plain.name), "r+") as file:
        for size, offset, at in ((SIZE, 0, 0), (4096, 8192, 4096), (2 * MIB, 4096, MIB)):
            where = {"file_offset": offset, "buffer_offset": at, "require": "zero-copy"}
            read = read_and_compare(file, fd, buffer, size, **where)
            write = write_and_compare(file, fd, buffer, size, limit=SIZE, **where)
            assert {read.route, write.route} == {"direct"} and not read.copied + write.copied
            assert not read.registered


@needs("p2pmem", "nvme")
@pytest.mark.parametrize("plain", ["lab-nvme0"], indirect=True)
def test_a_drive_behind_another_port_is_named(buffer: dmabuf.Buffer, plain: io.FileIO) -> None:
    why = f"and the memory of {peer_address()} share no PCIe switch; use a drive behind the same"
    with dmabuf.open(str(plain.name), "r+") as file:
        with pytest.raises(dmabuf.RouteUnavailable, match=why):
            file.read_into(buffer, require="zero-copy")
        read = read_and_compare(file, plain.fileno(), buffer, SIZE)
        write = write_and_compare(file, plain.fileno(), buffer, SIZE, limit=SIZE)
        assert {read.route, write.route} == {"staged"} and read.copied == SIZE
        assert why in read.rejected["direct"] and why in write.rejected["direct"]
        with dmabuf.allocate(SIZE) as other:  # the file is as direct as ever for other memory
            assert read_and_compare(file, plain.fileno(), other, SIZE).route == "direct"


@needs("p2pmem")
def test_memory_of_a_drive_is_not_shared(buffer: dmabuf.Buffer) -> None:
    for attempt in (dmabuf.as_file, ForkingPickler.dumps):
        with pytest.raises(io.UnsupportedOperation, match="it has no descriptor"):
            attempt(buffer)


@needs("p2pmem")
def test_more_than_the_drive_has_is_not_tried() -> None:
    with raises_errno(errno.ENOMEM, "allocate 1 GiB: the device has .* left"):
        dmabuf.allocate("1GiB", exporter=EXPORTER)

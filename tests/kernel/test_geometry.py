"""Command geometry: how many NVMe commands a request takes, by the block layer's statistics."""

import os
from pathlib import Path

import pytest

import dmabuf
from dmabuf.transfer.engine import default_engine
from tests.kernel.conftest import BUFFERS
from tests.kernel.test_filesystems import filesystem
from tests.kernel.test_native_files import engine_of
from tests.kernel.test_targets import everything
from tests.support import PAGE, wait_until

__all__ = ["filesystem"]

SIZE = 8 << 20
DRIVES = ["DMABUF_TEST_NVME0", "DMABUF_TEST_NVME1"]


def queue(disk, name):
    return int(Path("/sys/block", disk, "queue", name).read_text())


def fewest(disk, route):
    """The commands that SIZE bytes take at most if each is as large as the kernel allows.

    Memory that is not registered, as that of staging blocks and of the emulated native route, goes
    in bios of 256 pieces or more, and the last command of each may be a short one.
    """
    limit = min(queue(disk, "max_sectors_kb") << 10, queue(disk, "max_segments") * PAGE)
    registered = route == "direct" or (route == "native" and default_engine().no_native() is None)
    return -(-SIZE // limit) + (0 if registered else SIZE // (256 * PAGE))


def statistics(disk, direction):
    """(commands, bytes) of a disk that is idle; a command counts when it is no longer in flight."""

    def fields():
        return list(map(int, Path("/sys/block", disk, "stat").read_text().split()))

    wait_until(lambda: not fields()[8], "an idle disk")
    found = fields()[0 if direction == "read" else 4 :]
    return found[0], found[2] * 512


def commands(file, buffer, disk, direction, route):
    """Move SIZE bytes twice, and return how many commands the second time took."""
    move = file.read_into if direction == "read" else file.write_from
    move(buffer, SIZE, route=route)  # registers, and is audited
    before = statistics(disk, direction)
    transfer = move(buffer, SIZE, route=route, audit="off")  # no samples are read, too
    count, nbytes = (
        now - was for now, was in zip(statistics(disk, direction), before, strict=True)
    )
    lookup = PAGE if transfer.route == "native" and file.kind == "file" else 0
    assert SIZE <= nbytes <= SIZE + lookup, f"{transfer}"  # a lookup of extents reads a block
    return count


@everything
@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize(
    ("kind", "route", "block"),
    [
        ("udmabuf", "native", None),
        ("udmabuf", "direct", None),
        ("udmabuf", "native", "8MiB"),
        ("udmabuf", "direct", "8MiB"),
        ("huge pages", "direct", "8MiB"),
        ("dma-heap", "native", "8MiB"),
        ("dma-heap", "staged", "8MiB"),
    ],
)
def test_an_aligned_request_takes_the_fewest_commands(drive, kind, route, block):
    path = os.environ[drive]
    disk = os.path.basename(path)
    with (
        engine_of(block_size=block) as engine,
        BUFFERS[kind](SIZE) as buffer,
        dmabuf.open(path, "r+", engine=engine) as file,
    ):
        for direction in ("read", "write"):
            assert commands(file, buffer, disk, direction, route) <= fewest(disk, route)


@everything
@pytest.mark.parametrize("route", ["native", "direct"])
def test_so_does_a_file_in_one_piece(filesystem, route):
    path = filesystem / "whole"
    with path.open("wb") as file:
        file.write(bytes(SIZE))
        os.fsync(file.fileno())
    number = os.stat(path).st_dev
    disk = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    with (
        engine_of(block_size="8MiB") as engine,
        BUFFERS["udmabuf"](SIZE) as buffer,
        dmabuf.open(path, engine=engine) as file,
    ):
        # ext4 may place it in two pieces, around its own blocks; and the lookup reads a block
        assert commands(file, buffer, disk, "read", route) <= fewest(disk, route) + 2
    path.unlink()

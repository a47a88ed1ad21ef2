"""The buffers and devices that only a whole kernel has, and no dma-buf left when the tests end."""

import contextlib
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.kernel import uapi
from dmabuf.memory import exporters
from dmabuf.transfer.audit import PAIRS
from dmabuf.transfer.engine import default_engine
from tests.guards import needs
from tests.kernel.nvme_drive import drive
from tests.kernel.test_exporters import heap_fd
from tests.kernel.vgem import Card, vgem
from tests.support import loop_device, mounted, run, wait_until

BUFINFO = Path("/sys/kernel/debug/dma_buf/bufinfo")


def dma_bufs() -> str:
    """How many dma-bufs the kernel has, and bytes."""
    return BUFINFO.read_text().splitlines()[-1] if os.access(BUFINFO, os.R_OK) else "unknown"


@pytest.fixture(scope="session", autouse=True)
def no_dma_buf_is_left() -> Iterator[None]:
    before = dma_bufs()
    yield
    assert settled(dma_bufs, before) == before


def settled(look: Callable[[], object], expected: object) -> object:
    """Return what `look` returns, once it is `expected`: the kernel drops references late."""
    wait_until(lambda: look() == expected, repr(expected))
    return look()


@pytest.fixture
def card() -> Iterator[Card]:
    made = Card()
    yield made
    made.close()


@pytest.fixture
def udmabuf_limit() -> Iterator[Callable[[int], object]]:
    """Sets how many MiB a udmabuf may have; at the end it is what it was."""
    path = Path(exporters.UDMABUF_SIZE_LIMIT)
    before = path.read_text()
    yield lambda mib: path.write_text(str(mib))
    path.write_text(before)


def heap_read_only(size: int) -> dmabuf.Buffer:
    fd = heap_fd(size, os.O_RDONLY)
    try:
        return dmabuf.from_fd(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def bare_udmabuf(offset: int, size: int, **how: object) -> Iterator[tuple[int, mmap.mmap]]:
    """A udmabuf as another program may make it, and the mapping of its memfd of 4 MiB at least."""
    device = exporters.open_udmabuf()
    fd, memory, _ = exporters.make_memory(4 << 20, name=None, numa_node=None, **how)
    made = uapi.udmabuf_create(device, fd, offset, size)
    try:
        with memory:
            yield made, memory
    finally:
        for descriptor in (made, fd, device):
            os.close(descriptor)


@contextlib.contextmanager
def others_huge_pages(size: int) -> Iterator[dmabuf.Buffer]:
    """A udmabuf of huge pages that another program made, on any kernel."""
    with bare_udmabuf(0, size, huge_pages="2MiB") as (fd, _), dmabuf.from_fd(fd) as buffer:
        yield buffer


def huge_pages(size: int) -> dmabuf.Buffer:
    """A udmabuf of huge pages, or a memfd of them where the kernel's udmabuf maps those wrongly."""
    buffer = dmabuf.allocate(size, huge_pages="2MiB")
    assert buffer.exporter == ("udmabuf" if exporters.maps_large_pages() else "memfd")
    return buffer


BUFFERS = {
    "udmabuf": lambda size: dmabuf.allocate(size, exporter="udmabuf"),
    "huge pages": huge_pages,
    "memfd": lambda size: dmabuf.allocate(size, exporter="memfd"),
    "dma-heap": lambda size: dmabuf.allocate(size, exporter="system"),
    "vgem": vgem,
}
PINNED = ("udmabuf", "huge pages", "memfd")
"""The buffers that `direct` works with."""


def native(buffer: dmabuf.Buffer, engine: dmabuf.Engine | None = None) -> bool:
    """Whether transfers between the buffer and an NVMe drive's block device go native."""
    return buffer.is_dmabuf and (engine or default_engine()).no_native() is None


@contextlib.contextmanager
def without_native(file: dmabuf.File, buffer: dmabuf.Buffer) -> Iterator[None]:
    """As if the kernel could not, for what is tested of the next routes."""
    PAIRS.mark(buffer.exporter, file.target.device(), "left out of this test")
    file.links.refresh()
    yield
    PAIRS.forget()
    file.links.refresh()


@contextlib.contextmanager
def null_blk(name: str, size: int, **settings: object) -> Iterator[str]:
    """A null_blk device with memory behind it; its path. `settings` are configfs attributes."""
    folder = Path("/sys/kernel/config/nullb", name)
    folder.mkdir()
    try:
        for attribute, value in ({"memory_backed": 1, "size": size >> 20} | settings).items():
            (folder / attribute).write_text(str(value))
        (folder / "power").write_text("1")
        node = Path("/dev", name)
        if not node.exists():  # before it took the folder's name
            node = Path("/dev/nullb" + (folder / "index").read_text().strip())
        yield str(node)
    finally:
        (folder / "power").write_text("0")
        folder.rmdir()


@contextlib.contextmanager
def small(filesystem: str, tmp_path: Path) -> Iterator[Path]:
    """A mounted filesystem that is soon full: its folder."""
    folder = tmp_path / "mnt"
    if filesystem == "tmpfs":
        folder.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder)
        try:
            yield folder
        finally:
            run("umount", folder)
        return
    image = tmp_path / "image"
    with loop_device(image, 64 << 20) as device, mounted(device, filesystem, folder):
        yield folder


@pytest.fixture(scope="session")
def scsi() -> Iterator[str]:
    """A disk of 512-byte blocks by scsi_debug; its path."""
    subprocess.run(["modprobe", "sd_mod"], check=True)
    subprocess.run(["modprobe", "scsi_debug", "dev_size_mb=16", "sector_size=512"], check=True)
    subprocess.run(["udevadm", "settle"], check=False) if Path("/run/udev").exists() else None

    def disks() -> list[str]:
        models = Path("/sys/block").glob("sd*/device/model")
        names = (one.parts[3] for one in models if one.read_text().strip() == "scsi_debug")
        return [f"/dev/{name}" for name in names if Path("/dev", name).exists()]

    wait_until(disks, "a disk by scsi_debug")
    yield disks()[0]
    subprocess.run(["modprobe", "--remove", "scsi_debug"], check=True)


__all__ = [
    "BUFFERS",
    "PINNED",
    "bare_udmabuf",
    "drive",
    "heap_read_only",
    "native",
    "needs",
    "null_blk",
    "others_huge_pages",
    "scsi",
    "small",
    "vgem",
    "without_native",
]

"""Memory of a PCI device that the CPU cannot map: what it is, what it refuses, what is left."""

import errno
import fcntl
import io
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.devices import drm, vfio
from dmabuf.kernel import uapi
from dmabuf.memory import foreign
from tests import emulation, forking
from tests.guards import needs, since, vfio_address, vgem_node
from tests.kernel.conftest import native
from tests.support import (
    PAGE,
    assert_same,
    drop_cache,
    fill,
    pattern,
    poison,
    raises_errno,
    whole,
)

ADDRESS = str(vfio_address())
MEMORY, REGISTERS = 2, 0  # the BARs of QEMU's ivshmem-plain: 1 MiB, and 256 bytes
SIZE = 1 << 20
exports = since((6, 19), "VFIO exports BARs")


@pytest.fixture
def device() -> Iterator[vfio.Device]:
    with vfio.Device(ADDRESS) as opened:
        yield opened


def place(device: vfio.Device) -> int:
    """Where the BAR is in the device's file."""
    layout = uapi.VFIO_REGION_STRUCT
    data = bytearray(layout.pack(layout.size, 0, MEMORY, 0, 0, 0))
    uapi.ioctl(device.fileno(), uapi.VFIO_DEVICE_GET_REGION_INFO, data)
    return layout.unpack(data)[5]


def through_vfio(device: vfio.Device) -> mmap.mmap:
    """The BAR by VFIO's own mapping, which no dma-buf has part in."""
    return mmap.mmap(device.fileno(), SIZE, offset=place(device))


@exports
@needs("vfio")
@pytest.mark.device_table("VFIO", "export")
def test_a_bar_is_a_buffer(device: vfio.Device) -> None:
    assert device.bars() == ((REGISTERS, 256), (MEMORY, SIZE))
    with device.bar(MEMORY, name="of a device") as buffer:
        assert (buffer.size, buffer.exporter, buffer.name, buffer.is_dmabuf) == (
            SIZE, "vfio_pci_core", "of a device", True,
        )  # fmt: skip
        assert buffer.reason == f"BAR 2 of {ADDRESS}"
        assert foreign.identify(buffer.fileno()) == ("vfio_pci_core", "of a device")
        assert os.lseek(buffer.fileno(), 0, os.SEEK_END) == SIZE
        with dmabuf.from_fd(buffer) as again:
            assert (again.size, again.mode) == (SIZE, "")
            with pytest.raises(io.UnsupportedOperation, match="the CPU cannot map this dma-buf"):
                again.pread(1, 0)


@exports
@needs("vfio")
def test_the_cpu_has_no_way_in(device: vfio.Device) -> None:
    with device.bar(MEMORY) as buffer:
        assert (buffer.mode, buffer.readable(), buffer.writable()) == ("", False, False)
        for attempt in (
            lambda: buffer.map("r+").__enter__(),
            lambda: buffer.open("r"),
            lambda: buffer.pread(1, 0),
            lambda: buffer.pwrite(b"x", 0),
            lambda: buffer.read(1),
            lambda: buffer.write(b"x"),
        ):
            with pytest.raises(io.UnsupportedOperation, match="cannot map this memory of a PCI"):
                attempt()
        with raises_errno(errno.EINVAL):  # and that is so
            mmap.mmap(buffer.fileno(), SIZE)


@exports
@needs("vfio", "nvme")
@pytest.mark.parametrize("direction", ["read", "write"])
def test_native_or_nothing(device: vfio.Device, direction: str, tmp_path: Path) -> None:
    """To a disk that could go native, and to a file that could not."""
    (tmp_path / "file").write_bytes(poison(SIZE))
    with device.bar(MEMORY) as buffer:
        for path in (os.environ["DMABUF_TEST_NVME0"], str(tmp_path / "file")):
            with dmabuf.open(path, "r+") as file:
                if native(buffer) and path.startswith("/dev/"):
                    assert file.plan(buffer, direction).route == "native"
                    continue
                with pytest.raises(dmabuf.RouteUnavailable) as caught:
                    file.plan(buffer, direction)
                assert caught.value.filename == path
                told = caught.value.reason
                assert "native: " in told
                why = "the CPU cannot map this memory of a PCI device"
                assert f"direct, staged, buffered: {why}" in told


@exports
@needs("vfio", "nvme")
@pytest.mark.device_table(
    "VFIO", "read", "write", "zero-copy", by="an emulation of the kernel series"
)
@pytest.mark.parametrize("start", [0, 16 * PAGE], ids=["all", "a part"])
def test_an_emulated_drive_reads_and_writes_it_natively(device: vfio.Device, start: int) -> None:
    """The kernel's own dma-buf is registered; the emulation has the BAR by VFIO's mapping."""
    drive, size = os.environ["DMABUF_TEST_NVME0"], SIZE - start
    with (
        through_vfio(device) as bar,
        open(drive, "r+b", buffering=0) as plain,
        emulation.memory(device.fileno(), place(device) + start),
        emulation.engine(queue_depth=4, block_size="64KiB") as engine,
        device.bar(MEMORY, start) as buffer,
        dmabuf.open(drive, "r+", engine=engine) as file,
    ):
        fill(plain.fileno(), pattern(SIZE, 1))
        drop_cache(plain.fileno())
        bar[:] = poison(SIZE)
        done = file.read_into(buffer, size - 8192, buffer_offset=4096)
        assert (done.route, done.copied, done.nbytes) == ("native", 0, size - 8192)
        expected = bytearray(poison(SIZE))
        expected[start + 4096 : -4096] = pattern(SIZE, 1)[: size - 8192]
        assert_same(bar[:], bytes(expected), "the device's memory")

        bar[:] = data = pattern(SIZE, 2)
        done = file.write_from(buffer, size - 4096, buffer_offset=4096, file_offset=8192)
        assert (done.route, done.copied, done.nbytes) == ("native", 0, size - 4096)
        drop_cache(plain.fileno())
        expected = pattern(SIZE, 1)[:8192] + data[start + 4096 :]
        assert_same(whole(plain.fileno(), len(expected)), expected, "the drive")
        with pytest.raises(io.UnsupportedOperation, match="the CPU cannot map"):
            buffer.pread(1, 0)


@exports
@needs("vfio", "nvme")
def test_what_is_refused_changes_nothing(device: vfio.Device, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with through_vfio(device) as memory, device.bar(MEMORY) as buffer, dmabuf.open(path) as file:
        memory[:] = poison(SIZE)
        with pytest.raises(dmabuf.RouteUnavailable):
            file.read_into(buffer)
        assert_same(memory[:], poison(SIZE), "the device's memory")
    with device.bar(MEMORY) as buffer, dmabuf.open(path, "r+") as file:
        with pytest.raises(dmabuf.RouteUnavailable):
            file.write_from(buffer)
        assert_same(path.read_bytes(), bytes(SIZE), "the file")


@exports
@needs("vfio", "nvme")
def test_parts_slabs_and_read_only(device: vfio.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = uapi.ioctl, []

    def ioctl(fd: int, request: int, argument: object) -> object:
        if request == uapi.VFIO_DEVICE_FEATURE:
            asked.append(uapi.VFIO_DMA_BUF_STRUCT.unpack(argument)[-2:])
        return real(fd, request, argument)

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    monkeypatch.setattr(vfio, "SLAB", 3 * 65536)
    with device.bar(MEMORY, PAGE, 10 * 65536, name="slabs") as buffer:
        assert asked == [(PAGE + slab.offset, slab.size) for slab in buffer.slabs]
        assert [slab.size // 65536 for slab in buffer.slabs] == [3, 3, 3, 1]
        assert [slab.offset // 65536 for slab in buffer.slabs] == [0, 3, 6, 9]
        for slab in buffer.slabs:
            assert os.lseek(slab.fd, 0, os.SEEK_END) == slab.size
            assert foreign.identify(slab.fd) == ("vfio_pci_core", "slabs")
    with device.bar(MEMORY, 0, 65536, writable=False) as buffer:
        assert fcntl.fcntl(buffer.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with dmabuf.open(os.environ["DMABUF_TEST_NVME0"]) as file:
            with pytest.raises(PermissionError, match="read-only"):
                file.read_into(buffer)


@exports
@needs("vfio")
def test_buffers_keep_the_device_open() -> None:
    with vfio.Device(ADDRESS) as device:
        buffer = device.bar(MEMORY)
    assert device.closed
    with pytest.raises(dmabuf.ClosedError):
        device.bar(MEMORY)
    with buffer:
        for _ in range(2):
            with pytest.raises(OSError, match="another program has it") as caught:
                vfio.Device(ADDRESS)
            assert (caught.value.errno, caught.value.filename[:10]) == (errno.EBUSY, "/dev/vfio/")
    vfio.Device(ADDRESS).close()


@exports
@needs("vfio", "vgem")
def test_a_gpu_that_cannot_reach_it(device: vfio.Device) -> None:
    with device.bar(MEMORY) as buffer, drm.Card(vgem_node()) as card:
        with raises_errno(errno.EOPNOTSUPP, r"import .* into vgem: it cannot reach"):
            card.handle(buffer)


# -- what is refused


@needs("vfio", "nvme")
def test_devices_that_cannot_be_opened() -> None:
    nvme = Path("/sys/class/block", Path(os.environ["DMABUF_TEST_NVME0"]).name, "device/device")
    taken = nvme.resolve().name
    for address, match in (
        ("0000:ff:1f.7", "no such PCI device; lspci -D"),
        (taken, f"nvme controls it; driverctl set-override {taken} vf"),
    ):
        with raises_errno(errno.ENODEV, match, filename=address):
            vfio.Device(address)
    for wrong in ("", "nvme0", "0000:00:05", "../../x", "00:05.9"):
        with pytest.raises(ValueError, match="invalid PCI address"):
            vfio.Device(wrong)
    with vfio.Device(ADDRESS.removeprefix("0000:")) as device:
        assert device.address == ADDRESS


@exports
@needs("vfio", "root")
def test_permission_is_that_of_the_node() -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match="have root chown it to you") as caught:
            vfio.Device(ADDRESS)
        node = caught.value.filename
        assert node.startswith("/dev/vfio/")
        os.seteuid(0)
        os.chown(node, 65534, -1)
        os.seteuid(65534)
        with vfio.Device(ADDRESS) as device, device.bar(MEMORY) as buffer:
            assert buffer.size == SIZE
    finally:
        os.seteuid(0)
        os.chown(node, 0, -1)


@needs("vfio")
def test_parts_that_cannot_be_exported(device: vfio.Device) -> None:
    for number, code, match in (
        (1, errno.ENODEV, r"it has no memory there; it has 0 \(256 B\), 2 \(1 MiB\)"),
        (REGISTERS, errno.EINVAL, "its 256 bytes are less than a page"),
    ):
        with raises_errno(code, match, filename=ADDRESS):
            device.bar(number)
    for arguments, match in (
        ((6,), "use the number of a BAR, 0 to 5"),
        ((-1,), "use the number of a BAR, 0 to 5"),
        ((MEMORY, 100), "whole pages"),
        ((MEMORY, 0, 100), "whole pages"),
        ((MEMORY, 0, 0), "not within BAR 2"),
        ((MEMORY, -PAGE), "offset"),
        ((MEMORY, PAGE, SIZE), "not within BAR 2"),
        ((MEMORY, SIZE), "not within BAR 2"),
    ):
        with pytest.raises(ValueError, match=match):
            device.bar(*arguments)
    with pytest.raises(ValueError, match="a dma-buf's label is 1 to 31 bytes"):
        device.bar(MEMORY, name="x" * 32)


@needs("vfio")
def test_a_kernel_that_exports_none(device: vfio.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third slab of four: those before are closed."""
    real, count = uapi.ioctl, 0

    def ioctl(fd: int, request: int, argument: object) -> object:
        nonlocal count
        if request == uapi.VFIO_DEVICE_FEATURE:
            count += 1
            if count == 3:
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return real(fd, request, argument)

    monkeypatch.setattr(vfio, "SLAB", SIZE // 4)
    monkeypatch.setattr(uapi, "ioctl", ioctl)
    with raises_errno(errno.ENOTTY, r"use Linux 6\.19 with CONFIG_VFIO_PCI"):
        device.bar(MEMORY)


@exports
@needs("vfio")
def test_a_fork_and_a_device_that_is_dropped() -> None:
    with vfio.Device(ADDRESS) as device, device.bar(MEMORY) as buffer:

        def child() -> None:
            with pytest.raises(dmabuf.ClosedError, match="before fork"):
                device.bar(MEMORY)
            device.close()
            buffer.close()

        forking.in_child(child)
        device.bar(MEMORY).close()
    with pytest.warns(ResourceWarning, match="unclosed <dmabuf.Device 0000:.* by VFIO>"):
        vfio.Device(ADDRESS)


@exports
@needs("vfio")
def test_the_example(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(poison(SIZE))
    words = [sys.executable, "examples/device_memory.py", ADDRESS, "2", str(tmp_path / "file")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.startswith("BAR 0: 256 bytes\nBAR 2: 1,048,576 bytes\n<dmabuf.Buffer 1 MiB")
    assert done.returncode == 1 and "no route for require='any': native: " in done.stderr

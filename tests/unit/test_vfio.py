"""Memory of PCI devices over a fake VFIO; tests/device/test_vfio.py has a device."""

import errno
import os
import struct

import pytest

import dmabuf
from dmabuf.devices import vfio
from dmabuf.kernel import uapi
from tests import forking
from tests.support import PAGE, pattern, raises_errno

ADDRESS = "0000:65:00.0"
SIZE = 1 << 20
CONFIG = 1 << 16
"""Where the configuration space is in the device's file."""

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


class FakeVfio:
    """A device with 256 bytes in BAR 0, 1 MiB in BAR 2, and a BAR of 8 GiB.

    ``errors`` has the errno with which an ioctl fails, by the name of its constant, and after how
    many calls.
    """

    def __init__(self, other, folder) -> None:
        self.other, self.folder = other, folder
        self.errors: dict[str, tuple[int, int]] = {}
        self.viable = True
        self.sizes = {0: 256, 2: SIZE, 4: 8 << 30}
        self.exported: list[tuple] = []
        self.device = folder / "device"
        self.device.write_bytes(bytes(CONFIG) + pattern(4, 1) + bytes(60))
        self.names = {
            getattr(uapi, name): name.removeprefix("VFIO_")
            for name in dir(uapi)
            if name.startswith(("VFIO_SET_", "VFIO_GROUP_", "VFIO_DEVICE_"))
        }

    def ioctl(self, fd: int, request: int, argument: object) -> object:
        name = self.names.get(request)
        if name is None:
            return self.other(fd, request, argument)
        number, left = self.errors.get(name, (0, 0))
        if number and not left:
            fail(number)
        self.errors[name] = number, left - 1
        return getattr(self, name.lower())(argument) or 0

    def group_get_status(self, argument):
        argument[:] = uapi.VFIO_GROUP_STATUS_STRUCT.pack(8, int(self.viable))

    def group_set_container(self, argument):
        [container] = struct.unpack("=i", argument)
        assert os.readlink(f"/proc/self/fd/{container}") == str(self.folder / "vfio")

    def set_iommu(self, argument):
        assert argument == uapi.VFIO_TYPE1V2_IOMMU

    def group_get_device_fd(self, argument):
        assert argument == ADDRESS.encode() + b"\0"
        return os.open(self.device, os.O_RDWR | os.O_CLOEXEC)

    def device_get_region_info(self, argument):
        layout = uapi.VFIO_REGION_STRUCT
        index = layout.unpack(argument)[2]
        offset = CONFIG if index == uapi.VFIO_PCI_CONFIG_REGION else 0
        argument[:] = layout.pack(layout.size, 0, index, 0, self.sizes.get(index, 0), offset)

    def device_feature(self, argument):
        size, flags, index, access, _, count, start, length = uapi.VFIO_DMA_BUF_STRUCT.unpack(
            argument
        )
        assert (size, count) == (uapi.VFIO_DMA_BUF_STRUCT.size, 1) and flags & 0xFFFF == 11
        self.exported.append((index, start, length))
        made = os.memfd_create("bar")
        fd = os.open(f"/proc/self/fd/{made}", access)
        os.close(made)
        return fd


@pytest.fixture
def fake(kernel, tmp_path, monkeypatch):
    """A device of the group 17, which vfio-pci controls."""
    folder, group = tmp_path / "pci" / ADDRESS, tmp_path / "groups" / "17"
    (group / "devices" / ADDRESS).mkdir(parents=True)
    (group / "devices" / "0000:65:00.1").mkdir()
    (tmp_path / "vfio-pci").mkdir()
    folder.mkdir(parents=True)
    (folder / "driver").symlink_to(tmp_path / "vfio-pci")
    (folder / "iommu_group").symlink_to(group)
    for name in ("vfio", "17"):
        (tmp_path / name).touch()
    made = FakeVfio(kernel.ioctl, tmp_path)
    real = os.open

    def opened(path, flags, *rest):
        if isinstance(path, str) and path.startswith("/dev/vfio/"):
            path = str(tmp_path / path.removeprefix("/dev/vfio/"))
        return real(path, flags, *rest)

    monkeypatch.setattr(vfio, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(uapi, "ioctl", made.ioctl)
    return made


@pytest.fixture
def device(fake):
    with vfio.Device(ADDRESS) as made:
        yield made


def test_opening_a_device_enables_its_memory(fake):
    with vfio.Device("65:00.0") as device:
        assert device.address == ADDRESS and "by VFIO" in repr(device)
        assert device.bars() == ((0, 256), (2, SIZE), (4, 8 << 30))
        expected = bytearray(pattern(4, 1)) + bytes(60)
        expected[4] = 2
        assert os.pread(device.fileno(), 64, CONFIG) == bytes(expected)
    assert device.closed and "closed" in repr(device)
    device.close()
    with pytest.raises(dmabuf.ClosedError):
        device.bars()


def test_a_part_of_a_bar_is_a_buffer_that_keeps_the_device_open(fake):
    with vfio.Device(ADDRESS) as device:
        buffer = device.bar(2, PAGE, 2 * PAGE, name="registers")
        known = os.fstat(device.fileno())
    with buffer:
        assert fake.exported == [(2, PAGE, 2 * PAGE)]
        assert (buffer.size, buffer.name, buffer.mode) == (2 * PAGE, "registers", "")
        assert buffer.reason == f"BAR 2 of {ADDRESS}"
        with pytest.raises(OSError, match="the CPU cannot map this memory of a PCI device"):
            buffer.pread(1, 0)
        assert any(os.path.samestat(known, os.stat(f"/proc/self/fd/{n}")) for n in descriptors())
    assert not any(os.path.samestat(known, os.stat(f"/proc/self/fd/{n}")) for n in descriptors())


def descriptors() -> list[int]:
    numbers = map(int, os.listdir("/proc/self/fd"))
    return [number for number in numbers if os.path.exists(f"/proc/self/fd/{number}")]


def test_a_large_bar_has_a_slab_for_each_gib(fake, device):
    with device.bar(4, "1GiB", (2 << 30) + 8192, writable=False, name="far") as buffer:
        assert fake.exported == [
            (4, 1 << 30, 1 << 30), (4, 2 << 30, 1 << 30), (4, 3 << 30, 8192),
        ]  # fmt: skip
        assert [(slab.offset, slab.size) for slab in buffer.slabs] == [
            (0, 1 << 30), (1 << 30, 1 << 30), (2 << 30, 8192),
        ]  # fmt: skip
    with device.bar(4, 0, "2GiB") as buffer:
        assert [slab.size for slab in buffer.slabs] == [1 << 30, 1 << 30]


def test_an_export_that_fails_leaves_no_slab(fake, device):
    fake.errors["DEVICE_FEATURE"] = errno.ENOTTY, 2
    with raises_errno(errno.ENOTTY, r"export BAR 4: the kernel does not; use Linux 6\.19"):
        device.bar(4)
    assert len(fake.exported) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((1,), OSError, r"it has no memory there; it has 0 \(256 B\), 2 \(1 MiB\), 4 \(8 GiB\)"),
        ((0,), OSError, "its 256 bytes are less than a page"),
        ((6,), ValueError, "use the number of a BAR, 0 to 5"),
        ((2, 100), ValueError, "whole pages"),
        ((2, 0, 100), ValueError, "whole pages"),
        ((2, 0, 0), ValueError, "not within BAR 2"),
        ((2, PAGE, SIZE), ValueError, "not within BAR 2"),
        ((2, SIZE), ValueError, "not within BAR 2"),
    ],
)
def test_parts_that_cannot_be_exported(fake, device, arguments, error, match):
    with pytest.raises(error, match=match):
        device.bar(*arguments)
    assert not fake.exported


@pytest.mark.parametrize(
    ("name", "number", "match"),
    [
        ("GROUP_GET_DEVICE_FD", errno.EBUSY, "open: another program has it"),
        ("SET_IOMMU", errno.ENODEV, "its driver is missing; modprobe vfio_iommu_type1"),
        ("SET_IOMMU", errno.EPERM, "its interrupts are not isolated"),
        ("GROUP_SET_CONTAINER", errno.EBUSY, "another program has it"),
        ("DEVICE_GET_REGION_INFO", errno.ENODEV, "get the size of region 7: the device is gone"),
    ],
)
def test_a_kernel_that_refuses(fake, name, number, match):
    fake.errors[name] = number, 0
    with raises_errno(number, match):
        vfio.Device(ADDRESS)


def test_machines_on_which_a_device_cannot_be_opened(fake, tmp_path):
    fake.viable = False
    with raises_errno(errno.EPERM, f"bind all of {ADDRESS}, 0000:65:00.1 to vfio-pci"):
        vfio.Device(ADDRESS)
    (tmp_path / "17").unlink()
    with raises_errno(errno.ENOENT, "there is no such device; modprobe vfio-pci"):
        vfio.Device(ADDRESS)
    folder = tmp_path / "pci" / ADDRESS
    (folder / "iommu_group").unlink()
    with raises_errno(errno.ENODEV, "no IOMMU isolates it"):
        vfio.Device(ADDRESS)
    (folder / "driver").unlink()
    with raises_errno(errno.ENODEV, "no driver controls it; driverctl set-override"):
        vfio.Device(ADDRESS)
    with raises_errno(errno.ENODEV, "no such PCI device; lspci -D"):
        vfio.Device("0000:66:00.0")
    for wrong in ("", "nvme0", "0000:00:05", "../../x", "00:05.9"):
        with pytest.raises(ValueError, match="invalid PCI address"):
            vfio.Device(wrong)


def test_a_fork_and_a_device_that_is_dropped(fake):
    with vfio.Device(ADDRESS) as device, device.bar(2) as buffer:

        def child() -> None:
            with pytest.raises(dmabuf.ClosedError, match="before fork"):
                device.bar(2)
            device.close()
            buffer.close()

        forking.in_child(child)
        device.bar(2).close()
    with pytest.warns(ResourceWarning, match=r"unclosed <dmabuf\.Device 0000:65:00\.0 by VFIO>"):
        vfio.Device(ADDRESS)

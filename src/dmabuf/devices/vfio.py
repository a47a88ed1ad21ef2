"""Memory of PCI devices as Buffers, by VFIO: for devices to read and write, not for the CPU.

    >>> from dmabuf.devices import vfio
    >>> with vfio.Device("0000:65:00.0") as device:
    ...     buffer = device.bar(2)

The kernel exports a BAR, or a part of one, as a dma-buf (VFIO_DEVICE_FEATURE_DMA_BUF, Linux 6.19
with CONFIG_VFIO_PCI_DMABUF). A transfer to or from it takes the `native` route or is refused: see
docs/guides/pci.md.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dmabuf.devices import lifetime
from dmabuf.devices.node import call, failure
from dmabuf.errors import os_error
from dmabuf.kernel import uapi
from dmabuf.memory import Buffer, Slab, foreign
from dmabuf.sizes import format_size, parse_size

__all__ = ["Bar", "Device"]

_BARS = 6
SLAB = 1 << 30  # of one dma-buf: larger dma-bufs cannot be registered with io_uring everywhere
_COMMAND, _COMMAND_MEMORY = 4, 2  # of the PCI configuration space
_HELD = {errno.EBUSY: "another program has it, or another device of its IOMMU group"}
_PCI = Path("/sys/bus/pci/devices")
_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", re.IGNORECASE)
_UNMAPPABLE = "the CPU cannot map this memory of a PCI device: only devices can read and write it"


class Bar(NamedTuple):
    """One memory region of a device: its number, from 0 to 5, and its size in bytes."""

    number: int
    size: int


class Device(lifetime.DeviceHandle):
    """A PCI device that the vfio-pci driver controls, opened for its memory.

    No other program can open a device of its IOMMU group meanwhile. The device gets no access to
    memory of the machine. Buffers keep it open: a closed Device ends with the last of them.
    Thread-safe. After a fork the child can only close its copy.
    """

    def __init__(self, address: str) -> None:
        """Open a device by its PCI address, such as "0000:65:00.0".

        Raises:
            OSError: there is no such device, another driver controls it, or there is no IOMMU
                (ENODEV); no permission (EACCES); another program has its group (EBUSY).
            ValueError: an invalid PCI address.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise ValueError(f"invalid PCI address {address!r}: use the form 0000:65:00.0")
        self.address = f"{match[1] or '0000'}:{match[2]}".lower()
        """The PCI address."""
        self._lock = threading.RLock()
        self._users: set[object] = {"device"}
        """The device itself, without a reference to it, and a token of each Buffer."""
        self._fd = _open_device(self.address)
        try:
            self._enable_memory()
        except BaseException:
            os.close(self._fd)
            raise
        self._opened()

    def bars(self) -> tuple[Bar, ...]:
        """Return the BARs of the device. I/O ports are included, and cannot be exported."""
        with self._lock:
            self.check_open()
            sizes = [self._region(index)[0] for index in range(_BARS)]
            return tuple(Bar(number, size) for number, size in enumerate(sizes) if size)

    def bar(
        self,
        index: int,
        offset: int | str = 0,
        size: int | str | None = None,
        *,
        writable: bool = True,
        name: str | None = None,
    ) -> Buffer:
        """Export a BAR, or a part of one, as a Buffer; one slab for each GiB.

        Args:
            index: the number of the BAR, from 0 to 5.
            offset: the first byte, a multiple of the page size.
            size: bytes, a multiple of the page size; None is all of the rest.
            writable: False makes the Buffer read-only for transfers.
            name: a label for the dma-bufs.

        Raises:
            OSError: there is no such BAR (ENODEV), it is smaller than a page (EINVAL), or the
                kernel does not export it (ENOTTY).
            ValueError: a range that is not within the BAR, or not of whole pages.
            ClosedError: the device is closed.
        """
        foreign.check_name(name)
        with self._lock:
            self.check_open()
            start, length = self._range(index, offset, size)
            slabs = self._slabs(index, start, length, writable, name)
            identity = foreign.identify(slabs[0].fd)
            buffer = Buffer(
                slabs,
                None,
                exporter="vfio" if identity is None else identity.exporter,
                reason=f"BAR {index} of {self.address}",
                name=name,
                writable=writable,
                map_refusal=_UNMAPPABLE,
            )
            token = object()
            self._users.add(token)
            lifetime.on_close(buffer, partial(self._leave, token))
            return buffer

    def _range(self, index: int, offset: int | str, size: int | str | None) -> tuple[int, int]:
        """Return the first byte and the length of a part of a BAR, checked."""
        if not 0 <= index < _BARS:
            raise ValueError(f"invalid index {index}: use the number of a BAR, 0 to {_BARS - 1}")
        whole = self._region(index)[0]
        if not whole:
            have = ", ".join(f"{bar.number} ({format_size(bar.size)})" for bar in self.bars())
            text = f"export BAR {index}: it has no memory there; it has {have or 'none'}"
            raise os_error(errno.ENODEV, text, self.address)
        if whole < mmap.PAGESIZE:
            text = f"export BAR {index}: its {whole} bytes are less than a page"
            raise os_error(errno.EINVAL, text, self.address)
        start = parse_size(offset, "offset")
        length = whole - start if size is None else parse_size(size)
        if length <= 0 or start + length > whole:
            text = f"bytes {start} to {start + length} are not within BAR {index}"
            raise ValueError(f"{text} of {whole} bytes")
        if (start | length) % mmap.PAGESIZE:
            text = f"invalid offset {start} or size {length}: use whole pages"
            raise ValueError(f"{text} of {mmap.PAGESIZE} bytes")
        return start, length

    def _slabs(
        self, index: int, start: int, length: int, writable: bool, name: str | None
    ) -> list[Slab]:
        layout, what = uapi.VFIO_DMA_BUF_STRUCT, f"export BAR {index}"
        flags = uapi.VFIO_DEVICE_FEATURE_GET | uapi.VFIO_DEVICE_FEATURE_DMA_BUF
        access = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        fixes = {
            errno.ENOTTY: "the kernel does not; use Linux 6.19 with CONFIG_VFIO_PCI_DMABUF",
            errno.ENODEV: "another driver has claimed that memory, or the device is gone",
            errno.EINVAL: "the kernel can export no part of this BAR",
        }
        slabs: list[Slab] = []
        try:
            for at in range(0, length, SLAB):
                part = min(SLAB, length - at)
                values = (layout.size, flags, index, access, 0, 1, start + at, part)
                request, item = uapi.VFIO_DEVICE_FEATURE, bytearray(layout.pack(*values))
                fd = call(self._fd, request, item, what, self.address, fixes)
                slabs.append(Slab(fd, at, part))
                if name is not None:
                    uapi.set_name(slabs[-1].fd, os.fsencode(name))
        except BaseException:
            for slab in slabs:
                os.close(slab.fd)
            raise
        return slabs

    def _region(self, index: int) -> tuple[int, int]:
        """Return the size of a region, and its offset on the descriptor."""
        layout = uapi.VFIO_REGION_STRUCT
        item = bytearray(layout.pack(layout.size, 0, index, 0, 0, 0))
        what = f"get the size of region {index}"
        call(self._fd, uapi.VFIO_DEVICE_GET_REGION_INFO, item, what, self.address)
        size, offset = layout.unpack(item)[4:]
        return size, offset

    def _enable_memory(self) -> None:
        """Enable the BARs: the kernel revokes a dma-buf of memory that is not enabled."""
        where = self._region(uapi.VFIO_PCI_CONFIG_REGION)[1] + _COMMAND
        command = int.from_bytes(os.pread(self._fd, 2, where), "little")
        if not command & _COMMAND_MEMORY:
            os.pwrite(self._fd, (command | _COMMAND_MEMORY).to_bytes(2, "little"), where)

    def fileno(self) -> int:
        """Return the VFIO device's descriptor, for other ioctls. Raises ClosedError."""
        self.check_open()
        return self._fd

    def close(self) -> None:
        """Close the device, once its Buffers are closed too. Closing again does nothing.

        The kernel then revokes the memory from every importer.
        """
        if self.forked:  # without the lock, which a fork may have copied in the locked state
            if not self._closed:
                self._closed = True
                os.close(self._fd)
            return
        with self._lock:
            self._closed = True
            self._leave("device")

    def _leave(self, user: object) -> None:
        """Close the descriptor after its last user. An interrupted call can be repeated."""
        if self.forked:
            return
        with self._lock:
            self._users.discard(user)
            if not self._users and self._fd >= 0:
                closing, self._fd = self._fd, -1
                os.close(closing)

    def __repr__(self) -> str:
        return f"<dmabuf.Device {self.address} {'closed' if self._closed else 'by VFIO'}>"


def _open_device(address: str) -> int:
    """Return the descriptor of a device, in a container of its own that maps no memory."""
    node = f"/dev/vfio/{_group(address)}"
    with _open_node("/dev/vfio/vfio") as container, _open_node(node) as group:
        layout, what = uapi.VFIO_GROUP_STATUS_STRUCT, "set up its IOMMU group"
        status = bytearray(layout.pack(layout.size, 0))
        call(group, uapi.VFIO_GROUP_GET_STATUS, status, what, node)
        if not layout.unpack(status)[1] & uapi.VFIO_GROUP_FLAGS_VIABLE:
            others = ", ".join(sorted(os.listdir(_PCI / address / "iommu_group/devices")))
            text = f"{what}: other drivers have devices of it; bind all of {others} to vfio-pci"
            raise os_error(errno.EPERM, text, node)
        fixes = _HELD | {
            errno.ENODEV: "its driver is missing; modprobe vfio_iommu_type1",
            errno.EPERM: "its interrupts are not isolated; see vfio_iommu_type1's options",
        }
        pointer = struct.pack("=i", container)
        call(group, uapi.VFIO_GROUP_SET_CONTAINER, pointer, what, node, fixes)
        kind = uapi.VFIO_TYPE1V2_IOMMU
        call(container, uapi.VFIO_SET_IOMMU, kind, what, node, fixes)
        # The device keeps its group open, and the group its container.
        name = bytearray(address.encode() + b"\0")  # ioctl returns `bytes`, not the descriptor
        return call(group, uapi.VFIO_GROUP_GET_DEVICE_FD, name, "open", address, _HELD)


def _group(address: str) -> str:
    folder = _PCI / address
    if not folder.exists():
        text = "open: there is no such PCI device; lspci -D lists them"
        raise os_error(errno.ENODEV, text, address)
    driver = (folder / "driver").resolve().name if (folder / "driver").exists() else "no driver"
    if "vfio" not in driver:
        text = f"open: {driver} controls it; driverctl set-override {address} vfio-pci, as root"
        raise os_error(errno.ENODEV, text, address)
    if not (folder / "iommu_group").exists():
        text = "open: no IOMMU isolates it; enable VT-d or AMD-Vi, and boot with intel_iommu=on"
        raise os_error(errno.ENODEV, text, address)
    return (folder / "iommu_group").resolve().name


@contextmanager
def _open_node(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        fixes = _HELD | {
            errno.ENOENT: "there is no such device; modprobe vfio-pci",
            errno.EACCES: "permission denied; be root, or have root chown it to you",
        }
        raise failure(error, "open its IOMMU group", path, fixes) from None
    try:
        yield fd
    finally:
        os.close(fd)

"""Memory of PCI devices as Buffers, by VFIO: for devices to read and write, not for the CPU.

    >>> from dmabuf.devices import vfio
    >>> with vfio.Device("0000:65:00.0") as device:
    ...     buffer = device.bar(2)

The kernel exports a BAR, or a part of one, as a dma-buf (VFIO_DEVICE_FEATURE_DMA_BUF, Linux 6.19
with CONFIG_VFIO_PCI_DMABUF). A transfer to or from it goes `native` or not at all: docs/pci.md.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from dmabuf import _process, _uapi, exporters
from dmabuf.buffer import Buffer, Slab
from dmabuf.errors import ClosedError, Uncopyable, os_error
from dmabuf.exporters import foreign
from dmabuf.sizes import Size, as_int, format_size, parse_size

__all__ = ["Bar", "Device"]

CONTAINER = "/dev/vfio/vfio"
SYSFS = Path("/sys/bus/pci/devices")

_BARS = 6
_LARGEST_SLAB = 1 << 30
"""Larger dma-bufs cannot be registered with io_uring everywhere."""

_COMMAND, _COMMAND_MEMORY = 4, 2  # of the PCI configuration space

_NOT_BOUND = "as root: driverctl set-override {} vfio-pci"
_UNMAPPABLE = (
    "the CPU has no mapping of this memory of a PCI device: only devices can read and write it"
)
_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", re.IGNORECASE)


class Bar(NamedTuple):
    """One of a device's memories: its number, from 0 to 5, and its size in bytes."""

    number: int
    size: int


class Device(Uncopyable, instead="open it again where it is needed"):
    """A PCI device that is in vfio-pci's hands, opened for its memory.

    Nobody else can open a device of its IOMMU group meanwhile. It gets no access to any memory of
    the machine. Its Buffers keep it open: what close() was called on goes with the last of them.
    Thread-safe. After fork the child's copy can only be closed.
    """

    _closed = True  # until __init__ is through

    def __init__(self, address: str) -> None:
        """Open a device by its PCI address, such as "0000:65:00.0".

        Raises:
            OSError: no such device, a driver that is not VFIO's, no IOMMU (ENODEV); no permission
                (EACCES); another program has it or its group (EBUSY).
            ValueError: what is no PCI address.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise ValueError(f"{address!r} is no PCI address: those are as in 0000:65:00.0")
        self.address = f"{match[1] or '0000'}:{match[2]}".lower()
        """The PCI address."""
        self._lock = threading.RLock()
        self._pid = _process.pid
        self._users = 1  # we, and each Buffer
        self._fd = _open(self.address)
        try:
            self._enable_memory()
        except BaseException:
            os.close(self._fd)
            raise
        self._closed = False

    def bars(self) -> tuple[Bar, ...]:
        """Those that it has, I/O ports among them, which cannot be exported."""
        with self._lock:
            self._check_open()
            found = (self._region(index) for index in range(_BARS))
            return tuple(Bar(region.number, region.size) for region in found if region.size)

    def bar(
        self,
        index: int,
        offset: Size = 0,
        size: Size | None = None,
        *,
        writable: bool = True,
        name: str | None = None,
    ) -> Buffer:
        """A BAR, or ``size`` bytes of it from ``offset`` (all the rest for None), as a Buffer.

        Offset and size are multiples of the page size. ``writable=False`` makes it read-only for
        transfers. ``name`` labels it. More than 1 GiB is several slabs.

        Raises:
            OSError: it has no such BAR (ENODEV), or one of less than a page (EINVAL); a kernel that
                exports none (ENOTTY).
            ValueError: a range that is not within the BAR, or not of whole pages.
            ClosedError: after close.
        """
        number = as_int(index, "index")
        with self._lock:
            self._check_open()
            start, length = self._range(number, offset, size)
            slabs = self._slabs(number, start, length, writable, name)
            identity = foreign.identify(slabs[0].fd)
            buffer = Buffer(
                slabs,
                None,
                exporter="vfio" if identity is None else identity.exporter,
                reason=f"BAR {number} of {self.address}",
                name=name,
                writable=writable,
                map_refusal=_UNMAPPABLE,
            )
            self._users += 1
            buffer._on_close(self._leave)
            return buffer

    def _range(self, index: int, offset: Size, size: Size | None) -> tuple[int, int]:
        """The first byte and the length of a part of a BAR, checked."""
        if not 0 <= index < _BARS:
            raise ValueError(f"index={index}: a device has BARs 0 to {_BARS - 1}")
        whole = self._region(index).size
        if not whole:
            have = ", ".join(f"{bar.number} ({format_size(bar.size)})" for bar in self.bars())
            text = f"it has no memory at BAR {index}: it has {have or 'none at all'}"
            raise os_error(errno.ENODEV, text, self.address)
        if whole < mmap.PAGESIZE:
            text = f"BAR {index} is {whole} bytes: less than a page cannot be exported"
            raise os_error(errno.EINVAL, text, self.address)
        start = parse_size(offset, "offset")
        length = whole - start if size is None else parse_size(size, "size")
        if length <= 0 or start + length > whole:
            raise ValueError(
                f"bytes {start} to {start + length} are not within BAR {index}, of {whole} bytes"
            )
        if (start | length) % mmap.PAGESIZE:
            raise ValueError(
                f"offset={start}, size={length}: VFIO exports whole pages of {mmap.PAGESIZE} bytes"
            )
        return start, length

    def _slabs(
        self, index: int, start: int, length: int, writable: bool, name: str | None
    ) -> list[Slab]:
        slabs: list[Slab] = []
        access = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        exporters.check_name(name)
        label = None if name is None else os.fsencode(name)
        try:
            for offset in range(0, length, _LARGEST_SLAB):
                part = min(_LARGEST_SLAB, length - offset)
                fd = self._export(index, start + offset, part, access)
                slabs.append(Slab(fd, offset, part))
                if label is not None:
                    _uapi.set_name(fd, label)
        except BaseException:
            for slab in slabs:
                os.close(slab.fd)
            raise
        return slabs

    def _export(self, index: int, start: int, length: int, access: int) -> int:
        layout = _uapi.VFIO_DMA_BUF_STRUCT
        flags = _uapi.VFIO_DEVICE_FEATURE_GET | _uapi.VFIO_DEVICE_FEATURE_DMA_BUF
        data = bytearray(layout.pack(layout.size, flags, index, access, 0, 1, start, length))
        try:
            return int(_uapi.ioctl(self._fd, _uapi.VFIO_DEVICE_FEATURE, data))
        except OSError as error:
            fixes = {
                errno.ENOTTY: "this kernel exports none: it takes Linux 6.19 or later with "
                "CONFIG_VFIO_PCI_DMABUF",
                errno.ENODEV: "the kernel offers no such memory of it: another driver has claimed "
                "it, or the device is gone",
                errno.EINVAL: "the kernel can export no part of this BAR",
            }
            raise _failed(error, f"exporting BAR {index}", self.address, fixes) from None

    def _region(self, index: int) -> _Region:
        layout = _uapi.VFIO_REGION_STRUCT
        data = bytearray(layout.pack(layout.size, 0, index, 0, 0, 0))
        try:
            _uapi.ioctl(self._fd, _uapi.VFIO_DEVICE_GET_REGION_INFO, data)
        except OSError as error:
            raise _failed(error, f"asking for region {index}", self.address) from None
        return _Region(index, *layout.unpack(data)[4:])

    def _enable_memory(self) -> None:
        """Have it answer at its BARs' addresses: what is exported before that is revoked."""
        where = self._region(_uapi.VFIO_PCI_CONFIG_REGION).offset + _COMMAND
        command = int.from_bytes(os.pread(self._fd, 2, where), "little")
        if not command & _COMMAND_MEMORY:
            os.pwrite(self._fd, (command | _COMMAND_MEMORY).to_bytes(2, "little"), where)

    # -- the end

    def fileno(self) -> int:
        """The VFIO device's descriptor, for ioctls of your own. Raises ClosedError after close."""
        self._check_open()
        return self._fd

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this device is closed")
        if self._pid != _process.pid:
            raise ClosedError("this device is that of the process which forked this one")

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Close the device, once its Buffers are closed too; can be again.

        The kernel takes the memory back from every importer when the device is closed.
        """
        if self._pid != _process.pid:  # without the lock, which a fork may have left taken
            if not self._closed:
                self._closed = True
                os.close(self._fd)
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._leave()

    def _leave(self) -> None:
        if self._pid != _process.pid:
            return
        with self._lock:
            self._users -= 1
            if not self._users:
                os.close(self._fd)

    def __enter__(self) -> Device:
        self._check_open()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<dmabuf.Device {self.address} {'closed' if self._closed else 'by VFIO'}>"


class _Region(NamedTuple):
    number: int
    size: int
    offset: int


def _failed(error: OSError, what: str, path: str, fixes: dict[int, str] | None = None) -> OSError:
    number = error.errno or errno.EIO
    known = {
        errno.EACCES: "permission denied: be root, or have root chown it to you",
        errno.EBUSY: "another program has it, or another device of its IOMMU group",
    } | (fixes or {})
    return os_error(number, f"{what}: {known.get(number, os.strerror(number))}", path)


def _open(address: str) -> int:
    """The descriptor of a device, in a container of its own that maps no memory."""
    group = _group(address)
    node = f"/dev/vfio/{group}"
    container = _open_node(CONTAINER)
    try:
        descriptor = _open_node(node)
        try:
            _check_viable(descriptor, address, node)
            try:
                pointer = struct.pack("=i", container)
                _uapi.ioctl(descriptor, _uapi.VFIO_GROUP_SET_CONTAINER, pointer)
                _uapi.ioctl(container, _uapi.VFIO_SET_IOMMU, _uapi.VFIO_TYPE1V2_IOMMU)
            except OSError as error:
                fixes = {
                    errno.ENODEV: "the IOMMU's driver is missing: modprobe vfio_iommu_type1",
                    errno.EPERM: "the platform cannot keep its interrupts apart: see "
                    "allow_unsafe_interrupts of vfio_iommu_type1",
                }
                raise _failed(error, "setting up its IOMMU group", node, fixes) from None
            name = bytearray(address.encode() + b"\0")  # given `bytes`, ioctl returns those
            try:
                return int(_uapi.ioctl(descriptor, _uapi.VFIO_GROUP_GET_DEVICE_FD, name))
            except OSError as error:
                raise _failed(error, "opening the device", address) from None
        finally:
            os.close(descriptor)  # the device keeps its group, and that the container
    finally:
        os.close(container)


def _group(address: str) -> str:
    folder = SYSFS / address
    if not folder.exists():
        raise os_error(errno.ENODEV, "no such PCI device: lspci -D lists those there are", address)
    driver = (folder / "driver").resolve().name if (folder / "driver").exists() else None
    if driver is None or "vfio" not in driver:
        has = "it has no driver" if driver is None else f"{driver} drives it, and would lose it"
        text = f"not in vfio-pci's hands: {has}; {_NOT_BOUND.format(address)}"
        raise os_error(errno.ENODEV, text, address)
    if not (folder / "iommu_group").exists():
        text = "no IOMMU confines it: turn VT-d or AMD-Vi on in the firmware, and intel_iommu=on "
        raise os_error(errno.ENODEV, f"{text}on the kernel's command line", address)
    return (folder / "iommu_group").resolve().name


def _open_node(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        fixes = {errno.ENOENT: "no such device: modprobe vfio-pci"}
        raise _failed(error, "opening its IOMMU group", path, fixes) from None


def _check_viable(descriptor: int, address: str, node: str) -> None:
    layout = _uapi.VFIO_GROUP_STATUS_STRUCT
    data = bytearray(layout.pack(layout.size, 0))
    _uapi.ioctl(descriptor, _uapi.VFIO_GROUP_GET_STATUS, data)
    if not layout.unpack(data)[1] & _uapi.VFIO_GROUP_FLAGS_VIABLE:
        others = ", ".join(sorted(os.listdir(SYSFS / address / "iommu_group/devices")))
        text = f"its IOMMU group is shared with devices of other drivers: bind all of {others}"
        raise os_error(errno.EPERM, f"{text} to vfio-pci", node)

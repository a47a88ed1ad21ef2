"""Memory that belongs to a device and that its driver maps: device DAX, and memory of PCI devices.

A device DAX node, /dev/daxX.Y, maps a range of CXL, persistent or other special-purpose memory
(drivers/dax/device.c). Its pages can be pinned, for long too, so the ``direct`` route works. Its
bytes outlive processes, and another host may share them.

PCI peer-to-peer memory is mapped by the file p2pmem/allocate of its device in sysfs
(Documentation/driver-api/pci/p2pdma.rst, Linux 6.2; NVMe controllers publish their memory buffer,
CMB, so). Each mapping of that file is memory of its own, so its descriptor gives nobody the same
bytes. Drives behind the same PCIe switch reach the memory without the host.

Neither is a dma-buf: devices cannot import it.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

from dmabuf.errors import os_error
from dmabuf.kernel import proc
from dmabuf.memory.buffer import Buffer, Slab
from dmabuf.sizes import format_size, round_up

SYSFS = "/sys"
DAX = "/dev/dax"
PEER = "p2pmem:"

_ZEROS = bytes(1 << 20)


def names() -> list[str]:
    """Return the exporters of this module that the machine has, permitted to this user or not."""
    dax = sorted(_listed(f"{SYSFS}/bus/dax/drivers/device_dax", "dax"))
    devices = f"{SYSFS}/bus/pci/devices"
    peers = (one for one in sorted(_listed(devices, "")) if os.path.isdir(_folder(one)))
    return [f"{DAX}{one.removeprefix('dax')}" for one in dax] + [PEER + one for one in peers]


def _listed(folder: str, start: str) -> Iterator[str]:
    try:
        yield from (name for name in os.listdir(folder) if name.startswith(start))
    except OSError:
        return


def is_far(exporter: str) -> bool:
    """Return whether an exporter's name is of the form of those that this module has."""
    return exporter.startswith((DAX, PEER))


def allocate(size: int, exporter: str, name: str | None) -> Buffer:
    """Return a zeroed Buffer of device DAX or peer memory; see :func:`dmabuf.allocate`."""
    if exporter.startswith(DAX):
        return _allocate_dax(size, exporter, name)
    return _allocate_peer(size, exporter, name)


def loss_of(buffer: Buffer) -> str | None:
    """Return why the mapping of memory of this module ended; None if it did not, or has another.

    The kernel ends it when the driver leaves the device: `daxctl disable-device`, or a drive that
    is removed. Access by the CPU then ends the process (SIGBUS), and a system call gets EFAULT.
    """
    if not is_far(buffer.exporter):
        return None
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        with buffer.view(0, 1) as view:
            os.write(writer, view)
    except OSError as error:
        if error.errno == errno.EFAULT:
            return f"{buffer.exporter} was taken away, and its memory with it; close the buffer"
        raise
    finally:
        os.close(reader)
        os.close(writer)
    return None


def _zero(memory: mmap.mmap) -> None:
    for at in range(0, len(memory), len(_ZEROS)):
        part = min(len(_ZEROS), len(memory) - at)
        memory[at : at + part] = _ZEROS[:part]


# -- device DAX


def _allocate_dax(size: int, path: str, name: str | None) -> Buffer:
    fd = _open(path, _dax_fix(path))
    try:
        folder = _dax_folder(fd)
        if folder is None:
            raise os_error(errno.ENODEV, "allocate: it is not a device of device DAX", path)
        size = round_up(size, proc.number(folder, "align") or mmap.PAGESIZE)
        whole = proc.number(folder, "size") or 0
        if size > whole:
            text = f"allocate {format_size(size)}: the device has {format_size(whole)}"
            raise os_error(errno.ENOMEM, text, path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = "allocate: another Buffer has it; share it by from_fd, or split the device"
            raise os_error(errno.EBUSY, text, path) from None
        memory = _map(fd, size, path)
        _zero(memory)
    except BaseException:
        os.close(fd)
        raise
    return Buffer(
        [Slab(fd, 0, size)],
        memory,
        exporter=path,
        reason=f"exporter={path!r} was requested; it is not a dma-buf",
        name=name,
        is_dmabuf=False,
    )


def _dax_fix(path: str) -> str:
    """Return what to do where the node of a device is missing."""
    name = os.path.basename(path)
    node = proc.number(SYSFS, "bus/dax/devices", name, "target_node")
    if node is not None and os.path.exists(f"{SYSFS}/bus/dax/drivers/kmem/{name}"):
        return f"it is ordinary memory now; use numa_node={node}"
    return "no such device; daxctl list shows them, and ndctl or cxl makes one"


def dax_size(fd: int) -> int | None:
    """Return the size in bytes of a device DAX node; None for any other descriptor."""
    folder = _dax_folder(fd)
    return None if folder is None else proc.number(folder, "size")


def _dax_folder(fd: int) -> str | None:
    number = os.fstat(fd).st_rdev
    folder = f"{SYSFS}/dev/char/{os.major(number)}:{os.minor(number)}"
    kind = os.path.basename(os.path.realpath(f"{folder}/subsystem"))
    return folder if kind == "dax" else None


def of_dax(fd: int, size: int, reason: str, name: str | None) -> Buffer:
    """Return a Buffer of a whole device with its bytes as they are; it takes over ``fd``."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    return Buffer(
        [Slab(fd, 0, size)],
        _map(fd, size, path, writable=writable),
        exporter=path,
        reason=reason,
        name=name,
        is_dmabuf=False,
        writable=writable,
    )


# -- memory of PCI devices


def _folder(address: str) -> str:
    return f"{SYSFS}/bus/pci/devices/{address}/p2pmem"


def _allocate_peer(size: int, exporter: str, name: str | None) -> Buffer:
    address = exporter.removeprefix(PEER)
    from dmabuf.kernel import pci  # only where it is needed

    if not pci.is_address(address):
        raise ValueError(f"invalid exporter {exporter!r}: use {PEER}0000:65:00.0")
    path, size = f"{_folder(address)}/allocate", round_up(size, mmap.PAGESIZE)
    fd = _open(path, "this device shares no memory; p2pmem needs an NVMe CMB and CONFIG_PCI_P2PDMA")
    try:
        free = proc.number(_folder(address), "available") or 0
        if size > free:
            text = f"allocate {format_size(size)}: the device has {format_size(free)} left"
            raise os_error(errno.ENOMEM, text, path)
        memory = _map(fd, size, path)
        _zero(memory)
    except BaseException:
        os.close(fd)
        raise
    return Buffer(
        [Slab(fd, 0, size)],
        memory,
        exporter=exporter,
        reason=f"exporter={exporter!r} was requested; it is not a dma-buf",
        name=name,
        is_dmabuf=False,
        registration_refusal="io_uring cannot register memory of a PCI device",
        peer=address,
    )


def _open(path: str, missing: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        why = {
            errno.ENOENT: missing,
            errno.ENXIO: missing,
            errno.ENODEV: missing,
            errno.EACCES: "permission denied; be root, or have root chown it to you",
        }.get(error.errno or 0, error.strerror)
        raise os_error(error.errno or errno.EIO, f"allocate: {why}", path) from None
    return fd


def _map(fd: int, size: int, path: str, *, writable: bool = True) -> mmap.mmap:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
    except OSError as error:
        text = f"map {format_size(size)}: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, path) from None

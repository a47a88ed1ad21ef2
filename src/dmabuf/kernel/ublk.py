"""Block devices served by this process: the ublk driver, include/uapi/linux/ublk_cmd.h.

/dev/ublk-control makes and removes devices. A device N is two nodes: /dev/ublkbN, the disk, and
/dev/ublkcN, by which a server answers its requests. One process at a time may open the latter. When
that process dies the disk goes, and the character device stays until someone deletes it.

The driver is of Linux 6.0. Used here is UBLK_F_USER_COPY of Linux 6.5.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from typing import NamedTuple

from dmabuf._core import check, ffi, lib
from dmabuf.errors import os_error

CONTROL = "/dev/ublk-control"
SECTOR = 512
SYSFS = "/sys/class/ublk-char"

_DISK, _SERVER = "/dev/ublkb{}", "/dev/ublkc{}"
# struct ublksrv_ctrl_dev_info: queues, their depth, state, pad, largest request in bytes, number,
# the server's pid, pad, flags, the server's own flags, owner, reserved
_INFO = struct.Struct("=4HIIiIQQIIQQ")
# struct ublk_params as far as ublk_param_basic: its length, types; attributes, shifts of the
# logical and physical block and of io_opt and io_min, most sectors of a request, chunk sectors,
# sectors, virtual boundary mask
_PARAMS = struct.Struct("=II I4BIIQQ")
_TYPE_BASIC = 1
_ATTR_READ_ONLY = 1
_F_CMD_IOCTL_ENCODE, _F_USER_COPY = 1 << 6, 1 << 7
_NEW = 0xFFFFFFFF  # the driver chooses a number
_DEAD = 0
_BLOCK_SHIFT, _PAGE_SHIFT = 9, 12
_ENOTSUPP = 524  # the driver's answer to a command that it does not know

# struct ublksrv_ctrl_cmd has 32 bytes
_GET_DEV_INFO = 2 << 30 | 32 << 16 | ord("u") << 8 | 0x02
_ADD_DEV, _DEL_DEV, _START_DEV, _STOP_DEV, _SET_PARAMS = (
    3 << 30 | 32 << 16 | ord("u") << 8 | number for number in (0x04, 0x05, 0x06, 0x07, 0x08)
)
_DEL_DEV_ASYNC = 2 << 30 | 32 << 16 | ord("u") << 8 | 0x14  # Linux 6.9


class Device(NamedTuple):
    """The driver's description of a device."""

    dead: bool
    """It has no disk: it was not started yet, or its server died."""
    mark: int
    """The number that its server gave it, of 64 bits."""


def open_control() -> int:
    """Open /dev/ublk-control. Each OSError names the fix."""
    missing = "the kernel has no ublk, or has not loaded it; as root: modprobe ublk_drv"
    fixes = {
        errno.ENOENT: missing,
        errno.ENXIO: missing,
        errno.ENODEV: missing,
        errno.EACCES: "permission denied; block devices are for root",
        errno.EPERM: f"not permitted; give the container the device: --device {CONTROL}",
    }
    try:
        return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        text = fixes.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, text, CONTROL) from None


def add(control: int, depth: int, largest: int, mark: int) -> tuple[int, int]:
    """Make a device of one queue for requests of at most `largest` bytes.

    Returns its number and its character device, open.
    """
    flags = _F_CMD_IOCTL_ENCODE | _F_USER_COPY
    data = bytearray(_INFO.pack(1, depth, 0, 0, largest, _NEW, 0, 0, flags, mark, 0, 0, 0, 0))
    rc = _control(control, _ADD_DEV, _NEW, data)
    if rc == -errno.EPERM:
        text = "add a device: not permitted; run it as root, with CAP_SYS_ADMIN"
        raise os_error(errno.EPERM, text, CONTROL)
    check(rc, "add a device", CONTROL)
    number, flags = map(_INFO.unpack(data).__getitem__, (5, 8))
    try:
        server = open_server(number)
    except OSError as error:
        delete(control, number, None)
        text = f"{error.strerror}; the host's devtmpfs must be mounted at /dev"
        raise OSError(error.errno, text, error.filename) from None
    if not flags & _F_USER_COPY:
        delete(control, number, server)
        text = "add a device: the kernel's ublk has no user copy; it needs Linux 6.5"
        raise os_error(errno.EOPNOTSUPP, text, CONTROL)
    return number, server


def open_server(number: int) -> int:
    """Open the character device of a device. Raises OSError(EBUSY) if its server has it open."""
    return os.open(_SERVER.format(number), os.O_RDWR | os.O_CLOEXEC)


def delete(control: int, number: int, server: int | None) -> None:
    """Delete a device, and close its character device. The kernel frees it with the last user."""
    # While this process has the character device open, no other device gets the number.
    rc = _control(control, _DEL_DEV_ASYNC, number)
    if server is not None:
        os.close(server)
    if rc in (-errno.EOPNOTSUPP, -_ENOTSUPP):
        rc = _control(control, _DEL_DEV, number)  # it waits for the last user
    check(rc, "delete", _SERVER.format(number))


def disk(number: int) -> str:
    """Return the path of a device's disk."""
    return _DISK.format(number)


def describe(control: int, number: int) -> Device:
    """Return the state of a device."""
    data = bytearray(_INFO.size)
    check(_control(control, _GET_DEV_INFO, number, data), "describe", _SERVER.format(number))
    fields = _INFO.unpack(data)
    return Device(fields[2] == _DEAD, fields[9])


def numbers() -> list[int]:
    """Return the numbers of all devices."""
    try:
        names = os.listdir(SYSFS)
    except FileNotFoundError:
        return []
    return [int(name[5:]) for name in names if re.fullmatch(r"ublkc\d+", name)]


def set_size(control: int, number: int, size: int, largest: int, *, read_only: bool) -> None:
    """Set what the disk is: `size` bytes in blocks of 512, without a cache and without discard."""
    data = bytearray(
        _PARAMS.pack(
            _PARAMS.size, _TYPE_BASIC, _ATTR_READ_ONLY * read_only, _BLOCK_SHIFT, _PAGE_SHIFT,
            _PAGE_SHIFT, _PAGE_SHIFT, largest // SECTOR, 0, size // SECTOR, 0,
        )
    )  # fmt: skip
    check(_control(control, _SET_PARAMS, number, data), "set its size", disk(number))


def start(control: int, number: int) -> None:
    """Make the disk appear. Its server must answer meanwhile: the kernel looks for partitions."""
    check(_control(control, _START_DEV, number, value=os.getpid()), "start", disk(number))


def stop(control: int, number: int) -> None:
    """Remove the disk, after a filesystem that is mounted on it was written back.

    Its server must answer meanwhile. A filesystem that stays mounted fails from then on.
    """
    check(_control(control, _STOP_DEV, number), "stop", disk(number))


def _control(
    control: int, command: int, number: int, data: bytearray | None = None, value: int = 0
) -> int:
    if data is None:
        return int(lib.dmb_ublk_control(control, command, number, ffi.NULL, 0, value))
    with ffi.from_buffer(data, require_writable=True) as memory:
        return int(lib.dmb_ublk_control(control, command, number, memory, len(data), value))

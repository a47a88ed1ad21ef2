"""NVMe namespaces as character devices, /dev/ngXnY: their properties and commands.

Commands reach the device unchanged (io_uring's URING_CMD, or an ioctl), without the block layer
and the page cache. So nothing rounds, splits, retries or caches them: a request is whole blocks,
and no larger than the device accepts.

The limit of a request is in the sysfs of the namespace's queue. The kernel refuses a passthrough
request (EINVAL) with more than max_hw_sectors, which it computes from the controller's MDTS, or
with more than max_segments pieces of memory, which MDTS does not bound. MDTS itself, in units of
4 KiB, the smallest page of a controller, is used only if sysfs has no limit.

The memory alignment is the queue's dma_alignment, 4 bytes for NVMe (a PRP entry and an SGL address
are whole dwords). The kernel accepts any other address too, and copies (blk_rq_map_user_iov).
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from dmabuf._core import ffi, lib
from dmabuf.errors import os_error
from dmabuf.kernel import files, proc, uapi

SYSFS = "/sys"

_IDENTIFY = 6  # admin opcode; cdw10 says of what
_OF_NAMESPACE, _OF_CONTROLLER = 0, 1
_FLUSH, _READ = 0, 2  # I/O opcodes
_ANSWER = 4096  # bytes of what Identify answers
_MOST_BLOCKS = 1 << 16  # of one command
_UNKNOWN_LIMIT = 128 << 10
_TRIES, _PAUSE = 50, 0.001
"""Tries of a command, and seconds after each: about as long as the core issues requests again."""


class Format(NamedTuple):
    """The part of Identify Namespace that describes the blocks."""

    blocks: int
    block: int
    """Bytes, without metadata."""
    metadata: int
    """Bytes of metadata of each block."""


class Namespace(NamedTuple):
    """A namespace, as when its character device was opened."""

    nsid: int
    size: int
    """In bytes."""
    block: int
    """In bytes: offsets and lengths of requests are multiples of it."""
    limit: int
    """The largest request in bytes."""
    memory_align: int
    """The alignment of memory, in bytes, that avoids a copy by the kernel."""
    disk: str | None
    """The name of the block device of the same namespace, such as "nvme0n1"; None if none."""

    @property
    def lba_shift(self) -> int:
        """The binary logarithm of the block."""
        return self.block.bit_length() - 1


# -- answers


def parse_format(answer: bytes) -> Format:
    """Parse the 4096 bytes of Identify Namespace (NVM Command Set Specification 1.0, figure 97)."""
    blocks, formats, which = *struct.unpack_from("<Q", answer), answer[25], answer[26]
    index = which & 0xF
    if formats > 15:
        index |= (which & 0x60) >> 1
    metadata, exponent = struct.unpack_from("<HB", answer, 128 + 4 * index)
    return Format(blocks, 1 << exponent, metadata)


def parse_mdts(answer: bytes) -> int | None:
    """Return the largest request in bytes by Identify Controller; None if it is not limited."""
    return 4096 << answer[77] if 0 < answer[77] < 32 else None


def status_text(status: int) -> str:
    """Return an NVMe status as text: "LBA out of range (NVMe status 0x0080)"."""
    name = ffi.string(lib.dmb_nvme_status_name(status)).decode()
    upper = name[0].upper() + name[1:] if name[0].islower() else name
    return f"{upper} (NVMe status 0x{status & 0x7FF:04x})"


def request_limit(block: int, sectors_kib: int | None, segments: int | None) -> int:
    """Return the largest request in bytes: whole blocks, within the limits of the queue.

    Scattered memory has one segment for each page, and one more if it begins within a page.
    """
    most = _MOST_BLOCKS * block
    if sectors_kib is not None:
        most = min(most, sectors_kib << 10)
    if segments is not None:
        most = min(most, max(segments - 1, 1) * mmap.PAGESIZE)
    return max(most // block * block, block)


# -- commands


def _persist(fd: int, attempt: Callable[[], int]) -> int:
    """Return the result of an attempt; make it again, for a time, while the device is not ready.

    With native multipath ioctl(2) raises EAGAIN while no path is usable
    (nvme_ns_head_chr_ioctl in drivers/nvme/host/ioctl.c). Some NVMe statuses ask for another try.

    Raises:
        OSError: ENOLINK or ENODEV, with the reason, where no path leads to the namespace any more;
            EBUSY where it stays not ready; whatever else `attempt` raises.
    """
    refusal = OSError()
    for _ in range(_TRIES):
        try:
            return attempt()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                raise
            refusal = error
        time.sleep(_PAUSE)
    number, text = no_path(os.fstat(fd).st_rdev) or (0, "")
    text = text or f"{refusal.strerror}; try again later"
    raise OSError(number or errno.EBUSY, text) from refusal


def _command(
    fd: int, request: int, opcode: int, nsid: int, answer: object, size: int, *cdw10: int
) -> None:
    """Run a command by ioctl(2); raise OSError if the kernel or the device refuses it.

    `answer` is a pointer to `size` bytes of data; `cdw10` are the dwords from the tenth on.
    """
    address = int(ffi.cast("uintptr_t", answer)) if answer else 0
    dwords = cdw10 + (0,) * (8 - len(cdw10))
    packed = uapi.NVME_CMD_STRUCT.pack(opcode, 0, 0, nsid, 0, 0, 0, address, 0, size, *dwords)

    def attempt() -> int:
        status = uapi.ioctl(fd, request, bytearray(packed))
        if status:
            raise OSError(-lib.dmb_nvme_errno(status, lib.DMB_WRITE), status_text(status))
        return 0

    _persist(fd, attempt)


def _identify(fd: int, nsid: int, what: int) -> bytes:
    answer = ffi.new("uint8_t[]", _ANSWER)
    _command(fd, uapi.NVME_IOCTL_ADMIN_CMD, _IDENTIFY, nsid, answer, _ANSWER, what)
    return bytes(ffi.buffer(answer))


def flush(fd: int, namespace: Namespace) -> None:
    """Return when everything written is on the medium: an NVMe Flush."""
    _command(fd, uapi.NVME_IOCTL_IO_CMD, _FLUSH, namespace.nsid, None, 0)


def read_blocks(fd: int, namespace: Namespace, memory: object, offset: int, size: int) -> None:
    """Read whole blocks by Read commands of their own, past io_uring and any dma-buf.

    Args:
        fd: the namespace's character device.
        namespace: what it is.
        memory: a pointer of cffi to at least `size` bytes.
        offset: in the namespace, in bytes: a multiple of its block.
        size: bytes, a multiple of its block.
    """
    done = 0
    while done < size:
        part = min(namespace.limit, size - done)
        lba = (offset + done) // namespace.block
        where = lba & 0xFFFFFFFF, lba >> 32, part // namespace.block - 1
        data = ffi.cast("uint8_t *", memory) + done
        try:
            _command(fd, uapi.NVME_IOCTL_IO_CMD, _READ, namespace.nsid, data, part, *where)
        except OSError as error:
            text = f"read {part} bytes at {offset + done} by NVMe commands: {error.strerror}"
            raise OSError(error.errno, text) from error
        done += part


# -- controllers over a network


class Controller(NamedTuple):
    """A controller that is reached over a network, from its directory in sysfs."""

    name: str
    """Such as "nvme2"."""
    transport: str
    """"tcp", "rdma", "fc" or "loop"."""
    address: str
    """As the kernel prints it: "traddr=10.0.0.5,trsvcid=4420,src_addr=10.0.0.7"."""
    state: str
    """"live", "connecting", "resetting", "deleting" or another."""
    paths: dict[str, str]
    """The block device of each namespace, and the state of this path to it: "optimized",
    "non-optimized", "inaccessible" and others, or "" without native multipath."""


_LOCAL = ("pcie", "apple-nvme", "")


def controllers() -> list[Controller]:
    """Return the controllers of NVMe over fabrics that this machine is connected to."""
    folder = os.path.join(SYSFS, "class/nvme")
    found = []
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in sorted(names, key=lambda name: (len(name), name)):
        transport, address, state = (
            proc.read(folder, name, file).strip() for file in ("transport", "address", "state")
        )
        if transport not in _LOCAL:
            paths = _paths(os.path.join(folder, name))
            found.append(Controller(name, transport, address, state, paths))
    return found


def _paths(controller: str) -> dict[str, str]:
    """Return the block devices of a controller's namespaces, each with the state of the path.

    With native multipath, nvme2c3n1 is the path of controller 3 to the namespace nvme2n1.
    """
    try:
        names = sorted(os.listdir(controller))
    except OSError:  # it was disconnected meanwhile
        return {}
    parts = (re.fullmatch(r"(nvme\d+)(?:c\d+)?(n\d+)", name) for name in names)
    return {
        part[1] + part[2]: proc.read(controller, part[0], "ana_state").strip()
        for part in parts
        if part
    }


def no_path(device: int) -> tuple[int, str] | None:
    """Return the errno and the reason where no path leads to a namespace now.

    Return (0, "") where one does, and None without native multipath: then a namespace has one path,
    whose errors have an errno of their own.

    Args:
        device: the number of the namespace's character device.
    """
    link = _char_device(device)
    folder, node = os.path.split(os.path.realpath(link))
    try:
        names = sorted(os.listdir(folder)) if os.path.exists(link) else []
    except OSError:
        names = []
    if names and not os.path.basename(folder).startswith("nvme-subsys"):
        return None
    controllers = [name for name in names if re.fullmatch(r"nvme\d+", name)]
    number = node.rpartition("n")[2]
    found = {name: _obstacle(os.path.join(folder, name), number) for name in controllers}
    if not all(found.values()):
        return 0, ""
    states = ", ".join(f"{name} is {why}" for name, why in found.items())
    if all(why.startswith(_FOR_GOOD) for why in found.values()):
        text = f"the namespace is gone{states and f', {states}'}: open it again when it is back"
        return errno.ENODEV, text
    text = f"no path to the namespace: {states}; its block device waits for one"
    return errno.ENOLINK, text


_WITHOUT = "live without it"
_FOR_GOOD = (_WITHOUT, "deleting", "dead")
_UNUSABLE = ("inaccessible", "persistent-loss", "change")


def _obstacle(controller: str, number: str) -> str:
    """Return what prevents access to the namespace of this number by a controller, "" for nothing.

    While the kernel removes a path, the size is 0 (nvme_ns_remove in drivers/nvme/host/core.c).
    """
    state = proc.read(controller, "state").strip() or "deleting"
    if state != "live":
        return state
    names = os.listdir(controller) if os.path.isdir(controller) else []
    for name in names:
        if re.fullmatch(rf"nvme\d+(c\d+)?n{number}", name):
            ana = proc.read(controller, name, "ana_state").strip()
            if proc.number(controller, name, "size"):
                return f"live, but {ana}" if ana in _UNUSABLE else ""
    return _WITHOUT


# -- devices


def _char_device(device: int) -> str:
    return os.path.join(SYSFS, "dev/char", f"{os.major(device)}:{os.minor(device)}")


def _subsystem(device: int) -> str | None:
    """Return the kernel's name of a character device's subsystem."""
    try:
        return os.path.basename(os.readlink(os.path.join(_char_device(device), "subsystem")))
    except OSError:
        return None


def is_namespace(status: os.stat_result) -> bool:
    """Return whether a file is a namespace's character device."""
    return stat.S_ISCHR(status.st_mode) and _subsystem(status.st_rdev) == "nvme-generic"


def explained(error: OSError, path: str) -> OSError:
    """Return an error with the fix if a namespace was refused; any other error unchanged."""
    try:
        status = os.stat(path)
    except OSError:
        return error
    if error.errno not in (errno.EACCES, errno.EPERM) or not is_namespace(status):
        return error
    disk = disk_of(status.st_rdev)
    text = (
        f"no permission for NVMe passthrough ({error.strerror}): be root, or have the node's mode "
        "or group changed by a udev rule"
        + (f"; /dev/{disk} is the same namespace as a block device" if disk else "")
    )
    return os_error(error.errno, text, path)


def disk_of(device: int) -> str | None:
    """Return the name of the block device of the same namespace as a character device.

    Their numbers may differ: with native multipath the disk has the subsystem's number and the node
    the controller's, so ng2n1 may be nvme0n1, and nvme2n1 another drive. They share the place in
    sysfs and the namespace's number there.
    """
    folder, node = os.path.split(os.path.realpath(_char_device(device)))
    disks = re.compile(r"nvme\d+n" + node.rpartition("n")[2])  # no path, as nvme0c1n1 is
    try:
        found = [name for name in os.listdir(folder) if disks.fullmatch(name)]
    except OSError:
        return None
    return found[0] if found else None


def disk_number(status: os.stat_result) -> int | None:
    """Return the device number of the block device of the same namespace."""
    disk = disk_of(status.st_rdev)
    text = proc.read(SYSFS, "class/block", disk or "-", "dev")
    return os.makedev(*map(int, text.split(":"))) if text else None


def namespace(fd: int, path: str) -> Namespace | None:
    """Return the namespace behind an open character device; None if it is another kind.

    Raises:
        OSError: it is NVMe but cannot be read: a controller, or a namespace with metadata or
            without blocks; or the device or the kernel refuses to identify it.
    """
    status = os.fstat(fd)
    if _subsystem(status.st_rdev) == "nvme":
        text = "an NVMe controller has no blocks: name a namespace of it, such as /dev/ng0n1"
        raise os_error(errno.EINVAL, text, path)
    if not is_namespace(status):
        return None
    try:
        nsid = _persist(fd, lambda: int(uapi.ioctl(fd, uapi.NVME_IOCTL_ID, 0)))
        found = parse_format(_identify(fd, nsid, _OF_NAMESPACE))
        limits = _limits(fd, nsid, disk := disk_of(status.st_rdev))
    except PermissionError as error:
        raise explained(error, path) from error
    except OSError as error:
        text = f"asking the namespace what it is failed: {error.strerror}"
        raise os_error(error.errno or errno.EIO, text, path) from error
    if found.metadata:
        text = (
            f"each block of the namespace has {found.metadata} bytes of metadata beside its "
            f"{found.block} bytes, which this package does not move: use a namespace formatted "
            "without"
        )
        raise os_error(errno.EOPNOTSUPP, text, path)
    if not found.blocks or found.block < 512:
        raise os_error(errno.ENODEV, "the namespace is not active: it has no blocks", path)
    kib, segments, alignment = limits
    return Namespace(
        nsid=nsid,
        size=found.blocks * found.block,
        block=found.block,
        limit=request_limit(found.block, kib, segments),
        memory_align=4 if alignment is None else min(alignment + 1, found.block),
        disk=disk,
    )


def _limits(fd: int, nsid: int, disk: str | None) -> tuple[int, int | None, int | None]:
    """Return the KiB and the segments of a request at most, and the mask of its alignment."""
    queue = os.path.join(SYSFS, "class/block", disk or "-", "queue")
    kib = proc.number(queue, "max_hw_sectors_kb")
    segments = proc.number(queue, "max_segments")
    alignment = proc.number(queue, "dma_alignment")  # Linux 6.0
    if kib is None:
        mdts = parse_mdts(_identify(fd, nsid, _OF_CONTROLLER)) or _UNKNOWN_LIMIT
        kib = min(mdts, _UNKNOWN_LIMIT) >> 10
    return kib, segments, alignment


def check_claim(namespace: Namespace, path: str) -> None:
    """Raise OSError(EBUSY) if the namespace is mounted or claimed as a block device.

    The kernel does not refuse such a write: passthrough bypasses the check of the block layer.
    """
    if namespace.disk is None:
        return
    node = f"/dev/{namespace.disk}"
    refusal = files.try_claim(node)
    if refusal is not None:
        what = f"the namespace is mounted, or claimed by another program, as {node}"
        if refusal.errno != errno.EBUSY:
            what = f"whether the namespace is mounted as {node} cannot be seen ({refusal.strerror})"
        text = f"{what}: writing to it might destroy what is there; unmount it, or pass force=True"
        raise os_error(errno.EBUSY, text, path)


def check_whole_blocks(namespace: Namespace, offset: int, size: int, path: str) -> None:
    """Raise OSError(EINVAL) unless a write is whole blocks: no page cache completes them."""
    if (offset | size) % namespace.block:
        text = (
            f"writing {size} bytes at file offset {offset}: an NVMe character device takes whole "
            f"blocks of {namespace.block} bytes only, at multiples of them"
            + (f"; /dev/{namespace.disk} takes any" if namespace.disk else "")
        )
        error = os_error(errno.EINVAL, text, path)
        error.nbytes = 0  # type: ignore[attr-defined]
        raise error

"""NVMe passthrough without a device: what Identify's bytes mean, and what is refused before it."""

import ctypes
import errno
import os
import struct
from array import array

import pytest

import dmabuf
from dmabuf import Engine, Route
from dmabuf.kernel import nvme, uapi
from tests.core import lib
from tests.support import Filter, raises_errno

SIZE = 1 << 20
NODE = "/dev/null"  # a character device that takes none of the commands


def identified(blocks=2048, exponent=9, metadata=0, index=0, formats=0):
    """The 4096 bytes of Identify Namespace; the other formats are nonsense."""
    answer = bytearray(b"\0" * 128 + b"\xff" * 256 + b"\0" * 3712)
    struct.pack_into("<QQQ", answer, 0, blocks, blocks, blocks)
    answer[25] = formats
    answer[26] = index & 0xF | (index & 0x30) << 1 | (0x10 if metadata else 0)
    struct.pack_into("<HBB", answer, 128 + 4 * index, metadata, exponent, 0)
    return bytes(answer)


# Of QEMU's drive of 512 MiB with blocks of 4096 bytes, up to the last format.
QEMU = bytes.fromhex(
    "000002000000000000000200000000000000020000000000140704031f0000000001"
    + "00" * 36
    + "07000700"
    + "00" * 54
    + "0000090008000900100009004000090000000c0008000c0010000c0040000c00"
)


def test_identify_of_qemu():
    assert nvme.parse_format(QEMU.ljust(4096, b"\0")) == nvme.Format(131072, 4096, 0)


@pytest.mark.parametrize(
    ("how", "block", "metadata"),
    [
        ({}, 512, 0),
        ({"exponent": 12, "index": 4, "formats": 7}, 4096, 0),
        ({"exponent": 9, "metadata": 8, "index": 1, "formats": 7}, 512, 8),
        ({"exponent": 16, "index": 37, "formats": 63}, 65536, 0),
        ({"exponent": 12, "metadata": 64, "index": 16, "formats": 16}, 4096, 64),
    ],
)
def test_the_format_in_use(how, block, metadata):
    assert nvme.parse_format(identified(**how)) == nvme.Format(2048, block, metadata)


def test_upper_bits_of_the_index_count_only_where_there_are_so_many_formats():
    answer = bytearray(identified(index=3, formats=15))
    answer[26] |= 0x60
    assert nvme.parse_format(bytes(answer)).block == 512


@pytest.mark.parametrize(("mdts", "limit"), [(0, None), (1, 8192), (7, 512 << 10), (255, None)])
def test_mdts(mdts, limit):
    answer = bytearray(4096)
    answer[77] = mdts
    assert nvme.parse_mdts(bytes(answer)) == limit


@pytest.mark.parametrize(
    ("block", "kib", "segments", "limit"),
    [
        (512, 512, 129, 512 << 10),
        (512, 512, 128, 127 * nvme.mmap.PAGESIZE),
        (4096, 1280, 127, 126 * nvme.mmap.PAGESIZE),
        (512, None, None, 32 << 20),  # 65536 blocks
        (512, 1 << 20, None, 32 << 20),
        (65536, 100, 33, 65536),
        (65536, 32, 2, 65536),  # less than a block cannot be asked for
    ],
)
def test_the_limit_of_a_request(block, kib, segments, limit):
    assert nvme.request_limit(block, kib, segments) == limit


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0x0080, "LBA out of range (NVMe status 0x0080)"),
        (0x4080, "LBA out of range (NVMe status 0x0080)"),
        (0x0281, "Unrecovered read error (NVMe status 0x0281)"),
        (0x4286, "Access denied (NVMe status 0x0286)"),
        (0x07C0, "Vendor-specific error (NVMe status 0x07c0)"),
        (0x01FF, "Unknown command-specific error (NVMe status 0x01ff)"),
    ],
)
def test_what_a_status_says(status, text):
    assert nvme.status_text(status) == text


# -- opening


class Device:
    """NODE as a namespace: its sysfs, and its answers to ioctls."""

    def __init__(self, root):
        self.root, self.answer, self.status, self.refusal = root, identified(), 0, 0
        self.commands = []
        node = root / "devices/nvme0/ng0n1"
        node.mkdir(parents=True)
        for name in ("nvme", "nvme-generic"):
            (root / "class" / name).mkdir(parents=True)
        self.be("nvme-generic")
        rdev = os.stat(NODE).st_rdev
        (root / "dev/char").mkdir(parents=True)
        (root / f"dev/char/{os.major(rdev)}:{os.minor(rdev)}").symlink_to(node)

    def be(self, subsystem):
        link = self.root / "devices/nvme0/ng0n1/subsystem"
        link.unlink(missing_ok=True)
        link.symlink_to(self.root / "class" / subsystem)

    def disk(self, name="nvme0n1", **queue):
        (self.root / "devices/nvme0" / name).mkdir()
        folder = self.root / "class/block" / name / "queue"
        folder.mkdir(parents=True)
        (folder.parent / "dev").write_text("259:77\n")
        for key, value in queue.items():
            (folder / key).write_text(f"{value}\n")

    def ioctl(self, _fd, request, argument):
        if request == uapi.NVME_IOCTL_ID:
            return 3
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        fields = uapi.NVME_CMD_STRUCT.unpack(argument)
        self.commands.append((request, fields[0], fields[3], fields[10]))
        if fields[0] == 6 and not self.status:
            answer = self.answer if fields[10] == 0 else b"\0" * 77 + b"\5" + b"\0" * 4018
            ctypes.memmove(fields[7], answer, 4096)
        return self.status


@pytest.fixture
def device(tmp_path, monkeypatch):
    device = Device(tmp_path)
    monkeypatch.setattr(nvme, "SYSFS", tmp_path)
    monkeypatch.setattr(uapi, "ioctl", device.ioctl)
    return device


def test_a_namespace(device, buf):
    device.disk(max_hw_sectors_kb=256, max_segments=33, dma_alignment=511)
    with dmabuf.open(NODE, "r+", force=True) as file:
        assert (file.kind, file.size) == ("NVMe character device", 1 << 20)
        assert file.target.namespace == nvme.Namespace(3, 1 << 20, 512, 128 << 10, 512, "nvme0n1")
        assert device.commands == [(uapi.NVME_IOCTL_ADMIN_CMD, 6, 3, 0)]
        assert file.plan(buf, buffer_offset=512).route is Route.DIRECT
        assert file.plan(buf, buffer_offset=4).route is Route.STAGED
        assert "passthrough" in file.plan(buf, buffer_offset=4).rejected[Route.NATIVE] or (
            not buf.is_dmabuf
        )


def test_the_disk_is_the_one_beside_it_whatever_its_name(device):
    """With native multipath numbers differ, and another drive has the one that fits."""
    (device.root / "class/block/nvme0n1").mkdir(parents=True)
    for name in ("nvme7n2", "nvme7c0n1", "nvme0"):
        (device.root / "devices/nvme0" / name).mkdir()
    device.disk("nvme7n1", max_hw_sectors_kb=64)
    with dmabuf.open(NODE) as file:
        namespace = file.target.namespace
    assert (namespace.disk, namespace.limit) == ("nvme7n1", 64 << 10)


def test_without_sysfs_of_the_queue_the_controller_is_asked(device):
    with dmabuf.open(NODE) as file:
        namespace = file.target.namespace
    assert (namespace.limit, namespace.memory_align, namespace.disk) == (128 << 10, 4, None)
    assert [command[3] for command in device.commands] == [0, 1]


def test_an_ordinary_character_device(device):
    device.be("nvme")
    with raises_errno(errno.EINVAL, "name a namespace of it"):
        dmabuf.open(NODE)
    (device.root / "class/mem").mkdir()
    device.be("mem")
    with dmabuf.open(NODE) as file:
        assert (file.kind, file.size) == ("character device", None)


def test_namespaces_that_are_refused(device):
    device.answer = identified(metadata=8)
    with raises_errno(errno.EOPNOTSUPP, "8 bytes of metadata beside its 512"):
        dmabuf.open(NODE)
    device.answer = bytes(4096)
    with raises_errno(errno.ENODEV, "not active"):
        dmabuf.open(NODE)
    device.status = 0x400B
    with pytest.raises(OSError, match="Invalid namespace or format"):
        dmabuf.open(NODE)
    device.refusal = errno.EACCES
    with pytest.raises(PermissionError, match="udev rule"):
        dmabuf.open(NODE)


def test_whether_it_is_mounted_has_to_be_seen(device):
    device.disk()
    with raises_errno(errno.EBUSY, "cannot be seen"):  # no such node here
        dmabuf.open(NODE, "r+")
    dmabuf.open(NODE, "r+", force=True).close()
    dmabuf.open(NODE).close()


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 512), (511, 1), (512, 1000)])
def test_less_than_a_block_is_not_written(device, buf, offset, size):
    with dmabuf.open(NODE, "w") as file:
        with raises_errno(errno.EINVAL, "whole blocks of 512 bytes", nbytes=0):
            file.write_from(buf, size, file_offset=offset)
        segments = array("Q", (4096, 0, 512, offset, 4096, size))
        with pytest.raises(OSError, match=f"{size} bytes at file offset {offset}:"):
            file.write_segments(buf, segments)


def test_a_flush_that_fails_is_named(device, buf):
    with dmabuf.open(NODE, "w") as file:
        file.write_from(buf, 0, sync=True)
        assert device.commands[-1] == (uapi.NVME_IOCTL_IO_CMD, 0, 3, 0)
        device.status = 0x280
        with pytest.raises(OSError, match=r"flushing .* Write fault .NVMe status 0x0280"):
            file.write_from(buf, 0, sync=True)


@pytest.mark.parametrize(
    ("states", "number", "text"),
    [
        (
            ["connecting", "resetting"],
            errno.ENOLINK,
            "path to .*: nvme0 is connecting, nvme1 is re",
        ),
        (["connecting", "live"], errno.EINVAL, "Invalid argument"),
        ([], errno.EINVAL, "Invalid argument"),
        (None, errno.ENODEV, "was pulled"),
    ],
)
def test_no_path_to_the_namespace(device, buf, states, number, text):
    for index, state in enumerate(states or []):
        (device.root / f"devices/nvme0/nvme{index}").mkdir()
        (device.root / f"devices/nvme0/nvme{index}/state").write_text(f"{state}\n")
    with dmabuf.open(NODE) as file, Filter(lambda _: -errno.EINVAL) as filter_:
        if states is None:
            next((device.root / "dev/char").iterdir()).unlink()
        with raises_errno(number, text, nbytes=0, filename=NODE):
            file.read_into(buf, 4096)
    assert len(filter_.seen) > 1 if "live" in (states or []) else len(filter_.seen) == 1


def test_a_path_that_is_lost_for_a_moment(device, buf):
    (device.root / "devices/nvme0/nvme2").mkdir()
    (device.root / "devices/nvme0/nvme2/state").write_text("live\n")
    answers = iter([-errno.EINVAL] * 3)
    with dmabuf.open(NODE) as file, Filter(lambda one: next(answers, one.size)):
        assert file.read_into(buf, 4096).nbytes == 4096


def test_io_uring_without_passthrough_leaves_it_to_threads(device, buf, monkeypatch, caplog):
    real = lib.dmb_ring_create

    def create(backend, depth, flags, ret):
        return (
            -errno.EINVAL if flags & lib.DMB_RING_PASSTHROUGH else real(backend, depth, flags, ret)
        )

    monkeypatch.setattr(lib, "dmb_ring_create", create)
    with Engine() as engine, dmabuf.open(NODE, engine=engine) as file:
        with (
            caplog.at_level("INFO", "dmabuf"),
            raises_errno(errno.ENOTTY, "Inappropriate ioctl"),
        ):
            file.read_into(buf, 4096)
        if engine.backend == "io_uring":
            assert "no io_uring passthrough" in caplog.text

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
from tests.support import Filter, assert_same, pattern, raises_errno

SIZE, STEP = 1 << 20, 16 << 10
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

    def __init__(self, root, folder="nvme0"):
        self.root, self.answer, self.status, self.refusal = root, identified(), 0, 0
        self.commands, self.pending = [], []
        self.folder = root / "devices" / folder
        node = self.folder / "ng0n1"
        node.mkdir(parents=True)
        for name in ("nvme", "nvme-generic"):
            (root / "class" / name).mkdir(parents=True)
        self.be("nvme-generic")
        rdev = os.stat(NODE).st_rdev
        (root / "dev/char").mkdir(parents=True)
        (root / f"dev/char/{os.major(rdev)}:{os.minor(rdev)}").symlink_to(node)

    def be(self, subsystem):
        link = self.folder / "ng0n1/subsystem"
        link.unlink(missing_ok=True)
        link.symlink_to(self.root / "class" / subsystem)

    def disk(self, name="nvme0n1", **queue):
        (self.folder / name).mkdir()
        folder = self.root / "class/block" / name / "queue"
        folder.mkdir(parents=True)
        (folder.parent / "dev").write_text("259:77\n")
        for key, value in queue.items():
            (folder / key).write_text(f"{value}\n")

    def controller(self, number, state, ana="optimized", size=2048):
        """A controller of a subsystem; no path to the namespace if `size` is None."""
        folder = self.folder / f"nvme{number}"
        folder.mkdir()
        (folder / "state").write_text(f"{state}\n")
        if size is not None:
            (folder / f"nvme0c{number}n1").mkdir()
            (folder / f"nvme0c{number}n1/ana_state").write_text(f"{ana}\n")
            (folder / f"nvme0c{number}n1/size").write_text(f"{size}\n")
        (folder / f"nvme0c{number}n11").mkdir()  # the path to another namespace
        (folder / f"nvme0c{number}n11/size").write_text("2048\n")

    def leave(self):
        """The kernel removes the node."""
        for link in (self.root / "dev/char").iterdir():
            link.unlink()

    def ioctl(self, _fd, request, argument):
        """Give a pending answer first: an errno if it is negative, otherwise a status."""
        pending = self.pending.pop() if self.pending else 0
        if pending < 0 or (self.refusal and request != uapi.NVME_IOCTL_ID):
            number = -pending or self.refusal
            raise OSError(number, os.strerror(number))
        if pending or request == uapi.NVME_IOCTL_ID:
            return pending or 3
        fields = uapi.NVME_CMD_STRUCT.unpack(argument)
        self.commands.append((request, fields[0], fields[3], fields[10]))
        if fields[0] == 2:
            ctypes.memmove(fields[7], pattern(fields[9], fields[10]), fields[9])
        if fields[0] == 6 and not self.status:
            answer = self.answer if fields[10] == 0 else b"\0" * 77 + b"\5" + b"\0" * 4018
            ctypes.memmove(fields[7], answer, 4096)
        return self.status


@pytest.fixture
def device(tmp_path, monkeypatch, request):
    device = Device(tmp_path, getattr(request, "param", "nvme0"))
    monkeypatch.setattr(nvme, "SYSFS", tmp_path)
    monkeypatch.setattr(uapi, "ioctl", device.ioctl)
    return device


multipath = pytest.mark.parametrize("device", ["nvme-subsys0"], indirect=True)


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
        (device.folder / name).mkdir()
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


# -- paths that are lost


def opens(_file, _buf):
    dmabuf.open(NODE).close()


def flushes(file, buf):
    file.write_from(buf, 0, sync=True)


def reads_to_compare(file, _buf):
    with file.target.reference() as reference:
        assert_same(reference.read(4096, 8192), pattern(8192, 8), "what is compared with")


NOT_READY = {"no path": -errno.EAGAIN, "a signal": -errno.EINTR, "a status": 0x022}


@pytest.mark.parametrize("answer", NOT_READY.values(), ids=NOT_READY)
@pytest.mark.parametrize("command", [opens, flushes, reads_to_compare])
def test_a_command_is_tried_again_while_the_device_is_not_ready(device, buf, command, answer):
    with dmabuf.open(NODE, "r+", force=True) as file:
        if command is opens and answer > 0:
            device.pending = [*[answer] * 3, 0]  # NVME_IOCTL_ID has no status
        else:
            device.pending = [answer] * 3
        command(file, buf)
        assert not device.pending


@multipath
@pytest.mark.parametrize(
    ("state", "answer", "number", "text"),
    [
        ("connecting", -errno.EAGAIN, errno.ENOLINK, "no path to the namespace: nvme4 is conn"),
        ("live", -errno.EAGAIN, errno.EBUSY, "Resource temporarily unavailable"),
        ("live", 0x082, errno.EBUSY, "Namespace not ready .NVMe status 0x0082"),
        (None, -errno.EAGAIN, errno.ENODEV, "the namespace is gone: open it again"),
    ],
)
def test_a_command_of_a_device_that_stays_not_ready(device, buf, state, answer, number, text):
    with dmabuf.open(NODE, "r+", force=True) as file:
        if state is not None:
            device.controller(4, state)
        for command in (opens, flushes, reads_to_compare):
            device.pending = [answer] * 1000
            if command is opens and answer > 0:
                device.pending.append(0)
            if state is None:
                if command is opens:
                    continue  # there is no file to open
                device.leave()
            with raises_errno(number, text, filename=NODE):
                command(file, buf)


@multipath
@pytest.mark.parametrize(
    ("controllers", "number", "text"),
    [
        (
            [("connecting",), ("resetting",)],
            errno.ENOLINK,
            "no path to the namespace: nvme0 is connecting, nvme1 is resetting; its block device",
        ),
        ([("live", "inaccessible")], errno.ENOLINK, "nvme0 is live, but inaccessible; its block"),
        ([("deleting",), ("connecting",)], errno.ENOLINK, "nvme0 is deleting, nvme1 is connecting"),
        ([("live", "optimized", 0)], errno.ENODEV, "the namespace is gone, nvme0 is live without"),
        ([("live", "optimized", None)], errno.ENODEV, "is gone, nvme0 is live without it: open it"),
        ([("deleting (no IO)",)], errno.ENODEV, "is gone, nvme0 is deleting .no IO.: open it"),
        ([], errno.ENODEV, "the namespace is gone: open it again when it is back"),
        ([("connecting",), ("live",)], errno.EINVAL, "Invalid argument"),
    ],
)
def test_no_path_to_the_namespace(device, buf, controllers, number, text):
    for index, one in enumerate(controllers):
        device.controller(index, *one)
    with dmabuf.open(NODE) as file, Filter(lambda _: -errno.EINVAL):
        with raises_errno(number, text, nbytes=0, filename=NODE):
            file.read_into(buf, 4096)


@pytest.mark.parametrize("device", ["nvme0", "nvme-subsys0"], indirect=True)
@pytest.mark.parametrize("gone", [False, True])
def test_one_path_has_errors_of_its_own(device, buf, gone):
    with dmabuf.open(NODE) as file, Filter(lambda _: -errno.EINVAL):
        if gone:
            device.leave()
        number = errno.ENODEV if gone or device.folder.name != "nvme0" else errno.EINVAL
        with raises_errno(number, nbytes=0, filename=NODE):
            file.read_into(buf, 4096)


REFUSALS = {"io_uring": -errno.EINVAL, "ioctl": -errno.EAGAIN}


@multipath
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_path_that_is_lost_for_a_moment(device, buf, refusal):
    """Only the requests that were refused are issued again."""
    device.controller(2, "live")
    left = dict.fromkeys(range(SIZE // 4, SIZE // 2, STEP), 3)

    def judge(one):
        left[one.offset] = left.get(one.offset, 0) - 1
        return refusal if left[one.offset] >= 0 else one.size

    with Engine(queue_depth=4, block_size=STEP) as engine, Filter(judge) as filter_:
        with dmabuf.open(NODE, engine=engine) as file:
            done = file.read_into(buf, SIZE, audit="off")
    again = 3 * (SIZE // 4 // STEP)
    assert (done.nbytes, done.reissues) == (SIZE, again)
    assert len(filter_.seen) == SIZE // STEP + again


@multipath
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize(
    ("controller", "number", "text"),
    [
        (("live", "optimized", 0), errno.ENODEV, "the namespace is gone, nvme2 is live without it"),
        (("resetting",), errno.ENOLINK, "no path to the namespace: nvme2 is resetting"),
    ],
)
def test_a_path_that_is_lost_in_the_middle(device, buf, refusal, controller, number, text):
    """The error has the number of bytes that are whole."""
    device.controller(2, *controller)

    def judge(one):
        return refusal if one.offset >= SIZE // 2 else one.size

    with Engine(queue_depth=4, block_size=STEP) as engine, Filter(judge):
        with dmabuf.open(NODE, engine=engine) as file:
            with raises_errno(number, text, nbytes=SIZE // 2, file_offset=SIZE // 2):
                file.read_into(buf, SIZE, audit="off")


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

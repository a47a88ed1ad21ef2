"""What NVMe passthrough refuses, and in which words."""

import contextlib
import errno
import os
import stat
import struct
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Route
from dmabuf.inspect import examine_path
from dmabuf.kernel import nvme, uapi
from tests.forking import in_child
from tests.kernel.nvme_drive import everything
from tests.support import assert_same, mounted, pattern, raises_errno

SIZE = 96 << 10


@everything
def test_doctor(drive):
    report = examine_path(drive.node)
    assert report.kind == "NVMe character device"
    assert report.direct.name == "passthrough"
    assert (report.memory_alignment, report.offset_alignment) == (4, drive.block)
    assert report.read.zero_copy and report.write.zero_copy


@everything
def test_a_mounted_namespace_is_not_written(drive, tmp_path):
    with mounted(drive.disk, "ext4", tmp_path / "mount"):
        for mode in ("r+", "w"):
            with raises_errno(errno.EBUSY, "is mounted, or claimed"):
                dmabuf.open(drive.node, mode)
        dmabuf.open(drive.node).close()
        dmabuf.open(drive.node, "r+", force=True).close()
    dmabuf.open(drive.node, "r+").close()


@everything
def test_a_controller(drive):
    controller = drive.disk.removesuffix("n1")
    assert stat.S_ISCHR(os.stat(controller).st_mode)
    with raises_errno(errno.EINVAL, "name a namespace of it"):
        dmabuf.open(controller)


@everything
def test_access_modes(drive):
    """The kernel lets root write by a read-only descriptor: the library does not."""
    fd = os.open(drive.node, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="open for reading only"):
            dmabuf.open(fd, "r+")
        with dmabuf.open(fd) as file, dmabuf.allocate(4096) as buffer:
            assert file.read_into(buffer).nbytes == buffer.size
            with pytest.raises(OSError, match="not open for writing"):
                file.write_from(buffer)
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_to_all(path):
    before = os.stat(path).st_mode
    os.chmod(path, 0o666)
    try:
        yield
    finally:
        os.chmod(path, before)


def as_nobody(drive, granted):
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    if not granted:
        with pytest.raises(PermissionError, match="udev rule; /dev/nvme"):
            dmabuf.open(drive.node)
        return
    with dmabuf.open(drive.node) as file, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        assert file.read_into(buffer).route is Route.DIRECT
        assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 18), "the buffer")
    with raises_errno(errno.EBUSY, "cannot be seen"):
        dmabuf.open(drive.node, "r+")
    with (
        dmabuf.open(drive.node, "r+", force=True) as file,
        dmabuf.allocate(SIZE, exporter="memfd") as buffer,
    ):
        buffer.pwrite(pattern(SIZE, 19), 0)
        file.write_from(buffer, sync=True)


@everything
def test_an_unprivileged_user(drive):
    drive.write(pattern(SIZE, 18))
    in_child(lambda: as_nobody(drive, granted=False))
    with open_to_all(drive.node):
        in_child(lambda: as_nobody(drive, granted=True))
    assert_same(drive.read(SIZE), pattern(SIZE, 19), "the namespace")


def format_namespace(drive, index):
    """NVMe Format: all that the namespace holds is lost."""
    fields = (0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, index, *(0,) * 7)
    fd = os.open(drive.node, os.O_RDWR)
    try:
        command = bytearray(struct.pack("=BBHIIIQQIIIIIIIIII", *fields))
        assert uapi.ioctl(fd, uapi.NVME_IOCTL_ADMIN_CMD, command) == 0
    finally:
        os.close(fd)


@everything
def test_metadata_is_refused(drive):
    """The drive's other formats, so that the device itself tells of them."""
    fd = os.open(drive.node, os.O_RDONLY)
    answer = nvme._identify(fd, 1, 0)
    os.close(fd)
    assert nvme.parse_format(answer).block == drive.block
    now = answer[26] & 0xF
    formats = [
        struct.unpack_from("<HBB", answer, 128 + 4 * index) for index in range(answer[25] + 1)
    ]
    other = next(i for i, (metadata, _, _) in enumerate(formats) if metadata)
    try:
        format_namespace(drive, other)
        with raises_errno(errno.EOPNOTSUPP, f"{formats[other][0]} bytes of metadata"):
            dmabuf.open(drive.node)
    finally:
        format_namespace(drive, now)
    dmabuf.open(drive.node).close()
    assert Path("/sys/class/block", os.path.basename(drive.disk), "size").read_text() != "0\n"

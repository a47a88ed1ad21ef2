"""What is found out about a file by asking and by trying."""

import contextlib
import errno
import os
import stat
import struct
import sys
from types import SimpleNamespace

import pytest

import dmabuf
from dmabuf import Route
from dmabuf.kernel import files, uapi
from tests import mounting
from tests.guards import needs
from tests.support import (
    drop_cache,
    loop_device,
    mounted,
    pattern,
    read_and_compare,
    run,
    write_and_compare,
)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10 * files.PAGE))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def open_direct(fd, **how):
    return files.open_direct(fd, "file", **({"writable": True, "readable": True} | how))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (stat.S_IFREG, "file"),
        (stat.S_IFBLK, "block device"),
        (stat.S_IFCHR, "character device"),
        (stat.S_IFIFO, "pipe"),
        (stat.S_IFSOCK, "socket"),
        (stat.S_IFDIR, None),
        (stat.S_IFLNK, None),
        (0, None),
    ],
)
def test_kinds(kind, expected):
    assert files.kind_of(kind | 0o644) == expected


def test_what_statx_states_is_taken(file, monkeypatch):
    def stated(fd, ret):
        ret[0], ret[1] = 4, 512
        return 0

    monkeypatch.setattr(files.lib, "dmb_statx_dio", stated)
    direct = open_direct(file)
    assert (direct.alignment, direct.refusal) == (files.Alignment(4, 512), None)
    os.close(direct.fd)


@pytest.fixture
def silent(monkeypatch):
    """A kernel before 6.1."""
    monkeypatch.setattr(files.lib, "dmb_statx_dio", lambda *_: 0)


@pytest.mark.parametrize(
    ("page", "least", "error", "found"),
    [(4096, least, errno.EINVAL, least) for least in (512, 1024, 2048, 4096)]
    + [(16384, least, errno.EINVAL, least) for least in (2048, 4096, 8192, 16384)]
    + [(4096, 1 << 20, errno.EIO, 4096)],  # which says nothing of alignment
)
def test_where_statx_is_silent_it_is_tried(file, silent, monkeypatch, page, least, error, found):
    monkeypatch.setattr(files, "PAGE", page)

    def preadv(fd, views, offset):
        assert offset % len(views[0]) == 0
        if offset % least:
            raise OSError(error, "")
        return len(views[0])

    monkeypatch.setattr(os, "preadv", preadv)
    direct = open_direct(file)
    assert (direct.alignment, direct.refusal) == (files.Alignment(found, found), None)
    os.close(direct.fd)


def test_a_filesystem_that_refuses_every_aligned_read(file, silent, monkeypatch):
    def preadv(fd, views, offset):
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(os, "preadv", preadv)
    before = sorted(os.listdir("/proc/self/fd"))
    direct = open_direct(file)
    assert direct.fd == -1 and "refused every aligned read: EINVAL" in direct.refusal
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("empty", [False, True])
def test_what_cannot_be_read_or_is_empty_is_a_page(file, silent, empty):
    if empty:
        os.ftruncate(file, 0)
    direct = open_direct(file, readable=empty)
    assert direct.alignment == files.Alignment(files.PAGE, files.PAGE)
    os.close(direct.fd)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errno.EINVAL, "does not support O_DIRECT (open: EINVAL): keep the file on one that does"),
        (errno.ENOENT, "/proc is not mounted"),
        (errno.EACCES, "may not be opened again for O_DIRECT"),
        (errno.EPERM, "may not be opened again for O_DIRECT"),
        (errno.EMFILE, "opening the file with O_DIRECT failed: Too many open files"),
    ],
)
def test_each_refusal_has_its_reason(file, monkeypatch, error, says):
    def refuse(path, flags):
        assert flags & os.O_DIRECT and flags & os.O_CLOEXEC
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "open", refuse)
    direct = open_direct(file)
    assert direct.fd == -1 and says in direct.refusal


@pytest.mark.parametrize(
    ("how", "access"),
    [
        ({"writable": False}, os.O_RDONLY),
        ({"readable": False}, os.O_WRONLY),
        ({}, os.O_RDWR),
    ],
)
def test_no_more_access_than_was_given(file, how, access):
    import fcntl

    direct = open_direct(file, **how)
    flags = fcntl.fcntl(direct.fd, fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == access and flags & os.O_DIRECT
    assert not os.get_inheritable(direct.fd)
    os.close(direct.fd)


def test_memory_filesystems():
    fd = os.memfd_create("memory")
    direct = files.open_direct(fd, "file", writable=True, readable=True)
    assert direct.fd == -1 and direct.refusal.startswith("tmpfs keeps its files")
    assert direct.in_memory
    os.close(fd)


@pytest.mark.parametrize(
    ("filesystem", "release", "flags", "refused"),
    [
        (uapi.BTRFS, "6.12.117+deb13-amd64", 0, True),
        (uapi.BTRFS, "7.2-rc1", 0x40, True),
        (uapi.BTRFS, "6.18.0", None, True),
        (uapi.BTRFS, "6.12.117", uapi.FS_NOCOW_FL, False),
        (uapi.BTRFS, "7.3.4+deb13-amd64", 0, False),
        (uapi.BTRFS, "10.0-rc2", 0, False),
        (uapi.EXT4, "6.12.117", 0, False),
    ],
)
def test_writes_to_btrfs_with_checksums(file, monkeypatch, filesystem, release, flags, refused):
    def ioctl(fd, request, answer):
        if request == uapi.BTRFS_IOC_SPACE_INFO:
            return  # no spaces
        assert request == uapi.FS_IOC_GETFLAGS and os.path.samestat(os.fstat(fd), os.fstat(file))
        if flags is None:
            raise OSError(errno.ENOTTY, "")
        answer[:4] = flags.to_bytes(4, sys.byteorder)

    monkeypatch.setattr(files, "filesystem_of", lambda _: filesystem)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    monkeypatch.setattr(uapi, "ioctl", ioctl)
    direct = open_direct(file)
    os.close(direct.fd)
    assert direct.refusal is None
    assert ("chattr +C" in (direct.no_writes or "")) == refused


@pytest.mark.parametrize(
    ("spaces", "refused"),
    [([1, 4, 2], False), ([1 | 1 << 3, 4 | 1 << 5], False), ([2, 1 | 1 << 4], True),
     ([4, 1 | 1 << 5], True), ([1, 1 | 1 << 10], True)],
)  # fmt: skip
def test_writes_to_btrfs_that_keeps_copies(file, monkeypatch, spaces, refused):
    """On any kernel; of data, not of what is known about it."""

    def ioctl(fd, request, answer):
        assert request == uapi.BTRFS_IOC_SPACE_INFO and os.path.samestat(
            os.fstat(fd), os.fstat(file)
        )
        assert answer[:8] == (64).to_bytes(8, sys.byteorder)
        told = struct.pack("=QQ", 64, len(spaces))
        told += b"".join(struct.pack("=QQQ", flags, 1 << 30, 0) for flags in spaces)
        answer[: len(told)] = told

    monkeypatch.setattr(files, "filesystem_of", lambda _: uapi.BTRFS)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="7.3.4"))
    monkeypatch.setattr(uapi, "ioctl", ioctl)
    direct = open_direct(file)
    os.close(direct.fd)
    assert ("-dconvert" in (direct.no_writes or "")) == refused


def test_cached_pages(file):
    drop_cache(file)
    cold = files.cached_pages(file, 0, 10 * files.PAGE)
    if cold is None:
        pytest.skip("needs cachestat(2), of Linux 6.5")
    assert cold == 0
    os.pread(file, 10 * files.PAGE, 0)
    assert files.cached_pages(file, 0, 10 * files.PAGE) == 10
    assert files.cached_pages(file, files.PAGE, files.PAGE) == 1
    assert files.cached_pages(file, 0, 0) is None


# -- what lies below, seen through a transfer


LENGTH = 64 * files.PAGE


def there_and_back(path, require):
    """Read and write all of a file, compare every byte, and return the two routes."""
    with (
        path.open("r+b") as plain,
        dmabuf.allocate(LENGTH, exporter="memfd") as buffer,
        dmabuf.open(path, "r+") as file,
    ):
        fd = plain.fileno()
        drop_cache(fd)
        read = read_and_compare(file, fd, buffer, LENGTH, require=require)
        uncached = require != "any"
        written = write_and_compare(file, fd, buffer, LENGTH, require=require, uncached=uncached)
        return read.route, written.route


def check_not_zero_copy(path, why):
    with pytest.raises(dmabuf.RouteUnavailable, match=why):
        there_and_back(path, "zero-copy")
    assert there_and_back(path, "any") == (Route.BUFFERED, Route.BUFFERED)


@contextlib.contextmanager
def overlay(below, folder):
    """An overlay whose layers are all in one directory."""
    for name in ("lower", "upper", "work"):
        (below / name).mkdir()
    (below / "lower" / "file").write_bytes(pattern(LENGTH, 11))
    folder.mkdir()
    layers = f"lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work"
    run("mount", "-t", "overlay", "-o", layers, "overlay", folder)
    try:
        yield folder / "file"
    finally:
        run("umount", folder)


@needs("root")
def test_an_overlay_over_memory_is_not_zero_copy(tmp_path):
    (tmp_path / "below").mkdir()
    run("mount", "-t", "tmpfs", "none", tmp_path / "below")
    try:
        with overlay(tmp_path / "below", tmp_path / "merged") as path:
            check_not_zero_copy(path, "overlayfs accepts O_DIRECT")
    finally:
        run("umount", tmp_path / "below")


@needs("loop", "ext4")
def test_an_overlay_over_a_disk_is_zero_copy(tmp_path):
    with (
        loop_device(tmp_path / "image", 64 << 20) as device,
        mounted(device, "ext4", tmp_path / "below") as below,
        overlay(below, tmp_path / "merged") as path,
    ):
        there_and_back(path, "zero-copy")


@needs("loop", "btrfs")
def test_an_overlay_over_btrfs_is_not_zero_copy(tmp_path):
    with (
        loop_device(tmp_path / "image", 256 << 20) as device,
        mounted(device, "btrfs", tmp_path / "below") as below,
        overlay(below, tmp_path / "merged") as path,
    ):
        check_not_zero_copy(path, "overlayfs accepts O_DIRECT")


@needs("root")
def test_pages_in_the_cache_are_seen_through_an_overlay(tmp_path):
    with overlay(tmp_path, tmp_path / "merged") as path:
        with path.open("r+b") as file:
            drop_cache(file.fileno())
            assert files.cached_pages(file.fileno(), files.PAGE + 1, LENGTH) == 0
            file.read(LENGTH)
            assert (
                files.cached_pages(file.fileno(), files.PAGE + 1, LENGTH)
                == LENGTH // files.PAGE - 1
            )


@needs("fuse", "pyfuse3")
def test_a_fuse_server_is_not_zero_copy(tmp_path):
    with mounting.mounted(tmp_path) as place:
        path = place.path / "file"
        path.write_bytes(pattern(LENGTH, 12))
        check_not_zero_copy(path, "a FUSE server copies every byte")

"""Regular files that report size 0 and have bytes: /proc, cgroups. Reads find what pread finds."""

import errno
import os
from array import array

import pytest

import dmabuf
from dmabuf import Route
from tests.support import assert_same, poison, raises_errno

PATHS = ["/proc/crypto", "/proc/filesystems", "/proc/self/mounts", "/proc/version"]
SIZE = 1 << 20


def content(path, offset=0):
    """All of it by pread, which returns a part at a time."""
    fd = os.open(path, os.O_RDONLY)
    try:
        whole = b""
        while part := os.pread(fd, SIZE, offset + len(whole)):
            whole += part
    finally:
        os.close(fd)
    assert whole
    return whole


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("offset", "at"), [(0, 0), (5, 4099)])
def test_all_of_it_is_read(move, path, offset, at, buf):
    expected = content(path, offset)
    transfer = move(path, "read_into", buf, file_offset=offset, buffer_offset=at)
    assert (transfer.nbytes, transfer.route) == (len(expected), Route.BUFFERED)
    assert transfer.copied == len(expected)
    wanted = bytearray(poison(SIZE))
    wanted[at : at + len(expected)] = expected
    assert_same(buf.pread(SIZE, 0), bytes(wanted), "the buffer")


def test_no_more_than_was_asked_for(move, buf):
    expected = content("/proc/filesystems")[3:103]
    assert move("/proc/filesystems", "read_into", buf, 100, file_offset=3).nbytes == 100
    assert_same(buf.pread(SIZE, 0), expected + poison(SIZE)[100:], "the buffer")
    assert move("/proc/filesystems", "read_into", buf, file_offset=SIZE).nbytes == 0


def test_an_audit_compares_what_pread_finds(move, buf):
    expected = content("/proc/version")
    transfer = move("/proc/version", "read_into", buf, audit="always")
    assert transfer.nbytes == len(expected)
    assert transfer.audited.startswith(f"every byte of {len(expected)} B compared")
    assert buf.pread(len(expected), 0) == expected


def test_segments(move, buf):
    expected = content("/proc/filesystems")
    segments = array("Q", [10, 0, 20, 0, 5000, 30])
    assert move("/proc/filesystems", "read_segments", buf, segments).nbytes == 50
    wanted = bytearray(poison(SIZE))
    wanted[0:20], wanted[5000:5030] = expected[10:30], expected[:30]
    assert_same(buf.pread(SIZE, 0), bytes(wanted), "the buffer")
    with pytest.raises(dmabuf.ShortReadError) as caught:
        move("/proc/filesystems", "read_segments", buf, array("Q", [0, 0, 9, 0, 9, SIZE - 9]))
    assert (caught.value.index, caught.value.nbytes) == (1, 9 + len(expected))


def test_an_error_has_its_errno_and_the_path(move, buf):
    with raises_errno(errno.EIO, filename="/proc/self/mem", nbytes=0):
        move("/proc/self/mem", "read_into", buf, 10)


@pytest.mark.parametrize("require", ["zero-copy", "uncached"])
def test_they_are_copied_by_the_kernel(move, require, buf):
    with pytest.raises(dmabuf.RouteUnavailable, match="O_DIRECT"):
        move("/proc/version", "read_into", buf, require=require)


def test_an_empty_file_stays_empty(move, tmp_path, buf):
    (tmp_path / "file").touch()
    assert move(tmp_path / "file", "read_into", buf, require="zero-copy").nbytes == 0
    assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer")


def test_a_file_that_reports_more_than_it_has(move, buf):
    """Files of sysfs report a page."""
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not os.path.exists(path):
        pytest.skip(f"needs {path}: a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    expected = content(path)
    assert move(path, "read_into", buf).nbytes == len(expected)
    assert_same(buf.pread(SIZE, 0), expected + poison(SIZE)[len(expected) :], "the buffer")


def test_a_write_of_such_a_file_needs_no_size(buf):
    buf.pwrite(b"17\n", 0)
    with dmabuf.open("/proc/self/oom_score_adj", "r+") as file:
        before = content("/proc/self/oom_score_adj")
        assert file.write_from(buf, 3).nbytes == 3
        assert content("/proc/self/oom_score_adj") == b"17\n"
        buf.pwrite(before, 0)
        file.write_from(buf, len(before))

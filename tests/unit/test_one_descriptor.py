"""A file opened by its path has one descriptor with O_DIRECT until one without is needed."""

import errno
import fcntl
import os

import pytest

import dmabuf
from dmabuf import Route
from tests.support import assert_same, pattern, poison

SIZE = 256 << 10


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE + 100, 1))
    os.sync()
    return path


@pytest.fixture
def buffer():
    with dmabuf.allocate(2 * SIZE) as buffer:
        with buffer.map("w") as view:
            view[:] = poison(len(view))
        yield buffer


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def content(buffer, size):
    with buffer.map("r", 0, size) as view:
        return bytes(view)


def test_a_small_aligned_read_needs_no_second_descriptor(path, buffer):
    with dmabuf.open("/dev/null"), dmabuf.open(path) as warm:
        warm.read_into(buffer, SIZE)
    before = open_descriptors()
    with dmabuf.open(path) as file:
        assert file.read_into(buffer, SIZE).route is Route.DIRECT
        assert open_descriptors() == before + 1
        assert_same(content(buffer, SIZE), path.read_bytes()[:SIZE], "the buffer")
    assert open_descriptors() == before


@pytest.mark.parametrize("first", [False, True])
def test_fileno_never_has_o_direct_and_stays_the_same(path, buffer, first):
    with dmabuf.open(path) as file:
        early = file.fileno() if first else None
        file.read_into(buffer, SIZE)
        number = file.fileno()
        assert early in (None, number)
        file.read_into(buffer)
        assert file.fileno() == number
        assert not fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT
        assert os.pread(number, 5, 3) == path.read_bytes()[3:8]


@pytest.mark.parametrize("mode", ["r+", "w"])
def test_edges_after_small_aligned_writes(path, buffer, mode):
    data = pattern(2 * SIZE, 7)
    with buffer.map("w") as view:
        view[:] = data
    with dmabuf.open(path, mode) as file:
        file.write_from(buffer, SIZE)
        file.write_from(buffer, 4096, file_offset=8192, buffer_offset=8192)
        file.write_from(buffer, SIZE - 77, file_offset=33, buffer_offset=33)
        file.write_from(buffer, SIZE + 11, file_offset=SIZE - 11, buffer_offset=SIZE - 11)
    assert_same(path.read_bytes(), data, "the file")


def test_without_a_second_descriptor_all_goes_through_the_page_cache(path, buffer, monkeypatch):
    """A file that may not be opened again, as after chmod, is read all the same."""
    expected, real = path.read_bytes(), os.open

    def refuse(name, *arguments, **keywords):
        if str(name).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(name, *arguments, **keywords)

    with dmabuf.open(path) as file:
        monkeypatch.setattr(os, "open", refuse)
        assert file.read_into(buffer, SIZE).route is Route.DIRECT
        assert_same(content(buffer, SIZE), expected[:SIZE], "the buffer")
        number = file.fileno()
        assert not fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT
        with buffer.map("w") as view:
            view[:] = poison(len(view))
        done = file.read_into(buffer)
        assert (done.route, done.nbytes) == (Route.BUFFERED, len(expected))
        assert "may not be opened again" in file.plan(buffer).rejected[Route.DIRECT]
        assert_same(content(buffer, len(expected)), expected, "the buffer")

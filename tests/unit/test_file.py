"""File: opening it in every way and in every wrong way, and bad input that must touch nothing."""

import errno
import os
import socket
from array import array
from decimal import Decimal

import numpy
import pytest

import dmabuf
from dmabuf import ClosedError, Route
from tests.support import assert_same, pattern, poison, raises_errno

SIZE = 1 << 16


@pytest.fixture
def untouched(path, buf):
    """At the end neither the file nor the buffer has changed."""
    yield
    assert_same(path.read_bytes(), pattern(SIZE, 1), "the file")
    if not buf.closed:
        assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer")


# -- opening


def test_what_it_is(path):
    with dmabuf.open(path) as file:
        assert (file.kind, file.size, file.mode, file.name) == ("file", SIZE, "r", str(path))
        assert file.readable() and not file.writable() and not file.closed
        assert repr(file) == f"<dmabuf.File {str(path)!r} mode='r'>"
        assert not os.get_inheritable(file.fileno())
    assert file.closed and repr(file) == f"<dmabuf.File {str(path)!r} closed>"
    file.close()


@pytest.mark.parametrize("spelling", [str, os.fsencode, lambda path: path])
def test_a_path_in_every_spelling(path, spelling, buf):
    with dmabuf.open(spelling(path)) as file:
        assert file.read_into(buf).nbytes == SIZE


def test_modes(path, tmp_path, buf):
    with dmabuf.open(path, "r+") as file:
        assert file.readable() and file.writable() and file.size == SIZE
    with dmabuf.open(path, "w") as file:
        assert not file.readable() and file.writable() and file.size == 0
    new = tmp_path / "new"
    with dmabuf.open(new, "x") as file:
        file.write_from(buf, 10)
    assert new.read_bytes() == poison(10)
    with pytest.raises(FileExistsError) as caught:
        dmabuf.open(new, "x")
    assert caught.value.filename == str(new)
    assert new.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("mode", ["", "rb", "a", "r+w", None, 0, b"r"])
def test_an_unknown_mode(path, mode, untouched):
    with pytest.raises(ValueError, match="one of 'r', 'w', 'r\\+', 'x'"):
        dmabuf.open(path, mode)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_missing_file(tmp_path, mode):
    with pytest.raises(FileNotFoundError) as caught:
        dmabuf.open(tmp_path / "none", mode)
    assert caught.value.filename == str(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        dmabuf.open(tmp_path / "none" / "none", "w")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["r", "w", "r+"])
def test_a_directory(tmp_path, mode):
    with pytest.raises(IsADirectoryError) as caught:
        dmabuf.open(tmp_path, mode)
    assert caught.value.filename == str(tmp_path)


def test_a_name_that_does_not_fit(tmp_path):
    with raises_errno(errno.ENAMETOOLONG, filename=str(tmp_path / ("n" * 256))):
        dmabuf.open(tmp_path / ("n" * 256), "w")
    with pytest.raises(ValueError, match="null"):
        dmabuf.open("with\0null")


@pytest.mark.parametrize("wrong", [True, None, 1.5, object()])
def test_what_is_no_path(wrong):
    with pytest.raises(TypeError):
        dmabuf.open(wrong)


@pytest.mark.parametrize("mode", ["r", "w", "r+"])
def test_what_is_no_engine(path, buf, mode, untouched):
    with pytest.raises(TypeError, match=r"a dmabuf\.Engine is needed, not int"):
        dmabuf.open(path, mode, engine=3)


def test_a_socket_by_its_path(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError) as caught:
            dmabuf.open(tmp_path / "socket")
    assert (caught.value.errno, caught.value.filename) == (errno.ENXIO, str(tmp_path / "socket"))


# -- a descriptor handed in


def test_a_descriptor_keeps_its_flags_and_stays_ours(path, buf):
    fd = os.open(path, os.O_RDONLY)
    before = os.lseek(fd, 100, os.SEEK_SET)
    with dmabuf.open(fd) as file:
        assert file.name == fd and file.fileno() != fd
        transfer = file.read_into(buf)
        assert transfer.route is Route.DIRECT
        import fcntl

        assert not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT
    assert os.lseek(fd, 0, os.SEEK_CUR) == before
    os.close(fd)
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


def test_a_descriptor_is_not_emptied(path):
    fd = os.open(path, os.O_RDWR)
    with dmabuf.open(fd, "w") as file:
        assert file.size == SIZE
    os.close(fd)


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        (os.O_RDONLY, "w"),
        (os.O_RDONLY, "r+"),
        (os.O_WRONLY, "r"),
        (os.O_WRONLY, "r+"),
        (os.O_PATH, "r"),
        (os.O_PATH, "w"),
    ],
)
def test_a_descriptor_that_does_not_allow_it(path, flags, mode, untouched):
    fd = os.open(path, flags)
    with raises_errno(errno.EBADF, filename=f"descriptor {fd}"):
        dmabuf.open(fd, mode)
    os.close(fd)


def test_append_ignores_offsets(path, untouched):
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    for mode in ("w", "r+"):
        with raises_errno(errno.EINVAL, "O_APPEND", filename=f"descriptor {fd}"):
            dmabuf.open(fd, mode)
    with dmabuf.open(fd) as file:
        assert file.size == SIZE  # reading is another matter
    os.close(fd)


@pytest.mark.parametrize("fd", [-1, -100, 1 << 20, 1 << 40])
def test_a_descriptor_that_is_none(fd):
    with raises_errno(errno.EBADF, filename=f"descriptor {fd}"):
        dmabuf.open(fd)


def test_a_descriptor_with_o_direct(path, buf):
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    with dmabuf.open(fd, "r+") as file:
        assert file.read_into(buf, 100, file_offset=1).nbytes == 100
        assert buf.pread(100, 0) == pattern(SIZE, 1)[1:101]
        assert file.write_from(buf, 100, file_offset=1, buffer_offset=500).nbytes == 100
    os.close(fd)
    expected = bytearray(pattern(SIZE, 1))
    expected[1:101] = poison(SIZE)[500:600]
    assert_same(path.read_bytes(), bytes(expected), "the file")


def test_a_deleted_file(path, buf):
    with dmabuf.open(path, "r+") as file:
        path.unlink()
        assert file.read_into(buf).route is Route.DIRECT
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")
        assert file.write_from(buf, file_offset=SIZE).nbytes == SIZE
        assert file.size == 2 * SIZE


def test_what_is_none_of_these():
    fd = os.eventfd(0)
    try:
        with raises_errno(errno.EINVAL):
            dmabuf.open(fd)
    finally:
        os.close(fd)


# -- after close


def test_a_closed_file(path, buf, untouched):
    file = dmabuf.open(path, "r+")
    file.close()
    calls = [
        lambda: file.read_into(buf),
        lambda: file.write_from(buf),
        lambda: file.read_segments(buf, array("Q", [0, 0, 1])),
        lambda: file.write_segments(buf, array("Q", [0, 0, 1])),
        lambda: file.plan(buf),
        lambda: file.size,
        file.fileno,
        file.__enter__,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_a_closed_buffer(path, buf, untouched):
    buf.close()
    with dmabuf.open(path, "r+") as file:
        for call in (file.read_into, file.write_from, file.plan):
            with pytest.raises(ClosedError, match="the buffer is closed"):
                call(buf)


# -- wrong directions and wrong kinds


@pytest.mark.parametrize(("mode", "verb"), [("r", "write"), ("w", "read"), ("x", "read")])
def test_not_open_for_that(path, tmp_path, buf, mode, verb):
    if mode == "x":
        path = tmp_path / "new"
    with dmabuf.open(path, mode) as file:
        calls = [
            lambda: file.read_into(buf) if verb == "read" else file.write_from(buf),
            lambda: file.plan(buf, verb),
            lambda: getattr(file, f"{verb}_segments")(buf, array("Q", [0, 0, 1])),
        ]
        for call in calls:
            with raises_errno(errno.EBADF, "open it with mode", filename=str(path)):
                call()
    assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer")


@pytest.mark.parametrize("wrong", [None, bytearray(8), b"", 3])
def test_what_is_no_buffer(path, wrong, untouched):
    with dmabuf.open(path, "r+") as file:
        for call in (file.read_into, file.write_from, file.plan):
            with pytest.raises(TypeError, match=r"a dmabuf\.Buffer is needed"):
                call(wrong)


HUGE = 2**63


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"size": -1}, ValueError),
        ({"size": SIZE + 1}, ValueError),
        ({"size": HUGE}, ValueError),
        ({"size": HUGE - 1}, ValueError),
        ({"size": 2**64}, ValueError),
        ({"size": True}, TypeError),
        ({"size": 1.0}, TypeError),
        ({"size": "1 parsec"}, ValueError),
        ({"file_offset": -1}, ValueError),
        ({"file_offset": HUGE}, ValueError),
        ({"file_offset": 2**64}, ValueError),
        ({"file_offset": HUGE - 1, "size": 1}, ValueError),
        ({"file_offset": False}, TypeError),
        ({"file_offset": 0.0}, TypeError),
        ({"file_offset": 0.5}, TypeError),
        ({"file_offset": b""}, TypeError),
        ({"file_offset": []}, TypeError),
        ({"file_offset": Decimal("4096.5")}, TypeError),
        ({"file_offset": "0x"}, ValueError),
        ({"buffer_offset": -1}, ValueError),
        ({"buffer_offset": SIZE + 1}, ValueError),
        ({"buffer_offset": HUGE}, ValueError),
        ({"buffer_offset": 2**64 - 10, "size": 20}, ValueError),
        ({"buffer_offset": SIZE - 1, "size": 2}, ValueError),
        ({"buffer_offset": True}, TypeError),
        ({"buffer_offset": 1.5}, TypeError),
        ({"buffer_offset": None}, TypeError),
        ({"require": "speed"}, ValueError),
        ({"require": None}, ValueError),
        ({"route": "native!"}, ValueError),
        ({"route": ""}, ValueError),
        ({"prefer": "slowest"}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"terms": {}}, TypeError),
        ({"terms": {"require": "any"}}, TypeError),
        ({"progress": 1}, TypeError),
    ],
)
@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("first", [True, False])
def test_bad_arguments(cold_path, buf, how, error, verb, first, untouched):
    with dmabuf.open(cold_path, "r+") as file:
        if not first:  # small requests of a File whose O_DIRECT was seen to work go a short way
            file.read_into(buf)
            buf.pwrite(poison(SIZE), 0)
        move = file.read_into if verb == "read" else file.write_from
        with pytest.raises(error):
            move(buf, **{"size": 4096} | how)
        with pytest.raises(error):
            move(buf, **how)
        if not how.keys() & {"timeout", "progress"}:
            with pytest.raises(error):
                file.plan(buf, verb, **how)
        for direction in ("both", "", "r", None):
            with pytest.raises(ValueError, match="'read' or 'write'"):
                file.plan(buf, direction)


def test_sizes_as_text_and_defaults(path, buf):
    with dmabuf.open(path, "r+") as file:
        assert file.read_into(buf, "4KiB").nbytes == 4096
        assert file.read_into(buf).nbytes == SIZE
        assert file.read_into(buf, file_offset=SIZE - 10).nbytes == 10
        assert file.read_into(buf, buffer_offset=SIZE - 10).nbytes == 10
        assert file.write_from(buf, buffer_offset=SIZE - 10).nbytes == 10
        assert file.read_into(buf, numpy.int64(10), file_offset=numpy.uint8(3)).nbytes == 10


def test_nothing_is_nothing(path, buf, untouched):
    with dmabuf.open(path, "r+") as file:
        for how in ({"size": 0}, {"buffer_offset": SIZE}, {"size": 0, "file_offset": HUGE - 1}):
            assert file.write_from(buf, **how).nbytes == 0
            assert file.read_into(buf, **how).nbytes == 0
        empty = array("Q")
        assert file.read_segments(buf, empty, require="zero-copy").nbytes == 0
        assert file.write_segments(buf, empty).nbytes == 0
        zeros = array("Q", [5, 5, 0, 2**40, SIZE, 0])
        assert file.read_segments(buf, zeros).nbytes == 0
        assert file.write_segments(buf, zeros).nbytes == 0


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, 2**40, HUGE - 100])
@pytest.mark.parametrize("route", [None, "staged", "buffered"])
def test_reading_past_the_end_is_nothing(path, buf, offset, route, untouched):
    with dmabuf.open(path) as file:
        assert file.read_into(buf, file_offset=offset).nbytes == 0
        assert file.read_into(buf, 99, file_offset=offset, route=route).nbytes == 0
        assert file.plan(buf).route is Route.DIRECT  # and has taught nothing wrong about the file


def test_a_segment_past_the_end_teaches_nothing(path, buf):
    far = array("Q", [0, 0, 4096, HUGE - 100, 4096, 99])
    with dmabuf.open(path) as file:
        with pytest.raises((dmabuf.ShortReadError, OSError)):
            file.read_segments(buf, far)
        assert file.plan(buf).route is Route.DIRECT


# -- segments


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ([0, 0, 1], TypeError, "not list"),
        (None, TypeError, "not NoneType"),
        (array("q", [0, 0, 1]), TypeError, "format 'q'"),
        (array("I", [0, 0, 1]), TypeError, "format 'I'"),
        (array("d", [0, 0, 1]), TypeError, "format 'd'"),
        (bytes(24), TypeError, "format 'B'"),
        (array("Q", [0, 0]), ValueError, r"shape \(2,\)"),
        (array("Q", [0, 0, 1, 0]), ValueError, r"shape \(4,\)"),
        (numpy.zeros((3, 2), "u8"), ValueError, r"shape \(3, 2\)"),
        (numpy.zeros((1, 3, 1), "u8"), ValueError, r"shape \(1, 3, 1\)"),
        (numpy.zeros(0, "u8").reshape(3, 0), ValueError, r"shape \(3, 0\)"),
        (numpy.array(7, "u8"), ValueError, r"shape \(\)"),
        (numpy.zeros((4, 6), "u8")[:, ::2], TypeError, "contiguous"),
        (numpy.zeros((3, 3), "u8").T, TypeError, "contiguous"),
        (numpy.zeros((1, 3), ">u8"), TypeError, "format '>"),
        (numpy.zeros((1, 3), "i8"), TypeError, "format 'l'"),
        (numpy.zeros(3, [("a", "u8")]), TypeError, "format"),
    ],
)
@pytest.mark.parametrize("verb", ["read_segments", "write_segments"])
def test_malformed_segments(path, buf, wrong, error, match, verb, untouched):
    with dmabuf.open(path, "r+") as file, pytest.raises(error, match=match):
        getattr(file, verb)(buf, wrong)


@pytest.mark.parametrize(
    ("triples", "index"),
    [
        ([(0, 0, SIZE + 1)], 0),
        ([(0, 0, 1), (0, SIZE, 1)], 1),
        ([(0, 0, 1), (0, 2**64 - 1, 2)], 1),
        ([(0, 1, 2**64 - 1)], 0),
        ([(0, 0, 1), (1, 1, 1), (2**63, 0, 0)], 2),
        ([(2**63 - 1, 0, 1)], 0),
        ([(2**64 - 1, 0, 1)], 0),
    ],
)
@pytest.mark.parametrize("verb", ["read_segments", "write_segments"])
def test_segments_out_of_range(path, buf, triples, index, verb, untouched):
    flat = array("Q", [number for triple in triples for number in triple])
    with (
        dmabuf.open(path, "r+") as file,
        pytest.raises(ValueError, match=f"segment {index} .*leaves the buffer"),
    ):
        getattr(file, verb)(buf, flat)


def test_overlapping_segments(path, buf):
    overlap = array("Q", [4096, 0, 4096, 0, 8192, 4097])
    with dmabuf.open(path, "r+") as file:
        with pytest.raises(ValueError, match=r"segment 1 .*overlaps another"):
            file.write_segments(buf, overlap)
        assert_same(path.read_bytes(), pattern(SIZE, 1), "the file")
        assert file.read_segments(buf, overlap).nbytes == 8193
        same_place = array("Q", [0, 0, 4096, 8192, 0, 4096])
        assert file.read_segments(buf, same_place).nbytes == 8192
        assert buf.pread(4096, 0) in (pattern(SIZE, 1)[:4096], pattern(SIZE, 1)[8192:12288])


def test_segments_are_held_while_they_are_used(path, buf):
    """Nobody can resize the array under the core, and afterwards anybody can."""
    segments = array("Q", [0, 0, 4096] * 2)
    with dmabuf.open(path) as file:
        file.read_segments(buf, segments)
        segments.append(1)
        with pytest.raises(ValueError):
            file.read_segments(buf, segments)
        segments.append(1)
        segments.append(1)
        assert file.read_segments(buf, segments).nbytes == 8193


# -- require, route, prefer


def test_require_names_the_cause_and_the_fix(path, buf, untouched):
    with dmabuf.open(path, "r+") as file:
        with pytest.raises(dmabuf.RouteUnavailable) as caught:
            file.read_into(buf, 4096, file_offset=1, require="zero-copy")
        error = caught.value
        assert (error.errno, error.filename) == (errno.EOPNOTSUPP, str(path))
        assert "require='zero-copy'" in str(error) and "move the buffer offset" in str(error)
        with pytest.raises(dmabuf.RouteUnavailable, match="whole block"):
            file.read_into(buf, 100, require="zero-copy")
        with pytest.raises(dmabuf.RouteUnavailable, match="whole page"):
            file.write_from(buf, 100, require="uncached")
        with pytest.raises(dmabuf.RouteUnavailable, match="move the buffer offset"):
            file.write_from(buf, 10000, buffer_offset=1, file_offset=2 * SIZE, route="direct")
        with pytest.raises(dmabuf.RouteUnavailable, match="before the one that holds its end"):
            file.read_into(buf, 4096, file_offset=SIZE, require="zero-copy")
        with pytest.raises(dmabuf.RouteUnavailable, match="does not permit"):
            file.read_into(buf, require="zero-copy", route="buffered")
        segments = array("Q", [0, 0, 4096, 4096, 8192, 10])
        with pytest.raises(dmabuf.RouteUnavailable, match="1 of the 2 segments"):
            file.read_segments(buf, segments, require="zero-copy")


def test_a_refused_write_does_not_grow_the_file(tmp_path, buf):
    with dmabuf.open(tmp_path / "new", "w") as file:
        with pytest.raises(dmabuf.RouteUnavailable):
            file.write_from(buf, 100, file_offset=SIZE, require="zero-copy")
        assert file.size == 0


def test_some_segments_may_have_no_middle(path, buf):
    segments = array("Q", [0, 0, 4096, 4096, 8192, 10])
    with dmabuf.open(path) as file:
        transfer = file.read_segments(buf, segments)
        assert (transfer.route, transfer.nbytes, transfer.copied) == (Route.DIRECT, 4106, 10)


def test_memory_filesystems_are_buffered(buf):
    path = f"/dev/shm/dmabuf-test-{os.getpid()}"
    try:
        with dmabuf.open(path, "w") as file:
            assert file.write_from(buf).route is Route.BUFFERED
        with dmabuf.open(path) as file:
            transfer = file.read_into(buf)
            assert (transfer.nbytes, transfer.route) == (SIZE, Route.BUFFERED)
            assert "tmpfs keeps its files in the page cache" in transfer.rejected[Route.DIRECT]
            for how in ({"require": "uncached"}, {"route": "direct"}, {"route": "staged"}):
                with pytest.raises(dmabuf.RouteUnavailable, match="tmpfs"):
                    file.read_into(buf, **how)
    finally:
        os.unlink(path)


def test_a_memfd_as_a_file(buf):
    fd = os.memfd_create("as a file")
    try:
        with dmabuf.open(fd, "r+") as file:
            assert file.write_from(buf, 5000, file_offset=77).route is Route.BUFFERED
            assert os.pread(fd, 6000, 0) == bytes(77) + poison(5000)
    finally:
        os.close(fd)


def test_a_buffer_as_a_file_is_refused_or_plain(buf):
    """A memfd Buffer's descriptor is a file like any; it never turns into something else."""
    with dmabuf.open(buf.fileno()) as file, dmabuf.allocate(SIZE, exporter="memfd") as other:
        assert file.read_into(other).nbytes == SIZE
        assert_same(other.pread(SIZE, 0), poison(SIZE), "the other buffer")

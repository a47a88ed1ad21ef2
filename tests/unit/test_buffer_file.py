"""A Buffer and its windows as files: every method, and every way to use one wrongly."""

import array
import ctypes
import io
import os

import pytest

from dmabuf.errors import ClosedError
from dmabuf.memory import allocate

SIZE = 8192


@pytest.fixture
def buf():
    with allocate(SIZE, exporter="memfd", name="under test") as buffer:
        buffer.pwrite(bytes(range(256)) * 32, 0)
        yield buffer


@pytest.fixture(params=["buffer", "window"])
def raw(request, buf):
    """8192 known bytes, as the buffer itself or as a window into a larger one."""
    if request.param == "buffer":
        yield buf
        return
    with allocate(4 * SIZE, exporter="memfd") as larger:
        larger.pwrite(b"\xee" * (4 * SIZE), 0)
        larger.pwrite(buf.pread(SIZE, 0), 4096)
        with larger.open(offset=4096, size=SIZE) as window:
            yield window
        assert larger.pread(4096, 0) == b"\xee" * 4096
        assert larger.pread(SIZE * 4, 4096 + SIZE) == b"\xee" * (4 * SIZE - 4096 - SIZE)


CONTENT = bytes(range(256)) * 32


def test_what_it_is(buf):
    assert isinstance(buf, io.RawIOBase)
    assert (buf.size, buf.name, buf.exporter, buf.mode) == (SIZE, "under test", "memfd", "rb+")
    assert buf.readable() and buf.writable() and buf.seekable() and not buf.isatty()
    assert not buf.closed and not buf.is_dmabuf
    assert repr(buf) == "<dmabuf.Buffer 'under test' 8 KiB exporter='memfd' mode='rb+'>"
    assert [(slab.offset, slab.size) for slab in buf.slabs] == [(0, SIZE)]
    assert buf.fileno() == buf.slabs[0].fd
    with pytest.raises(AttributeError):
        buf.slabs[0].fd = 3


def test_sizes_round_up_to_a_page():
    with allocate(1, exporter="memfd") as buffer:
        assert buffer.size == os.sysconf("SC_PAGESIZE")


def test_reading(raw):
    assert raw.read(3) == CONTENT[:3]
    assert raw.tell() == 3
    into = bytearray(10)
    assert raw.readinto(into) == 10 and into == CONTENT[3:13]
    assert raw.read(0) == b""
    assert raw.read() == CONTENT[13:] and raw.tell() == SIZE
    assert raw.read() == raw.read(5) == raw.readall() == b"" and raw.readinto(into) == 0
    raw.seek(SIZE - 4)
    assert raw.read(None) == CONTENT[-4:]
    raw.seek(SIZE - 4)
    assert raw.read(100) == CONTENT[-4:]
    raw.seek(0)
    assert raw.readline() == CONTENT[: CONTENT.index(b"\n") + 1]
    raw.seek(0)
    assert b"".join(raw) == CONTENT


def test_writing(raw):
    assert raw.write(b"abc") == 3 and raw.tell() == 3
    raw.writelines([b"de", b"", b"f"])
    assert raw.tell() == 6
    assert raw.pread(8, 0) == b"abcdef" + CONTENT[6:8]
    raw.seek(-2, os.SEEK_END)
    assert raw.write(b"yz") == 2
    assert raw.pread(9, SIZE - 3) == CONTENT[-3:-2] + b"yz"
    raw.flush()


def test_seeking(raw):
    assert raw.seek(10) == 10
    assert raw.seek(-3, os.SEEK_CUR) == 7
    assert raw.seek(-1, os.SEEK_END) == SIZE - 1
    assert raw.seek(5, os.SEEK_END) == SIZE + 5
    assert raw.read(10) == b"" and raw.tell() == SIZE + 5
    assert raw.seek(2**63 - 1) == 2**63 - 1
    for wrong in [(-1,), (-SIZE - 1, os.SEEK_END), (2**63,), (2**63 - 1, os.SEEK_END), (0, 3)]:
        with pytest.raises(ValueError):
            raw.seek(*wrong)
    assert raw.tell() == 2**63 - 1


@pytest.mark.parametrize("wrong", [True, False, 1.0, b"1", None])
def test_offsets_and_sizes_are_ints(raw, buf, wrong):
    for call in (
        lambda: raw.pread(wrong, 0),
        lambda: raw.pread(1, wrong),
        lambda: raw.pwrite(b"", wrong),
        lambda: raw.preadv([], wrong),
        lambda: raw.seek(wrong),
        lambda: buf.open(offset=wrong),
        lambda: buf.map("r", wrong).__enter__(),
    ):
        with pytest.raises(TypeError, match="must be an int"):
            call()


def test_bad_ranges_are_value_errors(raw):
    for call in (
        lambda: raw.pread(-1, 0),
        lambda: raw.pread(1, -1),
        lambda: raw.pread(1, 2**63),
        lambda: raw.pwrite(b"x", -1),
        lambda: raw.pwrite(b"x", 2**64),
        lambda: raw.preadv([bytearray(1)], -1),
        lambda: raw.check_range(-1, 1),
        lambda: raw.check_range(1, -1),
        lambda: raw.check_range(SIZE, 1),
        lambda: raw.check_range(0, SIZE + 1),
        lambda: raw.check_range(2**64, 2**64),
        lambda: raw.read(-2),
    ):
        with pytest.raises(ValueError, match=r"use 0 or more|past the|use at most") as error:
            call()
        assert not isinstance(error.value, (ClosedError, io.UnsupportedOperation))
    raw.check_range(0, SIZE)
    raw.check_range(SIZE, 0)
    assert raw.pread(4, SIZE) == raw.pread(4, 2**63 - 1) == b""


def test_any_contiguous_buffer_will_do(raw):
    assert raw.pwrite(array.array("d", [1.5, 2.5]), 0) == 16
    doubles = array.array("d", [0, 0])
    assert raw.preadv([doubles], 0) == 16 and list(doubles) == [1.5, 2.5]
    words = (ctypes.c_uint32 * 2)(1, 2)
    assert raw.pwrite(words, 0) == 8 and raw.pread(8, 0) == bytes(words)
    words[0] = words[1] = 9
    raw.seek(0)
    assert raw.readinto(words) == 8 and list(words) == [1, 2]
    grid = memoryview(bytes(range(6))).cast("B", [2, 3])
    assert raw.pwrite(grid, 0) == 6 and raw.pread(6, 0) == bytes(range(6))
    with pytest.raises(BufferError, match="contiguous"):
        raw.pwrite(memoryview(b"abcdef")[::2], 0)
    with pytest.raises(TypeError):
        raw.write("text")
    with pytest.raises(TypeError, match="writable buffer is needed"):
        raw.readinto(b"constant")


def test_after_close_everything_is_a_closed_error(raw):
    raw.close()
    raw.close()
    assert raw.closed
    for call in (
        raw.read,
        raw.readall,
        raw.tell,
        raw.readable,
        raw.writable,
        raw.seekable,
        raw.fileno,
        raw.flush,
        raw.isatty,
        raw.truncate,
        raw.readline,
        raw.readlines,
        raw.__enter__,
        raw.__iter__,
        lambda: raw.read(0),
        lambda: raw.seek(0),
        lambda: raw.readinto(bytearray(1)),
        lambda: raw.write(b"x"),
        lambda: raw.write(b""),
        lambda: raw.writelines([]),
        lambda: raw.pread(1, 0),
        lambda: raw.pwrite(b"", 0),
        lambda: raw.preadv([], 0),
        lambda: raw.pwritev([], 0),
    ):
        with pytest.raises(ClosedError, match="is closed"):
            call()
    assert "closed" in repr(raw)
    assert raw.size == SIZE


def test_a_closed_buffer_has_no_descriptors_maps_or_windows(buf):
    buf.close()
    for call in (
        lambda: buf.slabs,
        lambda: buf.address,
        buf.hold,
        lambda: buf.view(0, 1),
        lambda: buf.on_close(print),
        lambda: buf.map().__enter__(),
        buf.open,
    ):
        with pytest.raises(ClosedError, match="this buffer is closed"):
            call()
    assert (buf.size, buf.name, buf.exporter, buf.mode) == (SIZE, "under test", "memfd", "rb+")


def test_a_window_has_its_own_position_and_end(buf):
    one, two = buf.open(offset=256, size=256), buf.open("r", offset=SIZE - 10)
    assert (one.size, one.offset, one.buffer, one.name) == (256, 256, buf, "under test")
    assert (two.size, two.mode, two.writable()) == (10, "rb", False)
    assert one.read(2) == b"\x00\x01" and two.read(2) == CONTENT[-10:-8] and buf.tell() == 0
    assert repr(one).startswith("<dmabuf.Window 256 B at 256 mode='rb+' of <dmabuf.Buffer ")
    one.close()
    assert not buf.closed and two.read() == CONTENT[-8:]
    assert buf.open(offset=SIZE).read() == b""
    with pytest.raises(io.UnsupportedOperation, match="no descriptor"):
        two.fileno()


def test_windows_and_maps_have_modes(buf):
    for mode in ("r", "w", "r+"):
        window = buf.open(mode)
        assert window.readable() == ("r" in mode)
        assert window.writable() == ("w" in mode or "+" in mode)
        with buf.map(mode) as view:
            assert view.readonly == (not window.writable())
    reader, writer = buf.open("r"), buf.open("w")
    assert writer.mode == "wb"
    for call in (
        lambda: reader.write(b"x"),
        lambda: reader.pwrite(b"x", 0),
        lambda: reader.truncate(SIZE),
        lambda: writer.read(1),
        lambda: writer.readall(),
        lambda: writer.readinto(bytearray(1)),
        lambda: writer.preadv([], 0),
    ):
        with pytest.raises(io.UnsupportedOperation, match="this window is not"):
            call()
    for wrong in ("", "a", "x", "rw", "rb", "r+b", None, 3):
        with pytest.raises(ValueError, match="invalid mode"):
            buf.map(wrong).__enter__()
    with pytest.raises(ValueError, match="invalid mode"):
        buf.open("a")


def test_windows_and_maps_stay_within_the_buffer(buf):
    for part in [(0, SIZE + 1), (SIZE + 1, None), (-1, None), (0, -1), (SIZE, 1), (2**64, 2**64)]:
        with pytest.raises(ValueError, match=r"use 0 or more|past the|use at most"):
            buf.open(offset=part[0], size=part[1])
        with pytest.raises(ValueError, match=r"use 0 or more|past the|use at most"):
            buf.map("r", *part).__enter__()


def test_map_is_the_memory(buf):
    with buf.map("r+", 10, 4) as view:
        assert bytes(view) == CONTENT[10:14]
        view[:2] = b"hi"
    assert buf.pread(5, 9) == CONTENT[9:10] + b"hi" + CONTENT[12:14]
    with buf.map() as view:
        assert view.readonly and len(view) == SIZE
        with pytest.raises(TypeError):
            view[0] = 1
    with pytest.raises(ValueError, match="released"):
        view[0]
    with buf.map("r", SIZE) as view:
        assert len(view) == 0


def test_a_window_outlives_its_buffer_as_an_error(buf):
    window = buf.open()
    buf.close()
    assert not window.closed
    for call in (window.read, window.tell, lambda: window.write(b"x"), lambda: window.seek(0)):
        with pytest.raises(ClosedError, match="the buffer of this window is closed"):
            call()
    window.close()


def test_memory_of_another_part_of_itself(buf):
    with buf.map("r+") as view:
        buf.pwrite(view[0:1000], 500)
    assert buf.pread(1000, 500) == CONTENT[:1000]

"""Arrays over a buffer's memory: their bytes, what is refused, lifetimes and the bracket."""

import ctypes
import errno
import gc
import io
import mmap
import os
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import dmabuf
from dmabuf.memory import Slab, allocate
from tests.forking import in_child
from tests.resources import held
from tests.support import pattern, raises_errno

SIZE = 1 << 16
PAGE = mmap.PAGESIZE


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def buf():
    with allocate(SIZE, exporter="memfd") as buffer:
        buffer.pwrite(pattern(SIZE, 1), 0)
        yield buffer


def read_only(buffer):
    """A buffer over the same memory whose pages must not be written."""
    again = os.open(f"/proc/self/fd/{buffer.fileno()}", os.O_RDONLY)
    memory = mmap.mmap(again, SIZE, prot=mmap.PROT_READ)
    slab = Slab(again, 0, SIZE)
    return dmabuf.Buffer(
        [slab], memory, exporter="memfd", reason="", is_dmabuf=False, writable=False
    )


DTYPES = ["u1", "i1", "?", "<f2", ">f4", "<f8", ">i8", "<c16", "S5", "U3", "V7", "M8[ns]"]
DTYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
DTYPES += [np.dtype([("a", "<u2"), ("b", ">f8", (2,))]), np.dtype(("<i4", (3,)))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 7, 4096, SIZE - 480])
def test_it_is_what_numpy_makes_of_the_bytes(buf, dtype, offset):
    dtype = np.dtype(dtype)
    array = buf.asarray(dtype, (2, 5), offset)
    expected = np.ndarray((2, 5), dtype, buffer=pattern(SIZE, 1), offset=offset)
    assert array.dtype == expected.dtype and array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()
    assert array.flags.writeable and array.flags.c_contiguous
    assert array.flags.aligned == (offset % dtype.alignment == 0)
    del array


@given(data=st.data())
def test_a_write_changes_these_bytes_and_no_others(data):
    dtype = data.draw(hnp.integer_dtypes() | hnp.floating_dtypes())
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    value = data.draw(hnp.arrays(dtype, shape))
    offset = data.draw(st.integers(0, SIZE - value.nbytes))
    expected = bytearray(pattern(SIZE, 2))
    expected[offset : offset + value.nbytes] = value.tobytes()
    with allocate(SIZE, exporter="memfd") as buf:
        buf.pwrite(pattern(SIZE, 2), 0)
        array = buf.asarray(dtype, shape, offset)
        array[...] = value
        assert array.tobytes() == value.tobytes()
        del array
        assert buf.pread(SIZE, 0) == bytes(expected)


def test_without_a_shape_it_is_all_the_rest(buf):
    assert buf.asarray().tobytes() == pattern(SIZE, 1)
    assert buf.asarray("<u4", offset=8).shape == (SIZE // 4 - 2,)
    assert buf.asarray("u1", offset=SIZE).shape == (0,)
    with pytest.raises(ValueError, match=r"65535 bytes from offset 1 .* not a whole number"):
        buf.asarray("<u4", offset=1)


def test_shapes(buf):
    assert buf.asarray("u1", 3).shape == (3,)
    assert buf.asarray("u1", np.int64(3)).shape == (3,)
    assert buf.asarray("u1", [2, 3]).shape == (2, 3)
    assert buf.asarray("<f8", ()).shape == ()
    assert buf.asarray("<f8", (1 << 40, 0, 7)).nbytes == 0
    assert buf.asarray("<f8", 0, SIZE).size == 0


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "error"),
    [
        ("u1", SIZE + 1, 0, ValueError),
        ("u1", 1, SIZE, ValueError),
        ("u1", 0, SIZE + 1, ValueError),
        ("<f4", (1 << 32, 1 << 32), 0, ValueError),
        ("<f4", 1 << 70, 0, ValueError),
        ("<f4", -1, 0, ValueError),
        ("<f4", (2, -2), 0, ValueError),
        ("<f4", (-1, -1), 0, ValueError),
        ("<f4", 2.0, 0, TypeError),
        ("<f4", "12", 0, TypeError),
        ("<f4", True, 0, TypeError),
        ("<f4", 1, -4, ValueError),
        ("<f4", 1, 0.0, TypeError),
        ("<f4", 1, 1 << 63, ValueError),
        ("O", 1, 0, TypeError),
        ([("a", "O")], 1, 0, TypeError),
        ("S", 1, 0, TypeError),
        ("V", 1, 0, TypeError),
        ("no such type", 1, 0, TypeError),
    ],
)
def test_what_is_refused(buf, dtype, shape, offset, error):
    with pytest.raises(error):
        buf.asarray(dtype, shape, offset)
    buf.close()  # nothing is left over it


def test_more_dimensions_than_numpy_has(buf):
    with pytest.raises(ValueError, match="dimension"):
        buf.asarray("u1", (1,) * 65)
    buf.close()


def test_a_closed_one(buf):
    buf.close()
    for call in (buf.asarray, buf.__dlpack__, buf.__dlpack_device__):
        with pytest.raises(dmabuf.ClosedError):
            call()


def test_memory_that_the_cpu_cannot_map(tmp_path):
    slab = Slab(os.open(tmp_path, os.O_RDONLY), 0, SIZE)
    with dmabuf.Buffer([slab], None, exporter="x", reason="", map_refusal="no mapping here") as buf:
        for call in (buf.asarray, buf.__dlpack__, buf.__dlpack_device__):
            with pytest.raises(io.UnsupportedOperation, match="no mapping here"):
                call()


# -- lifetimes


MADE = {
    "array": lambda buf: buf.asarray("<u4", 8, 4),
    "slice": lambda buf: buf.asarray("<u4", 8)[3:5],
    "reshaped": lambda buf: buf.asarray("<u4", (4, 2)).T.reshape(2, 4)[None],
    "another dtype": lambda buf: buf.asarray("<u4", 8).view("<f8"),
    "zero-size": lambda buf: buf.asarray("<u4", 0),
    "memoryview": lambda buf: memoryview(buf.asarray("<u4", 8))[2:],
    "by DLPack": lambda buf: np.from_dlpack(buf),
    "by DLPack of an array": lambda buf: np.from_dlpack(buf.asarray("<u4", 8)),
    "capsule": lambda buf: buf.__dlpack__(max_version=(1, 0)),
    "older capsule": lambda buf: buf.__dlpack__(),
}


@pytest.mark.parametrize("kind", MADE)
def test_it_holds_the_buffer_open(buf, kind):
    made = MADE[kind](buf)
    for _ in range(2):
        with pytest.raises(BufferError, match="exported pointers exist"):
            buf.close()
    assert not buf.closed and buf.pread(4, 0) == pattern(SIZE, 1)[:4]
    del made
    buf.close()


@pytest.mark.parametrize("kind", MADE)
def test_it_keeps_the_buffer_alive(kind):
    buf = allocate(SIZE, exporter="memfd")
    buf.pwrite(pattern(SIZE, 3), 0)
    made = MADE[kind](buf)
    before = held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del buf
        gc.collect()
    assert held() == before
    if isinstance(made, np.ndarray):
        made.flat[:] = 0
    with pytest.warns(ResourceWarning, match="unclosed"):
        del made
        gc.collect()


def test_transfers_go_on_under_an_array(buf, tmp_path):
    array = buf.asarray()
    (tmp_path / "x").write_bytes(pattern(SIZE, 7))
    with dmabuf.open(tmp_path / "x") as file:
        file.read_into(buf)
    assert array.tobytes() == pattern(SIZE, 7)


def test_a_forked_child_has_them_too(buf):
    array = buf.asarray("<u4", 4)

    def child():
        array[0] = 77
        with pytest.raises(BufferError):
            buf.close()

    in_child(child)
    assert array[0] == 77


def test_many_leave_nothing():
    with allocate(SIZE, exporter="memfd") as buf:
        for _ in range(3):
            buf.asarray(), buf.__dlpack__(), np.from_dlpack(buf), dmabuf.from_dlpack(buf)
        gc.collect()
        before, references = len(gc.get_objects()), sys.getrefcount(buf)
        for _ in range(200):
            buf.asarray("<u4", 3), buf.__dlpack__(), buf.__dlpack__(max_version=(1, 0))
            np.from_dlpack(buf), dmabuf.from_dlpack(buf)
        assert sys.getrefcount(buf) == references
        gc.collect()
        assert len(gc.get_objects()) < before + 20


# -- read-only


def test_it_is_read_only_where_the_buffer_is(buf):
    with read_only(buf) as other:
        for array in (other.asarray("<u4", 4), np.from_dlpack(other), np.from_dlpack(other)[3:]):
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
        assert array.tobytes() == pattern(SIZE, 1)[3:]
        with pytest.raises(BufferError, match="readonly"):
            other.__dlpack__()  # the older kind has no such mark
        part = dmabuf.from_dlpack(array)
        assert part.mode == "rb" and part.buffer is other
        del array, part


def test_the_part_of_a_read_only_array_is_read_only(buf):
    array = buf.asarray("<u4", 4)
    array.flags.writeable = False
    part = dmabuf.from_dlpack(array)
    assert part.mode == "rb" and part.buffer is buf and buf.writable()
    with pytest.raises(io.UnsupportedOperation):
        part.write(b"x")


# -- DLPack


def test_the_device_is_the_host(buf):
    assert buf.__dlpack_device__() == (1, 0)
    for version in (None, (1, 0)):
        with pytest.raises(BufferError, match="device"):
            buf.__dlpack__(max_version=version, dl_device=(2, 0))
        with pytest.raises(BufferError, match="stream=1"):
            buf.__dlpack__(max_version=version, stream=1)
    buf.close()


def test_a_copy_is_none_of_ours(buf):
    copied = np.from_dlpack(buf, copy=True)
    older = np.from_dlpack(Elsewhere(1, buf.__dlpack__(copy=True)))
    buf.close()
    assert copied.tobytes() == older.tobytes() == pattern(SIZE, 1)


@pytest.mark.parametrize("version", [None, (1, 0), (1, 5), (2, 0)])
def test_a_capsule_that_nobody_takes_lets_go(buf, version):
    capsule = buf.__dlpack__(max_version=version)
    name = "dltensor" if version is None else "dltensor_versioned"
    assert f'"{name}"' in repr(capsule)
    with pytest.raises(BufferError):
        buf.close()
    del capsule
    buf.close()


def test_from_dlpack_finds_the_part(buf):
    with allocate(SIZE, exporter="memfd"):  # another one
        array = buf.asarray("<f4", (8, 4), 12)
        for value, offset, size in [
            (array, 12, 128),
            (array[2:3], 12 + 32, 16),
            (array[:1, 2:], 12 + 8, 8),
            (array[0, 3], 24, 4),
            (array[:0], 12, 0),
            (array.reshape(2, 2, 8)[1], 12 + 64, 64),
            (buf, 0, SIZE),
        ]:
            value = np.asarray(value) if isinstance(value, np.generic) else value
            if value is not buf and value.base is None:
                continue  # a scalar, which is a copy
            part = dmabuf.from_dlpack(value)
            assert (part.buffer, part.offset, part.size) == (buf, offset, size)
            assert part.mode == "rb+"


def test_the_part_is_what_a_transfer_takes(buf, tmp_path):
    array = buf.asarray("<f4", (8, 4), 16)
    part = dmabuf.from_dlpack(array[2:4])
    with dmabuf.open(tmp_path / "x", "w") as file:
        file.write_from(part.buffer, part.size, buffer_offset=part.offset)
    assert (tmp_path / "x").read_bytes() == array[2:4].tobytes() == part.read()


class Legacy:
    """A library before DLPack 1.0."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_from_dlpack_of_an_older_library(buf):
    part = dmabuf.from_dlpack(Legacy(buf.asarray("<u2", 5, 6)))
    assert (part.offset, part.size) == (6, 10)
    gc.collect()
    buf.close()  # the capsule was let go of


class Elsewhere:
    def __init__(self, device, capsule=None):
        self.device, self.capsule = device, capsule

    def __dlpack__(self, **_how):
        return self.capsule

    def __dlpack_device__(self):
        return self.device, 0


def test_from_dlpack_refuses(buf):
    array = buf.asarray("<f4", (8, 4))
    consumed = array.__dlpack__()
    np.from_dlpack(Elsewhere(1, consumed))
    for value, error, match in [
        (np.zeros(4), BufferError, "not in a Buffer: copy them into one"),
        (array[:, 1:], BufferError, "not contiguous"),
        (array[::2], BufferError, "not contiguous"),
        (array.T, BufferError, "not contiguous"),
        (array[::-1], BufferError, "not contiguous"),
        (Elsewhere(2), BufferError, "device type 2"),
        (Elsewhere(1, None), BufferError, "no DLPack capsule"),
        (Elsewhere(1, consumed), BufferError, "no DLPack capsule"),
        (b"bytes", TypeError, "builtins.bytes"),
        (array.view(">f4"), BufferError, "native byte order"),
    ]:
        with pytest.raises(error, match=match):
            dmabuf.from_dlpack(value)


def test_an_array_that_reaches_past_the_buffer_is_not_in_it(buf):
    memory = (ctypes.c_ubyte * 16).from_address(buf.address + SIZE - 8)
    with pytest.raises(BufferError, match="not in a Buffer"):
        dmabuf.from_dlpack(np.ctypeslib.as_array(memory))


def test_a_dlpack_of_the_future_is_refused(buf):
    capsule = buf.__dlpack__(max_version=(1, 0))
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    major = ctypes.c_uint32.from_address(get(capsule, b"dltensor_versioned"))
    assert major.value == 1
    major.value = 2
    with pytest.raises(BufferError, match=r"DLPack 2\.\d+, and only 1\.x is known"):
        dmabuf.from_dlpack(Elsewhere(1, capsule))
    major.value = 1
    del capsule
    buf.close()


# -- the buffer protocol

VIEWS = {
    "memoryview": memoryview,
    "asarray": np.asarray,
    "from_dlpack": np.from_dlpack,
    "frombuffer": lambda buffer: np.frombuffer(buffer, "u1"),
    "window": lambda buffer: memoryview(buffer.open()),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_buffer_protocol_shares_the_memory_and_holds_it_open(buf, view):
    seen = view(buf)
    assert bytes(seen) == pattern(SIZE, 1) and len(seen) == len(buf) == SIZE
    seen[1] = seen[0] ^ 1
    assert buf.pread(1, 1) == bytes(seen[1:2])
    with pytest.raises(BufferError, match="exported pointers exist"):
        buf.close()
    del seen
    buf.close()


def test_the_buffer_protocol_of_a_window_and_of_a_read_only_buffer(buf):
    assert bytes(buf.open(offset=7, size=9)) == pattern(SIZE, 1)[7:16]
    assert bytes(buf.open(size=0)) == b""
    with read_only(buf) as other:
        assert memoryview(other).readonly and not np.asarray(other).flags.writeable
        with pytest.raises(TypeError, match="not writable"):
            (ctypes.c_char * SIZE).from_buffer(other)
    assert not np.asarray(buf.open("r")).flags.writeable


def test_copies_of_bytes_by_index_and_slice(buf):
    expected = pattern(SIZE, 1)
    assert bytes(buf) == expected and bytes(np.array(buf)) == expected
    assert buf[5] == expected[5] and buf[np.int8(-1)] == expected[-1]
    for part in (slice(8), slice(-3, None), slice(9, 3, -2), slice(SIZE, None), slice(np.int8(3))):
        assert buf[part] == expected[part] and type(buf[part]) is bytes
    with pytest.raises(IndexError):
        buf[SIZE]


@pytest.mark.parametrize("view", [*VIEWS.values(), bytes, np.array, lambda buffer: buffer[0]])
def test_no_wrong_answer_where_there_is_no_memory(buf, view, monkeypatch):
    buf.close()
    with pytest.raises(dmabuf.ClosedError):
        view(buf)
    with allocate(PAGE, exporter="memfd") as other:
        monkeypatch.setattr(other, "map_refusal", "only devices can")
        with pytest.raises(io.UnsupportedOperation, match="only devices can"):
            view(other)


# -- the CPU access bracket


def brackets(kernel):
    """The SYNC calls since the last time, without the descriptor."""
    calls = [(what, flags) for _, what, flags in kernel.calls]
    kernel.calls.clear()
    return calls


@pytest.fixture
def fake(kernel):
    with allocate(SIZE, exporter="udmabuf") as buffer:
        kernel.calls.clear()
        yield buffer


def test_an_array_is_one_access_as_long_as_it_lives(kernel, fake):
    array = fake.asarray("<u4", 4)
    assert brackets(kernel) == [("START", "RW")]
    part = array[1:].view("u1")
    del array
    gc.collect()
    assert brackets(kernel) == []
    del part
    assert brackets(kernel) == [("END", "RW")]


@pytest.mark.parametrize("kind", [*VIEWS, *MADE])
def test_a_view_is_one_access_as_long_as_it_lives(kernel, fake, kind):
    seen = (VIEWS | MADE)[kind](fake)
    assert brackets(kernel) == [("START", "RW")] * (kind != "zero-size")
    del seen
    assert brackets(kernel) == [("END", "RW")] * (kind != "zero-size")
    assert fake[:2] == b"\0\0"
    assert brackets(kernel) == [("START", "R"), ("END", "R")]


def test_each_that_is_made_has_its_own(kernel, fake):
    first, second = fake.asarray(), np.from_dlpack(fake)
    assert brackets(kernel) == [("START", "RW")] * 2
    del first
    assert brackets(kernel) == [("END", "RW")]
    with fake.map("r+"):
        second[0] = 1
    assert brackets(kernel) == [("START", "RW"), ("END", "RW")]


def test_an_access_of_a_read_only_buffer_reads(kernel, fake, monkeypatch):
    monkeypatch.setattr(fake, "_access", (True, False))
    array = fake.asarray()
    assert not array.flags.writeable
    del array
    assert brackets(kernel) == [("START", "R"), ("END", "R")]


def test_only_the_slabs_under_it(kernel):
    kernel.limit = PAGE
    with allocate(4 * PAGE, exporter="udmabuf") as buf:
        kernel.calls.clear()
        fds = [slab.fd for slab in buf.slabs]
        assert len(fds) == 4
        array = buf.asarray("u1", 2, 2 * PAGE - 1)
        del array
        assert [(fd, what) for fd, what, _ in kernel.calls] == [
            (fds[1], "START"),
            (fds[2], "START"),
            (fds[2], "END"),
            (fds[1], "END"),
        ]


def test_an_access_that_is_refused(kernel, fake):
    kernel.sync_errors = [errno.EIO]
    with raises_errno(errno.EIO):
        fake.asarray()
    kernel.calls.clear()
    gc.collect()
    assert brackets(kernel) == []
    fake.close()


def test_an_array_that_numpy_refuses_ends_its_access(kernel, fake):
    with pytest.raises(ValueError):
        fake.asarray("u1", (1,) * 65)
    assert brackets(kernel) == [("START", "RW"), ("END", "RW")]


def test_an_end_that_fails_hurts_nobody(kernel, fake):
    array = fake.asarray()
    kernel.sync_errors = [errno.EIO]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del array
    fake.close()


# -- what is not installed

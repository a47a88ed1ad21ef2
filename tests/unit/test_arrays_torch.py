"""PyTorch tensors over a buffer's memory."""

import gc
import os
import sys
import warnings

import numpy as np
import pytest

import dmabuf
from dmabuf.memory import allocate
from tests.guards import problem_with, required
from tests.resources import held
from tests.support import pattern
from tests.unit.test_arrays import SIZE, read_only

if problem_with("torch") and not required("torch"):
    pytest.skip(f"needs torch: {problem_with('torch')}", allow_module_level=True)

import torch

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def buf():
    with allocate(SIZE, exporter="memfd") as buffer:
        buffer.pwrite(pattern(SIZE, 1), 0)
        yield buffer


DTYPES = ["uint8", "bool", "int16", "int64", "uint16", "uint64", "float16", "bfloat16", "float32"]
DTYPES += ["float64", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]


@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_bytes(buf, name):
    tensor = buf.astensor(getattr(torch, name), (3, 5), 64)
    assert tensor.dtype is getattr(torch, name) and tuple(tensor.shape) == (3, 5)
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    raw = tensor.view(torch.uint8).numpy().tobytes()
    assert raw == pattern(SIZE, 1)[64 : 64 + len(raw)] and len(raw) == 15 * tensor.itemsize


def test_a_write_changes_these_bytes_and_no_others(buf):
    tensor = buf.astensor("float32", (4, 4), 1024)
    tensor.copy_(torch.arange(16, dtype=torch.float32).reshape(4, 4))
    expected = bytearray(pattern(SIZE, 1))
    expected[1024:1088] = np.arange(16, dtype="<f4").tobytes()
    assert buf.pread(SIZE, 0) == bytes(expected)


def test_shapes(buf):
    assert buf.astensor().shape == (SIZE,)
    assert buf.astensor("torch.bfloat16", offset=SIZE - 8).shape == (4,)
    assert buf.astensor("float32", ()).ndim == 0
    assert buf.astensor("float32", (3, 0), SIZE).shape == (3, 0)
    assert buf.astensor("bfloat16", 0).shape == (0,)


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "error", "match"),
    [
        ("float32", 4, 2, ValueError, "not a multiple of the 4 bytes of torch.float32"),
        ("float32", SIZE, 0, ValueError, "the buffer has 65536"),
        ("float32", (-1, 2), 0, ValueError, "negative"),
        ("float33", 1, 0, TypeError, "torch.dtype or the name of one"),
        ("nn", 1, 0, TypeError, "torch.dtype or the name of one"),
        (np.float32, 1, 0, TypeError, "torch.dtype or the name of one"),
        ("float32", 1.0, 0, TypeError, "shape must be an int"),
    ],
)
def test_what_is_refused(buf, dtype, shape, offset, error, match):
    with pytest.raises(error, match=match):
        buf.astensor(dtype, shape, offset)
    buf.close()


def test_a_read_only_buffer_is_refused(buf):
    with read_only(buf) as other, pytest.raises(PermissionError, match="no read-only tensors"):
        other.astensor()


MADE = {
    "tensor": lambda buf: buf.astensor("float32", 8),
    "zero-size": lambda buf: buf.astensor("float32", 0),
    "slice": lambda buf: buf.astensor("float32", (4, 4))[1:, 2],
    "view": lambda buf: buf.astensor("float32", (4, 4)).t().view(torch.int32),
    "storage": lambda buf: buf.astensor("float32", 8).untyped_storage(),
    "NumPy": lambda buf: buf.astensor("float32", 8).numpy(),
    "by DLPack": lambda buf: torch.from_dlpack(buf),
    "by DLPack of an array": lambda buf: torch.from_dlpack(buf.asarray("<f4")),
    "parameter": lambda buf: torch.nn.Parameter(buf.astensor("float32", 8)),
    "capsule": lambda buf: buf.astensor("bfloat16", 8).__dlpack__(),
}


@pytest.mark.parametrize("kind", MADE)
def test_it_holds_the_buffer_open_and_alive(kind):
    buf = allocate(SIZE, exporter="memfd")
    made = MADE[kind](buf)
    with pytest.raises(BufferError, match="exported pointers exist"):
        buf.close()
    before = held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del buf
        gc.collect()
    assert held() == before
    with pytest.warns(ResourceWarning, match="unclosed"):
        del made
        gc.collect()


def test_a_graph_that_is_thrown_away_lets_go(buf):
    weight = torch.nn.Parameter(buf.astensor("float32", (4, 4), 0).zero_())
    (weight @ torch.ones(4)).sum().backward()
    assert weight.grad.tolist() == [[1.0] * 4] * 4
    del weight
    gc.collect()
    buf.close()


def test_from_dlpack_finds_a_tensor(buf):
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        tensor = buf.astensor(dtype, (8, 4), 64)
        try:
            part = dmabuf.from_dlpack(tensor[3:5])
        except BufferError as error:  # torch gives out no capsule of this dtype
            assert "float8" in dtype and "not in a Buffer" not in str(error)
            continue
        assert part.buffer is buf
        assert (part.offset, part.size) == (64 + 12 * tensor.itemsize, 8 * tensor.itemsize)
        with pytest.raises(BufferError, match="not contiguous"):
            dmabuf.from_dlpack(tensor[:, :2])
    with pytest.raises(BufferError, match=r"this torch\.Tensor are not in a Buffer"):
        dmabuf.from_dlpack(torch.zeros(4))


def test_many_leave_nothing(buf):
    references = sys.getrefcount(buf)
    for _ in range(100):
        buf.astensor("bfloat16", 3, 2), torch.from_dlpack(buf)
        torch.from_dlpack(buf.astensor("float32", 4))
        buf.astensor("bfloat16", 3, 2).__dlpack__()
    gc.collect()
    assert sys.getrefcount(buf) == references
    assert len(os.listdir("/proc/self/fd")) < 100

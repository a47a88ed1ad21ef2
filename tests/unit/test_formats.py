"""Files of NumPy, GGUF, PyTorch and Arrow in a Buffer, as the libraries of each read them."""

import errno
import gc
import io
import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest

import dmabuf
from dmabuf import formats
from tests.guards import needs
from tests.resources import held
from tests.support import pattern, raises_errno

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def some(dtype, shape, seed):
    dtype = np.dtype(dtype)
    raw = np.frombuffer(pattern(int(np.prod(shape)) * dtype.itemsize, seed), "u1")
    return raw.view(dtype).reshape(shape)


def same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


ARRAYS = {
    "rows": some("<u4", (30, 1000), 1),
    "columns": some("<u8", (300, 20), 2).T,
    "big": some(">u2", (501,), 3),
    "records": some([("a", "<u4"), ("b", "u1", (3,))], (40,), 4),
    "scalar": some("<u8", (), 5),
    "nothing": some("<u4", (0, 3), 6),
}


@pytest.fixture(params=["path", "descriptor"])
def load(request):
    """Load a file by its path, or by a descriptor."""

    def load(path, **how):
        if request.param == "path":
            return formats.load(path, **how)
        with open(path, "rb") as file:
            file.seek(3)
            loaded = formats.load(file.fileno(), **how)
            assert file.tell() == 3
        return loaded

    return load


# -- NumPy


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array(load, tmp_path, name):
    np.save(tmp_path / "x.npy", ARRAYS[name])
    loaded = load(tmp_path / "x.npy")
    assert loaded.format == "npy"
    same(loaded.content, ARRAYS[name])
    assert loaded.content.flags.f_contiguous == ARRAYS[name].flags.f_contiguous
    assert loaded.transfer.nbytes == os.path.getsize(tmp_path / "x.npy")


def test_arrays_in_an_archive(load, tmp_path):
    np.savez(tmp_path / "x.npz", **ARRAYS)
    loaded = load(tmp_path / "x.npz")
    assert loaded.format == "npz" and set(loaded.content) == set(ARRAYS)
    for name, value in ARRAYS.items():
        same(loaded.content[name], value)
    del loaded


def test_the_array_is_the_buffers_memory_and_keeps_it(tmp_path):
    np.save(tmp_path / "x.npy", ARRAYS["rows"])
    before = held()
    loaded = formats.load(tmp_path / "x.npy")
    array = loaded.content
    array[2, 3] = 7
    assert struct.pack("<I", 7) in loaded.buffer[:]
    with pytest.raises(BufferError):
        loaded.buffer.close()
    del loaded
    gc.collect()
    assert held() != before and array[2, 3] == 7
    del array
    assert held() == before


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    """Any number of bytes that are missing at the end."""
    raw = {}
    for kind, write in (("npy", np.save), ("npz", np.savez)):
        target = io.BytesIO()
        write(target, ARRAYS["rows"][:2, :40])
        raw[kind] = target.getvalue()
    path = tmp_path / "x"
    for whole in raw.values():
        for end in range(0, len(whole), 7):
            path.write_bytes(whole[:end])
            with pytest.raises(ValueError, match=r"load .*: "):
                formats.load(path)


def objects():
    file = io.BytesIO()
    np.save(file, np.array([{}, []], dtype=object), allow_pickle=True)
    return file.getvalue()


def compressed():
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(100))
    return file.getvalue()


def archive(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, b"x" * 50)
    return file.getvalue()


def moved():
    """An archive whose directory points elsewhere."""
    file = io.BytesIO()
    np.savez(file, a=np.zeros(100))
    raw = bytearray(file.getvalue())
    at = raw.rfind(b"PK\1\2") + 42
    raw[at : at + 4] = (8).to_bytes(4, "little")
    return bytes(raw)


def header_of(text):
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (objects(), "as npy: it holds Python objects"),
        (compressed(), "as npz: 'a' is compressed; save it with numpy.savez"),
        (archive(["a.txt"]), "neither numpy.savez nor torch.save"),
        (archive(["a.npy"]), "as npz: "),
        (moved(), "not where the archive's directory puts it"),
        (b"PK\3\4" + bytes(100), "as zip: File is not a zip file"),
        (b"\x93NUMPY\3\0v\0\0\0" + bytes(200), "version .3, 0. of the format"),
        (b"\x93NUMPY\x09\0v\0", "as npy: "),
        (header_of("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 9)}"), "cut short"),
        (header_of("{'descr': '<f4', 'fortran_order': False, 'shape': (-9,)}"), "as npy: "),
        (header_of("{'descr': '<f4', 'shape': (9**99,)}"), "as npy: "),
        (header_of("__import__('os')"), "as npy: "),
        (b"\x80\x02.", "it is a pickle"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "a safetensors file; use dmabuf.safetensors.load"),
        (b"", "not a GGUF, NumPy, Arrow or PyTorch zip file"),
        (b"\x89PNG\r\n", "not a GGUF, NumPy, Arrow or PyTorch zip file"),
    ],
)
def test_a_file_that_is_malformed_or_something_else(tmp_path, raw, match):
    before = held()
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ValueError, match=match) as error:
        formats.load(tmp_path / "x")
    assert "load " in str(error.value)
    del error
    gc.collect()
    assert held() == before


def test_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        formats.load(tmp_path / "no")
    with pytest.raises(IsADirectoryError):
        formats.load(tmp_path)
    with raises_errno(errno.EINVAL, "it is a character device, not a file"):
        formats.load("/dev/zero")
    with pytest.raises(TypeError):
        formats.load(None)
    with pytest.raises(ValueError, match="require"):
        formats.load(tmp_path / "no", require="magic")


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    np.save(path, ARRAYS["rows"])
    real = dmabuf.File.read_into

    def touch(self, *arguments, **how):
        done = real(self, *arguments, **how)
        os.utime(path, ns=(0, 0))
        return done

    monkeypatch.setattr(dmabuf.File, "read_into", touch)
    with pytest.raises(ValueError, match="it changed while it was read"):
        formats.load(path)


@pytest.mark.parametrize(
    ("beginning", "module", "extra"),
    [(b"GGUF\3\0\0\0", "gguf", "gguf"), (b"ARROW1\0\0", "pyarrow", "arrow")],
)
def test_a_library_that_is_missing(tmp_path, monkeypatch, beginning, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "x").write_bytes(beginning + bytes(100))
    with pytest.raises(ImportError, match=rf"needs {module} .*pip install dmabuf\[{extra}\]"):
        formats.load(tmp_path / "x")


# -- the others


@needs("gguf")
def test_gguf(load, tmp_path):
    import gguf

    path, plain = tmp_path / "x.gguf", some("<u4", (32, 640), 1).view("<f4")
    weights = gguf.quantize(np.linspace(-1, 1, 8192, dtype="f4").reshape(32, 256), 8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("answer", 42)
    writer.add_array("tokens", ["a", "b"])
    writer.add_tensor("plain", plain)
    writer.add_tensor("quantized", weights, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load(path)
    same(loaded.content["plain"], plain)
    same(loaded.content["quantized"], weights)
    assert loaded.format == "gguf"
    assert loaded.dtypes == {"plain": "F32", "quantized": "Q8_0"}
    assert loaded.metadata["answer"] == 42 and loaded.metadata["tokens"] == ["a", "b"]
    del loaded
    whole = path.read_bytes()
    for end in (*range(8, 500, 37), len(whole) - 40_000, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="as gguf: "):
            formats.load(tmp_path / "cut")


@needs("pyarrow")
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow(load, tmp_path, kind):
    import pyarrow

    table = pyarrow.table({"a": list(range(5000)), "b": ["x", "yy"] * 2500})
    table = table.replace_schema_metadata({"k": "v"})
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(tmp_path / "x"), "wb") as sink, new(sink, table.schema) as writer:
        writer.write(table)
    loaded = load(tmp_path / "x")
    assert loaded.format == "arrow" and loaded.content.equals(table)
    assert loaded.metadata == {"k": "v"}
    address = loaded.content.column("a").chunk(0).buffers()[1].address
    assert loaded.buffer.address <= address < loaded.buffer.address + loaded.buffer.size
    del loaded
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-600])
    with pytest.raises(ValueError, match="as arrow: "):
        formats.load(tmp_path / "x")


@needs("torch")
def test_pytorch(load, tmp_path):
    import torch

    saved = {"model": {"w": torch.arange(50_000), "b": torch.ones(3, 4).t()}, "step": 3}
    torch.save(saved, tmp_path / "x.pt")
    load(tmp_path / "x.pt")  # PyTorch keeps descriptors of its own from the first time on
    loaded = load(tmp_path / "x.pt")
    assert loaded.format == "pt" and loaded.content["step"] == 3
    for name, value in saved["model"].items():
        assert torch.equal(loaded.content["model"][name], value)
    loaded.content["model"]["w"][0] = 0x1122334455667788
    assert struct.pack("<Q", 0x1122334455667788) in loaded.buffer[:]
    del loaded


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@needs("torch")
def test_a_pytorch_file_with_code_is_refused(tmp_path):
    import torch

    torch.save({"a": Evil()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="as pt: Weights only load failed") as error:
        formats.load(tmp_path / "x.pt")
    assert isinstance(error.value.__cause__, pickle.UnpicklingError)
    torch.save({"a": torch.ones(5000)}, tmp_path / "y.pt")
    (tmp_path / "y.pt").write_bytes((tmp_path / "y.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"load .*: "):
        formats.load(tmp_path / "y.pt")

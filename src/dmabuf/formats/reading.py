"""load(): the whole file into a Buffer, then the format's library over that memory."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from dmabuf.errors import os_error
from dmabuf.kernel import files
from dmabuf.memory import Buffer, allocate, import_optional
from dmabuf.transfer import Audit, Engine, File, Progress, Require, Terms, Transfer

Format = Literal["gguf", "npy", "npz", "pt", "arrow"]
"""The formats, by how their files are called."""
Content: TypeAlias = Any
"""The content of a file in the types of the format's library: see `Loaded.content`."""

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "gguf"),
    (b"\x93NUMPY", "npy"),
    (b"PK\3\4", "zip"),
    (b"PK\5\6", "zip"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),
)
_START = 16
"""Bytes that the format is recognized by."""
_LOCAL_HEADER = 30
"""Bytes of a zip file's header before the name of a member (APPNOTE.TXT, 4.3.7)."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A file in memory, and what it holds. Made by `load`.

    The buffer closes by itself with the last of this and what was made over it.
    """

    format: Format
    content: Content
    """GGUF: arrays by name, quantized ones as bytes in the shape that the gguf package gives them.
    npy: an array. npz: arrays by name. PyTorch: the object that was saved. Arrow: a pyarrow.Table.
    """
    buffer: Buffer
    """The memory: the bytes of the file, from its beginning."""
    transfer: Transfer
    """How the file was read."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """GGUF's keys and values, Arrow's metadata of the schema."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """GGUF's name of the type of each tensor, such as "Q4_K"."""


def load(
    source: str | bytes | os.PathLike[str] | int,
    *,
    exporter: str = "auto",
    name: str | None = None,
    require: Require = "any",
    timeout: float | None = None,
    audit: Audit = "first",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Read a GGUF, NumPy, PyTorch or Arrow file into a Buffer, and return what it holds.

    The format is recognized by how the file begins. Nothing of the content is copied, except what
    is compressed in an Arrow file. Checksums of zip members are not compared.

    Args:
        source: a path or a descriptor.
        exporter: what makes the buffer, as for `dmabuf.allocate`: "auto", "memfd" or "udmabuf" for
            GGUF and PyTorch, whose libraries map the memory once more by its memfd.
        name: of the buffer.
        require: "zero-copy", "uncached" or "any", as in `File.read_into`.
        timeout: seconds to wait for fences.
        audit: as in `File.read_into`.
        engine: the engine that runs the transfer.
        progress: called with the bytes read and their sum.

    Raises:
        ValueError: the file is of another format, malformed, compressed (npz), or it holds Python
            objects, which could run code: PyTorch files are read with ``weights_only``.
        ImportError: the format's library is missing; the message has the command to install it.
        TypeError: `source` is not one of these.
        OSError, RouteUnavailable: as `File.read_into`.
    """
    terms = Terms(require, timeout=timeout, audit=audit)
    with File(source, engine=engine) as file:
        path = f"descriptor {source}" if isinstance(source, int) else os.fsdecode(source)
        if file.kind != "file":
            raise os_error(errno.EINVAL, f"load: it is a {file.kind}, not a file", path)
        kind = _kind_of(_beginning(file.fileno()), path)
        before = os.fstat(file.fileno())
        size = before.st_size
        buffer = allocate(size, exporter=exporter, name=name)
        buffer.closes_unasked = True
        transfer = file.read_into(buffer, size, terms=terms, progress=progress)
        now = os.fstat(file.fileno())
    if (now.st_size, now.st_mtime_ns) != (size, before.st_mtime_ns) or transfer.nbytes < size:
        raise ValueError(f"load {path}: it changed while it was read")
    try:
        if kind == "zip":
            kind = _kind_of_zip(buffer, size)
        content, metadata, dtypes = _READERS[kind](buffer, size)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # what each library raises for a malformed file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"load {path} as {kind}: {why:.200}") from error
    return Loaded(kind, content, buffer, transfer, metadata, dtypes)  # type: ignore[arg-type]


def _beginning(fd: int) -> bytes:
    """Return the first bytes of a file, and leave no page of it that was not cached."""
    was_cached = files.cached_pages(fd, 0, _START)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no page beyond is read ahead
    start = os.pread(fd, _START, 0)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
    if not was_cached:
        os.posix_fadvise(fd, 0, _START, os.POSIX_FADV_DONTNEED)
    return start


def _kind_of(start: bytes, path: str) -> str:
    for magic, kind in _BEGINNINGS:
        if start.startswith(magic):
            return kind
    text = "it is not a GGUF, NumPy, Arrow or PyTorch zip file"
    if start[8:9] == b"{" and start[4:8] == bytes(4):
        text = "it is a safetensors file; use dmabuf.safetensors.load"
    elif start.startswith(b"\x80"):
        text = "it is a pickle, which torch.save no longer writes; load and save it with PyTorch"
    raise ValueError(f"load {path}: {text}")


def _memfd_of(buffer: Buffer) -> str:
    """Return a path of the memory, for libraries that map files themselves."""
    fd = buffer.slabs[0].fd if buffer.exporter == "memfd" else buffer.memfd
    if fd is None:
        text = f"the memory of {buffer.exporter} has no memfd; use exporter='memfd' or 'udmabuf'"
        raise os_error(errno.EOPNOTSUPP, f"load: {text}")
    return f"/proc/self/fd/{fd}"


_Read: TypeAlias = tuple[Content, Mapping[str, object], Mapping[str, str]]


def _read_gguf(buffer: Buffer, size: int) -> _Read:
    import_optional("numpy", "dmabuf.formats", "dmabuf[arrays]")
    gguf = import_optional("gguf", "a GGUF file", "dmabuf[gguf]")
    reader = gguf.GGUFReader(_memfd_of(buffer))
    if sys.byteorder != "little" or reader.byte_order != "I":
        raise NotImplementedError("it has the other byte order than this machine")
    parts = [*reader.fields.values(), *(one.field for one in reader.tensors)]
    last = max(parts, key=lambda one: one.offset)
    if last.offset + sum(int(part.nbytes) for part in last.parts) > size:  # the rest is zeros
        raise ValueError("it was cut short: its header ends beyond the file")
    tensors = {}
    for one in reader.tensors:
        if one.data_offset + one.n_bytes > size:
            raise ValueError(f"tensor {one.name!r} ends beyond the file")
        raw = buffer.asarray("u1", int(one.n_bytes), one.data_offset)
        tensors[one.name] = raw.view(one.data.dtype).reshape(one.data.shape)
    fields = {name: one.contents() for name, one in reader.fields.items()}
    return tensors, fields, {one.name: one.tensor_type.name for one in reader.tensors}


def _read_npy(buffer: Buffer, size: int) -> _Read:
    return _array(buffer, 0, size), {}, {}


def _array(buffer: Buffer, start: int, size: int) -> Content:
    """Return the array of a .npy file, which begins at `start`."""
    numpy = import_optional("numpy", "dmabuf.formats", "dmabuf[arrays]")
    with buffer.open("r", start, size) as window:
        version = numpy.lib.format.read_magic(window)
        if version == (1, 0):
            about = numpy.lib.format.read_array_header_1_0(window)
        elif version == (2, 0):
            about = numpy.lib.format.read_array_header_2_0(window)
        else:
            raise ValueError(f"version {version} of the format; load it with numpy.load")
        shape, fortran, dtype = about
        offset = window.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which could run code")
    nbytes = dtype.itemsize
    for length in shape:
        nbytes *= length
    if offset + nbytes > size:
        raise ValueError(f"it was cut short: the array needs {nbytes} bytes from {offset} on")
    array = buffer.asarray(dtype, shape[::-1] if fortran else shape, start + offset)
    return array.T if fortran else array


def _kind_of_zip(buffer: Buffer, size: int) -> str:
    names = [one.filename for one in _members(buffer, size)]
    if any(name.endswith("data.pkl") for name in names):
        return "pt"
    if all(name.endswith(".npy") for name in names):
        return "npz"
    raise ValueError("neither numpy.savez nor torch.save has written this zip archive")


def _members(buffer: Buffer, size: int) -> list[zipfile.ZipInfo]:
    with buffer.open("r", 0, size) as window, zipfile.ZipFile(window) as archive:
        return archive.infolist()


def _read_npz(buffer: Buffer, size: int) -> _Read:
    arrays = {}
    for one in _members(buffer, size):
        name = one.filename.removesuffix(".npy")
        if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1:
            raise ValueError(f"{name!r} is compressed; save it with numpy.savez")
        header = buffer.pread(_LOCAL_HEADER, one.header_offset)
        if header[:4] != b"PK\3\4":
            raise ValueError(f"{name!r} is not where the archive's directory puts it")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        arrays[name] = _array(buffer, one.header_offset + _LOCAL_HEADER + lengths, one.file_size)
    return arrays, {}, {}


def _read_pt(buffer: Buffer, size: int) -> _Read:
    torch = import_optional("torch", "a PyTorch file", "torch")
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        found = torch.load(_memfd_of(buffer), map_location="cpu", weights_only=True, mmap=True)
    return found, {}, {}


def _read_arrow(buffer: Buffer, size: int) -> _Read:
    arrow = import_optional("pyarrow", "an Arrow file", "dmabuf[arrow]")
    whole = arrow.py_buffer(memoryview(buffer)[:size])
    if buffer.pread(6, 0) == b"ARROW1":
        table = arrow.ipc.open_file(whole).read_all()
    else:
        table = arrow.ipc.open_stream(whole).read_all()
    about = table.schema.metadata or {}
    return table, {key.decode(): value.decode() for key, value in about.items()}, {}


_READERS: dict[str, Callable[[Buffer, int], _Read]] = {
    "gguf": _read_gguf,
    "npy": _read_npy,
    "npz": _read_npz,
    "pt": _read_pt,
    "arrow": _read_arrow,
}

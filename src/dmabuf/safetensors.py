"""Models in safetensors files: into one Buffer and back, by the routes that transfers take.

    >>> from dmabuf import safetensors
    >>> model = safetensors.load("model.safetensors")
    >>> model["encoder.weight"]              # a PyTorch tensor over the buffer's memory
    >>> safetensors.save(model, "copy.safetensors")

`load_file` and `save_file` take the arguments of those in ``safetensors.torch``. NumPy is needed
(`pip install dmabuf[arrays]`), and PyTorch for its tensors; the safetensors library is not.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from dmabuf import _tensor_header, _tensor_layout, _tensor_save
from dmabuf._tensor_files import Part, open_parts
from dmabuf._tensor_header import KINDS, Entry
from dmabuf.arrays import needed
from dmabuf.audit import Audit
from dmabuf.buffer import Buffer
from dmabuf.engine import Engine, Transfer
from dmabuf.errors import ShortReadError
from dmabuf.exporters import allocate
from dmabuf.route import Require, check_require
from dmabuf.sizes import Size, parse_size

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Entry", "Framework", "Tensors", "load", "load_file", "save", "save_file"]

Framework = Literal["pt", "np"]
"""PyTorch or NumPy, by the names that ``safetensors.safe_open`` has for them."""
Path = str | os.PathLike[str]


class Tensors(Mapping[str, Any]):
    """The tensors of a model by name, each a view of one buffer, made when it is asked for.

    Made by `load`. A buffer that `load` made lives as long as this or any of the views does, and
    closes by itself with the last of them; ``buffer.close()`` does it earlier, once there are no
    views. Safe to use from several threads.
    """

    def __init__(
        self,
        buffer: Buffer,
        entries: dict[str, Entry],
        framework: Framework,
        metadata: dict[str, str],
        transfers: tuple[Transfer, ...],
    ) -> None:
        self.buffer = buffer
        """What they all lie in."""
        self.entries = entries
        """Each tensor's dtype in the format's words, shape, offset in the buffer, and bytes."""
        self.metadata = metadata
        """The files' ``__metadata__``; of several shards with the same name, the last one's."""
        self.transfers = transfers
        """How they came, one record for each file that had bytes of them."""
        self._framework: Framework = framework

    def __getitem__(self, name: str) -> Any:
        """The tensor; TypeError where the framework lacks the dtype: `raw` has the bytes."""
        entry = self.entries[name]
        if self._framework == "np":
            return self.buffer.asarray(_numpy_dtype(entry), entry.shape, entry.offset)
        dtype, shape = _torch_dtype(entry), entry.shape
        if entry.dtype == "F4":
            if not shape or shape[-1] % 2:
                raise ValueError(f"F4 in PyTorch is two in a byte, and {name!r} ends in an odd one")
            shape = (*shape[:-1], shape[-1] // 2)
        return self.buffer.astensor(dtype, shape, entry.offset)

    def raw(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor's bytes as they are in the file, a NumPy array of them over the buffer."""
        entry = self.entries[name]
        return self.buffer.asarray("u1", entry.nbytes, entry.offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"<dmabuf.safetensors.Tensors {len(self)} in {self.buffer!r}>"


def load(
    source: Path | Sequence[Path],
    *,
    tensors: Iterable[str] | None = None,
    framework: Framework = "pt",
    buffer: Buffer | None = None,
    alignment: Size | None = None,
    exporter: str = "auto",
    name: str | None = None,
    require: Require = "any",
    timeout: float | None = None,
    audit: Audit = "first",
    engine: Engine | None = None,
) -> Tensors:
    """Bring the tensors of a model into one Buffer, and give views of them by name.

    All headers are read and checked, and all places planned, before any tensor is read. Then each
    file is one array of segments: pages that hold wanted tensors and lie beside each other are one
    segment, and go by the best route (`File.read_segments`). Tensors that are not asked for are not
    read, but for what shares a page with one that is.

    Args:
        source: a .safetensors file, several of them, the index of a sharded model
            (``model.safetensors.index.json``), or a directory with ``model.safetensors`` or that
            index.
        tensors: the names of those wanted; None is all.
        framework: "pt" for PyTorch tensors, "np" for NumPy arrays.
        buffer: where to; by default one that is made for them, by ``exporter``, with ``name``.
        alignment: what each tensor's offset in the buffer is to be a multiple of: a power of two,
            in bytes; by default, and at the least, the size of its dtype. One that is not aligned
            so in the file is copied by the CPU.
        require: "zero-copy", "uncached" or "any": as for `File.read_segments`.
        timeout: seconds to wait for the fences of devices that use ``buffer``.
        audit: as for `File.read_into`.
        engine: what runs the transfers.

    Raises:
        ValueError: a file is no whole and sound safetensors file, or an index names what is not
            beside it; says which and why, and nothing was read into the buffer. Also a name in two
            files, a buffer that is too small (says for how much), or an alignment that is none.
        KeyError: a name in ``tensors`` that no file has.
        ImportError: NumPy, PyTorch or ml_dtypes is missing; names the command that installs it.
        OSError, ShortReadError, RouteUnavailable: as `File.read_segments` raises them.
    """
    if framework not in ("pt", "np"):
        raise ValueError(f"framework={framework!r}: 'pt' (PyTorch) or 'np' (NumPy)")
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are little-endian, and this machine is not")
    needed("numpy", "dmabuf.safetensors", "dmabuf[arrays]")
    if framework == "pt":
        needed("torch", "framework='pt'", "torch, or take framework='np'")
    align = _check_alignment(alignment)
    if not isinstance(buffer, Buffer | None):
        raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
    with ExitStack() as stack:
        parts, metadata = open_parts(stack, source, tensors, engine)
        try:
            segments, places, size = _plan(parts, align)
        except OverflowError:
            raise ValueError(f"alignment={align} has tensors beyond 2^64 bytes") from None
        if buffer is None:
            buffer = allocate(max(size, 1), exporter=exporter, name=name)
            buffer._closes_unasked = True
        elif buffer.size < size:
            raise ValueError(f"the tensors take {size} bytes, and the buffer has {buffer.size}")
        moved = []
        for part, one in zip(parts, segments, strict=True):
            if one:
                done = part.file.read_segments(
                    buffer, one, require=require, timeout=timeout, audit=audit
                )
                if done.nbytes < sum(one[2::3]):  # of a single segment that is no error there
                    text = f"{part.file.name} became shorter after its header was read"
                    raise ShortReadError(text, 0, done.nbytes)
                moved.append(done)
    return Tensors(buffer, places, framework, metadata, tuple(moved))


def _check_alignment(alignment: Size | None) -> int:
    if alignment is None:
        return 1
    number = parse_size(alignment, "alignment")
    if number < 1 or number & (number - 1):
        raise ValueError(f"alignment={number} is no power of two")
    return number


def _plan(parts: Sequence[Part], alignment: int) -> tuple[list[array[int]], dict[str, Entry], int]:
    """The segments of each file, where in the buffer each tensor goes, and where they all end."""
    plans, places, at = [], {}, 0
    for part in parts:
        wanted = {
            name: _tensor_layout.Wanted(
                entry.offset, entry.nbytes, max(alignment, KINDS[entry.dtype].bits // 8)
            )
            for name, entry in part.entries.items()
        }
        segments, at = _tensor_layout.place(wanted.values(), part.size, at)
        plans.append(segments)
        for name, entry in part.entries.items():
            places[name] = replace(entry, offset=wanted[name].place)
    return plans, places, at


def _numpy_dtype(entry: Entry) -> Any:
    numpy = needed("numpy", "dmabuf.safetensors", "dmabuf[arrays]")
    name = KINDS[entry.dtype].name
    if name is None or entry.dtype == "F4":
        raise TypeError(f"NumPy has no {entry.dtype} as files have it: raw() gives the bytes")
    if entry.dtype.startswith(("BF", "F8")):
        types = needed("ml_dtypes", f"NumPy, for {entry.dtype},", "dmabuf[arrays]")
        return numpy.dtype(getattr(types, name))
    return numpy.dtype(name)


def _torch_dtype(entry: Entry) -> Any:
    torch = needed("torch", "framework='pt'", "torch, or take framework='np'")
    name = KINDS[entry.dtype].name
    dtype = getattr(torch, name, None) if name else None
    if dtype is None:
        text = f"PyTorch {torch.__version__} has no {entry.dtype}: raw() gives the bytes"
        raise TypeError(text)
    return dtype


def load_file(
    filename: Path, device: Any = "cpu", *, framework: Framework = "pt"
) -> dict[str, Any]:
    """All tensors of a file by name: ``safetensors.torch.load_file``, through one Buffer.

    ``framework="np"`` is ``safetensors.numpy.load_file``. The buffer closes with the last tensor.

    Raises ValueError for another device than the CPU, and what `load` raises.
    """
    if str(device) != "cpu":
        raise ValueError(f"device={device!r}: tensors over a Buffer are on 'cpu'; .to() moves them")
    return dict(load(filename, framework=framework))


def save(
    tensors: Mapping[str, Any],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    require: Require = "any",
    engine: Engine | None = None,
) -> tuple[Transfer, ...]:
    """Write tensors to a safetensors file, whole or not at all.

    The bytes go to a file beside it, are flushed to the medium, and take its name then, so that
    whoever opens it sees the old content or the new, also after a crash. The file is, byte for
    byte, what the safetensors library's own writer makes of the same tensors.

    Args:
        tensors: PyTorch tensors or NumPy arrays by name; what `load` gave is fine. Those that lie
            in Buffers go from there by the best route, whole pages of them without a copy where
            their offsets agree; all else is copied by way of one more Buffer.
        path: the file.
        metadata: text to text, for the header; from `load` it is ``tensors.metadata``.
        force: replace a file even if it may not be written.
        require: "zero-copy" or "uncached" asks it of every tensor that lies in a Buffer.
        engine: what runs the transfers.

    Returns:
        The records of the transfers.

    Raises:
        TypeError: a value or a dtype that the format does not have, or a name that is no text.
        ValueError: a sparse tensor, a name or metadata that cannot stand in the header, or a
            ``require`` that is none.
        OSError, RouteUnavailable: as `File.write_segments` raises them. Nothing has happened to
            the file then.
    """
    check_require(require)
    pieces = {name: _tensor_save.piece(name, value) for name, value in tensors.items()}
    about = {name: (one.dtype, one.shape) for name, one in pieces.items()}
    header, places = _tensor_header.make(about, metadata)
    return _tensor_save.write(
        os.fspath(path), header, places, pieces, force=force, require=require, engine=engine
    )


def save_file(
    tensors: Mapping[str, Any], filename: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a file: ``save_file`` of ``safetensors.torch`` and ``safetensors.numpy``.

    Whole or not at all, and on the medium when it returns. Tensors that share memory are each
    written. Raises what `save` raises.
    """
    save(tensors, filename, metadata=metadata)

"""Saving: tensors in Buffers are written from there, all others through one more Buffer."""

from __future__ import annotations

import errno
import os
import stat
import sys
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from dmabuf.copying import Replacement
from dmabuf.errors import os_error
from dmabuf.kernel import log
from dmabuf.memory import Buffer, allocate, find_buffer, import_optional
from dmabuf.safetensors.header import DTYPES, make
from dmabuf.safetensors.layout import UNIT
from dmabuf.transfer import Engine, File, Progress, Require, Terms, Transfer, part_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_STAGE = 64 << 20
"""The largest size in bytes of the buffer for tensors that are not in one."""


_Piece: TypeAlias = "tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]"
"""A tensor to be written: the format's dtype, the shape, and the bytes, which it keeps alive."""


def save(
    tensors: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    require: Require = "any",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> tuple[Transfer, ...]:
    """Write tensors to a safetensors file, which appears whole or not at all.

    The bytes are written to a temporary file in the same directory, flushed to the medium, and then
    renamed: a reader finds the old content or the new, also after a crash. The file is identical to
    the one that the safetensors package writes for the same tensors.

    Args:
        tensors: PyTorch tensors or NumPy arrays by name, such as `load` returns. Those that lie in
            Buffers are written from there by the best route; whole pages are not copied where the
            offsets in buffer and file agree. All others are copied to one more Buffer.
        path: the file.
        metadata: text by text, for the header; what `load` found is ``tensors.metadata``.
        force: replace a file even if its permissions forbid writing it.
        require: "zero-copy" or "uncached", demanded for each tensor that lies in a Buffer.
        engine: the engine that runs the transfers.
        progress: called with the bytes written and their sum, as in `File.write_from`.

    Returns:
        The records of the transfers.

    Raises:
        TypeError: a value or a dtype that the format does not have, or a name that is not text.
        ValueError: a sparse tensor, a name or metadata that a header cannot hold, or an invalid
            ``require``.
        OSError, RouteUnavailable: as `File.write_segments` raises them; the file is unchanged.
    """
    Terms(require=require)
    numpy = import_optional("numpy", "dmabuf.safetensors", "dmabuf[arrays]")
    known: dict[object, str] = {}
    pieces = {name: _piece(numpy, name, value, known) for name, value in tensors.items()}
    about = {name: (dtype, shape, raw.nbytes) for name, (dtype, shape, raw) in pieces.items()}
    header, places = make(about, metadata)
    held: dict[Buffer, array[int]] = {}
    loose: list[tuple[int, Any]] = [(0, memoryview(header))]
    segments: array[int] = array("Q")
    start = end = 0  # of the mapping of the buffer that the last tensor was in
    for name, at in places.items():
        raw = pieces[name][2]
        nbytes, base = raw.nbytes, raw.base
        if base is None or (type(base) is type(raw) and base.flags.owndata):
            address = 0  # NumPy allocated the memory, so it is not in a Buffer
        else:
            address = raw.__array_interface__["data"][0]
        if not start <= address < address + nbytes <= end:
            found = find_buffer(address, nbytes) if address and nbytes else None
            if found is None:
                loose.append((at, raw.data))
                continue
            start = address - found[1]
            end = start + found[0].size
            segments = held.setdefault(found[0], array("Q"))
        _add(segments, at, address - start, nbytes)
    path = os.fspath(path)
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise os_error(errno.EINVAL, "save: it exists and is not a regular file", path)
    with Replacement(path, force=force, note=log.info) as replacement:
        try:
            with File(replacement.temporary, "w", engine=engine) as file:
                total = sum(len(data) for _, data in loose)
                total += sum(sum(segments[2::3]) for segments in held.values())
                transfers = _write_loose(file, loose, progress, total)
                for buffer, segments in held.items():
                    done = sum(one.nbytes for one in transfers)
                    part = part_of(progress, done, total)
                    one = file.write_segments(buffer, segments, require=require, progress=part)
                    transfers.append(one)
                os.fsync(file.fileno())
            replacement.commit(None, sync=True)
        except OSError as error:
            if error.filename in (replacement.temporary, None):
                error.filename = path
            raise
    return tuple(transfers)


def save_file(
    tensors: Mapping[str, object],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Write tensors to a file: ``save_file`` of ``safetensors.torch`` and ``safetensors.numpy``.

    The file appears whole or not at all, and is on the medium when this returns. Tensors that share
    memory are each written. Raises what `save` raises.
    """
    save(tensors, filename, metadata=metadata, progress=progress)


def _piece(numpy: Any, name: str, value: Any, known: dict[object, str]) -> _Piece:
    """Return a tensor's bytes as the format has them: contiguous, little-endian, on the CPU.

    `known` holds the format's name of the NumPy dtypes of that byte order that were met before.
    """
    torch = sys.modules.get("torch")  # not imported: no value is a torch tensor
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_torch(torch, name, value)
    if not isinstance(value, (numpy.ndarray, numpy.generic)):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise TypeError(f"tensor {name!r} is a {kind}: must be a PyTorch tensor or a NumPy array")
    whole = numpy.asarray(value)
    dtype = known.get(whole.dtype)
    if dtype is None:
        dtype = _known(name, whole.dtype, whole.dtype.name)
        little = whole.dtype.newbyteorder("<")
        whole = whole.astype(little, copy=False)
        known[little] = dtype
    if not whole.flags.c_contiguous:
        whole = numpy.ascontiguousarray(whole)
    return dtype, whole.shape, whole.reshape(-1).view(numpy.uint8)


def _of_torch(torch: Any, name: str, tensor: Any) -> _Piece:
    if tensor.layout != torch.strided:
        raise ValueError(f"tensor {name!r} is sparse, which the format lacks; use .to_dense()")
    dtype = _known(name, tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    shape = tuple(tensor.shape)
    if dtype == "F4":
        if not shape:
            raise ValueError(f"tensor {name!r}: F4 is two in a byte and needs a dimension")
        shape = (*shape[:-1], shape[-1] * 2)
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return dtype, shape, plain.reshape(-1).view(torch.uint8).numpy()


def _known(name: str, dtype: object, called: str) -> str:
    found = DTYPES.get(called)
    if found is None:
        raise TypeError(f"tensor {name!r} has dtype {dtype}, which safetensors files lack")
    return found


def _add(segments: array[int], at: int, start: int, nbytes: int) -> None:
    """Append a range of a buffer, or extend the last one that it continues in file and buffer."""
    if segments and at == segments[-3] + segments[-1] and start == segments[-2] + segments[-1]:
        segments[-1] += nbytes
    elif nbytes:
        segments.extend((at, start, nbytes))


def _write_loose(
    file: File, pieces: list[tuple[int, memoryview]], progress: Progress | None, total: int
) -> list[Transfer]:
    """Write pieces at ascending offsets, through a buffer that agrees with the file by pages."""
    transfers: list[Transfer] = []
    limit = min(sum(len(data) for _, data in pieces), _STAGE)
    with allocate(limit + UNIT) as buffer:
        for begin, parts in _chunks(pieces, limit):
            start = at = begin % UNIT
            with buffer.map("w") as view:
                for part in parts:
                    view[at : at + len(part)] = part
                    at += len(part)
            done = file.write_from(
                buffer,
                at - start,
                file_offset=begin,
                buffer_offset=start,
                progress=part_of(progress, sum(one.nbytes for one in transfers), total),
            )
            transfers.append(done)
    return transfers


def _chunks(
    pieces: list[tuple[int, memoryview]], limit: int
) -> Iterator[tuple[int, list[memoryview]]]:
    """Yield the offset and the parts of each range without a gap, of at most `limit` bytes."""
    parts: list[memoryview] = []
    begin = end = 0
    for at, data in pieces:
        while data:
            if parts and (at != end or end - begin == limit):
                yield begin, parts
                parts = []
            if not parts:
                begin = end = at
            part = data[: limit - (end - begin)]
            parts.append(part)
            end = at = at + len(part)
            data = data[len(part) :]
    if parts:
        yield begin, parts

"""Tensors written to a file: those in Buffers from there, all else by way of one more Buffer."""

from __future__ import annotations

import errno
import os
import stat
import sys
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dmabuf import _log
from dmabuf._replace import Replacement
from dmabuf._tensor_header import KIND_OF, Entry
from dmabuf._tensor_layout import UNIT
from dmabuf.arrays import needed
from dmabuf.buffer import Buffer, holding
from dmabuf.engine import Engine, Transfer
from dmabuf.errors import os_error
from dmabuf.exporters import allocate
from dmabuf.file import File
from dmabuf.route import Require
from dmabuf.sizes import round_up

if TYPE_CHECKING:
    import numpy as np

_STAGE = 64 << 20
"""Bytes of the buffer for what lies in no Buffer, at most."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor that is to be written."""

    dtype: str
    """As the format has it."""
    shape: tuple[int, ...]
    raw: np.ndarray[Any, Any]
    """Its bytes, flat; it keeps them alive."""


def piece(name: str, value: Any) -> Piece:
    """A tensor's bytes as the format has them: contiguous and little-endian, on the CPU.

    Raises:
        TypeError: no array or tensor, or of a dtype that the format does not have.
        ValueError: a sparse tensor.
    """
    torch = sys.modules.get("torch")  # without it there are no tensors of it
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_torch(torch, name, value)
    numpy = needed("numpy", "dmabuf.safetensors", "dmabuf[arrays]")
    if not isinstance(value, (numpy.ndarray, numpy.generic)):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise TypeError(f"tensor {name!r} is a {kind}: a PyTorch tensor or a NumPy array is needed")
    whole = numpy.asarray(value)
    dtype = _known(name, whole.dtype, whole.dtype.name)
    contiguous = numpy.ascontiguousarray(whole, whole.dtype.newbyteorder("<"))
    return Piece(dtype, whole.shape, contiguous.reshape(-1).view("u1"))


def _of_torch(torch: Any, name: str, tensor: Any) -> Piece:
    if tensor.layout != torch.strided:
        raise ValueError(f"tensor {name!r} is sparse, which the format has not: .to_dense() it")
    dtype = _known(name, tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    shape = tuple(tensor.shape)
    if dtype == "F4":
        if not shape:
            raise ValueError(f"tensor {name!r}: two in a byte, and no dimension to count them in")
        shape = (*shape[:-1], shape[-1] * 2)
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return Piece(dtype, shape, plain.reshape(-1).view(torch.uint8).numpy())


def _known(name: str, dtype: Any, called: str) -> str:
    found = KIND_OF.get(called)
    if found is None:
        raise TypeError(f"tensor {name!r} has dtype {dtype}, which no safetensors file has")
    return found


def write(
    path: str,
    header: bytes,
    places: Mapping[str, Entry],
    pieces: Mapping[str, Piece],
    *,
    force: bool,
    require: Require,
    engine: Engine | None,
) -> tuple[Transfer, ...]:
    """A file of a header and the pieces at their places, on the medium, or none at all."""
    _check_target(path)
    held: dict[Buffer, array[int]] = {}
    loose: list[tuple[int, Any]] = [(0, header)]
    for name, entry in places.items():  # in the file's order
        raw = pieces[name].raw
        found = holding(raw.ctypes.data, raw.nbytes)
        if found is None or not raw.nbytes:
            loose.append((entry.offset, raw))
        else:
            _add(held.setdefault(found[0], array("Q")), entry.offset, found[1], raw.nbytes)
    with Replacement(path, force=force, note=_log.info) as place:
        try:
            with File(place.temporary, "w", engine=engine) as file:
                transfers = _write_loose(file, loose)
                for buffer, segments in held.items():
                    transfers.append(file.write_segments(buffer, segments, require=require))
                os.fsync(file.fileno())
            place.commit(None, sync=True)
        except OSError as error:
            if error.filename == place.temporary:
                error.filename = path
            raise
    return tuple(transfers)


def _check_target(path: str) -> None:
    """Refuse what a file must not take the place of: a device, a directory."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise os_error(errno.EINVAL, "it is there, and no regular file to be replaced", path)


def _add(segments: array[int], at: int, start: int, nbytes: int) -> None:
    """One more range of a buffer; joined to the last one where it goes on in both."""
    if segments and at == segments[-3] + segments[-1] and start == segments[-2] + segments[-1]:
        segments[-1] += nbytes
    else:
        segments.extend((at, start, nbytes))


def _write_loose(file: File, pieces: list[tuple[int, Any]]) -> list[Transfer]:
    """Bytes for offsets that go up, by way of a buffer that agrees with the file modulo a page."""
    total = sum(memoryview(data).nbytes for _, data in pieces)
    with allocate(min(round_up(total, UNIT) + UNIT, _STAGE)) as buffer:
        stage = _Stage(file, buffer)
        for at, data in pieces:
            stage.put(at, memoryview(data))
        stage.flush()
    return stage.transfers


class _Stage:
    """What waits in a buffer to be written, without a gap."""

    def __init__(self, file: File, buffer: Buffer) -> None:
        self.transfers: list[Transfer] = []
        self._file = file
        self._buffer = buffer
        self._begin = self._end = 0  # in the file

    def put(self, at: int, left: memoryview) -> None:
        if at != self._end:
            self.flush()
            self._begin = self._end = at
        while left:
            fill = self._begin % UNIT + self._end - self._begin
            part = left[: self._buffer.size - fill]
            self._buffer.pwrite(part, fill)
            self._end += len(part)
            left = left[len(part) :]
            if fill + len(part) == self._buffer.size:
                self.flush()

    def flush(self) -> None:
        size = self._end - self._begin
        if size:
            done = self._file.write_from(
                self._buffer, size, file_offset=self._begin, buffer_offset=self._begin % UNIT
            )
            self.transfers.append(done)
        self._begin = self._end

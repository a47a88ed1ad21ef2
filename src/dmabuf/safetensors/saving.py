"""Saving: tensors in Buffers are written from there, all others through staging blocks.

The file is written in whole pages past the page cache, also its end, from which the padding is cut
off before it gets its name. So no byte goes through the page cache, and none waits for others.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dmabuf.copying import Replacement, in_threads
from dmabuf.errors import RouteUnavailable, os_error
from dmabuf.kernel import log
from dmabuf.memory import Buffer, allocate, find_buffer, import_optional
from dmabuf.safetensors.header import DTYPES, make
from dmabuf.safetensors.layout import UNIT
from dmabuf.safetensors.pending import wait_for_pending
from dmabuf.sizes import round_up
from dmabuf.transfer import (
    Engine,
    File,
    Progress,
    Require,
    Route,
    Terms,
    Transfer,
    check_given,
    growth,
    part_of,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Raw: TypeAlias = npt.NDArray[np.uint8]

_BLOCK = 8 << 20
"""Bytes that a thread copies at once: those of a staging block, which it then writes."""
_THREADS = 4
"""Threads that copy. Each has a staging block."""
_STRAIGHT = 64 << 10
"""The fewest bytes that are worth a request from the buffer they lie in."""


class _Piece(NamedTuple):
    """A tensor to be written: the format's dtype, the shape, and the bytes, which it keeps."""

    dtype: str
    shape: tuple[int, ...]
    raw: Raw | _Later


class _Later:
    """The bytes of a tensor of a device, which come to the CPU when they are requested."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.nbytes: int = tensor.nbytes

    def raw(self) -> Raw:
        """Return the bytes: contiguous, on the CPU."""
        return _bytes_of(self._tensor)


class Layout:
    """The content of a file before it is written: the header, and the bytes of each tensor."""

    def __init__(self, tensors: Mapping[str, object], metadata: Mapping[str, str] | None) -> None:
        numpy = import_optional("numpy", "dmabuf.safetensors", "dmabuf[arrays]")
        known: dict[object, str] = {}
        pieces = {name: _piece(numpy, name, value, known) for name, value in tensors.items()}
        about = {name: (dtype, shape, raw.nbytes) for name, (dtype, shape, raw) in pieces.items()}
        header, places = make(about, metadata)
        self.parts: list[tuple[int, Raw | _Later]] = [(0, numpy.frombuffer(header, "u1"))]
        """Offset and bytes, in the order of the file and without a gap."""
        self.parts += [(at, pieces[name].raw) for name, at in places.items()]
        at, last = self.parts[-1]
        self.size = at + last.nbytes
        """Of the file, in bytes."""

    def copy_to(self, buffer: Buffer) -> None:
        """Copy the whole file into a buffer, with zeros up to the end of its last page.

        Raises:
            ValueError: a tensor lies there itself; nothing was copied.
        """
        numpy = sys.modules["numpy"]
        with buffer.map("w", 0, round_up(self.size, UNIT)) as view:
            target = numpy.frombuffer(view, "u1")
            try:
                self._copy_to(target, buffer)
            finally:
                del target

    def _copy_to(self, target: Raw, buffer: Buffer) -> None:
        here = [(at, part) for at, part in self.parts if not isinstance(part, _Later)]
        if any(sys.modules["numpy"].may_share_memory(target, raw) for _, raw in here):
            raise ValueError("save: tensors lie in the snapshot's buffer; give another one")

        def copy(chunk: _Chunk) -> _Chunk:
            chunk.copy_to(target[chunk.at :])
            return chunk

        in_threads(copy, list(_chunks(here)), self.size, buffer, _THREADS, None)
        for at, part in self.parts:
            if isinstance(part, _Later):
                target[at : at + part.nbytes] = part.raw()
        target[self.size :] = 0


class _Chunk(NamedTuple):
    """Whole pages of the file, and their bytes; the rest of the last page is padding."""

    at: int
    parts: list[tuple[int, Raw]]
    """Where in the chunk, and what."""
    nbytes: int

    def copy_to(self, target: Raw) -> None:
        """Copy the bytes to the beginning of an array."""
        for at, raw in self.parts:
            target[at : at + raw.nbytes] = raw


@dataclasses.dataclass(slots=True)
class _Run:
    """Neighbours in the file that are neighbours in a buffer."""

    buffer: Buffer
    at: int
    start: int
    end: int
    parts: list[tuple[int, Raw]]


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
    the one that the safetensors package writes for the same tensors. Room for all of it is
    allocated before the first byte is written. A `save_async` of the same path that is still
    pending ends first, so this content stays.

    Args:
        tensors: PyTorch tensors or NumPy arrays by name, such as `load` returns. Those that lie in
            Buffers are written from there by the best route; whole pages are not copied where the
            offsets in buffer and file agree. All others are copied to staging blocks, of which four
            are filled and written at once.
        path: the file.
        metadata: text by text, for the header; what `load` found is ``tensors.metadata``.
        force: replace a file even if its permissions forbid writing it.
        require: "zero-copy", demanded for tensors that lie in a Buffer, or "uncached", for all.
        engine: the engine that runs the transfers. One block is then written at a time.
        progress: called with the bytes written and their sum, as in `File.write_from`.

    Returns:
        The records of the transfers: first one for all that was copied, then one for each Buffer.

    Raises:
        TypeError: a value or a dtype that the format does not have, or a name that is not text.
        ValueError: a sparse tensor, a name or metadata that a header cannot hold, or an invalid
            ``require``.
        OSError, RouteUnavailable: as `File.write_segments` raises them; the file is unchanged.
    """
    Terms(require=require)
    layout = Layout(tensors, metadata)
    wait_for_pending(path)
    with replacing(path, force) as replacement:
        transfers = write(replacement, layout, require, engine, progress)
        replacement.commit(None, sync=True)
    return transfers


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


@contextmanager
def replacing(
    path: str | os.PathLike[str], force: bool, *, nameless: bool = True
) -> Iterator[Replacement]:
    """Yield the replacement of a file to be saved. Errors in the block have the file's path."""
    path = os.fspath(path)
    if not path:
        raise os_error(errno.ENOENT, "save: the path is empty; name a file", path)
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise os_error(errno.EINVAL, "save: it exists and is not a regular file", path)
    how = Replacement(path, force=force, note=log.info, nameless=nameless)
    with how as replacement:
        try:
            yield replacement
        except OSError as error:
            if error.filename in (replacement.temporary, None):
                error.filename = path
            raise


def write(
    replacement: Replacement,
    layout: Layout,
    require: Require,
    engine: Engine | None,
    progress: Progress | None,
) -> tuple[Transfer, ...]:
    """Write the whole file, and return when it is on the medium."""
    held, loose = _divide(layout, require)
    chunks = list(_chunks(loose))
    with _whole_pages(replacement, layout.size, engine) as file:
        report = _limited(progress, layout.size)
        transfers = _write_chunks(file, chunks, require, engine, report)
        for buffer, segments in held.items():
            part = part_of(report, sum(one.nbytes for one in transfers), layout.size)
            transfers.append(file.write_segments(buffer, segments, require=require, progress=part))
    return tuple(transfers)


def write_image(
    replacement: Replacement,
    buffer: Buffer,
    size: int,
    require: Require,
    progress: Progress | None,
) -> Transfer:
    """Write a whole file of `size` bytes from a buffer, which has whole pages of it."""
    with _whole_pages(replacement, size, None) as file:
        report = _limited(progress, size)
        done = file.write_from(buffer, round_up(size, UNIT), require=require, progress=report)
    return dataclasses.replace(done, nbytes=size)


def _limited(progress: Progress | None, size: int) -> Progress | None:
    """Return what to call with progress that counts the padding of the last page."""
    check_given(None, progress)
    if progress is None:
        return None
    return lambda done, _: progress(min(done, size), size)


@contextmanager
def _whole_pages(replacement: Replacement, size: int, engine: Engine | None) -> Iterator[File]:
    """Yield a new file with room for whole pages; at the end it has `size` bytes on the medium."""
    padded = round_up(size, UNIT)
    with File(replacement.temporary, "w", engine=engine) as file:
        room = growth.Growth(file.fileno(), file.target.path)
        room.allocate(padded, padded, lambda: [(0, padded)])
        try:
            yield file
        except BaseException:
            with suppress(OSError):  # one that is written in place gives its room back
                os.ftruncate(file.fileno(), 0)
            raise
        if padded != size:
            os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())
        # The kernel reads the last page to cut it.
        os.posix_fadvise(file.fileno(), padded - UNIT, 0, os.POSIX_FADV_DONTNEED)


def _divide(
    layout: Layout, require: Require
) -> tuple[dict[Buffer, array[int]], list[tuple[int, Raw]]]:
    """Return what is written from the buffer it lies in, and what is copied first."""
    loose: list[tuple[int, Raw]] = []
    runs: list[_Run] = []
    buffer: Buffer | None = None
    low = high = 0  # the mapping of `buffer`
    for at, part in layout.parts:
        raw = part.raw() if isinstance(part, _Later) else part
        nbytes, base = raw.nbytes, raw.base
        if base is None or (type(base) is type(raw) and base.flags.owndata):
            address = 0  # NumPy allocated the memory, so it is not in a Buffer
        else:
            address = raw.__array_interface__["data"][0]
        if not low <= address < address + nbytes <= high:
            found = find_buffer(address, nbytes) if address and nbytes else None
            if found is None:
                loose.append((at, raw))
                continue
            buffer, low = found[0], address - found[1]
            high = low + buffer.size
        assert buffer is not None
        run, start = runs[-1] if runs else None, address - low
        if run and run.buffer is buffer and (run.end, run.start + run.end - run.at) == (at, start):
            run.parts.append((at, raw))
            run.end += nbytes
        else:
            runs.append(_Run(buffer, at, start, at + nbytes, [(at, raw)]))
    held: dict[Buffer, array[int]] = {}
    least = UNIT if require == "zero-copy" else _STRAIGHT
    for run in runs:
        begin, end = round_up(run.at, UNIT), run.end // UNIT * UNIT
        if (run.at - run.start) % UNIT or end - begin < least:
            if require == "zero-copy":
                text = f"save: {run.end - run.at} bytes of a Buffer hold no whole page of the file"
                raise RouteUnavailable(f"{text}; use require='uncached'")
            loose += run.parts
            continue
        straight = held.setdefault(run.buffer, array("Q"))
        straight.extend((begin, run.start + begin - run.at, end - begin))
        for at, raw in run.parts:
            if at < begin:
                loose.append((at, raw[: begin - at]))
            if at + raw.nbytes > end:
                loose.append((max(at, end), raw[max(0, end - at) :]))
    loose.sort(key=itemgetter(0))
    return held, loose


def _chunks(loose: Iterable[tuple[int, Raw]]) -> Iterator[_Chunk]:
    """Yield whole pages with the loose bytes; between chunks lies what is written from buffers."""
    parts: list[tuple[int, Raw]] = []
    begin = end = 0
    for at, raw in loose:
        while nbytes := raw.nbytes:
            if parts and (at != end or end - begin == _BLOCK):
                yield _Chunk(begin, parts, round_up(end - begin, UNIT))
                parts = []
            if not parts:
                begin = end = at
            part = raw if nbytes <= _BLOCK - (end - begin) else raw[: _BLOCK - (end - begin)]
            parts.append((end - begin, part))
            end = at = end + part.nbytes
            raw = raw[part.nbytes :]
    if parts:
        yield _Chunk(begin, parts, round_up(end - begin, UNIT))


def _write_chunks(
    file: File,
    chunks: Sequence[_Chunk],
    require: Require,
    engine: Engine | None,
    progress: Progress | None,
) -> list[Transfer]:
    """Copy chunks to staging blocks and write them from there; return the record of them all."""
    if not chunks:
        return []
    numpy = sys.modules["numpy"]
    count = min(_THREADS, len(chunks)) if engine is None else 1
    block = max(chunk.nbytes for chunk in chunks)
    free, failed = deque(range(count)), deque[OSError]()
    begun = time.perf_counter()
    demanded: Require = "any" if require == "any" else "uncached"
    with allocate(count * block) as buffer:

        def move(chunk: _Chunk) -> Transfer:
            if failed:
                raise failed[0]
            slot = free.pop()
            try:
                with buffer.map("w", slot * block, chunk.nbytes) as view:
                    chunk.copy_to(numpy.frombuffer(view, "u1"))
                return file.write_from(
                    buffer,
                    chunk.nbytes,
                    file_offset=chunk.at,
                    buffer_offset=slot * block,
                    require=demanded,
                )
            except OSError as error:
                failed.append(error)
                raise
            finally:
                free.append(slot)

        size = sum(chunk.nbytes for chunk in chunks)
        outcomes = in_threads(move, chunks, size, buffer, count, progress)
    if failed:
        raise failed[0]
    nbytes = sum(part.nbytes for chunk in chunks for _, part in chunk.parts)
    return [_sum_of([one for one in outcomes if isinstance(one, Transfer)], nbytes, begun)]


def _sum_of(transfers: Sequence[Transfer], nbytes: int, begun: float) -> Transfer:
    """Return one record for blocks that were written from copies."""
    first = transfers[0]
    route, reason = first.route, first.reason
    if all(one.route is not Route.BUFFERED for one in transfers):
        route, reason = (
            Route.STAGED,
            "the CPU fills staging blocks, the device takes them meanwhile",
        )
    not_direct = "the tensors do not lie in a Buffer at the same places in a page"
    return dataclasses.replace(
        first,
        nbytes=nbytes,
        route=route,
        reason=reason,
        rejected={**first.rejected, Route.DIRECT: not_direct},
        seconds=time.perf_counter() - begun,
        requests=sum(one.requests for one in transfers),
        reissues=sum(one.reissues for one in transfers),
        copied=nbytes,
    )


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
    return _Piece(dtype, whole.shape, whole.reshape(-1).view(numpy.uint8))


def _of_torch(torch: Any, name: str, tensor: Any) -> _Piece:
    if tensor.layout != torch.strided:
        raise ValueError(f"tensor {name!r} is sparse, which the format lacks; use .to_dense()")
    dtype = _known(name, tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    shape = tuple(tensor.shape)
    if dtype == "F4":
        if not shape:
            raise ValueError(f"tensor {name!r}: F4 is two in a byte and needs a dimension")
        shape = (*shape[:-1], shape[-1] * 2)
    tensor = tensor.detach()
    return _Piece(dtype, shape, _bytes_of(tensor) if tensor.is_cpu else _Later(tensor))


def _bytes_of(tensor: Any) -> Raw:
    plain = tensor.to("cpu").resolve_conj().resolve_neg().contiguous()
    raw: Raw = plain.reshape(-1).view(sys.modules["torch"].uint8).numpy()
    return raw


def _known(name: str, dtype: object, called: str) -> str:
    found = DTYPES.get(called)
    if found is None:
        raise TypeError(f"tensor {name!r} has dtype {dtype}, which safetensors files lack")
    return found

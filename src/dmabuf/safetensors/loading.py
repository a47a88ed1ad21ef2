"""Loading: all headers are read first, then one array of segments for each file."""

from __future__ import annotations

import os
import sys
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from dmabuf.errors import RouteUnavailable, ShortReadError
from dmabuf.memory import Buffer, allocate
from dmabuf.safetensors.device import gpu_of
from dmabuf.safetensors.files import OPEN_AT_ONCE, Part, Source, read_parts
from dmabuf.safetensors.header import BITS, Entry
from dmabuf.safetensors.layout import place
from dmabuf.safetensors.shared import attach
from dmabuf.safetensors.views import (
    Framework,
    Tensor,
    check_framework,
    dtype_of,
    import_framework,
    tensor_over,
)
from dmabuf.sizes import parse_size
from dmabuf.transfer import (
    Audit,
    Engine,
    Progress,
    Require,
    Terms,
    Transfer,
    part_of,
    read_together,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(eq=False, repr=False)
class Tensors(Mapping[str, Tensor]):
    """The tensors of a model by name, each a view of one buffer, made on first use.

    Made by `load`. A buffer that `load` made closes by itself with the last of this and the views.
    ``buffer.close()`` closes it earlier, once there are no views. All views that exist at a time
    are one CPU access (`Buffer.asarray`), which begins with the first of them. Safe to use from
    several threads.
    """

    buffer: Buffer
    """The memory of all tensors."""
    entries: Mapping[str, Entry]
    """By name: the format's dtype, the shape, the offset in the buffer, the size in bytes."""
    metadata: Mapping[str, str]
    """The files' ``__metadata__``; where several shards have a key, the last one's."""
    transfers: tuple[Transfer, ...]
    """One record for each file that bytes were read from."""
    _framework: Framework
    shared: bool = False
    """Whether other processes have the same memory, which nobody can write. A write to a PyTorch
    tensor over it ends the process (SIGSEGV); NumPy raises ValueError."""
    _dtypes: dict[str, Any] = field(default_factory=dict, init=False)
    _flat: weakref.ref[Any] | None = field(default=None, init=False)

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor.

        Raises KeyError for an unknown name, and TypeError for a dtype that the framework lacks
        (`raw` returns its bytes).
        """
        entry = self.entries[name]
        dtype = self._dtypes.get(entry.dtype)
        if dtype is None:
            dtype = self._dtypes[entry.dtype] = dtype_of(self._framework, entry.dtype)
        flat = self._memory()
        if self._framework == "np":
            return sys.modules["numpy"].ndarray(entry.shape, dtype, flat, entry.offset)
        if not (flat.flags.writeable or self.shared):
            return self.buffer.astensor(dtype, entry.shape, entry.offset)  # refuses, and states why
        return tensor_over(flat, name, entry, dtype)

    def _memory(self) -> Any:
        """Return the whole buffer as an array, which all views have in common."""
        flat: Any = None if self._flat is None else self._flat()
        if flat is None:
            flat = self.buffer.asarray()
            while type(flat.base) is type(flat):
                flat = flat.base  # NumPy keeps this one alive for each view
            if self.shared and self._framework == "pt":
                flat = sys.modules["numpy"].asarray(_Unmarked(flat))
            self._flat = weakref.ref(flat)
        return flat

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the tensor's bytes as they are in the file, an array over the buffer."""
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


class _Unmarked:
    """An array that is not marked read-only, which PyTorch would warn of, over memory that is."""

    def __init__(self, array: Any) -> None:
        about = array.__array_interface__
        self._array = array
        self.__array_interface__ = about | {"data": (about["data"][0], False)}


def load(
    source: Source,
    *,
    tensors: Iterable[str] | None = None,
    framework: Framework = "pt",
    variant: str | None = None,
    buffer: Buffer | None = None,
    shared: bool | str | os.PathLike[str] = False,
    alignment: int | str | None = None,
    exporter: str = "auto",
    name: str | None = None,
    require: Require = "any",
    timeout: float | None = None,
    audit: Audit = "first",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Tensors:
    """Read the tensors of a model into one Buffer, and return views of them by name.

    All headers are read and checked, and all places planned, before any tensor is read. Each file
    is then one array of segments: neighbouring pages that hold wanted tensors are one segment,
    which takes the best route (`File.read_segments`). Tensors that are not wanted are not read,
    except for what shares a page with a wanted one. Several files are read beside each other.

    Args:
        source: a .safetensors file, a list or tuple of them, the index of a sharded model
            (``model.safetensors.index.json``), or a folder that holds one of these by a name of
            transformers, diffusers or PEFT, or all shards of a model without an index. Or one
            file that is open (its descriptor), or in memory: bytes, or a Buffer, over which the
            tensors are then made without a copy, unless ``buffer`` or ``alignment`` is given. A
            file or index of another node is named by its URL, dmabuf://HOST:PORT/PATH, and that of
            several nodes by dmabuf://HOST:PORT,HOST:PORT/PATH (dmabuf.remote).
        tensors: the names of the wanted tensors; None for all.
        framework: "pt" for PyTorch tensors, "np" for NumPy arrays.
        variant: of the weights in a folder: "fp16" for ``model.fp16.safetensors`` and the like.
        buffer: the destination; None for one allocated by ``exporter`` with ``name``.
        shared: True for one copy that all processes of this user share: the first one loads it
            into a store (`dmabuf.store`), the others wait for that and attach to the same memory.
            Nobody can write it: see `Tensors.shared`. The store is at the user's socket, or at this
            path; if none is running there, one is started. A changed file, other ``tensors`` and
            another ``alignment`` are other copies. The store drops a copy that no process uses
            when it needs the memory, or after its idle time. ``transfers`` is empty where another
            process has loaded it. Not with ``buffer``, ``name`` or another ``exporter`` than
            "memfd", nor for a descriptor or memory.
        alignment: of each tensor's offset in the buffer: a power of two, in bytes or such as
            "4KiB"; at the least, and by default, the size of its dtype. The CPU copies a tensor
            whose offset in the file is not a multiple of it.
        require: "zero-copy", "uncached" or "any", as in `File.read_segments`.
        timeout: seconds to wait for the fences of devices that use ``buffer``; the most that a file
            of another node may take.
        audit: as in `File.read_into`.
        engine: the engine that runs the transfers.
        progress: called with the bytes read and their sum, as in `File.read_into`.

    Raises:
        TypeError: ``source`` is not one of these.
        ValueError: a file is not a complete and valid safetensors file, or an index names a file
            that is not beside it; the message has the file and the cause, and nothing was read into
            the buffer. Also a name in two files, a buffer that is too small, or an invalid
            argument, or a tensor in a given Buffer that is not aligned.
        KeyError: a name in ``tensors`` that no file has.
        ImportError: NumPy, PyTorch or ml_dtypes is missing; the message has the command to install.
        OSError, ShortReadError, RouteUnavailable: as `File.read_segments` raises them.
    """
    check_framework(framework)
    terms = Terms(require, timeout=timeout, audit=audit)
    _check_shared(shared, buffer, exporter, name)
    if not isinstance(buffer, Buffer | None):
        raise TypeError(f"load: buffer must be a dmabuf.Buffer, not {type(buffer).__name__}")
    least = 1 if alignment is None else parse_size(alignment, "alignment")
    if least < 1 or least & (least - 1):
        raise ValueError(f"invalid alignment {least}: use a power of two")
    parts, metadata = read_parts(source, tensors, variant)
    import_framework(framework)
    if isinstance(source, Buffer) and buffer is None and alignment is None and shared is False:
        _check_aligned(parts[0])
        return Tensors(source, parts[0].entries, metadata, (), framework)
    segments, entries, size = plan(parts, least)
    fill = partial(_fill, parts, segments, terms, engine, progress)
    if shared is not False:
        if any(part.identity is None for part in parts):
            raise ValueError("load: shared is for files that have paths; give the path")
        buffer, transfers = attach(None if shared is True else shared, parts, segments, size, fill)
        return Tensors(buffer, entries, metadata, transfers or (), framework, shared=True)
    if buffer is None:
        buffer = allocate(max(size, 1), exporter=exporter, name=name)
        buffer.closes_unasked = True
    elif buffer.size < size:
        raise ValueError(f"load: the tensors need {size} bytes, the buffer has {buffer.size}")
    return Tensors(buffer, entries, metadata, fill(buffer), framework)


def _check_shared(shared: object, buffer: Buffer | None, exporter: str, name: str | None) -> None:
    """Raise what `load` raises for an invalid `shared`, or one that excludes other arguments."""
    if not isinstance(shared, bool | str | os.PathLike):
        kind = type(shared).__name__
        raise TypeError(f"load: shared must be a bool or the path of a socket, not {kind}")
    if shared is False:
        return
    if buffer is not None or name is not None:
        raise ValueError("load: shared has a buffer of its own; leave out buffer and name")
    if exporter not in ("auto", "memfd"):
        text = "a shared model is a memfd, which the kernel makes read-only; leave out exporter"
        raise ValueError(f"load: invalid exporter {exporter!r}: {text}")


def _fill(
    parts: Sequence[Part],
    segments: Sequence[array[int]],
    terms: Terms,
    engine: Engine | None,
    progress: Progress | None,
    buffer: Buffer,
) -> tuple[Transfer, ...]:
    """Read the segments of each file into the buffer."""
    reads = [(part, one) for part, one in zip(parts, segments, strict=True) if one]
    total = sum(sum(one[2::3]) for _, one in reads)
    if reads and reads[0][0].memory is not None:  # the only part then
        copy_segments(reads[0][0].memory, buffer, reads[0][1], terms.require)
        if progress is not None:
            progress(total, total)
        return ()
    remote = any(part.versions is not None for part, _ in reads)
    if engine is None and len(reads) > 1 and not remote:
        openers = [(part.reading, one) for part, one in reads]
        found = read_together(openers, buffer, terms, at_once=OPEN_AT_ONCE, progress=progress)
        return tuple(found)
    transfers: list[Transfer] = []
    for part, one in reads:
        report = part_of(progress, sum(done.nbytes for done in transfers), total)
        with part.opened(engine) as file:
            done = file.read_segments(buffer, one, terms=terms, progress=report)
            part.check(file)
        if done.nbytes < sum(one[2::3]):  # of a single segment, which may be short there
            text = f"load {part.path}: it became shorter after its header was read"
            raise ShortReadError(text, 0, done.nbytes)
        transfers.append(done)
    return tuple(transfers)


def _check_aligned(part: Part) -> None:
    for name, entry in part.entries.items():
        if entry.nbytes and entry.offset % max(1, BITS[entry.dtype] // 8):
            text = f"tensor {name!r} at {entry.offset} is not a multiple of its {entry.dtype}"
            raise ValueError(f"load {part.path}: {text}; pass alignment=1 to copy them all")


def copy_segments(
    source: Buffer | memoryview, buffer: Buffer, segments: Any, require: Require
) -> None:
    """Copy segments of a file that is in memory, as `File.read_segments` would read them.

    Raises:
        RouteUnavailable: `require` is "zero-copy".
    """
    if require == "zero-copy":
        raise RouteUnavailable("load: what is in memory is copied by the CPU; use require='any'")
    if source is buffer:
        raise ValueError("load: the buffer that holds the file cannot be the destination")
    flat = memoryview(segments).cast("B").cast("Q").tolist()
    with memoryview(source) as given, buffer.map("w") as view:
        for at, start, size in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            view[start : start + size] = given[at : at + size]


def plan(parts: Sequence[Part], least: int) -> tuple[list[array[int]], dict[str, Entry], int]:
    """Return the segments of each file, the tensors in the buffer, and the end of them all."""
    align = {dtype: max(least, bits // 8) for dtype, bits in BITS.items()}
    plans, found, at = [], {}, 0
    for part in parts:
        entries = part.entries.values()
        wanted = [(entry.offset, entry.nbytes, align[entry.dtype]) for entry in entries]
        try:
            segments, places, at = place(wanted, part.size, at)
        except OverflowError:
            raise ValueError(
                f"invalid alignment {least}: tensors lie beyond 2^64 bytes; use less"
            ) from None
        plans.append(segments)
        for (name, entry), offset in zip(part.entries.items(), places, strict=True):
            found[name] = Entry(entry.dtype, entry.shape, offset, entry.nbytes)
    return plans, found, at


def load_file(
    filename: Source,
    device: object = "cpu",
    *,
    framework: Framework = "pt",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return all tensors of a file by name: ``safetensors.torch.load_file``, through one Buffer.

    ``framework="np"`` is ``safetensors.numpy.load_file``. The buffer closes with the last tensor.

    Args:
        filename: a file, or another source of `load`.
        device: "cpu", or with PyTorch a CUDA device such as "cuda:0" or 0: its memory then takes
            the place of the buffer, and `dmabuf.devices.cuda` reads into it.
        framework: "pt" or "np".
        progress: called with the bytes read and their sum.

    Raises ValueError for another device, and what `load` and `cuda.Memory.read_from` raise.
    """
    check_framework(framework)
    gpu = gpu_of(device, framework)
    if gpu is None:
        return dict(load(filename, framework=framework, progress=progress))
    try:
        parts, _ = read_parts(filename, None)
        if any(part.memory is not None or part.versions is not None for part in parts):
            given = load(filename, framework=framework, progress=progress)
            return {name: gpu.place(tensor) for name, tensor in given.items()}
        segments, entries, size = plan(parts, 1)
        flat = gpu.empty(max(size, 1))
        done, total = 0, sum(sum(one[2::3]) for one in segments)
        for part, one in zip(parts, segments, strict=True):
            if one:
                with part.reading(None) as file:
                    gpu.read(flat, file, one, "any", part_of(progress, done, total))
                done += sum(one[2::3])
        dtypes = {entry.dtype: dtype_of(framework, entry.dtype) for entry in entries.values()}
        return {
            name: tensor_over(flat, name, entry, dtypes[entry.dtype])
            for name, entry in entries.items()
        }
    finally:
        gpu.close()

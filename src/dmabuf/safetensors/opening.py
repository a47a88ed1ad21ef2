"""safe_open: single tensors, and slices of tensors, each read when it is requested."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TypeAlias

from dmabuf.errors import ClosedError, ShortReadError
from dmabuf.memory import Buffer, allocate
from dmabuf.safetensors.device import Gpu, gpu_of
from dmabuf.safetensors.files import OPEN_AT_ONCE, Part, Source, read_parts
from dmabuf.safetensors.header import BITS, Entry
from dmabuf.safetensors.layout import UNIT, place
from dmabuf.safetensors.loading import copy_segments
from dmabuf.safetensors.slicing import Selection, select
from dmabuf.safetensors.views import (
    Framework,
    Tensor,
    check_framework,
    dtype_of,
    import_framework,
    tensor_over,
)
from dmabuf.sizes import round_up
from dmabuf.transfer import Audit, Engine, File, Require, Terms

if TYPE_CHECKING:
    from dmabuf.remote import RemoteFile

_SMALLEST, _LARGEST = 1 << 20, 256 << 20
"""Bytes of a buffer for several tensors: it has as many as were read before it."""
_LINE = 64
"""Bytes of which small tensors begin at a multiple."""
_One: TypeAlias = "SupportsIndex | slice | EllipsisType"
SliceIndex: TypeAlias = "_One | tuple[_One, ...]"
"""What indexes a `Slice`."""


def safe_open(
    filename: Source,
    framework: Framework,
    device: object = "cpu",
    *,
    variant: str | None = None,
    exporter: str = "auto",
    require: Require = "any",
    audit: Audit = "first",
    engine: Engine | None = None,
) -> SafeOpen:
    """Open a model, and read each tensor when it is requested: ``safetensors.safe_open``.

    All headers are read and checked now. Use it in a ``with`` statement; its tensors outlive that.
    `load` is faster for most of the tensors of a model, since it reads them in one call.

    Args:
        filename: a file, or any other source of `load`: shards, an index, a folder, a descriptor,
            bytes, a Buffer that holds a file, or the URL of a file or an index at another node,
            to which it keeps a connection.
        framework: "pt" for PyTorch tensors, "np" for NumPy arrays.
        device: "cpu"; with "pt" also a CUDA device such as "cuda:0" or 0, into whose memory
            `dmabuf.devices.cuda` reads. Slices, and what is in memory, are copied there.
        variant: of the weights in a folder, as for `load`.
        exporter: what makes the buffers of the tensors, as for `dmabuf.allocate`.
        require: "zero-copy", "uncached" or "any", for each tensor.
        audit: as in `File.read_into`.
        engine: the engine that runs the transfers.

    Raises:
        TypeError, ValueError, ImportError, OSError: as `load`, before any tensor is read.
    """
    check_framework(framework)
    terms = Terms(require, audit=audit)
    parts, metadata = read_parts(filename, None, variant)
    import_framework(framework)
    gpu = gpu_of(device, framework)
    return SafeOpen(parts, metadata, framework, gpu, exporter, terms, engine)


class _Opened(NamedTuple):
    """A file that is open, here or at another node."""

    file: File | RemoteFile
    at_exit: ExitStack
    """What closes it."""


class SafeOpen:
    """A model that is open: its names, and its tensors on request. Made by `safe_open`.

    Tensors that are read one after the other share buffers of up to 256 MiB. A buffer closes with
    the last tensor in it. At most 16 files are open at once. Safe to use from several threads,
    whose reads run one after the other.
    """

    def __init__(
        self,
        parts: list[Part],
        metadata: Mapping[str, str],
        framework: Framework,
        gpu: Gpu | None,
        exporter: str,
        terms: Terms,
        engine: Engine | None,
    ) -> None:
        self._framework: Framework = framework
        self._gpu, self._exporter, self._terms, self._engine = gpu, exporter, terms, engine
        self._metadata = dict(metadata)
        self._parts = {name: part for part in parts for name in part.entries}
        self._left = sum(entry.nbytes for part in parts for entry in part.entries.values())
        self._lock = threading.RLock()
        self._files: OrderedDict[int, _Opened] = OrderedDict()
        self._buffer: Buffer | None = None
        self._taken = self._at = 0
        self._closed = False

    def __enter__(self) -> SafeOpen:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. The tensors stay valid. It can be called again."""
        with self._lock:
            self._closed, self._buffer = True, None
            while self._files:
                self._files.popitem()[1].at_exit.close()
            if self._gpu is not None:
                self._gpu.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._parts)} tensors"
        return f"<dmabuf.safetensors.SafeOpen {state}>"

    def keys(self) -> list[str]:
        """Return the names of the tensors in the order of the alphabet."""
        return sorted(self._parts)

    def offset_keys(self) -> list[str]:
        """Return the names of the tensors in the order of the files, and of the bytes of each."""
        return list(self._parts)

    def metadata(self) -> dict[str, str] | None:
        """Return the files' ``__metadata__``, or None if they have none."""
        return dict(self._metadata) or None

    def get_tensor(self, name: str) -> Tensor:
        """Read a tensor. One of a Buffer that holds the file is not copied, if it is aligned.

        Raises:
            KeyError: there is no tensor of that name.
            TypeError: the framework lacks its dtype.
            ValueError: the file has changed; ClosedError after `close`.
            OSError, ShortReadError, RouteUnavailable: as `File.read_segments` raises them.
        """
        part, entry, dtype = self._find(name)
        with self._lock:
            self._check_open()
            return self._read(part, name, entry, dtype)

    def get_tensors(self) -> dict[str, Tensor]:
        """Read all tensors, one after the other, and return them by name."""
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    def get_slice(self, name: str) -> Slice:
        """Return a tensor whose parts are read by an index: ``get_slice(name)[:, 8:16]``.

        Raises:
            KeyError, TypeError: as `get_tensor`; TypeError also where two items share a byte.
            ClosedError: after `close`.
        """
        part, entry, dtype = self._find(name)
        if BITS[entry.dtype] % 8:
            raise TypeError(f"tensor {name!r}: items of {entry.dtype} share bytes; use get_tensor")

        def read(selection: Selection, shape: tuple[int, ...]) -> Tensor:
            with self._lock:
                self._check_open()
                return self._read_selection(part, name, entry, dtype, selection, shape)

        return Slice(name, entry, read)

    # -- reading

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model is closed")

    def _find(self, name: str) -> tuple[Part, Entry, Any]:
        self._check_open()
        part = self._parts.get(name)
        if part is None:
            raise KeyError(f"there is no tensor {name!r}")
        entry = part.entries[name]
        return part, entry, dtype_of(self._framework, entry.dtype)

    def _read(self, part: Part, name: str, entry: Entry, dtype: Any) -> Tensor:
        align = max(1, BITS[entry.dtype] // 8)
        if isinstance(part.memory, Buffer) and not entry.offset % align:
            return self._tensor(part.memory, name, entry, dtype)
        segments, end = array("Q", (entry.offset, 0, entry.nbytes)), entry.nbytes
        offset, unit = 0, max(align, _LINE)
        if entry.nbytes >= UNIT:
            segments, [offset], end = place([(entry.offset, end, align)], part.size, 0)
            unit = UNIT
        moved = Entry(entry.dtype, entry.shape, offset, entry.nbytes)
        if self._gpu is not None and part.memory is None and part.versions is None:
            flat = self._gpu.empty(end)
            file = self._file(part)
            assert isinstance(file, File)
            self._gpu.read(flat, file, segments, self._terms.require)
            part.check(file)
            return tensor_over(flat, name, moved, dtype)
        buffer, begin = self._take(end, unit)
        self._move(part, buffer, array("Q", (segments[0], begin, segments[2])))
        return self._tensor(buffer, name, _shifted(moved, begin), dtype)

    def _read_selection(
        self,
        part: Part,
        name: str,
        entry: Entry,
        dtype: Any,
        selection: Selection,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Read what is selected to one place of a buffer, without gaps."""
        numpy = import_framework("np")
        nbytes, at = selection.nbytes, entry.offset
        buffer, begin = self._take(nbytes + UNIT, UNIT)
        phase = (at + selection.first_byte()) % UNIT
        if phase % selection.itemsize == 0:
            begin += phase  # as in the file, so that pages go straight
        done = begin
        for piece in selection.pieces() if nbytes else ():
            first, span = piece.inner()
            offsets = piece.offsets(numpy, first)
            segments = numpy.empty((len(offsets), 3), "u8")
            segments[:, 0], segments[:, 2] = offsets + at, span
            segments[:, 1] = numpy.arange(len(offsets)) * span
            if piece.is_packed(first, span):
                segments[:, 1] += done
                self._move(part, buffer, segments)
            else:
                with allocate(len(offsets) * span, exporter="memfd") as blocks:
                    self._move(part, blocks, segments)
                    lengths, strides, start = piece.in_block(first)
                    item = f"V{piece.itemsize}"
                    with blocks.map("r") as given, buffer.map("w", done, piece.nbytes) as taken:
                        chosen = numpy.ndarray(
                            (len(offsets), *lengths), item, given, start, (span, *strides)
                        )
                        numpy.ndarray(chosen.shape, item, taken)[...] = chosen
                        del chosen
            done += piece.nbytes
        return self._tensor(buffer, name, Entry(entry.dtype, shape, begin, nbytes), dtype)

    def _move(self, part: Part, buffer: Buffer, segments: Any) -> None:
        if part.memory is not None:
            copy_segments(part.memory, buffer, segments, self._terms.require)
            return
        nbytes = int(sum(memoryview(segments).cast("B").cast("Q")[2::3].tolist()))
        file = self._file(part)
        done = file.read_segments(buffer, segments, terms=self._terms)
        part.check(file)
        if done.nbytes < nbytes:  # of a single segment, which may be short there
            text = f"load {part.path}: it became shorter after its header was read"
            raise ShortReadError(text, 0, done.nbytes)

    def _file(self, part: Part) -> File | RemoteFile:
        kept = self._files.pop(id(part), None)
        if kept is not None:
            with kept.at_exit:  # which closes it, unless it can be used
                if not kept.file.closed:
                    part.check(kept.file)
                    self._files[id(part)] = _Opened(kept.file, kept.at_exit.pop_all())
                    return kept.file
        while len(self._files) >= OPEN_AT_ONCE:
            self._files.popitem(last=False)[1].at_exit.close()
        with ExitStack() as at_exit:
            file = at_exit.enter_context(part.opened(self._engine))
            self._files[id(part)] = _Opened(file, at_exit.pop_all())
        return file

    def _take(self, size: int, unit: int) -> tuple[Buffer, int]:
        """Return a buffer with room, and where in it the room begins, a multiple of `unit`."""
        begin = round_up(self._at, unit)
        if self._buffer is None or begin + size > self._buffer.size:
            room = min(max(self._taken, _SMALLEST), _LARGEST, max(self._left, 1))
            self._buffer, begin = allocate(max(size, room, 1), exporter=self._exporter), 0
            self._buffer.closes_unasked = True
        self._at, self._taken = begin + size, self._taken + size
        self._left -= size
        return self._buffer, begin

    def _tensor(self, buffer: Buffer, name: str, entry: Entry, dtype: Any) -> Tensor:
        """Return a tensor over its bytes in a buffer, a CPU access of its own."""
        flat = buffer.asarray("u1", entry.nbytes, entry.offset)
        if self._framework == "pt" and not flat.flags.writeable:
            return buffer.astensor(dtype, entry.shape, entry.offset)  # refuses, and states why
        tensor = tensor_over(flat, name, _shifted(entry, -entry.offset), dtype)
        return tensor if self._gpu is None else self._gpu.place(tensor)


class Slice:
    """A tensor of a file, of which an index reads a part. Made by `SafeOpen.get_slice`."""

    def __init__(
        self, name: str, entry: Entry, read: Callable[[Selection, tuple[int, ...]], Tensor]
    ) -> None:
        self._name, self._entry, self._read = name, entry, read

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Return the format's name of the dtype, such as "BF16"."""
        return self._entry.dtype

    def __getitem__(self, index: SliceIndex) -> Tensor:
        """Read what an index selects, as one array of segments, and return it without gaps.

        Args:
            index: an int, a slice of any step, an Ellipsis, or a tuple of them, as NumPy has them.

        Raises:
            IndexError: an int outside, or more indexes than dimensions.
            TypeError: another kind of index.
            ClosedError, ValueError, OSError: as `SafeOpen.get_tensor`.
        """
        entry = self._entry
        try:
            return self._read(*select(entry.shape, BITS[entry.dtype] // 8, index))
        except IndexError as error:
            raise IndexError(f"slice of tensor {self._name!r}: {error}") from None

    def __repr__(self) -> str:
        return (
            f"<dmabuf.safetensors.Slice of {self._name!r} {self._entry.dtype} {self.get_shape()}>"
        )


def _shifted(entry: Entry, by: int) -> Entry:
    return Entry(entry.dtype, entry.shape, entry.offset + by, entry.nbytes)

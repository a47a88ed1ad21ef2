"""Files and models as datasources of ray.data, which `dmabuf.ray` makes.

A task reads a range of a file, or a model file, into a Buffer. The rows are views of it, from which
Ray copies them into its object store.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from dmabuf import safetensors
from dmabuf.errors import ShortReadError
from dmabuf.memory import Buffer, allocate
from dmabuf.remote import RemoteFile, open_url
from dmabuf.sizes import OFFSET_MAX
from dmabuf.transfer import File

_SCHEME = "dmabuf://"
_FILE = pa.schema(
    [("path", pa.string()), ("offset", pa.int64()), ("bytes", pa.large_binary())]
)  # fmt: skip
_TENSOR = pa.schema(
    [
        ("path", pa.string()),
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("bytes", pa.large_binary()),
    ]
)


class Part(NamedTuple):
    """A range of a file."""

    path: str
    offset: int
    size: int


class BufferSource(Datasource):  # type: ignore[misc]
    """Parts of files, which the tasks of ray.data read: `read` yields the rows of some parts."""

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        read: Callable[[Sequence[Part]], Iterator[pa.Table]],
    ) -> None:
        super().__init__()
        self._name, self._parts, self._read = name, parts, read

    def get_name(self) -> str:
        """Return the name of the tasks."""
        return self._name

    def estimate_inmemory_data_size(self) -> int:
        """Return the bytes of all parts."""
        return sum(one.size for one in self._parts)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return at most `parallelism` tasks, of about as many bytes each."""
        least = self.estimate_inmemory_data_size() / max(parallelism, 1)
        tasks, group = list[ReadTask](), list[Part]()
        for one in self._parts:
            group.append(one)
            nbytes = sum(part.size for part in group)
            if nbytes >= least or one is self._parts[-1]:
                paths = dict.fromkeys(part.path for part in group)
                about = BlockMetadata(None, nbytes, None, input_files=tuple(paths))
                read = partial(self._read, group)
                tasks.append(ReadTask(read, about, per_task_row_limit=per_task_row_limit))
                group = []
        return tasks


def _open(path: str, stack: ExitStack) -> File | RemoteFile:
    if path.startswith(_SCHEME):
        node, file = open_url(path)
        stack.enter_context(node)
        return file
    return stack.enter_context(File(path))


def parts_of_files(paths: Sequence[str], row_size: int) -> list[Part]:
    """Return the parts of files, each of at most `row_size` bytes; an empty file has one, too."""
    found = list[Part]()
    for path in paths:
        with ExitStack() as stack:
            size = _open(path, stack).size or 0
        for offset in range(0, size or 1, row_size):
            found.append(Part(path, offset, min(row_size, size - offset)))
    return found


def read_files(parts: Sequence[Part]) -> Iterator[pa.Table]:
    """Yield a row for each part."""
    with ExitStack() as stack:
        opened, file = "", None
        for path, offset, size in parts:
            if path != opened or file is None:
                stack.close()
                opened, file = path, _open(path, stack)
            content: Any = b""
            if size:
                buffer = _allocated(size)
                if file.read_into(buffer, size, file_offset=offset).nbytes < size:
                    raise ShortReadError(f"read {path} at {offset}: the file shrank meanwhile")
                content = memoryview(buffer)[:size]
            yield pa.table([[path], [offset], _value(content)], schema=_FILE)


def parts_of_model(source: str | os.PathLike[str] | list[str]) -> list[Part]:
    """Return one part for each file of a model."""
    return parts_of_files(safetensors.files_of(source), OFFSET_MAX)


def read_models(parts: Sequence[Part]) -> Iterator[pa.Table]:
    """Yield a row for each tensor of each file."""
    for path, _, _ in parts:
        tensors = safetensors.load(path, framework="np", exporter="memfd")
        for name, entry in tensors.entries.items():
            columns = [[path], [name], [entry.dtype], [entry.shape], _value(tensors.raw(name))]
            yield pa.table(columns, schema=_TENSOR)


def _allocated(size: int) -> Buffer:
    """Return a buffer that closes with the last row over it."""
    made = allocate(size, exporter="memfd", name="dmabuf ray.data")
    made.closes_unasked = True
    return made


def _value(content: Any) -> pa.Array:
    """Return a column of one value over memory, without a copy."""
    offsets = struct.pack("=qq", 0, memoryview(content).nbytes)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_binary(), 1, buffers)

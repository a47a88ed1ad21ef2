"""KvikIO's CuFile on any memory: ``from dmabuf.compat import kvikio``.

The arguments are those of kvikio 26.10. `buf` is a Buffer or a window of one; or anything that has
the buffer protocol or ``__dlpack__`` and is contiguous, such as a NumPy array or a PyTorch tensor
on the CPU. Memory in a Buffer is read and written by the best route. Other memory is copied by the
CPU, through blocks that the file is read into by the best route.

What differs: errors are OSErrors and ValueErrors, never RuntimeError. A read that ends at the end
of the file returns the bytes that came. The raw methods take host memory too. CUDA memory is
refused: dmabuf.devices.cuda moves it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pickle import PickleBuffer
from typing import NamedTuple

from dmabuf.copying import Staging
from dmabuf.kernel import process
from dmabuf.memory import Buffer, Window, foreign
from dmabuf.sizes import parse_size, round_up
from dmabuf.transfer import Direction, File

__all__ = ["CuFile", "IOFuture"]

_THREADS = 4
_TASK = 8 << 20
"""Bytes of one task, unless the caller asks for another size."""
_MODES = {"r": "r", "r+": "r+", "w": "w", "w+": "r+"}


class IOFuture:
    """The result of a transfer that runs in threads, as `CuFile.pread` and `pwrite` return it."""

    def __init__(self, tasks: Sequence[tuple[int, Future[int]]]) -> None:
        self._tasks = tasks

    def get(self) -> int:
        """Return the number of bytes moved without a gap, once all tasks have ended.

        Raises the first error of a task.
        """
        wait([task for _, task in self._tasks])
        done = 0
        for size, task in self._tasks:
            got = task.result()
            done += got
            if got < size:
                break
        return done

    def done(self) -> bool:
        """Return whether all tasks have ended."""
        return all(task.done() for _, task in self._tasks)


class CuFile:
    """An open file, with KvikIO's methods. A context manager, and safe to use from threads."""

    def __init__(self, file: os.PathLike[str] | str, flags: str = "r") -> None:
        """Open a file.

        Args:
            file: the path.
            flags: "r", "w" (creates the file, or empties it), "r+" or "w+"; a "b" is ignored.

        Raises ValueError for other flags, OSError as open(2).
        """
        flags = flags.replace("b", "")
        mode = _MODES.get(flags)
        if mode is None:
            raise ValueError(f"open {os.fspath(file)}: invalid flags {flags!r}: use r, r+, w or w+")
        if flags == "w+":
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666))
        self._file = File(file, mode)  # type: ignore[arg-type]
        self._staging = Staging(_TASK)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._process = process.pid

    def close(self) -> None:
        """Close the file once all transfers have ended."""
        pool, self._pool = self._pool, None
        if pool is not None and self._process == process.pid:
            pool.shutdown()
        self._file.close()
        self._staging.close()

    @property
    def closed(self) -> bool:
        """Whether the file was closed."""
        return self._file.closed

    def fileno(self) -> int:
        """Return the descriptor of the open file, without O_DIRECT."""
        return self._file.fileno()

    def open_flags(self) -> int:
        """Return the flags of that descriptor: see open(2)."""
        return fcntl.fcntl(self.fileno(), fcntl.F_GETFL)

    def __enter__(self) -> CuFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def pread(
        self, buf: object, size: int | None = None, file_offset: int = 0,
        task_size: int | None = None,
    ) -> IOFuture:  # fmt: skip
        """Begin to read into memory, and return a future at once.

        Args:
            buf: the memory.
            size: bytes; None is all of `buf`.
            file_offset: where in the file, in bytes.
            task_size: bytes that one thread moves at a time; None is 8 MiB.

        Raises:
            ValueError: a size larger than `buf`, memory that is read-only or not contiguous.
            TypeError: an object without memory.
        """
        memory, at = _locate(buf, size, 0, writable=True), parse_size(file_offset, "file_offset")
        step = (
            _TASK if task_size is None else round_up(max(parse_size(task_size), 1), mmap.PAGESIZE)
        )
        if isinstance(memory, _Part):
            return self._submit("read", [(memory, at)])
        pieces, done = [], 0
        while done < len(memory):
            size = step - (at + done) % step
            pieces.append((memory[done : done + size], at + done))
            done += size
        return self._submit("read", pieces)

    def pwrite(
        self, buf: object, size: int | None = None, file_offset: int = 0,
        task_size: int | None = None,
    ) -> IOFuture:  # fmt: skip
        """Begin to write from memory, and return a future at once. See `pread`.

        One thread writes all of it, whatever `task_size` is: a file that grows at several places at
        once could not be cut back after an error.
        """
        at = parse_size(file_offset, "file_offset")
        return self._submit("write", [(_locate(buf, size, 0, writable=False), at)])

    def read(
        self, buf: object, size: int | None = None, file_offset: int = 0,
        task_size: int | None = None,
    ) -> int:  # fmt: skip
        """Read into memory, and return the number of bytes. See `pread`."""
        return self.pread(buf, size, file_offset, task_size).get()

    def write(
        self, buf: object, size: int | None = None, file_offset: int = 0,
        task_size: int | None = None,
    ) -> int:  # fmt: skip
        """Write from memory, and return the number of bytes. See `pread`."""
        return self.pwrite(buf, size, file_offset, task_size).get()

    def raw_read(
        self, buf: object, size: int | None = None, file_offset: int = 0, dev_offset: int = 0
    ) -> int:
        """Read into memory from `dev_offset` on, in this thread; return the number of bytes."""
        memory = _locate(buf, size, dev_offset, writable=True)
        return self._move("read", memory, parse_size(file_offset, "file_offset"))

    def raw_write(
        self, buf: object, size: int | None = None, file_offset: int = 0, dev_offset: int = 0
    ) -> int:
        """Write from memory from `dev_offset` on, in this thread; return the number of bytes."""
        memory = _locate(buf, size, dev_offset, writable=False)
        return self._move("write", memory, parse_size(file_offset, "file_offset"))

    def _submit(self, direction: Direction, pieces: Sequence[tuple[_Memory, int]]) -> IOFuture:
        with self._lock:
            self._file.target.check_open()
            if self._pool is None or self._process != process.pid:  # threads end in a fork
                self._pool, self._process = (
                    ThreadPoolExecutor(_THREADS, "dmabuf kvikio"),
                    process.pid,
                )
            tasks = [
                (_size(memory), self._pool.submit(self._move, direction, memory, at))
                for memory, at in pieces
            ]
        return IOFuture(tasks)

    def _move(self, direction: Direction, memory: _Memory, at: int) -> int:
        if isinstance(memory, _Part):
            buffer, start, size = memory
            move = self._file.read_into if direction == "read" else self._file.write_from
            return move(buffer, size, file_offset=at, buffer_offset=start).nbytes
        stage = self._staging.read if direction == "read" else self._staging.write
        with memory:  # CPython crashes if a collection finds a view of a view in a cycle
            return stage(self._file, memory, at)


class _Part(NamedTuple):
    """Memory in a Buffer."""

    buffer: Buffer
    start: int
    size: int


_Memory = _Part | memoryview


def _size(memory: _Memory) -> int:
    return memory.size if isinstance(memory, _Part) else len(memory)


def _locate(buf: object, size: int | None, offset: int, *, writable: bool) -> _Memory:
    """Return the part of memory that a transfer is about."""
    memory = _whole(buf, writable=writable)
    offset = parse_size(offset, "dev_offset")
    rest = _size(memory) - offset
    nbytes = max(0, rest) if size is None else parse_size(size)
    if nbytes > rest:
        text = f"{nbytes} bytes from offset {offset} are more than the buffer's {_size(memory)}"
        del memory  # which a traceback would keep: see CuFile._move
        raise ValueError(f"invalid size: {text}")
    if isinstance(memory, _Part):
        return _Part(memory.buffer, memory.start + offset, nbytes)
    return memory[offset : offset + nbytes]


def _whole(buf: object, *, writable: bool) -> _Memory:
    if isinstance(buf, Buffer):
        return _Part(buf, 0, buf.size)
    if isinstance(buf, Window):
        if writable and not buf.writable():
            raise ValueError(f"invalid buffer: {buf!r} is read-only; use one that can be written")
        return _Part(buf.buffer, buf.offset, buf.size)
    if hasattr(buf, "__cuda_array_interface__"):
        text = "it is CUDA memory; use read_from() of dmabuf.devices.cuda.Memory"
        raise TypeError(f"invalid buffer: {text}")
    try:
        view = PickleBuffer(buf).raw()  # type: ignore[arg-type]
        read_only = view.readonly
    except TypeError:
        if not hasattr(buf, "__dlpack__"):
            raise
        view, read_only = _dlpack_view(buf)
    except BufferError as error:
        raise ValueError(f"invalid buffer: {error}") from None
    if writable and read_only:
        del view
        raise ValueError("invalid buffer: it is read-only; use one that can be written")
    return view


def _dlpack_view(tensor: object) -> tuple[memoryview, bool]:
    """Return the memory of an object with ``__dlpack__``, which the view keeps alive."""
    import ctypes

    address, nbytes, read_only = foreign.find_memory(tensor)
    if not nbytes:
        return memoryview(b""), False
    array = type("Tensor", (ctypes.c_ubyte * nbytes,), {}).from_address(address)  # type: ignore[attr-defined]
    array.tensor = tensor
    return PickleBuffer(array).raw(), read_only

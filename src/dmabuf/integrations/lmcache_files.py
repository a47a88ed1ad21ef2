"""LMCache's second level: KV caches in files, written and read past the page cache.

LMCache loads `KvFiles` by its adapter type ``native_plugin``, gives it batches of keys and of views
of its own memory, and polls an eventfd for completions. Nothing of LMCache is needed here.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from dmabuf.copying import read_files, write_files
from dmabuf.errors import ClosedError
from dmabuf.memory import Buffer, allocate
from dmabuf.sizes import parse_size, round_up
from dmabuf.transfer import Require, Terms

_PAGE = 4096

Completion = tuple[int, bool, str, list[bool] | None]
"""The number of a batch, whether it succeeded, the error, and the outcome of each key."""


class KvFiles:
    """The objects of a KV cache as files of a folder, one each, which outlive the process.

    A file appears when it is complete. An object whose file is missing, or has another size than
    the memory for it, is not found. The bytes pass through a Buffer for each thread: the drive
    fills it or takes it past the page cache, and the CPU copies between it and LMCache's memory.
    """

    def __init__(
        self,
        folder: str,
        require: Require = "any",
        threads: int = 2,
        block_size: int | str = "64MiB",
    ) -> None:
        """Open or make the folder.

        Args:
            folder: where the files are; several processes may share it.
            require: "any", or "uncached": fail instead of using the page cache.
            threads: batches that are worked on at once.
            block_size: bytes of the Buffer of each thread, the most that is moved at once. A larger
                object has a Buffer of its own for the time.

        Raises OSError, ValueError.
        """
        self._terms = Terms(require=require)
        self._block_size = max(parse_size(block_size, "block_size"), _PAGE)
        self._folder = os.path.abspath(folder)
        os.makedirs(self._folder, exist_ok=True)
        self._lock = threading.Lock()
        self._completions: deque[Completion] = deque()
        self._idle: list[Buffer] = []
        self._number = 0
        self._closed = False
        self._threads = ThreadPoolExecutor(threads, "dmabuf lmcache")
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def event_fd(self) -> int:
        """Return the eventfd that is readable while there are completions."""
        return self._event

    def submit_batch_set(self, keys: Sequence[str], views: Sequence[memoryview]) -> int:
        """Begin to write objects, and return the number of the batch."""
        return self._submit(lambda: self._write(list(zip(keys, views, strict=True))))

    def submit_batch_get(self, keys: Sequence[str], views: Sequence[memoryview]) -> int:
        """Begin to read objects into memory, and return the number of the batch."""
        return self._submit(lambda: self._read(list(zip(keys, views, strict=True))))

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Begin to look which objects there are, and return the number of the batch."""
        return self._submit(lambda: [os.path.exists(self._path(key)) for key in keys])

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Begin to delete objects, and return the number of the batch."""
        return self._submit(lambda: [self._delete(key) for key in keys])

    def drain_completions(self) -> list[Completion]:
        """Return the batches that have ended since the last call."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        with self._lock:
            done = list(self._completions)
            self._completions.clear()
        return done

    def close(self) -> None:
        """Finish all batches, and release the Buffers and the eventfd."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._threads.shutdown()
        for buffer in self._idle:
            buffer.close()
        os.close(self._event)

    def _submit(self, work: Callable[[], list[bool] | None]) -> int:
        with self._lock:
            if self._closed:
                raise ClosedError("these KV files are closed")
            self._number += 1
            number = self._number
        self._threads.submit(self._run, number, work)
        return number

    def _run(self, number: int, work: Callable[[], list[bool] | None]) -> None:
        try:
            completion: Completion = number, True, "", work()
        except Exception as error:  # LMCache reports it, whatever it is
            completion = number, False, f"{type(error).__name__}: {error}", None
        with self._lock:
            self._completions.append(completion)
        os.eventfd_write(self._event, 1)

    def _path(self, key: str) -> str:
        name = hashlib.sha256(key.encode()).hexdigest()
        return os.path.join(self._folder, name[:2], name)

    def _delete(self, key: str) -> bool:
        try:
            os.unlink(self._path(key))
        except FileNotFoundError:
            return False
        return True

    def _groups(
        self, objects: Sequence[tuple[str, memoryview]]
    ) -> Iterator[list[tuple[str, memoryview]]]:
        """Yield objects that fit into a block together, or one that does not."""
        group: list[tuple[str, memoryview]] = []
        size = 0
        for key, view in objects:
            nbytes = round_up(view.nbytes, _PAGE)
            if group and size + nbytes > self._block_size:
                yield group
                group, size = [], 0
            group.append((key, view))
            size += nbytes
        if group:
            yield group

    @contextmanager
    def _buffer(
        self, group: Sequence[tuple[str, memoryview]]
    ) -> Iterator[tuple[Buffer, list[tuple[str, int, int, int]]]]:
        """Give a Buffer, and for each object its path, 0, its size and its place there."""
        ranges, at = [], 0
        for key, view in group:
            ranges.append((self._path(key), 0, view.nbytes, at))
            at += round_up(view.nbytes, _PAGE)
        with self._lock:
            kept = self._idle.pop() if self._idle and at <= self._block_size else None
        buffer = kept or allocate(max(at, self._block_size), name="KV files")
        try:
            yield buffer, ranges
        finally:
            if buffer.size > round_up(self._block_size, _PAGE):
                buffer.close()
            else:
                with self._lock:
                    self._idle.append(buffer)

    def _write(self, objects: Sequence[tuple[str, memoryview]]) -> None:
        for folder in {os.path.dirname(self._path(key)) for key, _ in objects}:
            os.makedirs(folder, exist_ok=True)
        for group in self._groups(objects):
            with self._buffer(group) as (buffer, ranges):
                for (_, view), (_, _, _, start) in zip(group, ranges, strict=True):
                    buffer.pwrite(view, start)
                for outcome in write_files(ranges, buffer, terms=self._terms):
                    if isinstance(outcome, OSError):
                        raise outcome

    def _read(self, objects: Sequence[tuple[str, memoryview]]) -> list[bool]:
        found: list[bool] = []
        for group in self._groups(objects):
            with self._buffer(group) as (buffer, ranges):
                outcomes = read_files(ranges, buffer, terms=self._terms)
                for (_, view), one, outcome in zip(group, ranges, outcomes, strict=True):
                    path, _, size, start = one
                    whole = not isinstance(outcome, OSError) and outcome.nbytes == size
                    whole = whole and os.path.getsize(path) == size
                    if whole:
                        buffer.preadv([view], start)
                    found.append(whole)
        return found

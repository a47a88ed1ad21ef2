"""LMCache's second level: KV caches in files, or in the store of another node.

LMCache loads `KvFiles` or `KvNames` by its adapter type ``native_plugin``, gives it batches of keys
and of views of its own memory, and polls an eventfd for completions. Nothing of LMCache is needed
here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Literal

from dmabuf.copying import read_files, write_files
from dmabuf.errors import ClosedError
from dmabuf.memory import Buffer, allocate
from dmabuf.remote import Node, connect
from dmabuf.sizes import parse_size, round_up
from dmabuf.transfer import Require, Terms

_PAGE = 4096

Completion = tuple[int, bool, str, list[bool] | None]
"""The number of a batch, whether it succeeded, the error, and the outcome of each key."""
_Object = tuple[str, memoryview]
"""A key, and LMCache's memory for the object."""


class _KvObjects(ABC):
    """Batches of LMCache, which threads work on through a Buffer for each.

    The derived classes know where the objects are.
    """

    def __init__(self, threads: int, block_size: int | str) -> None:
        self._block_size = max(parse_size(block_size, "block_size"), _PAGE)
        self._lock = threading.Lock()
        self._completions: deque[Completion] = deque()
        self._idle: list[Buffer] = []
        self._number = 0
        self._closed = False
        self._threads = ThreadPoolExecutor(threads, "dmabuf lmcache")
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @abstractmethod
    def _write_group(self, group: Sequence[_Object], buffer: Buffer, places: list[int]) -> None:
        """Write objects that lie at places of a buffer."""

    @abstractmethod
    def _read_group(
        self, group: Sequence[_Object], buffer: Buffer, places: list[int]
    ) -> list[bool]:
        """Read objects to places of a buffer, and return which are there whole."""

    @abstractmethod
    def _exist(self, keys: Sequence[str]) -> list[bool]:
        """Return which objects there are."""

    @abstractmethod
    def _delete(self, keys: Sequence[str]) -> list[bool]:
        """Delete objects, and return which there were."""

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
        return self._submit(lambda: self._exist(keys))

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Begin to delete objects, and return the number of the batch."""
        return self._submit(lambda: self._delete(keys))

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
                raise ClosedError("this KV cache is closed")
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

    def _write(self, objects: Sequence[_Object]) -> None:
        for group in self._groups(objects):
            with self._buffer(group) as (buffer, places):
                for (_, view), start in zip(group, places, strict=True):
                    buffer.pwrite(view, start)
                self._write_group(group, buffer, places)

    def _read(self, objects: Sequence[_Object]) -> list[bool]:
        found: list[bool] = []
        for group in self._groups(objects):
            with self._buffer(group) as (buffer, places):
                whole = self._read_group(group, buffer, places)
                for (_, view), start, one in zip(group, places, whole, strict=True):
                    if one:
                        buffer.preadv([view], start)
                found += whole
        return found

    def _groups(self, objects: Sequence[_Object]) -> Iterator[list[_Object]]:
        """Yield objects that fit into a block together, or one that does not."""
        group: list[_Object] = []
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
    def _buffer(self, group: Sequence[_Object]) -> Iterator[tuple[Buffer, list[int]]]:
        """Give a Buffer, and for each object its place there."""
        places, at = [], 0
        for _, view in group:
            places.append(at)
            at += round_up(view.nbytes, _PAGE)
        with self._lock:
            kept = self._idle.pop() if self._idle and at <= self._block_size else None
        buffer = kept or allocate(max(at, self._block_size), name="KV objects")
        try:
            yield buffer, places
        finally:
            if buffer.size > round_up(self._block_size, _PAGE):
                buffer.close()
            else:
                with self._lock:
                    self._idle.append(buffer)


class KvFiles(_KvObjects):
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
        self._folder = os.path.abspath(folder)
        os.makedirs(self._folder, exist_ok=True)
        super().__init__(threads, block_size)

    def _path(self, key: str) -> str:
        name = _digest(key)
        return os.path.join(self._folder, name[:2], name)

    def _ranges(
        self, group: Sequence[_Object], places: list[int]
    ) -> list[tuple[str, int, int, int]]:
        return [
            (self._path(key), 0, view.nbytes, start)
            for (key, view), start in zip(group, places, strict=True)
        ]

    def _write_group(self, group: Sequence[_Object], buffer: Buffer, places: list[int]) -> None:
        for folder in {os.path.dirname(self._path(key)) for key, _ in group}:
            os.makedirs(folder, exist_ok=True)
        for outcome in write_files(self._ranges(group, places), buffer, terms=self._terms):
            if isinstance(outcome, OSError):
                raise outcome

    def _read_group(
        self, group: Sequence[_Object], buffer: Buffer, places: list[int]
    ) -> list[bool]:
        ranges = self._ranges(group, places)
        outcomes = read_files(ranges, buffer, terms=self._terms)
        return [
            not isinstance(one, OSError) and one.nbytes == size and os.path.getsize(path) == size
            for (path, _, size, _), one in zip(ranges, outcomes, strict=True)
        ]

    def _exist(self, keys: Sequence[str]) -> list[bool]:
        return [os.path.exists(self._path(key)) for key in keys]

    def _delete(self, keys: Sequence[str]) -> list[bool]:
        return [_remove(os.unlink, self._path(key)) for key in keys]


class KvNames(_KvObjects):
    """The objects of a KV cache as names of another node's store, in its memory.

    ``dmabuf serve --listen ADDRESS`` runs there. A name appears when all of its bytes are there.
    An object that is missing, or has another size than the memory for it, is not found. Each thread
    has a connection. A batch whose connection fails is reported as failed, and the next one
    connects again.
    """

    def __init__(
        self,
        address: str,
        engine: Literal["auto", "tcp", "nixl"] = "auto",
        trusted_network: bool = False,
        timeout: float = 30.0,
        threads: int = 2,
        block_size: int | str = "64MiB",
    ) -> None:
        """Connect to the node.

        Args:
            address: as for `dmabuf.remote.connect`; certificates are those of the environment.
            engine: as for `dmabuf.remote.connect`.
            trusted_network: as for `dmabuf.remote.connect`.
            timeout: seconds, as for `dmabuf.remote.connect`.
            threads: batches that are worked on at once, each by a connection of its own.
            block_size: as for `KvFiles`.

        Raises OSError, ValueError.
        """
        self._nodes: list[Node] = []
        """Connections that no batch uses."""

        self._connect = partial(
            connect, address, engine=engine, trusted_network=trusted_network, timeout=timeout
        )
        super().__init__(threads, block_size)
        try:
            with self._node():
                pass
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Finish all batches, and release the Buffers, the eventfd and the connections."""
        super().close()
        while self._nodes:
            self._nodes.pop().close()

    def _name(self, key: str) -> str:
        return f"kv-{_digest(key)}"

    @contextmanager
    def _node(self) -> Iterator[Node]:
        with self._lock:
            node = self._nodes.pop() if self._nodes else None
        node = node or self._connect()
        try:
            yield node
        finally:
            if not node.closed:
                with self._lock:
                    self._nodes.append(node)

    def _write_group(self, group: Sequence[_Object], buffer: Buffer, places: list[int]) -> None:
        with self._node() as node:
            for (key, view), start in zip(group, places, strict=True):
                node.publish(self._name(key), buffer, view.nbytes, buffer_offset=start)

    def _read_group(
        self, group: Sequence[_Object], buffer: Buffer, places: list[int]
    ) -> list[bool]:
        wanted = [
            (self._name(key), start, view.nbytes)
            for (key, view), start in zip(group, places, strict=True)
        ]
        with self._node() as node:
            outcomes = node.fetch_many(wanted, buffer)
        return [
            not isinstance(one, OSError) and one.nbytes == size
            for (_, _, size), one in zip(wanted, outcomes, strict=True)
        ]

    def _exist(self, keys: Sequence[str]) -> list[bool]:
        with self._node() as node, self._buffer([]) as (buffer, _):
            outcomes = node.fetch_many([(self._name(key), 0, 0) for key in keys], buffer)
        return [not isinstance(one, OSError) or one.errno == errno.ENOSPC for one in outcomes]

    def _delete(self, keys: Sequence[str]) -> list[bool]:
        with self._node() as node:
            return [_remove(node.remove, self._name(key)) for key in keys]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _remove(remove: Callable[[str], None], name: str) -> bool:
    """Remove a file or a name, and return whether it was there."""
    with suppress(FileNotFoundError):
        remove(name)
        return True
    return False

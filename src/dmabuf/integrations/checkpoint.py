"""Storage of torch.distributed.checkpoint: past the page cache, one array of requests a file.

The files are those of torch's FileSystemWriter and FileSystemReader, so each side can be replaced
by itself.
"""

from __future__ import annotations

import io
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.futures import Future

from dmabuf.errors import ShortReadError
from dmabuf.integrations.direct_files import DirectWriter
from dmabuf.memory import allocate
from dmabuf.sizes import round_up
from dmabuf.transfer import File, Require, Terms

_GROUP = 128 << 20
"""Bytes of a file that are read at once, while those before become tensors."""
_BLOCK = 8 << 20

_Place = tuple[int, int]
"""The offset of an item in its file, and its length."""


class DmabufWriter(FileSystemWriter):  # type: ignore[misc]
    """A FileSystemWriter whose files go past the page cache, and appear when they are complete.

    With ``sync_files``, the default, a file's bytes and its name are on the medium when the save
    ends. An error in any of its threads is raised, and the checkpoint then has no ``.metadata``.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, require: Require = "any", **options: object
    ) -> None:
        """Prepare to write to a folder.

        Args:
            path: the folder, which is made if it is missing.
            require: "any", or "uncached": raise RouteUnavailable instead of using the page cache.
            options: what FileSystemWriter takes: ``sync_files``, ``thread_count`` and others.
        """
        super().__init__(path, **options)
        self.fs = _Files(Terms(require=require), self.sync_files)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Write this rank's items, and raise the first error of any thread."""
        self.fs.errors = []
        try:
            written = super().write_data(plan, planner)
            if self.fs.errors:
                raise self.fs.errors[0]
        finally:
            self.fs.errors = None
        return written


class _Files(FileSystem):  # type: ignore[misc]
    """Torch's access to a folder; what is written goes through a DirectWriter."""

    def __init__(self, terms: Terms, sync: bool) -> None:
        super().__init__()
        self._terms, self._sync = terms, sync
        self.errors: list[BaseException] | None = None
        """Errors of files, to raise when all threads have ended; None raises each at once."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[bytes]]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        writer = None
        try:
            with DirectWriter(os.fspath(path), self._terms, _BLOCK, sync=self._sync) as writer:
                yield writer  # type: ignore[misc]
        except Exception as error:
            # torch drops the errors of its threads, and its zip writer replaces those of write()
            failed = (writer and writer.failed) or error
            if self.errors is None:
                raise failed from None
            self.errors.append(failed)


class DmabufReader(FileSystemReader):  # type: ignore[misc]
    """A FileSystemReader that reads what a plan needs of a file as arrays of requests.

    Neighbouring items are one request, which takes the best route into a Buffer; the next 128 MiB
    are read while tensors are made of those before. An item that several parts of the plan need is
    read once.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, require: Require = "any", **options: object
    ) -> None:
        """Prepare to read a folder.

        Args:
            path: the folder.
            require: "any", "uncached" or "zero-copy", of the transfers into Buffers.
            options: what FileSystemReader takes.
        """
        super().__init__(path, **options)
        self._terms = Terms(require=require)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of a plan into its tensors.

        Raises ShortReadError for a file that is cut short, and OSErrors of its transfers.
        """
        files: dict[str, dict[_Place, list[ReadItem]]] = {}
        for item in plan.items:
            about = self.storage_data[item.storage_index]
            places = files.setdefault(about.relative_path, {})
            places.setdefault((about.offset, about.length), []).append(item)
        for name, places in files.items():
            path = str(Path(self.path) / name)
            for part, place in _parts(path, places, self._terms):
                self._load(part, places[place], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _load(self, part: IO[bytes], items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Give the planner the items that one part of a file holds."""
        about = self.storage_data[items[0].storage_index]
        transforms = getattr(about, "transform_descriptors", None) or ()
        stream = self.transforms.transform_load_stream(items[0], transforms, part)
        if items[0].type == LoadItemType.BYTE_IO:
            content = stream.read()
            for item in items:
                planner.load_bytes(item, io.BytesIO(content))
            return
        if not stream.seekable():
            stream = io.BytesIO(stream.read())
        whole = torch.load(stream, map_location="cpu", weights_only=True)
        for item in items:
            wanted = whole
            for axis, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                wanted = wanted.narrow(axis, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.size() != wanted.size():
                text = f"{tuple(wanted.size())} in the file, {tuple(target.size())} in memory"
                raise ValueError(f"load {item.dest_index.fqn}: its shape differs: {text}")
            target.copy_(wanted)
            planner.commit_tensor(item, target)


class _Group:
    """Items of a file that are read together, and where they go in a buffer."""

    def __init__(self) -> None:
        self.segments = array("Q")
        self.starts: dict[_Place, int] = {}
        self.size = 0

    def add(self, place: _Place, file_size: int) -> bool:
        """Add an item behind those that are there; return False if there is no room for it.

        Offsets in file and buffer agree modulo a page, so whole pages go straight.
        """
        offset, length = place
        start = offset - offset % mmap.PAGESIZE
        end = min(round_up(offset + length, mmap.PAGESIZE), file_size)
        joined = bool(self.segments) and start <= self.segments[-3] + self.segments[-1]
        if not joined:
            at = round_up(self.size, mmap.PAGESIZE)
            run = array("Q", (start, at, 0))
        else:
            run = self.segments[-3:]
        run[2] = max(run[2], end - run[0])
        if self.segments and run[1] + run[2] > _GROUP:
            return False
        if joined:
            self.segments[-3:] = run
        else:
            self.segments.extend(run)
        self.size = run[1] + run[2]
        self.starts[place] = run[1] + offset - run[0]
        return True


def _groups(path: str, places: Iterable[_Place], file_size: int) -> list[_Group]:
    groups = [_Group()]
    for place in sorted(places):
        if sum(place) > file_size:
            text = f"read {path}: it has {file_size} bytes, and an item ends at {sum(place)}"
            raise ShortReadError(f"{text}; get the file again")
        if not groups[-1].add(place, file_size):
            groups.append(_Group())
            groups[-1].add(place, file_size)
    return groups


def _parts(path: str, places: Iterable[_Place], terms: Terms) -> Iterator[tuple[IO[bytes], _Place]]:
    """Yield the content of each place of a file as a stream, and read ahead meanwhile."""
    with ExitStack() as stack:
        file = stack.enter_context(File(path))
        groups = _groups(path, places, file.size or 0)
        size = max(1, *(group.size for group in groups))
        buffers = [
            stack.enter_context(allocate(size, name="checkpoint"))
            for _ in range(min(2, len(groups)))
        ]

        def read(number: int) -> None:
            segments = groups[number].segments
            done = file.read_segments(buffers[number % 2], segments, terms=terms)
            if done.nbytes < sum(segments[2::3]):  # of a single segment, which may be short there
                raise ShortReadError(f"read {path}: it became shorter meanwhile", 0, done.nbytes)

        thread = stack.enter_context(ThreadPoolExecutor(1, "dmabuf checkpoint"))
        ahead = thread.submit(read, 0)
        for number, group in enumerate(groups):
            ahead.result()
            if number + 1 < len(groups):
                ahead = thread.submit(read, number + 1)
            for place, start in group.starts.items():
                yield buffers[number % 2].open("r", start, place[1]), place  # type: ignore[misc]

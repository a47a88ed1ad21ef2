"""The fsspec protocol ``dmabuf+file://``: files of this machine, past the page cache.

The bytes of a file move between the drive and a Buffer by the best route, and one copy brings them
to or from the caller's memory. Memory that lies in a Buffer itself is read without that copy.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import isfilelike, stringify_path

from dmabuf._core import address_of
from dmabuf.copying import Replacement, Staging, copy
from dmabuf.integrations.whole_file import WholeFile
from dmabuf.kernel import log
from dmabuf.memory import Buffer, allocate, find_buffer
from dmabuf.sizes import parse_size
from dmabuf.transfer import File, Require, Terms

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFERED = 128 << 10
"""Bytes that small reads fetch at once."""


class DirectFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine, read and written past the page cache where the route allows it.

    ``fsspec.open("dmabuf+file:///data/x")`` makes it; the path of a URL is absolute. Directories,
    names and attributes are those of fsspec's LocalFileSystem. Files are opened in the modes "rb",
    "wb" and "xb" (and their text forms). A written file appears when it is closed, whole or not at
    all; in mode "xb" its name is that of an empty file until then.
    """

    protocol = "dmabuf+file"
    local_file = False  # else libraries open the path themselves

    def __init__(
        self,
        auto_mkdir: bool = False,
        require: Require = "any",
        block_size: int | str = "8MiB",
        **storage_options: object,
    ) -> None:
        """Check the options of the file system.

        Args:
            auto_mkdir: create missing directories of a file that is written.
            require: "any", or "uncached": transfers then raise RouteUnavailable instead of using
                the page cache.
            block_size: bytes of the block that each open file has, at most; a multiple of 4096.
            storage_options: what fsspec's AbstractFileSystem takes.
        """
        super().__init__(auto_mkdir=auto_mkdir, **storage_options)
        self._terms = Terms(require=require)
        self._block_size = parse_size(block_size, "block_size")
        Staging(self._block_size)  # raises for an impossible size

    @property
    def fsid(self) -> str:
        """The name of this file system; its files are those of the machine."""
        return "dmabuf+file"

    @classmethod
    def _strip_protocol(cls, path: object) -> Any:
        plain = stringify_path(path)
        for prefix in ("dmabuf+file://", "dmabuf+file:"):
            if plain.startswith(prefix):  # datasets makes three slashes two
                plain = "/" + plain.removeprefix(prefix).lstrip("/")
        return super()._strip_protocol(plain)

    def _open(
        self, path: str, mode: str = "rb", autocommit: bool = True, **kwargs: object
    ) -> DirectReader | DirectWriter:
        if mode not in ("rb", "wb", "xb"):
            raise ValueError(f"open {path}: invalid mode {mode!r}: use rb, wb or xb, or file://")
        if mode == "rb":
            return DirectReader(path, self._terms, self._block_size)
        if self.auto_mkdir:
            self.makedirs(self._parent(path), exist_ok=True)
        if mode == "xb":
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        return DirectWriter(
            path, self._terms, self._block_size, autocommit=autocommit, claimed=mode == "xb"
        )

    def cp_file(self, path1: str, path2: str, **kwargs: object) -> None:
        """Copy a file, which appears whole; of a directory, make one."""
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(source):
            self.makedirs(target, exist_ok=True)
            return
        if self.auto_mkdir:
            self.makedirs(self._parent(target), exist_ok=True)
        with Replacement(str(target), force=False, note=log.info) as replacement:
            copy(str(source), replacement.temporary, require=self._terms.require)
            replacement.commit(None, sync=False)

    def get_file(
        self,
        path1: str,
        path2: object,
        callback: Callable[..., object] | None = None,
        **kwargs: object,
    ) -> None:
        """Copy a file to a path or to a binary file object."""
        if isfilelike(path2):
            copy(str(self._strip_protocol(path1)), path2, require=self._terms.require)  # type: ignore[arg-type]
        else:
            self.cp_file(path1, str(path2))


class DirectReader(io.BufferedReader):
    """A file that is read past the page cache; its position is that of a Python file."""

    def __init__(self, path: str, terms: Terms, block_size: int) -> None:
        raw = _Reading(path, terms, block_size)
        self.path, self.size = path, raw.size
        super().__init__(raw, _BUFFERED)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at most ``size`` bytes; all the rest for None or -1, in one piece of memory."""
        if size is None or size < 0:
            rest = self.size - self.tell()
            size = rest if rest > 0 else -1  # files of /proc have a size of 0
        return super().read(size)


class _Reading(io.RawIOBase):
    """The file below a DirectReader, which reads ahead of reads that follow each other."""

    def __init__(self, path: str, terms: Terms, block_size: int) -> None:
        self.name, self.mode, self._terms = path, "rb", terms
        self._staging = Staging(block_size)
        try:
            self._file = File(path)
        except BaseException:
            super().close()  # nothing else is open
            raise
        self._position = 0
        self._end = -1  # where the last transfer ended in the file
        self._ahead = 0  # bytes of the next transfer, if it follows the last one
        self._block_size = block_size
        self._block: Buffer | None = None
        self._start = self._held = 0  # the range of the file in the block
        if self._file.size is None:
            self._file.close()
            raise OSError(
                errno.ESPIPE, f"open: {self._file.kind} has no offsets; use file://", path
            )
        self.size = self._file.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size or 0}
        self._position = parse_size(origins[whence] + offset, "position")
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        with PickleBuffer(buffer).raw() as raw:
            got = self._from_block(raw) or self._fetch(raw)
        self._position += got
        return got

    def _from_block(self, raw: memoryview) -> int:
        """Copy what the block holds at the position, and return how many bytes."""
        done = self._position - self._start
        size = min(len(raw), self._held - done) if done >= 0 else 0
        if size <= 0 or self._block is None:
            return 0
        with self._block.map("r", self._start % mmap.PAGESIZE + done, size) as view:
            raw[:size] = view
        return size

    def _fetch(self, raw: memoryview) -> int:
        """Read from the file, and return how many bytes of `raw` that filled."""
        at, follows = self._position, self._position == self._end
        self._ahead = min(4 * max(self._ahead, len(raw)), self._block_size) if follows else 0
        in_place = self._ahead <= len(raw) or self._terms.require == "zero-copy"
        if in_place or find_buffer(address_of(raw), len(raw)) is not None:
            got = self._staging.read(self._file, raw, at, self._terms)
            self._end = at + got
            return got
        if self._block is None:
            self._block = allocate(self._block_size, name="dmabuf read-ahead")
            self._block.closes_unasked = True
        start = at % mmap.PAGESIZE
        size = min(self._ahead, self._block_size - start)
        self._held = 0  # until the transfer has ended well
        done = self._file.read_into(
            self._block, size, file_offset=at, buffer_offset=start, terms=self._terms
        )
        self._start, self._held, self._end = at, done.nbytes, at + done.nbytes
        return self._from_block(raw)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._staging.close()
            if self._block is not None:
                self._block.close()
        super().close()


class DirectWriter(WholeFile):
    """A file that is written past the page cache, and replaces an old one when it is closed."""

    def __init__(
        self,
        path: str,
        terms: Terms,
        block_size: int,
        *,
        autocommit: bool = True,
        sync: bool = False,
        claimed: bool = False,
    ) -> None:
        """Open a file for writing.

        Args:
            path: the file.
            terms: the conditions of the transfers.
            block_size: bytes that are collected before each transfer.
            autocommit: make the file appear when it is closed.
            sync: have its bytes and its name on the medium when it has appeared.
            claimed: the name is that of an empty file, to remove if this one does not appear.
        """
        super().__init__(path, autocommit)
        self._terms, self._sync = terms, sync
        self._filled = 0  # bytes of the block
        self._published = False
        self._stack = ExitStack()
        with self._stack as stack:
            if claimed:
                stack.callback(self._unclaim)
            replacement = Replacement(path, force=False, note=log.info)
            self._replacement = stack.enter_context(replacement)
            self._file = stack.enter_context(File(replacement.temporary, "w"))
            self._file.target.path = self._file.name = path  # for messages
            self._stack = stack.pop_all()
        self._block_size = block_size
        self._block: Buffer | None = None

    def append(self, data: memoryview) -> None:
        """Copy bytes into the block, and write it each time that it is full."""
        if self._block is None:
            block = allocate(self._block_size, name="dmabuf staging")
            self._block = self._stack.enter_context(block)
        done = 0
        while done < len(data):
            size = min(len(data) - done, self._block.size - self._filled)
            with self._block.map("w", self._filled, size) as view:
                view[:] = data[done : done + size]
            done += size
            self._filled += size
            if self._filled == self._block.size:
                self._flush(self._written + done - self._filled)

    def _flush(self, file_offset: int) -> None:
        size, self._filled = self._filled, 0
        if size and self._block is not None:
            self._file.write_from(self._block, size, file_offset=file_offset, terms=self._terms)

    def fileno(self) -> int:
        """Return the descriptor of the new file, for fsync(2): it has all bytes written so far."""
        self.finish()
        return self._file.fileno()

    def finish(self) -> None:
        """Write what the block holds, to the medium with ``sync``."""
        self._flush(self._written - self._filled)
        if self._sync:
            self._file.target.flush(0)

    def publish(self) -> None:
        """Put the new file in place of the old one."""
        self._file.close()
        self._replacement.commit(None, sync=self._sync)
        self._published = True
        self.drop()

    def _unclaim(self) -> None:
        if not self._published:
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def drop(self) -> None:
        """Close everything; a file that was not put in place is gone."""
        self._stack.close()

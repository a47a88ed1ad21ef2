"""The fsspec protocol ``dmabuf://``: the named buffers of a store as files.

A name of the store has no "/". A "/" in a path stands for "%2F" in the name, so folders exist as in
an object store: where there is a name below. A file is read from the shared memory itself.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pickle import PickleBuffer
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.utils import isfilelike

from dmabuf.copying import copy, write_files
from dmabuf.integrations.whole_file import WholeFile
from dmabuf.memory import Buffer, Window
from dmabuf.store import Status, Store, connect
from dmabuf.transfer import File, Require, Terms

_SLASH = "%2F"
Info = dict[str, Any]
"""What fsspec returns of a path: "name", "size", "type" and more."""


class StoreFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The named buffers of a store (``dmabuf serve``) as files.

    ``fsspec.open("dmabuf://model")`` makes it. Files are opened in the modes "rb", "wb", "xb" and
    "ab" (and their text forms). A file that is read is a `dmabuf.memory.Window`: memoryview() and
    numpy.asarray() of it share the store's memory. A written file is kept in this process, and
    appears as a new buffer when it is closed, whole or not at all. Programs that have a replaced
    buffer open keep it.

    Each call has a connection of its own, so the object can be used in threads and after a fork.
    """

    protocol = "dmabuf"

    def __init__(
        self,
        socket: str | None = None,
        mode: int = 0o600,
        exporter: str = "auto",
        require: Require = "any",
        timeout: float | None = None,
        **storage_options: object,
    ) -> None:
        """Check the options of the file system; nothing is connected yet.

        Args:
            socket: the path of the store's socket; None is `dmabuf.store.default_path()`.
            mode: the permissions of new names.
            exporter: what makes the memory of new names, as for `dmabuf.allocate`.
            require: of transfers between files and the store by `get` and `put`: "any", "uncached"
                or "zero-copy".
            timeout: seconds to wait for a reply of the store; None for ever.
            storage_options: what fsspec's AbstractFileSystem takes.
        """
        super().__init__(**storage_options)
        self._socket, self._mode, self._exporter = socket, mode, exporter
        self._terms, self._timeout = Terms(require=require), timeout

    def connect(self) -> Store:
        """Return a connection to the store."""
        return connect(self._socket, timeout=self._timeout)

    @property
    def fsid(self) -> str:
        """The name of this file system."""
        return "dmabuf"

    @classmethod
    def _strip_protocol(cls, path: object) -> Any:
        plain = super()._strip_protocol(path)
        return plain.lstrip("/") if isinstance(plain, str) else plain

    # -- names

    def info(self, path: str, **kwargs: object) -> Info:
        """Return what is known of a file or folder. Raises FileNotFoundError."""
        path = self._strip_protocol(path)
        with self.connect() as store:
            if path:
                with suppress(FileNotFoundError):
                    return _info(store.stat(_name(path)))
            if not path or any(one.name.startswith(_name(path) + _SLASH) for one in store.list()):
                return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(errno.ENOENT, "there is no such buffer", path)

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list[Info] | list[str]:
        """Return what lies in a folder, or a file itself: records, or paths without ``detail``."""
        path = self._strip_protocol(path)
        below = f"{path}/" if path else ""
        found: dict[str, Info] = {}
        with self.connect() as store:
            names = store.list()
        for status in names:
            name = _path(status.name)
            if name.startswith(below):
                first, slash, _ = name[len(below) :].partition("/")
                child = below + first
                folder = {"name": child, "size": 0, "type": "directory"}
                if not slash:
                    found[child] = _info(status)
                else:
                    found.setdefault(child, folder)
        if not found and path:
            found = {path: self.info(path)}
        return sorted(found) if not detail else [found[name] for name in sorted(found)]

    def created(self, path: str) -> datetime:
        """Return when a name was made."""
        return _time(self.info(path), "created")

    def modified(self, path: str) -> datetime:
        """Return when a name's content was last written, as far as the store was informed."""
        return _time(self.info(path), "mtime")

    def rm_file(self, path: str) -> None:
        """Remove a name. Programs that have the buffer open keep it."""
        with self.connect() as store:
            store.remove(_name(self._strip_protocol(path)))

    _rm = rm_file

    def rm(
        self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None
    ) -> None:
        """Remove names; with ``recursive`` all that lie below folders."""
        for one in self.expand_path(path, recursive=recursive, maxdepth=maxdepth):
            if self.isfile(one):
                self.rm_file(one)
            elif not recursive:
                raise IsADirectoryError(errno.EISDIR, "remove: pass recursive=True", one)

    def mv(
        self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None,
        **kwargs: object,
    ) -> None:  # fmt: skip
        """Rename a file, in place of one of the new name; a folder is copied and removed."""
        old, new = self._strip_protocol(path1), self._strip_protocol(path2)
        if not self.isfile(old) or str(path2).endswith("/") or self.isdir(new):
            super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **kwargs)
            return
        with self.connect() as store:
            store.rename(_name(old), _name(new))

    # -- content

    def _open(
        self, path: str, mode: str = "rb", autocommit: bool = True, **kwargs: object
    ) -> StoreReader | StoreWriter:
        if mode not in ("rb", "wb", "xb", "ab"):
            raise ValueError(f"open {path}: invalid mode {mode!r}: use rb, wb, xb or ab")
        name = _name(path)
        if mode == "rb":
            return self._read(name)
        if mode == "xb" and self.exists(path):
            raise FileExistsError(errno.EEXIST, "open: a buffer of that name exists", path)
        writer = StoreWriter(self, name, replace=mode != "xb", autocommit=autocommit)
        if mode == "ab":
            with suppress(FileNotFoundError), self._read(name) as old:
                writer.write(old)
        return writer

    def _read(self, name: str) -> StoreReader:
        with self.connect() as store:
            return StoreReader(*store.open_with_status(name))

    def publish(self, name: str, data: memoryview, *, replace: bool) -> None:
        """Make bytes the content of a name."""
        with self.connect() as store, self._create(store, len(data)) as buffer:
            buffer.pwrite(data, 0)
            store.link(buffer, name, replace=replace, length=len(data))

    def _create(self, store: Store, size: int) -> Buffer:
        return store.create(
            None, max(size, 1), mode=self._mode, exporter=self._exporter, trusted=True
        )

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        """Make bytes the content of a name; ``mode`` "create" refuses one that exists."""
        with PickleBuffer(value).raw() as raw:
            name = _name(self._strip_protocol(path))
            self.publish(name, raw, replace=mode != "create")

    def cp_file(self, path1: str, path2: str, **kwargs: object) -> None:
        """Copy a file's memory to a new buffer. Of a folder nothing is copied."""
        source, target = map(self._strip_protocol, (path1, path2))
        if self.isdir(source):
            return
        with self.connect() as store:
            old, status = store.open_with_status(_name(source))
            with old, self._create(store, status.length) as new:
                copy(old, new, size=status.length)
                store.link(new, _name(target), length=status.length)

    def put_file(
        self,
        lpath: str,
        rpath: str,
        callback: Callable[..., object] | None = None,
        mode: str = "overwrite",
        **kwargs: object,
    ) -> None:
        """Read a file of this machine into a new buffer, by the best route. A folder is nothing."""
        if os.path.isdir(lpath):
            return
        with File(lpath) as file, self.connect() as store:
            with self._create(store, file.size or 0) as buffer:
                got = copy(file, buffer, size=file.size, require=self._terms.require).nbytes
                name = _name(self._strip_protocol(rpath))
                store.link(buffer, name, replace=mode != "create", length=got)

    def get_file(
        self,
        rpath: str,
        lpath: object,
        callback: Callable[..., object] | None = None,
        outfile: object = None,
        **kwargs: object,
    ) -> None:
        """Write a buffer to a file of this machine, which appears whole, or to a file object."""
        path = self._strip_protocol(rpath)
        target = lpath if outfile is None else outfile
        if not isfilelike(target) and self.isdir(path):
            os.makedirs(str(target), exist_ok=True)
            return
        with self.connect() as store:
            buffer, status = store.open_with_status(_name(path), trusted=None)
        with buffer:
            if isfilelike(target):
                copy(buffer, target, size=status.length)  # type: ignore[arg-type]
                return
            local = os.fspath(target)  # type: ignore[call-overload]
            os.makedirs(os.path.dirname(local) or ".", exist_ok=True)
            [done] = write_files([(local, 0, status.length, 0)], buffer, terms=self._terms)
        if isinstance(done, OSError):
            raise done


class StoreReader(Window):
    """The content of a named buffer: a window that closes its buffer."""

    def __init__(self, buffer: Buffer, status: Status) -> None:
        buffer.closes_unasked = True
        super().__init__(buffer, 0, status.length, status.length, True, False)
        self.path = _path(status.name)

    def close(self) -> None:
        """Close the window, and the buffer once no memoryview or array of it is left."""
        super().close()
        with suppress(BufferError):
            self.buffer.close()


class StoreWriter(WholeFile):
    """A file that becomes the content of a name when it is closed."""

    def __init__(self, fs: StoreFileSystem, name: str, *, replace: bool, autocommit: bool) -> None:
        super().__init__(_path(name), autocommit)
        self._fs, self._name, self._replace = fs, name, replace
        self._bytes = io.BytesIO()

    def append(self, data: memoryview) -> None:
        """Keep the next bytes in this process."""
        self._bytes.write(data)

    def publish(self) -> None:
        """Make the bytes a buffer of the store."""
        with self._bytes.getbuffer() as data:
            self._fs.publish(self._name, data, replace=self._replace)
        self.drop()

    def drop(self) -> None:
        """Forget the bytes."""
        self._bytes.close()


def _name(path: str) -> str:
    """Return the store's name for a path. Raises OSError(EINVAL)."""
    if _SLASH in path:
        text = f'invalid path: "{_SLASH}" stands for "/" in names of the store; use "/"'
        raise OSError(errno.EINVAL, text, path)
    return path.replace("/", _SLASH)


def _path(name: str) -> str:
    return name.replace(_SLASH, "/")


def _info(status: Status) -> Info:
    return {
        "name": _path(status.name),
        "size": status.length,
        "type": "file",
        "created": status.created_ns / 1e9,
        "mtime": status.modified_ns / 1e9,
        "mode": status.mode,
        "uid": status.uid,
        "gid": status.gid,
        "ino": status.number,
        "memory": status.size,
        "exporter": status.exporter,
        "is_dmabuf": status.is_dmabuf,
    }


def _time(info: Info, key: str) -> datetime:
    if info["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, "folders of a store have no times", info["name"])
    return datetime.fromtimestamp(info[key], tz=UTC)

"""One copy of a model on a host: a cached buffer of a store, to which every process attaches.

Its name is a hash of what its bytes depend on: the files, and where their bytes lie in the buffer.
So a changed file, or another selection of tensors, is another name, and two processes that compute
the same name read the same bytes. The first process makes the buffer, and those that come meanwhile
wait (`Store.reserve`). The name appears with the whole content, which nobody can write from then on
(`Store.link`, cached). Behind the tensors lies a note for people: the paths of the files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from dmabuf.memory import Buffer
from dmabuf.safetensors.files import Part
from dmabuf.sizes import round_up
from dmabuf.store import Status, Store, connect

Result = TypeVar("Result")

_PREFIX = "model-"
_ATTEMPTS = 5
"""How often a load begins again because the store has ended or has dropped the copy."""
_WORD = 8


@dataclass(frozen=True, slots=True)
class SharedModel:
    """A model in a store, of which every process may have the same copy."""

    name: str
    """Of its buffer in the store."""
    number: int
    """Status.number of the buffer."""
    paths: tuple[str, ...]
    """The files that it was loaded from."""
    nbytes: int
    """Memory, in bytes."""
    in_use: bool | None
    """Whether a process has it; None if the kernel does not report it."""
    used_ns: int
    """When a process attached last, in nanoseconds since 1970."""


def attach(
    socket: str | os.PathLike[str] | None,
    parts: Sequence[Part],
    segments: Sequence[array[int]],
    size: int,
    fill: Callable[[Buffer], Result],
) -> tuple[Buffer, Result | None]:
    """Return the read-only Buffer of a model, and what `fill` returned if this process made it.

    Args:
        socket: the path of the store's socket; None for that of the user.
        parts: the files.
        segments: the places of their bytes in the buffer.
        size: the bytes that the segments need.
        fill: called to read the segments into a new buffer.

    Raises OSErrors as `Store.create`, `Store.reserve` and `Store.open` do, and what `fill` raises.
    """
    name = _name(parts, segments)
    paths = [os.path.abspath(part.path) if part.versions is None else part.path for part in parts]
    note = json.dumps(paths).encode()
    for left in reversed(range(_ATTEMPTS)):
        with connect(socket, again=False, start=True) as store:
            try:
                made = None
                status = store.reserve(name)
                if status is None:
                    status, made = _make(store, name, size, note, fill)
                return _open(store, status, size), made
            except ConnectionError:
                if not left or not store.closed:
                    raise
            except FileExistsError:  # made by a process that had not reserved it
                if not left:
                    raise
            except OSError as error:
                if not left or error.errno != errno.ESTALE:  # dropped since the reply
                    raise
    raise AssertionError


def _name(parts: Sequence[Part], segments: Sequence[array[int]]) -> str:
    told = hashlib.sha256()
    for part, one in zip(parts, segments, strict=True):
        identity = [*(part.identity or ()), len(one)]
        told.update(repr(identity).encode() + part.digest + one.tobytes())
    return f"{_PREFIX}{os.geteuid()}-{told.hexdigest()[:32]}"


def _make(
    store: Store, name: str, size: int, note: bytes, fill: Callable[[Buffer], Result]
) -> tuple[Status, Result]:
    """Make the buffer of a name that is reserved."""
    at = round_up(size, _WORD)
    end = at + len(note) + _WORD
    buffer = store.create(None, end, exporter="memfd", trusted=True)
    try:
        with buffer.view(0, buffer.size) as view:
            assert isinstance(view.obj, mmap.mmap)
            view.obj.madvise(mmap.MADV_DONTFORK)  # a child's writable mapping forbids the seal
        made = fill(buffer)
        buffer.pwrite(note + at.to_bytes(_WORD, "little"), at)
        return store.link(buffer, name, replace=False, length=end, cached=True), made
    finally:
        buffer.close()


def _open(store: Store, status: Status, size: int) -> Buffer:
    if not status.cached or status.length < size:
        text = "it is not a model that load has made; remove it: dmabuf rm"
        raise OSError(errno.EINVAL, text, status.name)
    buffer = store.open(status.name, number=status.number)
    buffer.closes_unasked = True
    return buffer


def shared_models(store: Store) -> list[SharedModel]:
    """Return the models of a store that this user may open."""
    found = []
    for one in store.list():
        if one.cached and one.name.startswith(_PREFIX):
            # Another user's, dropped since, or made by another program.
            with suppress(PermissionError, FileNotFoundError, ValueError):
                in_use = store.stat(one.name).in_use
                paths = _paths(store, one)
                found.append(
                    SharedModel(one.name, one.number, paths, one.size, in_use, one.accessed_ns)
                )
    return found


def _paths(store: Store, status: Status) -> tuple[str, ...]:
    with store.open(status.name) as buffer:
        end = status.length - _WORD
        at = int.from_bytes(buffer.pread(_WORD, end), "little")
        note = json.loads(buffer.pread(end - at, at))
    store.utime(status.name, accessed_ns=status.accessed_ns)  # this was not a use
    if not isinstance(note, list):
        raise ValueError(f"{status.name}: its note is not a list of paths")
    return tuple(map(str, note))

"""The files of a model: found, opened, and their headers checked, before any tensor is read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from dmabuf import _tensor_header
from dmabuf._tensor_header import Entry, Header, Malformed
from dmabuf.engine import Engine
from dmabuf.errors import os_error
from dmabuf.file import File

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Part:
    """A file, and those of its tensors that are wanted."""

    file: File
    size: int
    entries: dict[str, Entry]


def open_parts(
    stack: ExitStack,
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tensors: Iterable[str] | None,
    engine: Engine | None,
) -> tuple[list[Part], dict[str, str]]:
    """Each file with its wanted tensors, and the metadata of all; `stack` closes the files.

    Raises:
        ValueError: a file, or the index, is malformed.
        KeyError: no file has a tensor of that name.
        OSError: as opening and reading raise it.
    """
    if isinstance(tensors, str):
        raise TypeError("tensors is several names, not one text")
    wanted = None if tensors is None else dict.fromkeys(tensors)
    paths, owner = _paths(source)
    if owner is not None and wanted is not None:
        _check_all(wanted, owner)
        paths = [path for path in paths if path in {owner[name] for name in wanted}]
    parts: list[Part] = []
    metadata: dict[str, str] = {}
    seen: dict[str, str] = {}
    for path in paths:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # opening one waits for who writes there
            raise _endless("FIFO", path)
        file = stack.enter_context(File(path, engine=engine))
        header, size = _header(file, path)
        metadata |= header.metadata
        entries = header.entries
        if owner is not None:
            entries = {name: entry for name, entry in entries.items() if owner.get(name) == path}
            _check_shard(path, entries, owner)
        for name in entries:
            if seen.setdefault(name, path) != path:
                raise ValueError(f"tensor {name!r} is in {seen[name]} and in {path}")
        if wanted is not None:
            entries = {name: entry for name, entry in entries.items() if name in wanted}
        parts.append(Part(file, size, entries))
    if wanted is not None:
        _check_all(wanted, seen)
    return parts, metadata


def _check_all(wanted: Iterable[str], known: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in known]
    if missing:
        raise KeyError(f"no tensor of the name {missing[0]!r}, nor {len(missing) - 1} more")


def _check_shard(path: str, entries: dict[str, Entry], owner: dict[str, str]) -> None:
    for name, place in owner.items():
        if place == path and name not in entries:
            raise ValueError(f"{path}: the index says that tensor {name!r} is in it, and it is not")


def _paths(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[list[str], dict[str, str] | None]:
    """The files, and where there is an index, which of them has each tensor."""
    if not isinstance(source, (str, os.PathLike)):
        paths = list(dict.fromkeys(os.fspath(path) for path in source))
        if not paths:
            raise ValueError("no files are given")
        return paths, None
    path = os.fspath(source)
    if os.path.isdir(path):
        index, one = os.path.join(path, _INDEX), os.path.join(path, _ONE)
        path = one if os.path.exists(one) or not os.path.exists(index) else index
    if not path.endswith(".json"):
        return [path], None
    owner = _index(path)
    return sorted(set(owner.values())), owner


def _index(path: str) -> dict[str, str]:
    """Which file has each tensor, by the index of a sharded model."""
    with open(path, "rb") as file:
        raw = file.read(_tensor_header.LONGEST + 1)
    if len(raw) > _tensor_header.LONGEST:
        raise ValueError(f"{path}: an index of over {_tensor_header.LONGEST} bytes is none")
    try:
        found = _tensor_header.strict_json(raw, "the index").get("weight_map")
    except Malformed as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: it has no weight_map, which says which file has each tensor")
    for name, shard in found.items():
        if not isinstance(shard, str) or os.path.basename(shard) != shard or "\0" in shard:
            raise ValueError(f"{path}: tensor {name!r} is in {shard!r}, which is no file beside it")
        if shard in ("", ".", ".."):
            raise ValueError(f"{path}: tensor {name!r} is in {shard!r}, which is no file")
    folder = os.path.dirname(path)
    return {name: os.path.join(folder, shard) for name, shard in found.items()}


def _endless(kind: str, path: str) -> OSError:
    text = f"a {kind} is no safetensors file: its end could not be known"
    return os_error(errno.EINVAL, text, path)


def _header(file: File, path: str) -> tuple[Header, int]:
    if file.kind != "file":
        raise _endless(file.kind, path)
    size = file.size
    assert size is not None

    def pread(count: int, offset: int) -> bytes:
        parts = []
        while count:
            part = os.pread(file.fileno(), count, offset)
            if not part:
                raise Malformed(f"it became shorter than {offset + count} bytes meanwhile")
            parts.append(part)
            count, offset = count - len(part), offset + len(part)
        return b"".join(parts)

    try:
        return _tensor_header.read(size, pread), size
    except Malformed as error:
        raise ValueError(f"{path}: {error}") from None

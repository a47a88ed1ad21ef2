"""The files of a model: found, and their headers read and checked, before any tensor is read."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dmabuf.errors import os_error
from dmabuf.kernel import files as kernel_files
from dmabuf.safetensors.header import LONGEST, Entry, Malformed, parse, parse_object
from dmabuf.safetensors.layout import UNIT
from dmabuf.sizes import round_up

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_START = 64  # bytes that are read first: the length of the header, and enough to know other formats
_OTHERS = (
    (b"PK\3\4", "a zip archive, as torch.save writes; load it with torch.load"),
    (b"\x80", "a pickle, as torch.save writes; load it with torch.load"),
    (b"GGUF", "a GGUF file; use the safetensors files of the model"),
    (b"\x89PNG", "a PNG image"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<", "HTML or XML, perhaps the error page of a download; get the file again"),
)
"""How files begin that are given as safetensors files by mistake."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file, and those of its tensors that are wanted, in the order of their bytes."""

    path: str
    status: os.stat_result
    """Before its header was read."""
    entries: dict[str, Entry]
    digest: bytes
    """Of the header."""

    def check(self, fd: int) -> None:
        """Raise ValueError if the open file is not the one whose header was read, or changed."""
        now, then = os.fstat(fd), self.status
        same = os.path.samestat(now, then) and now.st_mtime_ns == then.st_mtime_ns
        if not same or now.st_size != then.st_size:
            raise ValueError(f"load {self.path}: it changed after its header was read")


def read_parts(
    source: Path | Sequence[Path], tensors: Iterable[str] | None
) -> tuple[list[Part], dict[str, str]]:
    """Return each file with its wanted tensors, and the metadata of all; no file stays open.

    Raises:
        TypeError: `source` is not a path or several.
        ValueError: a file, or the index, is malformed.
        KeyError: no file has a tensor of that name.
        OSError: opening or reading failed.
    """
    if isinstance(tensors, str):
        raise TypeError("tensors must be several names, not one text")
    wanted = None if tensors is None else dict.fromkeys(tensors)
    paths, owner = _paths(source)
    if owner is not None and wanted is not None:
        _check_known(wanted, owner)
        paths = sorted({owner[name] for name in wanted})
    parts: list[Part] = []
    metadata: dict[str, str] = {}
    seen: dict[str, str] = {}
    files = set()
    for path in paths:
        part, about = _read(path)
        number = part.status.st_dev, part.status.st_ino
        if owner is None and number in files:
            continue  # the same file by another path
        files.add(number)
        metadata |= about
        entries = part.entries
        if owner is not None:
            entries = {name: entry for name, entry in entries.items() if owner.get(name) == path}
        for name in entries:
            if seen.setdefault(name, path) != path:
                raise ValueError(f"load: tensor {name!r} is in {seen[name]} and in {path}")
        if wanted is not None:
            entries = {name: entry for name, entry in entries.items() if name in wanted}
        parts.append(replace(part, entries=entries))
    if wanted is not None:
        _check_known(wanted, seen)
    for name, path in (owner or {}).items():
        if path in paths and name not in seen:
            raise ValueError(f"load {path}: it lacks tensor {name!r}, which the index puts there")
    return parts, metadata


def _check_known(wanted: Iterable[str], known: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in known]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise KeyError(f"there is no tensor {missing[0]!r}{more}")


def _paths(source: Path | Sequence[Path]) -> tuple[list[str], dict[str, str] | None]:
    """Return the files, and with an index, the file of each tensor."""
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("load: no files are given")
        return list(dict.fromkeys(map(_path, source))), None
    path = _path(source)
    if os.path.isdir(path):
        index, one = os.path.join(path, _INDEX), os.path.join(path, _ONE)
        path = one if os.path.exists(one) or not os.path.exists(index) else index
    if not path.endswith(".json"):
        return [path], None
    owner = _index(path)
    return sorted(set(owner.values())), owner


def _path(given: object) -> str:
    if not isinstance(given, (str, bytes, os.PathLike)):
        kind = f"{type(given).__module__}.{type(given).__qualname__}"
        raise TypeError(f"load: must be a path or a list of paths, not {kind}")
    if isinstance(given, bytes) and b"\0" in given:
        raise TypeError("load: must be a path or a list of paths, not the bytes of a file")
    return os.fsdecode(given)


def _index(path: str) -> dict[str, str]:
    """Return the file of each tensor, by the index of a sharded model."""
    with open(path, "rb") as file:
        raw = file.read(LONGEST + 1)
    try:
        if len(raw) > LONGEST:
            raise Malformed(f"an index has at most {LONGEST} bytes")
        found = parse_object(raw, "the index").get("weight_map")
        if not isinstance(found, dict) or not found:
            raise Malformed("the index has no weight_map, which names the file of each tensor")
        for name, shard in found.items():
            beside = isinstance(shard, str) and os.path.basename(shard) == shard
            if not beside or "\0" in shard or shard in ("", ".", ".."):
                raise Malformed(f"tensor {name!r} is in {shard!r}, which is not a file beside it")
    except Malformed as error:
        raise ValueError(f"load {path}: {error}") from None
    folder = os.path.dirname(path)
    return {name: os.path.join(folder, shard) for name, shard in found.items()}


def _read(path: str) -> tuple[Part, dict[str, str]]:
    """Return a file with all its tensors, and its metadata."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for its writer
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise os_error(number, "load: it is not a regular file", path)
    size = status.st_size
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # the tensors are not read this way
        was_cached = kernel_files.cached_pages(fd, 0, _START)
        start = os.pread(fd, _START, 0)
        length = int.from_bytes(start[:8], "little")
        fits = len(start) >= 8 and length <= min(size - 8, LONGEST)
        raw = os.pread(fd, length, 8) if fits else b""
        if not was_cached:
            os.posix_fadvise(fd, 0, round_up(8 + len(raw), UNIT), os.POSIX_FADV_DONTNEED)
    try:
        if not fits:
            other = [what for magic, what in _OTHERS if start.startswith(magic)]
            if other and length > LONGEST:
                raise Malformed(f"it is {other[0]}")
            text = f"it has {size} bytes, and its header would have {length} (at most {LONGEST})"
            raise Malformed(f"{text}; get it again")
        entries, metadata = parse(raw, size)
    except Malformed as error:
        raise ValueError(f"load {path}: {error}") from None
    return Part(path, status, entries, hashlib.sha256(raw).digest()), metadata

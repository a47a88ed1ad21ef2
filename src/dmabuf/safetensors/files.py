"""The files of a model: found, and their headers read and checked, before any tensor is read.

A model is a file, several, the index of a sharded one, or a folder that holds one of these under a
name that transformers, diffusers or PEFT give it. A single file may also be open already, or be in
memory. Files of other nodes are named by URLs, and so is an index there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from dmabuf.errors import os_error
from dmabuf.memory import Buffer, allocate
from dmabuf.safetensors.header import LONGEST, Entry, Malformed, parse, parse_object
from dmabuf.safetensors.layout import UNIT
from dmabuf.sizes import round_up
from dmabuf.transfer import Engine, File

if TYPE_CHECKING:
    from dmabuf.remote import RemoteFile

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Bytes = bytes | bytearray | memoryview
Source: TypeAlias = "Path | Sequence[Path] | int | Buffer | Bytes"
"""Where a model is: paths, the descriptor of a file, or the memory that holds one."""

_NODE = "dmabuf://"
_START = 64 << 10  # bytes that are read first: most headers fit
OPEN_AT_ONCE = 16
"""The most files of a model that are open at once."""
_STEMS = (
    "model",
    "diffusion_pytorch_model",
    "adapter_model",
    "pytorch_lora_weights",
    "pytorch_model",
    "consolidated",
)
"""How weights are named in a folder, in the order of preference: transformers, diffusers, PEFT."""
_WEIGHTS = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<before>[a-zA-Z]\w*))?(?:-(?P<number>\d{4,})-of-(?P<count>\d{4,}))?"
    r"(?:\.(?P<after>[a-zA-Z]\w*))?\.safetensors(?P<index>\.index(?:\.(?P<of_index>\w+))?\.json)?"
)
_FORMATS = "load it with dmabuf.formats"
_MISFITS = (
    (b"PK\3\4", f"a zip archive, as torch.save and numpy.savez write; {_FORMATS}"),
    (b"\x80", "a pickle, as old versions of torch.save write; load it with torch.load"),
    (b"GGUF", f"a GGUF file; {_FORMATS}"),
    (b"\x93NUMPY", f"a NumPy array; {_FORMATS}"),
    (b"ARROW1", f"an Arrow file; {_FORMATS}"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"\x89PNG", "a PNG image"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<", "HTML or XML, perhaps the error page of a download; get the file again"),
)
"""How files begin that are given as safetensors files by mistake."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file, and those of its tensors that are wanted, in the order of their bytes."""

    path: str
    """Its path, or what to call it in messages."""
    size: int
    """Bytes."""
    entries: dict[str, Entry]
    digest: bytes
    """Of the header."""
    status: os.stat_result | None = None
    """Before its header was read; None for memory."""
    fd: int | None = None
    """The caller's descriptor of it."""
    memory: Buffer | memoryview | None = None
    """What holds it."""
    versions: Mapping[str, tuple[int, int]] | None = None
    """Of a file of other nodes, whose URL is the path: `RemoteFile.versions`; else None."""

    @property
    def identity(self) -> list[object] | None:
        """What changes when the file does; None where it has no path."""
        if self.versions is not None:
            return [self.path, sorted(self.versions.items())]
        if self.status is None or self.fd is not None:
            return None
        about = self.status
        return [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns]

    @contextmanager
    def opened(self, engine: Engine | None) -> Iterator[File | RemoteFile]:
        """Open the file for a block.

        Raises:
            ValueError: it is not the one whose header was read, or it has changed.
            OSError: as `dmabuf.open`, or `dmabuf.remote.connect`.
        """
        if self.versions is not None:
            with _at_a_node(self.path) as there:
                self.check(there)
                yield there
            return
        with File(self.path if self.fd is None else self.fd, engine=engine) as file:
            self.check(file)
            yield file

    @contextmanager
    def reading(self, engine: Engine | None) -> Iterator[File]:
        """Open a file of this machine for a block that reads it.

        Raises as `opened`, also where the file changes meanwhile.
        """
        with self.opened(engine) as file:
            assert isinstance(file, File)
            yield file
            self.check(file)

    def check(self, file: File | RemoteFile) -> None:
        """Raise ValueError if the open file is not the one whose header was read, or changed."""
        if isinstance(file, File):
            now, then = os.fstat(file.fileno()), self.status
            same = (
                then is not None
                and os.path.samestat(now, then)
                and (now.st_mtime_ns, now.st_size) == (then.st_mtime_ns, self.size)
            )
        else:
            old, new = self.versions or {}, file.versions
            both = old.keys() & new.keys()  # a node may have failed since
            same = bool(both) and all(old[node] == new[node] for node in both)
        if not same:
            raise ValueError(f"load {self.path}: it changed after its header was read")


def read_parts(
    source: Source, tensors: Iterable[str] | None, variant: str | None = None
) -> tuple[list[Part], dict[str, str]]:
    """Return each file with its wanted tensors, and the metadata of all; no file stays open.

    Raises:
        TypeError: `source` is not one.
        ValueError: a file, or the index, is malformed.
        KeyError: no file has a tensor of that name.
        OSError: opening or reading failed, or a folder has no weights.
    """
    if isinstance(tensors, str):
        raise TypeError("tensors must be several names, not one text")
    wanted = None if tensors is None else dict.fromkeys(tensors)
    lone = _read_lone(source)
    if lone is not None:
        part, metadata = lone
        if wanted is not None:
            _check_known(wanted, part.entries)
            part = _only(part, wanted)
        return [part], metadata
    paths, owner = _paths(source, variant)
    if owner is not None and wanted is not None:
        _check_known(wanted, owner)
        paths = sorted({owner[name] for name in wanted})
    parts: list[Part] = []
    metadata = {}
    seen: dict[str, str] = {}
    files = set()
    for path in paths:
        part, about = _read(path, None)
        if part.status is not None:
            number = part.status.st_dev, part.status.st_ino
            if owner is None and number in files:
                continue  # the same file by another path
            files.add(number)
        metadata |= about
        if owner is not None:
            part = _only(part, {name for name in part.entries if owner.get(name) == path})
        for name in part.entries:
            if seen.setdefault(name, path) != path:
                raise ValueError(f"load: tensor {name!r} is in {seen[name]} and in {path}")
        parts.append(part if wanted is None else _only(part, wanted))
    if wanted is not None:
        _check_known(wanted, seen)
    for name, path in (owner or {}).items():
        if path in paths and name not in seen:
            raise ValueError(f"load {path}: it lacks tensor {name!r}, which the index puts there")
    return parts, metadata


def files_of(source: Path | Sequence[Path], variant: str | None = None) -> list[str]:
    """Return the files of a model in the order in which `load` reads them: paths, or URLs.

    Args:
        source: paths or URLs, as for `load`.
        variant: as for `load`.

    Raises OSError, TypeError and ValueError, as `load`.
    """
    return _paths(source, variant)[0]


def _only(part: Part, wanted: Iterable[str]) -> Part:
    entries = {name: entry for name, entry in part.entries.items() if name in wanted}
    return replace(part, entries=entries)


def _check_known(wanted: Iterable[str], known: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in known]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise KeyError(f"there is no tensor {missing[0]!r}{more}")


# -- which files


def _paths(source: object, variant: str | None) -> tuple[list[str], dict[str, str] | None]:
    """Return the files, and with an index, the file of each tensor."""
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("load: no files are given")
        return list(dict.fromkeys(map(_path, source))), None
    path = _path(source)
    if os.path.isdir(path):
        paths = _in_folder(path, variant)
        if not paths[0].endswith(".json"):
            return paths, None
        [path] = paths
    if not path.endswith(".json"):
        return [path], None
    owner = read_index(path)
    return sorted(set(owner.values())), owner


def _path(given: object) -> str:
    if not isinstance(given, (str, bytes, os.PathLike)):
        kind = f"{type(given).__module__}.{type(given).__qualname__}"
        raise TypeError(f"load: must be paths, a descriptor, a Buffer or bytes, not {kind}")
    if isinstance(given, bytes) and b"\0" in given:
        raise TypeError("load: must be a path or a list of paths, not the bytes of a file")
    return os.fsdecode(given)


def _in_folder(folder: str, variant: str | None) -> list[str]:
    """Return the file, the index or all shards of the weights of one variant in a folder."""
    found = _weights_in(folder)
    if not found:
        raise os_error(errno.ENOENT, f"load: no safetensors file is in it{_below(folder)}", folder)
    stems = sorted({stem for stem, kind in found if kind == variant})
    if not stems:
        there = ", ".join(sorted({repr(kind) for _, kind in found}))
        text = f"load: it has no weights of variant={variant!r}; the variants there: {there}"
        raise os_error(errno.ENOENT, text, folder)
    known = [stem for stem in _STEMS if stem in stems]
    if not known and len(stems) > 1:
        text = f"load {folder}: it has the weights {_few(stems)}; give the path of one file"
        raise ValueError(text)
    matches = found[(known or stems)[0], variant]
    single = [one for one in matches if not one["index"] and not one["number"]]
    indexes = [one for one in matches if one["index"]]
    if single or indexes:
        return [os.path.join(folder, (single or indexes)[0].string)]
    return [os.path.join(folder, name) for name in _all_shards(folder, matches)]


def _weights_in(folder: str) -> dict[tuple[str, str | None], list[re.Match[str]]]:
    """Return the names of files of weights, by the name they begin with and the variant."""
    found: dict[tuple[str, str | None], list[re.Match[str]]] = {}
    with os.scandir(folder) as entries:
        names = [one.name for one in entries if _WEIGHTS.fullmatch(one.name) and not one.is_dir()]
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            variant = match["of_index"] or match["after"] or match["before"]
            found.setdefault((match["stem"], variant), []).append(match)
    return found


def _below(folder: str) -> str:
    """Return the fix where sub-folders have weights, as those of a diffusers pipeline."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and _weights_in(entry.path):
                names.append(entry.name)
    return f"; its sub-folders {_few(sorted(names))} have some: give the path of one" * bool(names)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _all_shards(folder: str, matches: Sequence[re.Match[str]]) -> list[str]:
    """Return the names of all shards of a model without an index; raise if one is missing."""
    numbers = {int(one["number"]): one for one in matches}
    counts = {int(one["count"]) for one in matches}
    if len(counts) > 1 or len(numbers) < len(matches):
        text = f"load {folder}: it has shards of several models and no index; give the paths"
        raise ValueError(text)
    [count] = counts
    first = 0 if 0 in numbers else 1
    for number in range(first, first + count):
        if number not in numbers:
            one = matches[0]
            width = len(one["number"])
            name = one.string.replace(f"-{one['number']}-", f"-{number:0{width}}-", 1)
            text = f"load: this shard of {count} is missing, and there is no index; get it again"
            raise os_error(errno.ENOENT, text, os.path.join(folder, name))
    return [numbers[number].string for number in sorted(numbers)]


def read_index(path: str) -> dict[str, str]:
    """Return the path of the file of each tensor, by the index of a sharded model.

    Raises:
        ValueError: it is malformed.
        OSError: it cannot be read.
    """
    if path.startswith(_NODE):
        with _at_a_node(path) as there:
            raw = _bytes_of(there, 0, LONGEST + 1)
    else:
        with open(path, "rb") as file:
            raw = file.read(LONGEST + 1)
    try:
        if len(raw) > LONGEST:
            raise Malformed(f"an index has at most {LONGEST} bytes")
        found = parse_object(raw, "the index").get("weight_map")
        if not isinstance(found, dict) or not found:
            raise Malformed("the index has no weight_map, which names the file of each tensor")
        for name, shard in found.items():
            if not isinstance(shard, str) or not _is_below(shard):
                raise Malformed(f"tensor {name!r} is in {shard!r}, which is not a file below it")
    except Malformed as error:
        raise ValueError(f"load {path}: {error}") from None
    folder = os.path.dirname(path)
    return {name: os.path.join(folder, shard) for name, shard in found.items()}


def _is_below(name: str) -> bool:
    """Return whether a name stays in its folder and the folders below it."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


# -- their headers


def _read_lone(source: object) -> tuple[Part, dict[str, str]] | None:
    """Return a file that is open or in memory, and its metadata; None if `source` is paths."""
    if isinstance(source, Buffer):
        return _parse("the buffer", source.size, lambda at, n: source.pread(n, at), memory=source)
    if isinstance(source, (bytearray, memoryview)) or (
        isinstance(source, bytes) and b"\0" in source  # which a file has, and a path cannot
    ):
        view = memoryview(source).cast("B")
        return _parse("the bytes", len(view), lambda at, n: bytes(view[at : at + n]), memory=view)
    if isinstance(source, int) and not isinstance(source, bool):
        return _read(f"descriptor {source}", source)
    return None


def _read(path: str, fd: int | None) -> tuple[Part, dict[str, str]]:
    """Return a file with all its tensors, and its metadata."""
    if fd is None and path.startswith(_NODE):
        return _read_at_a_node(path)
    status = os.stat(path) if fd is None else os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for its writer
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise os_error(number, "load: it is not a regular file", path)
    if fd is None:
        with open(path, "rb", buffering=0) as file:
            return _read_open(path, file.fileno(), status, given=False)
    try:
        return _read_open(path, fd, status, given=True)
    except OSError as error:
        raise os_error(error.errno or errno.EIO, f"load: {error.strerror}", path) from None


@contextmanager
def _at_a_node(url: str) -> Iterator[RemoteFile]:
    from dmabuf.remote import open_url  # which loads ssl

    node, file = open_url(url)
    with node:
        yield file


def _bytes_of(file: RemoteFile, at: int, size: int) -> bytes:
    with allocate(max(size, 1), exporter="memfd") as buffer:
        return buffer.pread(file.read_into(buffer, size, file_offset=at).nbytes, 0)


def _read_at_a_node(url: str) -> tuple[Part, dict[str, str]]:
    """Return a file of another node with all its tensors, and its metadata."""
    with _at_a_node(url) as file:
        versions = file.versions
        part, metadata = _parse(url, file.size, partial(_bytes_of, file))
    return replace(part, versions=versions), metadata


def _read_open(
    path: str, fd: int, status: os.stat_result, *, given: bool
) -> tuple[Part, dict[str, str]]:
    """Return what `_read` does, and leave no pages of the header in the page cache.

    Those that were there before go too: processes that read it at the same time cannot tell.
    """
    if not given:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # the tensors are not read this way
    end = 0

    def read(at: int, size: int) -> bytes:
        nonlocal end
        raw = os.pread(fd, size, at)
        end = at + len(raw)
        return raw

    try:
        return _parse(path, status.st_size, read, status, fd if given else None)
    finally:
        os.posix_fadvise(fd, 0, round_up(end, UNIT), os.POSIX_FADV_DONTNEED)


def _parse(
    path: str,
    size: int,
    read: Callable[[int, int], bytes],
    status: os.stat_result | None = None,
    fd: int | None = None,
    memory: Buffer | memoryview | None = None,
) -> tuple[Part, dict[str, str]]:
    """Return a file, which `read` reads at an offset, with all its tensors, and its metadata."""
    start = read(0, min(size, _START))
    length = int.from_bytes(start[:8], "little")
    fits = len(start) >= 8 and length <= min(size - 8, LONGEST)
    raw = start[8 : 8 + length] if fits else b""
    if fits and len(raw) < length:
        raw += read(len(start), length - len(raw))
    try:
        if not fits:
            other = [what for magic, what in _MISFITS if start.startswith(magic)]
            if other and length > LONGEST:
                raise Malformed(f"it is {other[0]}")
            text = f"it has {size} bytes, and its header would have {length} (at most {LONGEST})"
            raise Malformed(f"{text}; get it again")
        entries, metadata = parse(raw, size, padded=isinstance(memory, Buffer))
    except Malformed as error:
        raise ValueError(f"load {path}: {error}") from None
    digest = hashlib.sha256(raw).digest()
    return Part(path, size, entries, digest, status, fd, memory), metadata

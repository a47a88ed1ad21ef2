"""What replaces files: each must leave the old file or the new one, whatever happens."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import dmabuf
from dmabuf import safetensors as models
from dmabuf.cli import main


def _of_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


class Writer(NamedTuple):
    """Something that replaces a file, or the files of a model. Errors are OSErrors."""

    write: Callable[[Path, bytes], object]
    durable: bool
    """Whether it promises that the new file is on the medium when it returns."""
    read: Callable[[Path], bytes | None] = _of_file
    """Returns the bytes that were written; None if there is no file."""


def _cp(*options: str) -> Callable[[Path, bytes], object]:
    def write(path: Path, data: bytes) -> None:
        source = path.parents[2] / "source"
        source.write_bytes(data)
        if main(["cp", "--quiet", *options, str(source), str(path)]):
            raise OSError("cp failed, and printed why")

    return write


def _write_files(**terms: object) -> Callable[[Path, bytes], object]:
    def write(path: Path, data: bytes) -> None:
        with dmabuf.allocate(len(data)) as buffer:
            buffer.pwrite(data, 0)
            where = [(path, 0, len(data), 0)]
            for outcome in dmabuf.write_files(where, buffer, terms=dmabuf.Terms(**terms)):
                if isinstance(outcome, OSError):
                    raise outcome

    return write


def _tensors(data: bytes) -> dict[str, np.ndarray]:
    whole = np.frombuffer(data, "u1")
    return {"a": whole[: len(data) // 3], "b": whole[len(data) // 3 :]}


def _of_model(path: Path) -> bytes | None:
    try:
        model = models.load(path, framework="np")
    except FileNotFoundError:
        return None
    return model["a"].tobytes() + model["b"].tobytes()


def _save_sharded(path: Path, data: bytes) -> None:
    """Write two shards, or one file where the size is even."""
    size = 1000 if len(data) % 2 else "1GiB"
    models.save_sharded(_tensors(data), path, max_shard_size=size)


WRITERS = {
    "cp": Writer(_cp(), False),
    "cp-sync": Writer(_cp("--sync"), True),
    "cp-buffered": Writer(_cp("--route", "buffered"), False),
    "save": Writer(lambda path, data: models.save(_tensors(data), path), True, _of_model),
    "write_files": Writer(_write_files(), False),
    "save_async": Writer(
        lambda path, data: models.save_async(_tensors(data), path).result(), True, _of_model
    ),
    "write_files-buffered": Writer(_write_files(route="buffered"), False),
    "save_sharded": Writer(_save_sharded, True, _of_model),
    "write_files-sync": Writer(_write_files(sync=True, route="buffered"), True),
}

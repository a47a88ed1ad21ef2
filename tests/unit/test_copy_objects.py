"""copy() from and to Python objects: their own content, position and buffer count."""

import bz2
import errno
import gzip
import io
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import copy
from tests.support import assert_same, pattern, raises_errno

BLOCK = 64 << 10
SIZE = 3 * BLOCK + 123
DATA = pattern(SIZE, 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(DATA)
    return found


class Encrypting(io.RawIOBase):
    """A file whose descriptor carries something else than its content."""

    def __init__(self, path: Path, mode: str) -> None:
        self._file = path.open(mode, buffering=0)

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, view: bytearray) -> int:
        data = self._file.read(min(len(view), 7777))
        view[: len(data)] = encrypted(data)
        return len(data)

    def write(self, view: bytes) -> int:
        return self._file.write(encrypted(bytes(view[:7777])))

    def close(self) -> None:
        self._file.close()
        super().close()


def encrypted(data: bytes) -> bytes:
    return bytes(byte ^ 0x55 for byte in data)


class OnlyRead:
    """The least that a source has."""

    def __init__(self, path: Path, _mode: str) -> None:
        self._file = path.open("rb")

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, 5000))

    def close(self) -> None:
        self._file.close()


class OnlyWrite:
    """The least that a target has: write() returns nothing and takes all."""

    def __init__(self, path: Path, _mode: str) -> None:
        self._file = path.open("wb")

    def write(self, view: bytes) -> None:
        self._file.write(view)

    def close(self) -> None:
        self._file.close()


# How each is opened, and what its file holds of some content.
EITHER: dict[str, tuple[Callable, Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "gzip": (gzip.open, gzip.compress, gzip.decompress),
    "bz2": (bz2.open, bz2.compress, bz2.decompress),
    "encrypting": (Encrypting, encrypted, encrypted),
    "raw": (lambda path, mode: path.open(mode, buffering=0), bytes, bytes),
    "buffered": (lambda path, mode: path.open(mode), bytes, bytes),
}
SOURCES = EITHER | {"only read": (OnlyRead, bytes, bytes)}
TARGETS = EITHER | {"only write": (OnlyWrite, bytes, bytes)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_an_object_gives_and_takes_its_content(source: str, target: str, tmp_path: Path) -> None:
    opened_by, encode, _ = SOURCES[source]
    made_by, _, decode = TARGETS[target]
    (tmp_path / "source").write_bytes(encode(DATA))
    src, dst = opened_by(tmp_path / "source", "rb"), made_by(tmp_path / "target", "wb")
    record = copy(src, dst, block_size=BLOCK, sync=True)
    src.close()
    dst.close()
    assert_same(decode((tmp_path / "target").read_bytes()), DATA, f"{record}")
    assert record.nbytes == SIZE


def test_objects_without_a_descriptor(tmp_path: Path) -> None:
    target = io.BytesIO(b"head")
    target.seek(4)
    assert copy(io.BytesIO(DATA), target, block_size=BLOCK).nbytes == SIZE
    assert_same(target.getvalue(), b"head" + DATA, "the target")
    with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("member", "w") as member:
            copy(io.BytesIO(DATA), member, block_size=BLOCK)
        with dmabuf.allocate(BLOCK) as buffer:
            with archive.open("member") as member:
                copy(member, buffer, size=BLOCK)
            assert_same(buffer.pread(BLOCK, 0), DATA[:BLOCK], "the buffer")


# -- plain files of Python: the position, and what is buffered


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_source_is_read_from_its_position_on(buffering: int, path: Path, tmp_path: Path) -> None:
    with path.open("rb", buffering=buffering) as file:
        assert file.read(1000) == DATA[:1000]
        copy(file, tmp_path / "t", size=50_000, block_size=BLOCK)
        assert file.tell() == 51_000
        assert file.read(10) == DATA[51_000:51_010]
        copy(file, tmp_path / "u", src_offset=5, block_size=BLOCK)
        assert file.read() == b""
    assert_same((tmp_path / "t").read_bytes(), DATA[1000:51_000], "the target")
    assert_same((tmp_path / "u").read_bytes(), DATA[51_015:], "the second target")


@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("mode", ["w+b", "wb", "ab"])
def test_a_target_is_written_at_its_position(
    mode: str, buffering: int, path: Path, tmp_path: Path
) -> None:
    with (tmp_path / "t").open(mode, buffering=buffering) as file:
        file.write(b"head")
        copy(path, file, block_size=BLOCK)
        assert file.tell() == 4 + SIZE
        file.write(b"tail")
    assert_same((tmp_path / "t").read_bytes(), b"head" + DATA + b"tail", "the target")


class Named(io.FileIO):
    """A class that moves bytes as io.FileIO does, like `dmabuf.BufferFile`."""


def test_a_subclass_that_changes_no_transfer_is_plain(path: Path, tmp_path: Path) -> None:
    with Named(path) as source, Named(tmp_path / "t", "w") as target:
        copy(source, target, src_offset=5, dst_offset=3)
        assert (source.tell(), target.tell()) == (SIZE, SIZE - 2)
    assert_same((tmp_path / "t").read_bytes(), bytes(3) + DATA[5:], "the target")


def test_a_source_that_was_just_written(tmp_path: Path) -> None:
    with (tmp_path / "s").open("w+b") as file:
        file.write(DATA)
        file.seek(3)
        copy(file, tmp_path / "t")
    assert_same((tmp_path / "t").read_bytes(), DATA[3:], "the target")


def test_bytes_that_python_has_read_ahead_of_a_pipe(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"a line\nand what follows")
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.readline() == b"a line\n"
        copy(pipe, tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == b"and what follows"


def test_what_python_holds_back_of_a_pipe_comes_first(path: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as found, os.fdopen(write, "wb") as pipe:
        pipe.write(b"head")
        copy(path, pipe, size=1000)
        pipe.write(b"tail")
        pipe.close()
        assert found.read() == b"head" + DATA[:1000] + b"tail"


def test_the_position_after_an_error(path: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(done: int, _total: int | None) -> None:
        raise Stop

    with path.open("rb") as file, (tmp_path / "t").open("wb") as target:
        with pytest.raises(Stop) as caught:
            copy(file, target, progress=progress)
        assert file.tell() == target.tell() == caught.value.nbytes == SIZE


# -- refused


@pytest.mark.parametrize(
    "how", [{"require": "zero-copy"}, {"require": "uncached"}, {"route": "direct"}]
)
def test_an_object_has_no_other_route(how: dict, tmp_path: Path) -> None:
    with pytest.raises(dmabuf.RouteUnavailable, match="BytesIO"):
        copy(io.BytesIO(DATA), tmp_path / "t", **how)
    assert not (tmp_path / "t").exists()


def test_text_files_are_refused(path: Path, tmp_path: Path) -> None:
    with path.open("rb") as source, (tmp_path / "t").open("w") as text:
        with pytest.raises(TypeError, match=r"text.*\.buffer"):
            copy(source, text)
        with pytest.raises(TypeError, match=r"text.*\.buffer"):
            copy(text, path)
    with pytest.raises(TypeError, match="returned str"):
        copy(io.StringIO("text") and Returning("text"), tmp_path / "u")


class Returning:
    def __init__(self, value: object) -> None:
        self._value = value

    def read(self, _size: int) -> object:
        return self._value

    write = read


class Full(io.RawIOBase):
    """It does not block, and takes no bytes now."""

    def write(self, _data: object) -> None:
        return None


def test_objects_that_break_the_protocol(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError):
        copy(Returning(None), tmp_path / "t")
    with raises_errno(errno.EIO, "returned 8388609 bytes"):
        copy(Returning(bytes((8 << 20) + 1)), tmp_path / "t")
    with raises_errno(errno.EAGAIN, "takes no bytes now", nbytes=0):
        copy(path, Full(), block_size=BLOCK)
    for count in (0, SIZE + 1, -1):
        with raises_errno(errno.EIO, "write", nbytes=0):
            copy(path, Returning(count), block_size=BLOCK)


def test_objects_have_no_offsets(path: Path) -> None:
    for how in ({"src_offset": 1}, {"dst_offset": 1}):
        ends = (io.BytesIO(DATA), path) if "src_offset" in how else (path, io.BytesIO())
        with raises_errno(errno.ESPIPE, "no offsets"):
            copy(*ends, **how)


def test_an_object_over_the_target_itself(path: Path) -> None:
    packed = gzip.compress(DATA)
    path.write_bytes(packed)
    with gzip.open(path) as source, pytest.raises(OSError, match="the same file"):
        copy(source, path)
    assert path.read_bytes() == packed


def test_an_endless_object(tmp_path: Path) -> None:
    with open("/dev/zero", "rb") as zeros:
        with pytest.raises(ValueError, match="never ends"):
            copy(zeros, tmp_path / "t")
        copy(zeros, tmp_path / "t", size=SIZE)
    assert (tmp_path / "t").read_bytes() == bytes(SIZE)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_file_of_a_socket(sockets: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    ours, theirs = sockets
    theirs.sendall(b"a line\nand what follows")
    theirs.shutdown(socket.SHUT_WR)
    with ours.makefile("rwb") as file:
        assert file.readline() == b"a line\n"
        copy(file, tmp_path / "t")
        assert (tmp_path / "t").read_bytes() == b"and what follows"
        copy(tmp_path / "t", file)
        file.flush()
    assert theirs.recv(99) == b"and what follows"


def test_a_temporary_file(path: Path) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"head")
        copy(path, file)
        file.seek(0)
        assert_same(file.read(), b"head" + DATA, "the target")

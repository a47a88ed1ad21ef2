"""copy() refuses what would lose something, before anything is touched."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.pipeline import copy
from tests.support import assert_same, pattern

BLOCK = 64 << 10
SIZE = 40 * BLOCK
DATA = pattern(SIZE, 3)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("way", ["path", "dots", "link", "symlink", "descriptor", "file"])
def test_source_and_target_the_same_file(way: str, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    if way == "link":
        os.link(source, other)
    elif way == "symlink":
        other.symlink_to(source)
    with source.open("r+b") as file, dmabuf.open(source, "r+") as ours:
        target = {
            "path": source,
            "dots": tmp_path / ".." / tmp_path.name / source.name,
            "link": other,
            "symlink": other,
            "descriptor": file,
            "file": ours,
        }[way]
        with pytest.raises(OSError, match="the same file") as caught:
            copy(source, target)
    assert caught.value.errno == errno.EINVAL
    assert_same(source.read_bytes(), DATA, "the source")


def test_source_and_target_the_same_memory() -> None:
    with dmabuf.allocate("64KiB") as buffer:
        with pytest.raises(OSError, match="the same memory"):
            copy(buffer, buffer)
        with dmabuf.allocate("64KiB") as other:
            assert copy(buffer, other).nbytes == buffer.size
        halves = buffer.open(size=4096), buffer.open(offset=4096, size=4096)
        buffer.pwrite(b"x" * 4096, 0)
        copy(*halves)
        assert buffer.pread(4096, 4096) == b"x" * 4096


def test_source_and_target_the_same_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    keep = os.open(tmp_path / "f", os.O_RDWR)
    with pytest.raises(OSError, match="the same file"):
        copy(tmp_path / "f", tmp_path / "f")
    os.close(keep)


@pytest.mark.parametrize("device", ["zero", "full", "urandom", "random"])
def test_what_never_ends(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never ends: say how much"):
        copy(f"/dev/{device}", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert copy(f"/dev/{device}", tmp_path / "x", size=5000).nbytes == 5000
    assert (tmp_path / "x").stat().st_size == 5000


REFUSED: dict[str, tuple[Callable[[Path], tuple[object, object]], type, str]] = {
    "missing": (lambda p: (p / "none", p / "t"), FileNotFoundError, "No such file"),
    "directory": (lambda p: (p, p / "t"), IsADirectoryError, "a directory has no bytes"),
    "into a directory": (lambda p: (p / "source", p), IsADirectoryError, "Is a directory"),
    "no directory": (lambda p: (p / "source", p / "no" / "t"), FileNotFoundError, "No such file"),
    "long name": (lambda p: (p / "source", p / ("n" * 300)), OSError, "File name too long"),
    "bad descriptor": (lambda p: (12345, p / "t"), OSError, "descriptor 12345: Bad file"),
    "negative": (lambda p: (-1, p / "t"), OSError, "descriptor -1"),
    "huge": (lambda p: (2**70, p / "t"), OSError, "Bad file descriptor"),
    "no file": (lambda p: (1.5, p / "t"), TypeError, "not float"),
    "bool": (lambda p: (True, p / "t"), TypeError, "not bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, source: Path, tmp_path: Path) -> None:
    ends, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        copy(*ends(tmp_path))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": -1}, {"size": "x"}, {"src_offset": -1}, {"dst_offset": 1 << 63},
        {"block_size": 100}, {"block_size": "2GiB"}, {"blocks": 0}, {"require": "speed"},
        {"route": "scenic"}, {"prefer": "blue"}, {"exporter": "nobody"},
    ],
)  # fmt: skip
def test_bad_arguments_touch_nothing(wrong: dict, source: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"old")
    with pytest.raises(ValueError):
        copy(source, tmp_path / "t", **wrong)
    assert (tmp_path / "t").read_bytes() == b"old"
    with pytest.raises(ValueError):
        copy(source, tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_a_route_that_is_not_to_be_had_touches_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"old")
    read, write = os.pipe()
    os.write(write, b"x")
    os.close(write)
    with pytest.raises(dmabuf.RouteUnavailable):
        copy(read, tmp_path / "t", require="zero-copy")
    assert os.read(read, 9) == b"x"
    os.close(read)
    assert (tmp_path / "t").read_bytes() == b"old"


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("size", [BLOCK + 1, 4 * BLOCK + 1, SIZE - 1])
def test_a_last_piece_without_a_route_is_refused_before_the_first(
    size: int, blocks: int, source: Path, tmp_path: Path
) -> None:
    """A few bytes hold no whole block, and so small blocks leave nothing to make them more."""
    (tmp_path / "t").write_bytes(b"old")
    how = {"size": size, "block_size": 4096, "blocks": blocks}
    with pytest.raises(dmabuf.RouteUnavailable, match="holds no whole page"):
        copy(source, tmp_path / "t", require="uncached", **how)
    assert (tmp_path / "t").read_bytes() == b"old"
    assert copy(source, tmp_path / "t", **how).nbytes == size
    assert_same((tmp_path / "t").read_bytes(), DATA[:size], "the copy")


def test_more_than_a_buffer_holds(source: Path) -> None:
    with dmabuf.allocate(BLOCK) as buffer:
        with pytest.raises(OSError, match="do not fit") as caught:
            copy(source, buffer)
        assert caught.value.errno == errno.ENOSPC
        assert buffer.pread(BLOCK, 0) == bytes(BLOCK)
        copy(source, buffer, size=BLOCK)
        assert_same(buffer.pread(BLOCK, 0), DATA[:BLOCK], "the buffer")


def test_a_stream_into_a_buffer_stops_when_it_is_full() -> None:
    read, write = os.pipe()
    os.write(write, DATA[:5000])
    with dmabuf.allocate(4096) as buffer:
        assert copy(read, buffer).nbytes == 4096
        assert buffer.pread(4096, 0) == DATA[:4096]
    assert os.read(read, 9999) == DATA[4096:5000]
    os.close(read)
    os.close(write)


def test_streams_have_no_offsets(tmp_path: Path) -> None:
    read, write = os.pipe()
    for arguments in ({"src_offset": 1}, {}):
        src, dst = (read, tmp_path / "t") if arguments else (tmp_path / "s", write)
        (tmp_path / "s").write_bytes(b"x")
        with pytest.raises(OSError, match="no offsets") as caught:
            copy(src, dst, **(arguments or {"dst_offset": 1}))
        assert caught.value.errno == errno.ESPIPE
    os.close(read)
    os.close(write)
    assert not (tmp_path / "t").exists()

"""copy() when something goes wrong: refused before anything changes, or stopped in order."""

import array
import errno
import fcntl
import itertools
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import copy
from tests.guards import needs
from tests.support import assert_same, in_child, loop_device, pattern, raises_errno

BLOCK = 64 << 10
SIZE = 40 * BLOCK
DATA = pattern(SIZE, 3)


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.write_bytes(b"old")
    return path


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for fd in (read, write):
        os.close(fd)


# -- refused before anything changes


@pytest.mark.parametrize("way", ["path", "dots", "link", "symlink", "descriptor", "file"])
def test_source_and_target_the_same_file(way: str, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    if way == "link":
        os.link(source, other)
    elif way == "symlink":
        other.symlink_to(source)
    with source.open("r+b") as file, dmabuf.open(source, "r+") as ours:
        end = {
            "path": source,
            "dots": tmp_path / ".." / tmp_path.name / source.name,
            "link": other,
            "symlink": other,
            "descriptor": file,
            "file": ours,
        }[way]
        with pytest.raises(OSError, match="the same file") as caught:
            copy(source, end)
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
def test_an_endless_source(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never ends: limit it with size"):
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
def test_bad_arguments_change_nothing(
    wrong: dict, source: Path, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError):
        copy(source, target, **wrong)
    assert target.read_bytes() == b"old"
    with pytest.raises(ValueError):
        copy(source, tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_a_route_that_is_refused_changes_nothing(target: Path, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    with pytest.raises(dmabuf.RouteUnavailable):
        copy(pipe[0], target, require="zero-copy")
    assert os.read(pipe[0], 9) == b"x"
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("size", [BLOCK + 1, 4 * BLOCK + 1, SIZE - 1])
def test_a_last_piece_without_a_route_is_refused_before_the_first(
    size: int, blocks: int, source: Path, target: Path
) -> None:
    """A few bytes hold no whole block, and small blocks leave nothing to make them more."""
    how = {"size": size, "block_size": 4096, "blocks": blocks}
    with pytest.raises(dmabuf.RouteUnavailable, match="holds no whole page"):
        copy(source, target, require="uncached", **how)
    assert target.read_bytes() == b"old"
    assert copy(source, target, **how).nbytes == size
    assert_same(target.read_bytes(), DATA[:size], "the copy")


def test_an_end_that_is_closed_or_begins_past_its_end(source: Path, tmp_path: Path) -> None:
    with dmabuf.allocate(BLOCK) as buffer:
        for how in ((buffer, tmp_path / "t"), (source, buffer)):
            side = "src_offset" if how[0] is buffer else "dst_offset"
            with pytest.raises(ValueError, match=f"past the end of the buffer at {BLOCK}"):
                copy(*how, **{side: BLOCK + 1})
    for how in ((buffer, tmp_path / "t"), (source, buffer)):
        with pytest.raises(dmabuf.ClosedError, match="buffer or window to copy is closed"):
            copy(*how)
    assert not (tmp_path / "t").exists()


@needs("loop")
def test_more_than_a_device_holds(source: Path, tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", SIZE) as device:
        with raises_errno(errno.ENOSPC, f"{SIZE} bytes do not fit into the {SIZE - 512}"):
            copy(source, device, dst_offset=512)
        assert_same(Path(device).read_bytes(), bytes(SIZE), "the device")


def test_a_reader_s_thread_that_cannot_be_started(
    target: Path, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        copy(pipe[0], target)


def test_more_than_a_buffer_holds(source: Path) -> None:
    with dmabuf.allocate(BLOCK) as buffer:
        with raises_errno(errno.ENOSPC, "do not fit"):
            copy(source, buffer)
        assert buffer.pread(BLOCK, 0) == bytes(BLOCK)
        copy(source, buffer, size=BLOCK)
        assert_same(buffer.pread(BLOCK, 0), DATA[:BLOCK], "the buffer")


def test_streams_have_no_offsets(source: Path, target: Path, pipe: tuple[int, int]) -> None:
    for src, dst, how in (
        (pipe[0], target, {"src_offset": 1}),
        (source, pipe[1], {"dst_offset": 1}),
    ):
        with raises_errno(errno.ESPIPE, "no offsets"):
            copy(src, dst, **how)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_sockets_that_keep_messages_are_refused(kind: int, source: Path, target: Path) -> None:
    """A block would end in the middle of a message, whose rest the kernel drops."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        theirs.send(b"a message")
        for ends in ((ours, target), (source, ours)):
            with raises_errno(errno.EPROTOTYPE, "messages of this socket"):
                copy(*ends)
        assert ours.recv(99) == b"a message"
    assert target.read_bytes() == b"old"


def test_a_listening_socket_is_refused(source: Path, target: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        for ends in ((listening, target), (source, listening)):
            with pytest.raises(OSError, match="a listening socket has no bytes"):
                copy(*ends)
    assert target.read_bytes() == b"old"


# -- the source changes during the copy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time flies, so progress is called after each block."""
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))


def once(act: Callable[[], object]) -> Callable[..., None]:
    """A progress function that acts after the first block."""
    calls: list[object] = []

    def progress(*now: object) -> None:
        calls.append(now)
        if len(calls) == 1:
            act()

    return progress


def test_a_source_that_shrinks(source: Path, target: Path, impatient: None) -> None:
    shrink = once(lambda: os.truncate(source, BLOCK + 5))
    with pytest.raises(dmabuf.ShortReadError, match=f"shrank.* it ends at {BLOCK + 5}") as caught:
        copy(source, target, block_size=BLOCK, progress=shrink)
    found = target.read_bytes()
    assert len(found) == caught.value.nbytes < SIZE
    assert_same(found, DATA[: len(found)], "what was copied before")


@pytest.mark.parametrize("into", ["file", "buffer"])
def test_a_source_that_is_truncated_and_grows_again(
    into: str, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read ends early, and when the size is looked at it is the old one."""
    read = dmabuf.File.read_into

    def truncating(self: dmabuf.File, *arguments: object, **how: object) -> dmabuf.Transfer:
        os.truncate(source, BLOCK // 2)
        try:
            return read(self, *arguments, **how)
        finally:
            os.truncate(source, SIZE)

    monkeypatch.setattr(dmabuf.File, "read_into", truncating)
    with dmabuf.allocate(SIZE) as buffer:
        end = target if into == "file" else buffer
        with pytest.raises(dmabuf.ShortReadError, match="changed while it was copied") as caught:
            copy(source, end, block_size=BLOCK)
    assert caught.value.nbytes == BLOCK // 2
    if into == "file":
        assert_same(target.read_bytes(), DATA[: BLOCK // 2], "what was copied before")


def test_a_source_that_grows(source: Path, target: Path, impatient: None) -> None:
    grow = once(lambda: os.truncate(source, 2 * SIZE))
    copy(source, target, block_size=BLOCK, progress=grow)
    assert_same(target.read_bytes(), DATA, "what was there when it began")


# -- errors in the middle


class Boom(Exception):
    pass


def boom(*_now: object) -> None:
    raise Boom


@pytest.mark.parametrize("sync", [False, True])
def test_progress_that_raises_stops_the_copy(
    sync: bool, source: Path, target: Path, impatient: None
) -> None:
    with pytest.raises(Boom) as caught:
        copy(source, target, block_size=BLOCK, progress=boom, sync=sync)
    assert caught.value.nbytes == BLOCK
    assert_same(target.read_bytes(), DATA[:BLOCK], "the block before")


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that were flushed."""
    sizes: list[int] = []
    fdatasync = os.fdatasync

    def watched(fd: int) -> None:
        sizes.append(os.fstat(fd).st_size)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", watched)
    return sizes


def test_progress_that_raises_at_the_end_leaves_a_whole_copy(
    source: Path, target: Path, flushed: list[int]
) -> None:
    with pytest.raises(Boom) as caught:
        copy(source, target, progress=boom, sync=True)
    assert caught.value.nbytes == SIZE
    assert flushed == [SIZE]
    assert_same(target.read_bytes(), DATA, "the target")


def failing(method: Callable, after: int, whole: int) -> Callable:
    """A transfer that fails with EIO, `whole` bytes into its call number `after`."""
    calls: list[int] = []

    def transfer(self, buffer, size, **how):
        calls.append(size)
        if len(calls) <= after:
            return method(self, buffer, size, **how)
        if whole:
            method(self, buffer, whole, **how)
        error = OSError(errno.EIO, "a bad sector", "the disk")
        error.nbytes = whole
        raise error

    return transfer


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("direction", ["read_into", "write_from"])
def test_an_error_in_the_middle(
    direction: str, blocks: int, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = getattr(dmabuf.File, direction)
    monkeypatch.setattr(dmabuf.File, direction, failing(method, after=7, whole=8192))
    with raises_errno(errno.EIO, "a bad sector", nbytes=7 * BLOCK + 8192):
        copy(source, target, block_size=BLOCK, blocks=blocks)
    assert_same(target.read_bytes(), DATA[: 7 * BLOCK + 8192], "all that is whole")


def test_an_error_of_a_synced_copy_reports_what_is_on_the_medium(
    source: Path, target: Path, flushed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        dmabuf.File, "write_from", failing(dmabuf.File.write_from, after=2, whole=4096)
    )
    with pytest.raises(OSError, match="a bad sector") as caught:
        copy(source, target, block_size=BLOCK, sync=True)
    assert caught.value.nbytes == 2 * BLOCK + 4096
    assert flushed[-1] == 2 * BLOCK + 4096

    def refused(_fd: int) -> None:
        raise OSError(errno.EIO, "no medium")

    monkeypatch.setattr(os, "fdatasync", refused)
    with pytest.raises(OSError, match="a bad sector") as caught:
        copy(source, target, block_size=BLOCK, sync=True)
    assert caught.value.nbytes == 0
    assert any("no medium" in note for note in caught.value.__notes__)


def test_an_error_while_cutting_back_hides_nothing(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full btrfs, which needs room to cut a file."""
    ftruncate = os.ftruncate

    def refused(fd: int, size: int) -> None:
        if size and os.path.samestat(os.fstat(fd), target.stat()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ftruncate(fd, size)

    monkeypatch.setattr(os, "ftruncate", refused)
    monkeypatch.setattr(
        dmabuf.File, "write_from", failing(dmabuf.File.write_from, after=2, whole=4096)
    )
    with raises_errno(errno.EIO, "a bad sector", nbytes=2 * BLOCK + 4096) as caught:
        copy(source, target, block_size=BLOCK)
    assert any("cutting the file back" in note for note in caught.value.__notes__)


def test_an_error_into_a_buffer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = 3 * (64 << 20)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    read = failing(dmabuf.File.read_into, after=2, whole=4096)
    monkeypatch.setattr(dmabuf.File, "read_into", read)
    with dmabuf.allocate(size) as buffer, pytest.raises(OSError, match="bad sector") as caught:
        copy(tmp_path / "sparse", buffer)
    assert caught.value.nbytes == 2 * (64 << 20) + 4096


def test_a_target_that_leaves_while_the_source_is_silent(pipe: tuple[int, int]) -> None:
    """The thread that waits for the source is woken, and the error is the target's."""
    os.write(pipe[1], b"one word, and then silence")
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(BrokenPipeError):
        copy(pipe[0], ours)


# -- interrupted


def waiting_bytes(fd: int) -> int:
    """Bytes in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("into", ["file", "buffer", "pipe"])
def test_ctrl_c_while_waiting_for_a_stream(
    into: str, blocks: int, target: Path, pipe: tuple[int, int]
) -> None:
    os.write(pipe[1], b"abc")
    over = threading.Event()

    def interrupt() -> None:
        while waiting_bytes(pipe[0]) and not over.is_set():  # until the copy has it
            time.sleep(0.001)
        if not over.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    out = os.pipe()
    try:
        with dmabuf.allocate(BLOCK) as buffer:
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                copy(
                    pipe[0], {"file": target, "buffer": buffer, "pipe": out[1]}[into], blocks=blocks
                )
    finally:
        over.set()
        thread.join()
        for fd in out:
            os.close(fd)


def test_ctrl_c_while_the_target_is_full() -> None:
    """The calling thread is in write(2) to a pipe that nobody empties."""
    code = """
import array, fcntl, os, signal, termios, threading
from dmabuf import copy
read, write = os.pipe()
def interrupt():
    count = array.array("i", [0])
    while count[0] < 65536 and main.is_alive():
        fcntl.ioctl(read, termios.FIONREAD, count)
    os.kill(os.getpid(), signal.SIGINT)
main = threading.main_thread()
threading.Thread(target=interrupt, daemon=True).start()
try:
    copy("/dev/zero", write, size="1GiB")
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
"""
    assert in_child(code).strip() in ("interrupted 1", "interrupted 2")


def test_a_file_size_limit_smaller_than_a_block(source: Path, tmp_path: Path) -> None:
    """Shared memory counts as a file: RLIMIT_FSIZE must not refuse the buffers of a small copy."""
    code = """
import resource, sys
from dmabuf import copy
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
print(copy(sys.stdin.buffer, sys.argv[1]).nbytes)
"""
    with (
        source.open("rb") as data,
        subprocess.Popen(["head", "-c", "550001"], stdin=data, stdout=subprocess.PIPE) as feeder,
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "t"],
            stdin=feeder.stdout, capture_output=True, text=True,
        )  # fmt: skip
    assert (done.stderr, done.stdout) == ("", "550001\n")
    assert_same((tmp_path / "t").read_bytes(), DATA[:550001], "the copy")


def test_a_file_size_limit(source: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk.

    A known size is refused whole, and the file that was made is gone. A stream gets as far as
    whole blocks fit, and the file has exactly those.
    """
    code = """
import os, resource, sys
from dmabuf import copy
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
source, target = sys.argv[1:]
for end in (source, sys.stdin.buffer):
    try:
        copy(end, target, block_size=65536)
    except OSError as error:
        print(error.errno, error.nbytes, os.path.exists(target) and os.path.getsize(target))
"""
    with source.open("rb") as data:
        with subprocess.Popen(["cat"], stdin=data, stdout=subprocess.PIPE) as feeder:
            done = subprocess.run(
                [sys.executable, "-c", code, source, tmp_path / "t"],
                stdin=feeder.stdout, capture_output=True, text=True,
            )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{errno.EFBIG} 0 False", f"{errno.EFBIG} 131072 131072"]
    assert_same((tmp_path / "t").read_bytes(), DATA[:131072], "what fitted")

"""copy(): any source to any target, every byte; sizes, the pool, progress and order."""

import itertools
import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Copy, copy
from dmabuf.copying import Staging
from dmabuf.transfer.plan import ALLOWED
from tests.resources import held
from tests.support import PATIENCE, assert_same, in_the_middle, pattern, poison, together

BLOCK = 64 << 10
SIZE = 3 * BLOCK + 123
DATA = pattern(SIZE, 7)


pytestmark = pytest.mark.usefixtures("leaves_nothing")


# -- any source to any target


class Ends:
    """Makes the ends of a copy, and finds what a target has received."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.path = folder / "source"
        self.path.write_bytes(DATA)
        self.target = folder / "target"
        self.target.write_bytes(poison(2 * SIZE))

    # sources

    def from_path(self) -> object:
        return self.path

    def from_file(self) -> object:
        return self.stack.enter_context(dmabuf.open(self.path))

    def from_descriptor(self) -> object:
        fd = os.open(self.path, os.O_RDONLY)
        self.stack.callback(os.close, fd)
        return fd

    def from_python_file(self) -> object:
        return self.stack.enter_context(self.path.open("rb"))

    def from_buffer(self) -> object:
        buffer = self.stack.enter_context(dmabuf.allocate(SIZE))
        buffer.pwrite(DATA, 0)
        return buffer

    def from_window(self) -> object:
        buffer = self.stack.enter_context(dmabuf.allocate(2 * SIZE))
        buffer.pwrite(DATA, 777)
        return buffer.open(offset=777, size=SIZE)

    def from_pipe(self) -> object:
        read, write = os.pipe()
        self._feed(lambda: os.fdopen(write, "wb"))
        self.stack.callback(os.close, read)
        return read

    def from_fifo(self) -> object:
        path = self.folder / "source.fifo"
        os.mkfifo(path)
        self._feed(lambda: path.open("wb"))
        return path

    def from_socket(self) -> object:
        ours, theirs = socket.socketpair()
        self.stack.enter_context(ours)
        self._feed(lambda: open(theirs.detach(), "wb"))
        return ours

    def _feed(self, opener: Callable[[], object]) -> None:
        def run() -> None:
            with opener() as stream:
                stream.write(DATA)

        thread = threading.Thread(target=run)
        thread.start()
        self.stack.callback(thread.join)

    # targets: the end, and a function that returns its bytes after the copy

    def to_path(self) -> tuple[object, Callable[[], bytes]]:
        return str(self.target), self.target.read_bytes

    def to_new_path(self) -> tuple[object, Callable[[], bytes]]:
        path = self.folder / "new"
        return path, path.read_bytes

    def to_file(self) -> tuple[object, Callable[[], bytes]]:
        file = self.stack.enter_context(dmabuf.open(self.target, "r+"))
        return file, lambda: self._with_tail(self.target.read_bytes())

    def to_descriptor(self) -> tuple[object, Callable[[], bytes]]:
        fd = os.open(self.target, os.O_WRONLY)
        self.stack.callback(os.close, fd)
        return fd, lambda: self._with_tail(self.target.read_bytes())

    def _with_tail(self, found: bytes) -> bytes:
        """A descriptor's file is not emptied: what lies beyond the copy stays."""
        assert_same(found[SIZE:], poison(2 * SIZE)[SIZE:], "beyond the copy")
        return found[:SIZE]

    def to_appending(self) -> tuple[object, Callable[[], bytes]]:
        file = self.stack.enter_context(self.target.open("ab"))
        return file, lambda: self.target.read_bytes()[2 * SIZE :]

    def to_buffer(self) -> tuple[object, Callable[[], bytes]]:
        buffer = self.stack.enter_context(dmabuf.allocate(2 * SIZE))
        buffer.pwrite(poison(2 * SIZE), 0)

        def found() -> bytes:
            rest = buffer.pread(SIZE, SIZE)
            assert_same(rest, poison(2 * SIZE)[SIZE:], "beyond the copy")
            return buffer.pread(SIZE, 0)

        return buffer, found

    def to_window(self) -> tuple[object, Callable[[], bytes]]:
        buffer = self.stack.enter_context(dmabuf.allocate(2 * SIZE))
        return buffer.open(offset=4097, size=SIZE), lambda: buffer.pread(SIZE, 4097)

    def to_pipe(self) -> tuple[object, Callable[[], bytes]]:
        read, write = os.pipe()
        return write, self._drain(os.fdopen(read, "rb"), lambda: os.close(write))

    def to_socket(self) -> tuple[object, Callable[[], bytes]]:
        ours, theirs = socket.socketpair()
        with theirs:
            stream = theirs.makefile("rb")
        return ours, self._drain(stream, ours.close)

    def _drain(self, stream: object, end: Callable[[], object]) -> Callable[[], bytes]:
        parts: list[bytes] = []

        def run() -> None:
            with stream:
                while part := stream.read(1 << 16):
                    parts.append(part)

        thread = threading.Thread(target=run)
        thread.start()

        def found() -> bytes:
            end()
            thread.join()
            return b"".join(parts)

        return found


SOURCES = [name for name in dir(Ends) if name.startswith("from_")]
TARGETS = [name for name in dir(Ends) if name.startswith("to_")]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_any_to_any(source: str, target: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        ends = Ends(tmp_path, stack)
        src = getattr(ends, source)()
        dst, found = getattr(ends, target)()
        # A Buffer is of whole pages: say how much of it is meant.
        size = SIZE if source == "from_buffer" else None
        record = copy(src, dst, size=size, block_size=BLOCK)
        assert_same(found(), DATA, f"{source} {target}: {record}")
        assert record.nbytes == SIZE
        assert record.read is None or record.read.nbytes == SIZE
        assert record.write is None or record.write.nbytes == SIZE
        assert (record.read is None) == (source in ("from_buffer", "from_window"))
        assert (record.write is None) == (target in ("to_buffer", "to_window"))


# -- sizes and routes


SIZES = [0, 1, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5, 5 * BLOCK]


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_pools(size: int, blocks: int, tmp_path: Path) -> None:
    data = pattern(size, size)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(poison(BLOCK))
    record = copy(tmp_path / "a", tmp_path / "b", block_size=BLOCK, blocks=blocks, sync=True)
    assert_same((tmp_path / "b").read_bytes(), data, "the target")
    assert record.nbytes == size
    assert record.allocated <= blocks * BLOCK


def test_the_tail_goes_by_the_route_of_the_rest(tmp_path: Path) -> None:
    """A few bytes alone could not go directly, and require= would refuse them."""
    size = 2 * BLOCK + 5
    (tmp_path / "a").write_bytes(pattern(size, 1))
    with dmabuf.allocate(BLOCK) as buffer, dmabuf.open(tmp_path / "a") as file:
        route = file.plan(buffer).route
        if route not in ALLOWED["zero-copy"]:
            pytest.skip("the temporary folder takes no O_DIRECT: set TMPDIR to a disk")
    record = copy(tmp_path / "a", tmp_path / "b", block_size=BLOCK, require="zero-copy")
    assert_same((tmp_path / "b").read_bytes(), pattern(size, 1), "the target")
    assert record.read.routes == {route: size}
    assert record.write.routes == {route: size}
    assert record.copied < 3 * 4096


def test_offsets_leave_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    (tmp_path / "b").write_bytes(poison(SIZE))
    copy(
        tmp_path / "a", tmp_path / "b", src_offset=1000, dst_offset=5000, size=70_000,
        block_size=BLOCK,
    )  # fmt: skip
    expected = bytearray(poison(SIZE))
    expected[5000:75_000] = DATA[1000:71_000]
    assert_same((tmp_path / "b").read_bytes(), bytes(expected), "the target")


def test_files_without_a_size() -> None:
    with dmabuf.allocate("64KiB") as buffer:
        record = copy("/proc/version", buffer)
        assert buffer.pread(record.nbytes, 0) == Path("/proc/version").read_bytes()
        path = "/sys/kernel/mm/transparent_hugepage/enabled"  # it reports 4096 bytes, and has 23
        if Path(path).exists():
            record = copy(path, buffer)
            assert buffer.pread(record.nbytes, 0) == Path(path).read_bytes()


def test_explicit_engine_stays_in_its_thread(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    with dmabuf.Engine() as engine:
        with (
            dmabuf.open(tmp_path / "a", engine=engine) as src,
            dmabuf.open(tmp_path / "b", "w", engine=engine) as dst,
        ):
            copy(src, dst, block_size=BLOCK)
        assert_same((tmp_path / "b").read_bytes(), DATA, "the target")


# -- the pool


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_pool_is_bounded(blocks: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100 * BLOCK))
    record = copy(tmp_path / "a", tmp_path / "b", block_size=BLOCK, blocks=blocks)
    assert record.allocated == blocks * BLOCK
    assert record.exporter is not None


def test_copies_at_the_same_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    together(lambda number: copy(tmp_path / "a", tmp_path / str(number), block_size=BLOCK), 6)
    for number in range(6):
        assert_same((tmp_path / str(number)).read_bytes(), DATA, str(number))


# -- progress


def test_progress_ends_with_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    calls: list[tuple[int, int | None]] = []
    copy(tmp_path / "a", tmp_path / "b", progress=lambda *now: calls.append(now))
    assert calls[-1] == (SIZE, SIZE)
    read, write = os.pipe()
    os.write(write, b"abc")
    os.close(write)
    copy(read, tmp_path / "b", progress=lambda *now: calls.append(now))
    os.close(read)
    assert calls[-1] == (3, 3)


@pytest.mark.parametrize(("tick", "expected"), [(1.0, 50), (0.04, 17), (0.0, 1)])
def test_progress_is_called_ten_times_a_second(
    tick: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 50 blocks, each of which takes `tick` seconds."""
    (tmp_path / "a").write_bytes(bytes(50 * BLOCK))
    now, write, calls = itertools.count(), dmabuf.File.write_from, []
    seconds = [0.0]

    def slow(*args: object, **how: object) -> dmabuf.Transfer:
        seconds[0] = tick * next(now)
        return write(*args, **how)

    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    monkeypatch.setattr(dmabuf.File, "write_from", slow)
    copy(
        tmp_path / "a",
        tmp_path / "b",
        block_size=BLOCK,
        progress=lambda *now: calls.append(now),
    )
    assert len(calls) == pytest.approx(expected, abs=2)
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {50 * BLOCK}


# -- streams


@pytest.mark.parametrize("size", [1000, 1001, 4096])
def test_packets_of_a_pipe_stay_whole(size: int, tmp_path: Path) -> None:
    """A read that has less room than the packet (O_DIRECT, pipe(2)) loses the rest of it."""
    packets = [pattern(size, number) for number in range(300)]
    read, write = os.pipe2(os.O_DIRECT)

    def send() -> None:
        for packet in packets:
            os.write(write, packet)
        os.close(write)

    thread = threading.Thread(target=send)
    thread.start()
    copy(read, tmp_path / "t", block_size=4096 * 3)
    thread.join()
    os.close(read)
    assert_same((tmp_path / "t").read_bytes(), b"".join(packets), "the packets")


def test_a_stream_into_a_buffer_stops_when_it_is_full() -> None:
    read, write = os.pipe()
    os.write(write, DATA[:5000])
    with dmabuf.allocate(4096) as buffer:
        assert copy(read, buffer).nbytes == 4096
        assert buffer.pread(4096, 0) == DATA[:4096]
    assert os.read(read, 9999) == DATA[4096:5000]
    os.close(read)
    os.close(write)


def test_a_stream_is_passed_on_at_once() -> None:
    """Source and target are one peer, which sends the next bytes after it received the last."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(PATIENCE)
        result: list[Copy] = []
        thread = threading.Thread(target=lambda: result.append(copy(ours, ours)))
        thread.start()
        for number in range(50):
            theirs.sendall(bytes([number]) * 3)
            got = b""
            while len(got) < 3:
                got += theirs.recv(3)
            assert got == bytes([number]) * 3
        theirs.shutdown(socket.SHUT_WR)
        thread.join()
    assert result[0].nbytes == 150


def test_fifos_opened_in_either_order(tmp_path: Path) -> None:
    """The peer opens the target first and the source later: waiting for a writer would hang."""
    source, target = tmp_path / "in", tmp_path / "out"
    os.mkfifo(source)
    os.mkfifo(target)
    got: list[bytes] = []

    def peer() -> None:
        with target.open("rb") as there, source.open("wb", buffering=0) as here:
            here.write(b"question")
            got.append(there.read(8))

    thread = threading.Thread(target=peer)
    thread.start()
    copy(source, target)
    thread.join()
    assert got == [b"question"]


def test_staging_that_is_closed_under_a_read_ends_with_it(source, tmp_path):
    """Memory in no Buffer; the block that is in use goes when the read has ended."""
    stage, got = Staging(block_size=BLOCK), bytearray(poison(3 * BLOCK))
    terms = dmabuf.Terms(timeout=60)  # not by one system call
    before = held()
    with dmabuf.open(source) as file:
        with in_the_middle(1, 0, stage.close):
            assert stage.read(file, memoryview(got), 0, terms) == 3 * BLOCK
        with pytest.raises(dmabuf.ClosedError, match="staging blocks are closed"):
            stage.read(file, memoryview(got), 0)
    assert_same(bytes(got), DATA[: 3 * BLOCK], "the memory")
    assert held() == before


def test_a_pipe_has_no_medium_to_flush_to(source):
    read, write = os.pipe()
    try:
        assert copy(source, write, size=1000, sync=True).nbytes == 1000
        assert_same(os.read(read, SIZE), DATA[:1000], "the pipe")
    finally:
        os.close(read)
        os.close(write)

"""copy(): any end to any other, every byte."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import dmabuf
from dmabuf.pipeline import copy
from tests.support import assert_same, pattern, poison

BLOCK = 64 << 10
SIZE = 3 * BLOCK + 123
DATA = pattern(SIZE, 7)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No copy leaves a thread or descriptor; the suite as a whole is held to mappings, too."""
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before


class Ends:
    """Makes the ends of a copy, and tells what a target has got."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.path = folder / "source"
        self.path.write_bytes(DATA)
        self.target = folder / "target"
        self.target.write_bytes(poison(2 * SIZE))

    # sources

    def from_path(self) -> object:
        return self.path

    def from_bytes_path(self) -> object:
        return os.fsencode(self.path)

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
        self._feed(lambda: theirs.makefile("wb"), also_close=theirs)
        return ours

    def _feed(self, opener: Callable[[], object], also_close: object = None) -> None:
        def run() -> None:
            with opener() as stream:
                stream.write(DATA)
            if also_close is not None:
                also_close.close()

        thread = threading.Thread(target=run)
        thread.start()
        self.stack.callback(thread.join)

    # targets: the end, and what tells its bytes when the copy is over

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

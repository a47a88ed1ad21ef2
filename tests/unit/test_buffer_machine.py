"""A Buffer, its windows and maps against bytes and positions in plain Python."""

import contextlib
import errno
import mmap
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from dmabuf.errors import ClosedError
from dmabuf.kernel import uapi
from dmabuf.memory import allocate, exporters
from tests.support import raises_errno
from tests.unit.fake_kernel import FakeKernel

PAGE = mmap.PAGESIZE
SIZE = 3 * PAGE
OFFSETS = st.one_of(
    st.integers(0, SIZE + 10),
    st.sampled_from([0, PAGE - 1, PAGE, SIZE - 1, SIZE, SIZE + 1, 2**40]),
)
COUNTS = st.one_of(st.integers(0, 3), st.integers(0, 40), st.integers(0, SIZE + 10))
DATA = st.builds(lambda seed, n: bytes((seed + i) % 251 for i in range(n)), st.integers(1), COUNTS)


class Model:
    """A part of a shared bytearray as a file."""

    def __init__(self, memory, start, size):
        self.memory, self.start, self.size, self.position = memory, start, size, 0
        self.end = size  # where reading ends

    def pread(self, count, offset):
        offset = min(offset, self.end)
        count = min(count, self.end - offset)
        return bytes(self.memory[self.start + offset : self.start + offset + count])

    def pwrite(self, data, offset):
        if data and offset + len(data) > self.size:
            return None
        if data:
            self.memory[self.start + offset : self.start + offset + len(data)] = data
            self.end = max(self.end, offset + len(data))
        return len(data)


class BufferMachine(RuleBasedStateMachine):
    """Files are the buffer itself and windows on it, each beside its model."""

    exporter = "memfd"
    files = Bundle("files")

    @initialize(target=files)
    def begin(self):
        self.buffer = allocate(SIZE, exporter=self.exporter)
        assert self.buffer.slabs  # others may write from now on: windows end with the memory
        self.memory = bytearray(SIZE)
        self.held = []
        return self.buffer, Model(self.memory, 0, SIZE)

    @rule(target=files, offset=st.integers(0, SIZE), size=st.none() | st.integers(0, SIZE))
    def window(self, offset, size):
        length = SIZE - offset if size is None else size
        if offset + length > SIZE:
            with pytest.raises(ValueError):
                self.buffer.open(offset=offset, size=size)
            length, offset, size = 0, 0, 0
        return self.buffer.open(offset=offset, size=size), Model(self.memory, offset, length)

    @rule(pair=files, count=COUNTS | st.just(-1))
    def read(self, pair, count):
        file, model = pair
        if file.closed:
            return
        data = file.read(count)
        assert data == model.pread(SIZE if count < 0 else count, model.position)
        model.position += len(data)

    @rule(pair=files, count=COUNTS)
    def readinto(self, pair, count):
        file, model = pair
        if file.closed:
            return
        into = bytearray(b"\xff" * count)
        want = model.pread(count, model.position)
        assert file.readinto(into) == len(want)
        assert into == want + b"\xff" * (count - len(want))
        model.position += len(want)

    @rule(pair=files, data=DATA)
    def write(self, pair, data):
        file, model = pair
        if file.closed:
            return
        count = model.pwrite(data, model.position)
        if count is None:
            with raises_errno(errno.ENOSPC, f"do not fit into the {model.size} bytes"):
                file.write(data)
        else:
            assert file.write(data) == count
            model.position += count

    @rule(pair=files, parts=st.lists(COUNTS, max_size=4), offset=OFFSETS)
    def preadv(self, pair, parts, offset):
        file, model = pair
        if file.closed:
            return
        buffers = [bytearray(b"\xff" * count) for count in parts]
        want = model.pread(sum(parts), offset)
        assert file.preadv(buffers, offset) == len(want)
        assert b"".join(buffers) == want + b"\xff" * (sum(parts) - len(want))
        assert file.pread(sum(parts), offset) == want

    @rule(pair=files, parts=st.lists(DATA, max_size=4), offset=OFFSETS)
    def pwritev(self, pair, parts, offset):
        file, model = pair
        if file.closed:
            return
        count = model.pwrite(b"".join(parts), offset)
        if count is None:
            with raises_errno(errno.ENOSPC, "nothing was written"):
                file.pwritev(parts, offset)
        else:
            assert file.pwritev(parts, offset) == count

    @rule(pair=files, offset=st.integers(-SIZE, SIZE) | OFFSETS, whence=st.integers(0, 2))
    def seek(self, pair, offset, whence):
        file, model = pair
        if file.closed:
            return
        target = offset + (0, model.position, model.end)[whence]
        if target < 0:
            with pytest.raises(ValueError):
                file.seek(offset, whence)
        else:
            assert file.seek(offset, whence) == target
            model.position = target

    @rule(pair=files, size=st.none() | OFFSETS)
    def truncate(self, pair, size):
        file, model = pair
        if file.closed:
            return
        wanted = model.position if size is None else size
        if wanted == model.size or (file is not self.buffer and wanted < model.size):
            assert file.truncate(size) == wanted
            model.end = wanted
        else:
            with raises_errno(errno.EINVAL, f"is fixed at {model.size}"):
                file.truncate(size)

    @rule(offset=st.integers(0, SIZE), data=DATA, keep=st.booleans())
    def map(self, offset, data, keep):
        data = data[: SIZE - offset]
        with self.buffer.map("r+", offset, len(data)) as view:
            assert view == self.memory[offset : offset + len(data)]
            view[:] = data
            self.memory[offset : offset + len(data)] = data
            if keep:
                self.held.append((view[:], offset))

    @rule()
    def release_a_view(self):
        if self.held:
            self.held.pop()[0].release()

    @rule(pair=files)
    def close(self, pair):
        file, _ = pair
        if file is not self.buffer:
            file.close()
            with pytest.raises(ClosedError):
                file.read()
        elif self.held:
            with pytest.raises(BufferError):
                file.close()
            assert not file.closed

    @invariant()
    def everything_is_as_in_the_model(self):
        for view, offset in self.held:
            assert view == self.memory[offset : offset + len(view)]
        assert self.buffer.pread(SIZE, 0) == self.memory

    def teardown(self):
        if not hasattr(self, "buffer"):
            return
        for view, _ in self.held:
            view.release()
        self.buffer.close()


class SlabMachine(BufferMachine):
    """The same over udmabufs of one page each, behind a fake kernel: brackets must balance."""

    exporter = "udmabuf"

    def __init__(self):
        super().__init__()
        self.kernel = FakeKernel()
        self.kernel.limit = PAGE
        self.patches = contextlib.ExitStack()
        patch = self.patches.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(uapi, "ioctl", self.kernel.ioctl)
        patch.setattr(exporters, "UDMABUF", os.devnull)
        patch.setattr(exporters, "UDMABUF_SIZE_LIMIT", "/nonexistent")
        patch.setattr(exporters, "maps_large_pages", lambda: True)

    @invariant()
    def every_start_has_its_end(self):
        open_brackets = []
        for fd, what, how in self.kernel.calls:
            if what == "START":
                open_brackets.append((fd, how))
            else:
                assert open_brackets.pop() == (fd, how)
        assert open_brackets == []
        self.kernel.calls.clear()

    def teardown(self):
        super().teardown()
        self.patches.close()


TestBuffer = BufferMachine.TestCase
TestSlabs = SlabMachine.TestCase
TestBuffer.settings = TestSlabs.settings = settings(max_examples=60, stateful_step_count=30)

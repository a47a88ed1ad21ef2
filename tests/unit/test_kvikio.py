"""dmabuf.compat.kvikio: the calls of KvikIO on host memory of every kind."""

import array
import gc
import os
import signal
import threading

import numpy as np
import pytest

import dmabuf
from dmabuf.compat import kvikio
from tests.guards import problem_with
from tests.support import assert_same, cached, drop_cache, pattern, poison

SIZE = (17 << 20) + 12_345
DATA = pattern(SIZE, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kvikio") / "file"
    path.write_bytes(DATA)
    return path


def by_buffer(size):
    return dmabuf.allocate(size)


def by_array_in_a_buffer(size):
    buffer = dmabuf.allocate(size + 100)
    buffer.closes_unasked = True
    return buffer.asarray("u1", size, 100)


def by_fortran_array(size):
    return np.zeros((size // 5, 5), "u1", order="F")


def by_dlpack(size):
    class Tensor:
        def __init__(self):
            self.values = np.zeros(size, "u1")

        def __dlpack__(self, **how):
            return self.values.__dlpack__(**how)

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

        def tobytes(self):
            return self.values.tobytes()

        def __setitem__(self, key, value):
            self.values[key] = value

    return Tensor()


def by_tensor(size):
    import torch

    return torch.zeros(size, dtype=torch.uint8)


KINDS = [by_buffer, by_array_in_a_buffer, np.zeros, bytearray, by_dlpack]
if problem_with("torch") is None:
    KINDS.append(by_tensor)


def make(kind, size):
    return kind(size, "u1") if kind is np.zeros else kind(size)


def content(memory):
    if isinstance(memory, dmabuf.Buffer):
        return memory.pread(memory.size, 0)
    if hasattr(memory, "numpy"):
        return memory.numpy().tobytes()
    return memory.tobytes() if hasattr(memory, "tobytes") else bytes(memory)


def fill(memory, data):
    if isinstance(memory, dmabuf.Buffer):
        memory.pwrite(data, 0)
    elif hasattr(memory, "numpy"):
        memory.numpy()[:] = np.frombuffer(data, "u1")
    elif isinstance(memory, bytearray):
        memory[:] = data
    else:
        memory[:] = np.frombuffer(data, "u1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "offset"), [(4096, 0), (SIZE, 0), (10_000_001, 4097), (1, 7)])
def test_read(path, kind, size, offset):
    memory = make(kind, -(-size // 4096) * 4096)
    whole = len(content(memory))
    fill(memory, poison(whole))
    with kvikio.CuFile(path) as file:
        future = file.pread(memory, size, offset)
        assert future.get() == size and future.done()
    assert_same(content(memory), DATA[offset : offset + size] + poison(whole)[size:], "read")
    if isinstance(memory, dmabuf.Buffer):
        memory.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "offset"), [(4096, 0), (9_000_000, 0), (300_001, 4097)])
def test_write(tmp_path, kind, size, offset):
    path = tmp_path / "file"
    path.write_bytes(DATA[:100_000])
    memory = make(kind, -(-size // 4096) * 4096)
    fill(memory, poison(len(content(memory))))
    with kvikio.CuFile(path, "r+") as file:
        assert file.pwrite(memory, size, offset).get() == size
    expected = bytearray(DATA[:100_000])
    expected[offset : offset + size] = poison(size)
    assert_same(path.read_bytes(), bytes(expected), "the file")
    if isinstance(memory, dmabuf.Buffer):
        memory.close()


def test_arrays_of_any_order_type_and_shape(tmp_path):
    with kvikio.CuFile(tmp_path / "file", "w+") as file:
        for values in (
            np.arange(20_000, dtype=">i8").reshape(100, 200),
            np.asfortranarray(np.arange(20_000.0).reshape(100, 200)),
            array.array("d", range(20_000)),
        ):
            assert file.write(values) == memoryview(values).nbytes
            back = np.empty_like(values) if isinstance(values, np.ndarray) else values[:]
            assert file.read(back) == memoryview(values).nbytes
            assert np.array_equal(back, values)


@pytest.mark.parametrize("task_size", [1, 199, 5000, 1 << 20, 1 << 30])
def test_every_size_of_tasks(path, task_size):
    into = np.zeros(3_000_001 if task_size > 5000 else 60_001, "u1")
    with kvikio.CuFile(path) as file:
        assert file.read(into, None, 777, task_size) == len(into)
    assert_same(into.tobytes(), DATA[777 : 777 + len(into)], "read")


def test_the_end_of_the_file(path):
    into = np.zeros(20 << 20, "u1")
    with kvikio.CuFile(path) as file:
        assert file.read(into, file_offset=SIZE - 5_000_000) == 5_000_000
        assert into[:5_000_000].tobytes() == DATA[-5_000_000:] and not into[5_000_000:].any()
        assert file.read(into, file_offset=SIZE + 1) == 0
        assert file.read(into[:0]) == 0


def test_raw_calls_have_an_offset_in_the_memory(path, tmp_path):
    into = np.zeros(10_000, "u1")
    with kvikio.CuFile(path) as file:
        assert file.raw_read(into, 100, 5000, 7) == 100
        assert file.raw_read(into, None, 0, 9_000) == 1000
    assert into[7:107].tobytes() == DATA[5000:5100] and not into[107:9000].any()
    with kvikio.CuFile(tmp_path / "file", "w") as file:
        assert file.raw_write(into, 100, 3, 7) == 100
    assert (tmp_path / "file").read_bytes() == bytes(3) + DATA[5000:5100]
    with dmabuf.allocate(8192) as buffer, kvikio.CuFile(path) as file:
        assert file.raw_read(buffer, 10, 20, 8180) == 10
        assert buffer.pread(12, 8180) == DATA[20:30] + bytes(2)


def test_nothing_is_in_the_page_cache(path):
    with path.open("rb") as plain, kvikio.CuFile(path) as file:
        drop_cache(plain.fileno())
        assert file.read(np.zeros(16 << 20, "u1")) == 16 << 20
        assert cached(plain.fileno()) == 0


def test_many_transfers_at_once(path, tmp_path):
    step = 1 << 20
    into = np.zeros(SIZE, "u1")
    with kvikio.CuFile(path) as file:
        futures = [file.pread(into[at : at + step], file_offset=at) for at in range(0, SIZE, step)]
        assert sum(future.get() for future in futures) == SIZE
    assert_same(into.tobytes(), DATA, "read")
    with kvikio.CuFile(tmp_path / "file", "w") as file:
        futures = [
            file.pwrite(into[at : at + step], file_offset=at) for at in range(0, SIZE, step)
        ]  # close() waits for them
    assert all(future.done() for future in futures)
    assert_same((tmp_path / "file").read_bytes(), DATA, "written")


def test_flags(path, tmp_path):
    with kvikio.CuFile(str(path), "rb") as file:
        assert file.open_flags() & os.O_ACCMODE == os.O_RDONLY
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        with pytest.raises(OSError, match=r"not open for writing|Bad file|read"):
            file.write(bytearray(10))
    new = tmp_path / "file"
    with kvikio.CuFile(new, "w+") as file:
        assert file.open_flags() & os.O_ACCMODE == os.O_RDWR
        file.write(b"12345")
    with kvikio.CuFile(new, "w") as file:
        assert not file.closed and new.stat().st_size == 0
    assert file.closed
    with pytest.raises(ValueError, match="closed"):
        file.pread(bytearray(1))
    file.close()
    for flags in ("a", "", "x", "+"):
        with pytest.raises(ValueError, match="flags"):
            kvikio.CuFile(path, flags)
    with pytest.raises(FileNotFoundError):
        kvikio.CuFile(tmp_path / "none")


def test_invalid_memory(path):
    with kvikio.CuFile(path) as file, dmabuf.allocate(4096) as buffer:
        for memory, size, what in (
            (bytearray(10), 11, "more than"),
            (buffer, 4097, "more than"),
            (b"bytes", None, "read-only"),
            (buffer.open("r"), None, "read-only"),
            (np.zeros((10, 10), "u1")[:, :5], None, "contiguous"),
            (bytearray(10), -1, "use 0 or more bytes"),
        ):
            with pytest.raises(ValueError, match=what):
                file.pread(memory, size)
        for memory in (None, 3, "text", [1, 2]):
            with pytest.raises(TypeError):
                file.pread(memory)

        class Cuda:
            __cuda_array_interface__ = None

        with pytest.raises(TypeError, match=r"dmabuf\.devices\.cuda"):
            file.pread(Cuda())
        with pytest.raises(ValueError, match="dev_offset"):
            file.raw_read(bytearray(10), 1, 0, -1)
        with pytest.raises(ValueError, match="file_offset"):
            file.pread(bytearray(10), 1, -1)


def test_an_error_of_a_task_is_raised_by_get(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with kvikio.CuFile(path, "w") as file:
        future = file.pread(bytearray(10))
        with pytest.raises(OSError):
            future.get()
        assert future.done()


def test_after_a_fork_the_child_has_threads_of_its_own(path):
    with kvikio.CuFile(path) as file:
        file.read(bytearray(100))
        child = os.fork()
        if not child:
            signal.alarm(60)
            into = bytearray(1000)
            right = file.read(into) == 1000 and bytes(into) == DATA[:1000]
            os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert threading.active_count() > 1


def test_views_that_an_error_keeps_in_a_cycle_are_collected(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))

    def fail(memory, size=None, flags="r"):
        try:
            with kvikio.CuFile(path, flags) as file:
                file.pread(memory, size).get()
        except (ValueError, OSError) as error:
            kept = error  # in a cycle with this frame
            assert kept

    for _ in range(5):
        fail(memoryview(bytes(10)))
        fail(memoryview(bytearray(10)), 11)
        fail(memoryview(bytearray(5000)), flags="w")
        gc.collect()  # CPython crashes here if one is left

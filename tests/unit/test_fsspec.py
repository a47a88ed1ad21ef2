"""The file systems of fsspec: its own abstract tests, and what is ours."""

import io
import os
import pickle
import random
import resource
import signal

import fsspec
import numpy as np
import pytest
from fsspec.tests import abstract

import dmabuf
import dmabuf.store
from dmabuf.integrations import DirectFileSystem, StoreFileSystem
from tests import serving
from tests.support import assert_same, cached, drop_cache, pattern

SIZE = 300_001
DATA = pattern(SIZE, 1)


@pytest.fixture
def socket(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "sock"
    with serving.in_a_thread(path):
        yield str(path)


@pytest.fixture
def store(socket):
    return StoreFileSystem(socket, skip_instance_cache=True)


@pytest.fixture
def direct():
    return DirectFileSystem(skip_instance_cache=True)


# -- the tests that fsspec has for every file system


class Abstract(
    abstract.AbstractCopyTests,
    abstract.AbstractGetTests,
    abstract.AbstractPutTests,
    abstract.AbstractOpenTests,
    abstract.AbstractPipeTests,
    abstract.AbstractFixtures,
):
    pass


class TestDirectFiles(Abstract):
    @pytest.fixture
    def fs(self):
        return DirectFileSystem(auto_mkdir=True, skip_instance_cache=True)

    @pytest.fixture
    def fs_path(self, tmpdir):
        return str(tmpdir)


class TestStoreFiles(Abstract):
    @pytest.fixture
    def fs(self, store):
        return store

    @pytest.fixture
    def fs_path(self):
        return "some/folder"

    @pytest.fixture
    def supports_empty_directories(self):
        return False


# -- both, and what they have in common


@pytest.fixture(params=["direct", "store"])
def place(request, tmp_path):
    """A file system, and a path in it."""
    fs = request.getfixturevalue(request.param)
    return fs, str(tmp_path / "file") if request.param == "direct" else "file"


def test_the_protocols_are_known_where_the_package_is_installed(tmp_path, socket):
    path = tmp_path / "a file"
    with fsspec.open(f"dmabuf+file://{path}", "wb", skip_instance_cache=True) as file:
        file.write(DATA)
    assert_same(path.read_bytes(), DATA, "the file")
    for slashes in ("/", "//"):
        fs, plain = fsspec.url_to_fs(f"dmabuf+file:{slashes}{path}", skip_instance_cache=True)
        assert (plain, fs.unstrip_protocol(plain)) == (str(path), f"dmabuf+file://{path}")
    with fsspec.open("dmabuf://a/name", "w", socket=socket, skip_instance_cache=True) as file:
        file.write("text")
    with fsspec.open("dmabuf://a/name", "r", socket=socket, skip_instance_cache=True) as file:
        assert file.read() == "text"


def test_what_is_written_is_read(place):
    fs, path = place
    with fs.open(path, "wb") as file:
        assert file.writable() and not file.readable()
        for start in range(0, SIZE, 70_001):
            assert file.write(memoryview(DATA)[start : start + 70_001]) > 0
            assert not fs.exists(path)
        assert file.tell() == SIZE
    assert fs.size(path) == SIZE
    with fs.open(path) as file:
        assert file.readable() and not file.writable() and file.seekable()
        assert_same(file.read(), DATA, "all")
        assert (file.read(), file.tell()) == (b"", SIZE)
        assert file.seek(-5, io.SEEK_END) == SIZE - 5
        assert file.read(10) == DATA[-5:]
        for start, size in ((4095, 2), (0, 1), (131_071, 131_075), (SIZE - 1, 5)):
            into = bytearray(b"\x55" * size)
            file.seek(start)
            got = file.readinto(into)
            expected = DATA[start : start + size]
            assert_same(bytes(into), expected + b"\x55" * (size - got), f"{size} at {start}")
            assert got == len(expected)
    for start, end in ((None, None), (5, 4100), (-100, None), (None, -7), (SIZE, None)):
        assert_same(fs.cat_file(path, start, end), DATA[start:end], f"[{start}:{end}]")


def test_a_file_of_nothing(place):
    fs, path = place
    fs.touch(path)
    assert (fs.size(path), fs.cat_file(path)) == (0, b"")
    assert fs.isfile(path)


def test_get_put_and_copy_keep_every_byte(place, tmp_path):
    fs, path = place
    source, copy, back = tmp_path / "source", path + "2", tmp_path / "back"
    source.write_bytes(DATA)
    fs.put_file(str(source), path)
    fs.cp_file(path, copy)
    fs.get(copy, str(back))
    assert_same(back.read_bytes(), DATA, "the file after put, copy and get")
    into = io.BytesIO()
    fs.get_file(path, into)
    assert_same(into.getvalue(), DATA, "an object")
    fs.mv(copy, path + "3")
    assert fs.cat_file(path + "3") == DATA and not fs.exists(copy)


def test_a_file_that_is_not_finished_does_not_appear(place):
    fs, path = place
    fs.pipe_file(path, b"old")
    with pytest.raises(ZeroDivisionError), fs.open(path, "wb") as file:
        file.write(DATA)
        raise ZeroDivisionError
    assert fs.cat_file(path) == b"old"
    file = fs.open(path, "wb")
    file.write(DATA)
    del file
    assert fs.cat_file(path) == b"old"
    with fs.open(path, "wb") as file:
        file.write(b"new")
        with fs.open(path) as reader:
            assert reader.read() == b"old"
    assert fs.cat_file(path) == b"new"
    with pytest.raises(ValueError, match="closed"):
        file.write(b"more")
    with pytest.raises(ZeroDivisionError), fs.open(path + "x", "xb") as file:
        raise ZeroDivisionError
    assert not fs.exists(path + "x")


def test_a_transaction_commits_all_files_or_none(place):
    fs, path = place
    with fs.transaction:
        for name in (path, path + "2"):
            with fs.open(name, "wb") as file:
                file.write(DATA)
            assert not fs.exists(name)
    assert fs.cat_file(path) == fs.cat_file(path + "2") == DATA
    with pytest.raises(ZeroDivisionError), fs.transaction:
        with fs.open(path, "wb") as file:
            file.write(b"new")
        raise ZeroDivisionError
    assert fs.cat_file(path) == DATA


def test_arrays_of_any_order_and_shape_are_written(place):
    fs, path = place
    arrays = np.zeros((0, 3)), np.arange(6, dtype=">i4").reshape(2, 3), np.float32(1.5)
    with fs.open(path, "wb") as file:
        for array in arrays:
            file.write(array)
    assert fs.cat_file(path) == b"".join(array.tobytes() for array in arrays)
    with pytest.raises(BufferError), fs.open(path, "wb") as file:
        file.write(np.zeros((4, 4))[:, :2])


@pytest.mark.parametrize("mode", ["r+b", "w+b", "q"])
def test_other_modes_are_refused(place, mode):
    fs, path = place
    with pytest.raises(ValueError, match="mode"):
        fs.open(path, mode)
    assert not fs.exists(path)


def test_a_missing_file(place):
    fs, path = place
    with pytest.raises(FileNotFoundError):
        fs.open(path)
    with pytest.raises(FileNotFoundError):
        fs.info(path)
    with pytest.raises(FileNotFoundError):
        fs.rm_file(path)


def test_a_file_system_can_be_sent_to_another_process(place):
    fs, path = place
    fs.pipe_file(path, DATA)
    again = pickle.loads(pickle.dumps(fs))
    assert_same(again.cat_file(path), DATA, "by the copy")
    type(fs).clear_instance_cache()


# -- direct files


def test_nothing_of_a_direct_file_is_in_the_page_cache(direct, tmp_path):
    path = tmp_path / "file"
    data = pattern(20 << 20, 2)
    with direct.open(str(path), "wb") as file:
        file.write(data)
    with path.open("rb") as plain:
        drop_cache(plain.fileno())
        assert_same(direct.cat_file(str(path)), data, "read")
        assert cached(plain.fileno()) == 0
        drop_cache(plain.fileno())
        direct.cp_file(str(path), str(path) + "2")
        assert cached(plain.fileno()) == 0


@pytest.mark.parametrize("block_size", ["4KiB", "64KiB", "8MiB"])
def test_reads_of_every_size_and_order(tmp_path, block_size):
    direct = DirectFileSystem(block_size=block_size, skip_instance_cache=True)
    path = tmp_path / "file"
    data = pattern(5_000_003, 3)
    path.write_bytes(data)
    dice = random.Random(4)
    with direct.open(str(path)) as file:
        for _ in range(300):
            if dice.random() < 0.2:
                file.seek(dice.randrange(len(data)))
            at = file.tell()
            size = dice.choice([1, 100, 4096, 5000, 131_072, 400_000, 1_000_000])
            assert_same(file.read(size), data[at : at + size], f"{size} at {at}")
    with direct.open(str(path)) as file:  # each after the other, to the end
        parts = iter(lambda: file.raw.read(100_000), b"")
        assert_same(b"".join(parts), data, "all")


def test_memory_of_a_buffer_is_read_without_a_copy(tmp_path):
    fs = DirectFileSystem(require="zero-copy", skip_instance_cache=True)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with dmabuf.allocate(1 << 20) as buffer, fs.open(str(path)) as file:
        with pytest.raises(dmabuf.RouteUnavailable, match="in no Buffer"):
            file.read(100)
        buffer.pwrite(b"\x55" * buffer.size, 0)
        array = buffer.asarray("u1", SIZE, 4096)
        file.seek(0)
        assert file.raw.readinto(array) == SIZE
        assert_same(array.tobytes(), DATA, "the array")
        assert buffer.pread(4096, 0) == b"\x55" * 4096
        del array


def test_the_page_cache_can_be_refused(tmp_path):
    fs = DirectFileSystem(require="uncached", skip_instance_cache=True)
    with pytest.raises(dmabuf.RouteUnavailable), fs.open("/proc/self/status") as file:
        file.read()
    path = f"/dev/shm/{tmp_path.name}-{os.getpid()}"
    with pytest.raises(dmabuf.RouteUnavailable):
        fs.pipe_file(path, DATA)
    assert not os.path.exists(path)
    with pytest.raises(ValueError, match="require"):
        DirectFileSystem(require="fast", skip_instance_cache=True)
    with pytest.raises(ValueError, match="block_size"):
        DirectFileSystem(block_size=1000, skip_instance_cache=True)


def test_a_file_that_hides_its_size_is_read_whole(direct):
    with direct.open("/proc/self/status") as file:
        assert file.read().startswith(b"Name:")


def test_a_pipe_is_refused(direct, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    held = os.open(tmp_path / "fifo", os.O_RDWR)
    try:
        with pytest.raises(OSError, match="no offsets"):
            direct.open(str(tmp_path / "fifo"))
    finally:
        os.close(held)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    direct = DirectFileSystem(block_size="64KiB", skip_instance_cache=True)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        file = direct.open(str(path), "wb")
        with pytest.raises(OSError, match="File too large"):
            file.write(bytes(16 << 20))
        with pytest.raises(OSError, match="File too large"):
            file.write(b"more")
        file.close()  # as a program does that ignores the error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


# -- the store


def test_folders_are_what_lies_before_a_slash(store, socket):
    for path in ("a", "b/c", "b/d/e", "/b/f"):
        store.pipe_file(path, path.encode())
    with dmabuf.store.connect(socket) as plain:
        assert [one.name for one in plain.list()] == ["a", "b%2Fc", "b%2Fd%2Fe", "b%2Ff"]
    assert store.ls("", detail=False) == ["a", "b"]
    assert store.ls("dmabuf://b", detail=False) == ["b/c", "b/d", "b/f"]
    assert [one["type"] for one in store.ls("b")] == ["file", "directory", "file"]
    assert store.find("b") == ["b/c", "b/d/e", "b/f"]
    assert store.glob("b/*/e") == ["b/d/e"]
    assert store.isdir("b/d") and not store.isdir("b/c") and store.isfile("b/c")
    with pytest.raises(IsADirectoryError):
        store.rm("b")
    store.mv("b/d", "z", recursive=True)
    assert store.find("") == ["a", "b/c", "b/f", "z/e"]
    store.rm("b", recursive=True)
    assert store.find("") == ["a", "z/e"]
    with pytest.raises(OSError, match="stands for"):
        store.pipe_file("a%2Fb", b"")


def test_a_file_of_the_store_is_its_memory(store, socket):
    store.pipe_file("name", DATA)
    with store.open("name") as file:
        array = np.asarray(file)
    assert_same(array.tobytes(), DATA, "after the file was closed")
    with dmabuf.store.connect(socket) as plain, plain.open("name", "r+") as buffer:
        buffer.pwrite(b"changed", 0)
    assert array[:7].tobytes() == b"changed"
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    info = store.info("name")
    assert (info["size"], info["mode"], info["type"]) == (SIZE, 0o600, "file")
    assert store.created("name") <= store.modified("name")


def test_append(store):
    with store.open("name", "ab") as file:
        file.write(b"one")
    with store.open("name", "ab") as file:
        assert file.tell() == 3
        file.write(b"two")
    assert store.cat_file("name") == b"onetwo"


def test_a_name_that_another_program_takes_meanwhile_is_kept(store):
    file = store.open("name", "xb")
    file.write(b"ours")
    store.pipe_file("name", b"theirs")
    with pytest.raises(FileExistsError):
        file.close()
    assert store.cat_file("name") == b"theirs"


def test_a_store_without_room(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "sock"
    with serving.in_a_thread(path, 1 << 20):
        store = StoreFileSystem(str(path), skip_instance_cache=True)
        store.pipe_file("old", b"old")
        file = store.open("old", "wb")
        file.write(bytes(2 << 20))
        with pytest.raises(OSError, match=r"space|memory|full"):
            file.close()
        assert store.cat_file("old") == b"old"
        assert store.find("") == ["old"]


def test_without_a_store(tmp_path):
    store = StoreFileSystem(str(tmp_path / "none"), skip_instance_cache=True)
    with pytest.raises(FileNotFoundError, match="dmabuf serve"):
        store.ls("")

"""read_files and write_files, in the calling thread and in event loops: many files in one call."""

import _thread
import contextlib
import errno
import os
import signal
import stat
import time

import pytest

import dmabuf
from dmabuf import aio
from dmabuf.transfer import Terms
from tests.guards import needs
from tests.support import assert_same, let_go, pattern, poison, run

SIZE = 64 << 10


@pytest.fixture(params=["blocking", "asyncio", "trio"])
def many(request):
    """The two functions, each called to its end."""
    if request.param == "blocking":
        return dmabuf
    import anyio

    class Many:
        def __getattr__(self, name):
            function = getattr(aio, name)

            def call(*arguments, **keywords):
                async def main():
                    return await function(*arguments, **keywords)

                return anyio.run(main, backend=request.param)

            return call

    return Many()


@pytest.fixture
def files(tmp_path):
    """Paths of 40 files, and their bytes."""
    made = {}
    for index in range(40):
        path = tmp_path / f"in-{index}"
        made[path] = pattern(SIZE - 13 * (index % 3), index)
        path.write_bytes(made[path])
    return made


@pytest.fixture
def buffer():
    with dmabuf.allocate(41 * SIZE) as buffer:
        with buffer.map("w") as view:
            view[:] = poison(len(view))
        yield buffer


@contextlib.contextmanager
def small_disk(folder):
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
    try:
        yield
    finally:
        let_go(lambda: run("umount", folder))


def open_files():
    """The files that are open, without the rings of the default engine."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.exists(link)]
    return sorted(name for name in names if name.startswith("/"))


def content(buffer, start=0, size=None):
    with buffer.map("r", start, size) as view:
        return bytes(view)


@pytest.mark.parametrize("queue_depth", [1, 7, 64])
@pytest.mark.parametrize("terms", [None, Terms(route="staged"), Terms(route="buffered")])
def test_every_byte_is_read_to_its_place(many, files, buffer, queue_depth, terms):
    records = [(path, 0, SIZE, index * SIZE) for index, path in enumerate(files)]
    calls = []
    done = many.read_files(
        records,
        buffer,
        queue_depth=queue_depth,
        terms=terms,
        progress=lambda *sums: calls.append(sums),
    )
    assert calls[-1] == (sum(len(data) for data in files.values()),) * 2
    expected = bytearray(poison(buffer.size))
    for index, (record, data) in enumerate(zip(done, files.values(), strict=True)):
        assert record.nbytes == len(data)
        expected[index * SIZE : index * SIZE + len(data)] = data
    assert_same(content(buffer), bytes(expected), "the buffer")


def test_offsets_and_sizes_of_any_kind(many, files, buffer):
    path, data = next(iter(files.items()))
    done = many.read_files([dmabuf.FileRange(path, 5, "1KiB", 3)], buffer)
    assert done[0].nbytes == 1024
    poisoned = poison(buffer.size)
    assert_same(content(buffer), poisoned[:3] + data[5:1029] + poisoned[1027:], "the buffer")


def test_the_error_of_one_file_is_its_result(many, files, buffer, tmp_path):
    path, data = next(iter(files.items()))
    missing, folder = tmp_path / "missing", tmp_path / "folder"
    folder.mkdir()
    records = [(missing, 0, 1, 0), (path, 0, len(data), SIZE), (folder, 0, 1, 0)]
    none, read, directory = many.read_files(records, buffer)
    assert isinstance(none, FileNotFoundError) and none.filename == str(missing)
    assert isinstance(directory, IsADirectoryError) and directory.filename == str(folder)
    assert read.nbytes == len(data)
    assert_same(content(buffer, 0, SIZE), poison(buffer.size)[:SIZE], "the buffer before")
    assert_same(content(buffer, SIZE, len(data)), data, "the file")


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (("new", 0, 1, 41 * SIZE), ValueError),
        (("new", 2**63 - 1, 1, 0), ValueError),
        (("new", -1, 1, 0), ValueError),
        (("new\0", 0, 1, 0), ValueError),
        (("new", 0, 1), TypeError),
        ((3, 0, 1, 0), TypeError),
    ],
)
def test_wrong_arguments_touch_nothing(many, files, buffer, tmp_path, record, error):
    good = (next(iter(files)), 0, SIZE, 0)
    with pytest.raises(error):
        many.read_files([good, record], buffer)
    assert_same(content(buffer), poison(buffer.size), "the buffer")
    os.chdir(tmp_path)
    with pytest.raises(error):
        many.write_files([("good", 0, SIZE, 0), record], buffer)
    for given, how in ((bytearray(SIZE), {}), (buffer, {"queue_depth": 0})):
        with pytest.raises((TypeError, ValueError), match=r"Buffer is needed|from 1 to"):
            many.write_files([("good", 0, SIZE, 0)], given, **how)
    assert not os.path.exists("good") and not os.path.exists("new")


def test_one_path_is_written_once(many, buffer, tmp_path):
    with pytest.raises(ValueError, match="the same file"):
        many.write_files([(tmp_path / "a", 0, 1, 0), (f"{tmp_path}/./a", 0, 1, 1)], buffer)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("terms", [None, Terms(sync=True)])
def test_every_byte_is_written(many, buffer, tmp_path, terms):
    data = pattern(buffer.size, 9)
    with buffer.map("w") as view:
        view[:] = data
    old = tmp_path / "out-3"
    old.write_bytes(b"old" * SIZE)
    old.chmod(0o640)
    records = [
        (tmp_path / f"out-{index}", 7 * (index % 2), SIZE - index, index * SIZE + index % 3)
        for index in range(40)
    ]
    calls = []
    done = many.write_files(records, buffer, terms=terms, progress=lambda *sums: calls.append(sums))
    assert calls[-1] == (sum(size for _, _, size, _ in records),) * 2
    for record, (path, offset, size, start) in zip(done, records, strict=True):
        assert record.nbytes == size
        assert_same(path.read_bytes(), bytes(offset) + data[start : start + size], str(path))
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert len(os.listdir(tmp_path)) == 40


@needs("root")
def test_a_file_that_cannot_be_whole_stays_as_it_was(many, buffer, tmp_path):
    """On a disk of 1 MiB that is full, the files that fit are written, and the old one stays."""
    with small_disk(tmp_path):
        (tmp_path / "old").write_bytes(b"old")
        records = [
            (tmp_path / "old", 0, 32 * SIZE, 0),
            (tmp_path / "new", 0, SIZE, 0),
            (tmp_path / "large", 0, 33 * SIZE, 0),
        ]
        old, new, large = many.write_files(records, buffer, queue_depth=1)
        assert old.errno == large.errno == 28 and old.filename == str(tmp_path / "old")
        assert new.nbytes == SIZE
        assert_same((tmp_path / "new").read_bytes(), content(buffer, 0, SIZE), "new")
        assert (tmp_path / "old").read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_what_is_no_regular_file_is_not_written(many, buffer, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    fifo, folder = many.write_files([(tmp_path / "fifo", 0, 1, 0), (tmp_path, 0, 1, 0)], buffer)
    assert fifo.errno == 22 and isinstance(folder, IsADirectoryError)


@pytest.mark.parametrize("verb", ["read_files", "write_files"])
def test_an_interrupt_ends_it_when_the_memory_is_free(buffer, files, tmp_path, verb, monkeypatch):
    """The buffer can be closed at once, no later file is begun, and no file is left half done."""
    opened, real = [], os.open

    def interrupted(path, *arguments, **keywords):
        opened.append(str(path))
        if len(opened) == 11:
            _thread.interrupt_main()
        return real(path, *arguments, **keywords)

    out = tmp_path / "out"
    out.mkdir()
    names = [out / f"{index}" for index in range(2000)]
    names = names if verb == "write_files" else list(files) * 50
    records = [(path, 0, SIZE - 1, index % 40 * SIZE) for index, path in enumerate(names)]
    before = open_files()
    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(dmabuf, verb)(records, buffer, queue_depth=4)
    monkeypatch.undo()
    assert len(opened) < len(records) and open_files() == before
    for path in out.iterdir():
        assert path.stat().st_size == SIZE - 1
    buffer.close()


def test_a_fifo_is_refused_and_not_waited_for(many, buffer, files, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    first = next(iter(files))
    done = many.read_files([(first, 0, 1, 0), (tmp_path / "fifo", 0, 1, 0)] * 2, buffer)
    assert [getattr(one, "errno", None) for one in done] == [None, errno.ESPIPE] * 2


def test_a_read_inside_a_transfer(buffer, files):
    """A signal handler reads files while its thread transfers, whose locks it holds."""
    path, data = next(iter(files.items()))
    done = []

    def handler(_number, _frame):
        done.extend(dmabuf.read_files([(path, 0, SIZE, 0)] * 3, buffer))

    with dmabuf.allocate(SIZE) as other, dmabuf.open(path) as file:
        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            deadline = time.monotonic() + 30
            while not done and time.monotonic() < deadline:
                file.read_into(other, route="staged")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert [one.nbytes for one in done] == [len(data)] * 3

"""What the standard library does with files works on windows and buffers."""

import io
import os
import random
import shutil
import tarfile
import zipfile

import numpy as np
import pytest

import dmabuf
from dmabuf.errors import ClosedError
from dmabuf.memory import Window, allocate
from tests.forking import in_child

SIZE = 1 << 20


@pytest.fixture
def buf():
    with allocate(SIZE, exporter="memfd") as buffer:
        yield buffer


def noise(size, seed=1):
    return random.Random(seed).randbytes(size)


def test_buffered_random_against_bytes_io(buf):
    rng = random.Random(7)
    with io.BufferedRandom(buf.open(size=10_000), buffer_size=256) as file:
        model = io.BytesIO(bytes(10_000))
        for _ in range(3000):
            offset, count = rng.randrange(9000), rng.randrange(1000)
            action = rng.randrange(4)
            if action == 0:
                assert file.seek(offset) == model.seek(offset)
            elif action == 1:
                assert file.read(count) == model.read(count)
            elif action == 2 and model.tell() + count <= 10_000:
                data = rng.randbytes(count)
                assert file.write(data) == model.write(data)
            else:
                assert file.tell() == model.tell()
    assert buf.pread(10_000, 0) == model.getvalue()
    assert buf.pread(100, 10_000) == bytes(100)


def test_buffered_reader_and_writer(buf):
    with io.BufferedWriter(buf.open("w")) as writer:
        for line in range(1000):
            writer.write(b"line %d\n" % line)
        end = writer.tell()
    with io.BufferedReader(buf.open("r", size=end)) as reader:
        assert reader.peek(4)[:4] == b"line"
        assert list(reader) == [b"line %d\n" % line for line in range(1000)]


def test_text(buf):
    with io.TextIOWrapper(io.BufferedRandom(buf.open(size=50)), encoding="utf-8") as text:
        text.write("grüße\n" * 6 + "..")
        text.seek(0)
        assert text.readlines() == ["grüße\n"] * 6 + [".."]
    assert not buf.closed


def test_a_wrapper_over_the_buffer_itself_closes_it():
    with io.BufferedRandom(allocate(4096, exporter="memfd")) as file:
        file.write(b"x")
        raw = file.raw
    assert raw.closed


@pytest.mark.parametrize("length", [0, 1000, 1 << 16])
def test_copyfileobj_both_ways(buf, length):
    data = noise(SIZE)
    shutil.copyfileobj(io.BytesIO(data), buf, length)
    assert buf.pread(SIZE, 0) == data
    buf.seek(0)
    out = io.BytesIO()
    shutil.copyfileobj(buf, out, length)
    assert out.getvalue() == data


def test_copyfileobj_of_too_much_says_so(buf):
    with pytest.raises(OSError, match="do not fit"):
        shutil.copyfileobj(io.BytesIO(bytes(SIZE + 1)), buf)


def test_tarfile(buf, tmp_path):
    (tmp_path / "a").write_bytes(noise(100_000))
    (tmp_path / "b").write_bytes(b"")
    with tarfile.open(fileobj=buf.open(), mode="w") as tar:
        tar.add(tmp_path / "a", "a")
        tar.add(tmp_path / "b", "b")
    with tarfile.open(fileobj=buf.open("r"), mode="r") as tar:
        assert tar.getnames() == ["a", "b"]
        assert tar.extractfile("a").read() == noise(100_000)
    with tarfile.open(fileobj=buf.open("r"), mode="r|") as tar:
        assert [(member.name, member.size) for member in tar] == [("a", 100_000), ("b", 0)]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zipfile(buf, compression):
    window = buf.open()
    with zipfile.ZipFile(window, "w", compression) as archive:
        archive.writestr("one", noise(50_000))
        with archive.open("two", "w") as member:
            member.write(b"two" * 1000)
    with zipfile.ZipFile(buf.open("r", size=window.tell())) as archive:
        assert archive.testzip() is None
        assert archive.read("one") == noise(50_000)
        assert archive.read("two") == b"two" * 1000


def test_what_windows_wrote_has_an_end(buf):
    """As in a file: zipfile looks for its directory from there."""
    for content in (noise(50_000), noise(100)):
        with buf.open() as window, zipfile.ZipFile(window, "w") as archive:
            archive.writestr("one", content)
            window.truncate()
        with zipfile.ZipFile(buf.open(), "a") as archive:
            assert archive.read("one") == content
            archive.writestr("two", noise(10))
        with buf.open() as window, zipfile.ZipFile(window) as archive:
            assert archive.testzip() is None and archive.namelist() == ["one", "two"]
            assert window.seek(0, os.SEEK_END) == window.end < window.size == SIZE
    buf.open().write(b"PK")  # in place, and not the end
    assert buf.open().end == window.end and buf.open(size=SIZE).end == SIZE
    assert buf.open(offset=window.end).end == SIZE - window.end
    with pytest.raises(OSError, match="cannot truncate"):
        buf.open().truncate(SIZE + 1)


def read_a_file(buffer, path):
    with dmabuf.open(path) as file:
        file.read_into(buffer)


@pytest.mark.parametrize(
    "write",
    [
        lambda buffer, path: buffer.pwrite(b"x", 100),
        lambda buffer, path: buffer.map("w").__enter__(),
        lambda buffer, path: memoryview(buffer).release(),
        lambda buffer, path: buffer.fileno(),
        lambda buffer, path: buffer.slabs,
        lambda buffer, path: (buffer.lend(path), buffer.take_back(path)),
        lambda buffer, path: buffer.asarray(),
        lambda buffer, path: in_child(lambda: None),
        read_a_file,
    ],
)
def test_a_window_ends_with_the_memory_where_others_may_have_written(buf, tmp_path, write):
    (tmp_path / "file").write_bytes(noise(SIZE))
    buf.open().write(b"ten bytes.")
    window = buf.open()
    assert window.read() == b"ten bytes."
    write(buf, tmp_path / "file")
    assert buf.open().end == window.end == SIZE
    buf.open().write(b"x")
    assert len(buf.open().read()) == SIZE


def test_numpy_and_lines(buf):
    with buf.open() as window:
        np.save(window, np.arange(10))
        start = window.tell()
        window.write(b"a\nbc\n\nlast")
    window = buf.open()
    assert np.load(window).tolist() == list(range(10)) and window.tell() == start
    assert window.peek() == b"a\nbc\n\nlast" and window.tell() == start
    assert list(window) == [b"a\n", b"bc\n", b"\n", b"last"] and window.peek() == b""


def test_a_line_takes_few_reads(buf, monkeypatch):
    buf.pwrite(noise(10_000).replace(b"\n", b" ") + b"\n", 0)
    reads, plain = [], Window.pread
    monkeypatch.setattr(Window, "pread", lambda *a: reads.append(a) or plain(*a))
    assert len(buf.open().readline()) == 10_001
    assert len(reads) <= 6


def test_a_buffer_closed_under_a_wrapper_loses_nothing_in_silence(buf):
    file = io.BufferedRandom(buf.open())
    file.write(b"unwritten")
    buf.close()
    with pytest.raises(ClosedError, match="the buffer of this window is closed"):
        file.close()


def test_a_wrapper_goes_to_the_end_and_not_beyond(buf):
    file = io.BufferedRandom(buf.open(size=100))
    file.seek(0, os.SEEK_END)
    file.write(b"x")
    with pytest.raises(OSError, match="nothing was written"):
        file.close()

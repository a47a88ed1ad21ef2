"""What the standard library does with files works on windows and buffers."""

import io
import os
import random
import shutil
import tarfile
import zipfile

import pytest

from dmabuf.errors import ClosedError
from dmabuf.memory import allocate

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

"""`progress=`: called during transfers and at their end, with the bytes moved and their sum."""

import os
from array import array

import anyio
import numpy as np
import pytest

import dmabuf
from dmabuf import aio, safetensors
from dmabuf.transfer import engine
from tests.support import pattern

SIZE = 64 << 20


class Calls(list):
    """What `progress` was called with."""

    def __call__(self, done, total):
        self.append((done, total))


@pytest.fixture
def often(monkeypatch):
    """Slices of a transfer end at once."""
    monkeypatch.setattr(engine, "SLICE_MS", 0)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture(scope="module")
def buf():
    with dmabuf.allocate(SIZE) as buffer:
        yield buffer


ALL = array("Q", [0, SIZE // 2, SIZE // 2, SIZE // 2, 0, SIZE // 2])
TRANSFERS = {
    "read_into": lambda file, buf, calls: file.read_into(buf, progress=calls),
    "staged": lambda file, buf, calls: file.read_into(buf, route="staged", progress=calls),
    "write_from": lambda file, buf, calls: file.write_from(buf, progress=calls),
    "read_segments": lambda file, buf, calls: file.read_segments(buf, ALL, progress=calls),
    "write_segments": lambda file, buf, calls: file.write_segments(buf, ALL, progress=calls),
}


@pytest.mark.parametrize("move", TRANSFERS.values(), ids=TRANSFERS)
def test_a_transfer_reports_on_its_way_and_at_its_end(path, buf, often, move):
    calls = Calls()
    with dmabuf.open(path, "r+") as file:
        assert move(file, buf, calls).nbytes == SIZE
    assert calls[-1] == (SIZE, SIZE) and {total for _, total in calls} == {SIZE}
    assert calls == sorted(calls) and len(calls) > 2


def test_an_exception_of_it_stops_the_transfer(path, buf, often):
    def fail(done, total):
        raise LookupError

    with dmabuf.open(path) as file:
        with pytest.raises(LookupError) as error:
            file.read_into(buf, progress=fail)
        assert error.value.nbytes < SIZE
        with pytest.raises(LookupError) as error:
            file.read_into(buf, 4096, progress=fail)
        assert error.value.nbytes <= 4096  # 0 where it was called on the way
        assert file.read_into(buf).nbytes == SIZE


def test_a_stream_and_the_end_of_a_file_report_what_there_is(tmp_path, buf):
    (tmp_path / "short").write_bytes(b"short")
    read, write = os.pipe()
    os.write(write, b"bytes")
    os.close(write)
    for source in (tmp_path / "short", read):
        calls = Calls()
        with dmabuf.open(source) as file:
            file.read_into(buf, 100, progress=calls)
        assert calls[-1] == (5, 5)
    os.close(read)


def test_in_an_event_loop_the_end_is_reported(path, buf):
    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, 4096, progress=calls)
            await file.read_segments(buf, ALL, progress=calls)

    calls = Calls()
    anyio.run(main)
    assert calls == [(4096, 4096), (SIZE, SIZE)]


@pytest.mark.parametrize("queue_depth", [1, 4])
def test_many_files_report_their_sum(tmp_path, buf, queue_depth):
    ranges = [(tmp_path / str(number), 0, 4096, number * 4096) for number in range(20)]
    for move in (dmabuf.write_files, dmabuf.read_files):
        calls = Calls()
        move(ranges, buf, queue_depth=queue_depth, progress=calls)
        assert calls[-1] == (20 * 4096, 20 * 4096)


def test_many_files_stop_at_an_exception_of_it(tmp_path, buf):
    with pytest.raises(ZeroDivisionError):
        dmabuf.write_files([(tmp_path / "a", 0, 4096, 0)], buf, progress=lambda done, total: 1 // 0)


def test_models_report_all_their_parts(tmp_path, often):
    tensors = {str(n): np.frombuffer(pattern(1 << 20, n), "u1") for n in range(3)}
    with dmabuf.allocate("1MiB") as buffer:
        tensors["in a buffer"] = buffer.asarray()
        calls = Calls()
        path = tmp_path / "model.safetensors"
        safetensors.save(tensors, path, progress=calls)
        size = path.stat().st_size
        assert calls[-1] == (size, size) and calls == sorted(calls)
        tensors.clear()
    calls.clear()
    safetensors.load(path, framework="np", progress=calls)
    done, total = calls[-1]
    assert done == total >= 4 << 20 and calls == sorted(calls)


def test_a_record_is_one_line(path, buf):
    with dmabuf.open(path) as file:
        line = str(file.read_into(buf, 4096))
    assert line.startswith("4,096 bytes ") and " copied by the CPU: " in line
    assert "\n" not in line

"""Lone small requests: what they take, what they leave, and that nothing is closed under them."""

import dataclasses
import os
import signal
import threading
from decimal import Decimal

import pytest

import dmabuf
from dmabuf import ClosedError, Route, aio, audit, lone
from dmabuf._ffi import lib
from dmabuf.engine import NOT_AUDITED
from tests import forking
from tests.support import assert_same, drop_cache, pattern, poison

SIZE = 1 << 20
PAGE = 4096


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE + 100, 1))
    return path


@pytest.fixture
def buf():
    with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        yield buffer


@pytest.fixture
def file(path, buf):
    with dmabuf.open(path, "r+") as file:
        drop_cache(file.fileno())
        file.read_into(buf, 64 << 10)  # it does not go through the cache: O_DIRECT is what it says
        buf.pwrite(poison(SIZE), 0)
        yield file


@pytest.fixture
def long_way(monkeypatch):
    """Counts the transfers that did not go by a lane."""
    taken = []
    real = dmabuf.File._range

    def count(self, *arguments):
        taken.append(arguments)
        return real(self, *arguments)

    monkeypatch.setattr(dmabuf.File, "_range", count)
    return taken


def test_reads_and_writes(file, buf, path, long_way):
    record = file.read_into(buf, PAGE, file_offset=3 * PAGE, buffer_offset=PAGE)
    assert not long_way
    assert (record.nbytes, record.route, record.requests) == (PAGE, Route.DIRECT, 1)
    assert record.rejected == file.plan(buf, size=PAGE).rejected
    assert dataclasses.replace(record) == record  # as made the ordinary way, every field
    with pytest.raises(AttributeError):
        record.nbytes = 0
    data = path.read_bytes()
    expected = poison(SIZE)[:PAGE] + data[3 * PAGE : 4 * PAGE] + poison(SIZE)[2 * PAGE :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")
    del long_way[:]
    file.write_from(buf, 2 * PAGE, file_offset=5 * PAGE, buffer_offset=PAGE)
    assert not long_way
    written = data[: 5 * PAGE] + expected[PAGE : 3 * PAGE] + data[7 * PAGE :]
    assert_same(path.read_bytes(), written, "the file")


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (PAGE - 1, {}),
        (PAGE, {"file_offset": 1}),
        (PAGE, {"buffer_offset": 1}),
        (PAGE, {"file_offset": SIZE}),  # the block that holds the end
        (2 * PAGE, {"file_offset": SIZE - PAGE}),
        (PAGE, {"route": "staged"}),
        (PAGE, {"timeout": 1.0}),
        (PAGE, {"audit": "always"}),
        ("4KiB", {}),
        (None, {"buffer_offset": SIZE - PAGE}),
    ],
)
def test_what_goes_the_long_way(file, buf, path, long_way, size, how):
    record = file.read_into(buf, size, **how)
    assert len(long_way) == 1
    at, start = how.get("file_offset", 0), how.get("buffer_offset", 0)
    data = path.read_bytes()[at : at + record.nbytes]
    assert record.nbytes
    expected = poison(SIZE)[:start] + data + poison(SIZE)[start + len(data) :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")


@pytest.mark.parametrize(
    "arguments",
    [
        (PAGE, {"buffer_offset": SIZE}),
        (PAGE, {"file_offset": -PAGE}),
        (PAGE, {"buffer_offset": -PAGE}),
        (-PAGE, {}),
        (PAGE, {"file_offset": 1 << 64}),
        (PAGE, {"require": "all"}),
        (PAGE, {"timeout": -1}),
    ],
)
def test_bad_input_is_refused_as_ever(file, buf, arguments):
    size, how = arguments
    with pytest.raises(ValueError):
        file.read_into(buf, size, **how)
    assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer")


@pytest.mark.parametrize("asked", ["first", "off"])
def test_the_record_says_why_it_was_not_audited(run, file, buf, path, long_way, asked):
    texts = {"first": NOT_AUDITED, "off": audit.OFF}
    assert file.read_into(buf, PAGE, audit=asked).audited == texts[asked]

    async def main():
        async with await aio.open(path) as other:
            drop_cache(other.fileno())
            await other.read_into(buf, 64 << 10)
            del long_way[:]
            record = await other.read_into(buf, PAGE, audit=asked)
            assert record.audited == texts[asked]

    run(main)
    assert not long_way


@pytest.mark.parametrize("where", ["file_offset", "buffer_offset"])
@pytest.mark.parametrize("number", [0.0, 0.5, b"", [], False, True, Decimal("4096.5")])
def test_what_is_no_number_of_bytes(run, file, buf, path, where, number):
    async def main():
        async with await aio.open(path, "r+") as other:
            drop_cache(other.fileno())
            await other.read_into(buf, 64 << 10)
            buf.pwrite(poison(SIZE), 0)
            for verb in (other.read_into, other.write_from):
                with pytest.raises(TypeError, match=where):
                    await verb(buf, PAGE, **{where: number})

    before = path.read_bytes()
    for verb in (file.read_into, file.write_from):
        with pytest.raises(TypeError, match=where):
            verb(buf, PAGE, **{where: number})
    run(main)
    assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer")
    assert_same(path.read_bytes(), before, "the file")


def test_a_child_of_a_fork_does_not_wait_for_its_parents_threads(file, buf):
    held, done = threading.Event(), threading.Event()

    def hold():
        with file._target._lock:
            held.set()
            assert done.wait(60)

    def child():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        with pytest.raises(ClosedError):
            file.read_into(buf, PAGE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    file._target._closed = True
    try:
        forking.in_child(child)
    finally:
        file._target._closed = False
        done.set()
        thread.join(30)


def test_what_may_not_be_written(path, buf):
    with dmabuf.open(path) as file:
        file.read_into(buf, PAGE)
        with pytest.raises(OSError, match="not open for writing"):
            file.write_from(buf, PAGE)


def test_a_file_that_shrinks_leaves_the_rest_of_the_buffer(file, buf, path):
    os.truncate(path, PAGE + 10)
    assert file.read_into(buf, 2 * PAGE).nbytes == PAGE + 10
    expected = path.read_bytes() + poison(SIZE)[PAGE + 10 :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")


def test_a_lane_is_forgotten_with_its_buffer_or_its_alignment(file, path):
    for _ in range(2 * lone.LANES):
        with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
            file.read_into(buffer, PAGE)
            assert_same(buffer.pread(PAGE, 0), path.read_bytes()[:PAGE], "another's memory")
    assert 0 < len(file._target.lanes) <= lone.LANES
    file._target.rule_out_direct("for a test")
    assert not file._target.lanes


def test_a_buffer_that_could_not_be_closed_keeps_its_lanes(file, buf, long_way):
    with buf.map("r"), pytest.raises(BufferError):
        buf.close()
    file.read_into(buf, PAGE)
    assert not long_way
    buf.close()
    for move in (file.read_into, file.write_from):
        with pytest.raises(ClosedError):
            move(buf, PAGE)


class Paused:
    """Stands in for the core where a lone request is moved, and waits there."""

    def __init__(self, monkeypatch):
        self.inside, self.go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(lone, "lib", self)

    def __getattr__(self, name):
        return getattr(lib, name)

    def dmb_lane_move(self, *arguments):
        self.inside.set()
        assert self.go_on.wait(30)
        return lib.dmb_lane_move(*arguments)


def test_nothing_is_closed_under_a_request(file, buf, path, monkeypatch):
    data, fd = path.read_bytes(), file._target._direct.fd
    file.read_into(buf, PAGE)
    paused, records = Paused(monkeypatch), []
    thread = threading.Thread(
        target=lambda: records.append(file.read_into(buf, PAGE, file_offset=2 * PAGE))
    )
    thread.start()
    assert paused.inside.wait(30)
    with pytest.raises(dmabuf.BusyError):
        buf.close()
    file.close()
    os.fstat(fd)  # its descriptor stays
    with pytest.raises(ClosedError):
        file.read_into(buf, PAGE)
    paused.go_on.set()
    thread.join(30)
    assert records[0].nbytes == PAGE
    assert_same(buf.pread(PAGE, 0), data[2 * PAGE : 3 * PAGE], "the buffer")
    with pytest.raises(OSError):
        os.fstat(fd)
    buf.close()

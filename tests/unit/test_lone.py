"""Small requests: what goes by one system call, what does not, and that nothing is closed under
it."""

import dataclasses
import os
import signal
import threading

import pytest

import dmabuf
from dmabuf import ClosedError, Route
from tests import core, forking
from tests.support import assert_same, drop_cache, pattern, poison

SIZE = 1 << 20
PAGE = 4096
ALONE = "no ring was used: one small request"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE + 100, 1))
    return path


@pytest.fixture
def file(path, buf):
    with dmabuf.open(path, "r+") as file:
        drop_cache(file.fileno())
        file.read_into(buf, 64 << 10)  # it does not go through the cache: O_DIRECT is what it says
        buf.pwrite(poison(SIZE), 0)
        yield file


def test_reads_and_writes(file, buf, path):
    record = file.read_into(buf, PAGE, file_offset=3 * PAGE, buffer_offset=PAGE)
    assert record.registration == ALONE
    assert (record.nbytes, record.route, record.requests) == (PAGE, Route.DIRECT, 1)
    assert record.rejected == file.plan(buf, size=PAGE).rejected
    assert dataclasses.replace(record) == record
    with pytest.raises(AttributeError):
        record.nbytes = 0
    data = path.read_bytes()
    expected = poison(SIZE)[:PAGE] + data[3 * PAGE : 4 * PAGE] + poison(SIZE)[2 * PAGE :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")
    record = file.write_from(buf, 2 * PAGE, file_offset=5 * PAGE, buffer_offset=PAGE)
    assert record.registration == ALONE
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
    ],
)
def test_what_goes_by_a_ring(file, buf, path, size, how):
    record = file.read_into(buf, size, **how)
    assert record.registration != ALONE
    _check_read(record, buf, path, how)


@pytest.mark.parametrize(
    ("size", "how"),
    [
        ("4KiB", {}),
        (None, {"buffer_offset": SIZE - PAGE}),
        (PAGE, {"file_offset": "8KiB", "buffer_offset": "4KiB"}),
    ],
)
def test_sizes_and_offsets_as_text_or_left_out(file, buf, path, size, how):
    record = file.read_into(buf, size, **how)
    at = {"8KiB": 2 * PAGE, "4KiB": PAGE}
    _check_read(record, buf, path, {key: at.get(value, value) for key, value in how.items()})


def _check_read(record, buf, path, how):
    at, start = how.get("file_offset", 0), how.get("buffer_offset", 0)
    data = path.read_bytes()[at : at + record.nbytes]
    assert record.nbytes
    expected = poison(SIZE)[:start] + data + poison(SIZE)[start + len(data) :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")


@pytest.mark.parametrize("asked", ["first", "off"])
def test_the_record_says_why_it_was_not_audited(file, buf, asked):
    by_ring = file.read_into(buf, PAGE, audit=asked, timeout=60)
    assert file.read_into(buf, PAGE, audit=asked).audited == by_ring.audited
    assert "not audited" in by_ring.audited and ("'off'" in by_ring.audited) == (asked == "off")


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


def test_buffers_that_come_and_go(file, path):
    """Each has memory of its own, perhaps where another's was."""
    for _ in range(20):
        with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
            file.read_into(buffer, PAGE)
            assert_same(buffer.pread(PAGE, 0), path.read_bytes()[:PAGE], "another's memory")


def test_a_buffer_that_could_not_be_closed_is_still_used(file, buf):
    with buf.map("r"), pytest.raises(BufferError):
        buf.close()
    assert file.read_into(buf, PAGE).registration == ALONE
    buf.close()
    for move in (file.read_into, file.write_from):
        with pytest.raises(ClosedError):
            move(buf, PAGE)


class Paused:
    """A function of the core that waits where it is called, until it may go on."""

    def __init__(self, monkeypatch, name):
        self.inside, self.go_on = threading.Event(), threading.Event()
        self._real = getattr(core.lib, name)
        monkeypatch.setattr(core.lib, name, self)

    def __call__(self, *arguments):
        self.inside.set()
        assert self.go_on.wait(60)
        return self._real(*arguments)


def descriptors_of(path):
    """The numbers of this process's descriptors of a file."""
    numbers = []
    for name in os.listdir("/proc/self/fd"):
        try:
            numbers += [int(name)] * (os.readlink(f"/proc/self/fd/{name}") == str(path))
        except FileNotFoundError:
            continue
    return numbers


def test_nothing_is_closed_under_a_request(file, buf, path, monkeypatch):
    data, there = path.read_bytes(), descriptors_of(path)
    file.read_into(buf, PAGE)
    paused, records = Paused(monkeypatch, "dmb_job_run_small"), []
    thread = threading.Thread(
        target=lambda: records.append(file.read_into(buf, PAGE, file_offset=2 * PAGE))
    )
    thread.start()
    assert paused.inside.wait(60)
    with pytest.raises(dmabuf.BusyError):
        buf.close()
    file.close()
    assert descriptors_of(path) == there
    with pytest.raises(ClosedError):
        file.read_into(buf, PAGE)
    paused.go_on.set()
    thread.join()
    assert records[0].nbytes == PAGE
    assert_same(buf.pread(PAGE, 0), data[2 * PAGE : 3 * PAGE], "the buffer")
    assert descriptors_of(path) == []
    buf.close()


def test_a_child_of_a_fork_does_not_wait_for_its_parents_threads(path, buf, monkeypatch):
    """One of them is finding out about the file, and holds what a transfer would wait for."""
    paused = Paused(monkeypatch, "dmb_statx_dio")

    def child():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        with pytest.raises(ClosedError):
            file.read_into(buf, PAGE)

    with path.open("rb") as given, dmabuf.open(given.fileno()) as file:
        thread = threading.Thread(target=lambda: file.read_into(buf, PAGE))
        thread.start()
        try:
            assert paused.inside.wait(60)
            forking.in_child(child)
        finally:
            paused.go_on.set()
            thread.join()

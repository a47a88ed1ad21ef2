"""Models of many files: read beside each other on one ring, in order."""

import errno
import itertools
import os
import threading

import anyio
import numpy as np
import pytest
import safetensors.numpy

import dmabuf
from dmabuf import aio
from dmabuf import safetensors as models
from dmabuf._core import lib
from dmabuf.transfer import together
from dmabuf.transfer.engine import Engine
from tests.resources import held
from tests.support import Filter, pattern, poison, raises_errno
from tests.unit.interrupting import Interruptions

pytestmark = pytest.mark.usefixtures("leaves_nothing")

MIB = 1 << 20


def tensor(number, size=40_000):
    return np.frombuffer(pattern(size, number), "<u4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twenty files, of which some are large, and one has no bytes."""
    folder = tmp_path_factory.mktemp("shards")
    paths = []
    for number in range(20):
        value = tensor(number, {3: 3 * MIB, 7: 0, 12: 2 * MIB}.get(number, 40_000))
        paths.append(folder / f"model-{number + 1:05}-of-00020.safetensors")
        safetensors.numpy.save_file({f"{number}": value}, paths[-1])
    return paths


def assert_whole(model):
    assert set(model) == {f"{number}" for number in range(20)}
    for number in range(20):
        size = {3: 3 * MIB, 7: 0, 12: 2 * MIB}.get(number, 40_000)
        assert model[f"{number}"].tobytes() == tensor(number, size).tobytes(), number


@pytest.mark.parametrize("backend", ["auto", "threads"])
@pytest.mark.parametrize("ahead", [0, 1, 64 * MIB])
def test_every_shard_has_its_bytes(shards, monkeypatch, ahead, backend):
    monkeypatch.setattr(together, "AHEAD", ahead)
    if backend == "threads":
        kind = lib.DMB_BACKEND_THREADS
        monkeypatch.setattr(Engine, "_choose_backend", lambda self, backend: kind)
    calls = []
    with dmabuf.allocate(8 * MIB, exporter="memfd") as buffer:
        buffer.pwrite(poison(buffer.size), 0)
        model = models.load(
            shards, framework="np", buffer=buffer, progress=lambda *done: calls.append(done)
        )
        assert_whole(model)
        assert len(model.transfers) == 19
        assert calls[-1] == (sum(one.nbytes for one in model.transfers),) * 2
        assert calls == sorted(calls)
        del model


@pytest.fixture
def open_files(monkeypatch):
    """How many files were open at the begin of each reading."""
    counts, opened = [], set()
    real_open, real_close = dmabuf.File.__init__, dmabuf.File.close

    def begin(self, *arguments, **how):
        real_open(self, *arguments, **how)
        opened.add(id(self))
        counts.append(len(opened))

    def end(self):
        real_close(self)
        opened.discard(id(self))

    monkeypatch.setattr(dmabuf.File, "__init__", begin)
    monkeypatch.setattr(dmabuf.File, "close", end)
    return counts


def test_small_shards_are_open_sixteen_at_once_and_large_ones_two(shards, open_files, monkeypatch):
    models.load(shards, framework="np")
    assert max(open_files) == 16
    open_files.clear()
    monkeypatch.setattr(together, "AHEAD", 1)  # nothing is left of the one before
    models.load(shards, framework="np")
    assert max(open_files) == 1


def test_an_own_engine_reads_one_file_after_the_other(shards, open_files):
    with Engine() as engine:
        assert_whole(models.load(shards, framework="np", engine=engine))
    assert max(open_files) == 1


@pytest.mark.parametrize("number", [0, 3, 11, 19])
def test_a_shard_that_changes_under_way(shards, monkeypatch, number):
    """All others have ended when the error is raised, and their files are closed."""
    real = dmabuf.File.fileno
    path, before = shards[number], held()
    status = path.stat()

    def touch(self):
        if self.name == str(path):
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        return real(self)

    monkeypatch.setattr(dmabuf.File, "fileno", touch)
    with pytest.raises(ValueError, match=f"{path.name}: it changed after its header"):
        models.load(shards, framework="np")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert held() == before


def test_a_read_that_fails_stops_the_others(shards):
    with dmabuf.allocate(8 * MIB, exporter="memfd") as buffer:
        count = itertools.count()
        fail = lambda one: one.result if next(count) < 12 else -errno.EIO  # noqa: E731
        with Filter(fail):
            with pytest.raises(OSError, match="Input/output error") as error:
                models.load(shards, framework="np", buffer=buffer)
        assert error.value.errno == errno.EIO
        assert str(error.value.filename).endswith(".safetensors")
        assert_whole(models.load(shards, framework="np", buffer=buffer))


@pytest.mark.parametrize("what", ["dmb_ring_set_eventfd", "dmb_ring_poll", "eventfd"])
def test_a_ring_that_cannot_be_used(shards, monkeypatch, what):
    def refuse(*_how):
        raise OSError(errno.EIO, "io_uring")

    if what == "eventfd":
        monkeypatch.setattr(os, "eventfd", refuse)
    else:
        monkeypatch.setattr(lib, what, lambda *_: -errno.EIO)
    before = held()
    with raises_errno(errno.EIO, "io_uring"):
        models.load(shards, framework="np")
    assert held() == before
    monkeypatch.undo()
    assert_whole(models.load(shards, framework="np"))


def test_a_load_in_an_event_loop_can_be_cancelled_while_the_disk_is_silent(
    shards, monkeypatch, run
):
    real, silent = lib.dmb_ring_poll, threading.Event()

    def poll(*arguments):
        if threading.current_thread() is threading.main_thread():
            return real(*arguments)
        silent.set()
        return 0

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(aio.call, lambda: models.load(shards, framework="np"))
            while not silent.is_set():
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()

    monkeypatch.setattr(lib, "dmb_ring_poll", poll)
    run(main)


def test_an_exception_of_progress_stops_it(shards):
    def stop(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        models.load(shards, framework="np", progress=stop)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_an_interrupt_at_any_point(shards):
    """Whatever it was in the middle of, nothing is left, and the memory can be used again."""
    with dmabuf.allocate(8 * MIB, exporter="memfd") as buffer:
        with Interruptions((), together) as first:  # up to the engine, whose eventfd is a number
            together.read_together([], buffer, dmabuf.Terms(), at_once=1)
        with Interruptions((), together) as points:
            models.load(shards, framework="np", buffer=buffer)
    before, seen = held(), 0
    for number in range(first.seen, points.seen, (points.seen - first.seen) // 50):
        with dmabuf.allocate(8 * MIB, exporter="memfd") as buffer:
            try:
                with Interruptions({number}, together):
                    models.load(shards, framework="np", buffer=buffer)
            except KeyboardInterrupt:
                seen += 1
            buffer.pwrite(poison(buffer.size), 0)
            assert buffer.pread(buffer.size, 0) == poison(buffer.size)
        assert held() == before
    assert seen > 40

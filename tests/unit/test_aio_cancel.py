"""dmabuf.aio: a transfer that is cancelled, closed or thrown away lets go of its memory in time.

A device that is slow at will is a ring whose rounds are held back: what was submitted before has
not completed as far as the loop can tell, and its memory is not to be touched.
"""

import asyncio
import errno
import functools
import gc
import logging
import os
import random
import signal

import anyio
import pytest

import dmabuf
from dmabuf import BusyError, ClosedError, Engine, _flight, _loop, aio
from dmabuf._ffi import lib
from tests.support import assert_same, pattern, poison

SIZE = 2 << 20  # more than a lane takes
PAGE = 4096


@pytest.fixture(params=["auto", "threads"])
def backend(request, monkeypatch):
    if request.param == "threads":
        monkeypatch.setattr(
            Engine, "_choose_backend", lambda self, asked: int(lib.DMB_BACKEND_THREADS)
        )
    return request.param


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    return path


@pytest.fixture
def buf():
    buffer = dmabuf.allocate(SIZE, exporter="memfd")
    buffer.pwrite(poison(SIZE), 0)
    yield buffer
    buffer.close()


class Slow:
    """The core, with a ring that tells nothing while it is `held`."""

    def __init__(self, real):
        self._real, self.held, self.stopped, self.drained = real, False, 0, 0
        self.rc = 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def dmb_ring_poll(self, *arguments):
        return self.rc if self.held else self._real.dmb_ring_poll(*arguments)

    def dmb_batch_stop(self, batch):
        self.stopped += 1
        self._real.dmb_batch_stop(batch)

    def dmb_batch_drain(self, batch):
        self.drained += 1
        self._real.dmb_batch_drain(batch)

    def dmb_ring_stop_lone(self, ring, tag):
        self.stopped += 1
        return self._real.dmb_ring_stop_lone(ring, tag)

    def dmb_ring_drain_lone(self, ring, tag):
        self.drained += 1
        self._real.dmb_ring_drain_lone(ring, tag)


@pytest.fixture
def device(monkeypatch):
    slow = Slow(_loop.lib)
    monkeypatch.setattr(_loop, "lib", slow)
    monkeypatch.setattr(_flight, "lib", slow)
    return slow


async def ticks(count=10):
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_cancelling_waits_for_the_device_and_not_in_the_loop(run, backend, path, buf, device, size):
    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            device.held, over = True, []

            async def transfer(scope):
                with scope:
                    await file.read_into(buf, size)
                over.append(scope.cancelled_caught)

            async with anyio.create_task_group() as group:
                scope = anyio.CancelScope()
                group.start_soon(transfer, scope)
                await ticks()
                scope.cancel()
                await ticks()  # the loop goes on, and the transfer does not
                assert not over and device.stopped == 1
                with pytest.raises(BusyError):
                    buf.close()
                device.held = False
                file._engine._nudge()
            assert over == [True]
            assert not file._engine.flights and device.drained == 0
            assert (await file.read_into(buf)).nbytes == SIZE
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")

    run(main)


def test_asyncio_s_own_cancel_again_and_again(path, buf, device):
    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            device.held = True
            for size in (PAGE, SIZE):
                task = asyncio.create_task(file.read_into(buf, size))
                await ticks()
                for _ in range(5):
                    task.cancel()
                    await ticks(3)
                    assert not task.done()
                    with pytest.raises(BusyError):
                        buf.close()
                device.held = False
                file._engine._nudge()
                with pytest.raises(asyncio.CancelledError):
                    await task
                device.held = True
            device.held = False

    anyio.run(main, backend="asyncio")


def test_a_call_in_a_thread_is_waited_for_too(run, tmp_path, buf, monkeypatch):
    """A file is not cut back, nor its descriptor closed, beside the fallocate(2) that runs."""
    import threading

    from dmabuf import growth

    entered, go = threading.Event(), threading.Event()

    class Allocating:
        def __getattr__(self, name):
            return getattr(lib, name)

        def dmb_fallocate(self, *arguments):
            entered.set()
            assert go.wait(10)
            return lib.dmb_fallocate(*arguments)

    monkeypatch.setattr(growth, "lib", Allocating())

    async def main():
        over = []

        async def write(scope):
            with scope:
                await file.write_from(buf)
            over.append(scope.cancelled_caught)

        async with await aio.open(tmp_path / "file", "w") as file:
            async with anyio.create_task_group() as group:
                scope = anyio.CancelScope()
                group.start_soon(write, scope)
                await anyio.to_thread.run_sync(entered.wait)
                scope.cancel()
                await ticks()
                assert not over
                go.set()
            assert over == [True] and file.size == 0

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_cancelled_at_any_moment_the_memory_is_left_alone(run, backend, path, seed):
    """The buffer is closed, and so unmapped, right after; another in its place stays untouched."""
    dice = random.Random(seed)

    async def main():
        async with await aio.open(path) as file:
            for round_ in range(60):
                buffer = dmabuf.allocate(SIZE, exporter="memfd")
                buffer.pwrite(poison(SIZE), 0)
                size = dice.choice([PAGE, 5000, 65536, SIZE])
                route = dice.choice([None, "staged", "buffered"])
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as group:
                        for number in range(dice.randint(1, 6)):
                            start = number * PAGE if size < SIZE else 0
                            group.start_soon(
                                functools.partial(
                                    file.read_into,
                                    buffer,
                                    size,
                                    file_offset=start,
                                    buffer_offset=start,
                                    route=route,
                                )
                            )
                        await ticks(dice.randint(0, 6))
                        scope.cancel()
                after = buffer.pread(SIZE, 0)
                old, new = poison(SIZE), path.read_bytes()
                for at in range(0, SIZE, 512):
                    block = after[at : at + 512]
                    if block not in (old[at : at + 512], new[at : at + 512]):
                        mixed = zip(block, old[at:], new[at:], strict=False)
                        assert all(byte in (a, b) for byte, a, b in mixed), (round_, at)
                assert not file._engine.flights
                await ticks(dice.randint(0, 3))
                assert buffer.pread(SIZE, 0) == after, "something was still under way"
                buffer.close()

    run(main)


def test_a_ring_that_cannot_be_driven(run, path, buf, device):
    """All that wait are told, and none leaves before its memory is let go of."""

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            over = []

            async def transfer(size):
                with pytest.raises(OSError, match="driving io_uring") as caught:
                    await file.read_into(buf, size)
                over.append(caught.value.errno)

            async with anyio.create_task_group() as group:
                for size in (PAGE, SIZE, PAGE):
                    group.start_soon(transfer, size)
                device.held = True
                await ticks()
                device.rc = -errno.EBADR
                file._engine._nudge()
                await ticks()
                assert not over
                with pytest.raises(BusyError):
                    buf.close()
                device.held, device.rc = False, 0
                file._engine._nudge()
            assert over == 3 * [errno.EBADR]
            assert (await file.read_into(buf)).nbytes == SIZE

    run(main)


def test_a_cancelled_write_cuts_the_file_back(run, tmp_path, buf, device):
    async def main():
        async with await aio.open(tmp_path / "file", "w") as file:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(file.write_from, buf)
                    while not any(isinstance(f, _flight.BatchFlight) for f in _flights(file)):
                        await ticks(1)
                    scope.cancel()
            whole = (tmp_path / "file").read_bytes()
            assert_same(whole, poison(SIZE)[: len(whole)], "what is whole")

    run(main)


def _flights(file):
    return list(file._engine.flights.values())


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_closing_the_file_ends_its_transfers(run, backend, path, buf, device, size):
    async def main():
        file, other = await aio.open(path), await aio.open(path)
        await file.read_into(buf, PAGE)
        device.held, ends = True, []

        async def transfer(of):
            try:
                ends.append(await of.read_into(buf, size))
            except ClosedError as error:
                ends.append(error)

        async def close():
            await file.aclose()
            ends.append("closed")

        async with anyio.create_task_group() as group:
            group.start_soon(transfer, file)
            group.start_soon(transfer, other)
            await ticks()
            group.start_soon(close)
            await ticks()
            assert file.closed and not ends
            with pytest.raises(ClosedError):
                await file.read_into(buf, size)
            with pytest.raises(BusyError):
                buf.close()
            device.held = False
            file._engine._nudge()
        kinds = [type(end) for end in ends]
        assert kinds.count(ClosedError) == 1 and kinds.count(dmabuf.Transfer) == 1
        assert kinds.index(ClosedError) < kinds.index(str)
        await other.aclose()
        await file.aclose()

    run(main)


def test_closing_ends_what_waits_for_a_peer(run, buf):
    async def main():
        read, write = os.pipe()
        file = await aio.open(read)
        os.close(read)
        async with anyio.create_task_group() as group:

            async def transfer():
                with pytest.raises(ClosedError, match="closed"):
                    await file.read_into(buf)

            group.start_soon(transfer)
            await ticks()
            await file.aclose()
        os.close(write)

    run(main)


def test_closing_the_engine_waits_for_the_device(run, backend, path, buf, device):
    async def main():
        file = await aio.open(path)
        await file.read_into(buf, PAGE)
        device.held = True
        async with anyio.create_task_group() as group:

            async def transfer(size):
                with pytest.raises(ClosedError):
                    await file.read_into(buf, size)

            for size in (PAGE, SIZE, PAGE):
                group.start_soon(transfer, size)
            await ticks()
            file._engine.close()
            assert not file._engine.flights and device.drained == 3
        with pytest.raises(ClosedError, match="engine is closed"):
            await file.read_into(buf, PAGE)
        await file.aclose()
        device.held = False
        async with await aio.open(path) as file:  # and the loop gets another
            assert (await file.read_into(buf)).nbytes == SIZE

    run(main)


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupted_start_leaves_the_one_before_alone(run, path, buf, device, begun):
    """A signal just before, or just after, the core has begun a lone request."""

    def interrupted(*arguments):
        if begun:
            assert start(*arguments) == 0
        raise KeyboardInterrupt

    async def second(file):
        with pytest.raises(KeyboardInterrupt):
            await file.read_into(buf, PAGE, buffer_offset=PAGE)

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            buf.pwrite(poison(SIZE), 0)
            device.held = True
            async with anyio.create_task_group() as group:
                group.start_soon(file.read_into, buf, PAGE)
                await ticks()
                (first,) = _flights(file)
                device.dmb_batch_start_lone = interrupted
                try:
                    group.start_soon(second, file)
                    await ticks()
                    assert _flights(file)[0] is first and not first.done()
                    assert len(_flights(file)) == len(buf._lone) == 1 + begun
                finally:
                    del device.dmb_batch_start_lone
                    device.held = False
                    file._engine._nudge()
        expected = pattern(SIZE, 1)[:PAGE] + poison(SIZE)[PAGE:]
        assert_same(buf.pread(SIZE, 0), expected, "the buffer")

    start = device.dmb_batch_start_lone
    run(main)


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_the_loop_of_another_thread_is_refused(run, path, buf, device, size):
    """While its own has a transfer under way: that one goes on, and the file stays open."""

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            device.held = True

            async def elsewhere():
                for call in (file.read_into(buf, size), file.write_from(buf, size), file.aclose()):
                    with (
                        anyio.fail_after(5),
                        pytest.raises((RuntimeError, OSError), match=r"another thread|not open"),
                    ):
                        await call

            async with anyio.create_task_group() as group:
                group.start_soon(file.read_into, buf, size)
                await ticks()
                try:
                    await anyio.to_thread.run_sync(run, elsewhere)
                    assert len(file._engine.flights) == 1 and not file.closed
                finally:
                    device.held = False
                    file._engine._nudge()
        assert_same(buf.pread(size, 0), pattern(SIZE, 1)[:size], "the buffer")

    run(main)


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_never_awaited_and_thrown_away(run, path, buf, device, size):
    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            buf.pwrite(poison(SIZE), 0)
            never = file.read_into(buf, size)
            with pytest.warns(RuntimeWarning, match="never awaited"):
                del never
                gc.collect()
            assert not file._engine.flights and buf._users + len(buf._lone) == 0

            begun = file.read_into(buf, size)
            begun.send(None)  # up to its first wait
            assert len(file._engine.flights) == 1 and buf._users + len(buf._lone) == 1
            with pytest.raises(BusyError):
                buf.close()
            device.held = True
            begun.close()
            device.held = False
            assert device.drained == 1
            assert not file._engine.flights and buf._users + len(buf._lone) == 0
            assert (await file.read_into(buf)).nbytes == SIZE
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")

    run(main)


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_a_loop_that_ends_without_its_tasks(path, buf, device, size, caplog):
    """The engine ends with it, once the device is done, and the transfer is told."""
    caplog.set_level(logging.CRITICAL, "asyncio")
    loop = asyncio.new_event_loop()
    kept = []

    async def main():
        kept.append(await aio.open(path))
        await kept[0].read_into(buf, PAGE)
        device.held = True
        kept.append(asyncio.create_task(kept[0].read_into(buf, size)))
        await ticks()

    loop.run_until_complete(main())
    file, task = kept
    with pytest.raises(BusyError):
        buf.close()
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert device.drained == 1 and file._engine.closed
    assert isinstance(task.exception(), ClosedError) and buf._users == 0
    loop.close()
    file._file.close()
    device.held = False


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_ctrl_c(run, path, buf, device, size):
    gc.collect()

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(file.read_into, buf, size)
                await ticks(2)
                device.held = True
                group.start_soon(file.read_into, buf, size)
                await ticks(2)
                try:
                    signal.raise_signal(signal.SIGINT)
                    await ticks(1000)
                finally:
                    device.held = False
                    file._engine._nudge()

    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)) as caught:
        run(main)
    if not isinstance(caught.value, KeyboardInterrupt):
        assert caught.group_contains(KeyboardInterrupt)
    assert buf._users == 0


# -- streams and copies


def test_streams_never_stop_the_loop(run, buf):
    """Blocking descriptors, a peer that is slow, and two transfers on one pipe, in their order."""

    async def main():
        read, write = os.pipe()
        content = pattern(SIZE, 3)
        assert os.get_blocking(read) and os.get_blocking(write)
        async with await aio.open(read) as source, await aio.open(write, "w") as sink:
            os.close(read)
            os.close(write)
            with dmabuf.allocate(SIZE, exporter="memfd") as full:
                full.pwrite(content, 0)
                beats, done = [], []

                async def feed():
                    record = await sink.write_from(full)
                    done.append(record.nbytes)

                async def take(start, size):
                    record = await source.read_into(buf, size, buffer_offset=start)
                    done.append(record.nbytes)

                async with anyio.create_task_group() as group:
                    group.start_soon(feed)
                    for _ in range(50):
                        await ticks(1)
                        beats.append(1)
                    assert not done  # the pipe is full, and the loop goes on
                    group.start_soon(take, 0, SIZE // 2)
                    await ticks(1)
                    group.start_soon(take, SIZE // 2, SIZE - SIZE // 2)
                assert sorted(done) == [SIZE // 2, SIZE - SIZE // 2, SIZE]
            assert_same(buf.pread(SIZE, 0), content, "the buffer")
            with pytest.raises(TimeoutError, match="the peer did nothing") as caught:
                await source.read_into(buf, 10, timeout=0.01)
            assert caught.value.nbytes == 0

    run(main)


def test_copy(run, path, tmp_path):
    calls = []

    async def main():
        record = await aio.copy(path, tmp_path / "out", progress=lambda *now: calls.append(now))
        assert record.nbytes == SIZE
        assert_same((tmp_path / "out").read_bytes(), pattern(SIZE, 1), "the copy")
        with pytest.raises(FileNotFoundError):
            await aio.copy(tmp_path / "nothing", tmp_path / "out")

    run(main)
    assert calls[-1] == (SIZE, SIZE)


def test_a_cancelled_copy_stops_and_cuts_back(run, tmp_path):
    """From a pipe that never ends; the copy has begun when it is cancelled."""
    out = tmp_path / "out"

    async def main():
        read, write = os.pipe()
        os.set_blocking(write, False)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(functools.partial(aio.copy, read, out, block_size="64KiB"))
                while not out.exists() or not out.stat().st_size:
                    try:
                        os.write(write, poison(65536))
                    except BlockingIOError:
                        await anyio.sleep(0.001)
                scope.cancel()
        assert scope.cancelled_caught
        os.close(write)
        os.close(read)
        whole = out.read_bytes()
        assert whole and len(whole) % 65536 == 0
        assert_same(whole, poison(65536) * (len(whole) // 65536), "what is whole")

    run(main)

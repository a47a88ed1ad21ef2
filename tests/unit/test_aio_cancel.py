"""dmabuf.aio: a transfer that is cancelled, closed or thrown away leaves its memory in time.

The device that is slow at will is a ring that reports no completion while it is held: as far as
the loop can tell, the device still has the memory.
"""

import asyncio
import errno
import functools
import gc
import logging
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

import dmabuf
from dmabuf import BusyError, ClosedError, aio
from dmabuf.aio import engine as engine_module
from dmabuf.aio import requests as requests_module
from dmabuf.aio import waiter as waiter_module
from dmabuf.transfer import engine as transfer_engine_module
from dmabuf.transfer import growth, stopping
from tests.support import assert_same, pattern, poison

SIZE = (1 << 20) + (64 << 10)  # more than one small request
PAGE = 4096


class Device:
    """The core, whose rings report nothing while it is held; it counts what is started."""

    def __init__(self, real):
        self._real, self.held, self.error = real, False, 0
        self.started = self.stopped = self.drained = 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def dmb_ring_poll(self, *arguments):
        return self.error if self.held else self._real.dmb_ring_poll(*arguments)

    def dmb_batch_start(self, *arguments):
        self.started += 1
        self._real.dmb_batch_start(*arguments)

    def dmb_job_start_small(self, *arguments):
        rc = self._real.dmb_job_start_small(*arguments)
        self.started += not rc
        return rc

    def dmb_batch_stop(self, batch):
        self.stopped += 1
        self._real.dmb_batch_stop(batch)

    def dmb_batch_drain(self, batch):
        self.drained += 1
        self._real.dmb_batch_drain(batch)

    async def hold(self):
        """Report nothing from now on."""
        self.held, self.started, self.stopped, self.drained = True, 0, 0, 0

    async def started_all(self, count):
        """Wait until so many requests were started."""
        while self.started < count:
            await anyio.lowlevel.checkpoint()

    async def release(self, path):
        """Report completions again. A request of another file has the loop look for them."""
        self.held = False
        with dmabuf.allocate(PAGE, exporter="memfd") as other:
            async with await aio.open(path) as file:
                await file.read_into(other, PAGE)


@pytest.fixture
def device(monkeypatch):
    made = Device(engine_module.lib)
    for module in (transfer_engine_module, engine_module, requests_module, waiter_module):
        monkeypatch.setattr(module, "lib", made)
    return made


async def turns(count=10):
    """Let the loop run its other tasks some turns; nothing is expected to happen meanwhile."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_cancelling_waits_for_the_device_and_not_in_the_loop(
    run, loop_backend, path, buf, device, size
):
    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            await device.hold()
            over, scope = [], anyio.CancelScope()

            async def transfer():
                with scope:
                    await file.read_into(buf, size)
                over.append(scope.cancelled_caught)

            async with anyio.create_task_group() as group:
                group.start_soon(transfer)
                await device.started_all(1)
                scope.cancel()
                await turns()
                assert not over and device.stopped == 1
                with pytest.raises(BusyError):
                    buf.close()
                await device.release(path)
            assert over == [True] and device.drained == 0
            assert (await file.read_into(buf)).nbytes == SIZE
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")

    run(main)


def test_asyncio_s_own_cancel_again_and_again(path, buf, device):
    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            for size in (PAGE, SIZE):
                await device.hold()
                task = asyncio.create_task(file.read_into(buf, size))
                await device.started_all(1)
                for _ in range(5):
                    task.cancel()
                    await turns(3)
                    assert not task.done()
                    with pytest.raises(BusyError):
                        buf.close()
                await device.release(path)
                with pytest.raises(asyncio.CancelledError):
                    await task

    anyio.run(main, backend="asyncio")


def test_a_call_in_a_thread_is_waited_for_too(run, tmp_path, buf, monkeypatch):
    """A file is not cut back, nor its descriptor closed, beside the fallocate(2) that runs."""
    entered, go = threading.Event(), threading.Event()
    real = growth.lib.dmb_fallocate

    def fallocate(*arguments):
        entered.set()
        go.wait()
        return real(*arguments)

    monkeypatch.setattr(growth.lib, "dmb_fallocate", fallocate)

    async def main():
        over, scope = [], anyio.CancelScope()

        async def write():
            with scope:
                await file.write_from(buf)
            over.append(scope.cancelled_caught)

        async with await aio.open(tmp_path / "file", "w") as file:
            async with anyio.create_task_group() as group:
                group.start_soon(write)
                await anyio.to_thread.run_sync(entered.wait)
                scope.cancel()
                await turns()
                assert not over
                go.set()
            assert over == [True] and file.size == 0

    run(main)


@pytest.mark.parametrize("seed", range(2))
def test_cancelled_at_any_moment_the_memory_is_left_alone(run, loop_backend, path, seed):
    """What it holds right after does not change, though the buffer could be closed."""
    dice, data, old = random.Random(seed), path.read_bytes(), poison(SIZE)

    async def main():
        async with await aio.open(path) as file:
            for _ in range(25):
                with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
                    buffer.pwrite(old, 0)
                    size = dice.choice([PAGE, 5000, 65536, SIZE])
                    how = {"route": dice.choice([None, "staged", "buffered"])}
                    async with anyio.create_task_group() as group:
                        for number in range(dice.randint(1, 6)):
                            start = number * PAGE if size < SIZE else 0
                            how |= {"file_offset": start, "buffer_offset": start}
                            group.start_soon(functools.partial(file.read_into, buffer, size, **how))
                        await turns(dice.randint(0, 6))
                        group.cancel_scope.cancel()
                    after = buffer.pread(SIZE, 0)
                    for at in range(0, SIZE, 512):
                        block = slice(at, at + 512)
                        if after[block] not in (old[block], data[block]):
                            each = zip(after[block], old[block], data[block], strict=True)
                            assert all(byte in (a, b) for byte, a, b in each), at
                    await turns(dice.randint(0, 3))
                    assert_same(buffer.pread(SIZE, 0), after, "the buffer later")

    run(main)


def test_a_ring_that_cannot_be_driven(run, path, buf, device):
    """Every transfer raises, and none before the device has left its memory."""

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            over = []

            async def transfer(size):
                with pytest.raises(OSError, match="driving io_uring") as caught:
                    await file.read_into(buf, size)
                over.append(caught.value.errno)

            await device.hold()
            device.error = -errno.EBADR
            async with anyio.create_task_group() as group:
                for size in (PAGE, SIZE, PAGE):
                    group.start_soon(transfer, size)
                while device.stopped < 3:
                    await anyio.lowlevel.checkpoint()
                assert not over
                with pytest.raises(BusyError):
                    buf.close()
                device.error = 0
                await device.release(path)
            assert over == 3 * [errno.EBADR]
            assert (await file.read_into(buf)).nbytes == SIZE

    run(main)


def test_a_cancelled_write_gives_room_back(run, tmp_path, path, buf, device):
    async def main():
        async with await aio.open(tmp_path / "sink", "w") as file:
            await device.hold()
            async with anyio.create_task_group() as group:
                group.start_soon(file.write_from, buf)
                await device.started_all(1)
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await device.release(path)
            whole = (tmp_path / "sink").read_bytes()
            assert_same(whole, poison(SIZE)[: len(whole)], "what is whole")

    run(main)


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_closing_the_file_ends_its_transfers(run, loop_backend, path, buf, device, size):
    async def main():
        file, other = await aio.open(path), await aio.open(path)
        await file.read_into(buf, PAGE)
        await other.read_into(buf, PAGE)
        await device.hold()
        ends = []

        async def transfer(of):
            try:
                ends.append(type(await of.read_into(buf, size)))
            except ClosedError as error:
                ends.append(type(error))

        async def close():
            await file.aclose()
            ends.append(str)

        async with anyio.create_task_group() as group:
            group.start_soon(transfer, file)
            group.start_soon(transfer, other)
            await device.started_all(2)
            group.start_soon(close)
            while not file.closed:
                await anyio.lowlevel.checkpoint()
            await turns()
            assert not ends
            with pytest.raises(ClosedError):
                await file.read_into(buf, size)
            with pytest.raises(BusyError):
                buf.close()
            await device.release(path)
        assert ends.count(ClosedError) == 1 and ends.count(dmabuf.Transfer) == 1
        assert ends.index(ClosedError) < ends.index(str)
        await other.aclose()
        await file.aclose()

    run(main)


def test_closing_ends_the_wait_for_a_peer(run, buf):
    async def main():
        read, write = os.pipe()
        file = await aio.open(read)
        os.close(read)
        begun = anyio.Event()

        async def transfer():
            begun.set()
            with pytest.raises(ClosedError, match="closed"):
                await file.read_into(buf)

        async with anyio.create_task_group() as group:
            group.start_soon(transfer)
            await begun.wait()
            await turns()  # until it waits for the peer
            await file.aclose()
        os.close(write)

    run(main)


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_never_awaited_and_thrown_away(run, path, buf, device, size):
    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            buf.pwrite(poison(SIZE), 0)
            await device.hold()
            never = file.read_into(buf, size)
            with pytest.warns(RuntimeWarning, match="never awaited"):
                del never
                gc.collect()
            assert device.started == 0

            begun = file.read_into(buf, size)
            begun.send(None)  # up to its first wait
            assert device.started == 1
            with pytest.raises(BusyError):
                buf.close()
            begun.close()
            assert device.drained == 1
            buf.pwrite(poison(SIZE), 0)
            await device.release(path)
            assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer after it")
            assert (await file.read_into(buf)).nbytes == SIZE

    run(main)


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_a_loop_that_ends_without_its_tasks(path, buf, device, size, caplog):
    """The engine ends with it, once the device is done, and the transfer is told."""
    caplog.set_level(logging.CRITICAL, "asyncio")
    loop = asyncio.new_event_loop()

    async def main():
        file = await aio.open(path)
        await file.read_into(buf, PAGE)
        await device.hold()
        task = asyncio.create_task(file.read_into(buf, size))
        await device.started_all(1)
        return file, task

    file, task = loop.run_until_complete(main())
    with pytest.raises(BusyError):
        buf.close()
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert device.drained == 1 and isinstance(task.exception(), ClosedError)
    with pytest.raises(ClosedError):
        loop.run_until_complete(file.read_into(buf, PAGE))
    loop.run_until_complete(file.aclose())
    loop.close()


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_ctrl_c(run, path, buf, device, size):
    """Every transfer ends, and the buffer can be closed."""

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            await device.hold()
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(file.read_into, buf, size)
                await device.started_all(3)
                device.held = False
                signal.raise_signal(signal.SIGINT)
                await anyio.sleep_forever()

    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)) as caught:
        run(main)
    if not isinstance(caught.value, KeyboardInterrupt):
        assert caught.group_contains(KeyboardInterrupt)


def test_a_cancelled_copy_stops(run, tmp_path):
    """From a pipe that never ends; the copy has begun when it is cancelled."""
    out = tmp_path / "out"

    async def main():
        read, write = os.pipe()
        async with anyio.create_task_group() as group:
            group.start_soon(functools.partial(aio.copy, read, out, block_size="64KiB"))
            os.write(write, poison(65536))
            while not out.exists() or not out.stat().st_size:
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()
        os.close(write)
        os.close(read)
        assert_same(out.read_bytes(), poison(65536), "the copy")

    run(main)


def ctrl_c(*_):
    raise KeyboardInterrupt


def test_ctrl_c_before_a_small_request_is_started(run, path, buf, monkeypatch):
    """No completion will come, and none is waited for."""

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            with monkeypatch.context() as patch:
                patch.setattr(file.target.engine, "new_tag", ctrl_c)
                with pytest.raises(KeyboardInterrupt):
                    await file.read_into(buf, PAGE)
            buf.pwrite(poison(SIZE), 0)
            assert (await file.read_into(buf)).nbytes == SIZE
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")

    run(main)


@pytest.mark.parametrize("begun", [True, False])
def test_ctrl_c_just_after_a_call_was_handed_to_a_thread(run, path, monkeypatch, begun):
    """It is stopped and waited for, or never made."""
    submit, entered, ended = ThreadPoolExecutor.submit, threading.Event(), []

    def function():
        entered.set()
        try:
            while True:
                stopping.check()
                time.sleep(0.001)
        finally:
            ended.append(True)

    def interrupted(*arguments):
        if begun:
            submit(*arguments)
            entered.wait()
        raise KeyboardInterrupt

    async def main():
        async with await aio.open(path):
            with monkeypatch.context() as patch:
                patch.setattr(ThreadPoolExecutor, "submit", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    await aio.call(function)
            assert ended == [True] * begun
            assert await aio.call(lambda: 3) == 3

    run(main)


def test_a_call_that_is_thrown_away_ends_first(run, path, buf):
    async def main():
        async with await aio.open(path) as file:
            ended = []
            begun = aio.call(lambda: ended.append(True))
            begun.send(None)  # up to its first wait
            begun.close()
            assert ended == [True]
            await turns()
            assert (await file.read_into(buf)).nbytes == SIZE
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")

    run(main)


def test_closing_a_file_that_is_cancelled_waits_for_the_device_all_the_same(path, buf, device):
    async def main():
        file = await aio.open(path)
        await file.read_into(buf, PAGE)
        await device.hold()
        transfer = asyncio.create_task(file.read_into(buf))
        await device.started_all(1)
        closing = asyncio.create_task(file.aclose())
        for _ in range(3):
            await turns()
            closing.cancel()
            assert not closing.done() and not transfer.done()
            with pytest.raises(BusyError):
                buf.close()
        await device.release(path)
        with pytest.raises(asyncio.CancelledError):
            await closing
        with pytest.raises(ClosedError):
            await transfer

    anyio.run(main, backend="asyncio")

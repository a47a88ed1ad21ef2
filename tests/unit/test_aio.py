"""dmabuf.aio on asyncio and trio: every byte, record and error as dmabuf.File has them."""

import array
import asyncio
import functools
import gc
import logging
import os
import threading
import weakref

import anyio
import pytest

import dmabuf
from dmabuf import Engine, _loop, _waits, aio, fence, lone
from dmabuf._ffi import lib
from tests import forking
from tests.resources import held
from tests.support import assert_same, in_child, pattern, poison, ranges

SIZE = 1 << 20
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
    buffer.close()  # BusyError if a transfer still held it


@pytest.mark.parametrize("route", [None, "direct", "staged", "buffered"])
def test_reads(run, backend, path, buf, route):
    data = path.read_bytes()

    async def main():
        async with await aio.open(path) as file:
            assert file._engine.backend == ("threads" if backend == "threads" else "io_uring")
            for file_offset, start, size in ranges(7, 40, SIZE, SIZE):
                buf.pwrite(poison(SIZE), 0)
                how = {"file_offset": file_offset, "buffer_offset": start, "route": route}
                try:
                    plan = file.plan(buf, "read", size=size, **how)
                except dmabuf.RouteUnavailable:
                    with pytest.raises(dmabuf.RouteUnavailable):
                        await file.read_into(buf, size, **how)
                    continue
                record = await file.read_into(buf, size, **how)
                assert (record.route, record.rejected) == (plan.route, plan.rejected)
                expected = bytearray(poison(SIZE))
                expected[start : start + size] = data[file_offset : file_offset + size]
                assert_same(buf.pread(SIZE, 0), bytes(expected), f"the buffer after {record}")

    run(main)


@pytest.mark.parametrize("old", [0, SIZE // 2, SIZE])
@pytest.mark.parametrize("route", [None, "staged", "buffered"])
def test_writes(run, backend, tmp_path, buf, old, route):
    path = tmp_path / "sink"
    path.write_bytes(pattern(old, 2))

    async def main():
        async with await aio.open(path, "r+") as file:
            for number, (file_offset, start, size) in enumerate(ranges(8, 25, SIZE, SIZE)):
                before = path.read_bytes()
                content = pattern(SIZE, 100 + number)
                buf.pwrite(content, 0)
                try:
                    record = await file.write_from(
                        buf,
                        size,
                        file_offset=file_offset,
                        buffer_offset=start,
                        route=route,
                        sync=number % 3 == 0,
                    )
                except dmabuf.RouteUnavailable:
                    continue
                end = file_offset + size if size else 0
                expected = bytearray(before) + bytes(max(0, end - len(before)))
                expected[file_offset : file_offset + size] = content[start : start + size]
                assert_same(path.read_bytes(), bytes(expected), f"the file after {record}")
                assert record.nbytes == size

    run(main)


def test_segments(run, backend, path, tmp_path, buf):
    data, content = path.read_bytes(), poison(SIZE)
    triples = [(n * 7777, (63 - n) * 9000 + n, 5000 + n) for n in range(64)]
    flat = array.array("Q", [number for triple in triples for number in triple])
    out = tmp_path / "out"
    out.write_bytes(bytes(SIZE))

    async def main():
        async with await aio.open(path) as file, await aio.open(out, "r+") as sink:
            record = await file.read_segments(buf, flat)
            assert record.nbytes == sum(size for _, _, size in triples)
            expected = bytearray(content)
            for offset, start, size in triples:
                expected[start : start + size] = data[offset : offset + size]
            assert_same(buf.pread(SIZE, 0), bytes(expected), "the buffer")
            await sink.write_segments(buf, flat, sync=True)
            written = bytearray(SIZE)
            for offset, start, size in triples:
                written[offset : offset + size] = expected[start : start + size]
            assert_same(out.read_bytes(), bytes(written), "the file")
            with pytest.raises(dmabuf.ShortReadError) as caught:
                await file.read_segments(buf, array.array("Q", [0, 0, PAGE, SIZE - 5, PAGE, PAGE]))
            assert caught.value.index == 1

    run(main)


def _errors(path, buf, closed):
    """Calls that fail, as (verb, arguments, keywords)."""
    read_only = [("write_from", (buf, 10), {})]
    return [
        *read_only,
        ("read_into", (buf, SIZE + 1), {}),
        ("read_into", (buf, PAGE), {"file_offset": -PAGE}),
        ("read_into", (buf, PAGE), {"buffer_offset": SIZE}),
        ("read_into", (buf, PAGE), {"buffer_offset": -PAGE}),
        ("read_into", (buf, -PAGE), {}),
        ("read_into", (buf, 4096.0), {}),
        ("read_into", (buf, PAGE), {"file_offset": 1.5}),
        ("read_into", (b"no buffer", PAGE), {}),
        ("read_into", (closed, PAGE), {}),
        ("read_into", (buf, PAGE), {"route": "teleport"}),
        ("read_into", (buf, PAGE), {"require": "magic"}),
        ("read_into", (buf, PAGE), {"prefer": "slow"}),
        ("read_into", (buf, PAGE), {"route": "native"}),
        ("read_into", (buf, 100), {"require": "zero-copy"}),
        ("read_into", (buf, PAGE), {"timeout": -1}),
        ("read_segments", (buf, [1, 2, 3]), {}),
        ("read_segments", (buf, array.array("Q", [0, SIZE, 1])), {}),
        ("read_segments", (buf, array.array("Q", [0, 0, PAGE, SIZE, 0, 1])), {}),
    ]


def test_errors_are_those_of_file(run, path, buf):
    closed = dmabuf.allocate(PAGE, exporter="memfd")
    closed.close()
    seen = []

    async def main():
        with dmabuf.open(path) as sync:
            async with await aio.open(path) as file:
                await file.read_into(buf, PAGE)
                for verb, arguments, how in _errors(path, buf, closed):
                    with pytest.raises(Exception) as theirs:
                        getattr(sync, verb)(*arguments, **how)
                    with pytest.raises(type(theirs.value)) as ours:
                        await getattr(file, verb)(*arguments, **how)
                    assert str(ours.value) == str(theirs.value)
                    assert vars(ours.value).keys() == vars(theirs.value).keys()
                    seen.append(verb)
            with pytest.raises(dmabuf.ClosedError):
                await file.read_into(buf, PAGE)
            with pytest.raises(dmabuf.ClosedError):
                await file.__aenter__()
        with pytest.raises(FileNotFoundError):
            await aio.open(path.with_name("nothing"))

    run(main)
    assert len(seen) == 19


@pytest.mark.parametrize("size", [PAGE, 5000])
def test_two_thousand_at_once(run, backend, path, size, monkeypatch):
    """One ring, never more in flight than it has room for, and few system calls.

    Threads complete one at a time, and each may have the loop look.
    """
    count = 2000
    polls = []
    stand_in = Counting(_loop.lib, polls)
    monkeypatch.setattr(_loop, "lib", stand_in)
    data = path.read_bytes()

    async def main():
        with dmabuf.allocate(count * 8192, exporter="memfd") as buffer:
            async with await aio.open(path) as file, anyio.create_task_group() as group:
                await file.read_into(buffer, PAGE)
                polls.clear()

                async def one(number):
                    where = number % 200 * PAGE
                    record = await file.read_into(
                        buffer, size, file_offset=where, buffer_offset=number * 8192
                    )
                    assert record.nbytes == size

                for number in range(count):
                    group.start_soon(one, number)
            for number in range(count):
                where = number % 200 * PAGE
                assert_same(
                    buffer.pread(size, number * 8192), data[where : where + size], f"{number}"
                )
            assert buffer.pread(8192 - size, size) == bytes(8192 - size)

    run(main)
    assert len(polls) < (count if backend == "threads" else count / 5)


def test_blocks_of_odd_sizes_leave_no_mappings(run, path):
    """Several batches at once, each with blocks of its own, of which one is kept for the next."""
    path.write_bytes(pattern(1 << 20, 1))
    mappings = []

    async def main():
        with dmabuf.allocate(8 << 20, exporter="memfd") as buffer:
            async with await aio.open(path) as file:
                for _ in range(20):
                    async with anyio.create_task_group() as group:
                        for number in range(8):
                            place = {"buffer_offset": number << 20}
                            read = functools.partial(file.read_into, buffer, 699_489, **place)
                            group.start_soon(read)
                    with open("/proc/self/maps") as maps:
                        mappings.append(len(maps.readlines()))

    run(main)
    assert mappings[-1] < mappings[1] + 10


class Counting:
    """The core, where the rounds of a ring are counted."""

    def __init__(self, real, polls):
        self._real, self._polls = real, polls

    def __getattr__(self, name):
        return getattr(self._real, name)

    def dmb_ring_poll(self, *arguments):
        self._polls.append(1)
        return self._real.dmb_ring_poll(*arguments)


def test_what_starts_in_one_tick_is_submitted_together(run, path, buf, monkeypatch):
    """By the first round of the ring after it: every flight has begun by then."""
    polls = []
    monkeypatch.setattr(_loop, "lib", Counting(_loop.lib, polls))

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            flights = file._engine.flights
            monkeypatch.setattr(_loop.lib, "_polls", Sizes(flights, polls))
            polls.clear()
            async with anyio.create_task_group() as group:
                for _ in range(100):
                    group.start_soon(functools.partial(file.read_into, buf, PAGE))
            assert next(filter(None, polls)) == 100

    run(main)


class Sizes:
    """Counts what is in `flights` at each call of append."""

    def __init__(self, flights, counts):
        self._flights, self._counts = flights, counts

    def append(self, _):
        self._counts.append(len(self._flights))


def test_a_growing_write_that_fails_cuts_the_file_back(run, tmp_path, buf, monkeypatch):
    from dmabuf import growth

    class Full:
        def __getattr__(self, name):
            return getattr(lib, name)

        def dmb_fallocate(self, *arguments):
            return -28

    monkeypatch.setattr(growth, "lib", Full())

    async def main():
        async with await aio.open(tmp_path / "file", "w") as file:
            with pytest.raises(OSError, match="growing the file") as caught:
                await file.write_from(buf)
            assert (caught.value.errno, caught.value.nbytes) == (28, 0)
        assert (tmp_path / "file").stat().st_size == 0

    run(main)


def test_devices_that_epoll_refuses(run, buf):
    async def main():
        async with await aio.open("/dev/zero") as file:
            assert (await file.read_into(buf, 5000, buffer_offset=3)).nbytes == 5000
            assert buf.pread(5006, 0) == poison(3) + bytes(5000) + poison(5006)[5003:]
            with anyio.fail_after(30), anyio.move_on_after(0.02) as scope:
                while True:
                    await file.read_into(buf)
            assert scope.cancelled_caught
        async with await aio.open("/dev/null", "r+") as file:
            assert (await file.read_into(buf)).nbytes == 0
            assert (await file.write_from(buf)).nbytes == SIZE

    run(main)


def test_two_loops_in_two_threads(path):
    """Each has an engine of its own, and neither's file is the other's to use."""
    engines, files, failures = [], [], []
    meet = threading.Barrier(2)

    async def main():
        with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
            async with await aio.open(path) as file:
                assert (await aio.open(path))._engine is file._engine
                engines.append(file._engine)
                files.append(file)
                for _ in range(20):
                    await file.read_into(buffer)
                    assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")
                await anyio.to_thread.run_sync(meet.wait)
                other = files[0] if files[0] is not file else files[1]
                with pytest.raises(RuntimeError, match="another thread"):
                    await other.read_into(buffer, SIZE - 1)
                await anyio.to_thread.run_sync(meet.wait)

    def work(backend):
        try:
            anyio.run(main, backend=backend)
        except BaseException as error:
            failures.append(error)
            meet.abort()

    threads = [threading.Thread(target=work, args=[name]) for name in ("asyncio", "trio")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert engines[0] is not engines[1] and all(engine.closed for engine in engines)


def test_the_engine_ends_with_its_loop_and_nothing_leaks(run, path, buf):
    run(anyio.sleep, 0)  # what the loops themselves keep
    before = held(), threading.active_count()
    engines = []

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf)
            engines.append(file._engine)
            assert file._engine is await _loop.loop_engine()
        file = await aio.open(path.with_name("out"), "w")
        await file.write_from(buf, sync=True)  # left open
        engines.append(file)

    run(main)
    assert engines[0].closed and engines[0]._eventfd == -1
    engines.clear()
    gc.collect()
    assert (held(), threading.active_count()) == before


def test_after_a_fork(path, buf):
    """The child's inherited File raises, and a loop of its own has an engine of its own."""

    async def inside():
        async with await aio.open(path) as file:
            record = await file.read_into(buf)
            assert record.nbytes == SIZE
            assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the child's buffer")

    async def refused(file):
        with pytest.raises(dmabuf.ClosedError, match="forked"):
            await file.read_into(buf, PAGE)
        with pytest.raises(dmabuf.ClosedError, match="forked"):
            await file.read_into(buf)
        await file.aclose()

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)

            def child():
                asyncio._set_running_loop(None)
                asyncio.run(refused(file))
                asyncio.run(inside())

            forking.in_child(child)
            assert (await file.read_into(buf)).nbytes == SIZE

    anyio.run(main, backend="asyncio")


def test_anyio_is_optional():
    source = "import sys; import dmabuf; assert 'anyio' not in sys.modules; print('fine')"
    assert in_child(source) == "fine\n"
    source = (
        "import sys; sys.modules['anyio'] = None\n"
        "try:\n    import dmabuf.aio\nexcept ImportError as error:\n    print(error)"
    )
    assert "pip install dmabuf[aio]" in in_child(source)


# -- fences


@pytest.fixture
def fenced(buf, monkeypatch):
    """A buffer whose fence is an eventfd that a test signals."""
    signal = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    monkeypatch.setattr(buf, "_is_dmabuf", True)
    monkeypatch.setattr(type(buf), "_touched", lambda self, offset, size: [signal])
    monkeypatch.setattr(
        fence, "_EVENTS", {"read": fence.select.POLLIN, "write": fence.select.POLLIN}
    )
    monkeypatch.setattr(_waits, "readable", functools.partial(_as_reader, _waits.readable))
    monkeypatch.setattr(type(buf), "_cpu_access", lambda *_: _Nothing())
    monkeypatch.setattr(lone, "_make", lambda *_: None)  # the core asks the dma-buf itself
    yield signal
    os.close(signal)


async def _as_reader(real, fd, access):
    await real(fd, "read")


class _Nothing:
    def __enter__(self):
        pass

    def __exit__(self, *exc):
        pass


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_transfers_wait_for_fences_in_the_loop(run, path, buf, fenced, size):
    async def main():
        async with await aio.open(path) as file:
            with pytest.raises(TimeoutError, match="a device still uses") as caught:
                await file.read_into(buf, size, timeout=0.01)
            assert caught.value.nbytes == 0 and caught.value.filename == str(path)
            with pytest.raises(TimeoutError, match="a device still writes"):
                await aio.wait(buf, "read", 0)
            assert_same(buf.pread(SIZE, 0), poison(SIZE), "what nobody touched")
            order = []

            async def waits(number):
                if number:
                    await file.read_into(buf, size)
                else:
                    await aio.wait(buf, "write")
                order.append(number)

            async with anyio.create_task_group() as group:
                for number in range(3):  # more than one waits for the same descriptor
                    group.start_soon(waits, number)
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
                assert not order
                os.eventfd_write(fenced, 1)
            assert sorted(order) == [0, 1, 2]
            assert_same(buf.pread(size, 0), pattern(SIZE, 1)[:size], "the buffer")

    run(main)


def test_waiting_for_what_has_no_fences(run, buf):
    async def main():
        await aio.wait(buf)
        await aio.wait(buf, "write", 0)
        with pytest.raises(ValueError, match="direction"):
            await aio.wait(buf, "sideways")
        with pytest.raises(ValueError, match="timeout"):
            await aio.wait(buf, "read", -1)

    run(main)


def test_an_event_loop_that_ended_leaves_nothing_of_its_engine(run, path, buf):
    engines = []

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf)
            engines.append(weakref.ref(file._engine))

    for _ in range(2):
        run(main)
    gc.collect()
    assert [engine() for engine in engines] == [None, None]


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("size", [None, PAGE, SIZE])
@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
def test_a_loop_dropped_without_shutdown_asyncgens_leaves_nothing(path, size, closed, caplog):
    """Nor does a transfer that is under way; the buffer can be closed."""
    caplog.set_level(logging.CRITICAL, "asyncio")

    async def main(buffer):
        file = await aio.open(path)
        await file.read_into(buffer, PAGE)
        if size is not None:
            task = asyncio.create_task(file.read_into(buffer, size))
            await asyncio.sleep(0)
            assert not task.done()

    run_in_a_loop_of_its_own(main, closed)  # what asyncio itself keeps
    before = held()
    for _ in range(3):
        run_in_a_loop_of_its_own(main, closed)
    assert held() == before


def run_in_a_loop_of_its_own(main, closed):
    with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main(buffer))
        if closed:
            loop.close()
        del loop
        gc.collect()


def test_a_wake_is_for_who_still_sleeps(run):
    """Awaiting it returns the result; a task that was cancelled first is not woken again."""

    async def sleep(wake, scope, woken):
        with scope:
            woken.append(await wake)

    async def main():
        new_wake, woken = _waits.kind_of_wake(), []
        wakes, scopes = [new_wake(), new_wake()], [anyio.CancelScope(), anyio.CancelScope()]
        async with anyio.create_task_group() as group:
            for wake, scope in zip(wakes, scopes, strict=True):
                group.start_soon(sleep, wake, scope, woken)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            assert not any(wake.done() for wake in wakes)
            scopes[0].cancel()
            wakes[1].set_result("landed")
            assert all(wake.done() for wake in wakes)
        assert woken == ["landed"]
        assert [scope.cancelled_caught for scope in scopes] == [True, False]

    run(main)

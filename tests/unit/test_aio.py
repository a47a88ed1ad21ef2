"""dmabuf.aio on asyncio and trio: the bytes, records and errors are those of dmabuf.File."""

import array
import asyncio
import errno
import functools
import gc
import inspect
import logging
import mmap
import os
import socket
import threading

import anyio
import pytest

import dmabuf
from dmabuf import aio
from dmabuf.memory import Buffer, Slab
from tests import forking
from tests.core import lib
from tests.resources import held
from tests.support import Filter, assert_same, in_child, pattern, poison, raises_errno, ranges

SIZE = (1 << 20) + (64 << 10)  # more than one small request
PAGE = 4096
VERBS = ("read_into", "write_from", "read_segments", "write_segments", "plan")


# -- the same as dmabuf.File


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_the_keywords_of_file(verb):
    theirs = inspect.signature(getattr(dmabuf.File, verb))
    assert inspect.signature(getattr(aio.File, verb)) == theirs


def test_copy_has_the_keywords_of_dmabuf_copy():
    ours, theirs = inspect.signature(aio.copy), inspect.signature(dmabuf.copy)
    assert ours.parameters.keys() == theirs.parameters.keys()


def test_properties(run, path):
    async def main():
        async with await aio.open(path, "r+") as file:
            assert (file.name, file.mode, file.kind, file.size) == (str(path), "r+", "file", SIZE)
            assert file.readable() and file.writable() and not file.closed
            assert os.fstat(file.fileno()).st_ino == path.stat().st_ino
            assert repr(file) == f"<dmabuf.aio.File {str(path)!r} mode='r+'>"
        assert file.closed and repr(file).endswith("closed>")
        await file.aclose()

    run(main)


@pytest.mark.parametrize("route", [None, "direct", "staged", "buffered"])
def test_reads(run, loop_backend, path, buf, route):
    data = path.read_bytes()

    async def main():
        async with await aio.open(path) as file:
            for file_offset, start, size in ranges(7, 20, SIZE, SIZE):
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
def test_writes(run, loop_backend, tmp_path, buf, old, route):
    path = tmp_path / "sink"
    path.write_bytes(pattern(old, 2))

    async def main():
        async with await aio.open(path, "r+") as file:
            for number, (file_offset, start, size) in enumerate(ranges(8, 15, SIZE, SIZE)):
                before = path.read_bytes()
                content = pattern(SIZE, 100 + number)
                buf.pwrite(content, 0)
                how = {"file_offset": file_offset, "buffer_offset": start, "route": route}
                try:
                    record = await file.write_from(buf, size, **how, sync=number % 3 == 0)
                except dmabuf.RouteUnavailable:
                    continue
                end = file_offset + size if size else 0
                expected = bytearray(before) + bytes(max(0, end - len(before)))
                expected[file_offset : file_offset + size] = content[start : start + size]
                assert_same(path.read_bytes(), bytes(expected), f"the file after {record}")
                assert record.nbytes == size

    run(main)


def test_segments(run, loop_backend, path, tmp_path, buf):
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

    run(main)


def errors(buf, closed):
    """Calls that fail, as (verb, arguments, keywords)."""
    flat = functools.partial(array.array, "Q")
    return [
        ("write_from", (buf, 10), {}),
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
        ("read_segments", (buf, flat([0, SIZE, 1])), {}),
        ("read_segments", (buf, flat([0, 0, PAGE, SIZE, 0, 1])), {}),
        ("read_segments", (buf, flat([0, 0, PAGE, SIZE - 5, PAGE, PAGE])), {}),
    ]


def test_errors_are_those_of_file(run, path, buf):
    closed = dmabuf.allocate(PAGE, exporter="memfd")
    closed.close()

    async def main():
        with dmabuf.open(path) as sync:
            async with await aio.open(path) as file:
                for verb, arguments, how in errors(buf, closed):
                    with pytest.raises(Exception) as theirs:
                        getattr(sync, verb)(*arguments, **how)
                    with pytest.raises(type(theirs.value)) as ours:
                        await getattr(file, verb)(*arguments, **how)
                    assert str(ours.value) == str(theirs.value)
                    assert vars(ours.value).keys() == vars(theirs.value).keys()
            with pytest.raises(dmabuf.ClosedError):
                await file.read_into(buf, PAGE)
            with pytest.raises(dmabuf.ClosedError):
                await file.__aenter__()
        with pytest.raises(FileNotFoundError):
            await aio.open(path.with_name("nothing"))

    run(main)


# -- many at once


@pytest.mark.parametrize("size", [PAGE, 5000])
def test_two_thousand_at_once(run, loop_backend, path, size):
    count, data = 2000, path.read_bytes()

    async def main():
        with dmabuf.allocate(count * 8192, exporter="memfd") as buffer:

            async def one(number):
                where = {"file_offset": number % 200 * PAGE, "buffer_offset": number * 8192}
                assert (await file.read_into(buffer, size, **where)).nbytes == size

            async with await aio.open(path) as file, anyio.create_task_group() as group:
                for number in range(count):
                    group.start_soon(one, number)
            everything = buffer.pread(count * 8192, 0)
            for number in range(count):
                where = number % 200 * PAGE
                expected = data[where : where + size] + bytes(8192 - size)
                got = everything[8192 * number : 8192 * (number + 1)]
                assert_same(got, expected, f"read {number}")

    run(main)


def test_staging_memory_of_odd_sizes_leaves_no_mappings(run, path):
    mappings = []

    async def main():
        with dmabuf.allocate(8 << 20, exporter="memfd") as buffer:
            async with await aio.open(path) as file:
                for _ in range(20):
                    async with anyio.create_task_group() as group:
                        for number in range(8):
                            place = {"buffer_offset": number << 20}
                            group.start_soon(
                                functools.partial(file.read_into, buffer, 699_489, **place)
                            )
                    with open("/proc/self/maps") as maps:
                        mappings.append(len(maps.readlines()))

    run(main)
    assert mappings[-1] < mappings[1] + 10


# -- streams and devices


def test_devices_that_epoll_refuses(run, buf):
    async def main():
        async with await aio.open("/dev/zero") as file:
            assert (await file.read_into(buf, 5000, buffer_offset=3)).nbytes == 5000
            assert buf.pread(5006, 0) == poison(3) + bytes(5000) + poison(5006)[5003:]
            async with anyio.create_task_group() as group:

                async def read_for_ever():
                    while True:
                        await file.read_into(buf)

                group.start_soon(read_for_ever)
                await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
        async with await aio.open("/dev/null", "r+") as file:
            assert (await file.read_into(buf)).nbytes == 0
            assert (await file.write_from(buf)).nbytes == SIZE

    run(main)


def test_streams_never_block_the_loop(run, buf):
    """Blocking descriptors, a pipe that is full, and two reads of it in the order they began."""
    content = pattern(SIZE, 3)

    async def main():
        read, write = os.pipe()
        assert os.get_blocking(read) and os.get_blocking(write)
        source, sink = await aio.open(read), await aio.open(write, "w")
        os.close(read)
        os.close(write)
        begun = [anyio.Event() for _ in range(3)]

        async def feed(full):
            begun[0].set()
            assert (await sink.write_from(full)).nbytes == SIZE

        async def take(number, start, size):
            begun[number].set()
            assert (await source.read_into(buf, size, buffer_offset=start)).nbytes == size

        async with source, sink:
            with dmabuf.allocate(SIZE, exporter="memfd") as full:
                full.pwrite(content, 0)
                async with anyio.create_task_group() as group:
                    group.start_soon(feed, full)
                    await begun[0].wait()  # and the loop goes on, though nobody reads
                    group.start_soon(take, 1, 0, SIZE // 2)
                    await begun[1].wait()
                    group.start_soon(take, 2, SIZE // 2, SIZE // 2)
                    await begun[2].wait()
            assert_same(buf.pread(SIZE, 0), content, "the buffer")
            with pytest.raises(TimeoutError, match="the peer did nothing") as caught:
                await source.read_into(buf, 10, timeout=0.01)
            assert caught.value.nbytes == 0

    run(main)


# -- fences


@pytest.fixture
def fenced():
    """A buffer whose descriptor cannot be read or written, by poll(2), until a test calls."""
    mine, peer = socket.socketpair()
    mine.setblocking(False)
    sent = 0
    try:
        while True:
            sent += mine.send(bytes(65536))
    except BlockingIOError:
        pass

    def signal():
        left = sent
        while left:
            left -= len(peer.recv(left))
        peer.send(b"x")

    memory = mmap.mmap(-1, SIZE)
    memory[:] = poison(SIZE)
    slab = Slab(mine.detach(), 0, SIZE)
    with peer, Buffer([slab], memory, exporter="fenced", reason="a test's own") as buffer:
        yield buffer, memory, signal


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_transfers_wait_for_fences_in_the_loop(run, path, fenced, size):
    buffer, memory, signal = fenced

    async def main():
        async with await aio.open(path) as file:
            with pytest.raises(TimeoutError, match="a device still uses") as caught:
                await file.read_into(buffer, size, timeout=0.01)
            assert caught.value.nbytes == 0 and caught.value.filename == str(path)
            with pytest.raises(TimeoutError, match="a device still writes"):
                await aio.wait(buffer, "read", 0)
            assert_same(memory[:], poison(SIZE), "the memory before")
            begun, over = [anyio.Event() for _ in range(3)], []

            async def waits(number):
                begun[number].set()
                if number:
                    await file.read_into(buffer, size)
                else:
                    await aio.wait(buffer, "write")
                over.append(number)

            async with anyio.create_task_group() as group:
                for number in range(3):  # more than one waits for the same descriptor
                    group.start_soon(waits, number)
                for event in begun:
                    await event.wait()
                with pytest.raises(dmabuf.BusyError):
                    buffer.close()
                assert not over
                signal()
            assert sorted(over) == [0, 1, 2]
            assert_same(memory[:size], pattern(SIZE, 1)[:size], "the memory")

    run(main)


def test_waiting_for_a_buffer_without_fences(run, buf):
    async def main():
        await aio.wait(buf)
        await aio.wait(buf, "write", 0)
        with pytest.raises(ValueError, match="direction"):
            await aio.wait(buf, "sideways")
        with pytest.raises(ValueError, match="timeout"):
            await aio.wait(buf, "read", -1)
        with pytest.raises(TypeError, match="Buffer"):
            await aio.wait(b"no buffer")

    run(main)


# -- copies


def test_copy(run, path, tmp_path):
    calls = []

    async def main():
        record = await aio.copy(path, tmp_path / "out", progress=lambda *now: calls.append(now))
        assert record.nbytes == SIZE
        assert_same((tmp_path / "out").read_bytes(), pattern(SIZE, 1), "the copy")
        await aio.copy(path, tmp_path / "again")
        assert_same((tmp_path / "again").read_bytes(), pattern(SIZE, 1), "the second copy")
        with pytest.raises(FileNotFoundError):
            await aio.copy(tmp_path / "nothing", tmp_path / "out")

    run(main)
    assert calls[-1] == (SIZE, SIZE)


# -- loops, threads and processes


def test_two_loops_in_two_threads(path):
    """Each has an engine of its own, and the File of one cannot be used in the other."""
    files, failures, meet = [], [], threading.Barrier(2)

    async def main():
        with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
            async with await aio.open(path) as file:
                files.append(file)
                for _ in range(20):
                    await file.read_into(buffer)
                    assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")
                await anyio.to_thread.run_sync(meet.wait)
                other = files[0] if files[0] is not file else files[1]
                for size in (PAGE, SIZE - 1):
                    with pytest.raises(RuntimeError, match="another thread"):
                        await other.read_into(buffer, size)
                with pytest.raises(RuntimeError, match="another thread"):
                    await other.aclose()
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


def test_nothing_of_an_engine_is_left_when_its_loop_has_ended(run, path, buf):
    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf)
        file = await aio.open(path.with_name("out"), "w")
        await file.write_from(buf, sync=True)  # left open

    run(main)  # what the loops themselves keep
    before = held(), threading.active_count()
    run(main)
    assert (held(), threading.active_count()) == before


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("size", [None, PAGE, SIZE, "pipe"])
@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
def test_a_loop_dropped_without_shutdown_asyncgens_leaves_nothing(path, size, closed, caplog):
    """Nor does a transfer that is under way; the buffer can be closed."""
    caplog.set_level(logging.CRITICAL, "asyncio")

    async def main(buffer):
        if size == "pipe":
            read, write = os.pipe()
            source = await aio.open(read)
            os.close(read)
        else:
            source, write = await aio.open(path), None
            await source.read_into(buffer, PAGE)
        if size is not None:
            task = asyncio.create_task(source.read_into(buffer, PAGE if write else size))
            await asyncio.sleep(0)
            assert not task.done()
        if write is not None:
            os.close(write)

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


def test_after_a_fork(path, buf):
    """The child's inherited File raises, and a loop of the child has an engine of its own."""

    async def inside():
        async with await aio.open(path) as file:
            assert (await file.read_into(buf)).nbytes == SIZE
            assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the child's buffer")

    async def refused(file):
        for size in (PAGE, None):
            with pytest.raises(dmabuf.ClosedError, match="forked"):
                await file.read_into(buf, size)
        await file.aclose()

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)

            def child():
                for _ in range(2):  # the parent's loop does not notice it
                    file.target.engine.close()
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


def test_a_descriptor_that_is_ready_in_time(run):
    async def main():
        read, write = os.pipe()
        try:
            assert await aio.ready(write, "write")
            assert not await aio.ready(read, timeout=0.01)
            async with anyio.create_task_group() as group:
                group.start_soon(aio.ready, read)
                await anyio.lowlevel.checkpoint()
                os.write(write, b"x")
            assert await aio.ready(read, "read", 0)
        finally:
            os.close(read)
            os.close(write)

    run(main)


def test_a_ring_that_cannot_wake_the_loop(run, path, monkeypatch):
    monkeypatch.setattr(lib, "dmb_ring_set_eventfd", lambda *_: -errno.ENOMEM)
    before = held()
    with raises_errno(errno.ENOMEM, "registering an eventfd"):
        run(aio.open, path)
    assert held() == before


@pytest.mark.parametrize("result", [-errno.EIO, 512, 0])
def test_a_small_request_that_fails_or_is_short_is_moved_again(run, path, buf, result):
    answers = [result]

    async def main():
        async with await aio.open(path) as file:
            await file.read_into(buf, PAGE)
            buf.pwrite(poison(SIZE), 0)
            with Filter(lambda one: answers.pop() if answers else one.result):
                assert (await file.read_into(buf, PAGE)).nbytes == PAGE
            assert not answers
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1)[:PAGE] + poison(SIZE)[PAGE:], "the buffer")

    run(main)

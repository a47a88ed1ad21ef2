"""The pipeline between a file and a device's memory, held with a fake device."""

import errno
import os
import signal
import threading

import pytest

import dmabuf
from dmabuf.devices import _blocks, staging
from dmabuf.devices.staging import Staging
from tests.resources import held
from tests.support import Filter, assert_same, in_child, pattern, poison, together
from tests.unit.fake_device import BASE, FakeDevice
from tests.unit.interrupting import Interruptions

BLOCK = 64 << 10
SIZE = 5 * BLOCK + 3000
"""Of a file: its last piece holds no whole block of the disk at its end."""
STARTS = [0, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK, 5 * BLOCK - BLOCK // 4]
"""Where its pieces begin: a quarter block is kept for the last."""


@pytest.fixture
def device():
    device = FakeDevice(1 << 20)
    device.memory[:] = poison(len(device.memory))
    yield device
    device.check()
    assert not device.pinned
    assert not _blocks._flying


@pytest.fixture
def stage(device):
    with Staging(device, block_size=BLOCK, blocks=3) as stage:
        yield stage


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    return path


def spied(file, device, events=None):
    """Have a file note its transfers among the device's events, with the copies under way."""
    events = device.events if events is None else events
    for name in ("read_into", "write_from"):
        method = getattr(file, name)

        def noting(*args, _method=method, **kwargs):
            events.append(("disk", len(device.flying)))
            return _method(*args, **kwargs)

        setattr(file, name, noting)
    return file


def check_read(device, expected, offset=0):
    """The device has the bytes, and the poison around them."""
    whole = bytearray(poison(len(device.memory)))
    whole[offset : offset + len(expected)] = expected
    assert_same(bytes(device.memory), bytes(whole), "device memory")


# -- every byte, in either direction


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK, BLOCK + 1, 3 * BLOCK, SIZE])
def test_a_file_into_the_device(device, path, size, blocks):
    with Staging(device, block_size=BLOCK, blocks=blocks) as stage, dmabuf.open(path) as file:
        done = stage.read_into(file, BASE + 512, size)
    assert done.nbytes == size
    check_read(device, pattern(SIZE, 1)[:size], 512)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK, BLOCK + 1, 3 * BLOCK, SIZE])
def test_the_device_into_a_file(device, tmp_path, size, blocks):
    device.memory[512 : 512 + SIZE] = pattern(SIZE, 2)
    with (
        Staging(device, block_size=BLOCK, blocks=blocks) as stage,
        dmabuf.open(tmp_path / "new", "w") as file,
    ):
        done = stage.write_from(file, BASE + 512, size, sync=True)
    assert done.nbytes == size
    assert_same((tmp_path / "new").read_bytes(), pattern(SIZE, 2)[:size], "the file")


def test_parts_of_a_file(device, stage, path):
    with dmabuf.open(path, "r+") as file:
        stage.read_into(file, BASE, 2 * BLOCK, file_offset=4096 + 7)
        check_read(device, pattern(SIZE, 1)[4103 : 4103 + 2 * BLOCK])
        device.memory[: 2 * BLOCK] = pattern(2 * BLOCK, 3)
        stage.write_from(file, BASE, 2 * BLOCK, file_offset=4096 + 7)
    expected = bytearray(pattern(SIZE, 1))
    expected[4103 : 4103 + 2 * BLOCK] = pattern(2 * BLOCK, 3)
    assert_same(path.read_bytes(), bytes(expected), "the file")


def test_a_file_that_ends_before(device, stage, path):
    with dmabuf.open(path) as file:
        assert stage.read_into(file, BASE, 1 << 19).nbytes == SIZE
        check_read(device, pattern(SIZE, 1))
        assert stage.read_into(file, BASE, 4096, file_offset=1 << 30).nbytes == 0
    assert device.begun == 6


def test_a_pipe_into_the_device(device, stage):
    read, write = os.pipe()
    feeder = threading.Thread(target=_feed, args=(write, pattern(SIZE, 4)))
    feeder.start()
    try:
        with dmabuf.open(read) as file:
            done = stage.read_into(file, BASE, 1 << 19)
            assert (done.nbytes, done.route) == (SIZE, "buffered")
            with pytest.raises(dmabuf.RouteUnavailable, match="a pipe is read"):
                stage.read_into(file, BASE, 4096, require="uncached")
    finally:
        feeder.join()
        os.close(read)
    check_read(device, pattern(SIZE, 4))


def _feed(fd, data):
    with open(fd, "wb") as pipe:
        pipe.write(data)


# -- what the record says


def test_the_record(device, stage, path):
    with dmabuf.open(path) as file:
        done = stage.read_into(file, BASE, SIZE, require="uncached", no_native="no such kernel")
        assert done.route is dmabuf.Route.STAGED
        assert done.reason.startswith("the disk fills pinned blocks")
        assert done.rejected == {"native": "no such kernel", "direct": staging._NO_PINNING}
        assert 0 < done.copied < 4096  # the end of the file, in a bounce block
        assert done.requests >= 6
        cached = stage.read_into(file, BASE, SIZE, route="buffered")
        assert (cached.route, cached.copied) == ("buffered", SIZE)
    with dmabuf.open(path, "r+") as file:
        done = stage.write_from(file, BASE, SIZE)
        assert done.reason.startswith("the device copies to pinned blocks")


@pytest.mark.parametrize(
    "how", [{"require": "zero-copy"}, {"route": "native"}, {"route": "direct"}]
)
def test_what_staging_is_not(device, stage, path, how):
    with dmabuf.open(path, "r+") as file:
        for move in (stage.read_into, stage.write_from):
            with pytest.raises(dmabuf.RouteUnavailable, match="no route for"):
                move(file, BASE, SIZE, **how)
    assert not device.begun
    assert_same(path.read_bytes(), pattern(SIZE, 1), "the file")


def test_uncached_asks_it_of_each_piece(device, tmp_path):
    """The last has no whole page, and only whole ones are written past the page cache."""
    size = 2 * 4096 + 100
    with (
        Staging(device, block_size=4096, blocks=2) as stage,
        dmabuf.open(tmp_path / "new", "w") as file,
    ):
        for how in ({"require": "uncached"}, {"route": "staged"}):
            with pytest.raises(dmabuf.RouteUnavailable, match="holds no whole page"):
                stage.write_from(file, BASE, size, **how)
        assert not device.begun and not os.path.getsize(tmp_path / "new")
        assert stage.write_from(file, BASE, size).route is dmabuf.Route.STAGED


def test_a_last_piece_without_a_route_is_found_before_the_first(device, stage, path):
    with dmabuf.open(path) as file:
        plan = file.plan

        def planned(buffer, direction, *, size, **how):
            if size == SIZE - STARTS[-1]:
                raise OSError(errno.EOPNOTSUPP, "not that one")
            return plan(buffer, direction, size=size, **how)

        file.plan = planned
        with pytest.raises(OSError, match="not that one"):
            stage.read_into(file, BASE, SIZE)
    assert not device.begun


def test_what_went_by_the_page_cache_after_all(device, stage, path):
    """As where a filesystem takes O_DIRECT and ignores it: the record does not say staged."""
    with dmabuf.open(path) as file:
        read_into = file.read_into

        def cached(buffer, size, *, file_offset, buffer_offset, **how):
            place = {"file_offset": file_offset, "buffer_offset": buffer_offset}
            return read_into(buffer, size, **place, route="buffered")

        file.read_into = cached
        done = stage.read_into(file, BASE, SIZE)
    assert done.route is dmabuf.Route.BUFFERED
    assert done.rejected[dmabuf.Route.STAGED] == "the kernel copies into the buffer's mapping"


def test_sync(device, stage, path):
    flushed = []
    with dmabuf.open(path, "r+") as file:
        file._target.flush = lambda: flushed.append((len(device.flying), path.read_bytes()))
        stage.write_from(file, BASE, SIZE)
        assert flushed == []
        device.memory[:SIZE] = data = pattern(SIZE, 7)
        stage.write_from(file, BASE, SIZE, sync=True)
        assert flushed == [(0, data)]


# -- order and overlap


def test_copies_are_under_way_while_the_disk_reads(device, stage, path):
    with dmabuf.open(path) as file:
        stage.read_into(spied(file, device), BASE, SIZE)
    under_way = [number for what, number in device.events if what == "disk"]
    assert under_way == [0, 1, 2, 2, 2, 2]  # never a third: that block is being read into
    begun = [number for what, number in device.events if what == "begin"]
    assert begun == sorted(begun) == list(range(6))


def test_copies_are_under_way_while_the_disk_writes(device, stage, tmp_path):
    with dmabuf.open(tmp_path / "new", "w") as file:
        stage.write_from(spied(file, device), BASE, SIZE)
    under_way = [number for what, number in device.events if what == "disk"]
    assert under_way == [2, 2, 2, 2, 1, 0]
    assert device.events[:3] == [("begin", 0), ("begin", 1), ("begin", 2)]


def test_one_block_overlaps_nothing(device, path):
    with Staging(device, block_size=BLOCK, blocks=1) as stage, dmabuf.open(path) as file:
        stage.read_into(spied(file, device), BASE, SIZE)
    assert {number for what, number in device.events if what == "disk"} == {0}


def test_a_block_is_read_into_as_soon_as_its_copy_has_ended(device, stage, path):
    with dmabuf.open(path) as file:
        stage.read_into(spied(file, device), BASE, SIZE)
    order = [what for what in device.events if what[0] != "disk" or what[1] == 2]
    for number in range(3, 6):
        ended = order.index(("end", number - 3))
        assert order[ended : ended + 3] == [("end", number - 3), ("disk", 2), ("begin", number)]


# -- errors, at every position


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("when", ["fail_begin", "fail_end"])
def test_a_copy_to_the_device_fails(device, stage, path, when, number):
    getattr(device, when)[number] = OSError(errno.EIO, "the copy failed")
    with dmabuf.open(path) as file:
        with pytest.raises(OSError, match="the copy failed") as caught:
            stage.read_into(file, BASE, SIZE)
        whole = STARTS[number]
        assert caught.value.nbytes == whole
        assert_same(bytes(device.memory[:whole]), pattern(SIZE, 1)[:whole], "what arrived")
        device.check()
        device.fail_begin, device.fail_end = {}, {}
        assert stage.read_into(file, BASE, SIZE).nbytes == SIZE  # and it goes on working


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("when", ["fail_begin", "fail_end"])
def test_a_copy_from_the_device_fails(device, stage, tmp_path, when, number):
    device.memory[:SIZE] = pattern(SIZE, 5)
    getattr(device, when)[number] = OSError(errno.EIO, "the copy failed")
    with dmabuf.open(tmp_path / "new", "w") as file:
        with pytest.raises(OSError, match="the copy failed") as caught:
            stage.write_from(file, BASE, SIZE)
        written = (tmp_path / "new").read_bytes()
        assert caught.value.nbytes == len(written)
        # A copy is begun as soon as its block is free: what was copied before may not be written.
        assert len(written) == STARTS[number if when == "fail_end" else max(0, number - 2)]
        assert_same(written, pattern(SIZE, 5)[: len(written)], "the file")
        device.check()
        device.fail_begin, device.fail_end = {}, {}
        assert stage.write_from(file, BASE, SIZE).nbytes == SIZE


LARGE = 2 << 20
"""Of a block: smaller ones go without a ring, where a test could not fail them."""


def bad_sector(engine, bad):
    """Fail whatever touches that byte of a file."""

    def answer(completion):
        covers = completion.offset <= bad < completion.offset + completion.size
        return -errno.EIO if covers else completion.result

    return Filter(engine, answer)


@pytest.fixture
def large(device):
    device.memory = bytearray(poison(5 * LARGE))
    with Staging(device, block_size=LARGE, blocks=3) as stage:
        yield stage


@pytest.mark.parametrize("number", range(5))
def test_a_read_of_the_disk_fails(device, large, tmp_path, number):
    data = pattern(5 * LARGE, 6)
    (tmp_path / "file").write_bytes(data)
    bad = number * LARGE + (LARGE >> 2)
    with dmabuf.Engine() as engine, dmabuf.open(tmp_path / "file", engine=engine) as file:
        with bad_sector(engine, bad), pytest.raises(OSError, match="reading") as caught:
            large.read_into(file, BASE, 5 * LARGE)
    assert (caught.value.errno, caught.value.nbytes) == (errno.EIO, bad)
    check_read(device, data[:bad])


@pytest.mark.parametrize("number", range(5))
def test_a_write_of_the_disk_fails(device, large, tmp_path, number):
    device.memory[:] = data = pattern(5 * LARGE, 6)
    bad = number * LARGE + (LARGE >> 2)
    with dmabuf.Engine() as engine, dmabuf.open(tmp_path / "new", "w", engine=engine) as file:
        with bad_sector(engine, bad), pytest.raises(OSError, match="writing") as caught:
            large.write_from(file, BASE, 5 * LARGE)
    assert (caught.value.errno, caught.value.nbytes) == (errno.EIO, bad)
    assert_same((tmp_path / "new").read_bytes(), data[:bad], "the file")


def test_a_file_that_shrinks(device, stage, path):
    with dmabuf.open(path) as file:
        read_into = file.read_into

        def shrinking(*args, **kwargs):
            os.truncate(path, 2 * BLOCK)
            return read_into(*args, **kwargs)

        file.read_into = shrinking
        with pytest.raises(dmabuf.ShortReadError, match="shrank") as caught:
            stage.read_into(file, BASE, SIZE)
    assert caught.value.nbytes == 2 * BLOCK
    check_read(device, pattern(SIZE, 1)[: 2 * BLOCK])


# -- a device that is lost


@pytest.mark.parametrize("direction", ["read_into", "write_from"])
def test_a_lost_device_keeps_its_blocks(path, direction, caplog):
    device = FakeDevice(1 << 20)
    device.lost_at = 1
    stage = Staging(device, block_size=BLOCK, blocks=3)
    blocks = stage._blocks
    with dmabuf.open(path, "r+") as file:
        with pytest.raises(OSError, match="fallen off the bus") as caught:
            getattr(stage, direction)(file, BASE, SIZE)
        assert caught.value.nbytes == BLOCK
        assert "192 KiB of staging memory stays allocated" in caplog.text
        with pytest.raises(OSError, match="fake:0 was lost") as caught:
            getattr(stage, direction)(file, BASE, SIZE)
        assert caught.value.errno == errno.ENODEV
    stage.close()
    assert not device.unpins and not device.broken and device.flying
    assert blocks in _blocks._flying
    assert all(not block.closed for block in blocks.pool)
    del stage
    assert blocks in _blocks._flying
    _blocks._flying.clear()  # the fake is not going to write to them
    for block in blocks.pool:
        block.close()


# -- interrupts


def points(device, move):
    """How many there are in a transfer."""
    with Interruptions((), staging, _blocks) as counted:
        move()
    device.check()
    return counted.seen


@pytest.mark.parametrize("direction", ["read_into", "write_from"])
@pytest.mark.parametrize("failing", [False, True])
def test_an_interrupt_at_any_moment(device, stage, path, direction, failing):
    """Also while an error is on its way out."""
    with dmabuf.open(path, "r+") as file:

        def move():
            getattr(stage, direction)(file, BASE, SIZE)

        total = points(device, move)
        assert total > 100
        for number in range(1, total + 60):
            if failing:
                device.fail_end[device.begun + 3] = OSError(errno.EIO, "the copy failed")
            with Interruptions({number}, staging, _blocks) as interruptions:
                try:
                    move()
                except KeyboardInterrupt:
                    assert interruptions.seen >= number
                except OSError:
                    assert failing
            assert not device.flying, number  # nothing returned while a copy was under way
            assert not stage._blocks.lock.locked(), number
            device.check()
            device.fail_end.clear()
        assert interruptions.seen < total + 60
        move()
    assert len(device.pinned) == 3


@pytest.mark.parametrize("direction", ["read_into", "write_from"])
@pytest.mark.parametrize("count", [1, 5])
def test_interrupts_while_it_waits_for_copies(device, stage, path, direction, count):
    """Of an error's way out: each is noticed once the copies have ended, and none is lost."""
    device.fail_end[2] = OSError(errno.EIO, "the copy failed")
    asked = device.idle
    left = [count]

    def idle():
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        return asked()

    device.idle = idle
    with dmabuf.open(path, "r+") as file, pytest.raises(KeyboardInterrupt):
        getattr(stage, direction)(file, BASE, SIZE)
    assert not device.flying and left == [0]


def left_behind(device, stage):
    """A copy under way that no call waits for: as many exceptions in a row may leave one."""
    stage._blocks.begin()
    device.to_device(BASE, _blocks.address_of(stage._blocks.pool[0]), BLOCK)


def test_a_transfer_waits_for_the_copies_of_one_that_was_left(device, stage, path):
    left_behind(device, stage)
    with dmabuf.open(path) as file:
        stage.read_into(spied(file, device), BASE, SIZE)
    assert ("disk", 1) not in device.events[: device.events.index(("end", 0))]
    check_read(device, pattern(SIZE, 1))


def test_close_waits_for_the_copies_of_a_transfer_that_was_left(device):
    stage = Staging(device, block_size=BLOCK, blocks=3)
    left_behind(device, stage)
    stage.close()
    assert device.events == [("begin", 0), ("end", 0)]


def test_a_signal_ends_a_wait(device, stage, path):
    """A real one, from a handler, while a copy does not end."""

    class Alarm(Exception):
        pass

    def handler(number, frame):
        device.lag = 2
        raise Alarm

    device.lag = 1 << 60
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with dmabuf.open(path) as file, pytest.raises(Alarm) as caught:
            stage.read_into(file, BASE, SIZE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    device.check()
    assert caught.value.nbytes == 3 * BLOCK  # those under way ended, and were whole
    check_read(device, pattern(SIZE, 1)[: 3 * BLOCK])


def test_signals_in_plenty_are_no_lost_device(device, stage, path):
    """Each wait ends by one; the device answers in between."""

    class Alarm(Exception):
        pass

    def handler(number, frame):
        alarms.append(number)
        if len(alarms) == 10:
            device.lag = 2
        raise Alarm

    alarms = []
    device.lag = 1 << 60
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        with dmabuf.open(path) as file, pytest.raises(Alarm):
            try:
                stage.read_into(file, BASE, SIZE)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    device.check()
    assert len(alarms) >= 10 and stage._blocks._lost is None


def test_a_wait_that_takes_long_is_told(device, stage, path, caplog, monkeypatch):
    monkeypatch.setattr(_blocks, "_PATIENCE", 0.0)
    with dmabuf.open(path) as file:
        stage.read_into(file, BASE, SIZE)
    assert "waiting for fake:0: to end a copy" in caplog.text


# -- bad input, closing, threads, fork


def test_bad_input(device, stage, path):
    with dmabuf.open(path) as file:
        for size in (-1, "many"):
            with pytest.raises(ValueError, match="size"):
                stage.read_into(file, BASE, size)
        for address in (1.5, None, True):
            with pytest.raises(TypeError, match="address must be an int"):
                stage.read_into(file, address, 4096)
        with pytest.raises(ValueError, match="require="):
            stage.read_into(file, BASE, 4096, require="speed")
        with pytest.raises(ValueError, match="route="):
            stage.read_into(file, BASE, 4096, route="fast")
        with pytest.raises(ValueError, match="negative"):
            stage.read_into(file, BASE, 4096, file_offset=-1)
        with pytest.raises(OSError, match="not open for writing"):
            stage.write_from(file, BASE, 4096)
    for other in (path, "name", None):
        with pytest.raises(TypeError, match=r"a dmabuf\.File is needed"):
            stage.read_into(other, BASE, 4096)
    with pytest.raises(ValueError, match="closed"):
        stage.read_into(file, BASE, 4096)
    assert not device.begun


@pytest.mark.parametrize(
    "how", [{"block_size": 4095}, {"block_size": "2GiB"}, {"blocks": 0}, {"blocks": 1025}]
)
def test_blocks_that_cannot_be(device, how):
    with pytest.raises(ValueError, match=next(iter(how))):
        Staging(device, **how)
    assert device.closed == 1


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOMEM, "too much is pinned"), KeyboardInterrupt()]
)
def test_a_block_that_cannot_be_pinned(device, number, error):
    before = held()
    device.fail_pin[number] = error
    with pytest.raises(type(error)):
        Staging(device, block_size=BLOCK, blocks=3)
    assert (device.pinned, device.closed) == ({}, 1)
    assert held() == before


def test_a_block_that_cannot_be_unpinned_is_not_freed(device):
    stage = Staging(device, block_size=BLOCK, blocks=3)
    blocks = list(stage._blocks.pool)
    device.fail_unpin[2] = OSError(errno.EIO, "not unpinned")
    with pytest.raises(OSError, match="not unpinned"):
        stage.close()
    assert stage.closed and device.closed == 1
    assert [block.closed for block in blocks] == [True, False, True]
    assert _blocks._kept == [blocks[1]]
    device.pinned.clear()
    _blocks._kept.pop().close()


def test_close(device, path):
    stage = Staging(device, block_size=BLOCK, blocks=3)
    assert repr(stage) == "<dmabuf.devices.staging.Staging 192 KiB of fake:0>"
    stage.close()
    stage.close()
    assert stage.closed and device.closed == 1 and not device.pinned
    assert repr(stage) == "<dmabuf.devices.staging.Staging closed>"
    with dmabuf.open(path) as file, pytest.raises(dmabuf.ClosedError):
        stage.read_into(file, BASE, 4096)
    with pytest.raises(dmabuf.ClosedError), stage:
        pass


def test_dropped_without_close(device):
    before = held()
    stage = Staging(device, block_size=BLOCK, blocks=3)
    with pytest.warns(ResourceWarning, match="unclosed <dmabuf.devices.staging.Staging"):
        del stage
    assert held() == before


def test_close_under_a_transfer(device, stage, path):
    with dmabuf.open(path) as file:
        read_into = file.read_into

        def closing(*args, **kwargs):
            with pytest.raises(dmabuf.BusyError, match="a transfer is running"):
                stage.close()
            return read_into(*args, **kwargs)

        file.read_into = closing
        stage.read_into(file, BASE, SIZE)
    assert not device.closed
    check_read(device, pattern(SIZE, 1))


def test_threads_take_turns(device, stage, path):
    part = 2 * BLOCK

    def move(number):
        start = number * part
        with dmabuf.open(path) as file:
            for _ in range(4):
                done = stage.read_into(file, BASE + start, part, file_offset=512 * number)
                assert done.nbytes == part

    together(move, 4)
    for number in range(4):
        got = bytes(device.memory[number * part : (number + 1) * part])
        assert_same(got, pattern(SIZE, 1)[512 * number : 512 * number + part], f"thread {number}")


def test_after_a_fork(path):
    """The child cannot use it, and takes nothing from its parent."""
    said = in_child(
        """
import os, sys
import dmabuf
from dmabuf.devices import _blocks
from dmabuf.devices.staging import Staging
from tests.unit.fake_device import BASE, FakeDevice
device = FakeDevice(1 << 20)
stage = Staging(device, block_size=65536, blocks=2)
stage._blocks.begin()  # as another thread may have
child = os.fork()
with dmabuf.open(sys.argv[1]) as file:
    if not child:
        assert not _blocks._flying  # they are the parent's, which keeps them
        try:
            stage.read_into(file, BASE, 4096)
        except dmabuf.ClosedError as error:
            print(error, flush=True)
        stage.close()
        os._exit(len(device.pinned) - 2 + device.closed)
    assert os.waitpid(child, 0)[1] == 0
    stage.read_into(file, BASE, 4096)
stage.close()
assert not device.pinned
""",
        path,
    )
    assert "which forked" in said

"""The pipeline between a file and a device's memory, with a fake device."""

import errno
import itertools
import os
import signal
import threading
import time

import pytest

import dmabuf
from dmabuf.devices import staging
from dmabuf.devices.staging import Staging
from tests.guards import needs
from tests.resources import held
from tests.support import (
    Filter,
    assert_same,
    in_child,
    loop_device,
    pattern,
    poison,
    together,
)
from tests.unit.fake_device import BASE, FakeDevice
from tests.unit.interrupting import Interruptions

BLOCK = 64 << 10
SIZE = 5 * BLOCK + 3000
"""The last piece of such a file would hold no whole block of the disk by itself."""
STARTS = [0, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK, 4 * BLOCK + BLOCK // 2]
"""Where its pieces begin."""
DIRECTIONS = pytest.mark.parametrize("direction", ["read_into", "write_from"])


@pytest.fixture
def device():
    device = FakeDevice(1 << 20)
    device.memory[:] = poison(len(device.memory))
    yield device
    device.check()
    assert not device.pinned


@pytest.fixture
def stage(device):
    with Staging(device, block_size=BLOCK, blocks=3) as stage:
        yield stage


def spied(file, device):
    """Add each transfer of a file to the device's events, with the number of copies in flight."""
    for name in ("read_into", "write_from"):
        method = getattr(file, name)

        def noting(*args, _method=method, **how):
            device.events.append(("disk", len(device.flying)))
            if how.get("sync"):
                device.events.append(("sync", len(device.flying)))
            return _method(*args, **how)

        setattr(file, name, noting)
    return file


def in_flight(device):
    return [number for what, number in device.events if what == "disk"]


def check_read(device, expected, offset=0):
    """The device has the bytes, and poison around them."""
    whole = bytearray(poison(len(device.memory)))
    whole[offset : offset + len(expected)] = expected
    assert_same(bytes(device.memory), bytes(whole), "device memory")


# -- every byte, in either direction


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK, BLOCK + 1, 3 * BLOCK, SIZE])
def test_a_file_into_the_device_and_back(device, path, tmp_path, size, blocks):
    with Staging(device, block_size=BLOCK, blocks=blocks) as stage:
        with dmabuf.open(path) as file:
            assert stage.read_into(file, BASE + 512, size).nbytes == size
        check_read(device, pattern(SIZE, 1)[:size], 512)
        device.memory[512 : 512 + SIZE] = pattern(SIZE, 2)
        with dmabuf.open(tmp_path / "new", "w") as file:
            assert stage.write_from(file, BASE + 512, size, sync=True).nbytes == size
    assert_same((tmp_path / "new").read_bytes(), pattern(SIZE, 2)[:size], "the file")


@pytest.mark.parametrize("offset", [0, 7, 4096 + 7, "4KiB", BLOCK - 1])
@pytest.mark.parametrize("size", [5000, BLOCK + 5000, 2 * BLOCK])
def test_parts_of_a_file(device, stage, path, offset, size):
    at = 4096 if offset == "4KiB" else offset
    with dmabuf.open(path, "r+") as file:
        stage.read_into(file, BASE, size, file_offset=offset)
        check_read(device, pattern(SIZE, 1)[at : at + size])
        device.memory[:size] = pattern(size, 3)
        stage.write_from(file, BASE, size, file_offset=offset)
    expected = bytearray(pattern(SIZE, 1))
    expected[at : at + size] = pattern(size, 3)
    assert_same(path.read_bytes(), bytes(expected), "the file")


def test_a_file_that_ends_early(device, stage, path):
    with dmabuf.open(path) as file:
        assert stage.read_into(file, BASE, 1 << 19).nbytes == SIZE
        check_read(device, pattern(SIZE, 1))
        assert stage.read_into(file, BASE, 4096, file_offset=1 << 30).nbytes == 0
    assert device.begun == 6


def test_a_pipe_into_the_device(device, stage):
    read, write = os.pipe()

    def feed():
        with open(write, "wb") as pipe:
            pipe.write(pattern(SIZE, 4))

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        with dmabuf.open(read) as file:
            with pytest.raises(OSError, match="offset"):
                stage.read_into(file, BASE, 4096, file_offset=1)
            done = stage.read_into(file, BASE, 1 << 19)
            assert (done.nbytes, done.route) == (SIZE, "buffered")
            with pytest.raises(dmabuf.RouteUnavailable, match="a pipe is read"):
                stage.read_into(file, BASE, 4096, require="uncached")
    finally:
        feeder.join()
        os.close(read)
    check_read(device, pattern(SIZE, 4))


# -- the record, and what is refused


def test_the_record(device, stage, path):
    with dmabuf.open(path) as file:
        done = stage.read_into(file, BASE, SIZE, require="uncached", no_native="no such kernel")
        assert done.route is dmabuf.Route.STAGED
        assert done.reason.startswith("the disk fills pinned blocks")
        assert done.rejected["native"] == "no such kernel" and "no host" in done.rejected["direct"]
        assert 0 < done.copied < 4096  # the end of the file, in a bounce block
        assert done.requests >= 6
        cached = stage.read_into(file, BASE, SIZE, route="buffered")
        assert (cached.route, cached.copied, cached.rejected) == ("buffered", SIZE, {})
    with dmabuf.open(path, "r+") as file:
        done = stage.write_from(file, BASE, SIZE)
        assert done.reason.startswith("the device copies to pinned blocks")


@pytest.mark.parametrize(
    "how", [{"require": "zero-copy"}, {"route": "native"}, {"route": "direct"}]
)
def test_routes_that_staging_does_not_have(device, stage, path, how):
    with dmabuf.open(path, "r+") as file:
        for move in (stage.read_into, stage.write_from):
            with pytest.raises(dmabuf.RouteUnavailable, match="no route for"):
                move(file, BASE, SIZE, **how)
    assert not device.begun
    assert_same(path.read_bytes(), pattern(SIZE, 1), "the file")


def test_uncached_holds_for_each_piece(device, tmp_path):
    """The last has no whole page, and only whole pages are written past the page cache."""
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
    with (
        Staging(device, block_size=BLOCK, blocks=2) as stage,
        dmabuf.open(tmp_path / "new", "w") as file,
    ):
        assert stage.write_from(file, BASE, 5000, require="uncached").nbytes == 5000


def test_pieces_that_went_through_the_page_cache(device, stage, path):
    """As where a filesystem accepts O_DIRECT and ignores it: the record does not say staged."""
    with dmabuf.open(path) as file:
        read_into = file.read_into
        file.read_into = lambda *args, **how: read_into(*args, **how | {"route": "buffered"})
        done = stage.read_into(file, BASE, SIZE)
    assert done.route is dmabuf.Route.BUFFERED
    assert done.rejected[dmabuf.Route.STAGED] == "the kernel copies into the buffer's mapping"


def test_invalid_arguments(device, stage, path):
    with dmabuf.open(path) as file:
        for address, how, error, match in (
            (BASE, {"size": -1}, ValueError, "size"),
            (BASE, {"size": "many"}, ValueError, "size"),
            (1.5, {}, TypeError, "address must be an int"),
            (True, {}, TypeError, "address must be an int"),
            (BASE, {"require": "speed"}, ValueError, "invalid require"),
            (BASE, {"route": "fast"}, ValueError, "invalid route"),
            (BASE, {"file_offset": -1}, ValueError, "file_offset"),
        ):
            with pytest.raises(error, match=match):
                stage.read_into(file, address, **{"size": 4096} | how)
        with pytest.raises(OSError, match="not open for writing"):
            stage.write_from(file, BASE, 4096)
    with pytest.raises(TypeError, match=r"a dmabuf\.File is needed"):
        stage.read_into(path, BASE, 4096)
    with pytest.raises(ValueError, match="closed"):
        stage.read_into(file, BASE, 4096)
    assert not device.begun


# -- order and overlap


def test_copies_are_in_flight_while_the_disk_reads(device, stage, path):
    with dmabuf.open(path) as file:
        stage.read_into(spied(file, device), BASE, SIZE)
    assert in_flight(device) == [0, 1, 2, 2, 2, 2]  # never a third: the disk fills that block
    assert [number for what, number in device.events if what == "begin"] == list(range(6))
    order = [what for what in device.events if what[0] != "disk" or what[1] == 2]
    for number in range(3, 6):  # a block is filled as soon as its copy has ended
        ended = order.index(("end", number - 3))
        assert order[ended : ended + 3] == [("end", number - 3), ("disk", 2), ("begin", number)]


def test_copies_are_in_flight_while_the_disk_writes(device, stage, tmp_path):
    with dmabuf.open(tmp_path / "new", "w") as file:
        stage.write_from(spied(file, device), BASE, SIZE, sync=True)
    assert in_flight(device) == [2, 2, 2, 2, 1, 0]
    assert device.events[:3] == [("begin", 0), ("begin", 1), ("begin", 2)]
    assert [what for what in device.events if what[0] == "sync"] == [("sync", 0)]


# -- errors, at every position


@DIRECTIONS
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("when", ["fail_begin", "fail_end"])
def test_a_copy_fails(device, stage, path, tmp_path, direction, when, number):
    getattr(device, when)[number] = OSError(errno.EIO, "the copy failed")
    reading = direction == "read_into"
    data = pattern(SIZE, 1 if reading else 5)
    if not reading:
        device.memory[:SIZE] = data
    with dmabuf.open(path if reading else tmp_path / "new", "r" if reading else "w") as file:
        with pytest.raises(OSError, match="the copy failed") as caught:
            getattr(stage, direction)(file, BASE, SIZE)
        done = bytes(device.memory[:SIZE]) if reading else (tmp_path / "new").read_bytes()
        # Copies from the device begin early: what was copied before may not be written.
        whole = STARTS[number if reading or when == "fail_end" else max(0, number - 2)]
        assert caught.value.nbytes == whole
        assert_same(done[: whole if reading else None], data[:whole], "what arrived")
        device.check()
        device.fail_begin, device.fail_end = {}, {}
        assert getattr(stage, direction)(file, BASE, SIZE).nbytes == SIZE  # it still works


LARGE = 2 << 20
"""Of a block: smaller requests use no ring, where a test could not fail them."""


@DIRECTIONS
@pytest.mark.parametrize("number", [0, 2, 4])
def test_the_disk_fails(device, tmp_path, direction, number):
    data, reading = pattern(5 * LARGE, 6), direction == "read_into"
    device.memory = bytearray(poison(5 * LARGE) if reading else data)
    (tmp_path / "file").write_bytes(data if reading else b"")
    bad = number * LARGE + (LARGE >> 2)

    def answer(completion):
        covers = completion.offset <= bad < completion.offset + completion.size
        return -errno.EIO if covers else completion.result

    with (
        Staging(device, block_size=LARGE, blocks=3) as stage,
        dmabuf.Engine() as engine,
        dmabuf.open(tmp_path / "file", "r+", engine=engine) as file,
    ):
        with Filter(answer), pytest.raises(OSError) as caught:
            getattr(stage, direction)(file, BASE, 5 * LARGE)
    assert (caught.value.errno, caught.value.nbytes) == (errno.EIO, bad)
    if reading:
        check_read(device, data[:bad])
    else:
        assert_same((tmp_path / "file").read_bytes(), data[:bad], "the file")


@needs("loop")
def test_a_block_device_that_is_too_small(device, stage, tmp_path):
    with loop_device(tmp_path / "image", 2 * BLOCK) as path, dmabuf.open(path, "r+") as file:
        with pytest.raises(OSError, match="the device ends at 131072") as caught:
            stage.write_from(file, BASE, 2 * BLOCK, file_offset=4096)
        assert caught.value.errno == errno.ENOSPC and not device.begun
        assert stage.write_from(file, BASE, BLOCK, file_offset=BLOCK, sync=True).nbytes == BLOCK
        assert stage.read_into(file, BASE, 3 * BLOCK, file_offset=BLOCK).nbytes == BLOCK
        assert stage.read_into(file, BASE, BLOCK, file_offset=2 * BLOCK).nbytes == 0
    assert (tmp_path / "image").read_bytes() == bytes(BLOCK) + poison(1 << 20)[:BLOCK]


def test_a_file_that_shrinks(device, stage, path):
    with dmabuf.open(path) as file:
        read_into = file.read_into

        def shrinking(*args, **how):
            os.truncate(path, 2 * BLOCK)
            return read_into(*args, **how)

        file.read_into = shrinking
        with pytest.raises(dmabuf.ShortReadError, match="shrank") as caught:
            stage.read_into(file, BASE, SIZE)
    assert caught.value.nbytes == 2 * BLOCK
    check_read(device, pattern(SIZE, 1)[: 2 * BLOCK])


_LOST = """
import ctypes, logging, sys
import dmabuf
from dmabuf.devices.staging import Staging
from tests.unit.fake_device import BASE, FakeDevice
logging.basicConfig(stream=sys.stdout)
device = FakeDevice(1 << 20)
device.lost_at = 1
stage = Staging(device, block_size=65536, blocks=3)
with dmabuf.open(sys.argv[1], "r+") as file:
    for _ in range(2):
        try:
            getattr(stage, sys.argv[2])(file, BASE, 300000)
        except OSError as error:
            print(error, getattr(error, "nbytes", None))
stage.close()
del stage
assert not device.unpins and not device.broken and device.flying
for address, size in device.pinned.items():
    ctypes.memset(address, 1, size)  # the device may still write there
print("kept", len(device.pinned))
"""


@DIRECTIONS
def test_a_lost_device_keeps_its_blocks(path, direction):
    said = in_child(_LOST, path, direction)
    assert f"fallen off the bus {BLOCK}" in said
    assert "192 KiB of staging memory stays allocated" in said
    assert "[Errno 19] use fake:0: the device was lost" in said
    assert said.endswith("kept 3\n")


# -- interrupts


# One that arrives while Python closes a generator is only reported.
@pytest.mark.filterwarnings("ignore:.*generator:pytest.PytestUnraisableExceptionWarning")
@DIRECTIONS
@pytest.mark.parametrize(("failing", "burst"), [(False, 1), (True, 1), (False, 4)])
def test_an_interrupt_at_any_moment(device, stage, path, direction, failing, burst):
    """Also while an error is raised, and in bursts: no copy outlives the call, or the next one."""
    with dmabuf.open(path, "r+") as file:

        def move():
            getattr(stage, direction)(file, BASE, 4 * BLOCK)

        with Interruptions((), staging) as counted:
            move()
        assert counted.seen > 100
        for number in range(1, counted.seen + 60, 1 if burst == 1 else 5):
            if failing:
                device.fail_end[device.begun + 3] = OSError(errno.EIO, "the copy failed")
            with Interruptions(set(range(number, number + burst)), staging) as interruptions:
                try:
                    move()
                except KeyboardInterrupt:
                    assert interruptions.seen >= number
                except OSError:
                    assert failing
            device.fail_end.clear()
            if burst == 1:
                device.check()
            else:
                move()
                device.check()
        move()
    assert len(device.pinned) == 3


@DIRECTIONS
@pytest.mark.parametrize("count", [1, 5])
def test_interrupts_while_it_waits_for_copies(device, stage, path, direction, count):
    """While an error is raised: each interrupt is raised after the copies have ended."""
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


class Alarm(Exception):
    """Raised by a signal handler."""


@pytest.mark.parametrize("count", [1, 10])
def test_a_signal_ends_a_wait(device, stage, path, count):
    """Real signals, while a copy does not end; a device that answers in between is not lost."""
    alarms = []

    def handler(number, frame):
        alarms.append(number)
        if len(alarms) == count:
            device.lag = 2
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise Alarm

    device.lag = 1 << 60
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with dmabuf.open(path) as file, pytest.raises(Alarm) as caught:
            begun = device.to_device

            def beginning(*arguments):
                if device.begun == 2:  # the third is the last before it waits
                    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
                return begun(*arguments)

            device.to_device = beginning
            stage.read_into(file, BASE, SIZE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    device.check()
    if count == 1 and device.begun == 3:  # else the signal came before the wait
        assert caught.value.nbytes == 3 * BLOCK  # those in flight ended, and were whole
        check_read(device, pattern(SIZE, 1)[: 3 * BLOCK])
    with dmabuf.open(path) as file:
        assert stage.read_into(file, BASE, SIZE).nbytes == SIZE


def test_a_long_wait_is_logged(device, stage, path, caplog, monkeypatch):
    with dmabuf.open(path) as file:
        monkeypatch.setattr(time, "monotonic", itertools.count(0, 10).__next__)
        stage.read_into(file, BASE, SIZE)
        monkeypatch.undo()
    assert "waiting for fake:0: to end a copy" in caplog.text


# -- blocks, closing, threads, fork


@pytest.mark.parametrize(
    "how", [{"block_size": 4095}, {"block_size": "2GiB"}, {"blocks": 0}, {"blocks": 1025}]
)
def test_invalid_blocks(device, how):
    with pytest.raises(ValueError, match=next(iter(how))):
        Staging(device, **how)
    assert device.closed == 1


@pytest.mark.parametrize("number", [1, 3])
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


_KEPT = """
import ctypes
from dmabuf.devices.staging import Staging
from tests.unit.fake_device import FakeDevice
device = FakeDevice(1 << 20)
stage = Staging(device, block_size=65536, blocks=3)
device.fail_unpin[2] = OSError(5, "not unpinned")
try:
    stage.close()
except OSError as error:
    print(error)
assert stage.closed and device.closed == 1
((address, size),) = device.pinned.items()
ctypes.memset(address, 1, size)
"""


def test_a_block_that_cannot_be_unpinned_is_not_freed():
    assert in_child(_KEPT) == "[Errno 5] not unpinned\n"


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
    with pytest.warns(ResourceWarning, match=r"unclosed <dmabuf\.devices\.staging\.Staging"):
        del stage
    assert held() == before


def test_close_during_a_transfer(device, stage, path):
    with dmabuf.open(path) as file:
        read_into = file.read_into

        def closing(*args, **how):
            with pytest.raises(dmabuf.BusyError, match="a transfer is running"):
                stage.close()
            return read_into(*args, **how)

        file.read_into = closing
        stage.read_into(file, BASE, SIZE)
    assert not device.closed
    check_read(device, pattern(SIZE, 1))


def test_threads_take_turns(device, stage, path):
    part = 2 * BLOCK

    def move(number):
        with dmabuf.open(path) as file:
            for _ in range(4):
                where = {"file_offset": 512 * number}
                assert stage.read_into(file, BASE + number * part, part, **where).nbytes == part

    together(move, 4)
    for number in range(4):
        got = bytes(device.memory[number * part : (number + 1) * part])
        assert_same(got, pattern(SIZE, 1)[512 * number : 512 * number + part], f"thread {number}")


_FORK = """
import os, sys
import dmabuf
from dmabuf.devices.staging import Staging
from tests.unit.fake_device import BASE, FakeDevice
device = FakeDevice(1 << 20)
stage = Staging(device, block_size=65536, blocks=2)
child = os.fork()
with dmabuf.open(sys.argv[1]) as file:
    if not child:
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
"""


def test_after_a_fork(path):
    """The child cannot use it, and takes nothing from its parent."""
    assert "before fork()" in in_child(_FORK, path)

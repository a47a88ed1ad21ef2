"""Closing, dropping, sharing between threads, and fork."""

import gc
import subprocess
import sys
import threading
import warnings

import pytest

from dmabuf.errors import BusyError, ClosedError
from dmabuf.memory import Buffer, allocate
from tests.forking import in_child
from tests.resources import held
from tests.support import PATIENCE

SIZE = 1 << 16


pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture
def buf():
    with allocate(SIZE, exporter="memfd") as buffer:
        yield buffer


def test_a_slice_that_outlives_its_map_keeps_it_open(buf):
    called = []
    buf.on_close(lambda: called.append(1))
    with buf.map("r+") as view:
        part = view[10:20]
    for _ in range(2):
        with pytest.raises(
            BufferError, match=r"cannot close <.*: exported pointers exist.*delete them"
        ):
            buf.close()
    part[:2] = b"hi"
    assert buf.pread(2, 10) == b"hi" and called == []
    part.release()
    buf.close()
    assert called == [1]


def test_a_buffer_in_use_is_busy(buf):
    buf.hold()
    buf.hold()
    buf.release()
    with pytest.raises(BusyError, match="a transfer is running"):
        buf.close()
    assert buf.write(b"x") == 1
    buf.release()
    buf.close()


def test_on_close_calls_back_once_without_the_lock():
    called = []

    def callback():
        thread = threading.Thread(target=lambda: called.append(buffer.closed))
        thread.start()
        thread.join()
        with pytest.raises(ClosedError):
            buffer.hold()

    buffer = allocate(SIZE, exporter="memfd")
    buffer.on_close(callback)
    buffer.close()
    buffer.close()
    assert called == [True]


def test_a_callback_that_fails_leaks_nothing():
    buffer = allocate(SIZE, exporter="memfd")
    buffer.on_close(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        buffer.close()
    assert buffer.closed


def test_dropping_one_warns_and_closes():
    before = held()
    called = []
    buffer = allocate(SIZE, exporter="memfd", name="dropped")
    buffer.on_close(lambda: called.append(1))
    with pytest.warns(ResourceWarning, match="unclosed <dmabuf.Buffer 'dropped' 64 KiB") as told:
        del buffer
        gc.collect()
    assert held() == before and called == [1]
    assert told[0].filename == __file__


AT_EXIT = """
import ctypes, sys
import dmabuf
buffer = dmabuf.allocate(1 << 16)
array, window = buffer.asarray(), buffer.open()
file, own = dmabuf.open(sys.argv[1]), dmabuf.open(sys.argv[1], engine=dmabuf.Engine())
for one in file, own:
    one.read_into(buffer)
for module in list(sys.modules.values()):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
"""


def test_what_is_open_at_exit_is_left_to_the_kernel(path):
    """Also where a library keeps the modules, as PyTorch does, and CPython clears their names."""
    command = [sys.executable, "-c", AT_EXIT, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


def test_dropping_a_closed_one_or_a_window_does_not_warn(buf):
    other = allocate(SIZE, exporter="memfd")
    other.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buf.open()
        del other
        gc.collect()


def test_a_view_outlives_a_dropped_buffer():
    with pytest.warns(ResourceWarning):
        buffer = allocate(SIZE, exporter="memfd")
        with buffer.map("r+") as view:
            part = view[:4]
        del buffer
        gc.collect()
    part[:] = b"safe"
    assert bytes(part) == b"safe"
    part.release()


def test_a_window_keeps_its_buffer(buf):
    window = allocate(SIZE, exporter="memfd").open()
    gc.collect()
    window.write(b"x")
    window.buffer.close()


def test_a_half_made_one_is_nothing():
    half = Buffer.__new__(Buffer)
    assert half.closed and "not made" in repr(half)


def test_threads_at_offsets_do_not_disturb_each_other(buf):
    errors = []
    share = SIZE // 8

    def work(number):
        try:
            for round_ in range(200):
                data = bytes([number * 16 + round_ % 16]) * share
                buf.pwrite(data, number * share)
                assert buf.pread(share, number * share) == data
                with buf.map("r", number * share, share) as view:
                    assert view == data
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    buf.close()


def test_close_races_with_use_and_both_notice():
    for _ in range(50):
        buffer = allocate(4096, exporter="memfd")
        start = threading.Barrier(3)
        errors = []

        def use(buffer=buffer, start=start, errors=errors):
            start.wait()
            try:
                while True:
                    buffer.pread(4096, 0)
                    with buffer.map("r") as view:
                        bytes(view)
            except ClosedError:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        while not buffer.closed:
            try:
                buffer.close()
            except BufferError:  # BusyError, too
                continue
        for thread in threads:
            thread.join()
        assert errors == []


def test_a_forked_child_shares_the_memory(buf):
    buf.write(b"parent")

    def child():
        assert buf.pread(6, 0) == b"parent"
        buf.write(b" and child")
        buf.close()

    in_child(child)
    assert not buf.closed
    assert buf.pread(16, 0) == b"parent and child"
    assert buf.tell() == 6


def test_a_forked_child_is_not_held_by_what_the_parent_does(buf, monkeypatch):
    """Neither by a transfer, nor by a lock, and the parent's pins are not the child's to undo."""
    called = []
    buf.on_close(lambda: called.append(1))
    buf.hold()
    locked, done = threading.Event(), threading.Event()
    check_open = buf.check_open

    def check_and_block():
        """Called with the buffer's lock held."""
        if threading.current_thread() is holder:
            locked.set()
            done.wait()
        check_open()

    monkeypatch.setattr(buf, "check_open", check_and_block)
    holder = threading.Thread(target=lambda: buf.address)
    holder.start()
    locked.wait()
    try:

        def child():
            assert buf.pread(1, 0) == b"\0"
            buf.close()
            assert called == []

        in_child(child)
    finally:
        done.set()
        holder.join()
        buf.release()

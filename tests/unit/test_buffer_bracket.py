"""Every CPU access to a dma-buf is between SYNC START and END, on the slabs it touches."""

import errno
import mmap

import pytest

from dmabuf.kernel import uapi
from dmabuf.memory import allocate
from tests.support import raises_errno

PAGE = mmap.PAGESIZE


@pytest.fixture
def buf(kernel):
    """Four slabs of one page each."""
    kernel.limit = PAGE
    with allocate(4 * PAGE, exporter="udmabuf") as buffer:
        assert [slab.size for slab in buffer.slabs] == [PAGE] * 4
        kernel.fds = [slab.fd for slab in buffer.slabs]
        yield buffer


def calls(kernel):
    """The calls since last asked, with slab numbers in place of descriptors."""
    done = [(kernel.fds.index(fd), what, how) for fd, what, how in kernel.calls]
    kernel.calls.clear()
    return done


def around(slabs, how):
    return [(slab, "START", how) for slab in slabs] + [
        (slab, "END", how) for slab in reversed(slabs)
    ]


def test_only_the_slabs_that_are_touched(kernel, buf):
    for offset, size, slabs in [
        (0, 1, [0]),
        (0, PAGE, [0]),
        (PAGE - 1, 1, [0]),
        (PAGE, 1, [1]),
        (PAGE - 1, 2, [0, 1]),
        (PAGE, 2 * PAGE, [1, 2]),
        (10, 3 * PAGE, [0, 1, 2, 3]),
        (3 * PAGE, PAGE, [3]),
    ]:
        assert len(buf.pread(size, offset)) == size
        assert calls(kernel) == around(slabs, "R")
        with buf.map("r", offset, size):
            assert calls(kernel) == [(slab, "START", "R") for slab in slabs]
        assert calls(kernel) == [(slab, "END", "R") for slab in reversed(slabs)]
        with buf.cpu_access(True, True, offset, size):
            pass
        assert calls(kernel) == around(slabs, "RW")


def test_no_bytes_no_bracket(kernel, buf):
    assert buf.pread(1, 4 * PAGE) == buf.pread(0, 5) == b""
    assert buf.pwrite(b"", 0) == 0
    with buf.map("r+", PAGE, 0):
        pass
    assert calls(kernel) == []


def test_each_access_names_its_direction(kernel, buf):
    buf.read(1)
    buf.readinto(bytearray(1))
    buf.preadv([bytearray(1)], 0)
    assert calls(kernel) == around([0], "R") * 3
    buf.pwrite(bytes(PAGE), PAGE)
    assert calls(kernel) == around([1], "W")
    with buf.map("w", 0, PAGE):
        pass
    assert calls(kernel) == around([0], "W")
    with buf.map("r+", 0, PAGE):
        pass
    assert calls(kernel) == around([0], "RW")
    window = buf.open(offset=PAGE)
    window.read(1)
    assert calls(kernel) == around([1], "R")


def test_writing_part_of_a_page_needs_what_is_beside_it(kernel, buf):
    # The CPU writes back whole cache lines: the rest of the first and last must be fresh.
    buf.write(b"x")
    buf.pwrite(bytes(PAGE), 1)
    with buf.map("w", 0, PAGE - 1):
        pass
    assert calls(kernel) == around([0], "RW") + around([0, 1], "RW") + around([0], "RW")


def test_the_bracket_is_retried_when_interrupted(kernel, buf):
    kernel.sync_errors = [errno.EINTR, errno.EAGAIN, 0, errno.EINTR, errno.EAGAIN, 0]
    buf.pread(1, 0)
    assert calls(kernel) == [(0, "START", "R")] * 3 + [(0, "END", "R")] * 3
    assert kernel.sync_errors == []


def test_end_comes_after_an_exception_too(kernel, buf):
    with pytest.raises(ZeroDivisionError), buf.map("r+", 0, 2 * PAGE):
        raise ZeroDivisionError
    assert calls(kernel) == around([0, 1], "RW")


def test_an_interrupt_that_raises_ends_what_was_started(kernel, buf):
    class Interrupt(BaseException):
        pass

    def interrupted(fd, request, argument):
        kernel.ioctl(fd, request, argument)
        if len(kernel.calls) == 2:
            raise Interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uapi, "ioctl", interrupted)
        with pytest.raises(Interrupt):
            buf.pread(3 * PAGE, 0)
    assert calls(kernel) == around([0, 1], "R")
    buf.close()


def test_a_start_that_fails_ends_those_before_it(kernel, buf):
    kernel.sync_errors = [0, 0, errno.EIO]
    with raises_errno(errno.EIO):
        buf.pread(4 * PAGE, 0)
    starts = [(0, "START", "R"), (1, "START", "R"), (2, "START", "R")]
    assert calls(kernel) == [*starts, (1, "END", "R"), (0, "END", "R")]
    buf.close()


def test_an_end_that_fails_is_reported_after_all_the_others(kernel, buf):
    kernel.sync_errors = [0, 0, errno.EIO, 0]
    with raises_errno(errno.EIO):
        buf.pread(2 * PAGE, 0)
    assert calls(kernel) == around([0, 1], "R")
    kernel.sync_errors = [0, errno.EIO]
    with pytest.raises(ZeroDivisionError), buf.map("r", 0, 1):
        raise ZeroDivisionError
    buf.close()


def test_a_view_over_which_an_array_was_made_is_left_to_it(kernel, buf):
    with buf.map("r+", 0, PAGE) as view:
        over = memoryview(bytearray(0))
        from pickle import PickleBuffer

        over = PickleBuffer(view)
    assert calls(kernel) == around([0], "RW")
    assert over.raw()[:4] == bytes(4)
    with pytest.raises(BufferError, match="exported pointers exist"):
        buf.close()
    over.release()
    view.release()
    buf.close()


def test_a_bracket_lasts_to_its_own_end_even_if_the_view_is_released(kernel, buf):
    with buf.map("r", 0, 1) as view:
        view.release()
        with pytest.raises(BufferError, match="exported pointers exist"):
            buf.close()
    assert calls(kernel) == around([0], "R")


def test_a_heap_has_the_bracket(kernel):
    with allocate(PAGE, exporter="system") as buffer:
        kernel.fds = [buffer.fileno()]
        buffer.pread(1, 0)
        assert calls(kernel) == around([0], "R")


def test_a_memfd_has_none(kernel):
    with allocate(PAGE, exporter="memfd") as buffer:
        buffer.write(b"x")
        with buffer.map("r+"):
            pass
    assert kernel.calls == []

"""Pipes, FIFOs, sockets and character devices: in order, to the size asked for or the end."""

import errno
import os
import select
import signal
import socket
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmabuf
from dmabuf import BusyError, Route, aio
from dmabuf.transfer.run import Blocking
from tests.core import lib
from tests.support import PATIENCE, assert_same, pattern, poison, raises_errno

SIZE = 1 << 20


def _pipe():
    return os.pipe()


def _sockets():
    one, other = socket.socketpair()
    return one.detach(), other.detach()


@contextmanager
def _ends(make):
    """(read from, write to); closed at the end, where the test has not."""
    fds = list(make())
    try:
        yield fds
    finally:
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _close(fds, which):
    fd, fds[which] = fds[which], -1
    os.close(fd)


@contextmanager
def doing(function, *arguments):
    """Run a function in a thread meanwhile; its exception is raised at the end."""
    failures = []

    def run():
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def _write_all(fds, data):
    while data:
        data = data[os.write(fds[1], data) :]
    _close(fds, 1)


def _read_all(fd, into):
    while part := os.read(fd, 1 << 16):
        into.append(part)


@pytest.mark.parametrize("make", [_pipe, _sockets])
@settings(max_examples=8)
@given(
    st.sampled_from([0, 1, 4096, 65535, 65536, 65537, SIZE]),
    st.sampled_from([None, 0, 1, 65536, 70000, SIZE - 5]),
    st.sampled_from([0, 1, 5]),
)
def test_read_ends_at_the_size_or_the_end(make, buf, sent, size, at):
    data = pattern(sent, 4)
    with _ends(make) as fds, dmabuf.open(fds[0]) as file:
        buf.pwrite(poison(SIZE), 0)
        got = min(sent, SIZE - at if size is None else size)
        rest = []
        with doing(_write_all, fds, data):
            transfer = file.read_into(buf, size, buffer_offset=at)
            _read_all(fds[0], rest)
    assert (transfer.nbytes, transfer.copied, transfer.route) == (got, got, Route.BUFFERED)
    expected = poison(at) + data[:got] + poison(SIZE)[at + got :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")
    assert b"".join(rest) == data[got:]


@pytest.mark.parametrize("make", [_pipe, _sockets])
@pytest.mark.parametrize("blocking", [True, False])
def test_write_is_whole(make, buf, blocking):
    buf.pwrite(poison(SIZE), 0)
    with _ends(make) as fds, dmabuf.open(fds[1], "w") as file:
        os.set_blocking(fds[1], blocking)
        parts = []
        with doing(_read_all, fds[0], parts):
            transfer = file.write_from(buf, SIZE - 7, buffer_offset=7)
            file.close()
            if make is _sockets:
                os.set_blocking(fds[1], True)
            _close(fds, 1)
    assert transfer.nbytes == SIZE - 7
    assert_same(b"".join(parts), poison(SIZE)[7:], "what arrived")


def test_a_nonblocking_reader_waits_for_its_writer(buf):
    with _ends(_pipe) as fds, dmabuf.open(fds[0]) as file:
        os.set_blocking(fds[0], False)
        with doing(_write_all, fds, pattern(300_000, 5)):
            assert file.read_into(buf, 300_000).nbytes == 300_000
    assert_same(buf.pread(300_000, 0), pattern(300_000, 5), "the buffer")


def test_a_fifo_by_its_path(tmp_path, buf):
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def write():
        with dmabuf.open(path, "w") as file, dmabuf.allocate(4096, exporter="memfd") as other:
            other.pwrite(b"through a fifo", 0)
            assert file.kind == "pipe" and file.size is None
            assert file.write_from(other, 14).nbytes == 14

    with doing(write), dmabuf.open(path) as file:
        assert file.read_into(buf).nbytes == 14
    assert buf.pread(14, 0) == b"through a fifo"


def test_two_pipes_in_opposite_directions_at_once(buf):
    data = pattern(SIZE // 2, 6)
    with (
        _ends(_pipe) as there,
        _ends(_pipe) as back,
        dmabuf.open(there[0]) as source,
        dmabuf.open(back[1], "w") as sink,
    ):
        buf.pwrite(poison(SIZE), 0)
        parts = []
        with doing(_read_all, back[0], parts):
            with doing(_write_all, there, data), doing(source.read_into, buf, SIZE // 2):
                sink.write_from(buf, SIZE // 2, buffer_offset=SIZE // 2)
            sink.close()
            _close(back, 1)
    assert_same(buf.pread(SIZE // 2, 0), data, "what was read")
    assert_same(b"".join(parts), poison(SIZE)[SIZE // 2 :], "what was written")


def test_devices_that_are_streams(buf):
    buf.pwrite(poison(SIZE), 0)
    with dmabuf.open("/dev/zero") as file:
        assert file.kind == "character device"
        assert file.read_into(buf, 5000, buffer_offset=3).nbytes == 5000
    assert buf.pread(5006, 0) == poison(3) + bytes(5000) + poison(5006)[5003:]
    with dmabuf.open("/dev/null", "r+") as file:
        assert file.read_into(buf).nbytes == 0
        assert file.write_from(buf).nbytes == SIZE
    with (
        dmabuf.open("/dev/full", "w") as file,
        raises_errno(errno.ENOSPC, filename="/dev/full", nbytes=0),
    ):
        file.write_from(buf)


@pytest.mark.parametrize("verb", ["read_into", "write_from"])
def test_a_stream_has_no_offset_and_no_segments(verb, buf):
    with dmabuf.open("/dev/null", "r+") as file:
        for wrong in (0, 4096):
            with raises_errno(errno.ESPIPE, filename="/dev/null"):
                getattr(file, verb)(buf, 1, file_offset=wrong)
        segments = "read_segments" if verb == "read_into" else "write_segments"
        with raises_errno(errno.ESPIPE):
            getattr(file, segments)(buf, memoryview(bytes(24)).cast("Q"))


def test_only_buffered_will_do(buf):
    with _ends(_pipe) as fds, dmabuf.open(fds[0]) as file:
        plan = file.plan(buf)
        assert plan.route is Route.BUFFERED
        why = "a pipe is read and written in order, by the kernel's copy"
        assert plan.rejected == {Route.NATIVE: why, Route.DIRECT: why, Route.STAGED: why}
        os.write(fds[1], b"bytes")
        assert file.read_into(buf, 5, fence=False).nbytes == 5  # no dma-buf has fences
        for how in ({"require": "uncached"}, {"require": "zero-copy"}, {"route": "staged"}):
            with pytest.raises(dmabuf.RouteUnavailable, match="in order"):
                file.read_into(buf, **how)


def test_timeout_is_for_the_first_byte(buf, monkeypatch):
    with _ends(_pipe) as fds, dmabuf.open(fds[0]) as file:
        with pytest.raises(TimeoutError) as caught:
            file.read_into(buf, 10, timeout=0)
        assert caught.value.filename == f"descriptor {fds[0]}" and caught.value.nbytes == 0

        ready, deadlines = Blocking.ready, []

        async def feed_the_second_wait(self, fd, access, deadline, path):
            deadlines.append(deadline)
            if len(deadlines) == 2:
                os.write(fds[1], b"67890")
            await ready(self, fd, access, deadline, path)

        monkeypatch.setattr(Blocking, "ready", feed_the_second_wait)
        os.write(fds[1], b"12345")
        assert file.read_into(buf, 10, timeout=0).nbytes == 10
    assert buf.pread(10, 0) == b"1234567890"
    assert deadlines[0] is not None and deadlines[1:] == [None]


def test_a_full_pipe_times_out(buf):
    with _ends(_pipe) as fds, dmabuf.open(fds[1], "w") as file:
        os.set_blocking(fds[1], False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(fds[1], bytes(4096))
        with pytest.raises(TimeoutError):
            file.write_from(buf, timeout=0)


def test_a_peer_that_goes_tells_how_much_went(buf):
    """The reader takes 100000 bytes and goes: how much the pipe took then is the kernel's."""
    with _ends(_pipe) as fds, dmabuf.open(fds[1], "w") as file:

        def take_some():
            left = 100_000
            while left:
                left -= len(os.read(fds[0], left))
            _close(fds, 0)

        with pytest.raises(BrokenPipeError) as caught, doing(take_some):
            file.write_from(buf)
        assert caught.value.filename == f"descriptor {fds[1]}"
        assert caught.value.nbytes < SIZE


def test_a_reset_tells_how_much_came(buf):
    """A TCP peer that resets: the bytes before are in the buffer, and counted."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        with client, peer, dmabuf.open(client.fileno()) as file:
            peer.sendall(b"x" * 1000)
            with doing(_reset_when_read, peer, client), pytest.raises(OSError) as caught:
                file.read_into(buf, 2000)
    assert caught.value.errno == errno.ECONNRESET
    assert caught.value.nbytes == 1000
    assert buf.pread(1000, 0) == b"x" * 1000


def _reset_when_read(peer, client):
    import fcntl
    import struct
    import termios

    while struct.unpack("i", fcntl.ioctl(client, termios.FIONREAD, b"\0" * 4))[0]:
        pass  # until the reader has taken all of it
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def test_the_cpu_has_access_to_what_a_stream_moves(kernel):
    """Also to read for a read: its bytes may begin and end within a cache line."""
    with (
        _ends(_pipe) as fds,
        dmabuf.allocate(4096, exporter="udmabuf") as buf,
        dmabuf.open(fds[1], "w") as sink,
        dmabuf.open(fds[0]) as source,
    ):
        for move, access in (sink.write_from, "R"), (source.read_into, "RW"):
            kernel.calls.clear()
            move(buf, 100)
            assert [call[1:] for call in kernel.calls] == [("START", access), ("END", access)]


def test_a_buffer_in_use_cannot_be_closed(buf):
    """The read is blocked until it is fed; nothing but the feeding ends it."""
    with _ends(_pipe) as fds, dmabuf.open(fds[0]) as file:
        os.write(fds[1], b"1")
        with doing(file.read_into, buf, 2):
            while buf.pread(1, 0) != b"1":
                pass
            with pytest.raises(BusyError, match="a transfer is running"):
                buf.close()
            assert not buf.closed and buf.pread(1, 0) == b"1"
            os.write(fds[1], b"2")
        assert buf.pread(2, 0) == b"12"
    buf.close()


def test_a_file_closed_under_a_transfer_keeps_its_descriptor(buf):
    """Else the number could become another file's, and take its bytes or lose it some."""
    with _ends(_pipe) as fds:
        file = dmabuf.open(fds[0])
        number = file.fileno()
        os.write(fds[1], b"1")
        with doing(file.read_into, buf, 2):
            while buf.pread(1, 0) != b"1":
                pass
            file.close()
            assert file.closed
            with pytest.raises(dmabuf.ClosedError):
                file.read_into(buf, 1)
            assert os.fstat(number).st_ino == os.fstat(fds[0]).st_ino
            os.write(fds[1], b"2")
        assert buf.pread(2, 0) == b"12"
        with pytest.raises(OSError):
            os.fstat(number)


class _StopError(Exception):
    pass


def test_an_interrupt_ends_a_wait_at_once(buf):
    def stop(signum, frame):
        raise _StopError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with _ends(_pipe) as fds, dmabuf.open(fds[0]) as file:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(_StopError):
                file.read_into(buf, 10)
            os.write(fds[1], b"0123456789")  # nobody took a byte of it, and all still works
            assert file.read_into(buf, 10).nbytes == 10
    finally:
        signal.signal(signal.SIGALRM, before)
    buf.close()


def test_signals_that_do_not_raise_disturb_nothing(buf):
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    data = pattern(SIZE, 7)
    try:
        with _ends(_pipe) as fds, dmabuf.open(fds[0]) as file:

            def feed():
                rest = data
                while rest:
                    os.write(fds[1], rest[:4096])
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
                    rest = rest[4096:]

            with doing(feed):
                assert file.read_into(buf).nbytes == SIZE
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits
    assert_same(buf.pread(SIZE, 0), data, "the buffer")


# -- messages


def _message_pair(kind):
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    return one.detach(), other.detach()


def _udp_pair():
    reader = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    reader.bind(("127.0.0.1", 0))
    writer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    writer.connect(reader.getsockname())
    return reader.detach(), writer.detach()


MESSAGES = {
    "seqpacket": lambda: _message_pair(socket.SOCK_SEQPACKET),
    "datagram": lambda: _message_pair(socket.SOCK_DGRAM),
    "udp": _udp_pair,
    "packet pipe": lambda: os.pipe2(os.O_DIRECT),
}


@pytest.fixture(params=list(MESSAGES))
def messages(request):
    with _ends(MESSAGES[request.param]) as fds:
        yield fds


def test_a_read_ends_before_a_message_that_does_not_fit(messages, move, buf):
    sent = [bytes([65 + number]) * 3000 for number in range(4)]
    for message in sent:
        os.write(messages[1], message)
    buf.pwrite(poison(SIZE), 0)
    assert move(messages[0], "read_into", buf, 7000).nbytes == 6000
    assert_same(buf.pread(7000, 0), sent[0] + sent[1] + poison(7000)[6000:], "two messages")
    assert move(messages[0], "read_into", buf, 6000).nbytes == 6000
    assert_same(buf.pread(6000, 0), sent[2] + sent[3], "the two others")


def test_a_first_message_that_does_not_fit_is_refused_and_stays(messages, move, buf):
    os.write(messages[1], b"m" * 1000)
    buf.pwrite(poison(SIZE), 0)
    with raises_errno(errno.EMSGSIZE, "read into more", nbytes=0):
        move(messages[0], "read_into", buf, 999)
    assert_same(buf.pread(1000, 0), poison(1000), "what the refusal left")
    assert move(messages[0], "read_into", buf, 1000).nbytes == 1000
    assert buf.pread(1000, 0) == b"m" * 1000


def test_a_write_is_one_message(move, buf):
    with _ends(MESSAGES["seqpacket"]) as fds:
        buf.pwrite(pattern(100_000, 9), 0)
        assert move(fds[1], "write_from", buf, 100_000).requests == 1
        assert_same(os.read(fds[0], SIZE), pattern(100_000, 9), "the message")
        with raises_errno(errno.EMSGSIZE, "write less at a time", nbytes=0):
            move(fds[1], "write_from", buf)


def test_a_message_socket_keeps_its_flags(messages, buf):
    os.write(messages[1], b"one")
    socket.setdefaulttimeout(30)
    try:
        with dmabuf.open(messages[0]) as file:
            assert file.read_into(buf, 3).nbytes == 3
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(messages[0])


@pytest.mark.parametrize("path", ["/dev/kmsg", "/dev/random"])
def test_a_device_that_never_polls_writable_takes_a_write(move, path, buf):
    if not os.access(path, os.W_OK):
        pytest.skip(f"needs write permission on {path}: run as root")
    buf.pwrite(b"tests: hello\n", 0)
    assert move(path, "write_from", buf, 13).nbytes == 13


def _nothing():
    return os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize("make", [_pipe, _nothing])
def test_a_write_that_finds_no_room_waits_again(move, buf, monkeypatch, make):
    """As where another writer fills the pipe after poll(2), or a device is busy."""
    written = []

    def full_at_first(real):
        def call(fd, views, *how):
            written.append(bytes(views[0]))
            if len(written) == 1:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return real(fd, views, *how)

        return call

    for name in ("writev", "pwritev"):
        monkeypatch.setattr(os, name, full_at_first(getattr(os, name)))
    buf.pwrite(poison(SIZE), 0)
    with _ends(make) as fds:
        assert move(fds[1], "write_from", buf, 4000).nbytes == 4000
        arrived = os.read(fds[0], SIZE) if make is _pipe else written[1]
    assert_same(arrived, poison(4000), "what was written")
    assert written == [arrived, arrived]


@pytest.mark.parametrize("verb", ["read_into", "write_from"])
@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EIO])
def test_an_event_loop_where_rwf_nowait_is_not_supported(run, buf, monkeypatch, verb, error):
    """As of terminals, and of pipes before Linux 6.2; any other error is one."""

    def refuse(_fd, _views, offset, flags):
        assert (offset, flags) == (-1, os.RWF_NOWAIT)
        raise OSError(error, os.strerror(error))

    size = 3 * select.PIPE_BUF + 5
    buf.pwrite(poison(SIZE), 0)

    async def main():
        async with await aio.open(fds[verb == "write_from"], "rw"[verb == "write_from"]) as file:
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", refuse)
                patch.setattr(os, "pwritev", refuse)
                if error != errno.EOPNOTSUPP:
                    with raises_errno(error, nbytes=0):
                        await getattr(file, verb)(buf, size)
                else:
                    assert (await getattr(file, verb)(buf, size)).nbytes == size

    with _ends(_pipe) as fds:
        if verb == "read_into":
            os.write(fds[1], pattern(size, 7))
        run(main)
        moved = error == errno.EOPNOTSUPP
        if verb == "read_into":
            expected = (pattern(size, 7) if moved else poison(size)) + poison(SIZE)[size:]
            assert_same(buf.pread(SIZE, 0), expected, "the buffer")
        elif moved:
            assert_same(os.read(fds[0], SIZE), poison(size), "the pipe")


def test_a_message_that_another_reader_takes_is_not_mistaken_for_the_next(buf, monkeypatch):
    class Robbed(socket.socket):
        def recv_into(self, *how):
            size = super().recv_into(*how)
            os.read(fds[0], SIZE)
            return size

    monkeypatch.setattr(socket, "socket", Robbed)
    with _ends(MESSAGES["datagram"]) as fds, dmabuf.open(fds[0]) as file:
        os.write(fds[1], b"m" * 10)
        os.write(fds[1], b"n" * 100)
        with raises_errno(errno.EMSGSIZE, "read this socket in one place only", nbytes=0):
            file.read_into(buf, 50)


def test_packets_that_another_reader_takes_are_waited_for_again(buf, monkeypatch):
    real = lib.dmb_tee

    def robbed(fd, *how):
        os.read(fd, SIZE), os.read(fd, SIZE)
        count = real(fd, *how)
        os.write(fds[1], b"n" * 40)
        _close(fds, 1)
        return count

    monkeypatch.setattr(lib, "dmb_tee", robbed)
    buf.pwrite(poison(SIZE), 0)
    with _ends(lambda: os.pipe2(os.O_DIRECT | os.O_NONBLOCK)) as fds, dmabuf.open(fds[0]) as file:
        os.write(fds[1], b"m" * 50)
        os.write(fds[1], b"m" * 60)
        assert file.read_into(buf, 60).nbytes == 40
    assert_same(buf.pread(60, 0), b"n" * 40 + poison(60)[40:], "the buffer")

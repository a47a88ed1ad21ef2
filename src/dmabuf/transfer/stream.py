"""Transfers of pipes, sockets and character devices: bytes in order, without offsets.

The functions are coroutines that await a Waiter wherever they wait (see run.py). They use only
system calls that Python interrupts for signals, so Ctrl-C ends a wait at once, and hold no ring
while they wait for the peer.

An event loop must not block in a read or write either, and the descriptor may be a blocking one
that other processes share, so its flags cannot be changed. There each call passes RWF_NOWAIT.
Where the kernel does not support that for a file (EOPNOTSUPP: terminals, pipes before Linux 6.2),
poll replaces it: a read after POLLIN returns what is there, and a write of at most PIPE_BUF bytes
after POLLOUT fits.

Two kinds of files keep the borders of messages: sockets other than SOCK_STREAM, and pipes made
with O_DIRECT (packet mode, pipe(2)). A read cuts off what does not fit of a message, and the rest
is lost. So a read takes a message only where it fits whole: it ends before one that does not fit,
and fails with EMSGSIZE where that is the first. A write to such a socket sends one message.

A write to a character device other than a terminal is not preceded by poll: some devices, such as
/dev/kmsg, accept writes and never report POLLOUT. The write waits as write(2) does, and a timeout
does not bound it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import stat
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dmabuf._core import ffi, lib
from dmabuf.errors import TransferError
from dmabuf.transfer.engine import Job
from dmabuf.transfer.run import Waiter

if TYPE_CHECKING:
    import socket  # imported where a socket is used: it is slow to load

CHUNK = 1 << 20
"""Bytes requested at once: the capacity of a large pipe."""

_PACKET = max(mmap.PAGESIZE, select.PIPE_BUF)
"""The largest packet of a pipe in packet mode, in bytes (pipe_write in fs/pipe.c)."""

_Move = Callable[[int, list[memoryview]], int]


class _NoRoomError(OSError):
    """The next message does not fit into the rest of the buffer."""


async def read(
    fd: int, view: memoryview, timeout: float | None, path: str, waiter: Waiter
) -> tuple[int, int]:
    """Read until the view is full, the stream ends, or the next message does not fit.

    Args:
        fd: a descriptor, blocking or not.
        view: the destination.
        timeout: seconds to wait for the first byte; None waits without limit.
        path: the file's name in errors.
        waiter: how to wait; unless it is blocking, the read itself never blocks, even if another
            reader takes the data first.

    Returns:
        The number of bytes, and the number of reads.

    Raises:
        OSError: with `nbytes`, the number of bytes that were read before; errno EMSGSIZE where
            the first message does not fit, which leaves it unread.
    """
    done = requests = 0
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        with _message_socket(fd) as messages:
            readv, most = _reader(fd, messages, not waiter.blocking)
            while done < len(view):
                await waiter.ready(fd, "read", deadline if done == 0 else None, path)
                try:
                    with view[done : done + most] as part:
                        got = readv(fd, [part])
                except BlockingIOError:
                    continue
                except _NoRoomError:
                    if done:
                        break
                    raise
                requests += 1
                if got == 0:
                    break
                done += got
    except OSError as error:
        raise _failure(error, "reading", done, len(view), path) from error
    return done, requests


async def write(
    fd: int, view: memoryview, timeout: float | None, path: str, waiter: Waiter
) -> tuple[int, int]:
    """Write all of a view; to a socket that keeps the borders of messages, as one message.

    Args:
        fd: a descriptor, blocking or not.
        view: the source.
        timeout: seconds to wait until the peer takes the first byte; None waits without limit.
        path: the file's name in errors.
        waiter: how to wait; unless it is blocking, the write itself never blocks.

    Returns:
        The number of bytes, and the number of writes.

    Raises:
        OSError: with `nbytes`, the number of bytes that were written before.
    """
    done = requests = 0
    deadline = None if timeout is None else time.monotonic() + timeout
    unpolled = _is_unpolled(fd)
    try:
        with _message_socket(fd) as messages:
            writev, most = _writer(messages, not waiter.blocking and not unpolled)
            while done < len(view):
                until = deadline if done == 0 else None
                with view[done : done + most] as part:
                    once = _Once(writev, fd, part)
                    try:
                        if unpolled:
                            await waiter.call(once)
                        else:
                            await waiter.ready(fd, "write", until, path)
                            once()
                    except BlockingIOError:
                        if unpolled:
                            await waiter.ready(fd, "write", until, path)
                        continue
                done += once.moved
                requests += 1
    except OSError as error:
        raise _failure(error, "writing", done, len(view), path) from error
    return done, requests


def _is_unpolled(fd: int) -> bool:
    """Return whether poll(2) may not report that the descriptor accepts a write."""
    return stat.S_ISCHR(os.fstat(fd).st_mode) and not os.isatty(fd)


def read_at(fd: int, view: memoryview, offset: int) -> tuple[int, int, int]:
    """Read a file from an offset until the view is full or a read returns nothing.

    For files whose size is not known before: each read continues where the last one ended, as the
    short reads of procfs need it.

    Returns:
        The number of bytes, the number of reads, and the errno of the last read or 0.
    """
    done = requests = 0
    while done < len(view):
        try:
            with view[done : done + CHUNK] as part:
                got = os.preadv(fd, [part], offset + done)
        except OSError as error:
            return done, requests, error.errno or errno.EIO
        requests += 1
        if got == 0:
            break
        done += got
    return done, requests, 0


async def read_unsized(fd: int, job: Job, waiter: Waiter) -> None:
    """Run a job that reads a file which hides its size, each segment until a read returns nothing.

    Args:
        fd: the file.
        job: the job, whose result is filled in.
        waiter: how to wait.
    """
    measure, result = job.measure, ffi.new("struct dmb_result *")
    job.result, result.short_segment = result, -1
    first, size = measure.buffer_start, measure.buffer_end - measure.buffer_start
    with job.buffer.cpu_access(True, True, first, size):
        for index in range(job.count):
            offset, start, wanted = job.segments[3 * index : 3 * index + 3]
            with job.buffer.view(start, wanted) as view:
                done, requests, number = await waiter.call(partial(read_at, fd, view, offset))
            result.nbytes += done
            result.copied += done
            result.requests += requests
            if number:
                result.error, result.error_offset = number, offset + done
                return
            if done < wanted:
                result.short_segment = index
                return


# -- one read or write


def _reader(fd: int, messages: socket.socket | None, nowait: bool) -> tuple[_Move, int]:
    """Return a function that reads once, and the most bytes to request of it."""
    if messages is not None:
        return _MessageReader(messages), 1 << 62
    read: _Move = _Now(_read_now, os.readv, CHUNK) if nowait else os.readv
    return (_PipeReader(read) if stat.S_ISFIFO(os.fstat(fd).st_mode) else read), CHUNK


def _writer(messages: socket.socket | None, nowait: bool) -> tuple[_Move, int]:
    """Return a function that writes once, and the most bytes to pass to it."""
    if messages is not None:
        import socket

        return lambda _, views: messages.sendmsg(views, (), socket.MSG_DONTWAIT), 1 << 62
    return (_Now(_write_now, os.writev, select.PIPE_BUF) if nowait else os.writev), CHUNK


class _Once:
    """One write, which another thread may run; `moved` is the number of bytes written."""

    def __init__(self, write: _Move, fd: int, view: memoryview) -> None:
        self._write, self._fd, self._view = write, fd, view
        self.moved = 0

    def __call__(self) -> None:
        self.moved = self._write(self._fd, [self._view])


class _Now:
    """A read or write that does not block: with RWF_NOWAIT, or a small one if unsupported."""

    def __init__(self, now: _Move, plain: _Move, most: int) -> None:
        self._now, self._plain, self._most = now, plain, most
        self._supported = True

    def __call__(self, fd: int, views: list[memoryview]) -> int:
        if self._supported:
            try:
                return self._now(fd, views)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._supported = False
        with views[0][: self._most] as part:
            return self._plain(fd, [part])


def _read_now(fd: int, views: list[memoryview]) -> int:
    return os.preadv(fd, views, -1, os.RWF_NOWAIT)


def _write_now(fd: int, views: list[memoryview]) -> int:
    return os.pwritev(fd, views, -1, os.RWF_NOWAIT)


# -- messages and packets


@contextmanager
def socket_at(fd: int) -> Iterator[socket.socket]:
    """Yield the socket behind a descriptor, which keeps its flags."""
    import socket

    blocking = os.get_blocking(fd)
    with socket.socket(fileno=os.dup(fd)) as found:
        if os.get_blocking(fd) != blocking:  # socket.setdefaulttimeout() applies to every socket
            os.set_blocking(fd, blocking)
        yield found


@contextmanager
def _message_socket(fd: int) -> Iterator[socket.socket | None]:
    """Yield the socket if it keeps the borders of messages; otherwise None."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        yield None
        return
    import socket

    with socket_at(fd) as found:
        yield None if found.type == socket.SOCK_STREAM else found


class _MessageReader:
    """A read of one whole message."""

    def __init__(self, messages: socket.socket) -> None:
        self._socket = messages

    def __call__(self, _: int, views: list[memoryview]) -> int:
        import socket

        size = self._socket.recv_into(
            bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC | socket.MSG_DONTWAIT
        )
        if size > len(views[0]):
            raise _no_room(f"the next message has {size} bytes", len(views[0]))
        got, _ancillary, flags, _address = self._socket.recvmsg_into(views, 0, socket.MSG_DONTWAIT)
        if flags & socket.MSG_TRUNC:  # another reader took the message that was peeked at
            raise OSError(errno.EMSGSIZE, "a message was cut: read this socket in one place only")
        return got


class _PipeReader:
    """A read of a pipe, which reads whole packets if the pipe is in packet mode."""

    def __init__(self, read: _Move) -> None:
        self._read = read

    def __call__(self, fd: int, views: list[memoryview]) -> int:
        room = len(views[0])
        if room < _PACKET and _available(fd) > room:
            size = _packet_size(fd)
            if size > room:
                raise _no_room(f"the next packet has {size} bytes", room)
        return self._read(fd, views)


def _available(fd: int) -> int:
    """Return how many bytes a pipe holds."""
    answer = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, answer)
    return int.from_bytes(answer, sys.byteorder)


def _packet_size(fd: int) -> int:
    """Return the size of a pipe's next packet; at most 1 where the pipe is not in packet mode.

    Only the writer's descriptor has the flag O_DIRECT. So duplicate the beginning of the pipe into
    another pipe, which keeps the packets, and read one byte there: the kernel then drops the rest
    of that packet.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        before = lib.dmb_tee(fd, writer, _PACKET)
        if before <= 0:  # another reader emptied the pipe
            return 0
        os.read(reader, 1)
        return int(before) - _available(reader)
    finally:
        os.close(reader)
        os.close(writer)


def _no_room(what: str, room: int) -> _NoRoomError:
    return _NoRoomError(errno.EMSGSIZE, f"{what}, and {room} are left: read into more")


# -- errors


def _failure(error: OSError, verb: str, done: int, size: int, path: str) -> OSError:
    text = f"{verb} failed after {done} of {size} bytes: {error.strerror}"
    if error.errno == errno.EMSGSIZE and verb == "writing":
        text += "; this socket sends each write as one message: write less at a time"
    return TransferError(error.errno or errno.EIO, text, path, nbytes=done)

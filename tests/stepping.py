"""The system calls of a child by which it changes something, one by one: seccomp_unotify(2)."""

import fcntl
import os
import select
import signal
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from queue import SimpleQueue

from tests.sandbox import listen
from tests.support import PATIENCE

CALLS = {
    1: "write", 18: "pwrite64", 20: "writev", 44: "sendto", 45: "recvfrom", 46: "sendmsg",
    47: "recvmsg", 49: "bind", 74: "fsync", 75: "fdatasync", 77: "ftruncate", 82: "rename",
    83: "mkdir", 86: "link", 87: "unlink", 90: "chmod", 92: "chown", 188: "setxattr",
    257: "openat", 260: "fchownat", 263: "unlinkat", 264: "renameat", 265: "linkat",
    268: "fchmodat", 277: "sync_file_range", 280: "utimensat", 285: "fallocate", 296: "pwritev",
    326: "copy_file_range", 328: "pwritev2", 426: "io_uring_enter",
}  # fmt: skip
"""By number, on x86-64. Of these an openat counts only if it may make a file."""
KILL = -1
_CREATES = os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_*
_NOTICE, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")


def run(
    work: Callable[[], int],
    at: int,
    verdict: int,
    calls: Collection[str] | None = None,
    table: Mapping[int, str] = CALLS,
) -> tuple[int, list[str]]:
    """Run `work` in a child, and return its exit status and the names of its calls so far.

    The call with index `at` of `calls`, by default all of `table`, has a verdict: an errno refuses
    it, and KILL ends the child before it.
    """
    calls = table.values() if calls is None else calls
    ours, theirs = socket.socketpair()
    with ours, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the parent's threads
        pid = os.fork()
        if pid == 0:
            try:
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 2)
                made: SimpleQueue[int] = SimpleQueue()  # this thread's sendmsg will wait
                sender = threading.Thread(
                    target=lambda: socket.send_fds(theirs, [b"-"], [made.get()])
                )
                sender.start()
                fd = listen(*table)
                made.put(fd)
                sender.join()
                os.close(fd)
                os._exit(work())
            finally:
                os._exit(99)
        theirs.close()
        _, [listener], _, _ = socket.recv_fds(ours, 1, 1)
    names: list[str] = []
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    try:
        while True:
            events = poll.poll(1000 * PATIENCE)
            assert events, f"it hangs after {names[-3:]}"
            if not events[0][1] & select.POLLIN:
                break
            notice = bytearray(_NOTICE.size)
            try:
                fcntl.ioctl(listener, _RECEIVE, notice)
                number, _, _, call, _, _, *arguments = _NOTICE.unpack(notice)
                answer = (0, 0, 1)  # it goes on
                name, may_make = table[call], arguments[2] & _CREATES
                if name in calls and (name != "openat" or may_make or table is not CALLS):
                    names.append(name)
                    if len(names) == at + 1 and verdict == KILL:
                        os.kill(pid, signal.SIGKILL)
                        break
                    if len(names) == at + 1:
                        answer = (0, -verdict, 0)
                fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(number, *answer)))
            except FileNotFoundError:
                pass  # a signal ended that call
    finally:
        os.close(listener)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, names

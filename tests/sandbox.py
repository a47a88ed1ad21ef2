"""seccomp for a test's own process: calls that are refused, end it, or wait for an answer."""

import ctypes
import errno
import os
import struct

KILL = 0x80000000
_ALLOW, _ERRNO, _NOTIFY = 0x7FFF0000, 0x00050000, 0x7FC00000  # SECCOMP_RET_*
_libc = ctypes.CDLL(None, use_errno=True)


def forbid(*numbers: int, error: int = errno.EPERM, action: int | None = None) -> None:
    """Have these system calls fail with `error`, or have another `action`, from now on."""
    program = _filter(numbers, _ERRNO | error if action is None else action)
    assert _libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, a filter


def listen(*numbers: int) -> int:
    """Have these system calls wait for what reads the returned descriptor: seccomp_unotify(2)."""
    fd: int = _libc.syscall(317, 1, 1 << 3, _filter(numbers, _NOTIFY))  # seccomp(2) of x86-64
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def _filter(numbers: tuple[int, ...], action: int) -> ctypes.Array[ctypes.c_char]:
    """Return a struct sock_fprog with its program behind it."""
    steps = [(0x20, 0, 0, 0)]  # load the number of the system call
    steps += [(0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    steps += [(0x06, 0, 0, _ALLOW)]  # none of them: go ahead
    steps += [(0x06, 0, 0, action)]
    program = b"".join(struct.pack("=HBBI", *step) for step in steps)
    memory = ctypes.create_string_buffer(bytes(16) + program)
    struct.pack_into("=H6xQ", memory, 0, len(steps), ctypes.addressof(memory) + 16)
    assert _libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    return memory

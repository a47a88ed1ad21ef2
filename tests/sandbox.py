"""seccomp for a test's own process: system calls that are refused, or end it."""

import ctypes
import errno
import struct

KILL = 0x80000000


def forbid(*numbers: int, error: int = errno.EPERM, action: int | None = None) -> None:
    """Have these system calls fail with `error`, or have another `action`, from now on."""
    steps = [(0x20, 0, 0, 0)]  # load the number of the system call
    steps += [(0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    steps += [(0x06, 0, 0, 0x7FFF0000)]  # none of them: go ahead
    steps += [(0x06, 0, 0, 0x00050000 | error if action is None else action)]
    program = b"".join(struct.pack("=HBBI", *step) for step in steps)
    memory = ctypes.create_string_buffer(program)
    header = struct.pack("=H6xQ", len(steps), ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, a filter

"""What docs/explanations/security.md claims of io_uring and seccomp."""

import platform
from pathlib import Path

import pytest

from tests.guards import needs
from tests.support import in_child

SIZE = 64 * 1024
IO_URING_SETUP = 425
PREAD, PWRITE, PREADV2, PWRITEV2 = 17, 18, 327, 328
by_number = pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason="these numbers of system calls are x86-64's: run it there",
)

_FORBIDDING = """
import ctypes, errno, os, struct, sys, warnings
warnings.simplefilter("ignore")

REFUSE, KILL = 0x00050000 | errno.EPERM, 0x80000000

def forbid(action, *numbers):
    "Have these system calls, by their numbers, refused, or the process killed."
    steps = [(0x20, 0, 0, 0)]                              # load the system call's number
    steps += [(0x15, len(numbers) - at, 0, one) for at, one in enumerate(numbers)]
    steps += [(0x06, 0, 0, 0x7FFF0000)]                    # none of them: go ahead
    steps += [(0x06, 0, 0, action)]
    program = b"".join(struct.pack("=HBBI", *step) for step in steps)
    memory = ctypes.create_string_buffer(program)
    header = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0                 # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP

path, *numbers = sys.argv[1:]
numbers = [int(number) for number in numbers]
import dmabuf
from dmabuf.transfer.engine import default_engine
"""


def test_a_sandbox_without_io_uring(path: Path):
    source = """
whole = open(path, "rb").read()
forbid(REFUSE, *numbers)
with dmabuf.allocate("64KiB", exporter="memfd") as buf, dmabuf.open(path) as file:
    file.read_into(buf, audit="always")
    assert buf.pread(65536, 0) == whole
print(default_engine().backend, default_engine().backend_reason)
try:
    dmabuf.Engine(backend="io_uring")
except PermissionError as error:
    print(error.strerror)
"""
    backend, refusal = in_child(_FORBIDDING + source, path, IO_URING_SETUP).splitlines()
    assert backend.startswith("threads io_uring is refused (EPERM)")
    assert "seccomp" in refusal


_READ_AND_WRITE = """
forbid(REFUSE, *numbers)
with dmabuf.allocate("64KiB", exporter="memfd") as buf, dmabuf.open(path, "r+") as file:
    for transfer in file.read_into, file.write_from:
        try:
            transfer(buf)
            print("moved")
        except OSError as error:
            print(errno.errorcode[error.errno])
"""


def moving(path: Path, *forbidden: int) -> list[str]:
    """What came of a read and a write where the system calls are forbidden."""
    return in_child(_FORBIDDING + _READ_AND_WRITE, path, *forbidden).split()


@by_number
def test_a_filter_sees_what_threads_do(path: Path):
    assert moving(path, IO_URING_SETUP, PREADV2, PWRITEV2) == ["moved", "moved"]
    assert moving(path, IO_URING_SETUP, PREAD) == ["EPERM", "moved"]
    assert moving(path, IO_URING_SETUP, PWRITE) == ["moved", "EPERM"]


@by_number
@needs("io_uring")
def test_a_filter_sees_nothing_of_what_a_ring_does(path: Path):
    assert moving(path, PREAD, PWRITE, PREADV2, PWRITEV2) == ["moved", "moved"]


def test_an_engine_of_threads_makes_no_ring(path: Path):
    source = """
forbid(KILL, *numbers)
with dmabuf.allocate("64KiB", exporter="memfd") as buf, dmabuf.Engine(backend="threads") as engine:
    with dmabuf.open(path, "r+", engine=engine) as file:
        file.write_from(buf, sync=True, audit="always")
    print(engine.backend, engine.backend_reason)
"""
    assert in_child(_FORBIDDING + source, path, IO_URING_SETUP).strip() == "threads asked for"

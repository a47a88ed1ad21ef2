"""What docs/explanations/security.md claims of io_uring and seccomp."""

import platform
from pathlib import Path

import pytest

from tests.guards import needs
from tests.support import in_child

IO_URING_SETUP = 425
PREAD, PWRITE, PREADV2, PWRITEV2 = 17, 18, 327, 328
by_number = pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason="these numbers of system calls are x86-64's: run it there",
)

_READ_AND_WRITE = """
import errno, sys
import dmabuf
from tests.sandbox import forbid
path, *numbers = sys.argv[1:]
forbid(*map(int, numbers))
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
    return in_child(_READ_AND_WRITE, path, *forbidden).split()


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
import sys
import dmabuf
from tests.sandbox import KILL, forbid
path = sys.argv[1]
forbid(int(sys.argv[2]), action=KILL)
with dmabuf.allocate("64KiB", exporter="memfd") as buf, dmabuf.Engine(backend="threads") as engine:
    with dmabuf.open(path, "r+", engine=engine) as file:
        file.write_from(buf, sync=True, audit="always")
    print(engine.backend, engine.backend_reason)
"""
    assert in_child(source, path, IO_URING_SETUP).strip() == "threads asked for"

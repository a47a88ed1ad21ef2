"""Memory that two machines have: every byte of each direction, early readers, writers that die.

It is of an nvdimm or of a CXL device: two runs of the lab, because a guest has one of the two.
"""

import hashlib
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guards import DAX, demand, needs
from tests.guests.peer import befall, python, running, there
from tests.support import assert_same, pattern, poison, run, wait_until

everything = needs("peer", "devdax")

EXAMPLE = "examples/shared_memory.py"
FILES = Path("/var/tmp/files")
COPY = FILES / "copy.bin"
DATA = 4096
SIZE = (6 << 20) + 123
ALL = 8 << 20
"""Bytes of the memory that are compared."""

_MOUNT = """
mountpoint -q "$0" && exit
mkdir -p "$0"
blkid "$DMABUF_TEST_NVME1" || mkfs.ext4 -q "$DMABUF_TEST_NVME1"
mount "$DMABUF_TEST_NVME1" "$0"
"""

_FILE = """
import sys
from tests.support import pattern
open(sys.argv[1], "wb").write(pattern(int(sys.argv[2]), int(sys.argv[3])))
"""

_PLAIN = """
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
with mmap.mmap(fd, int(sys.argv[2]), prot=mmap.PROT_READ) as memory:
    print(hashlib.sha256(memory).hexdigest())
"""

_CHANGE = """
import mmap, os, sys
with mmap.mmap(os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2])) as memory:
    memory[int(sys.argv[3])] ^= 1
"""

_MOVE = """
import hashlib, os, sys, dmabuf
from tests.support import drop_cache, fill, pattern, whole
node, verb, size, seed = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4])
disk = os.environ["DMABUF_TEST_NVME0"]
with open(disk, "r+b", buffering=0) as plain:
    fill(plain.fileno(), pattern(size, seed))
    drop_cache(plain.fileno())
    with open(node, "r+b", buffering=0) as far, dmabuf.from_fd(far) as buffer:
        with dmabuf.open(disk, "r+") as file:
            done = getattr(file, verb)(buffer, size, require="zero-copy")
    drop_cache(plain.fileno())
    print(done.route, done.copied, hashlib.sha256(whole(plain.fileno(), size)).hexdigest())
"""


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[None]:
    """A folder on an NVMe drive of each machine: QEMU's virtio drives do not reach CXL memory."""
    run("sh", "-c", _MOUNT, FILES)
    there("sh", "-c", _MOUNT, FILES)
    yield
    run("umount", FILES)
    there("umount", FILES)


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    """The memory by a plain mapping of this guest, with poison that the other guest finds, too."""
    with open(DAX, "r+b", buffering=0) as node, mmap.mmap(node.fileno(), ALL) as plain:
        plain[:] = poison(ALL)
        assert python(_PLAIN, DAX, ALL) == sha256(poison(ALL))
        yield plain


@pytest.fixture
def target() -> Iterator[Path]:
    """A file that `get` replaces, in a folder of its own."""
    path = FILES / "got/copy.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(poison(SIZE))
    yield path
    assert list(path.parent.iterdir()) == [path]


def sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def here(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run the example in this guest."""
    command = [sys.executable, EXAMPLE, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def got(target: Path) -> bytes:
    """Get the file in this guest."""
    done = here("get", DAX, target)
    assert (done.returncode, done.stderr) == (0, "")
    return target.read_bytes()


def put_there(seed: int) -> str:
    """Put a file in the other guest, and return what the example prints."""
    python(_FILE, COPY, SIZE, seed)
    return there("python3", EXAMPLE, "put", DAX, COPY)


def refused(target: Path, why: str) -> None:
    """Nothing is got in this guest, and the old file is whole."""
    done = here("get", DAX, target)
    assert done.returncode == 1 and why in done.stderr, (done.stdout, done.stderr)
    assert_same(target.read_bytes(), poison(SIZE), "the file that was to be replaced")


@needs("peer", "devdax", "nvme")
@pytest.mark.parametrize(
    "kind",
    [
        "dax",
        pytest.param(
            "cxl",
            marks=pytest.mark.device_table(
                "CXL memory, shared by two machines", "read", "write", "zero-copy"
            ),
        ),
    ],
)
def test_drives_of_one_machine_move_bytes_of_the_other(memory: mmap.mmap, kind: str) -> None:
    """One side is a plain mapping; the other one is this library and a drive."""
    demand(kind)
    if kind == "cxl":
        assert there("sh", "-c", "cat /sys/bus/cxl/devices/region*/commit") == "1"
    size = SIZE // DATA * DATA
    data, expected = pattern(size, 4), bytearray(poison(ALL))
    assert python(_MOVE, DAX, "read_into", size, 4) == f"direct 0 {sha256(data)}"
    expected[:size] = data
    assert_same(memory[:], bytes(expected), "what a drive of the other machine wrote")

    data = pattern(size, 5)
    memory[DATA : DATA + size] = expected[DATA : DATA + size] = data
    found = python(_MOVE, DAX, "write_from", size, 6)
    assert found == f"direct 0 {sha256(expected[:size])}"
    assert_same(memory[:], bytes(expected), "the memory that was written from")


@everything
@pytest.mark.parametrize("writer", ["here", "there"])
def test_a_file_of_one_machine_arrives_in_the_other(
    memory: mmap.mmap, target: Path, writer: str
) -> None:
    data = pattern(SIZE, 7)
    if writer == "there":
        assert " direct " in put_there(7)
        assert_same(got(target), data, "the copy")
    else:
        target.write_bytes(data)
        assert " direct " in here("put", DAX, target).stdout
        python(_FILE, COPY, SIZE, 8)
        assert " direct " in there("python3", EXAMPLE, "get", DAX, COPY)
        assert there("sha256sum", COPY).split()[0] == sha256(data)
    assert_same(memory[DATA : DATA + SIZE], data, "the memory")
    assert_same(memory[DATA + SIZE :], poison(ALL)[DATA + SIZE :], "the memory after the data")


@everything
@pytest.mark.parametrize("end", ["finishes", "is killed", "loses its power"])
def test_nothing_is_got_from_a_writer_that_has_not_finished(
    memory: mmap.mmap, target: Path, end: str
) -> None:
    data, half = pattern(SIZE, 9), SIZE // 2
    refused(target, "nothing was put into this memory")
    shell = f'echo $$; exec python3 {EXAMPLE} put "$0" /dev/stdin'
    with running("sh", "-c", shell, DAX) as process:
        number = process.stdout.readline().strip()
        process.stdin.buffer.write(data[:half])
        process.stdin.buffer.flush()
        wait_until(lambda: memory[DATA : DATA + half // 2] == data[: half // 2], "the first bytes")
        refused(target, "a writer is at work")
        if end == "finishes":
            process.stdin.buffer.write(data[half:])
            process.stdin.close()
            assert process.wait() == 0, process.stderr.read()
        elif end == "is killed":
            there("kill", "-9", number)
            assert process.wait() == 128 + 9
        else:
            befall("kill")
    if end != "finishes":
        there("sh", "-c", _MOUNT, FILES)  # once it has booted
        refused(target, "a writer is at work, or died")
        put_there(9)
    assert_same(got(target), data, "the copy")
    assert_same(memory[DATA : DATA + SIZE], data, "the memory")


@everything
def test_memory_that_differs_from_what_was_handed_over_is_refused(
    memory: mmap.mmap, target: Path
) -> None:
    """A changed byte stands for a cached line that is out of date."""
    put_there(7)
    python(_CHANGE, DAX, ALL, DATA + SIZE - 1)
    refused(target, "cached lines of it are out of date")
    put_there(7)
    assert_same(got(target), pattern(SIZE, 7), "the copy")

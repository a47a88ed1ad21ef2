"""dmabuf.remote between two machines: every byte, a node that dies, a network that is cut."""

import contextlib
import hashlib
import socket
from collections.abc import Callable, Iterator

import pytest

import dmabuf
from dmabuf import remote
from tests.guards import needs
from tests.guests.peer import (
    HERE,
    THERE,
    befall,
    carrying,
    counted,
    cut_for_a_second,
    python,
    running,
    there,
)
from tests.support import assert_same, pattern, poison

everything = needs("peer", "udmabuf", "nvme", "io_uring")

SIZE = 48 << 20
DATA = pattern(SIZE, 9)
FOLDER = "/var/tmp/served"
PORT = 7777

_MAKE = """
import os, random, subprocess, sys
folder, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.makedirs(folder, exist_ok=True)
disk = os.environ["DMABUF_TEST_NVME0"]
if "new" in sys.argv:
    subprocess.run(["mkfs.ext4", "-F", "-q", disk], check=True)
subprocess.run(["mount", disk, folder], check=True)
if "new" in sys.argv:
    with open(f"{folder}/a.bin", "wb") as file:
        file.write(random.Random(seed).randbytes(size))
        os.fsync(file.fileno())
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    """A folder on an NVMe drive of the second guest, with a file."""
    python(_MAKE, FOLDER, SIZE, 9, "new")
    yield FOLDER
    there("umount", FOLDER)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The process number of a node in the second guest."""
    shell = (
        'echo $$; exec dmabuf serve --socket /run/s --listen "$0" --files "$1" --trusted-network'
    )
    with running("sh", "-c", shell, f"{THERE}:{PORT}", FOLDER) as process:
        number = process.stdout.readline().strip()
        assert process.stderr.readline().startswith("serving at")
        assert process.stderr.readline().startswith("listening at")
        yield number


def drop_caches() -> None:
    there("sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches")


def connected(timeout: float = 100) -> remote.Node:
    return remote.connect(f"{THERE}:{PORT}", trusted_network=True, timeout=timeout)


def once(act: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress function that acts when the first bytes have come; then most have not."""
    acted = []

    def progress(done: int, total: int) -> None:
        if not acted:
            assert 0 < done < total
            acted.append(act())

    return progress


@pytest.fixture
def buffer() -> Iterator[dmabuf.Buffer]:
    with dmabuf.allocate(SIZE, exporter="udmabuf") as made:
        made.pwrite(poison(SIZE), 0)
        yield made


def check_all(buffer: dmabuf.Buffer) -> None:
    """The node serves as before."""
    buffer.pwrite(poison(SIZE), 0)
    with connected() as node, node.open("a.bin") as file:
        file.read_into(buffer)
    assert_same(buffer.pread(SIZE, 0), DATA, "the file of the node")


@everything
def test_a_file_of_another_machine_and_back(folder: str, buffer: dmabuf.Buffer) -> None:
    drop_caches()
    with serving(), connected() as node:
        others = counted(device="lab0")
        with carrying(SIZE), node.open("a.bin") as file:
            done = file.read_into(buffer)
        assert (done.nbytes, done.transport, done.remote.route) == (SIZE, "tcp", "direct")
        assert hashlib.sha256(buffer.pread(SIZE, 0)).digest() == hashlib.sha256(DATA).digest()
        assert counted(device="lab0") - others < SIZE / 100

        new = pattern(SIZE, 10)
        buffer.pwrite(new, 0)
        with carrying(SIZE, "tx"), node.replacing("b.bin", sync=True) as file:
            done = file.write_from(buffer)
            file.flush()
        assert done.remote.route == "direct"
    assert there("sha256sum", f"{folder}/b.bin").split()[0] == hashlib.sha256(new).hexdigest()


@everything
def test_a_network_that_is_cut_for_a_second(folder: str, buffer: dmabuf.Buffer) -> None:
    with serving(), connected() as node, node.open("a.bin") as file:
        assert file.read_into(buffer, progress=once(cut_for_a_second)).nbytes == SIZE
    assert_same(buffer.pread(SIZE, 0), DATA, "what came")


def killed(number: str) -> None:
    there("kill", "-9", number)


ENDS = {
    "the node is killed": (killed, ConnectionResetError),
    "the network is cut": (lambda _: befall("cut"), TimeoutError),
    "the machine is frozen": (lambda _: befall("freeze"), TimeoutError),
}


@everything
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("what", ENDS)
def test_a_node_that_is_lost(folder: str, buffer: dmabuf.Buffer, what: str, write: bool) -> None:
    act, kind = ENDS[what]
    with serving() as number, connected(timeout=30) as node:
        with node.open("c.bin" if write else "a.bin", "w" if write else "r") as file:
            move = file.write_from if write else file.read_into
            with pytest.raises(dmabuf.TransferError) as caught:
                move(buffer, SIZE, progress=once(lambda: act(number)))
        assert isinstance(caught.value, kind), caught.value
        assert node.closed
        assert THERE in str(caught.value)
        buffer.pwrite(poison(SIZE), 0)
        befall("join")
        befall("thaw")
        if what != "the node is killed":
            with dmabuf.allocate(SIZE) as other:
                check_all(other)
        assert_same(buffer.pread(SIZE, 0), poison(SIZE), "memory of a transfer that has returned")
    with serving():
        check_all(buffer)


@everything
def test_a_machine_that_loses_its_power(folder: str, buffer: dmabuf.Buffer) -> None:
    """It boots again. An old connection is then reset, if its deadline has not passed."""
    with serving(), connected(timeout=30) as node, node.open("a.bin") as file:
        with pytest.raises(dmabuf.TransferError) as caught:
            file.read_into(buffer, progress=once(lambda: befall("kill")))
        assert isinstance(caught.value, TimeoutError | ConnectionResetError)
        assert node.closed
    python(_MAKE, folder, SIZE, 9)
    with serving():
        check_all(buffer)


@everything
def test_the_address_is_that_of_another_machine(folder: str) -> None:
    with serving():
        with pytest.raises(PermissionError, match="certificates are needed beyond this machine"):
            remote.connect(f"{THERE}:{PORT}")
        with socket.create_connection((THERE, PORT)) as connection:
            assert connection.getsockname()[0] == HERE

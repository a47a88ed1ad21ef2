"""NVMe over TCP between two machines: every byte, a cut network, a target that boots again."""

import contextlib
import errno
import hashlib
import threading
from collections.abc import Callable, Iterator

import pytest

import dmabuf
from dmabuf import Engine, Route
from tests.guards import needs
from tests.guests.peer import THERE, befall, carrying, cut_for_a_second, python, running
from tests.kernel.fabric import PORTS, Fabric
from tests.support import PATIENCE, assert_same, in_the_middle, pattern, poison, wait_until

everything = needs("peer", "nvmf", "nvme", "udmabuf", "io_uring")

SIZE = 32 << 20
DATA = pattern(SIZE, 3)
GONE = {errno.ENODEV, errno.EIO, errno.ENOLINK}

_HASH = """
import hashlib, mmap, os, sys
fd = os.open(os.environ["DMABUF_TEST_NVME0"], os.O_RDONLY | os.O_DIRECT)
with mmap.mmap(-1, int(sys.argv[1])) as memory:
    os.preadv(fd, [memory], 0)
    print(hashlib.sha256(memory).hexdigest())
"""


@contextlib.contextmanager
def target() -> Iterator[None]:
    """The first drive of the second guest, as a target."""
    shell = 'exec python3 -m tests.nvmet "$0" "$1" "$DMABUF_TEST_NVME0"'
    with running("sh", "-c", shell, THERE, PORTS[0]) as process:
        assert process.stdout.readline() == "serving\n", process.stderr.read()
        yield
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


@contextlib.contextmanager
def connection(**options: object) -> Iterator[Fabric]:
    made = Fabric(1, THERE, **options)
    try:
        yield made
    finally:
        made.pull()


@pytest.fixture
def buffer() -> Iterator[dmabuf.Buffer]:
    with dmabuf.allocate(SIZE, exporter="udmabuf") as made:
        made.pwrite(poison(SIZE), 0)
        yield made


def path_of(fabric: Fabric, kind: str) -> str:
    return fabric.node if kind == "node" else fabric.disk


def write(path: str, buffer: dmabuf.Buffer, data: bytes) -> None:
    buffer.pwrite(data, 0)
    with dmabuf.open(path, "r+") as file:
        file.write_from(buffer, sync=True)


def read(path: str, buffer: dmabuf.Buffer, act: Callable[[], None]) -> dmabuf.Transfer:
    """Read all of it into poison, and act when ten requests are done."""
    buffer.pwrite(poison(SIZE), 0)
    with Engine(queue_depth=4, block_size="128KiB") as engine:
        with dmabuf.open(path, engine=engine) as file, in_the_middle(10, 0, act):
            return file.read_into(buffer, audit="off")


@everything
@pytest.mark.parametrize("kind", ["disk", "node"])
def test_every_byte_and_no_copy(buffer: dmabuf.Buffer, kind: str) -> None:
    data = pattern(SIZE, len(kind))
    with target(), connection() as fabric, dmabuf.open(path_of(fabric, kind), "r+") as file:
        buffer.pwrite(data, 0)
        with carrying(SIZE, "tx"):
            done = file.write_from(buffer, sync=True, require="zero-copy", audit="off")
        assert (done.route, done.copied) == (Route.DIRECT, 0)
        assert python(_HASH, SIZE) == hashlib.sha256(data).hexdigest()
        buffer.pwrite(poison(SIZE), 0)
        with carrying(SIZE):
            done = file.read_into(buffer, require="zero-copy", audit="off")
        assert (done.route, done.copied) == (Route.DIRECT, 0)
        assert_same(buffer.pread(SIZE, 0), data, "the buffer")


@everything
@pytest.mark.parametrize("kind", ["disk", "node"])
def test_a_network_that_is_cut_for_a_second(buffer: dmabuf.Buffer, kind: str) -> None:
    with target(), connection() as fabric:
        path = path_of(fabric, kind)
        write(path, buffer, DATA)
        assert read(path, buffer, cut_for_a_second).route is Route.DIRECT
        assert_same(buffer.pread(SIZE, 0), DATA, "what came")


@everything
def test_a_network_that_is_cut_for_ever(buffer: dmabuf.Buffer) -> None:
    with target(), connection(keep_alive_tmo=10, ctrl_loss_tmo=5) as fabric:
        path = fabric.disk
        write(path, buffer, DATA)
        with pytest.raises(OSError) as caught:
            read(path, buffer, lambda: befall("cut"))
        assert caught.value.errno in GONE
        assert 0 < caught.value.nbytes < SIZE
        whole = caught.value.nbytes
        assert_same(buffer.pread(whole, 0), DATA[:whole], "what is whole")
        buffer.pwrite(poison(SIZE), 0)
        befall("join")
        wait_until(lambda: not fabric.controller.exists(), "the end of ctrl_loss_tmo")
        fabric.plug()
        with dmabuf.open(fabric.disk) as file, dmabuf.allocate(SIZE) as other:
            file.read_into(other)
            assert_same(other.pread(SIZE, 0), DATA, "what is read afterwards")
        assert_same(buffer.pread(SIZE, 0), poison(SIZE), "memory of a transfer that has returned")


@everything
def test_a_target_that_loses_its_power_and_boots(buffer: dmabuf.Buffer) -> None:
    """The transfer waits in the kernel until the target is back, and is whole then."""
    results: list[object] = []
    killed = threading.Event()

    def kill() -> None:
        befall("kill")
        killed.set()

    def transfer() -> None:
        try:
            results.append(read(fabric.disk, buffer, kill))
        except OSError as error:
            results.append(error)

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        first.enter_context(target())
        fabric = stack.enter_context(connection(ctrl_loss_tmo=600))
        write(fabric.disk, buffer, DATA)
        thread = threading.Thread(target=transfer)
        thread.start()
        assert killed.wait(PATIENCE)
        with target():
            thread.join(PATIENCE)
            assert not thread.is_alive()
            assert isinstance(results[0], dmabuf.Transfer), results
            assert_same(buffer.pread(SIZE, 0), DATA, "what came before and after")

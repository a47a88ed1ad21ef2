"""NVMe over TCP on loopback: every byte, and connections and namespaces that go and come back."""

import contextlib
import errno
import fcntl
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Engine, Route
from dmabuf.inspect.doctor_devices import examine_devices
from dmabuf.kernel import uapi
from tests import nvmet
from tests.guards import needs
from tests.kernel.fabric import HOST, PORTS, Fabric
from tests.kernel.nvme_drive import Drive
from tests.kernel.test_pulled import (
    PART,
    SIZE,
    WORKERS,
    Worker,
    bytes_of,
    content,
    first_content,
    run_workers,
)
from tests.support import assert_same, exercise, in_the_middle, pattern, poison, wait_until

everything = needs("nvmf", "nvme", "udmabuf", "io_uring", "ext4")

BLOCKS = {1: 512, 2: 4096}
"""The block of each namespace, in bytes."""
KINDS = ("disk", "node")
GONE = {errno.ENODEV, errno.EIO, errno.ENOLINK}


@pytest.fixture
def buf() -> Iterator[dmabuf.Buffer]:
    with dmabuf.allocate(SIZE, exporter="udmabuf") as buffer:
        yield buffer


@pytest.fixture(scope="module")
def target() -> Iterator[nvmet.Target]:
    drives = [os.environ[f"DMABUF_TEST_NVME{number}"] for number in (0, 1)]
    with nvmet.target(HOST, PORTS, drives) as made:
        yield made


@pytest.fixture
def fabric(target: nvmet.Target, request: pytest.FixtureRequest) -> Iterator[Fabric]:
    made = Fabric(getattr(request, "param", 1))
    yield made
    made.pull()


@contextlib.contextmanager
def second_path(fabric: Fabric) -> Iterator[Path]:
    """Another controller of the same subsystem, by the other port."""
    other = nvmet.connect(HOST, PORTS[1])
    try:
        wait_until(lambda: list(other.glob("nvme*n1")), "the namespace by the other path")
        yield other
    finally:
        nvmet.disconnect(other)


def path_of(fabric: Fabric, kind: str) -> str:
    return fabric.node if kind == "node" else fabric.disk


def local(number: int = 1) -> Drive:
    """The drive behind a namespace, by PCI."""
    disk = os.environ[f"DMABUF_TEST_NVME{number - 1}"]
    return Drive(disk, disk.replace("/nvme", "/ng"), BLOCKS[number])


@everything
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fabric", BLOCKS, indirect=True)
def test_every_byte_and_no_copy(fabric: Fabric, buf: dmabuf.Buffer, kind: str) -> None:
    drive = local(fabric.number)
    drive.write(data := pattern(SIZE, 1))
    buf.pwrite(poison(SIZE), 0)
    with dmabuf.open(path_of(fabric, kind), "r+") as file:
        assert file.kind == ("NVMe character device" if kind == "node" else "block device")
        done = file.read_into(buf, require="zero-copy", audit="off")
        assert (done.route, done.copied, done.nbytes) == (Route.DIRECT, 0, SIZE)
        assert_same(buf.pread(SIZE, 0), data, "the buffer")
        buf.pwrite(new := pattern(SIZE, 2), 0)
        drive.write(poison(SIZE))
        done = file.write_from(buf, require="zero-copy", sync=True, audit="off")
        assert (done.route, done.copied, done.nbytes) == (Route.DIRECT, 0, SIZE)
        assert_same(drive.read(SIZE), new, "the drive")


@everything
@pytest.mark.parametrize("fabric", BLOCKS, indirect=True)
def test_any_range(fabric: Fabric) -> None:
    size, routes = 1 << 20, ("staged", "buffered")
    with Engine(block_size="64KiB") as engine, dmabuf.allocate(size, exporter="udmabuf") as buffer:
        chosen = exercise(fabric.disk, buffer, engine, routes=routes, limit=size, rounds=8)
    assert "direct" in chosen


# -- in the middle of transfers


def check_memory(path: str, buffer: dmabuf.Buffer) -> None:
    """Nothing writes to a buffer any more while the namespace is read into another one."""
    expected = local().read(SIZE)
    buffer.pwrite(poison(SIZE), 0)
    with dmabuf.open(path, "r+") as file, dmabuf.allocate(SIZE) as other:
        file.read_into(other, SIZE, audit="off")
        assert_same(other.pread(SIZE, 0), expected, "what is read afterwards")
    assert_same(buffer.pread(SIZE, 0), poison(SIZE), "memory of a transfer that has returned")


def go(fabric: Fabric, target: nvmet.Target, how: str) -> None:
    """Let the connection or the namespace go, for good as far as a transfer can see."""
    if how == "disconnect":
        fabric.pull()
    elif how == "namespace":
        target.hide()
    else:
        target.withdraw(PORTS[0])


def come_back(fabric: Fabric, target: nvmet.Target, how: str) -> None:
    if how == "namespace":
        target.show()
        fabric.wait()
        return
    if how == "lost":
        wait_until(lambda: not fabric.controller.exists(), "the end of ctrl_loss_tmo")
        target.offer(PORTS[0])
    fabric.plug()


@everything
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["disconnect", "namespace", "lost"])
def test_it_goes_in_the_middle(
    target: nvmet.Target, buf: dmabuf.Buffer, how: str, kind: str, write: bool
) -> None:
    """Once twenty requests are done, from within: so some of it is whole, and some is not."""
    fabric = Fabric(ctrl_loss_tmo=1 if how == "lost" else 100)
    worker = Worker(int(write), buf, None)
    worker.how.pop("sync", None)  # the middle of the transfer, and no flush
    local().write(first_content())
    path = path_of(fabric, kind)
    try:
        with Engine(queue_depth=4, block_size="64KiB") as engine:
            with dmabuf.open(path, "r+", engine=engine) as file:
                file.read_into(buf, 4096, file_offset=2 * PART, buffer_offset=2 * PART)
                with in_the_middle(20, worker.at, lambda: go(fabric, target, how)):
                    worker.run(file)
        error = worker.error
        assert isinstance(error, OSError) and error.errno in GONE, error
        assert error.filename == path
        assert 1 <= error.nbytes < PART
        worker.check(local().read(SIZE), network=True)
        come_back(fabric, target, how)
        check_memory(path_of(fabric, kind), buf)
    finally:
        target.show()
        target.offer(PORTS[0])
        fabric.pull()


@everything
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *itertools.product(["reset", "target"], KINDS),
        ("one path of two", "disk"),
        ("target", "file"),
    ],
)
def test_it_comes_back_under_many(
    fabric: Fabric, target: nvmet.Target, buf: dmabuf.Buffer, tmp_path: Path, how: str, kind: str
) -> None:
    """A block device only waits: the kernel sends its requests again, by another path if it can."""
    workers = [Worker(number, buf, None) for number in range(WORKERS)]

    def disturb() -> None:
        for _ in range(2):
            if how == "reset":
                fabric.reset()
            else:
                target.withdraw(PORTS[0])
                target.offer(PORTS[0])
            wait_until(lambda: (fabric.controller / "state").read_text() == "live\n", "live")
        for worker in workers:
            worker.over.set()

    with contextlib.ExitStack() as stack:
        if how == "one path of two":
            stack.enter_context(second_path(fabric))
        path = stack.enter_context(fabric.target(kind, first_content(), tmp_path / "mnt"))
        run_workers("threads", path, workers, disturb)
        with open(fabric.disk if kind == "node" else path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            medium = bytes_of(file.name, 0)
        for worker in workers:
            assert worker.rounds >= 1
            if worker.error is None:
                part = slice(worker.at, worker.at + PART)
                last = content(worker.rounds if worker.write else 0)
                assert_same(medium[part], last, "the medium")
            else:
                assert kind == "node" and worker.error.errno in GONE, worker.error
                worker.check(medium, network=True)
        assert {route for worker in workers for route in worker.routes} == {Route.DIRECT}
    if kind != "file":
        check_memory(path_of(fabric, kind), buf)


def opens(path: str) -> None:
    dmabuf.open(path).close()


def flushes(path: str) -> None:
    with dmabuf.open(path, "r+", force=True) as file, dmabuf.allocate(4096) as buffer:
        file.write_from(buffer, 0, sync=True)


def compares(path: str) -> None:
    with dmabuf.open(path) as file, dmabuf.allocate(4096) as buffer:
        file.read_into(buffer, audit="always")


@everything
def test_commands_beside_transfers_while_the_controller_is_reset(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel answers those that go by ioctl(2) with EAGAIN, which no caller gets."""
    refusals, errors, over = [0], list[OSError](), threading.Event()

    def ioctl(*arguments):
        try:
            return fcntl.ioctl(*arguments)
        except BlockingIOError:
            refusals[0] += 1
            raise

    def disturb() -> None:
        for _ in range(3):
            fabric.reset()
            wait_until(lambda: (fabric.controller / "state").read_text() == "live\n", "live")
        over.set()

    monkeypatch.setattr(uapi, "ioctl", ioctl)
    thread = threading.Thread(target=disturb)
    thread.start()
    while not over.is_set():
        for command in (opens, flushes, compares):
            try:
                command(fabric.node)
            except OSError as error:
                errors.append(error)
    thread.join()
    assert refusals[0] > 3, "so often the kernel had no path"
    for error in errors:
        assert error.errno in GONE and error.filename == fabric.node, error
    for command in (opens, flushes, compares):
        command(fabric.node)


# -- the doctor


@everything
def test_doctor(fabric: Fabric, target: nvmet.Target) -> None:
    def answer(controller: Path):
        name = f"NVMe over tcp {controller.name}"
        return next(one for one in examine_devices() if one.name == name)

    disk, first = Path(fabric.disk).name, fabric.controller
    address = f"live, traddr={HOST},trsvcid={PORTS[0]}"
    assert answer(first).ok
    assert answer(first).detail.startswith(address)
    assert f"; {disk} by 1 path: {first.name} optimized" in answer(first).detail
    with second_path(fabric) as second:
        both = f"{disk} by 2 paths: {first.name} optimized, {second.name} optimized"
        assert both in answer(first).detail and both in answer(second).detail
        target.withdraw(PORTS[0])
        wait_until(lambda: not answer(first).ok, "the loss of the connection")
        assert answer(first).detail.startswith("connecting, ")
        assert "reconnects" in answer(first).fix
        assert answer(second).ok
        target.offer(PORTS[0])
        wait_until(lambda: answer(first).ok, "the connection")

"""Files that the store reads natively for a client: every byte, and nothing but the file's bytes.

Emulated on a loop device with ext4, as test_native_files.py, whose adversaries change the files
here.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
import dmabuf.store
from dmabuf import Route, RouteUnavailable
from dmabuf.kernel import files
from dmabuf.memory import foreign
from dmabuf.store import Store, protocol, server
from dmabuf.store.protocol import Refusal
from dmabuf.transfer.engine import _default, default_engine
from dmabuf.transfer.layout import READS, UNSTEADY
from tests import emulation
from tests.guards import needs
from tests.resources import held
from tests.serving import in_a_thread
from tests.support import PAGE, assert_same, in_child, wait_until
from tests.unit.test_as_file import by_fuse, server_of
from tests.unit.test_native_files import (
    SIZE,
    device,
    folder,
    overwrite,
    path,
    registrar,
    replace_blocks,
    scattered,
    settle,
    swap,
)
from tests.unit.test_store_hostile import raw, reply, works

__all__ = ["device", "folder", "path", "registrar", "scattered"]

pytestmark = pytest.mark.usefixtures("kernel")
FOREIGN = b"foreign!"
EXPORTERS = ["udmabuf", "system"]
END = (SIZE // PAGE - 4) * PAGE


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine that the server uses emulates the native route."""
    monkeypatch.delitem(_default, os.getpid(), raising=False)
    with emulation.native():
        yield
        default_engine().close()


@pytest.fixture(autouse=True)
def dma_bufs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake kernel's dma-bufs are memfds."""
    monkeypatch.setattr(foreign, "identify", lambda _fd: foreign.Identity("fake", None))


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def store(socket_path: Path) -> Iterator[Store]:
    with in_a_thread(socket_path, 16 << 20), dmabuf.store.connect(socket_path) as store:
        store.list()  # the server has accepted it
        yield store


def warmed_up(store: Store, path: Path) -> object:
    """Return what is held once the engine has its rings, and no memory of the store is left."""
    buffer, _ = store.load(None, path)
    store.discard(buffer)
    wait_until(lambda: "memfd" not in str(held()), "the server's threads close the memory")
    return held()


def unused(store: Store) -> bool:
    usage = store.usage()
    return (usage.charged, usage.names) == (0, 0)


# -- every byte


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_every_byte_of_a_file(store: Store, path: Path, exporter: str) -> None:
    buffer, transfer = store.load("file", path, exporter=exporter)
    with buffer, store.open("file", "r+") as again:
        assert_same(buffer.pread(buffer.size, 0), path.read_bytes(), f"{transfer}")
        assert_same(again.pread(again.size, 0), path.read_bytes(), "the name's memory")
        assert (transfer.nbytes, transfer.route, transfer.copied) == (SIZE, Route.NATIVE, 0)
        assert "which holds the file" in transfer.reason and transfer.rejected == {}
        assert transfer.requests and transfer.seconds > 0
        status = store.stat("file")
        assert (status.length, status.exporter) == (SIZE, exporter)
    store.remove("file")
    assert unused(store)


@pytest.mark.parametrize(
    ("file_offset", "size"),
    [(0, 4 * PAGE), (2 * PAGE, 5 * PAGE + 7), (512, 9 * PAGE), (END, SIZE - 777 - END)],
)
def test_any_range_of_extents_holes_and_the_end(
    store: Store, scattered: Path, file_offset: int, size: int
) -> None:
    """Of the file's last block the buffer has the file's bytes, and zeros behind."""
    expected = scattered.read_bytes()[file_offset : file_offset + size]
    with scattered.open("rb") as file:
        buffer, transfer = store.load(None, file.fileno(), size, file_offset=file_offset)
        assert os.fstat(file.fileno()), "a descriptor stays the caller's"
    with buffer:
        got = buffer.pread(buffer.size, 0)
        assert_same(got, expected + bytes(buffer.size - size), f"{transfer}")
        store.link(buffer, "range")
    store.remove("range")
    assert unused(store)


def test_a_client_that_may_read_the_file_only_by_its_descriptor(
    store: Store, socket_path: Path, path: Path
) -> None:
    """Another user, who has the descriptor from root and may open neither path nor device."""
    os.chmod(path, 0o600)
    os.chmod(socket_path, 0o666)
    for one in (socket_path.parent, *socket_path.parents[1:3]):
        os.chmod(one, 0o755)
    said = in_child(
        """
import os, sys, hashlib
import dmabuf.store
from dmabuf.kernel import uapi
from dmabuf.kernel import files
from dmabuf.memory import foreign
from tests.unit.fake_kernel import FakeKernel
import dmabuf.transfer
uapi.ioctl = FakeKernel().ioctl
foreign.identify = lambda fd: foreign.Identity("fake", None)
socket, path, device = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
os.setgroups([]); os.setresgid(4001, 4001, 4001); os.setresuid(4001, 4001, 4001)
for closed in (path, device):
    try:
        os.open(closed, os.O_RDONLY)
    except PermissionError:
        print("no", end=" ")
with dmabuf.store.connect(socket) as store:
    buffer, transfer = store.load("mine", fd)
    content = hashlib.sha256(buffer.pread(buffer.size, 0)).hexdigest()
    print(transfer.route, store.stat("mine").uid, content)
""",
        socket_path,
        path,
        _device_of(path),
    )
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert said == f"no no native 4001 {wanted}\n"
    store.remove("mine")


def _device_of(path: Path) -> str:
    number = os.stat(path).st_dev
    link = os.readlink(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    return f"/dev/{os.path.basename(link)}"


# -- files that change: nothing but the file's bytes is granted


@contextlib.contextmanager
def refused_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What was in the memory of each load that the server refused."""
    seen: list[bytes] = []
    load = server.load

    def watched(memory, *how):
        try:
            return load(memory, *how)
        except Refusal:
            seen.append(b"".join(os.pread(fd, memory.size, 0) for fd in memory.slabs))
            raise

    monkeypatch.setattr(server, "load", watched)
    yield seen


@contextlib.contextmanager
def acting_before_the_device(act, times: int) -> Iterator[list[int]]:
    """Act when the server knows the extents and has read nothing, in the first reads."""
    engine, seen = default_engine(), []
    run = engine.run

    def act_and_run(job):
        if len(seen) < times:
            seen.append(len(seen))
            act(len(seen))
        return run(job)

    engine.run = act_and_run
    yield seen
    engine.run = run


def test_blocks_that_become_another_file_are_not_granted(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file ends early, so what was read of the other file's blocks stays in the memory."""

    def shorten(_: int) -> None:
        swap(path)  # from now on the donor has the first blocks
        with (path.parent / "donor").open("r+b") as donor:
            donor.write(FOREIGN * (SIZE // 8))
        os.truncate(path, 4 * PAGE)
        settle(path)

    with (
        refused_memory(monkeypatch) as refused,
        acting_before_the_device(shorten, 1) as seen,
        pytest.raises(OSError, match=f"the file has {4 * PAGE} bytes") as caught,
    ):
        store.load("file", path, exporter="system")
    assert seen and caught.value.errno == errno.ESTALE
    assert FOREIGN in refused[0], "the device has read the other file's bytes"
    assert store.list() == [] and unused(store)
    (path.parent / "donor").unlink()


@pytest.mark.parametrize("adversary", [overwrite, replace_blocks])
def test_a_file_that_changes_is_read_again_and_then_refused(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch, adversary
) -> None:
    def act(number: int) -> None:
        adversary(path, 10 + number)
        settle(path)

    with acting_before_the_device(act, 1) as seen:
        buffer, transfer = store.load(None, path, exporter="system")
    with buffer:
        assert seen == [0]
        assert_same(buffer.pread(SIZE, 0), path.read_bytes(), f"{transfer}")
        store.discard(buffer)
    with (
        refused_memory(monkeypatch) as refused,
        acting_before_the_device(act, READS) as seen,
        pytest.raises(RouteUnavailable, match=UNSTEADY) as caught,
    ):
        store.load(None, path, exporter="system")
    assert len(seen) == READS and len(refused) == 1 and caught.value.filename == str(path)
    assert unused(store)


# -- descriptors of any kind


@contextlib.contextmanager
def sent(kind: str, path: Path, tmp_path: Path) -> Iterator[int]:
    ours: list[int] = []
    if kind == "pipe":
        ours += os.pipe()
    elif kind == "socket":
        ends = socket.socketpair()
        ours += [end.detach() for end in ends]
    elif kind == "memfd":
        ours.append(os.memfd_create("sent"))
    else:
        where, flags = {
            "write-only": (path, os.O_WRONLY),
            "O_PATH": (path, os.O_PATH),
            "directory": (path.parent, os.O_RDONLY),
            "device": (_device_of(path), os.O_RDONLY),
            "tmpfs": ("/dev/shm", os.O_RDWR | os.O_TMPFILE),
            "proc": ("/proc/self/mem", os.O_RDONLY),
        }[kind]
        ours.append(os.open(where, flags | os.O_CLOEXEC))
    try:
        yield ours[0]
    finally:
        for fd in ours:
            os.close(fd)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("write-only", "not open for reading"),
        ("O_PATH", "not open for reading"),
        ("directory", "not of a regular file"),
        ("device", "not of a regular file"),
        ("pipe", "not of a regular file"),
        ("socket", "not of a regular file"),
        ("memfd", "not of a regular file"),
        ("tmpfs", "not of a regular file"),
        ("proc", "not of a regular file"),
    ],
)
def test_what_is_not_a_file_on_a_disk(
    store: Store, path: Path, tmp_path: Path, kind: str, why: str
) -> None:
    before = held()
    with sent(kind, path, tmp_path) as fd, pytest.raises(OSError, match=why) as caught:
        store.load(None, fd, PAGE)
    assert caught.value.errno in (errno.EBADF, errno.EOPNOTSUPP)
    works(store)
    assert unused(store)
    wait_until(lambda: held() == before, "the server closes what it got")


@needs("fuse")
def test_only_its_client_waits_for_a_server_of_fuse(
    socket_path: Path, store: Store, path: Path
) -> None:
    """Closing a descriptor of FUSE waits for its server (FUSE_FLUSH), which is stopped here."""
    with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        file, pid = server_of(lambda: by_fuse(buffer))
        with file, raw(socket_path) as first, raw(socket_path) as second:
            os.kill(pid, signal.SIGSTOP)
            try:
                socket.send_fds(first, [request(path)], [file.fileno()])
                socket.send_fds(second, [b'{"op":"usage"}'], [file.fileno()])
                works(store)
                loaded, _ = store.load(None, path)
                assert_same(loaded.pread(SIZE, 0), path.read_bytes(), "beside them")
                store.discard(loaded)
                assert not select.select([first, second], [], [], 0)[0], "they wait"
            finally:
                os.kill(pid, signal.SIGCONT)
            assert b"not of a regular file" in reply(first)
            assert reply(second) == b""


@needs("fuse")
@pytest.mark.parametrize("answers", [False, True])
def test_a_server_ends_while_a_client_waits_for_fuse(
    socket_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """FUSE answers after the server has ended, or while it ends, when its clients are closed."""
    if answers:
        finish_requests = server.Server._finish_requests

        def answer(ending: server.Server) -> None:
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda: ending._calls, "the descriptor is closed")
            finish_requests(ending)

        monkeypatch.setattr(server.Server, "_finish_requests", answer)
    with dmabuf.allocate(SIZE, exporter="memfd") as buffer:
        file, pid = server_of(lambda: by_fuse(buffer))
        with file:
            try:
                with in_a_thread(socket_path), raw(socket_path) as connection:
                    with dmabuf.store.connect(socket_path) as other:
                        os.kill(pid, signal.SIGSTOP)
                        socket.send_fds(connection, [request(path)], [file.fileno()])
                        works(other)
                        works(other)
            finally:
                os.kill(pid, signal.SIGCONT)


def test_a_descriptor_of_which_the_kernel_tells_nothing(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one on a FUSE mount that is another user's alone."""

    def refuse(_fd: int) -> bool:
        raise PermissionError(errno.EACCES, "examining a file")

    monkeypatch.setattr(files, "is_file_on_disk", refuse)
    with pytest.raises(RouteUnavailable, match="not of a regular file"):
        store.load(None, path)
    works(store)


def test_a_lease_of_the_client_is_not_waited_for(store: Store, path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    with pytest.raises(BlockingIOError, match="write lease"):
        store.load(None, fd)
    os.close(fd)
    buffer, _ = store.load(None, path)
    assert_same(buffer.pread(SIZE, 0), path.read_bytes(), "without the lease")
    store.discard(buffer)


def test_a_client_cannot_change_how_the_server_has_its_file_open(store: Store, path: Path) -> None:
    """The flags belong to the client's open file: the server opens the file again."""
    fd = os.open(path, os.O_RDONLY)

    def change(_: int) -> None:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT | os.O_NONBLOCK | os.O_APPEND)
        os.lseek(fd, 12345, os.SEEK_SET)

    with acting_before_the_device(change, 1) as seen:
        buffer, transfer = store.load(None, fd)
    assert seen and os.lseek(fd, 0, os.SEEK_CUR) == 12345
    assert_same(buffer.pread(SIZE, 0), path.read_bytes(), f"{transfer}")
    os.close(fd)
    store.discard(buffer)


# -- requests of any kind


def request(path: Path, size: int = SIZE, name: str | None = None) -> bytes:
    return protocol.pack_request(
        "load", name=name, size=size, mode=0o600, exporter="system", huge_pages=False,
        trusted=False, file_offset=0,
    )  # fmt: skip


def test_requests_with_another_number_of_descriptors(
    socket_path: Path, store: Store, path: Path
) -> None:
    before = warmed_up(store, path)
    with path.open("rb") as file:
        with raw(socket_path) as connection:
            connection.send(request(path))
            assert b"no descriptor of a file" in reply(connection)
            socket.send_fds(connection, [request(path)], [file.fileno()])
            assert b'"loaded"' in reply(connection), "the same connection goes on"
        for count in (2, 200):
            with raw(socket_path) as connection:
                socket.send_fds(connection, [request(path)], [file.fileno()] * count)
                assert reply(connection) == b""
        with raw(socket_path) as connection:
            socket.send_fds(connection, [b'{"op":"load"}'], [file.fileno()])
            assert b"the fields are" in reply(connection)
            assert reply(connection) == b"", "the descriptor came with no request for it"
    works(store)
    wait_until(lambda: unused(store) and held() == before, "the server closes what it got")


def test_limits_and_names_are_those_of_create(store: Store, path: Path, folder: Path) -> None:
    store.create("taken", PAGE).close()
    with pytest.raises(FileExistsError):
        store.load("taken", path)
    with pytest.raises(OSError, match="the store is full") as caught:
        store.load("big", path, 1 << 30)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="the file has") as caught:
        store.load("long", path, 2 * SIZE)
    assert caught.value.errno == errno.ESTALE
    (folder / "empty").touch()
    with pytest.raises(ValueError, match="invalid size 0"):
        store.load("empty", folder / "empty")
    with pytest.raises(OSError, match="exporter") as caught:
        store.load("name", path, exporter="cma")
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        store.load("missing", folder / "missing")
    assert [one.name for one in store.list()] == ["taken"]
    store.remove("taken")
    assert unused(store)


def test_what_the_server_cannot_read_natively(store: Store, path: Path) -> None:
    with pytest.raises(RouteUnavailable, match="a memfd, which is not a dma-buf"):
        store.load(None, path, exporter="memfd")
    with (
        emulation.registrar(lambda _dmabuf, _target: -errno.EOPNOTSUPP),
        pytest.raises(RouteUnavailable, match="has to be on an NVMe namespace") as caught,
    ):
        store.load(None, path)
    assert (caught.value.filename, caught.value.route) == (str(path), "native")
    with pytest.raises(RouteUnavailable, match="file offset and memory address differ"):
        store.load(None, path, 4 * PAGE, file_offset=3)
    assert unused(store)


def test_a_bad_block_of_the_disk(store: Store, path: Path) -> None:
    def answer(completion):
        return -errno.EIO if completion.straight else completion.result

    with emulation.Filter(answer), pytest.raises(OSError, match="the server reads the file") as bad:
        store.load(None, path, exporter="system")
    assert bad.value.errno == errno.EIO
    assert unused(store)


# -- clients and servers that end meanwhile


@contextlib.contextmanager
def held_up() -> Iterator[tuple[threading.Event, threading.Event, list[str]]]:
    """The device works from one event until the test sets the other; then `done` has an entry."""
    engine, begun, go, done = default_engine(), threading.Event(), threading.Event(), []
    run = engine.run

    def wait_and_run(job):
        begun.set()
        assert go.wait(120)
        try:
            return run(job)
        finally:
            done.append("read")

    engine.run = wait_and_run
    yield begun, go, done
    engine.run = run


def test_a_client_that_dies_while_the_device_works(
    socket_path: Path, store: Store, path: Path
) -> None:
    before = warmed_up(store, path)
    with held_up() as (begun, go, done), path.open("rb") as file:
        with raw(socket_path) as connection:
            socket.send_fds(connection, [request(path)], [file.fileno()])
            assert begun.wait(120)
        works(store)
        assert store.usage().charged == SIZE, "the device still writes to the memory"
        go.set()
        wait_until(lambda: unused(store), "the server gives the memory up")
        assert done == ["read"]
    wait_until(lambda: held() == before, "nothing is left")


def test_a_server_ends_when_the_device_has_finished(socket_path: Path, path: Path) -> None:
    with held_up() as (begun, go, done), path.open("rb") as file:
        with in_a_thread(socket_path) as one, raw(socket_path) as connection:
            socket.send_fds(connection, [request(path)], [file.fileno()])
            assert begun.wait(120)
            one.stop()
            threading.Timer(0.2, go.set).start()
            assert reply(connection) == b""
        assert done == ["read"], "the server has waited for the device"

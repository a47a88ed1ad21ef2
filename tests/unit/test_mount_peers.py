"""A mount beside what it does not know of: its store's other clients, and a store that ends."""

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf.errors import ClosedError
from dmabuf.mount.connections import Connections
from tests.guards import demand
from tests.mounting import Mounted, mount, mounted
from tests.serving import as_a_program, in_a_thread
from tests.support import assert_same, pattern
from tests.unit.test_mount import failing


@pytest.fixture(scope="module", autouse=True)
def fuse() -> None:
    demand("fuse", "pyfuse3")


def test_a_name_that_another_client_took_meanwhile_is_that_clients(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        file = os.open(files.path / "secret", os.O_CREAT | os.O_RDWR, 0o644)
        with files.store.create("secret", 6, mode=0o600) as theirs:
            theirs.pwrite(b"theirs", 0)
            if os.geteuid() == 0:
                files.store.chown("secret", 1234, 1234)
            before = files.store.stat("secret")
            os.write(file, b"ours")
            with pytest.raises(FileExistsError):
                os.close(file)
            assert files.store.stat("secret") == before
            assert theirs.pread(6, 0) == b"theirs"
        assert os.listdir(files.path) == ["secret"]
        assert (files.path / "secret").read_bytes() == b"theirs"
        assert files.store.usage().charged == 4096
        files.process.send_signal(signal.SIGTERM)
        assert "secret: there is a buffer of that name" in files.process.stderr.read()


def test_one_of_two_mounts_has_a_file_that_both_create(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        other = tmp_path / "other"
        other.mkdir()
        with mount(other, tmp_path / "store.sock"):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            first, second = (os.open(folder / "lock", flags) for folder in (files.path, other))
            os.write(first, b"first")
            os.write(second, b"second")
            os.close(second)
            with pytest.raises(FileExistsError):
                os.close(first)
            for folder in (files.path, other):
                assert (folder / "lock").read_bytes() == b"second"


@contextlib.contextmanager
def another_store(files: Mounted) -> Iterator[None]:
    """The mount's store has ended, the mount knows, and another serves in its place."""
    files.server.terminate()
    files.server.wait(timeout=30)
    failing(errno.EIO, os.listdir, files.path)
    with as_a_program(files.path.parent / "store.sock"):
        yield


def test_what_a_store_had_of_a_growing_file_is_not_given_to_the_next(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        flags = os.O_CREAT | os.O_RDWR
        new, grown, small = (
            os.open(files.path / name, flags, 0o644) for name in ("new", "grown", "small")
        )
        for fd in (grown, small):
            os.write(fd, bytes(10))
            os.fsync(fd)
        for fd in (new, grown):
            os.pwrite(fd, pattern(9000, fd), 0)
        with another_store(files):
            assert os.listdir(files.path) == ["new"]
            for fd in (new, grown):
                assert_same(os.pread(fd, 9000, 0), pattern(9000, fd), "what is open stays")
                failing(errno.EIO, os.fsync, fd)
                failing(errno.EIO, os.close, fd)
            os.close(small)
            (files.path / "new").write_bytes(b"of the next")
            assert os.listdir(files.path) == ["new"]
            assert (files.path / "new").read_bytes() == b"of the next"
            assert files.process.poll() is None
        files.process.send_signal(signal.SIGTERM)
        said = files.process.stderr.read()
        assert "new: the store that had it is gone" in said
        assert "Traceback" not in said


def test_a_file_of_a_store_that_is_gone_harms_none_of_the_next(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        old = os.open(files.path / "old", os.O_CREAT | os.O_RDWR, 0o644)
        os.write(old, b"hello")
        with another_store(files):
            new = os.open(files.path / "new", os.O_CREAT | os.O_RDWR, 0o644)
            os.write(new, b"1")
            os.fsync(new)
            failing(errno.EIO, os.pwrite, old, bytes(5000), 0)
            os.pwrite(new, b"12345", 0)
            os.close(new)
            assert (files.path / "new").read_bytes() == b"12345"
            failing(errno.EIO, os.close, old)


def test_memory_is_not_asked_for_where_no_store_serves(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        with (files.path / "x").open("xb", buffering=0) as file:
            file.write(b"x")
            os.fsync(file.fileno())
            files.server.terminate()
            files.server.wait(timeout=30)
            failing(errno.EIO, os.listdir, files.path)
            failing(errno.EIO, os.pwrite, file.fileno(), bytes(5000), 0)


def test_a_connection_that_ended_ends_no_later_one(tmp_path: Path) -> None:
    lost: list[str] = []
    path = tmp_path / "store.sock"
    with in_a_thread(path):
        connections = Connections(str(path), lambda: lost.append("lost"))
        with pytest.raises(ClosedError), connections.asking() as store:
            raise ClosedError("a buffer, say")
        assert (store.closed, lost) == (False, [])
        with pytest.raises(OSError, match="the store is gone") as caught:
            with connections.asking() as before:
                connections.close()
                later = connections.get("names")
                before.list()
        assert (caught.value.errno, before is store, lost) == (errno.EIO, True, [])
        assert connections.get("names") is later and later.list() == []
        with pytest.raises(OSError, match="the store is gone"), connections.asking() as store:
            memory = connections.get("memory")
            store.close()
            store.list()
        assert (store is later, memory.closed, lost) == (True, True, ["lost"])
        assert connections.get("names").list() == []
        connections.close()


def test_a_mistake_of_the_mounts_is_an_error_of_one_call(caplog: pytest.LogCaptureFixture) -> None:
    import pyfuse3

    from dmabuf.mount.operations import Operations

    told: list[str] = []
    operations = Operations(None, shared=False, tell=told.append)
    with pytest.raises(pyfuse3.FUSEError) as caught, operations._refusing():
        raise LookupError("of ours")
    assert caught.value.errno == errno.EIO
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dmabuf", "ERROR")
    assert "LookupError: of ours" in caplog.text

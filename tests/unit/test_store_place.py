"""Where the store listens: one server at a place, and nobody else keeps it from there."""

import errno
import fcntl
import os
import socket
import threading
from pathlib import Path

import pytest

from dmabuf.store import listening
from tests.guards import needs
from tests.support import in_child, together

_LISTEN = """
import sys
from dmabuf.store import listening
with listening(sys.argv[1]):
    print("listening")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


def test_whoever_may_read_the_folder_holds_nobody_up(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert in_child(_LISTEN, path, timeout=30) == "listening\n"
    finally:
        os.close(fd)


def test_the_lock_is_there_for_a_moment_and_one_that_was_left_is_used(path: Path) -> None:
    lock = Path(f"{path}.lock")
    for left in (False, True):
        if left:
            lock.touch(0o600)
        with listening(str(path)):
            assert sorted(os.listdir(path.parent)) == [path.name]
        assert os.listdir(path.parent) == []


def refused(path: Path, number: int) -> None:
    before = sorted(os.listdir(path.parent)), len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as caught, listening(str(path)):
        pass
    assert (caught.value.errno, caught.value.filename) == (number, f"{path}.lock")
    assert (sorted(os.listdir(path.parent)), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("kind", ["readable", "directory", "symlink", "pipe"])
def test_a_lock_that_others_may_hold_is_refused(path: Path, kind: str) -> None:
    lock, number = Path(f"{path}.lock"), errno.EPERM
    if kind == "readable":
        lock.touch(0o644)
    elif kind == "directory":
        lock.mkdir(0o700)
        number = errno.EISDIR
    elif kind == "symlink":
        Path(f"{path}.other").touch(0o600)
        lock.symlink_to(f"{path}.other")
        number = errno.ELOOP
    else:
        os.mkfifo(lock, 0o600)
    refused(path, number)


@needs("root")
def test_another_users_lock_is_refused(path: Path) -> None:
    lock = Path(f"{path}.lock")
    lock.touch(0o600)
    os.chown(lock, 4001, 4001)
    refused(path, errno.EPERM)


def test_a_place_in_no_directory(path: Path) -> None:
    folder = path.parent / "missing"
    with pytest.raises(FileNotFoundError) as caught, listening(str(folder / "s")):
        pass
    assert caught.value.filename == str(folder)


def test_of_many_servers_at_a_stale_socket_one_has_it(path: Path) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
            stale.bind(str(path))
        have: list[int] = []
        tried = threading.Barrier(8)

        def serve(number: int, have: list[int] = have, tried: threading.Barrier = tried) -> None:
            try:
                with listening(str(path)):
                    have.append(number)
                    tried.wait(60)
            except OSError as error:
                assert (error.errno, error.filename) == (errno.EADDRINUSE, str(path))
                tried.wait(60)

        together(serve)
        assert len(have) == 1
        assert os.listdir(path.parent) == []


def test_a_lock_that_was_taken_away_meanwhile_is_none(path: Path, monkeypatch) -> None:
    flock, locked = fcntl.flock, []

    def taking_away(fd: int, how: int) -> None:
        flock(fd, how)
        locked.append(os.fstat(fd).st_ino)
        if len(locked) == 1:
            other = Path(f"{path}.other")
            other.touch(0o600)
            other.rename(f"{path}.lock")

    monkeypatch.setattr(fcntl, "flock", taking_away)
    with listening(str(path)):
        assert len(set(locked)) == len(locked) == 2

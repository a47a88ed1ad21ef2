"""The mount beside the other clients of its store, other mounts, and a store that ends."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.store import Status
from tests.guards import demand
from tests.mounting import Mounted, mount, mounted
from tests.restarting import KINDS
from tests.serving import Between, as_a_program
from tests.support import assert_same, pattern, wait_until
from tests.unit.test_mount import failing

THEIRS = pattern(1 << 20, 2)
MUCH = pattern(6 << 20, 1)


@pytest.fixture(scope="module", autouse=True)
def fuse() -> None:
    demand("fuse", "pyfuse3")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mounted, Between]]:
    """A mount whose requests to the store pass by this process."""
    folder = tmp_path_factory.mktemp("clients")
    directory, socket = folder / "mnt", folder / "store.sock"
    directory.mkdir()
    between = Between(folder / "between.sock", socket)
    with (
        as_a_program(socket, "--max-memory", "64MiB") as server,
        dmabuf.store.connect(socket) as store,
        mount(directory, folder / "between.sock") as process,
    ):
        yield Mounted(directory, store, process, server), between
    between.close()


@pytest.fixture
def files(world: tuple[Mounted, Between]) -> Iterator[Mounted]:
    yield world[0]
    for status in world[0].store.list():
        world[0].store.remove(status.name)


@pytest.fixture
def between(world: tuple[Mounted, Between]) -> Between:
    world[1].reset()
    return world[1]


def give(files: Mounted, name: str) -> Status:
    """Another client gives a name to a buffer of its own."""
    with files.store.create(None, len(THEIRS), mode=0o640) as theirs:
        theirs.pwrite(THEIRS, 0)
        files.store.link(theirs, name)
    files.store.utime(name, accessed_ns=10**18, modified_ns=10**18 + 1)
    return files.store.stat(name)


def untouched(files: Mounted, before: Status) -> None:
    assert replace(files.store.stat(before.name), in_use=None) == replace(before, in_use=None)
    with files.store.open(before.name) as buffer:
        assert_same(buffer.pread(len(THEIRS), 0), THEIRS, "another's")


def content(files: Mounted, name: str) -> bytes:
    buffer, status = files.store.open_with_status(name)
    with buffer:
        return buffer.pread(status.length, 0)


def writes(fd: int, data: bytes) -> None:
    os.pwrite(fd, data, 5)
    os.fsync(fd)


CHANGES: list[tuple[str, Callable[[int], object], bytes]] = [
    ("chmod", lambda fd: os.fchmod(fd, 0o604), b"ours "),
    ("chown", lambda fd: os.fchown(fd, os.geteuid(), os.getegid()), b"ours "),
    ("utime", lambda fd: os.utime(fd, ns=(5, 6)), b"ours "),
    ("truncate", lambda fd: os.ftruncate(fd, 2), b"ou"),
    ("truncate", lambda fd: writes(fd, b"67"), b"ours 67"),
    ("link", lambda fd: writes(fd, bytes(5000)), b"ours " + bytes(5000)),
]
NAMED = [f"{op} {len(expected)}" for op, _, expected in CHANGES]


@pytest.mark.parametrize(("op", "change", "expected"), CHANGES, ids=NAMED)
@pytest.mark.parametrize("how", ["given away", "removed", "renamed"])
def test_what_others_do_to_a_name_just_before_a_change(
    files: Mounted,
    between: Between,
    how: str,
    op: str,
    change: Callable[[int], object],
    expected: bytes,
) -> None:
    """The change is made to the file that is open, under any name, and to no other buffer."""
    theirs: list[Status] = []

    def act() -> None:
        if how == "renamed":
            files.store.rename("x", "y")
        if how == "removed":
            files.store.remove("x")
        else:
            theirs.append(give(files, "x"))

    (files.path / "x").write_bytes(b"ours ")
    fd = os.open(files.path / "x", os.O_RDWR)
    try:
        between.before(op, act)
        change(fd)
        assert between.done == [op]
        assert os.pread(fd, 1 << 20, 0) == expected
        assert os.fstat(fd).st_nlink == (1 if how == "renamed" else 0)
    finally:
        os.close(fd)
    for one in theirs:
        untouched(files, one)
    names = {"given away": ["x"], "removed": [], "renamed": ["x", "y"]}[how]
    assert [status.name for status in files.store.list()] == names
    if how == "renamed":
        assert content(files, "y") == expected
        status = files.store.stat("y")
        assert status.mode == (0o604 if op == "chmod" else 0o644)
        if op == "utime":
            assert (status.accessed_ns, status.modified_ns) == (5, 6)


def test_a_file_that_others_renamed_is_written_under_its_new_name(files: Mounted) -> None:
    (files.path / "x").write_bytes(b"12345678")
    with (files.path / "x").open("r+b", buffering=0) as file:
        files.store.rename("x", "y")
        os.pwrite(file.fileno(), b"9", 8)
        os.fsync(file.fileno())
        assert content(files, "y") == b"123456789"
        files.store.rename("y", "z")
        os.pwrite(file.fileno(), pattern(9000, 1), 9)
        files.store.rename("z", "x")
        files.store.create("z", 1).close()
    assert_same(content(files, "x"), b"123456789" + pattern(9000, 1), "under its name")
    assert files.store.stat("z").length == 1


def test_a_mode_that_another_client_sets_stays_when_content_moves(files: Mounted) -> None:
    (files.path / "x").write_bytes(b"small")
    with (files.path / "x").open("r+b", buffering=0) as file:
        file.write(bytes(5000))
        files.store.chmod("x", 0o640)
    assert (files.store.stat("x").mode, files.store.stat("x").length) == (0o640, 5000)


def test_a_name_that_another_client_takes_first_is_that_clients(files: Mounted) -> None:
    file = os.open(files.path / "secret", os.O_CREAT | os.O_RDWR, 0o644)
    theirs = give(files, "secret")
    os.write(file, b"ours")
    with pytest.raises(FileExistsError):
        os.close(file)
    untouched(files, theirs)
    assert os.listdir(files.path) == ["secret"]


@pytest.mark.parametrize("op", ["create", "link"])
def test_others_see_a_file_whole_while_it_is_published(
    files: Mounted, between: Between, op: str
) -> None:
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((path.stat().st_size, path.stat().st_ino))

    path = files.path / "x"
    with path.open("xb", buffering=0) as file:
        file.write(MUCH)
        look()
        between.before(op, look)
        os.fsync(file.fileno())
        look()
    assert between.done == [op]
    assert len(set(seen)) == 1 and seen[0][0] == len(MUCH)


@pytest.mark.parametrize("op", ["create", "link"])
def test_names_change_while_a_file_is_published(files: Mounted, between: Between, op: str) -> None:
    import threading

    (files.path / "y").write_bytes(b"Y" * 100)
    with (files.path / "x").open("xb", buffering=0) as file:
        file.write(MUCH)
        renames = threading.Thread(target=os.rename, args=[files.path / "x", files.path / "x.bak"])
        between.before(op, renames.start)
        os.fsync(file.fileno())
        renames.join()
    (files.path / "y").rename(files.path / "x")
    assert_same((files.path / "x.bak").read_bytes(), MUCH, "the file that was published")
    assert (files.path / "x").read_bytes() == b"Y" * 100
    assert sorted(os.listdir(files.path)) == ["x", "x.bak"]


def test_memory_that_is_being_made_delays_no_other_file(files: Mounted, between: Between) -> None:
    def others() -> None:
        assert "large" in os.listdir(files.path)
        assert (files.path / "small").read_bytes() == b"small"
        os.truncate(files.path / "small", 3)
        with (files.path / "small").open("ab") as file:
            file.write(b"er")

    (files.path / "small").write_bytes(b"small")
    with (files.path / "large").open("xb", buffering=0) as file:
        file.write(MUCH)
        between.before("create", others)
        os.fsync(file.fileno())
    assert between.done == ["create"]
    assert (files.path / "small").read_bytes() == b"smaer"
    assert_same(content(files, "large"), MUCH, "the large file")


def test_times_outside_what_the_store_keeps_are_the_nearest(files: Mounted) -> None:
    (files.path / "x").write_bytes(b"old")
    os.utime(files.path / "x", ns=(5, -5))
    assert files.store.stat("x").modified_ns == 0


def test_a_file_that_finds_no_memory_is_an_error_of_close(files: Mounted) -> None:
    (files.path / "other").write_bytes(bytes(40 << 20))
    file = (files.path / "x").open("xb", buffering=0)
    for _ in range(30):
        file.write(bytes(1 << 20))
    failing(errno.ENOSPC, file.close)
    wait_until(lambda: os.listdir(files.path) == ["other"])  # reported after close(2)
    with (files.path / "other").open("ab", buffering=0) as file:
        file.write(bytes(1 << 20))
        failing(errno.ENOSPC, os.fsync, file.fileno())
        with contextlib.suppress(OSError):
            file.close()
    assert files.store.stat("other").length == 40 << 20, "it keeps what it had"
    assert files.store.usage().charged == 40 << 20


def test_of_two_mounts_one_has_a_file_that_both_create(tmp_path: Path) -> None:
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
        files.process.send_signal(signal.SIGTERM)
        assert "lock: a buffer of that name exists" in files.process.stderr.read()


_OUTGROW = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(file, bytes(9000), 0)
print("written", flush=True)
sys.stdin.read()
os.close(file)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_written_over_a_restart_of_the_store(kind: str, tmp_path: Path) -> None:
    path, directory = tmp_path / "store.sock", tmp_path / "mnt"
    directory.mkdir()
    with contextlib.closing(KINDS[kind](path)) as server, mount(directory, path):
        file = directory / "x"
        file.write_bytes(pattern(5000, 1))
        # A process of its own, because a fork of this one would close the file, and so wait for
        # the server that the fork is about to become.
        writer = subprocess.Popen(
            [sys.executable, "-c", _OUTGROW, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with writer:
            assert writer.stdout.readline() == b"written\n"
            server.restart()
            if kind == "killed":
                failing(errno.EIO, os.listdir, directory)
            writer.stdin.close()
            assert writer.wait(timeout=100) == 0
        assert_same(file.read_bytes(), bytes(9000), "what was written before the restart")


def test_a_store_that_ends_is_an_error_until_another_serves(tmp_path: Path) -> None:
    with mounted(tmp_path) as files:
        path, socket = files.path / "x", tmp_path / "store.sock"
        path.write_bytes(pattern(5000, 1))
        new = os.open(files.path / "new", os.O_CREAT | os.O_RDWR, 0o644)
        os.pwrite(new, pattern(9000, 3), 0)
        small = os.open(files.path / "small", os.O_CREAT | os.O_RDWR, 0o644)
        os.write(small, bytes(10))
        os.fsync(small)
        with path.open("rb") as file:
            files.server.terminate()
            files.server.wait(timeout=100)
            failing(errno.EIO, path.stat)
            failing(errno.EIO, os.listdir, files.path)
            failing(errno.EIO, (files.path / "another").write_bytes, b"")
            failing(errno.EIO, os.fsync, new)
            assert_same(file.read(), pattern(5000, 1), "what is open stays")
        with as_a_program(socket), dmabuf.store.connect(socket) as store:
            assert os.listdir(files.path) == ["new"]
            path.write_bytes(b"again")
            assert path.read_bytes() == b"again"
            os.write(small, b"of a store that is gone")
            os.close(small)
            os.close(new)
            assert_same((files.path / "new").read_bytes(), pattern(9000, 3), "spooled before")
            assert sorted(one.name for one in store.list()) == ["new", "x"]
        files.process.send_signal(signal.SIGTERM)
        errors = files.process.stderr.read()
        assert "the store has ended" in errors and "Traceback" not in errors

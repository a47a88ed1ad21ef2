"""SIGKILL and ENOSPC at every system call by which a file is replaced: the old one or the new.

And each call of a transfer is interrupted or refused.
"""

import errno
import functools
import itertools
import os
import platform
import shutil
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.store.server import started
from tests import stepping
from tests.serving import as_a_program
from tests.support import PATIENCE, assert_same, pattern, poison
from tests.writers import WRITERS, Writer

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the numbers of system calls are those of x86-64"
)

OLD, NEW = pattern(50_001, 61), pattern(300_005, 62)
NO_ROOM = {
    *("write", "pwrite64", "writev", "pwritev", "pwritev2", "fallocate", "ftruncate"),
    *("openat", "mkdir", "link", "linkat", "rename", "renameat", "setxattr", "copy_file_range"),
    *("fsync", "fdatasync", "sync_file_range"),
}
"""The calls that a full disk may refuse."""


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a child needs is imported once."""
    folder = tmp_path_factory.mktemp("loaded") / "one" / "two"
    folder.mkdir(parents=True)
    for name, writer in WRITERS.items():
        writer.write(folder / name, OLD)
        assert writer.read(folder / name) == OLD


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file or folder to replace."""
    (tmp_path / "one" / "two").mkdir(parents=True)
    return tmp_path / "one" / "two" / "target"


def prepare(writer: Writer, path: Path, there: bool) -> None:
    """Leave the old file in the folder, or nothing."""
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    if there:
        writer.write(path, OLD)


def hidden(folder: Path) -> list[str]:
    """Return what a writer left under a name of its own; anything else must be its target."""
    return [name for _, _, names in os.walk(folder) for name in names if name.startswith(".")]


def outcome(writer: Writer, path: Path) -> int:
    try:
        writer.write(path, NEW)
    except OSError:
        return 1
    return 0


@pytest.mark.parametrize("there", [True, False], ids=["old", "none"])
@pytest.mark.parametrize("name", WRITERS)
def test_killed_before_every_call(name: str, there: bool, path: Path) -> None:
    writer, before = WRITERS[name], OLD if there else None
    work = functools.partial(outcome, writer, path)
    for at in itertools.count():
        prepare(writer, path, there)
        status, names = stepping.run(work, at, stepping.KILL)
        where = f"killed before call {at}: {names[-3:]}"
        found = writer.read(path)
        if status == 0:
            assert found == NEW and not hidden(path.parent)
            break
        assert status == -9, where
        assert found in (before, NEW), where
        assert not hidden(path.parent) or names[-1] == "rename", where
    assert not writer.durable or "fsync" in names[names.index("linkat") :]


@pytest.mark.parametrize("name", WRITERS)
def test_no_room_at_every_call(name: str, path: Path) -> None:
    writer, failed = WRITERS[name], 0
    work = functools.partial(outcome, writer, path)
    for at in itertools.count():
        prepare(writer, path, True)
        status, names = stepping.run(work, at, errno.ENOSPC, NO_ROOM)
        where = f"refused call {at}: {names}"
        assert status in (0, 1), where
        placed = status == 0 or "rename" in names[:at]  # then only its name was not flushed
        assert writer.read(path) == (NEW if placed else OLD), where
        assert not hidden(path.parent), where
        failed += status
        if len(names) <= at:
            break
    assert failed > 3


def test_the_next_server_of_a_store_killed_before_every_call(tmp_path: Path) -> None:
    """Until it has told the running one that it has everything, that one goes on."""
    path = tmp_path / "socket"

    def take_over() -> int:
        with started(str(path), None, 64 << 20, replace=True) as server:
            server.stop()
            server.run()
        return 0

    with as_a_program(path) as running:
        with dmabuf.store.connect(path) as store:
            for number in range(3):
                with store.create(f"{number}", 4096 * (number + 1)) as buffer:
                    buffer.pwrite(pattern(buffer.size, number), 0)
        for at in itertools.count():
            _, names = stepping.run(take_over, at, stepping.KILL)
            try:
                with dmabuf.store.connect(path) as store:
                    assert [status.name for status in store.list()] == ["0", "1", "2"]
                    for number in range(3):
                        with store.open(f"{number}") as buffer:
                            assert buffer.pread(buffer.size, 0) == pattern(buffer.size, number)
            except OSError:
                assert running.wait(PATIENCE) == 0, "it ended before it was told"
                break
        last = [one for one in names if one == "sendto"]
        assert names[-1] == "recvfrom" and names[-2] == "sendto" and len(last) >= 3, names


# -- transfers

SIZE = 40 << 10
WAS, IS = pattern(SIZE, 71), pattern(SIZE, 72)
EDGE = 100  # the write begins and ends within a block
CALLS = stepping.CALLS | {
    8: "lseek", 9: "mmap", 16: "ioctl", 17: "pread64", 19: "readv", 72: "fcntl", 138: "fstatfs",
    221: "fadvise64", 290: "eventfd2", 295: "preadv", 319: "memfd_create", 327: "preadv2",
    332: "statx", 425: "io_uring_setup", 427: "io_uring_register", 451: "cachestat",
}  # fmt: skip
"""The calls by which a transfer does its work, by number, on x86-64."""
MAKES_DESCRIPTORS = "openat", "fcntl", "eventfd2", "memfd_create", "io_uring_setup"
INTERRUPTIBLE = (
    "openat", "pread64", "readv", "preadv", "preadv2", "pwrite64", "writev", "pwritev", "pwritev2",
    "write", "fallocate", "ftruncate", "fsync", "fdatasync", "sync_file_range", "io_uring_enter",
)  # fmt: skip
VERDICTS = {
    "EINTR": set(INTERRUPTIBLE),
    "EPERM": set(CALLS.values()) - {"mmap"},  # as seccomp answers
    "ENOMEM": set(CALLS.values()),
    "EMFILE": set(MAKES_DESCRIPTORS),
}


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """A file to read, and one to write to."""
    (tmp_path / "source").write_bytes(IS)
    (tmp_path / "target").write_bytes(WAS)
    return tmp_path / "source", tmp_path / "target"


def work(source: Path, target: Path) -> int:
    """Return 0 where all went well, 1 for an error as documented, 2 for a wrong byte."""
    try:
        with (
            dmabuf.Engine() as engine,
            dmabuf.allocate(SIZE, exporter="memfd") as buffer,
            dmabuf.open(source, engine=engine) as file,
            dmabuf.open(target, "r+", engine=engine) as other,
        ):
            buffer.pwrite(poison(SIZE), 0)
            done = file.read_into(buffer)
            if done.nbytes != SIZE or buffer.pread(SIZE, 0) != IS:
                return 2
            other.write_from(buffer, SIZE - 2 * EDGE, file_offset=EDGE, buffer_offset=EDGE)
            os.pwrite(other.fileno(), IS[:EDGE], 0)
            os.pwrite(other.fileno(), IS[-EDGE:], SIZE - EDGE)
    except (OSError, MemoryError):
        return 1
    return 0


@pytest.mark.parametrize("name", VERDICTS)
def test_every_call_of_a_transfer_fails_once(name: str, paths: tuple[Path, Path]) -> None:
    """Either an OSError, or every byte has moved; a signal is not an error."""
    number, calls = getattr(errno, name), VERDICTS[name]
    assert work(*paths) == 0
    for at in itertools.count():
        paths[1].write_bytes(WAS)
        status, names = stepping.run(functools.partial(work, *paths), at, number, calls, CALLS)
        where = f"{name} from call {at} of {names}"
        assert status in ((0,) if name == "EINTR" else (0, 1)), where
        found = paths[1].read_bytes()
        if status == 0:
            assert_same(found, IS, where)
        for start in range(0, SIZE, 512):
            part = slice(start, start + 512)
            edge = start == 0 or start == SIZE - 512
            assert edge or found[part] in (WAS[part], IS[part]), where
        if len(names) <= at:
            break
    assert at > 10

"""The store among users: each is who the kernel says, and files' rules hold for memory too."""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.memory import exporters
from dmabuf.store import Store
from tests.serving import for_every_user
from tests.support import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be any user")

SIZE = 65536

# What a child of another user begins with: USER, GROUP and its further GROUPS, and then `store`.
_AS = """
import errno, mmap, os, sys
import dmabuf.store
from dmabuf.memory import exporters, foreign
user, group, *groups = map(int, sys.argv[2].split(","))
os.setgroups(groups); os.setresgid(group, group, group); os.setresuid(user, user, user)
store = dmabuf.store.connect(sys.argv[1])

def refused(number, function, *arguments, **how):
    try:
        function(*arguments, **how)
    except OSError as error:
        assert error.errno == number, error
        return error
    raise AssertionError("it was allowed")
"""


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder, "store.sock")


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with for_every_user(path, "--max-memory", "16MiB"), dmabuf.store.connect(path) as store:
        yield store


def become(source: str, path: Path, who: str) -> str:
    return in_child(_AS + source, path, who)


def test_what_is_not_for_a_user(store: Store, path: Path) -> None:
    store.create("secret", SIZE).close()
    said = become(
        """
refused(errno.EACCES, store.open, "secret")
refused(errno.EACCES, store.open, "secret", "r+")
refused(errno.EPERM, store.remove, "secret")
refused(errno.EPERM, store.rename, "secret", "mine")
refused(errno.EPERM, store.chmod, "secret", 0o666)
refused(errno.EPERM, store.chown, "secret", user)
refused(errno.EACCES, store.truncate, "secret", 1)
refused(errno.EACCES, store.utime, "secret", modified_ns=1)
store.create("mine", 1).close()
refused(errno.EPERM, store.rename, "mine", "secret")
with store.create(None, 4096) as buffer:
    refused(errno.EPERM, store.link, buffer, "secret")
print(store.stat("secret").uid, store.stat("mine").uid, store.stat("mine").gid)
""",
        path,
        "4001,4002",
    )
    assert said == "0 4001 4002\n"
    assert [one.name for one in store.list()] == ["mine", "secret"]
    store.open("mine", "r+").close()  # root may
    store.remove("mine")


def test_what_its_owner_may_not_write_is_put_and_got_whole(store: Store, path: Path) -> None:
    store.create("public", 5000, mode=0o644).close()
    in_child(
        """
import dmabuf
import locale, dmabuf.cli.store  # while Python's own files may be read
from dmabuf.cli import cp, main, parser
dmabuf.allocate(4096, exporter="memfd").close()
"""
        + _AS
        + """
reading, writing = os.pipe()
os.write(writing, b"hi")
os.close(writing)
os.dup2(reading, 0)
store = ["--socket", sys.argv[1], "--quiet"]
assert main(["put", *store, "--size=8192", "--mode=444", "--exporter=memfd", "-", "n"]) == 0
with open(f"/proc/self/fd/{os.memfd_create('out')}", "wb") as out:
    for name, length in ("n", 2), ("public", 5000):
        os.dup2(out.fileno(), 1)
        os.truncate(out.fileno(), 0)
        os.lseek(out.fileno(), 0, os.SEEK_SET)
        assert main(["get", *store, name, "-"]) == 0
        assert os.fstat(out.fileno()).st_size == length
""",
        path,
        "4001,4002",
    )
    assert [(one.name, one.length, one.mode) for one in store.list()] == [
        ("n", 2, 0o444), ("public", 5000, 0o644),
    ]  # fmt: skip


_OPENS = """
wrong = []
for status in store.list():
    for mode, flags in ("r", os.O_RDONLY), ("r+", os.O_RDWR):
        results = []
        for attempt in (
            lambda: store.open(status.name, mode).close(),
            lambda: os.close(os.open(f"{sys.argv[3]}/{status.name}", flags)),
        ):
            try:
                attempt()
                results.append(True)
            except PermissionError:
                results.append(False)
        if results[0] != results[1]:
            wrong.append((status.name, mode, results))
print(wrong)
"""


@pytest.mark.parametrize(
    "who", ["1001,1001", "1002,1003,1003", "1004,1005", "1006,1007,1007,1003", "0,0"]
)
def test_who_may_open_a_buffer_is_who_may_open_a_file(store: Store, path: Path, who: str) -> None:
    """Every mode, beside files of the same owner, group and mode."""
    folder = path.parent / "files"
    folder.mkdir(mode=0o755)
    for digits in itertools.product((0, 2, 4, 6), repeat=3):
        mode = digits[0] << 6 | digits[1] << 3 | digits[2]
        name = f"{mode:03o}"
        store.create(name, 1, mode=mode, exporter="memfd").close()
        store.chown(name, 1001, 1003)
        (folder / name).touch()
        os.chown(folder / name, 1001, 1003)
        os.chmod(folder / name, mode)
    assert in_child(_AS + _OPENS, path, who, folder) == "[]\n"


def test_giving_a_name_away(store: Store, path: Path) -> None:
    said = become(
        """
store.create("n", 1).close()
refused(errno.EPERM, store.chown, "n", 1001)
refused(errno.EPERM, store.chown, "n", gid=1001)
store.chown("n", gid=1003)
store.chown("n", 1006, 1007)
print(store.stat("n").gid)
""",
        path,
        "1006,1007,1007,1003",
    )
    assert said == "1007\n"
    store.chown("n", 1001, 4242)
    assert (store.stat("n").uid, store.stat("n").gid) == (1001, 4242)
    become('refused(errno.EPERM, store.chmod, "n", 0o777)', path, "1006,1007,1007,1003")


def test_groups_are_the_kernels(store: Store, path: Path) -> None:
    store.create("ours", SIZE, mode=0o660).close()
    store.chown("ours", 4001, 4003)
    become('store.open("ours", "r+").close()', path, "4005,4006,4007,4003")
    become('store.open("ours", "r+").close()', path, "4005,4003")
    become('refused(errno.EACCES, store.open, "ours")', path, "4005,4006,4007")
    store.chmod("ours", 0o006)
    become('refused(errno.EACCES, store.open, "ours")', path, "4005,4003")  # its class is worse
    become('refused(errno.EACCES, store.open, "ours")', path, "4001,4009")  # and so the owner's
    become('store.open("ours", "r+").close()', path, "4010,4011")


@pytest.mark.skipif(
    os.path.exists(exporters.UDMABUF), reason="tests/kernel/test_store.py has it with udmabuf"
)
def test_a_grant_for_reading_is_held_to_by_the_kernel(store: Store, path: Path) -> None:
    with store.create("public", SIZE, mode=0o644) as buffer:
        buffer.pwrite(b"public", 0)
        become(READ_ONLY, path, "4001,4002")
        assert buffer.pread(7, 0) == b"public\0"


READ_ONLY = """
with store.open("public") as buffer:
    assert buffer.pread(6, 0) == b"public"
    assert not buffer.writable()
    fd = buffer.slabs[0].fd
    assert foreign.identify(fd) is None, "it is no dma-buf"
    refused(errno.EACCES, mmap.mmap, fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
    refused(errno.EBADF, os.pwrite, fd, b"x", 0)
    refused(errno.EBADF, os.posix_fallocate, fd, 0, 1)
    refused(errno.EACCES, os.open, f"/proc/self/fd/{fd}", os.O_RDWR)
    refused(errno.EPERM, os.fchmod, fd, 0o777)
refused(errno.EACCES, store.open, "public", "r+")
refused(errno.EPERM, store.open, "public", trusted=True)
"""


def test_the_memory_file_is_the_owners(store: Store, path: Path) -> None:
    store.create("shared", SIZE, mode=0o666).close()
    become(
        """
refused(errno.EPERM, store.open, "shared", "r+", trusted=True)
store.open("shared", "r+", trusted=None).close()
""",
        path,
        "4001,4002",
    )
    store.chown("shared", 4001)
    become('store.open("shared", "r+", trusted=True).close()', path, "4001,4002")


SERVE = """
import os, signal, sys
from dmabuf.store import Server, listening
os.setgroups([]); os.setresgid(4002, 4002, 4002); os.setresuid(4001, 4001, 4001)
with listening(sys.argv[1]) as listener:
    server = Server(listener, int(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda number, frame: server.stop())
    print("serving", flush=True)
    server.run()
"""


def test_a_users_store_is_for_that_user(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, path, "1048576"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout.readline() == "serving\n"
            assert oct(os.stat(path).st_mode & 0o777) == "0o600"
            assert os.stat(path).st_uid == 4001
            with pytest.raises(AssertionError, match="PermissionError"):
                become("", path, "4005,4006")
            become('store.create("mine", 4096).close(); store.remove("mine")', path, "4001,4002")
        finally:
            server.terminate()
        assert server.wait(timeout=100) == 0


def test_a_server_is_replaced_by_its_own_user_only(store: Store, path: Path) -> None:
    store.create("kept", SIZE, mode=0o666).close()
    said = become(
        """
import json, socket
def replace():
    with dmabuf.store.started(sys.argv[1], None, 1 << 20, replace=True):
        pass
print(refused(errno.EPERM, replace).strerror)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
    raw.connect(sys.argv[1])
    raw.send(b'{"op": "hand_over"}')
    print(json.loads(raw.recv(4096))["error"][0] == errno.EPERM)
""",
        path,
        "4001,4001",
    )
    assert said == "replace: the server is another user's\nTrue\n"
    assert [one.name for one in store.list()] == ["kept"]

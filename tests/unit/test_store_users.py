"""The store among users: each is who the kernel says, and files' rules hold for memory too."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.exporters import udmabuf
from dmabuf.store import Store
from tests.serving import as_a_program
from tests.support import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be any user")

SIZE = 65536

# What a child of another user begins with: USER, GROUP and its further GROUPS, and then `store`.
_AS = """
import errno, mmap, os, sys
import dmabuf.store
from dmabuf.exporters import memfd, foreign
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
    with as_a_program(path, "--max-memory", "16MiB"), dmabuf.store.connect(path) as store:
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
    refused(errno.EACCES, store.swap, buffer, "secret", 1)
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
from dmabuf.cli import get, put  # while Python's own files may be read
dmabuf.allocate(4096, exporter="memfd").close()
"""
        + _AS
        + """
reading, writing = os.pipe()
os.write(writing, b"hi")
os.close(writing)
os.dup2(reading, 0)
put.run(put.Options("-", "n", 8192, 0o444, "memfd", sys.argv[1], False, False, True))
with open(f"/proc/self/fd/{os.memfd_create('out')}", "wb") as out:
    for name, length in ("n", 2), ("public", 5000):
        os.dup2(out.fileno(), 1)
        os.truncate(out.fileno(), 0)
        os.lseek(out.fileno(), 0, os.SEEK_SET)
        get.run(get.Options(name, "-", None, False, False, sys.argv[1], False, False, True))
        assert os.fstat(out.fileno()).st_size == length
""",
        path,
        "4001,4002",
    )
    assert [(one.name, one.length, one.mode) for one in store.list()] == [
        ("n", 2, 0o444), ("public", 5000, 0o644),
    ]  # fmt: skip


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
    os.path.exists(udmabuf.DEVICE), reason="tests/kernel/test_store.py has it with udmabuf"
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
    become('refused(errno.EPERM, store.open, "shared", "r+", trusted=True)', path, "4001,4002")
    store.chown("shared", 4001)
    become('store.open("shared", "r+", trusted=True).close()', path, "4001,4002")


SERVE = """
import os, signal, sys
from dmabuf.store import place
from dmabuf.store.server import Server
os.setgroups([]); os.setresgid(4002, 4002, 4002); os.setresuid(4001, 4001, 4001)
with place.listening(sys.argv[1]) as listener:
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
        assert server.wait(timeout=30) == 0

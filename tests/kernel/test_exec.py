"""`dmabuf exec` and as_file() on real dma-bufs, by root and by a user without rights."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.memory import exporters
from tests.file_programs import check_readers, check_writers
from tests.guards import needs
from tests.kernel.conftest import BUFFERS, heap_read_only, vgem
from tests.kernel.vgem import Card
from tests.resources import held
from tests.support import PAGE, assert_same, pattern, raises_errno, wait_until
from tests.unit.command import PROGRAM
from tests.unit.test_as_file import ended, servers

SIZE = 40 * PAGE
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
everything = needs("fuse", "udmabuf", "dma_heap", "vgem", "hugepages")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = held(), servers()
    yield
    assert held() == before[0]
    assert all(ended(pid) for pid in servers() - before[1])


@pytest.fixture
def fuse_for_all() -> Iterator[None]:
    """As udev has it; the lab has no udev."""
    mode = os.stat("/dev/fuse").st_mode & 0o777
    os.chmod("/dev/fuse", 0o666)
    yield
    os.chmod("/dev/fuse", mode)


def execute(buf: dmabuf.Buffer, *words: object, before: list[str] | None = None, **how: object):
    fd = buf.fileno()
    command = [*(before or []), *PROGRAM, "exec", "--fd", fd, *words]
    return subprocess.run(
        [str(word).replace("{fd}", str(fd)) for word in command],
        **{"pass_fds": [fd], "capture_output": True, "timeout": 300} | how,
    )


@everything
def test_programs(tmp_path: Path) -> None:
    """On a udmabuf: test_exec runs them on other kinds of buffers."""
    with BUFFERS["udmabuf"](SIZE) as buf, dmabuf.as_file(buf) as file:
        assert file.way == "fuse"
        assert "a dma-buf has no read(2)" in file.reason
        check_readers(file.fileno(), buf, tmp_path, few=True)
        check_writers(file.fileno(), buf, tmp_path, truncating=True, few=True)


@everything
def test_several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters, "_LARGEST_SLAB", 3 * PAGE)
    with dmabuf.allocate(SIZE, exporter="udmabuf") as buf, dmabuf.as_file(buf) as file:
        assert len(buf.slabs) == 14
        buf.pwrite(pattern(SIZE, 1), 0)
        for offset, size in ((0, SIZE), (3 * PAGE - 1, 2), (5, 9 * PAGE), (SIZE - 1, 5)):
            got = os.pread(file.fileno(), size, offset)
            assert_same(got, pattern(SIZE, 1)[offset : offset + size], "what the file reads")
            os.pwrite(file.fileno(), pattern(SIZE, 2)[offset : offset + size], offset)
            now = pattern(SIZE, 1)[:offset] + pattern(SIZE, 2)[offset : offset + size]
            now += pattern(SIZE, 1)[offset + size :]
            assert_same(buf.pread(SIZE, 0), now, "the buffer")
            buf.pwrite(pattern(SIZE, 1), 0)


@everything
@pytest.mark.parametrize(("kind", "before"), [("vgem", []), ("dma-heap", NOBODY)])
def test_exec(kind: str, before: list[str], fuse_for_all: None) -> None:
    """tests.file_programs, itself the program: on descriptor N, and beside it the dma-buf's own.

    All of them as another user; as root some.
    """
    which = "all" if before else "few"
    with BUFFERS[kind](SIZE) as buf:
        own = os.dup(buf.fileno())
        try:
            words = ["-v", "--", sys.executable, "-m", "tests.file_programs", "{fd}", own, which]
            done = execute(buf, *words, before=before, pass_fds=[buf.fileno(), own])
        finally:
            os.close(own)
        said = done.stderr.decode()
        assert (done.returncode, done.stdout) == (0, b""), said
        assert said.startswith(f"descriptor {buf.fileno()}: {buf.size} bytes, rb+, by fuse: ")
        assert len(said.splitlines()) == 1


@everything
def test_a_static_program_and_standard_input() -> None:
    with BUFFERS["dma-heap"](SIZE) as buf:
        buf.pwrite(pattern(SIZE, 3), 0)
        done = subprocess.run(
            [*PROGRAM, "exec", "--fd", "0", "busybox", "cat"],
            stdin=buf.fileno(),
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert_same(done.stdout, pattern(SIZE, 3), "what it saw")


@everything
def test_read_only(fuse_for_all: None) -> None:
    script = "head -c 5 /dev/fd/{fd}; echo x >&{fd}; echo x >/dev/fd/{fd}"
    with BUFFERS["dma-heap"](SIZE) as buf:
        buf.pwrite(pattern(SIZE, 4), 0)
        for before in ([], NOBODY):
            done = execute(buf, "--read-only", "bash", "-c", script, before=before)
            assert done.stdout == pattern(SIZE, 4)[:5]
            assert b"Bad file descriptor" in done.stderr
            assert b"Permission denied" in done.stderr
            assert_same(buf.pread(SIZE, 0), pattern(SIZE, 4), "the buffer")
    with heap_read_only(SIZE) as buf:
        done = execute(buf, "bash", "-c", script)
        assert done.stdout == bytes(5)
        assert b"Bad file descriptor" in done.stderr


@everything
def test_no_message_ends_up_in_the_buffer() -> None:
    with vgem(SIZE) as buf:
        buf.pwrite(pattern(SIZE, 5), 0)
        command = [*PROGRAM, "exec", "--fd", "2", "--", "no-such-program"]
        assert subprocess.run(command, stderr=buf.fileno(), timeout=60).returncode == 127
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 5), "the buffer")


@everything
def test_where_fuse_is_not_to_be_had(fuse_for_all: None) -> None:
    limit = Path("/proc/sys/user/max_user_namespaces")
    before = limit.read_text()
    with BUFFERS["dma-heap"](SIZE) as buf:
        os.chmod("/dev/fuse", 0o600)
        done = execute(buf, "true", before=NOBODY)
        assert done.returncode == 1
        assert b"chmod" not in done.stderr
        assert done.stderr.startswith(b"error: as_file: open /dev/fuse: Permission denied")
        os.chmod("/dev/fuse", 0o666)
        limit.write_text("0")
        try:
            done = execute(buf, "true", before=NOBODY)
        finally:
            limit.write_text(before)
        assert done.returncode == 1
        assert done.stderr.startswith(
            b"error: as_file: no user namespace for FUSE: No space left on"
        )


_OF_NOBODY = """
import socket, sys
import dmabuf
with dmabuf.from_fd(int(sys.argv[1])) as buf, dmabuf.as_file(buf) as file:
    with socket.socket(fileno=int(sys.argv[2])) as peer:
        socket.send_fds(peer, [b"x"], [file.fileno()])
"""


@everything
def test_a_file_of_another_user(fuse_for_all: None) -> None:
    """Nobody else can use it, root neither: the namespace that it belongs to does not know them."""
    ours, theirs = socket.socketpair()
    with BUFFERS["dma-heap"](SIZE) as buf, ours:
        buf.pwrite(pattern(SIZE, 7), 0)
        with theirs:
            fds = [buf.fileno(), theirs.fileno()]
            command = [*NOBODY, sys.executable, "-c", _OF_NOBODY, *map(str, fds)]
            subprocess.run(command, pass_fds=fds, check=True, timeout=60)
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        try:
            for refused, number in (
                (lambda: os.pread(fd, 1, 0), errno.EOVERFLOW),
                (lambda: os.pwrite(fd, b"x", 0), errno.EOVERFLOW),
                (lambda: os.fstat(fd), errno.EACCES),
                (lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), errno.EACCES),
            ):
                with raises_errno(number):
                    refused()
        finally:
            os.close(fd)


# -- fences


@contextlib.contextmanager
def reading(file: dmabuf.BufferFile) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        ["head", "-c", "100", f"/dev/fd/{file.fileno()}"],
        pass_fds=[file.fileno()],
        stdout=subprocess.PIPE,
    ) as process:
        # It sleeps in the read: there is nothing else that it waits for.
        call = Path(f"/proc/{process.pid}/syscall")
        read = {"x86_64": "0 ", "aarch64": "63 "}[os.uname().machine]
        wait_until(lambda: call.read_text().startswith(read) or process.poll() is not None)
        yield process


@everything
def test_a_read_waits_for_the_device(card: Card) -> None:
    with dmabuf.from_fd(card.fd) as buf, dmabuf.as_file(buf) as file:
        buf.pwrite(pattern(200, 6), 0)
        fence = card.job("write")
        with reading(file) as process:
            assert process.poll() is None
            assert os.fstat(file.fileno()).st_size == buf.size, "others are answered"
            card.done(fence)
            out, _ = process.communicate(timeout=60)
        assert out == pattern(200, 6)[:100]


@everything
def test_a_read_waits_for_a_device_no_longer_than_ten_seconds(card: Card) -> None:
    """The kernel's own timeout of a vgem fence is as long: either ends the read."""
    with dmabuf.from_fd(card.fd) as buf, dmabuf.as_file(buf) as file:
        card.job("write")
        with reading(file) as process:
            assert process.poll() is None
            assert process.wait(60) in (0, 1)
        assert os.pread(file.fileno(), 10, 0) == bytes(10)
    card.fences.clear()  # the fence may have expired; closing the card ends it otherwise


@everything
def test_a_server_that_dies_leaves_nobody_waiting(card: Card) -> None:
    with dmabuf.from_fd(card.fd) as buf:
        before = servers()
        file = dmabuf.as_file(buf)
        (server,) = servers() - before
        card.job("write")
        with reading(file) as process:
            os.kill(server, signal.SIGKILL)
            assert process.wait(60) == 1
        with raises_errno(errno.ENOTCONN):
            file.close()

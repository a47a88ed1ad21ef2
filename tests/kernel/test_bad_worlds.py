"""A clock that jumps, io_uring forbidden, little memory: what a guest can do to its kernel."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dmabuf
from tests.guards import needs
from tests.support import assert_same, in_child, pattern, poison, raises_errno, run

SIZE = 1 << 20
DAY = 86400
DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
LIMIT = 96 << 20


@contextlib.contextmanager
def jumping_clock() -> Iterator[None]:
    """Meanwhile the machine's time jumps a day ahead and back."""
    real, begun, stop = time.time(), time.monotonic(), threading.Event()

    def put(days: int) -> None:
        now = real + days * DAY + time.monotonic() - begun
        time.clock_settime(time.CLOCK_REALTIME, now)

    def jump() -> None:
        while not stop.is_set():
            for days in (1, -1):
                put(days)
                stop.wait(0.001)

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        put(0)


@needs("nvme", "udmabuf", "root")
def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """Every byte moves, what waits in time does not time out, and what comes late does."""
    path, (reader, writer) = tmp_path / "file", os.pipe()
    with (
        jumping_clock(),
        dmabuf.allocate(SIZE, exporter="udmabuf") as buffer,
        dmabuf.open(path, "w") as out,
        dmabuf.open(path) as file,
        dmabuf.open(reader) as stream,
    ):
        for number in range(20):
            data = pattern(SIZE, number)
            buffer.pwrite(data, 0)
            out.write_from(buffer, sync=True)
            buffer.pwrite(poison(SIZE), 0)
            file.read_into(buffer)
            assert_same(buffer.pread(SIZE, 0), data, f"round {number}")
            late = threading.Timer(0.01, os.write, (writer, data[:1000]))
            late.start()
            assert stream.read_into(buffer, 1000, timeout=600).nbytes == 1000
            assert_same(buffer.pread(1000, 0), data[:1000], f"the pipe in round {number}")
            late.join()
            with raises_errno(errno.ETIMEDOUT, nbytes=0):
                stream.read_into(buffer, 1000, timeout=0.02)
    os.close(reader)
    os.close(writer)


_THREADS = """
import sys, dmabuf
path, target = sys.argv[1:]
with dmabuf.allocate("1MiB", exporter="udmabuf") as buffer, dmabuf.open(path) as file:
    print(file.read_into(buffer, require="zero-copy"))
    with dmabuf.open(target, "w") as out:
        out.write_from(buffer)
with dmabuf.Engine() as engine:
    print(engine.backend, engine.backend_reason)
"""


@needs("udmabuf", "root")
def test_io_uring_disabled(tmp_path: Path) -> None:
    before, path, target = DISABLED.read_text(), tmp_path / "file", tmp_path / "target"
    path.write_bytes(pattern(SIZE, 3))
    DISABLED.write_text("2")
    try:
        said = in_child(_THREADS, path, target)
    finally:
        DISABLED.write_text(before)
    assert "threads io_uring is refused (EPERM): kernel.io_uring_disabled forbids it" in said
    assert_same(target.read_bytes(), pattern(SIZE, 3), said)


_COPY = "import sys, dmabuf; print(dmabuf.copy(*sys.argv[1:]))"


@needs("udmabuf", "root")
def test_a_file_larger_than_the_memory_of_its_cgroup(tmp_path: Path) -> None:
    source, target, groups = tmp_path / "source", tmp_path / "target", tmp_path / "groups"
    with source.open("wb") as file:
        for number in range(2 * LIMIT >> 20):
            file.write(pattern(1 << 20, number))
    groups.mkdir()
    run("mount", "-t", "cgroup2", "none", groups)
    group = groups / "dmabuf-test"
    try:
        (groups / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / "memory.max").write_text(str(LIMIT))
        enter = f'echo $$ >"{group}/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", enter, "sh", sys.executable, "-c", _COPY, source, target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "\noom_kill 0\n" in (group / "memory.events").read_text()
    finally:
        if group.exists():
            group.rmdir()
        run("umount", groups)
    with source.open("rb") as one, target.open("rb") as other:
        for number in range(2 * LIMIT >> 20):
            assert_same(other.read(1 << 20), one.read(1 << 20), f"MiB {number}: {done.stdout}")
        assert not other.read(1)
    source.unlink()  # the folder stays until the last test has run
    target.unlink()

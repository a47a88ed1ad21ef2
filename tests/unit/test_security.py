"""What docs/explanations/security.md claims: a memfd, descriptors, registrations."""

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dmabuf
from dmabuf.kernel import uapi
from dmabuf.transfer import audit
from dmabuf.transfer.target import FLAGS
from tests.support import in_child, poison
from tests.unit.lying import Lying, dma_buf

SIZE = 64 * 1024
PUNCH_HOLE, KEEP_SIZE = 2, 1


# -- a memfd


@pytest.mark.parametrize(
    ("change", "to"),
    [
        (os.ftruncate, [0]),
        (os.ftruncate, [SIZE - 4096]),
        (os.ftruncate, [SIZE + 4096]),
        (fcntl.fcntl, [uapi.F_ADD_SEALS, uapi.F_SEAL_WRITE]),
        (os.fchmod, [0o755]),
    ],
)
def test_a_memfd_keeps_its_size_seals_and_mode(buf, change, to):
    with pytest.raises(PermissionError):
        change(buf.fileno(), *to)
    assert os.fstat(buf.fileno()).st_size == SIZE
    buf.pwrite(b"still", 0)


def test_a_read_only_memfd_can_be_opened_for_writing(buf):
    handed_out = os.open(f"/proc/self/fd/{buf.fileno()}", os.O_RDONLY)
    again = os.open(f"/proc/self/fd/{handed_out}", os.O_RDWR)
    try:
        os.pwrite(again, b"written", 0)
    finally:
        os.close(again)
        os.close(handed_out)
    assert buf.pread(7, 0) == b"written"


def punch(fd, offset, size):
    libc = ctypes.CDLL(None, use_errno=True)
    wide = ctypes.c_int64
    rc = libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, wide(offset), wide(size))
    assert rc == 0, os.strerror(ctypes.get_errno())


def remove_mapping(fd, offset, size):
    with mmap.mmap(fd, SIZE) as memory:
        memory.madvise(mmap.MADV_REMOVE, offset, size)


@pytest.mark.parametrize("make_hole", [punch, remove_mapping])
def test_a_hole_makes_zeros_for_every_holder(buf, make_hole):
    make_hole(buf.fileno(), 4096, 4096)
    assert buf.pread(12288, 0) == poison(4096) + bytes(4096) + poison(12288)[8192:]


def test_another_process_of_the_user_reaches_a_memfd(buf):
    source = "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_RDWR), b'reached', 0)"
    in_child(source, f"/proc/{os.getpid()}/fd/{buf.fileno()}")
    assert buf.pread(7, 0) == b"reached"


# -- descriptors


def test_a_program_that_is_started_inherits_nothing(path):
    def open_ones():
        return {int(name) for name in os.listdir("/proc/self/fd")}

    with (
        dmabuf.allocate(SIZE) as buf,
        dmabuf.open(path, "r+") as file,
        dmabuf.Engine(),
    ):
        file.read_into(buf, audit="always")
        mine = {fd for fd in range(3, max(open_ones()) + 1) if Path(f"/proc/self/fd/{fd}").exists()}
        ours = set()
        for fd in mine:
            where = os.readlink(f"/proc/self/fd/{fd}")
            if where == str(path) or "memfd:" in where or "io_uring" in where or "dmabuf" in where:
                ours.add(fd)
        assert len(ours) >= 3
        assert not any(os.get_inheritable(fd) for fd in ours)
        source = "import os; print(*os.listdir('/proc/self/fd'))"
        done = subprocess.run(
            [sys.executable, "-c", source], close_fds=False, capture_output=True, text=True
        )
        assert not ours & ({int(fd) for fd in done.stdout.split()} - {3})


@pytest.mark.parametrize("mode", ["r", "w", "r+"])
def test_the_second_descriptor_has_the_same_access(path, mode):
    def access(fd):
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE

    with dmabuf.open(path, mode) as file:
        direct = file.target.direct().fd
        assert direct != file.fileno()
        assert access(direct) == access(file.fileno()) == FLAGS[mode] & os.O_ACCMODE


def test_an_audit_opens_the_file_for_reading_while_it_compares(path, buf, monkeypatch):
    def readable():
        links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        mine = [int(link.name) for link in links if os.path.realpath(link) == str(path)]
        return [fd for fd in mine if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY]

    compare, seen = audit.Check.compare, []

    def comparing(check, nbytes):
        seen.extend(readable())
        return compare(check, nbytes)

    monkeypatch.setattr(audit.Check, "compare", comparing)
    with dmabuf.open(path, "w") as file:
        assert "every byte" in file.write_from(buf, audit="always").audited
        assert seen and not any(os.get_inheritable(fd) for fd in readable())
        assert not readable()


def test_a_symbolic_link_is_followed(path, buf, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    buf.pwrite(b"through the link", 0)
    with dmabuf.open(link, "w") as file:
        file.write_from(buf, 16)
    assert path.read_bytes() == b"through the link" and link.is_symlink()


# -- access modes, sizes and labels are the kernel's word


@pytest.mark.parametrize("route", [None, "native", "direct", "staged", "buffered"])
def test_a_read_only_buffer_is_not_written(path, kernel, route):
    with (
        Lying(backend="threads") as engine,
        dmabuf.open(path, "r+", engine=engine) as file,
        dma_buf(SIZE) as buf,
    ):
        buf.descriptor_writable = False
        with pytest.raises(PermissionError):
            file.read_into(buf, route=route)
        with pytest.raises(PermissionError):
            file.read_segments(buf, memoryview(bytes(24)).cast("Q"), route=route)
        assert os.pread(buf.fileno(), SIZE, 0) == bytes(SIZE)


# -- registrations


def registered():
    return Path("/proc/self/maps").read_text().count("memfd:dma-buf")


def test_another_thread_s_close_clears_them_at_the_owner_s_next_job(path, buf, kernel):
    before = registered()
    with Lying(backend="threads") as engine, dmabuf.open(path, engine=engine) as file:
        shared = dma_buf(SIZE, mapped=False)
        assert file.read_into(shared).route is dmabuf.Route.NATIVE
        thread = threading.Thread(target=shared.close)
        thread.start()
        thread.join()
        assert registered() == before + 1
        file.read_into(buf)
        assert registered() == before

"""What docs/explanations/security.md claims, where it takes no real dma-buf."""

import ctypes
import errno
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
from dmabuf.memory import foreign
from dmabuf.transfer import audit
from dmabuf.transfer.target import FLAGS
from tests import forking
from tests.guards import needs
from tests.support import in_child, loop_device, mounted, pattern
from tests.unit import command
from tests.unit.fake_kernel import FakeKernel
from tests.unit.lying import Lying, dma_buf

SIZE = 64 * 1024
PUNCH_HOLE, KEEP_SIZE = 2, 1


@pytest.fixture
def buf():
    with dmabuf.allocate(SIZE, exporter="memfd", name="shared") as buf:
        yield buf


def punch(fd, offset, size):
    libc = ctypes.CDLL(None, use_errno=True)
    wide = ctypes.c_int64
    rc = libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, wide(offset), wide(size))
    assert rc == 0, os.strerror(ctypes.get_errno())


# -- a memfd


@pytest.mark.parametrize("size", [0, SIZE - 4096, SIZE + 4096])
def test_a_memfd_keeps_its_size(buf, size):
    with pytest.raises(PermissionError):
        os.ftruncate(buf.fileno(), size)
    assert os.fstat(buf.fileno()).st_size == SIZE


def test_nobody_can_seal_writing_away(buf):
    with pytest.raises(PermissionError):
        fcntl.fcntl(buf.fileno(), uapi.F_ADD_SEALS, 8)  # F_SEAL_WRITE
    buf.pwrite(b"still", 0)


def test_a_memfd_is_not_made_executable(buf):
    with pytest.raises(PermissionError):
        os.fchmod(buf.fileno(), 0o755)


def test_a_read_only_memfd_can_be_opened_for_writing(buf):
    handed_out = os.open(f"/proc/self/fd/{buf.fileno()}", os.O_RDONLY)
    again = os.open(f"/proc/self/fd/{handed_out}", os.O_RDWR)
    try:
        os.pwrite(again, b"written", 0)
    finally:
        os.close(again)
        os.close(handed_out)
    assert buf.pread(7, 0) == b"written"


def test_a_hole_makes_zeros_for_every_holder(buf):
    buf.pwrite(pattern(SIZE, 2), 0)
    punch(buf.fileno(), 4096, 4096)
    assert buf.pread(4096, 4096) == bytes(4096)
    assert buf.pread(4096, 0) == pattern(SIZE, 2)[:4096]


def test_a_mapping_that_is_removed_is_a_hole_too(buf):
    buf.pwrite(pattern(SIZE, 2), 0)
    with mmap.mmap(buf.fileno(), SIZE) as memory:
        memory.madvise(mmap.MADV_REMOVE, 4096, 4096)
    assert buf.pread(8192, 0) == pattern(SIZE, 2)[:4096] + bytes(4096)


def test_another_process_of_the_user_reaches_a_memfd(buf):
    source = "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_RDWR), b'reached', 0)"
    in_child(source, f"/proc/{os.getpid()}/fd/{buf.fileno()}")
    assert buf.pread(7, 0) == b"reached"


def test_memory_begins_as_zeros(buf):
    assert buf.pread(SIZE, 0) == bytes(SIZE)


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


def test_a_child_shares_the_memory_and_nothing_else(buf, path):
    with dmabuf.open(path) as file, dmabuf.Engine() as engine:

        def child():
            assert file.read_into(buf).nbytes == SIZE  # by a descriptor of its own
            buf.pwrite(b"from the child", 0)
            with pytest.raises(dmabuf.ClosedError), dmabuf.open(path, engine=engine) as again:
                again.read_into(buf)

        forking.in_child(child)
        assert buf.pread(14, 0) == b"from the child"
        assert file.read_into(buf).nbytes == SIZE


def test_a_handed_in_descriptor_stays_as_it_was(path, buf):
    fd = os.open(path, os.O_RDWR)
    try:
        os.lseek(fd, 100, os.SEEK_SET)
        before = fcntl.fcntl(fd, fcntl.F_GETFL)
        with dmabuf.open(fd, "r+") as file:
            file.read_into(buf)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == before
        assert os.lseek(fd, 0, os.SEEK_CUR) == 100
    finally:
        os.close(fd)


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


def test_cp_puts_a_new_file_under_the_name(path, tmp_path, capsys):
    target, other = tmp_path / "target", tmp_path / "other"
    target.write_bytes(b"old")
    os.link(target, other)
    assert command.dmabuf(capsys, "cp", path, target).status == 0
    assert target.read_bytes() == path.read_bytes() and other.read_bytes() == b"old"


# -- access modes, sizes and labels are the kernel's word


@pytest.mark.parametrize("route", [None, "native", "direct", "staged", "buffered"])
def test_a_read_only_buffer_is_not_written(path, monkeypatch, route):
    monkeypatch.setattr(uapi, "ioctl", FakeKernel().ioctl)
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


def test_a_label_is_no_identity(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "FDINFO", str(tmp_path))
    text = "pos:\t0\nsize:\t4096\nexp_name:\tsystem\nname:\tmine\nexp_name:\tudmabuf\n"
    (tmp_path / "7").write_text(text)
    assert foreign.identify(7) == ("system", "mine\nexp_name:\tudmabuf")


# -- registrations


def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return None


@needs("io_uring")
def test_closing_a_buffer_unpins_its_pages(tmp_path):
    size = 32 << 20
    (tmp_path / "large").write_bytes(bytes(size))
    with dmabuf.open(tmp_path / "large") as file:
        before = status("VmPin")
        buf = dmabuf.allocate(size, exporter="memfd")
        assert file.read_into(buf).registered
        assert status("VmPin") - before == size // 1024
        buf.close()
        assert status("VmPin") == before


def registered():
    return Path("/proc/self/maps").read_text().count("memfd:dma-buf")


@pytest.mark.parametrize("side", ["buffer", "file", "engine"])
def test_closing_either_side_clears_native_registrations(path, monkeypatch, side):
    monkeypatch.setattr(uapi, "ioctl", FakeKernel().ioctl)
    before = registered()
    engine = Lying(backend="threads")
    buf, file = dma_buf(SIZE, mapped=False), dmabuf.open(path, engine=engine)
    assert file.read_into(buf).route is dmabuf.Route.NATIVE
    assert registered() == before + 1
    {"buffer": buf, "file": file, "engine": engine}[side].close()
    assert registered() == before
    for one in (file, buf, engine):
        one.close()


def test_another_thread_s_close_clears_them_at_the_owner_s_next_job(path, buf, monkeypatch):
    monkeypatch.setattr(uapi, "ioctl", FakeKernel().ioctl)
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


# -- what writing could destroy


@needs("ext4")
def test_a_mounted_device_is_not_written(tmp_path, buf):
    with (
        loop_device(tmp_path / "image", 16 << 20) as device,
        mounted(device, "ext4", tmp_path / "mount"),
    ):
        with pytest.raises(OSError, match="mounted") as caught:
            dmabuf.open(device, "r+")
        assert caught.value.errno == errno.EBUSY
        dmabuf.open(device).close()
        dmabuf.open(device, "r+", force=True).close()


def test_a_buffer_that_is_looked_at_is_not_closed(buf):
    with buf.map("r"), pytest.raises(BufferError):
        buf.close()
    buf.hold()  # as a transfer does
    with pytest.raises(dmabuf.BusyError):
        buf.close()
    buf.release()

"""What docs/security.md claims, where it takes no real dma-buf."""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dmabuf
from dmabuf import _uapi
from dmabuf.exporters import foreign
from tests import forking
from tests.guards import needs
from tests.support import in_child, loop_device, mounted, pattern
from tests.unit.fake_kernel import FakeKernel
from tests.unit.lying import Lying, dma_buf

SIZE = 64 * 1024
PUNCH_HOLE, KEEP_SIZE = 2, 1


@pytest.fixture
def buf():
    with dmabuf.allocate(SIZE, exporter="memfd", name="shared") as buf:
        yield buf


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    return path


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
        fcntl.fcntl(buf.fileno(), _uapi.F_ADD_SEALS, 8)  # F_SEAL_WRITE
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
            buf.pwrite(b"from the child", 0)
            with pytest.raises(dmabuf.ClosedError):
                file.read_into(buf)
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


# -- access modes, sizes and labels are the kernel's word


@pytest.mark.parametrize("route", [None, "native", "direct", "staged", "buffered"])
def test_a_read_only_buffer_is_not_written(path, monkeypatch, route):
    monkeypatch.setattr(_uapi, "ioctl", FakeKernel().ioctl)
    with (
        Lying(backend="threads") as engine,
        dmabuf.open(path, "r+", engine=engine) as file,
        dma_buf(SIZE) as buf,
    ):
        buf._descriptor_writable = False
        with pytest.raises(PermissionError):
            file.read_into(buf, route=route)
        with pytest.raises(PermissionError):
            file.read_segments(buf, memoryview(bytes(24)).cast("Q"), route=route)
        assert os.pread(buf.fileno(), SIZE, 0) == bytes(SIZE)


def test_a_label_is_no_identity(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "FDINFO", str(tmp_path))
    text = "pos:\t0\nsize:\t4096\nexp_name:\tsystem\nname:\tmine\nexp_name:\tudmabuf\n"
    (tmp_path / "7").write_text(text)
    assert foreign.identify(7) == ("system", "mine")


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
    monkeypatch.setattr(_uapi, "ioctl", FakeKernel().ioctl)
    before = registered()
    engine = Lying(backend="threads")
    buf, file = dma_buf(SIZE, mapped=False), dmabuf.open(path, engine=engine)
    assert file.read_into(buf).route is dmabuf.Route.NATIVE
    assert registered() == before + 1
    {"buffer": buf, "file": file, "engine": engine}[side].close()
    assert registered() == before
    for one in (file, buf, engine):
        one.close()


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


# -- sandboxes

_SANDBOXED = """
import ctypes, errno, struct, sys
program = b"".join(struct.pack("=HBBI", *step) for step in (
    (0x20, 0, 0, 0),                            # load the system call's number
    (0x15, 0, 1, 425),                          # io_uring_setup?
    (0x06, 0, 0, 0x00050000 | errno.EPERM),     # then EPERM
    (0x06, 0, 0, 0x7FFF0000),                   # else go ahead
))
memory = ctypes.create_string_buffer(program)
header = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0          # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
import dmabuf
from dmabuf.engine import default_engine
with dmabuf.allocate("64KiB", exporter="memfd") as buf, dmabuf.open(sys.argv[1]) as file:
    file.read_into(buf, audit="always")
    assert buf.pread(65536, 0) == open(sys.argv[1], "rb").read()
print(default_engine().backend, default_engine().backend_reason)
try:
    dmabuf.Engine(backend="io_uring")
except PermissionError as error:
    print(error.strerror)
"""


def test_a_sandbox_without_io_uring(path):
    told = in_child("import warnings; warnings.simplefilter('ignore')\n" + _SANDBOXED, path)
    backend, refusal = told.splitlines()
    assert backend.startswith("threads io_uring is refused (EPERM)")
    assert "seccomp" in refusal


def test_a_buffer_that_is_looked_at_is_not_closed(buf):
    with buf.map("r"), pytest.raises(BufferError):
        buf.close()
    buf._acquire()  # as a transfer does
    with pytest.raises(dmabuf.BusyError):
        buf.close()
    buf._release()

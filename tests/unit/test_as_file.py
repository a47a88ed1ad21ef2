"""as_file(): a Buffer as a descriptor that any program can use, where no real dma-buf is needed.

FUSE is tested on a memfd; tests/kernel/test_exec.py has as_file() of dma-bufs.
"""

import errno
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dmabuf
from dmabuf.memory import serve_by_fuse
from tests.file_programs import check_readers, check_writers
from tests.guards import needs
from tests.support import assert_same, in_child, pattern, raises_errno, wait_until

SIZE = (1 << 20) + 3 * mmap.PAGESIZE


pytestmark = pytest.mark.usefixtures("leaves_nothing")

os.environ.setdefault("DMABUF_TESTS_OF", str(os.getpid()))  # processes started from here have it


@pytest.fixture
def buf():
    with dmabuf.allocate(SIZE, exporter="memfd") as buf:
        buf.pwrite(pattern(buf.size, 1), 0)
        yield buf


def by_fuse(buf, writable=True):
    """The buffer's bytes as a file by FUSE, though it is a memfd."""
    root = serve_by_fuse([(buf.fileno(), buf.size, False)], writable)
    flags = os.O_RDWR if writable else os.O_RDONLY
    try:
        fd = os.open(f"/proc/self/fd/{root}", flags | os.O_DIRECT | os.O_CLOEXEC)
    finally:
        os.close(root)
    return open(fd, "rb+" if writable else "rb", buffering=0)


def servers():
    """The processes behind files by FUSE that were started from here, not by other tests."""
    found, ours = set(), f"\0DMABUF_TESTS_OF={os.environ['DMABUF_TESTS_OF']}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((folder / name).read_bytes() for name in ("cmdline", "environ"))
            if b"dmabuf.mount.one_file" in command and ours in b"\0" + environment:
                found.add(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return found


def server_of(make):
    before = servers()
    file = make()
    (pid,) = servers() - before
    return file, pid


def ended(pid):
    wait_until(lambda: b"Z" in _state(pid), f"the end of process {pid}")
    return True


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().split()[2]
    except OSError:
        return b"Z"


# -- the memory file itself


def test_a_memfd_is_the_file(buf):
    with dmabuf.as_file(buf) as file:
        assert (file.way, file.mode) == ("memfd", "rb+")
        assert file.reason == "the memory is a memfd, which is a file"
        assert os.path.samestat(os.fstat(file.fileno()), os.fstat(buf.fileno()))
        assert not os.get_inheritable(file.fileno())
        assert_same(file.read(), pattern(SIZE, 1), "what the file reads")
        assert file.seek(10) == 10
        file.write(b"new bytes")
        assert buf.pread(9, 10) == b"new bytes"
        assert os.lseek(buf.fileno(), 0, os.SEEK_CUR) == 0, "the position is its own"


@pytest.mark.parametrize("mode", ["r", "w", "r+"])
def test_modes(buf, mode):
    with dmabuf.as_file(buf, mode) as file:
        assert (file.readable(), file.writable()) == (mode != "w", mode != "r")
        access = fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
        assert access == {"r": os.O_RDONLY, "w": os.O_WRONLY, "r+": os.O_RDWR}[mode]
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer, which was not truncated")


def test_what_is_refused(buf):
    with pytest.raises(ValueError, match="invalid mode"):
        dmabuf.as_file(buf, "x")
    buf.close()
    with pytest.raises(dmabuf.ClosedError):
        dmabuf.as_file(buf)


def opened(buf, way):
    return dmabuf.as_file(buf) if way == "memfd" else by_fuse(buf)


@needs("fuse")
@pytest.mark.parametrize("way", ["memfd", "fuse"])
def test_programs(buf, tmp_path, way):
    with opened(buf, way) as file:
        check_readers(file.fileno(), buf, tmp_path)
        check_writers(file.fileno(), buf, tmp_path, truncating=way == "fuse")


@needs("fuse")
@pytest.mark.parametrize("way", ["memfd", "fuse"])
def test_the_file_outlives_the_buffer(way):
    with dmabuf.allocate(SIZE, exporter="memfd") as buf:
        buf.pwrite(b"kept", 0)
        file = opened(buf, way)
    with file:
        assert file.read(4) == b"kept"


@needs("fuse")
@pytest.mark.parametrize(
    ("way", "past_the_end", "truncating"),
    [("memfd", "EPERM", "EPERM"), ("fuse", "ENOSPC", "EINVAL")],
)
def test_the_size_is_fixed(buf, way, past_the_end, truncating):
    """The table in docs/guides/programs.md."""
    with opened(buf, way) as file:
        for attempt, expected in (
            (lambda: os.pwrite(file.fileno(), b"x", SIZE), past_the_end),
            (lambda: os.ftruncate(file.fileno(), SIZE + 1), truncating),
            (lambda: os.ftruncate(file.fileno(), 0), truncating),
        ):
            with pytest.raises(OSError) as caught:
                attempt()
            assert errno.errorcode[caught.value.errno] == expected
        assert os.fstat(file.fileno()).st_size == SIZE
        assert os.pread(file.fileno(), 10, SIZE) == b""
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


@needs("fuse")
def test_what_a_file_by_fuse_does_not_have(buf):
    """The same table."""
    with by_fuse(buf) as file:
        fd = file.fileno()
        for attempt, expected in (
            (lambda: os.fchmod(fd, 0o644), "EPERM"),
            (lambda: os.fchown(fd, 1, 1), "EPERM"),
            (lambda: mmap.mmap(fd, SIZE), "ENODEV"),
        ):
            with pytest.raises(OSError) as caught:
                attempt()
            assert errno.errorcode[caught.value.errno] == expected
        with mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE) as view:
            assert_same(view[:], pattern(SIZE, 1), "a private mapping")
        assert os.pwrite(fd, b"12345", SIZE - 3) == 3, "as much as fits"


_WITHOUT_PROC = """
import os, sys
import dmabuf
dmabuf.as_file
with dmabuf.allocate(4096, exporter="memfd") as buf:
    os.chroot(sys.argv[1])
    try:
        dmabuf.as_file(buf)
    except OSError as error:
        print(error.errno, error.strerror)
"""


@needs("root")
def test_without_proc(tmp_path):
    told = in_child(_WITHOUT_PROC, tmp_path)
    assert told == f"{errno.EOPNOTSUPP} as_file: /proc/self/fd is missing; mount /proc\n"


@needs("fuse", "root")
def test_another_user_keeps_what_the_descriptor_allows(buf):
    """And cannot open it again: it is the maker's alone."""
    with by_fuse(buf) as file:
        fd = file.fileno()
        script = f"head -c 9 <&{fd}; stat -Lc %s /proc/self/fd/{fd}; cat /dev/fd/{fd}"
        done = subprocess.run(
            ["bash", "-c", script], pass_fds=[fd], capture_output=True, user=65534, group=65534
        )
        assert done.stdout == pattern(SIZE, 1)[:9] + f"{SIZE}\n".encode()
        assert b"Permission denied" in done.stderr


_ANOTHERS = """
import mmap, os, sys
import dmabuf
from dmabuf.memory import descriptor_as_file, serve_by_fuse
from dmabuf.memory import foreign
from tests.resources import held
from tests.support import pattern

SIZE = 3 * mmap.PAGESIZE
memory = os.memfd_create("foreign", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
os.truncate(memory, SIZE)
os.pwrite(memory, pattern(SIZE, 1), 0)
reading = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
os.fchown(memory, 4001, 4001)
os.fchmod(memory, 0o600)
try:
    os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
except PermissionError:
    before = held()
else:
    sys.exit("it is to be opened")
for fd, mode in (memory, "rb+"), (memory, "rb"), (reading, "rb"):
    with descriptor_as_file(fd, read_only=mode == "rb") as file:
        assert (file.way, file.mode) == ("fuse", mode)
        assert "may not open the memfd again" in file.reason
        assert file.read() == pattern(SIZE, 1)
        if mode == "rb+":
            file.seek(5)
            file.write(b"written")
            assert os.pread(memory, 7, 5) == b"written"
            os.pwrite(memory, pattern(SIZE, 1), 0)
assert held() == before
"""


@needs("fuse", "root")
def test_a_memfd_that_may_not_be_opened_again():
    """As root, who may open all that is his own, and /dev/fuse, and nothing of another user's."""
    caps = "-dac_override,-dac_read_search"
    without = ["setpriv", "--inh-caps", caps, "--bounding-set", caps]
    done = subprocess.run(
        [*without, sys.executable, "-c", _ANOTHERS],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- by FUSE


@needs("fuse")
def test_its_process_ends_with_the_last_descriptor(buf):
    file, pid = server_of(lambda: by_fuse(buf))
    other = os.dup(file.fileno())
    file.close()
    assert os.pread(other, 100, 7) == pattern(SIZE, 1)[7:107]
    assert pid in servers()
    os.close(other)
    assert ended(pid)


@needs("fuse")
def test_its_process_is_nobodys_child_and_holds_the_buffer_alone(buf):
    file, pid = server_of(lambda: by_fuse(buf))
    with file:
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        assert os.getsid(pid) == pid
        links = sorted(os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
        # libffi 3.5 keeps its own library open.
        named = [link for link in links if link.startswith("/") and "/libffi.so" not in link]
        memfd = os.readlink(f"/proc/self/fd/{buf.fileno()}")
        assert named == ["/dev/fuse"] + ["/dev/null"] * 3 + [memfd] * 2, links
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert ended(pid)


@needs("fuse")
def test_when_its_process_dies_every_call_is_an_error(buf):
    file, pid = server_of(lambda: by_fuse(buf))
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)
    for program in (["cat"], ["head", "-c1"]):
        done = subprocess.run(program, stdin=file.fileno(), capture_output=True, timeout=100)
        assert done.returncode != 0
    for call in (lambda: file.read(1), lambda: file.write(b"x"), file.close):
        with raises_errno(errno.ENOTCONN):
            call()
    assert file.closed


@needs("fuse")
def test_read_only_is_read_only(buf):
    with by_fuse(buf, writable=False) as file:
        assert_same(file.read(), pattern(SIZE, 1), "the file")
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o400
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR)
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


_ENDING = """
import os, sys, warnings
warnings.simplefilter("ignore")
import dmabuf
from tests.unit.test_as_file import by_fuse
with dmabuf.allocate(4096, exporter="memfd") as buf:
    sys.exit(by_fuse(buf).fileno() < 0)
"""


@needs("fuse")
def test_a_program_that_ends_leaves_no_process():
    before = servers()
    in_child(_ENDING)
    assert all(ended(pid) for pid in servers() - before)


_WITHOUT_PYFUSE3 = """
import sys
import dmabuf
from dmabuf.memory import descriptor_as_file, serve_by_fuse
sys.path = [folder for folder in sys.path if not folder.endswith("site-packages")]
with dmabuf.allocate(4096, exporter="memfd") as buf:
    try:
        serve_by_fuse([(buf.fileno(), 4096, False)], True)
    except ImportError as error:
        print(error)
"""


def test_without_pyfuse3():
    assert in_child(_WITHOUT_PYFUSE3) == (
        "as_file: pyfuse3 is not installed; pip install 'dmabuf[fuse]'\n"
    )


def test_no_program_to_start(buf, monkeypatch):
    for executable in ("", None):
        monkeypatch.setattr(sys, "executable", executable)
        with raises_errno(errno.EOPNOTSUPP, r"sys\.executable is empty"):
            by_fuse(buf)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with raises_errno(errno.EOPNOTSUPP, r"/bin/false -m dmabuf\.mount\.one_file ended"):
        by_fuse(buf)


def test_no_descriptor_left(buf):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))
    try:
        with pytest.raises(OSError) as caught:
            by_fuse(buf)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE

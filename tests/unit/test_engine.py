"""Engines: their limits, who may use them, what they register, and io_uring refused."""

import contextlib
import errno
import os
import re
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

import dmabuf
from dmabuf import ClosedError, Engine
from dmabuf.kernel import files
from dmabuf.transfer.engine import default_engine
from tests import forking
from tests.core import lib
from tests.guards import needs
from tests.support import assert_same, in_child, pattern, poison, raises_errno

SIZE = 1 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "file"
    path.write_bytes(pattern(SIZE, 1))
    return path


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"queue_depth": 0}, ValueError),
        ({"queue_depth": -1}, ValueError),
        ({"queue_depth": 4097}, ValueError),
        ({"queue_depth": 1.5}, TypeError),
        ({"queue_depth": True}, TypeError),
        ({"block_size": 0}, ValueError),
        ({"block_size": 4095}, ValueError),
        ({"block_size": 5000}, ValueError),
        ({"block_size": "2GiB"}, ValueError),
        ({"block_size": -4096}, ValueError),
        ({"block_size": 4096.0}, TypeError),
        ({"backend": "posix-aio"}, ValueError),
    ],
)
def test_bad_arguments(how, error):
    with pytest.raises(error):
        Engine(**how)


def test_what_it_is():
    with Engine(queue_depth=3, block_size="8KiB") as engine:
        assert (engine.queue_depth, engine.block_size, engine.closed) == (3, 8192, False)
    assert engine.closed and repr(engine) == "<dmabuf.Engine closed>"
    engine.close()
    with Engine(backend="threads") as engine:
        assert (engine.backend, engine.backend_reason) == ("threads", "asked for")
        assert repr(engine) == "<dmabuf.Engine threads, queue_depth=32>"


@needs("io_uring")
def test_auto_is_io_uring_where_it_is_allowed():
    with Engine() as engine, Engine(backend="io_uring") as other:
        assert engine.backend == other.backend == "io_uring"


@pytest.mark.parametrize(
    ("made", "staged", "direct"),
    [({}, 4, 1), ({"queue_depth": 2}, 4, 1), ({"block_size": "512KiB"}, 2, 2)],
)
def test_staging_blocks_are_small_unless_an_engine_was_told(path, buf, made, staged, direct):
    with Engine(**made) as engine, dmabuf.open(path, engine=engine) as file:
        assert file.read_into(buf, route="staged").requests == staged
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "what was read")
        assert file.read_into(buf, route="direct", audit="always").requests == direct


def test_extremes_of_depth_and_block(path, buf):
    for depth, block in ((4096, "4KiB"), (1, "1GiB")):
        with (
            Engine(queue_depth=depth, block_size=block) as engine,
            dmabuf.open(path, engine=engine) as file,
        ):
            assert file.read_into(buf, SIZE - 1).nbytes == SIZE - 1


@pytest.mark.parametrize("size", [4096, SIZE])
def test_a_closed_engine(path, buf, size):
    engine = Engine()
    with dmabuf.open(path, engine=engine) as file:
        file.read_into(buf, size)
        engine.close()
        with pytest.raises(ClosedError, match="engine is closed"):
            file.read_into(buf, size)


@pytest.mark.parametrize("size", [4096, SIZE])
def test_an_engine_of_one_s_own_stays_in_its_thread(path, buf, size):
    failures = []

    def use():
        try:
            file.read_into(buf, size)
        except RuntimeError as error:
            failures.append(str(error))

    with Engine() as engine, dmabuf.open(path, engine=engine) as file:
        file.read_into(buf, size)
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert file.read_into(buf).nbytes == SIZE
    assert len(failures) == 1
    assert "belongs to the thread that made it" in failures[0]
    assert "default engine" in failures[0]


def registered(what):
    """What this process's rings have in their tables, by the kernel's account, and how often.

    `what`: a pattern of an entry.
    """
    found = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[io_uring]":
                about = Path(f"/proc/self/fdinfo/{name}").read_text()
                found.update(re.findall(rf"^ *\d+: ({what})$", about, re.MULTILINE))
    return found


def pinned():
    """Bytes of memory that is registered with this process's rings."""
    entries = registered("0x[0-9a-f]+/\\d+")
    return sum(int(entry.split("/")[1]) * count for entry, count in entries.items())


@needs("io_uring")
def test_large_transfers_register_and_closing_unpins(path):
    before = pinned()
    with Engine(block_size="16KiB") as engine, dmabuf.open(path, engine=engine) as file:
        buffer = dmabuf.allocate(SIZE, exporter="memfd")
        small = file.read_into(buffer, 16384, timeout=60)
        assert (small.registered, small.registration) == (False, "too few requests to gain from it")
        for _ in range(2):
            transfer = file.read_into(buffer)
            assert transfer.registered and pinned() == before + SIZE
            assert transfer.registration == "pinned once, kept while the buffer lives"
        staged = file.read_into(buffer, route="staged")
        assert (
            not staged.registered
            and "staged route does not use registered pages" in staged.registration
        )
        buffer.close()
        assert pinned() == before


@needs("io_uring")
@pytest.mark.parametrize("write", [False, True])
def test_zram_is_staged_by_threads_that_copy(tmp_path, monkeypatch, write):
    """Every byte of each direction, with edges that are no blocks."""
    opened = files.open_direct

    def as_zram(*arguments, **how):
        return opened(*arguments, **how)._replace(on_zram=True)

    monkeypatch.setattr(files, "set_o_direct", lambda *_: None)  # as where the pages are the blocks
    monkeypatch.setattr(files, "open_direct", as_zram)
    size, path = (8 << 20) + 4321, tmp_path / "memory"
    before = len(os.listdir("/proc/self/task"))
    with Engine() as engine, dmabuf.allocate(size) as buffer:
        path.write_bytes(poison(size) if write else pattern(size, 5))
        buffer.pwrite(pattern(size, 5) if write else poison(size), 0)
        with dmabuf.open(path, "r+", engine=engine) as file:
            move = file.write_from if write else file.read_into
            transfer = move(buffer, size - 99, file_offset=77, buffer_offset=55, route="staged")
        assert transfer.nbytes == size - 99
        assert len(os.listdir("/proc/self/task")) > before
        expected = pattern(size, 5)
        if write:
            got = path.read_bytes()
            assert_same(got[77 : 77 + size - 99], expected[55 : 55 + size - 99], "written")
            assert_same(got[:77], poison(size)[:77], "before")
        else:
            got = buffer.pread(size, 0)
            assert_same(got[55 : 55 + size - 99], expected[77 : 77 + size - 99], "read")
            assert_same(got[:55], poison(size)[:55], "before")


@needs("io_uring")
def test_many_small_transfers_register_in_the_end(path, buf):
    with Engine(block_size="16KiB") as engine, dmabuf.open(path, engine=engine) as file:
        seen = [file.read_into(buf, 50_000).registered for _ in range(8)]
    assert not seen[0] and seen[-1]


@needs("io_uring")
def test_what_another_thread_closes_is_unpinned_by_the_owner(path):
    """Only the ring's own thread may: else its pages would stay pinned, its file open."""
    before = pinned()
    with Engine(block_size="16KiB") as engine:
        buffer = dmabuf.allocate(SIZE, exporter="memfd")
        file = dmabuf.open(path, engine=engine)
        assert file.read_into(buffer).registered
        assert pinned() == before + SIZE and registered("/.*")[str(path)] == 1
        for thing in (file, buffer):
            thread = threading.Thread(target=thing.close)
            thread.start()
            thread.join()
        assert pinned() == before + SIZE  # the kernel refuses the other thread
        with (
            dmabuf.open(path.with_name("other"), "w", engine=engine) as file,
            dmabuf.allocate(SIZE, exporter="memfd") as other,
        ):
            file.write_from(other, SIZE, route="staged")
            assert pinned() == before and registered("/.*")[str(path)] == 0


def test_a_descriptor_number_that_is_used_again_is_another_file(tmp_path, path, buf):
    """What is registered under a number goes when the File does."""
    other = tmp_path / "other"
    other.write_bytes(pattern(SIZE, 2))
    with Engine(block_size="16KiB") as engine:
        numbers = set()
        for name, seed in ((path, 1), (other, 2), (path, 1)):
            with dmabuf.open(name, engine=engine) as file:
                file.read_into(buf)
                numbers.add(file.target.direct().fd)
            assert_same(buf.pread(SIZE, 0), pattern(SIZE, seed), "the buffer")
        assert len(numbers) == 1


def test_threads_say_why_they_register_nothing(path, buf):
    with Engine(backend="threads") as engine, dmabuf.open(path, engine=engine) as file:
        transfer = file.read_into(buf)
    assert not transfer.registered
    assert "threads move the requests: asked for" in transfer.registration


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (errno.ENOMEM, "refused .ENOMEM.: raise RLIMIT_MEMLOCK"),
        (errno.EMFILE, "io_uring is refused: Too many open files"),
    ],
)
def test_io_uring_that_cannot_be_set_up(path, buf, monkeypatch, error, why):
    monkeypatch.setattr(lib, "dmb_uring_probe", lambda: -error)
    with raises_errno(error, why):
        Engine(backend="io_uring")
    with Engine() as engine, dmabuf.open(path, engine=engine) as file:
        assert engine.backend == "threads" and re.search(why, engine.backend_reason)
        file.read_into(buf)
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


@needs("io_uring")
@pytest.mark.parametrize(
    ("error", "why"),
    [
        (errno.ENOMEM, "RLIMIT_MEMLOCK does not allow pinning it"),
        (errno.EFAULT, "its mapping has no pages to pin"),
        (errno.EIO, "registering it failed: Input/output error"),
    ],
)
def test_pages_that_cannot_be_registered_are_used_all_the_same(path, buf, monkeypatch, error, why):
    monkeypatch.setattr(lib, "dmb_ring_register_buffer", lambda *_: -error)
    with Engine() as engine, dmabuf.open(path, engine=engine) as file:
        record = file.read_into(buf, route="direct")
    assert not record.registered and why in record.registration
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


@needs("io_uring")
def test_more_buffers_and_files_than_the_tables_have_slots(path, buf, monkeypatch):
    monkeypatch.setattr(lib, "DMB_BUFFER_SLOTS", 1)
    monkeypatch.setattr(lib, "DMB_FILE_SLOTS", 1)
    with (
        Engine(block_size=4096) as engine,
        dmabuf.open(path, engine=engine) as file,
        dmabuf.open(path, engine=engine) as other_file,
        dmabuf.allocate(SIZE, exporter="memfd") as other,
    ):
        assert file.read_into(buf, route="direct").registered
        record = other_file.read_into(other, route="direct")
        assert not record.registered and "No space left on device" in record.registration
        for buffer in (buf, other):
            assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


def test_worker_threads_end_with_the_engine():
    before = len(os.listdir("/proc/self/task"))
    with Engine(backend="threads", queue_depth=5):
        assert len(os.listdir("/proc/self/task")) == before + 5
    assert len(os.listdir("/proc/self/task")) == before


def test_the_default_engine_is_one_and_serves_every_thread(path):
    assert default_engine() is default_engine()
    with dmabuf.open(path) as file:
        assert file.target.engine is default_engine()


# -- io_uring refused, by a seccomp filter in a process of its own

_USE_WITHOUT = """
import logging, os, sys
from tests.sandbox import forbid
forbid(425, error=int(sys.argv[1]))  # io_uring_setup
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(name)s: %(message)s")
import dmabuf
from dmabuf.transfer.engine import default_engine
path, sink = sys.argv[2], sys.argv[3]
data = open(path, "rb").read()
assert default_engine().backend == "threads"
print(default_engine().backend_reason)
with dmabuf.allocate(len(data), exporter="memfd") as buffer:
    for route in ("direct", "staged", "buffered"):
        buffer.pwrite(bytes(len(data)), 0)
        with dmabuf.open(path) as file:
            transfer = file.read_into(buffer, route=route)
        assert buffer.pread(len(data), 0) == data
        assert transfer.route == route and not transfer.registered
        print(transfer.registration)
        with dmabuf.open(sink, "w") as file:
            file.write_from(buffer, len(data) - 5, route=route)
        assert open(sink, "rb").read() == data[:-5], route
try:
    dmabuf.Engine(backend="io_uring")
except OSError as error:
    assert error.errno == int(sys.argv[1])
    print(error)
else:
    raise SystemExit("io_uring was not refused")
"""


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (errno.EPERM, "allow io_uring_setup there"),
        (errno.ENOSYS, "CONFIG_IO_URING, or a seccomp filter hides it"),
    ],
)
def test_io_uring_forbidden_by_seccomp(tmp_path, path, error, fix):
    said = in_child(_USE_WITHOUT, error, path, tmp_path / "sink")
    name = errno.errorcode[error]
    assert f"({name})" in said and fix in said
    assert "dmabuf: threads instead of io_uring" in said
    assert "this engine registers nothing: threads move the requests: io_uring is" in said


# -- no memory may be locked

_UNPRIVILEGED = """
import os, resource, sys
import dmabuf.memory, dmabuf.transfer  # a user who may not read Python's folder loads nothing later
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
assert not int(open("/proc/self/status").read().split("CapEff:")[1].split()[0], 16)
path, sink = sys.argv[1], sys.argv[2]
data = open(path, "rb").read()
"""

_USE_WITHOUT_MEMLOCK = """
with dmabuf.Engine(block_size="16KiB") as engine, dmabuf.open(path, engine=engine) as file:
    with dmabuf.allocate(len(data), exporter="memfd") as buffer:
        transfer = file.read_into(buffer, require="zero-copy")
        assert buffer.pread(len(data), 0) == data
        assert transfer.route == "direct" and not transfer.registered, transfer
        print(engine.backend, transfer.registration)
        with dmabuf.open(sink, "w", engine=engine) as out:
            out.write_from(buffer)
        assert open(sink, "rb").read() == data
"""


@contextmanager
def _public_folder():
    """On disk, and open to every user: pytest's own folders are not."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@needs("root")
def test_direct_without_memlock():
    with _public_folder() as folder:
        (folder / "file").write_bytes(pattern(SIZE, 1))
        said = in_child(
            _UNPRIVILEGED + _USE_WITHOUT_MEMLOCK, folder / "file", folder / "sink"
        ).strip()
    if said.startswith("io_uring"):
        assert "RLIMIT_MEMLOCK does not allow pinning it" in said and "`ulimit -l`" in said
    else:
        assert "RLIMIT_MEMLOCK" in said or "io_uring is refused" in said


_USE_DESCRIPTOR = """
# the user is nobody now; the descriptor was opened by root
with dmabuf.open(int(sys.argv[3])) as file, dmabuf.allocate(4096, exporter="memfd") as buffer:
    transfer = file.read_into(buffer)
    assert transfer.route == "buffered" and buffer.pread(4096, 0) == data[:4096]
    print(transfer.rejected["direct"])
"""


@needs("root")
def test_a_descriptor_that_may_not_be_opened_again():
    source = _UNPRIVILEGED.replace(
        "resource.setrlimit", "fd = os.open(sys.argv[3], 0); resource.setrlimit"
    ) + _USE_DESCRIPTOR.replace("int(sys.argv[3])", "fd")
    with _public_folder() as folder:
        for name in ("file", "secret"):
            (folder / name).write_bytes(pattern(SIZE, 1))
        (folder / "secret").chmod(0o600)
        said = in_child(source, folder / "file", folder / "sink", folder / "secret")
    assert "the file may not be opened again for O_DIRECT (Permission denied)" in said


def test_a_default_engine_that_is_made_meanwhile_is_the_only_one(path, monkeypatch):
    """As by a signal handler, while the first call makes its ring."""
    real, made = lib.dmb_ring_create, []

    def create(*arguments):
        if not made:
            made.append(None)
            made.append(default_engine())
        return real(*arguments)

    def child():
        monkeypatch.setattr(lib, "dmb_ring_create", create)
        assert default_engine() is made[1] is default_engine()
        with dmabuf.open(path) as file, dmabuf.allocate(SIZE, exporter="memfd") as buffer:
            file.read_into(buffer, require="zero-copy")
            assert_same(buffer.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")

    forking.in_child(child)


# -- fork

_FORK = """
import os, sys, threading, dmabuf
from dmabuf.transfer.engine import default_engine
path = sys.argv[1]
data = open(path, "rb").read()
own = dmabuf.Engine()
file, own_file = dmabuf.open(path), dmabuf.open(path, engine=own)
buffer = dmabuf.allocate(len(data), exporter="memfd")
file.read_into(buffer); own_file.read_into(buffer)
parents = default_engine()
child = os.fork()
if child == 0:
    try:
        for call in (lambda: own_file.read_into(buffer), lambda: own_file.plan(buffer)):
            try:
                call()
            except dmabuf.ClosedError as error:
                assert "forked" in str(error), error
            else:
                raise SystemExit("the child used its parent's engine")
        assert file.read_into(buffer).nbytes == len(data)  # opened again
        assert default_engine() is not parents
        try:
            dmabuf.open(path, engine=own).read_into(buffer, 1)
        except dmabuf.ClosedError as error:
            assert "forked" in str(error), error
        assert buffer.pread(len(data), 0) == data
        with dmabuf.open(path) as mine:      # a Buffer of the parent's, a File of one's own
            assert mine.read_into(buffer, require="zero-copy").nbytes == len(data)
        buffer.pwrite(b"from the child", 0)
        file.close(); own_file.close(); own.close(); buffer.close()
        del file, own_file, own, parents
        os._exit(0)
    except BaseException:
        import traceback; traceback.print_exc()
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
assert buffer.pread(14, 0) == b"from the child"      # the memory is shared
assert default_engine() is parents
for mine in (file, own_file):
    transfer = mine.read_into(buffer)
    assert transfer.nbytes == len(data) and buffer.pread(len(data), 0) == data
file.close(); own_file.close(); own.close(); buffer.close()
"""


def test_fork(path):
    in_child(_FORK, path)


_FORK_IN_A_STORM = """
import os, sys, threading, warnings, dmabuf
warnings.simplefilter("ignore")
path = sys.argv[1]
data = open(path, "rb").read()
stop = threading.Event()
def work():
    with dmabuf.open(path) as file, dmabuf.allocate(len(data), exporter="memfd") as buffer:
        while not stop.is_set():
            file.read_into(buffer)
            assert buffer.pread(len(data), 0) == data
dmabuf.open, dmabuf.allocate  # imported: Python itself cannot fork while another thread imports
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with dmabuf.open(path) as file:
                with dmabuf.allocate(len(data), exporter="memfd") as buffer:
                    file.read_into(buffer)
                    code = 0 if buffer.pread(len(data), 0) == data else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads: thread.join()
"""


def test_fork_while_other_threads_transfer(path):
    in_child(_FORK_IN_A_STORM, path)


def test_a_transfer_changes_no_limit_of_the_process(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    in_child(
        """
import os, resource, sys, dmabuf
names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (128, most))
before = [resource.getrlimit(getattr(resource, name)) for name in names]
with dmabuf.allocate(1 << 20, exporter="memfd") as buffer, dmabuf.open(sys.argv[1], "r+") as file:
    assert file.read_into(buffer).nbytes == file.write_from(buffer).nbytes == 1 << 20
assert [resource.getrlimit(getattr(resource, name)) for name in names] == before
""",
        tmp_path / "file",
    )

"""Files that are read natively through their block device, emulated on a loop device with ext4.

The emulation takes dma-bufs for block devices and refuses them for files, as the kernel with the
series does. tests/kernel/test_native_files.py has the same on NVMe drives, with xfs.
"""

import contextlib
import ctypes
import errno
import gc
import itertools
import mmap
import os
import stat
import struct
import time
from array import array

import anyio
import pytest

import dmabuf
from dmabuf import Route, aio
from dmabuf.kernel import extents, files, uapi
from dmabuf.transfer.audit import PAIRS
from dmabuf.transfer.layout import ONLY_READS, READS, SMALL_IS_DIRECT, UNSTEADY, Layout
from tests import emulation
from tests.guards import demand
from tests.support import (
    PAGE,
    Filter,
    assert_same,
    exercise,
    loop_device,
    mounted,
    pattern,
    poison,
    ranges,
    read_and_compare,
    swap_blocks,
    wait_until,
)
from tests.unit.fake_kernel import FakeKernel
from tests.unit.lying import content, dma_buf

SIZE = 300 * 1024
PUNCH_HOLE, ZERO_RANGE, KEEP_SIZE = 2, 16, 1


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    kernel = FakeKernel()
    monkeypatch.setattr(uapi, "ioctl", kernel.ioctl)
    return kernel


@pytest.fixture(autouse=True)
def registrar():
    def answer(_dmabuf, target):
        return 0 if stat.S_ISBLK(os.fstat(target).st_mode) else -errno.EOPNOTSUPP

    with emulation.registrar(answer):
        yield


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    demand("ext4")
    with loop_device(tmp_path_factory.mktemp("disk") / "image", 64 << 20) as device:
        yield device


@pytest.fixture(scope="module")
def folder(device, tmp_path_factory):
    with mounted(device, "ext4", tmp_path_factory.mktemp("ext4")) as folder:
        yield folder


@pytest.fixture
def engine():
    with emulation.engine(backend="threads", queue_depth=5, block_size=8192) as engine:
        yield engine


@pytest.fixture
def buf():
    """A dma-buf that the CPU can map and no page of which can be pinned, as a dma-heap's."""
    with dma_buf(SIZE) as buf:
        buf.pin_refusal = "a heap"
        yield buf


@pytest.fixture
def far():
    """A dma-buf that the CPU cannot map."""
    with dma_buf(SIZE, exporter="far", mapped=False) as far:
        os.pwrite(far.slabs[0].fd, poison(SIZE), 0)
        yield far


LIBC = ctypes.CDLL(None, use_errno=True)


def sync(path):
    fd = os.open(path.parent, os.O_RDONLY)
    assert LIBC.syncfs(fd) == 0
    os.close(fd)


def write(path, data):
    path.write_bytes(data)
    settle(path)
    return path


def settle(path):
    """Write a file's filesystem out; return once any further change shows in the file's ctime."""
    sync(path)
    clock = 5  # CLOCK_REALTIME_COARSE
    wait_until(lambda: os.stat(path).st_ctime_ns < time.clock_gettime_ns(clock), "a clock tick")


@pytest.fixture
def path(folder):
    path = write(folder / "file", pattern(SIZE, 1))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def scattered(folder):
    """A file in many extents, with holes and unwritten parts, which ends within a block."""
    path = folder / "scattered"
    with path.open("wb", buffering=0) as file, (folder / "between").open("wb") as other:
        for block in range(SIZE // PAGE):
            if block % 7 == 3:
                continue
            if block % 7 == 5:
                os.posix_fallocate(file.fileno(), block * PAGE, PAGE)
                continue
            os.pwrite(file.fileno(), pattern(PAGE, block), block * PAGE)
            os.fsync(file.fileno())
            os.pwrite(other.fileno(), b"other" * 800, block * PAGE)
            os.fsync(other.fileno())
        os.ftruncate(file.fileno(), SIZE - 777)
    settle(path)
    yield path
    path.unlink()
    (folder / "between").unlink()


@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_every_byte_and_writes_stay_direct(path, buf, backend):
    routes = ("native", "staged", "buffered")
    with emulation.engine(backend=backend, queue_depth=5, block_size=8192) as engine:
        chosen = exercise(path, buf, engine, routes=routes, limit=SIZE, rounds=16)
        assert chosen >= {"native", "staged"}
        with dmabuf.open(path, "r+", engine=engine) as file:
            why = file.plan(buf, "write").rejected[Route.NATIVE]
            assert "only reads go through the block device" in why


@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_extents_holes_and_the_end(scattered, buf, backend):
    reference = os.open(scattered, os.O_RDONLY)
    with (
        emulation.engine(backend=backend, queue_depth=5, block_size=8192) as engine,
        dmabuf.open(scattered, engine=engine) as file,
    ):
        for file_offset, buffer_offset, size in ranges(3, 40, SIZE, SIZE):
            where = {"file_offset": file_offset, "buffer_offset": buffer_offset}
            read_and_compare(file, reference, buf, size, **where)
        transfer = read_and_compare(file, reference, buf, SIZE)
    os.close(reference)
    assert transfer.route is Route.NATIVE and "which holds the file" in transfer.reason
    holes = SIZE // PAGE // 7 * 2 * PAGE
    assert holes <= transfer.copied < holes + 3 * PAGE


def test_more_extents_than_one_ioctl_returns(folder, buf, engine):
    path, block = folder / "comb", os.statvfs(folder).f_bsize
    with path.open("wb") as file:
        for at in range(0, SIZE, 2 * block):
            os.pwrite(file.fileno(), pattern(block, at), at)
    settle(path)
    reference = os.open(path, os.O_RDONLY)
    assert len(extents.extents_of(reference, 0, SIZE, flush=True)) > 140
    with dmabuf.open(path, engine=engine) as file:
        transfer = read_and_compare(file, reference, buf, SIZE)
        assert transfer.route is Route.NATIVE
        read_and_compare(file, reference, buf, 9 * block, file_offset=259 * block + 3)
    os.close(reference)
    path.unlink()


def test_the_cpu_has_access_where_it_writes_zeros(folder, path, buf, engine, kernel):
    hole = folder / "hole"
    with hole.open("wb") as file:
        file.write(pattern(PAGE, 5))
        file.truncate(2 * PAGE)
    settle(hole)
    for one, size, calls in ((path, 2 * PAGE, 0), (hole, PAGE, 0), (hole, 2 * PAGE, 2)):
        with dmabuf.open(one, engine=engine) as file:
            kernel.calls.clear()
            assert file.read_into(buf, size, audit="off").route is Route.NATIVE
            assert len(kernel.calls) == calls
            if calls:
                with pytest.raises(dmabuf.RouteUnavailable, match="fence=False keeps the CPU out"):
                    file.read_into(buf, size, fence=False, route="native")
    hole.unlink()


def test_segments(scattered, buf, engine):
    data, expected = scattered.read_bytes(), bytearray(poison(SIZE))
    segments = array("Q")
    for number, at in enumerate(range(0, SIZE - 2 * PAGE, 3 * PAGE)):
        start = (number * 37 % 60) * PAGE + 512 * (number % 3)
        segments.extend((start, at, PAGE + 512))
        expected[at : at + PAGE + 512] = data[start : start + PAGE + 512]
    buf.pwrite(poison(SIZE), 0)
    with dmabuf.open(scattered, engine=engine) as file:
        transfer = file.read_segments(buf, segments)
        assert transfer.route is Route.NATIVE
        assert_same(buf.pread(SIZE, 0), bytes(expected), f"{transfer}")
        past = array("Q", (0, 0, PAGE, SIZE - PAGE, PAGE, PAGE))
        with pytest.raises(dmabuf.ShortReadError) as caught:
            file.read_segments(buf, past)
        assert (caught.value.index, caught.value.nbytes) == (1, 2 * PAGE - 777)
        assert file.read_into(buf, PAGE, file_offset=SIZE).nbytes == 0


def test_memory_that_the_cpu_cannot_map(path, scattered, far, engine):
    with dmabuf.open(path, engine=engine) as file:
        transfer = file.read_into(far, require="zero-copy")
        assert (transfer.route, transfer.copied) == (Route.NATIVE, 0)
        assert content(far) == path.read_bytes()
    os.pwrite(far.slabs[0].fd, poison(SIZE), 0)
    with dmabuf.open(scattered, engine=engine) as file:
        assert file.read_into(far, 3 * PAGE).nbytes == 3 * PAGE
        with pytest.raises(dmabuf.RouteUnavailable, match="a hole of the file"):
            file.read_into(far, 4 * PAGE, buffer_offset=8 * PAGE)
        with pytest.raises(dmabuf.RouteUnavailable, match="not whole blocks"):
            file.read_into(far, PAGE, file_offset=(SIZE // PAGE - 1) * PAGE)
    assert content(far)[3 * PAGE :] == poison(SIZE)[3 * PAGE :]


def test_dirty_pages_are_read(folder, buf, engine):
    path = folder / "dirty"
    with path.open("wb") as file:
        file.write(pattern(SIZE, 2))
    try:
        with dmabuf.open(path, engine=engine) as file:
            assert file.read_into(buf).route is Route.NATIVE
            assert content(buf) == pattern(SIZE, 2)
            with path.open("r+b") as writer:
                writer.write(pattern(SIZE, 3))
            assert file.read_into(buf).route is Route.NATIVE
            assert content(buf) == pattern(SIZE, 3)
    finally:
        path.unlink()


def test_small_reads_stay_direct_where_they_can(path, engine):
    with dma_buf(2 << 20) as buf, dmabuf.open(path, engine=engine) as file:
        for _ in range(2):
            transfer = file.read_into(buf, PAGE)
            assert transfer.route is Route.DIRECT
            assert transfer.rejected == {Route.NATIVE: SMALL_IS_DIRECT}
            assert file.plan(buf, size=PAGE).rejected == transfer.rejected
        assert file.read_into(buf, PAGE, route="native").route is Route.NATIVE
        with dma_buf(2 << 20) as other, dmabuf.open(path, "r+", engine=engine) as writer:
            for size in (PAGE, 100, 7 * PAGE):
                plan = writer.plan(other, "write", size=size)
                assert plan.rejected[Route.NATIVE] == ONLY_READS
                assert writer.write_from(other, size).rejected == plan.rejected
                plan = writer.plan(other, size=size)
                assert plan.rejected[Route.NATIVE] == SMALL_IS_DIRECT
                assert writer.read_into(other, size).rejected == plan.rejected
        write(path, pattern(2 << 20, 4))
        assert file.read_into(buf).route is Route.NATIVE
        assert content(buf) == pattern(2 << 20, 4)


# -- adversaries


def overwrite(path, number):
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, pattern(5 * PAGE, number), 3 * PAGE)
    os.fsync(fd)
    os.close(fd)


def overwrite_mapped(path, number):
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[PAGE : 2 * PAGE] = pattern(PAGE, number)


def truncate(path, number):
    os.truncate(path, SIZE // 2 + number)
    (path.parent / "taker").write_bytes(b"foreign!" * (SIZE // 8))
    sync(path)


def replace_blocks(path, number):
    """Free all blocks, have another file take them, and write the file again."""
    os.truncate(path, 0)
    (path.parent / "taker").write_bytes(b"foreign!" * (SIZE // 8))
    sync(path)
    path.write_bytes(pattern(SIZE, number))


def reserve(path, mode):
    where = ctypes.c_long(8 * PAGE), ctypes.c_long(16 * PAGE)
    with path.open("r+b") as file:
        assert LIBC.fallocate(file.fileno(), mode, *where) == 0, os.strerror(ctypes.get_errno())


def punch(path, number):
    overwrite(path, number)
    reserve(path, PUNCH_HOLE | KEEP_SIZE)


def zero(path, number):
    overwrite(path, number)
    reserve(path, ZERO_RANGE)


def defragment(path, number):
    """Swap blocks with another file, which overwrites those that it gets."""
    swap(path)
    (path.parent / "donor").write_bytes(b"foreign!" * (2 * PAGE))
    sync(path)


def swap(path):
    """Give the file's blocks to the file "donor", and others to the file."""
    swap_blocks(path, path.parent / "donor", 64 * PAGE)


def append(path, number):
    with path.open("ab") as file:
        file.write(pattern(PAGE + number, number))


ADVERSARIES = [
    overwrite,
    overwrite_mapped,
    truncate,
    replace_blocks,
    punch,
    zero,
    defragment,
    append,
]


@contextlib.contextmanager
def meanwhile(path, adversary, times):
    """Have an adversary act at the last completion of each of the first reads of the device."""
    seen = []

    def answer(completion):
        if completion.straight and len(seen) < times:
            seen.append(completion.offset)
            adversary(path, 10 + len(seen))
            settle(path)
        return completion.result

    with Filter(answer):
        yield seen


@contextlib.contextmanager
def before(path, adversary, engine):
    """Have an adversary act once when the extents are known and the device reads nothing yet."""
    seen, run = [], engine.run

    def act_and_run(job):
        if not seen:
            seen.append(0)
            adversary(path, 11)
            settle(path)
        return run(job)

    engine.run = act_and_run
    yield seen
    engine.run = run


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_file_that_changes_once_is_read_again(path, buf, adversary, early):
    with (
        emulation.engine(queue_depth=1, block_size="1MiB") as engine,
        dmabuf.open(path, engine=engine) as file,
    ):
        file.read_into(buf)
        buf.pwrite(poison(SIZE), 0)
        how = before(path, adversary, engine) if early else meanwhile(path, adversary, 1)
        with how as seen:
            transfer = file.read_into(buf, SIZE)
        assert seen and transfer.route is Route.NATIVE
        now = path.read_bytes()[:SIZE]
        assert transfer.nbytes == len(now)
        assert_same(content(buf)[: len(now)], now, f"{transfer}")


@pytest.mark.parametrize("adversary", [overwrite, replace_blocks])
def test_a_file_that_goes_on_changing(path, buf, far, adversary):
    with (
        emulation.engine(queue_depth=1, block_size="1MiB") as engine,
        dmabuf.open(path, engine=engine) as file,
    ):
        with meanwhile(path, adversary, READS) as seen:
            transfer = file.read_into(buf, SIZE)
        assert len(seen) == READS and transfer.route is Route.STAGED
        assert transfer.rejected[Route.NATIVE] == UNSTEADY
        assert_same(content(buf), path.read_bytes(), f"{transfer}")
        with (
            meanwhile(path, adversary, READS),
            pytest.raises(dmabuf.RouteUnavailable, match="changed while it was read natively"),
        ):
            file.read_into(far, SIZE)
        assert file.read_into(far, SIZE).route is Route.NATIVE
        assert content(far) == path.read_bytes()


@pytest.mark.parametrize("lookup", [1, 2])
def test_blocks_that_move_between_the_flush_and_the_lookup(path, buf, engine, monkeypatch, lookup):
    """The new blocks are known then, and the device does not have the bytes yet."""
    real, lookups = uapi.ioctl, []

    def ioctl(fd, request, argument):
        if request == uapi.FS_IOC_FIEMAP and struct.unpack_from("=I", argument, 16)[0]:
            lookups.append(fd)
            if len(lookups) == lookup:
                real(fd, request, bytearray(argument))
                swap(path)
                struct.pack_into("=I", argument, 16, 0)
        return real(fd, request, argument)

    with dmabuf.open(path, engine=engine) as file:
        file.read_into(buf)
        monkeypatch.setattr(uapi, "ioctl", ioctl)
        buf.pwrite(poison(SIZE), 0)
        transfer = file.read_into(buf)
    assert_same(content(buf), path.read_bytes(), f"{transfer}")
    assert transfer.route is Route.NATIVE and len(lookups) == 2 * lookup


def test_a_change_during_the_audit_is_no_wrong_byte(path, buf, engine):
    """The bytes are compared after the read, and another program may write in between."""
    acted = []

    def later(layout):
        changed = real(layout)
        if not acted:
            acted.append(changed)
            overwrite(path, 50)
            settle(path)
        return changed

    real = Layout.changed
    Layout.changed = later
    try:
        with dmabuf.open(path, engine=engine) as file:
            transfer = file.read_into(buf, audit="always")
    finally:
        Layout.changed = real
    assert acted == [False] and transfer.route is Route.NATIVE and "every byte" in transfer.audited
    assert content(buf) == path.read_bytes()


# -- errors


def test_a_bad_block_is_named_by_its_place_in_the_file(path, buf, engine):
    fd = os.open(path, os.O_RDONLY)
    first = extents.extents_of(fd, 0, SIZE, flush=True)[0]
    os.close(fd)
    assert first.place > SIZE
    bad = first.place + 2 * PAGE

    def answer(completion):
        hit = completion.offset <= bad < completion.offset + completion.size
        return -errno.EIO if hit else completion.result

    buf.pwrite(poison(SIZE), 0)
    text = f"file offset {2 * PAGE}, after {2 * PAGE} bytes: "
    with (
        dmabuf.open(path, engine=engine) as file,
        Filter(answer),
        pytest.raises(OSError, match=text) as caught,
    ):
        file.read_into(buf)
    assert caught.value.errno == errno.EIO and caught.value.filename == str(path)
    assert content(buf)[: 2 * PAGE] == path.read_bytes()[: 2 * PAGE]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
def test_a_reset_and_a_drive_that_is_gone(path, buf, engine, number):
    left = [1]

    def answer(completion):
        if not completion.straight or not left[0]:
            return completion.result
        left[0] -= 1
        return -number

    with dmabuf.open(path, engine=engine) as file, Filter(answer):
        assert file.read_into(buf).route is Route.NATIVE
        assert content(buf) == path.read_bytes() and left == [0]
        left[0] = 1000
        with pytest.raises(OSError, match="the device was removed, or") as caught:
            file.read_into(buf)
        assert (caught.value.errno, caught.value.nbytes) == (errno.ENODEV, 0)


def test_an_audit_that_finds_wrong_bytes(path, buf, engine):
    run = engine.run

    def spoil(job):
        job = run(job)
        os.pwrite(buf.slabs[0].fd, b"wrong", 5 * PAGE)
        return job

    engine.run = spoil
    with dmabuf.open(path, engine=engine) as file:
        with pytest.raises(dmabuf.IntegrityError, match=f"the first at file offset {5 * PAGE}"):
            file.read_into(buf, audit="always")
        engine.run = run
        transfer = file.read_into(buf)
    assert transfer.route is Route.STAGED and "wrong bytes" in transfer.rejected[Route.NATIVE]
    assert content(buf) == path.read_bytes()
    PAIRS.forget()


# -- refusals


def reason(path, buf, engine, **how):
    with dmabuf.open(path, engine=engine) as file:
        return file.plan(buf, **how).rejected[Route.NATIVE]


def test_no_permission_for_the_device(path, buf, engine, monkeypatch):
    monkeypatch.chdir(path.parent)  # another user may not search the folders above it
    os.seteuid(65534)
    try:
        why = reason(path.name, buf, engine)
    finally:
        os.seteuid(0)
    assert "needs read permission on its block device /dev/loop" in why
    assert "Permission denied" in why and "Store.load()" in why


@pytest.mark.parametrize(
    ("request_code", "flag", "why"),
    [
        (uapi.FS_IOC_FIEMAP, uapi.FIEMAP_EXTENT_DATA_INLINE, "inside its inode"),
        (uapi.FS_IOC_FIEMAP, uapi.FIEMAP_EXTENT_DATA_ENCRYPTED, "encrypted"),
        (uapi.FS_IOC_FIEMAP, uapi.FIEMAP_EXTENT_ENCODED, "compressed"),
        (uapi.FS_IOC_FIEMAP, uapi.FIEMAP_EXTENT_NOT_ALIGNED, "do not begin at blocks"),
        (uapi.FS_IOC_FIEMAP, uapi.FIEMAP_EXTENT_UNKNOWN, "no place on the device yet"),
        (uapi.FS_IOC_FIEMAP, uapi.FIEMAP_EXTENT_DELALLOC, "no place on the device yet"),
        (uapi.FS_IOC_GETFLAGS, uapi.FS_ENCRYPT_FL, "encrypted"),
        (uapi.FS_IOC_GETFLAGS, uapi.FS_COMPR_FL, "compressed"),
        (uapi.FS_IOC_GETFLAGS, uapi.FS_VERITY_FL, "fs-verity"),
        (uapi.FS_IOC_GETFLAGS, uapi.FS_JOURNAL_DATA_FL, "in the journal"),
        (uapi.FS_IOC_FSGETXATTR, uapi.FS_XFLAG_REALTIME, "realtime device"),
    ],
)
def test_flags_of_files_and_extents(path, buf, engine, monkeypatch, request_code, flag, why):
    """One flag is added to what the kernel returns; the realtime device is one of xfs."""
    real, place = uapi.ioctl, 0
    if request_code == uapi.FS_IOC_FIEMAP:
        place = uapi.FIEMAP_STRUCT.size + 40
    if request_code == uapi.FS_IOC_FSGETXATTR:
        monkeypatch.setattr(files, "filesystem_of", lambda *_: uapi.XFS)

    def ioctl(fd, request, argument):
        result = real(fd, request, argument)
        if request == request_code:
            flags = struct.unpack_from("=I", argument, place)[0]
            struct.pack_into("=I", argument, place, flags | flag)
        return result

    with dmabuf.open(path, engine=engine) as file:
        assert file.plan(buf).route is Route.NATIVE
        monkeypatch.setattr(uapi, "ioctl", ioctl)
        assert why in file.plan(buf).rejected[Route.NATIVE]
        assert file.read_into(buf).route is Route.STAGED
    assert content(buf) == path.read_bytes()


def test_nothing_but_holes(folder, buf, engine):
    path = folder / "hole"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    settle(path)
    assert "it reads as zeros" in reason(path, buf, engine)
    with dmabuf.open(path, engine=engine) as file:
        buf.pwrite(poison(SIZE), 0)
        assert file.read_into(buf).route is Route.STAGED
    assert content(buf) == bytes(SIZE)
    path.unlink()


def in_halves(found):
    for one in found:
        half = one.size // 2 // PAGE * PAGE
        yield one._replace(size=half)
        yield one._replace(offset=one.offset + half, place=one.place + half, size=one.size - half)


def test_extents_of_the_same_place_are_one(path, buf, engine, monkeypatch):
    """As ext4 lists the extents of large files, which have at most 128 MiB."""
    real = extents.extents_of
    monkeypatch.setattr(extents, "extents_of", lambda *a, **how: [*in_halves(real(*a, **how))])
    with dmabuf.open(path, engine=engine) as file:
        buf.pwrite(poison(SIZE), 0)
        assert file.read_into(buf).route is Route.NATIVE
    assert_same(content(buf), path.read_bytes(), "the buffer")


@pytest.mark.parametrize("what", ["the timestamp", "the blocks"])
def test_a_file_that_is_never_steady_is_not_read_natively(path, buf, engine, monkeypatch, what):
    real, count = extents.extents_of, itertools.count()

    def moved(*arguments, **how):
        return [one._replace(place=one.place + next(count)) for one in real(*arguments, **how)]

    if what == "the blocks":
        monkeypatch.setattr(extents, "extents_of", moved)
    else:
        monkeypatch.setattr(extents.State, "shows_changes", lambda _: False)
    why = {"the timestamp": "changed a moment ago", "the blocks": "moves the blocks of the file"}
    assert why[what] in reason(path, buf, engine)
    with dmabuf.open(path, engine=engine) as file:
        buf.pwrite(poison(SIZE), 0)
        assert file.read_into(buf).route is Route.STAGED
    assert_same(content(buf), path.read_bytes(), "the buffer")


def test_a_device_that_takes_no_dma_bufs(path, buf, engine):
    with emulation.registrar(lambda _dmabuf, _target: -errno.EOPNOTSUPP):
        assert "has to be on an NVMe namespace or a partition" in reason(path, buf, engine)
        with dmabuf.open(path, engine=engine) as file:
            assert file.read_into(buf).route is Route.STAGED


def test_a_filesystem_without_a_device_of_its_own(tmp_path, buf, engine, monkeypatch):
    """The filesystem of this folder is another one than before, as far as statfs(2) says."""
    path = write(tmp_path / "file", pattern(SIZE, 1))
    monkeypatch.setattr(files, "filesystem_of", lambda *_: uapi.BTRFS)
    with dmabuf.open(path, engine=engine) as file:
        refused = file.target.disk()
    assert isinstance(refused, str) and "ext4 and xfs only" in refused


# -- what is open and registered


def devices(device):
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return links.count(device)


def test_files_share_the_device_and_close_it(folder, device, path, buf, engine):
    second = write(folder / "second", pattern(SIZE, 2))
    asked = []

    def answer(_dmabuf, target):
        block = stat.S_ISBLK(os.fstat(target).st_mode)
        asked.append(block)
        return 0 if block else -errno.EOPNOTSUPP

    gc.collect()  # what the errors of other tests refer to
    before = devices(device)
    with emulation.registrar(answer), dmabuf.open(path, engine=engine) as file:
        file.read_into(buf)
        with dmabuf.open(second, engine=engine) as other:
            assert other.read_into(buf).route is Route.NATIVE
            assert content(buf) == pattern(SIZE, 2)
            assert devices(device) == before + 1 and asked.count(True) == 1
        assert file.read_into(buf).route is Route.NATIVE
        assert devices(device) == before + 1 and asked.count(True) == 1
    assert devices(device) == before
    second.unlink()


def test_requests_are_as_large_as_the_kernel_takes(tmp_path, path, buf, monkeypatch):
    """The limit that the series adds to sysfs, which need not be a multiple of a block."""
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue/max_hw_dmabuf_sectors_kb").write_text("17\n")
    monkeypatch.setattr(dmabuf.transfer.audit, "device_of", lambda _fd: str(tmp_path))
    with (
        emulation.engine() as engine,
        dmabuf.open(path, engine=engine) as file,
        Filter(lambda completion: completion.result) as seen,
    ):
        assert file.read_into(buf, 272 << 10).requests == 16
        assert {size for _, size, _ in seen.seen} == {17 << 10}
    assert content(buf)[: 272 << 10] == pattern(SIZE, 1)[: 272 << 10]


def test_in_an_event_loop(path, scattered, buf):
    async def main():
        with emulation.native():
            async with await aio.open(path) as file:
                transfer = await file.read_into(buf)
                assert transfer.route is Route.NATIVE
                assert content(buf) == path.read_bytes()
            async with await aio.open(scattered) as file:
                transfer = await file.read_into(buf)
                assert transfer.route is Route.NATIVE
                end = SIZE - 777
                assert_same(content(buf)[:end], scattered.read_bytes(), f"{transfer}")

    anyio.run(main)

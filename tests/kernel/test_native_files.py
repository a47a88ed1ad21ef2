"""Files on NVMe drives that are read natively through the block device, also while they change.

On a kernel with the series "Add dmabuf read/write via io_uring" the reads are real. On any other
they are emulated for the block devices of NVMe drives (tests/kernel/emulation.py).
"""

import contextlib
import ctypes
import fcntl
import os
import struct
import threading
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Route
from dmabuf.inspect import examine_path
from dmabuf.transfer.engine import default_engine
from dmabuf.transfer.layout import UNSTEADY
from tests import emulation
from tests.kernel.conftest import BUFFERS, PINNED
from tests.kernel.emulation import answer
from tests.kernel.test_filesystems import filesystem
from tests.kernel.test_targets import everything
from tests.support import (
    PAGE,
    assert_same,
    mounted,
    partition,
    pattern,
    poison,
    ranges,
    read_and_compare,
    run,
    swap_blocks,
)

__all__ = ["filesystem"]

SIZE = 1 << 20
SECTOR = 512
LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def engine_of(**how):
    """An engine that has the native route: the kernel's, or an emulation."""
    with contextlib.ExitStack() as stack:
        if default_engine().no_native() is not None:
            stack.enter_context(emulation.registrar(answer))
            stack.enter_context(emulation.native(1 << emulation.lib.DMB_BACKEND_URING))
        yield stack.enter_context(dmabuf.Engine(**how))


@pytest.fixture(scope="module")
def engine():
    with engine_of(queue_depth=8, block_size="64KiB") as engine:
        yield engine


@pytest.fixture(params=["dma-heap", "vgem", "udmabuf"])
def buf(request):
    with BUFFERS[request.param](SIZE) as buffer:
        buffer.kind = request.param
        yield buffer


@pytest.fixture
def heap():
    with BUFFERS["dma-heap"](SIZE) as buffer:
        yield buffer


def best(buffer):
    """The route of a read of at most 1 MiB."""
    return Route.DIRECT if buffer.kind in PINNED else Route.NATIVE


# -- devices


@contextlib.contextmanager
def mapped(disk, sectors):
    """Make a device-mapper device of one linear target, and return its path."""
    run("modprobe", "dm_mod")
    control = os.open("/dev/mapper/control", os.O_RDWR)

    def request(number, flags=0, table=b""):
        data = bytearray(
            struct.pack(
                "=3I2I2Ii2IQ128s129s7x", 4, 0, 0, 312 + len(table), 312, bool(table), 0, flags, 0,
                0, 0, b"dmabuf_native", b"",
            )
            + table
        )  # fmt: skip
        fcntl.ioctl(control, 3 << 30 | 312 << 16 | 0xFD00 | number, data)
        return struct.unpack_from("=Q", data, 40)[0]

    try:
        device = request(3)  # DM_DEV_CREATE
        try:
            where = f"{disk} 0".encode().ljust(64, b"\0")
            request(9, 0, struct.pack("=QQiI16s", 0, sectors, 0, 104, b"linear") + where)
            request(6)  # DM_DEV_SUSPEND without its flag: resume
            name = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(device)}:"
                                                f"{os.minor(device)}"))  # fmt: skip
            yield f"/dev/{name}"
        finally:
            request(4)  # DM_DEV_REMOVE
    finally:
        os.close(control)


@everything
def test_a_partition(heap, engine, tmp_path):
    disk, start = os.environ["DMABUF_TEST_NVME0"], 3 << 20
    data = pattern(SIZE, 1)
    with (
        partition(disk, start, 64 << 20) as part,
        mounted(part, "ext4", tmp_path / "part") as folder,
        dmabuf.open(folder / "file", "w", engine=engine) as file,
    ):
        heap.pwrite(data, 0)
        file.write_from(heap, sync=True)
        heap.pwrite(poison(SIZE), 0)
        with dmabuf.open(folder / "file", engine=engine) as again:
            transfer = again.read_into(heap)
        assert transfer.route is Route.NATIVE and part in transfer.reason
        assert "every byte" in transfer.audited or "not audited: the first" in transfer.audited
        assert heap.pread(SIZE, 0) == data


@everything
def test_devices_and_filesystems_that_are_refused(heap, engine, tmp_path):
    disk = os.environ["DMABUF_TEST_NVME0"]
    with contextlib.ExitStack() as stack:
        dm = stack.enter_context(mapped(disk, (256 << 20) // SECTOR))
        folder = stack.enter_context(mounted(dm, "ext4", tmp_path / "dm"))
        (folder / "file").write_bytes(pattern(SIZE, 2))
        with dmabuf.open(folder / "file", engine=engine) as file:
            transfer = file.read_into(heap)
        assert transfer.route is Route.STAGED
        assert f"{dm} does not move dma-bufs itself" in transfer.rejected[Route.NATIVE]
        assert heap.pread(SIZE, 0) == pattern(SIZE, 2)
    with mounted(disk, "btrfs", tmp_path / "btrfs") as folder:
        (folder / "file").write_bytes(pattern(SIZE, 3))
        with dmabuf.open(folder / "file", engine=engine) as file:
            assert "ext4 and xfs only" in file.plan(heap).rejected[Route.NATIVE]


# -- files that nobody changes


def share_blocks(path, clone):
    """Make a file of the same blocks, on xfs."""
    with path.open("rb") as file, clone.open("wb") as copy:
        fcntl.ioctl(copy, 0x40049409, file.fileno())  # FICLONE


def write_scattered(path, size=SIZE):
    """Write a file in many extents, with holes, unwritten parts and an end within a block."""
    with path.open("wb", buffering=0) as file, path.with_suffix(".other").open("wb") as other:
        for block in range(size // PAGE):
            if block % 7 == 5:
                os.posix_fallocate(file.fileno(), block * PAGE, PAGE)
            elif block % 7 != 3:
                os.pwrite(file.fileno(), pattern(PAGE, block), block * PAGE)
                os.fdatasync(file.fileno())
                os.pwrite(other.fileno(), bytes(PAGE), block * PAGE)
                os.fdatasync(other.fileno())
        os.ftruncate(file.fileno(), size - 777)


@everything
@pytest.mark.device_table(
    "files on NVMe, natively", "read", "zero-copy", by="an emulation of the kernel series"
)
def test_every_byte(filesystem, buf, engine):
    path = filesystem / "scattered"
    write_scattered(path, 256 << 10)
    reference = os.open(path, os.O_RDONLY)
    with dmabuf.open(path, engine=engine) as file:
        for where in ranges(5, 16, 256 << 10, 256 << 10):
            file_offset, buffer_offset, size = where
            there = {"file_offset": file_offset, "buffer_offset": buffer_offset}
            read_and_compare(file, reference, buf, size, **there)
            with contextlib.suppress(dmabuf.RouteUnavailable):  # nothing but edges or holes
                transfer = read_and_compare(file, reference, buf, size, route="native", **there)
                assert transfer.route is Route.NATIVE
        transfer = read_and_compare(file, reference, buf, SIZE)
        assert transfer.route is best(buf)
        transfer = read_and_compare(file, reference, buf, SIZE, route="native", audit="always")
        assert "every byte" in transfer.audited
    os.close(reference)


@everything
def test_shared_blocks_with_newer_bytes_in_the_page_cache(filesystem, heap, engine):
    """The read finds the newer bytes, which get blocks of their own; the other file keeps its."""
    if not filesystem.name.startswith("xfs"):
        return
    path, clone = filesystem / "shared", filesystem / "clone"
    path.write_bytes(pattern(SIZE, 1))
    share_blocks(path, clone)
    with path.open("r+b") as newer, clone.open("rb") as older:
        for block in (0, 7, 8, 100):
            os.pwrite(newer.fileno(), pattern(PAGE, block), block * PAGE)
        for at, reference in ((path, newer), (clone, older)):
            with dmabuf.open(at, engine=engine) as file:
                read_and_compare(file, reference.fileno(), heap, SIZE, route="native")
        assert older.read() == pattern(SIZE, 1)
    path.unlink()
    clone.unlink()


@everything
def test_doctor_plans_it(filesystem):
    path = filesystem / "planned"
    path.write_bytes(bytes(SIZE) * 9)
    read = examine_path(str(path)).read
    assert read.zero_copy
    if default_engine().no_native() is None:
        assert read.route == "native" and "which holds the file" in read.reason
    else:
        assert "no dma-buf registered buffers" in read.rejected["native"]
    path.unlink()


# -- adversaries


def sector(version, number):
    """A sector that says which one it is: each byte follows from the version and the number."""
    return (struct.pack("<8sQQ", b"dmabufNF", version, number) * 22)[:SECTOR]


def version_of(version, first=0, size=SIZE):
    return b"".join(sector(version, first + i) for i in range(size // SECTOR))


FOREIGN = b"FOREIGN!" * (SIZE // 8)


class Adversary:
    """A thread that changes a file until it is told to stop, and has others take its blocks."""

    def __init__(self, act, path):
        self.path, self.act, self.version, self.acts, self.moves = path, act, 1, 0, 0
        self.failure = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            while not self._stop.is_set():
                self.version += 1
                self.act(self)
                self.acts += 1
        except BaseException as error:
            self.failure = error

    def take_freed_blocks(self):
        """Fill a file with foreign bytes, which get the blocks that were freed last."""
        taker = self.path.with_suffix(".taker")
        with taker.open("wb") as file:
            file.write(FOREIGN)
            os.fsync(file.fileno())
        taker.unlink()

    def write(self, start=0, size=SIZE):
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, version_of(self.version, start // SECTOR, size), start)
        os.fsync(fd)
        os.close(fd)

    def fallocate(self, mode, start, size):
        fd = os.open(self.path, os.O_RDWR)
        rc = LIBC.fallocate(fd, mode, ctypes.c_long(start), ctypes.c_long(size))
        os.close(fd)
        assert rc == 0, os.strerror(ctypes.get_errno())

    def __enter__(self):
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()
        if self.failure:
            raise self.failure


def overwrite(foe):
    foe.write(foe.version * 7 % 200 * PAGE, 16 * PAGE)


def truncate(foe):
    os.truncate(foe.path, foe.version * 3 % 100 * PAGE + 77)
    foe.take_freed_blocks()
    foe.write()


def punch(foe):
    start = foe.version * 5 % 150 * PAGE
    foe.fallocate(3, start, 64 * PAGE)  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    foe.take_freed_blocks()
    foe.write(start, 32 * PAGE)


def zero_range(foe):
    start = foe.version * 5 % 150 * PAGE
    foe.fallocate(16, start, 64 * PAGE)  # FALLOC_FL_ZERO_RANGE
    foe.write(start, 32 * PAGE)


def rename(foe):
    """Another file gets the name, and the old one, which the reader has open, grows and shrinks."""
    new = foe.path.with_suffix(".new")
    new.write_bytes(FOREIGN)
    keep = foe.path.with_suffix(".keep")
    if not keep.exists():
        os.link(foe.path, keep)
    os.replace(new, foe.path)
    os.replace(keep, foe.path)
    truncate(foe)


def reflink(foe):
    """Share the blocks, write, which moves them, and give the shared ones to another file."""
    clone = foe.path.with_suffix(".clone")
    share_blocks(foe.path, clone)
    foe.write()
    clone.unlink()
    foe.take_freed_blocks()


def defragment(foe):
    """Swap the blocks with those of another file, which is overwritten.

    The ctime does not change. So those files stay for longer than a read: blocks that came back
    meanwhile would look as before.
    """
    donor = foe.path.with_suffix(f".donor{foe.version}")
    swap_blocks(foe.path, donor, SIZE)
    foe.moves += 1
    with donor.open("r+b") as other:
        other.write(FOREIGN)
        os.fsync(other.fileno())
    foe.path.with_suffix(f".donor{foe.version - 100}").unlink(missing_ok=True)


def check(got, transfer, versions):
    """Every sector is one of this file, in its place, of a version there was, or zeros.

    A route that is not native may go on after a short read, so a sector may be of two versions.
    """
    for number in range(transfer.nbytes // SECTOR):
        found = got[number * SECTOR : (number + 1) * SECTOR]
        version = struct.unpack_from("<Q", found, 8)[0]
        assert version <= versions, f"sector {number}: {found[:32]!r} {transfer}"
        wanted = sector(version, number) if version else bytes(SECTOR)
        if found != wanted and transfer.route is not Route.NATIVE:
            wanted = sector(0, number)  # without the version, in any record of 24 bytes
            pairs = enumerate(zip(found, wanted, strict=True))
            found = bytes(
                mine if byte in (0, mine) or 8 <= at % 24 < 16 else byte
                for at, (byte, mine) in pairs
            )
        assert_same(found, wanted, f"sector {number} of version {version}, {transfer.route}")


@everything
@pytest.mark.parametrize(
    "act", [overwrite, truncate, punch, zero_range, rename, reflink, defragment]
)
def test_a_file_that_changes_while_it_is_read(filesystem, heap, engine, act):
    if not filesystem.name.startswith({reflink: "xfs", defragment: "ext4"}.get(act, "")):
        return
    path, routes, moved = filesystem / f"victim-{act.__name__}", [], 0
    with Adversary(act, path) as foe, dmabuf.open(path, engine=engine) as file:
        while len(routes) < 30 or foe.acts < 3 or (act is defragment and moved < 3):
            heap.pwrite(poison(SIZE), 0)
            moves = foe.moves
            transfer = file.read_into(heap, SIZE, audit="off")
            check(heap.pread(SIZE, 0), transfer, foe.version)
            routes.append(transfer.route)
            native = transfer.route is Route.NATIVE or transfer.rejected[Route.NATIVE] == UNSTEADY
            moved += native and foe.moves > moves
            assert not foe.failure
    with dmabuf.open(path, engine=engine) as file:
        reference = os.open(path, os.O_RDONLY)
        transfer = read_and_compare(file, reference, heap, SIZE, route="native")
        assert transfer.route is Route.NATIVE
        os.close(reference)
    for left in Path(filesystem).glob(f"{path.name}*"):
        left.unlink()
    met = f", {moved} while blocks moved" if moved else ""
    native = routes.count(Route.NATIVE)
    print(f"{act.__name__}: {foe.acts} acts, {native} of {len(routes)} native{met}")

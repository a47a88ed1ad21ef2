"""A drive that is reset, or pulled out, in the middle of large transfers, and put back."""

import contextlib
import errno
import os
import threading

import anyio
import pytest

import dmabuf
from dmabuf import Engine, Route, aio
from dmabuf.transfer.engine import default_engine
from tests.guards import needs
from tests.kernel.hotplug import MIB, Slot
from tests.support import assert_same, in_the_middle, pattern, poison, raises_errno, whole

everything = needs("unplug", "udmabuf", "nvme", "io_uring", "ext4")

WORKERS = 4
PART = 4 * MIB
SIZE = WORKERS * PART
STEP = 4096
BASE = pattern(PART + 64 * STEP, 41)
PATIENCE = 60

WAYS = [
    ("disk", None),
    ("disk", "staged"),
    ("disk", "buffered"),
    ("partition", None),
    ("file", None),
    ("file", "buffered"),
    ("node", None),
    ("node", "staged"),
]
"""What is transferred to and from, and by which route."""

STRAIGHT = [("disk", None), ("file", None), ("node", None)]
IN_LOOPS = [
    *((*way, "asyncio") for way in (*STRAIGHT, ("disk", "staged"))),
    ("disk", None, "trio"),
]
"""The ways that event loops go: their code is the same but for the waiting."""

GONE = {
    "disk": {errno.ENODEV},
    "partition": {errno.ENODEV},
    "node": {errno.ENODEV},
    "file": {errno.EIO, errno.EROFS},
}
"""How a target says that its drive is gone. A filesystem has its own words."""


@pytest.fixture
def slot():
    slot = Slot()
    yield slot
    slot.restore()
    assert slot.disk == os.environ["DMABUF_TEST_NVME0"]


@pytest.fixture
def buf():
    with dmabuf.allocate(SIZE, exporter="udmabuf") as buffer:
        yield buffer


def content(round_):
    """What the transfer of a round moves: no two of a worker's are alike."""
    at = round_ % 64 * STEP
    return BASE[at : at + PART]


class Worker:
    """Reads or writes its part of the target over and over, until a transfer fails."""

    def __init__(self, number, buffer, route):
        self.at, self.write, self.buffer = number * PART, bool(number % 2), buffer
        self.how = {"file_offset": self.at, "buffer_offset": self.at, "route": route}
        self.how["audit"] = "off"  # its poison is not ours
        self.how |= {"sync": True} if self.write else {}
        self.rounds, self.routes, self.error = 0, set(), None
        self.begun, self.over = threading.Event(), threading.Event()

    def expected(self):
        return content(self.rounds + 1 if self.write else 0)

    def before(self):
        self.buffer.pwrite(self.expected() if self.write else poison(PART), self.at)

    def after(self, transfer):
        assert transfer.nbytes == PART
        self.routes.add(transfer.route)
        if not self.write:
            assert_same(self.buffer.pread(PART, self.at), content(0), "what was read")
        self.rounds += 1
        self.begun.set()

    def run(self, file):
        move = file.write_from if self.write else file.read_into
        try:
            while not self.over.is_set():
                self.before()
                self.after(move(self.buffer, PART, **self.how))
        except BaseException as error:
            self.error = error
        self.begun.set()

    async def fly(self, file):
        move = file.write_from if self.write else file.read_into
        try:
            while not self.over.is_set():
                self.before()
                self.after(await move(self.buffer, PART, **self.how))
        except BaseException as error:
            self.error = error
            if not isinstance(error, Exception):
                raise
        self.begun.set()

    def check(self, medium, *, sure=True, network=False):
        """The failed transfer: what it calls whole is, and every block is the new or the old.

        Over a network a read may end within a block: then every byte is.
        """
        new, nbytes = self.expected(), self.error.nbytes
        old = content(self.rounds) if self.write else poison(PART)
        part = slice(self.at, self.at + PART)
        now = medium[part] if self.write else self.buffer.pread(PART, self.at)
        if sure or not self.write:
            assert_same(now[:nbytes], new[:nbytes], "what is whole")
        for at in range(0, PART, 512):
            block = slice(at, at + 512)
            if now[block] not in (new[block], old[block]):
                assert network and not self.write, f"the block at {at}"
                triples = zip(now[block], new[block], old[block], strict=True)
                assert all(one in pair for one, *pair in triples), f"the block at {at}"


def run_workers(how, path, workers, disturb):
    """All workers at once, each in a thread or all in one event loop, and what befalls the drive.

    `disturb` is called when each of them has begun its second transfer at the least.
    """

    def befall():
        for worker in workers:
            assert worker.begun.wait(PATIENCE)
        disturb()

    other = threading.Thread(target=befall)
    if how == "threads":
        with dmabuf.open(path, "r+") as file:
            threads = [threading.Thread(target=one.run, args=[file]) for one in workers]
            for thread in (*threads, other):
                thread.start()
            for thread in (*threads, other):
                thread.join(PATIENCE)
                assert not thread.is_alive()
        return

    async def main():
        async with await aio.open(path, "r+") as file, anyio.create_task_group() as group:
            for one in workers:
                group.start_soon(one.fly, file)

    other.start()
    anyio.run(main, backend=how)
    other.join(PATIENCE)


def bytes_of(path, start):
    """What the medium has: the page cache of a drive that came back is empty."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return whole(fd, start + SIZE)[start:]
    finally:
        os.close(fd)


def check_again(slot, kind, folder, buffer, check):
    """The drive is back: `check` sees its bytes, and the same buffer is filled and written."""
    with slot.again(kind, folder) as path:
        start = slot.start(kind)
        raw = slot.disk if kind == "node" else path
        medium = bytes_of(raw, start)
        check(medium)
        buffer.pwrite(poison(SIZE), 0)
        with dmabuf.open(path, "r+") as file:
            file.read_into(buffer, SIZE, file_offset=start)
            assert_same(buffer.pread(SIZE, 0), medium, "a newly opened File")
            buffer.pwrite(medium[:PART], PART)
            file.write_from(buffer, PART, file_offset=start, buffer_offset=PART, sync=True)


def first_content():
    return content(0) * WORKERS


@everything
@pytest.mark.parametrize(
    ("kind", "route", "how"), [*((*way, "threads") for way in WAYS), *IN_LOOPS]
)
def test_pulled_under_many(slot, buf, tmp_path, kind, route, how):
    workers = [Worker(number, buf, route) for number in range(WORKERS)]
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(slot.target(kind, first_content(), tmp_path / "mnt"))
        run_workers(how, path, workers, slot.pull)
        for worker in workers:
            assert isinstance(worker.error, OSError), worker.error
            assert worker.error.errno in GONE[kind], worker.error
            assert worker.error.filename == path
            assert worker.rounds >= 1
    slot.plug()

    def check(medium):
        for worker in workers:
            worker.check(medium)

    check_again(slot, kind, tmp_path / "mnt", buf, check)


@everything
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize(("kind", "route"), WAYS)
def test_pulled_in_the_middle(slot, buf, tmp_path, kind, route, write):
    """Once twenty requests are done, from within: so some of it is whole, and some is not."""
    worker = Worker(int(write), buf, route)
    worker.how.pop("sync", None)  # the middle of the transfer, and no flush
    with (
        Engine(queue_depth=4, block_size="64KiB") as engine,
        slot.target(kind, first_content(), tmp_path / "mnt") as path,
        dmabuf.open(path, "r+", engine=engine) as file,
    ):
        for small in (
            file.read_into,
            file.write_from,
        ):  # by one system call each, where that is possible
            small(buf, STEP, file_offset=2 * PART, buffer_offset=2 * PART)
        with in_the_middle(20, worker.at, slot.pull):
            worker.run(file)
        error = worker.error
        assert isinstance(error, OSError) and error.errno in GONE[kind], error
        assert error.filename == path
        assert 0 < error.nbytes < PART
        where = f"at file offset {worker.at + error.nbytes}, after {error.nbytes} bytes: "
        assert where in str(error)
        if kind != "file":
            # Nothing of it is to be had any more, and that is said each time.
            for again in (file.read_into, file.write_from):
                for size in (PART, STEP):
                    with raises_errno(errno.ENODEV, nbytes=0):
                        again(buf, size, file_offset=2 * PART, buffer_offset=2 * PART)
            if kind == "disk":
                with pytest.raises(OSError, match="was pulled"):
                    file.size  # noqa: B018
            slot.plug()  # while the old one is open: the drive gets another name
            assert slot.disk != slot.first
            with dmabuf.open(slot.node if kind == "node" else slot.disk) as other:
                other.read_into(buf, PART, buffer_offset=3 * PART)
    if kind == "file":
        slot.plug()
    sure = route != "buffered"  # what the page cache has is not on the drive
    check_again(slot, kind, tmp_path / "mnt", buf, lambda medium: worker.check(medium, sure=sure))


@everything
@pytest.mark.parametrize(
    ("kind", "route", "how"), [*((*way, "threads") for way in STRAIGHT), *IN_LOOPS]
)
def test_reset_under_many(slot, buf, tmp_path, kind, route, how):
    """The driver issues again what it had to cancel, or the core does: nobody sees it but late.

    On a kernel with dma-buf registered buffers the controller's mappings are gone, requests say
    ENOENT, and the buffer is registered again under all who use it.
    """
    workers = [Worker(number, buf, route) for number in range(WORKERS)]

    def disturb():
        for _ in range(4):
            slot.reset()
        for worker in workers:
            worker.over.set()

    with slot.target(kind, first_content(), tmp_path / "mnt") as path:
        run_workers(how, path, workers, disturb)
        for worker in workers:
            assert worker.error is None, worker.error
            assert worker.rounds >= 1
        native = default_engine().no_native() is None and (kind, route) == ("disk", None)
        usual = Route(route) if route else Route.NATIVE if native else Route.DIRECT
        assert {route for worker in workers for route in worker.routes} == {usual}
        with open(slot.disk if kind == "node" else path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            medium = whole(file.fileno(), SIZE)
        for worker in workers:
            last = content(worker.rounds if worker.write else 0)
            part = slice(worker.at, worker.at + PART)
            assert_same(medium[part], last, "the medium")


@everything
def test_copies_when_the_drive_is_pulled(slot, tmp_path, monkeypatch):
    """Two copies from it and two to it, in the middle: each tells how much is whole."""
    monkeypatch.setattr("dmabuf.copying.pipeline._TICK", 0)  # progress is called for each block
    size, new = PART, pattern(PART, 42)
    source = tmp_path / "source"
    source.write_bytes(new)
    under_way, pulled = threading.Barrier(WORKERS, action=slot.pull, timeout=PATIENCE), set()

    def progress(number):
        def called(_done, _total):
            if number not in pulled:
                pulled.add(number)
                under_way.wait()  # the last of them pulls it

        return called

    def copy(number):
        target = tmp_path / f"target{number}"
        offsets = {"dst_offset": number * size} if number % 2 else {"src_offset": number * size}
        ends = (source, file) if number % 2 else (file, target)
        try:
            how = {"size": size, "block_size": size // 16, "blocks": 4}
            dmabuf.copy(*ends, progress=progress(number), **how, **offsets)
        except OSError as error:
            results[number] = error

    results = {}
    data = b"".join(pattern(size, 43 + number) for number in range(WORKERS))
    with (
        slot.target("disk", data, tmp_path / "mnt") as path,
        dmabuf.open(path, "r+") as file,
    ):
        threads = [threading.Thread(target=copy, args=[number]) for number in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    slot.plug()
    with open(slot.disk, "rb", buffering=0) as disk:
        medium = whole(disk.fileno(), WORKERS * size)
    for number in range(WORKERS):
        error, part = results[number], slice(number * size, (number + 1) * size)
        assert error.errno == errno.ENODEV, error
        assert 0 < error.nbytes < size
        if number % 2:
            assert_same(medium[part][: error.nbytes], new[: error.nbytes], "what went to the drive")
        else:
            got = (tmp_path / f"target{number}").read_bytes()
            assert len(got) == error.nbytes
            assert_same(got, data[part][: len(got)], "what came from it")

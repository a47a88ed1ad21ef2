"""The ways of `dmabuf bench`, each by every byte; the page cache, the rounds, the scratch file."""

import errno
import mmap
import os
import time
from array import array
from contextlib import ExitStack, contextmanager

import pytest

import dmabuf
from dmabuf import facts
from dmabuf.bench import cache, run, scratch, ways
from dmabuf.bench.run import Bench, Setting
from dmabuf.bench.ways import Place
from tests.forking import in_child
from tests.guards import needs
from tests.support import PAGE, assert_same, cached, drop_cache, pattern, poison, zram

BLOCK = 2 * PAGE
START, SIZE = 4 * PAGE, 16 * BLOCK
WHOLE = START + SIZE + 3 * PAGE
NAMES = ("direct", "staged", "buffered", "copy", "bounce", "mmap")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "target"
    path.write_bytes(pattern(WHOLE, 3))
    return path


@contextmanager
def placed(path, mode="r", size=SIZE, start=START):
    with dmabuf.allocate(size + PAGE, exporter="memfd") as buffer, dmabuf.open(path, mode) as file:
        drop_cache(file.fileno())
        yield Place(file, buffer, start, size)


@contextmanager
def way(place, direction, name):
    with ExitStack() as stack:
        engine = stack.enter_context(ways.Timed(queue_depth=4, block_size=BLOCK))
        found, _ = ways.by_route(place, direction, BLOCK, engine)
        found += ways.today(place, direction, BLOCK)[0]
        for one in found:
            stack.callback(one.close)
        (chosen,) = (one for one in found if one.name == name)
        chosen.begin()
        stack.callback(chosen.end)
        yield chosen


def segments(*places):
    return array("Q", [n for at in places for n in (START + at * BLOCK, at * BLOCK, BLOCK)])


@pytest.mark.parametrize("name", NAMES)
def test_reading(path, name):
    content = path.read_bytes()
    with placed(path) as place, way(place, "read", name) as one:
        expected = bytearray(poison(place.buffer.size))
        place.buffer.pwrite(expected, 0)
        one.run(segments(5, 0, 15, 7))
        for at in (5, 0, 15, 7):
            expected[at * BLOCK : (at + 1) * BLOCK] = content[START + at * BLOCK :][:BLOCK]
        assert_same(place.buffer.pread(place.buffer.size, 0), bytes(expected), "after run")
        with one.single() as move:
            move(START + 9 * BLOCK, 2 * BLOCK)
        expected[2 * BLOCK : 3 * BLOCK] = content[START + 9 * BLOCK :][:BLOCK]
        assert_same(place.buffer.pread(place.buffer.size, 0), bytes(expected), "after one")


@pytest.mark.parametrize("name", NAMES)
def test_writing(path, name):
    expected = bytearray(path.read_bytes())
    with placed(path, "r+") as place, way(place, "write", name) as one:
        content = poison(place.buffer.size)
        place.buffer.pwrite(content, 0)
        one.run(segments(5, 0, 15, 7))
        for at in (5, 0, 15, 7):
            where = START + at * BLOCK
            expected[where : where + BLOCK] = content[at * BLOCK : (at + 1) * BLOCK]
        os.posix_fadvise(place.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if name in ("copy", "buffered"):
            assert cached(place.file.fileno()) == 0, "run flushes, so that all can be dropped"
        assert_same(path.read_bytes(), bytes(expected), "after run")
        with one.single() as move:
            move(START + 9 * BLOCK, 2 * BLOCK)
        where = START + 9 * BLOCK
        expected[where : where + BLOCK] = content[2 * BLOCK : 3 * BLOCK]
        assert_same(path.read_bytes(), bytes(expected), "after one")
        assert_same(place.buffer.pread(place.buffer.size, 0), content, "the buffer")


def test_a_short_read_is_no_read(path):
    with placed(path) as place, way(place, "read", "copy") as one:
        os.truncate(path, START + BLOCK + 1)
        with pytest.raises(OSError, match="1 of 8192 bytes were moved") as caught:
            one.run(segments(0, 1))
        assert caught.value.errno == errno.EIO


def test_a_route_that_is_not_taken(path, monkeypatch):
    """As where O_DIRECT turns out to go through the page cache."""
    with placed(path) as place, way(place, "read", "direct") as one:
        monkeypatch.setattr(type(place.file._target), "saw_cache", lies := Lies())
        monkeypatch.setattr(type(place.file._target), "cache_to_watch", lambda *_: True)
        with pytest.raises(dmabuf.RouteUnavailable, match="through the page cache all the same"):
            one.run(segments(0, 1, 2))
        assert lies.told


class Lies:
    """A look at the page cache that always finds the range there."""

    told = False

    def __get__(self, target, _kind):
        def saw(_offset, _size):
            self.told = True
            target.rule_out_direct("it went through the page cache all the same")

        return saw


# -- the page cache


def test_dropping_and_seeing(path):
    with placed(path, "r+") as place:
        fd = place.file.fileno()
        pages = cache.PageCache(fd, START, SIZE, "name")
        os.pread(fd, WHOLE, 0)
        assert pages.pages() == SIZE // PAGE == cache.mincore(fd, START, SIZE)
        assert pages.pages(BLOCK) == BLOCK // PAGE == cache.mincore(fd, START, BLOCK)
        os.pwrite(fd, b"dirty", START)
        assert pages.drop(dirty=True) == 0
        assert cached(fd, START, SIZE) == 0 == cache.mincore(fd, START, SIZE)


def test_a_folio_that_reaches_beyond_the_range(tmp_path):
    path = tmp_path / "target"
    path.write_bytes(bytes(4 << 20))  # in one write, so in large folios where there are some
    with dmabuf.open(path) as file:
        assert cache.PageCache(file.fileno(), 0, 64 << 10, "name").drop(dirty=True) == 0


def test_before_cachestat(path, monkeypatch):
    monkeypatch.setattr(facts, "cached_pages", lambda *_: None)
    with placed(path, "r+") as place:
        pages = cache.PageCache(place.file.fileno(), START, SIZE, "name")
        assert pages.pages() == 0
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
            os.pread(file.fileno(), 3 * PAGE, START + PAGE)
        assert pages.pages() == 3


def test_pages_that_stay(path, monkeypatch):
    monkeypatch.setattr(cache, "_PATIENCE", 0.02)
    with placed(path) as place:
        fd = place.file.fileno()
        pages = cache.PageCache(fd, START, SIZE, "name")
        with mmap.mmap(fd, WHOLE, prot=mmap.PROT_READ) as mapped:
            assert mapped[START] >= 0 and mapped[START + SIZE - 1] >= 0
            with pytest.raises(OSError, match="pages of it stay in the page cache") as caught:
                pages.drop(dirty=False)
            assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, "name")
            pages.stays = "a reason"
            assert pages.drop(dirty=False) > 0
        pages.stays = None
        assert pages.drop(dirty=False) == 0


# -- the rounds


def setting(**how):
    usual = {
        "directions": ("read", "write"),
        "blocks": (PAGE, BLOCK),
        "depths": (1, 4),
        "rounds": 3,
        "deadline": time.monotonic() + 600,
        "seed": 5,
    }
    return Setting(**(usual | how))


def measure(place, wanted, **how):
    return Bench(place, wanted, lambda *_: None, **how).run()


def test_every_way_once_a_round(path, monkeypatch):
    order = []

    class Noting(Bench):
        def _round(self, plan, title):
            def note(plan, entry):
                order[-1].append((plan.group.title, entry.row.label))
                return original(plan, entry)

            order.append([])
            original, self._measure = self._measure, note
            super()._round(plan, title)
            del self._measure

    with placed(path, "r+") as place:
        measured = Noting(place, setting(), lambda *_: None).run()
    assert measured.rounds == 3 and measured.warm is None and measured.unseen is None
    assert len(order) == 3 * 4
    labels = [
        *(f"{route} x{depth}" for route in ("direct", "staged", "buffered") for depth in (1, 4)),
        "copy", "bounce", "mmap",
    ]  # fmt: skip
    for group in measured.groups:
        assert [row.label for row in group.rows] == labels
        assert "no dma-buf" in group.refused["native"] and len(group.refused) == 1
        assert group.nbytes == SIZE
        rounds = [[label for title, label in one if title == group.title] for one in order]
        rounds = [one for one in rounds if one]
        assert [sorted(one) for one in rounds] == [sorted(labels)] * 3
        assert rounds[0] != rounds[1] or rounds[1] != rounds[2]
        for row in group.rows:
            assert len(row.samples) == 3
            for sample in row.samples:
                assert sample.before == 0 and sample.seconds > 0 <= sample.cpu
                through = row.way in ("buffered", "copy", "mmap")
                assert sample.after == (SIZE // PAGE if through else 0), (group.title, row.label)
        assert set(group.latencies) == {(row.way, row.depth) for row in group.rows}
        most = 3 * SIZE // group.block
        for (_, depth), latencies in group.latencies.items():
            assert 3 <= len(latencies) <= most and min(latencies) > 0
            assert len(latencies) == most or depth == 1


def test_the_seed_repeats_the_order(path):
    def order(seed):
        told = []
        with placed(path) as place:
            wanted = setting(directions=("read",), blocks=(BLOCK,), seed=seed, shuffled=True)
            Bench(place, wanted, lambda title, *_: told.append(title)).run()
        return [title for title in told if title.startswith("round")]

    assert order(1) == order(1) != order(2)


def test_random_blocks(path):
    with placed(path) as place:

        def blocks(**how):
            one = Bench(place, setting(**how), lambda *_: None)._segments(BLOCK, 16)
            assert all(one[i] - START == one[i + 1] for i in range(0, len(one), 3))
            return list(one[1::3])

        assert blocks() == [at * BLOCK for at in range(16)]
        assert blocks(shuffled=True) != blocks()
        assert sorted(blocks(shuffled=True)) == blocks()


def test_no_time_is_one_block_and_one_round(path):
    with placed(path) as place:
        measured = measure(place, setting(deadline=time.monotonic() - 1, directions=("read",)))
    assert measured.rounds == 1
    for group in measured.groups:
        assert group.nbytes == group.block
        assert all(len(row.samples) == 1 for row in group.rows)
        assert all(len(calls) >= 1 for calls in group.latencies.values())


def test_rounds_end_in_time(path):
    """By a clock on which each look takes a second: a round is two looks."""
    now = iter(range(100))
    with placed(path) as place:
        wanted = setting(directions=("read",), rounds=50, deadline=7)
        measured = measure(place, wanted, clock=lambda: next(now))
    assert 1 < measured.rounds < 5


def test_a_slow_warm_up_makes_runs_small(path):
    class Slow(Bench):
        def _warm_up(self, plan, reference):
            super()._warm_up(plan, reference)
            compared.append(plan.group.nbytes)
            now[0] = 99.0

    compared, now = [], [0.0]
    with placed(path) as place:
        wanted = setting(directions=("read",), deadline=100)
        measured = Slow(place, wanted, lambda *_: None, clock=lambda: now[0]).run()
        assert all(nbytes == SIZE for nbytes in compared) and measured.rounds == 3
        now[0], wanted = 0.0, setting(directions=("read",), deadline=99)
        measured = Slow(place, wanted, lambda *_: None, clock=lambda: now[0]).run()
    assert [group.nbytes for group in measured.groups] == [PAGE, BLOCK]


@pytest.mark.parametrize(("direction", "verb"), [("read", "_get"), ("write", "_put")])
@pytest.mark.parametrize("name", ["copy", "mmap"])
def test_a_broken_way_is_not_measured(path, monkeypatch, direction, verb, name):
    kind = {"copy": ways.Copying, "mmap": ways.Mapping}[name]
    right = getattr(kind, verb)

    def wrong(self, view, offset, at):
        if offset != START + 3 * BLOCK:  # one block is left as it was
            right(self, view, offset, at)

    monkeypatch.setattr(kind, verb, wrong)
    with placed(path, "r+") as place, pytest.raises(dmabuf.IntegrityError) as caught:
        measure(place, setting(directions=(direction,), blocks=(BLOCK,), rounds=1))
    assert caught.value.offset in range(START + 3 * BLOCK, START + 4 * BLOCK)
    assert f"{name} moved the wrong bytes" in str(caught.value)


def test_a_kernel_that_shows_no_page(path, monkeypatch):
    """As on overlayfs, where cachestat looks at the upper inode."""
    monkeypatch.setattr(facts, "cached_pages", lambda *_: 0)
    with placed(path) as place:
        measured = measure(place, setting(directions=("read",), rounds=1))
    assert measured.unseen == "the kernel shows no page of it after a buffered read"


@needs("root")
def test_a_file_of_someone_else(path, monkeypatch):
    """mincore(2) says that all of it is cached, and newer kernels refuse cachestat(2): EPERM."""
    monkeypatch.setattr(facts, "cached_pages", lambda *_: None)
    os.chmod(path, 0o644)

    def look():
        fd = os.open(path, os.O_RDONLY)
        os.seteuid(65534)
        pages = cache.PageCache(fd, START, SIZE, "name")
        assert pages.unseen and pages.pages() == 0 == pages.drop(dirty=True)
        os.seteuid(0)
        os.chown(path, 65534, -1)
        os.seteuid(65534)
        assert cache.PageCache(fd, START, SIZE, "name").unseen is None
        os.seteuid(0)
        os.chown(path, 0, -1)
        os.chmod(path, 0o666)
        os.seteuid(65534)
        assert cache.PageCache(fd, START, SIZE, "name").unseen is None

    in_child(look)


def test_memory_filesystems_are_never_cold():
    file = f"/dev/shm/dmabuf-test-{os.getpid()}"
    try:
        with open(file, "wb") as made:
            made.write(pattern(WHOLE, 1))
        with placed(file) as place:
            measured = measure(place, setting(directions=("read",), rounds=1))
    finally:
        os.unlink(file)
    assert measured.warm == "tmpfs keeps its files in the page cache, so nothing is cold"
    for group in measured.groups:
        assert {row.way for row in group.rows} == {"buffered", "copy", "mmap"}
        assert set(group.refused) == {"native", "direct", "staged", "bounce"}


@needs("zram")
def test_a_block_device():
    with zram(SIZE + START) as device:
        with open(device, "r+b", buffering=0) as file:
            file.write(pattern(SIZE + START, 1))
        with placed(device, "r+") as place:
            measured = measure(place, setting(rounds=1))
    for group in measured.groups:
        assert {row.way for row in group.rows} == set(NAMES)
        assert all(row.samples[0].before == 0 for row in group.rows)


# -- the scratch file


def test_a_file_without_a_name(tmp_path):
    with scratch.scratch(str(tmp_path)) as fd:
        assert os.listdir(tmp_path) == []
        done = scratch.fill(fd, 9 << 20, 0, 3, time.monotonic() + 60, lambda _: None)
        assert done == 9 << 20 == os.fstat(fd).st_size
        assert cached(fd) and not _dirty(fd)
        content = os.pread(fd, 9 << 20, 0)
        assert len({content[at : at + PAGE] for at in range(0, 9 << 20, PAGE)}) == (9 << 20) // PAGE
    assert os.listdir(tmp_path) == []


def _dirty(fd):
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return cached(fd)


def test_filling_ends_in_time(tmp_path):
    with scratch.scratch(str(tmp_path)) as fd:
        assert scratch.fill(fd, 64 << 20, 5 << 20, 3, 0, lambda _: None) == 8 << 20


def test_no_room(tmp_path):
    with scratch.scratch(str(tmp_path)) as fd:
        free = os.fstatvfs(fd)
        with pytest.raises(OSError, match="give a smaller --size, or another --dir") as caught:
            scratch.check_space(fd, free.f_blocks * free.f_frsize, "folder")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "folder")
        scratch.check_space(fd, 1, "folder")


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="a scratch file cannot be made there"):
        with scratch.scratch(str(tmp_path / "none")):
            raise AssertionError


def test_why_warm(path):
    with dmabuf.open(path) as file:
        assert run.why_warm(file) is None

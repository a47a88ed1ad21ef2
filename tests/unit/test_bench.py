"""The benchmark: every way moves the right bytes, and its figures claim no more than they show."""

import errno
import os
from array import array
from pathlib import Path

import pytest

import dmabuf
from dmabuf.inspect import Group, Result, Row, Sample, measure_routes
from dmabuf.kernel import files
from tests.guards import needs
from tests.support import PAGE, assert_same, pattern, raises_errno, zram

BLOCK = 2 * PAGE
START, SIZE = 4 * PAGE, 16 * BLOCK
WHOLE = START + SIZE + 3 * PAGE
NAMES = ("direct", "staged", "buffered", "copy", "bounce", "mmap")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.write_bytes(pattern(WHOLE, 3))
    return path


def measure(path: object, **how: object) -> Result:
    how = {"blocks": (PAGE, BLOCK), "depths": (1, 4), "rounds": 3, "seed": 5, "size": SIZE} | how
    return measure_routes(str(path), exporter="memfd", **how)


@pytest.mark.parametrize("region", [None, (START, SIZE)], ids=["reads", "reads and writes"])
def test_what_is_measured(path: Path, region: tuple[int, int] | None) -> None:
    before, titles = path.read_bytes(), []
    result = measure(path, region=region, progress=lambda title, *_: titles.append(title))
    assert (result.rounds, result.warm, result.unseen) == (3, None, None)
    directions = ["read", "write"] if region else ["read"]
    assert [(group.direction, group.block) for group in result.groups] == [
        (direction, block) for direction in directions for block in (PAGE, BLOCK)
    ]
    labels = [f"{route} x{depth}" for route in NAMES[:3] for depth in (1, 4)] + list(NAMES[3:])
    for group in result.groups:
        assert [row.label for row in group.rows] == labels
        assert list(group.refused) == ["native"]
        assert "not a dma-buf" in group.refused["native"]
        for row in group.rows:
            assert len(row.samples) == 3
            cached = group.nbytes // PAGE if row.way in ("buffered", "copy", "mmap") else 0
            for sample in row.samples:
                assert sample.before == 0 and sample.seconds > 0 <= sample.cpu
                assert sample.after == cached, (group.title, row.label)
        assert list(group.latencies) == list(NAMES)
        for calls in group.latencies.values():
            assert 3 <= len(calls) <= 3 * SIZE // group.block and min(calls) > 0
    # In each round each way once, in an order of its own.
    for group in result.groups:
        rounds = [
            [title for title in titles if title.startswith(f"round {n} of 3: {group.title}, ")]
            for n in (1, 2, 3)
        ]
        orders = [[title.rpartition(", ")[2] for title in one] for one in rounds]
        assert [sorted(order) for order in orders] == [sorted(labels)] * 3
        assert orders[0] != orders[1] or orders[1] != orders[2]
    after = path.read_bytes()
    if region is None:
        assert_same(after, before, "the target")
    else:
        assert_same(after[:START], before[:START], "before the region")
        assert_same(after[START + SIZE :], before[START + SIZE :], "after the region")


def test_the_seed_repeats_the_order(path: Path) -> None:
    def order(seed: int) -> list[str]:
        titles: list[str] = []
        measure(path, seed=seed, blocks=(BLOCK,), progress=lambda title, *_: titles.append(title))
        return [title for title in titles if title.startswith("round")]

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_order_of_blocks(path: Path, monkeypatch, shuffled: bool) -> None:
    seen: list[list[int]] = []
    read = dmabuf.File.read_segments

    def reading(file, buffer, segments, **how):
        seen.append(list(segments))
        return read(file, buffer, segments, **how)

    monkeypatch.setattr(dmabuf.File, "read_segments", reading)
    measure(path, blocks=(BLOCK,), depths=(1,), rounds=1, shuffled=shuffled)
    longest = max(seen, key=len)
    places = longest[1::3]
    assert longest[0::3] == places  # the range begins at the file's start
    assert set(longest[2::3]) == {BLOCK}
    assert sorted(places) == list(range(0, len(places) * BLOCK, BLOCK))
    assert (places != sorted(places)) == shuffled


def test_a_bound_of_time(path: Path) -> None:
    """One round of one block is always done."""
    result = measure(path, seconds=0.001)
    assert result.rounds == 1
    for group in result.groups:
        assert group.nbytes == group.block
        assert all(len(row.samples) == 1 for row in group.rows)
        assert all(len(calls) >= 1 for calls in group.latencies.values())
    assert 1 <= measure(path, seconds=0.3, rounds=100_000).rounds < 100_000


@pytest.mark.parametrize("direction", ["read", "write"])
@pytest.mark.parametrize("way", ["route", "copy"])
def test_a_way_that_moves_wrong_bytes_is_not_measured(
    path: Path, monkeypatch, direction: str, way: str
) -> None:
    """One byte of one block is wrong."""
    place = START + 3 * BLOCK
    if way == "route":
        verb = f"{direction}_segments"
        move = getattr(dmabuf.File, verb)

        def moving(file, buffer, segments, **how):
            record = move(file, buffer, segments, **how)
            if place in segments[0::3]:
                if direction == "read":
                    at = 3 * BLOCK + 7
                    buffer.pwrite(bytes([buffer.pread(1, at)[0] ^ 1]), at)
                else:
                    spoil(path, place + 7)
            return record

        monkeypatch.setattr(dmabuf.File, verb, moving)
    else:
        verb = {"read": "preadv", "write": "pwritev"}[direction]
        call = getattr(os, verb)

        def calling(fd, buffers, offset, *flags):
            done = call(fd, buffers, offset, *flags)
            if offset == place and len(buffers[0]) == BLOCK:
                if direction == "read":
                    buffers[0][7] ^= 1
                else:
                    spoil(path, place + 7)
            return done

        monkeypatch.setattr(os, verb, calling)
    with pytest.raises(dmabuf.IntegrityError) as caught:
        measure(path, blocks=(BLOCK,), rounds=1, region=(START, SIZE))
    assert caught.value.offset == place + 7
    label = "direct x1" if way == "route" else "copy"
    assert f"{label} moved wrong bytes, the first at offset {place + 7}" in str(caught.value)


def spoil(path: Path, at: int) -> None:
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)


def test_a_read_that_ends_early(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 1)
    with raises_errno(errno.EIO, "1 of 4096 bytes were moved at offset 0", filename=str(path)):
        measure(path)


def test_a_kernel_that_shows_no_page(path: Path, monkeypatch) -> None:
    """As on overlayfs, where cachestat examines the upper inode; and before Linux 6.5."""
    monkeypatch.setattr(files, "cached_pages", lambda *_: 0)
    result = measure(path, rounds=1)
    assert result.unseen == "the kernel reports no page of it after a buffered read"
    monkeypatch.setattr(files, "cached_pages", lambda *_: None)
    result = measure(path, rounds=1)
    assert "cachestat(2) needs Linux 6.5" in result.unseen
    assert result.residency(result.groups[0].rows[0], result.groups[0]) is None


def test_pages_that_stay(path: Path, monkeypatch) -> None:
    """Another program uses the file all the time."""
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    with (
        path.open("rb") as file,
        raises_errno(errno.EBUSY, "stay in the page cache", filename=str(path)),
    ):
        file.read()
        measure(path)


def test_memory_filesystems_are_never_cold() -> None:
    file = Path(f"/dev/shm/dmabuf-test-{os.getpid()}")
    try:
        file.write_bytes(pattern(WHOLE, 1))
        result = measure(file, rounds=1)
    finally:
        file.unlink()
    assert result.warm == "tmpfs keeps its files in the page cache, so nothing is cold"
    for group in result.groups:
        assert {row.way for row in group.rows} == {"buffered", "copy", "mmap"}
        assert set(group.refused) == {"native", "direct", "staged", "bounce"}


@needs("zram")
def test_a_block_device() -> None:
    with zram(SIZE + START) as device:
        with open(device, "r+b", buffering=0) as file:
            file.write(pattern(SIZE + START, 1))
        result = measure(device, rounds=1, region=(START, SIZE))
    assert (len(result.groups), result.warm, result.unseen) == (4, None, None)
    for group in result.groups:
        assert {row.way for row in group.rows} == set(NAMES)
        assert all(row.samples[0].before == 0 for row in group.rows)


# -- figures


def group_of(direction: str = "read", **seconds: list[float]) -> Group:
    """A group with one row for each way, from the seconds of its rounds."""
    group = Group(direction, 1 << 20, nbytes=64 << 20)
    for way, each in seconds.items():
        samples = [Sample(seconds=one, cpu=0.25, before=0, after=0) for one in each]
        group.rows.append(Row(way, 32 if way == "direct" else 1, samples=samples))
    return group


@pytest.mark.parametrize(
    ("direct", "copy", "median", "certain"),
    [
        ([1.0, 5.0, 3.0], [2.0, 20.0, 4.0], 2.0, False),  # 2, 4 and 1.33: wide, though all agree
        ([1.0, 1.0, 1.0], [2.0, 2.2, 1.9], 2.0, True),
        ([2.0, 2.2, 1.9], [1.0, 1.0, 1.0], 0.5, True),
        ([1.0, 1.0, 1.0], [1.02, 0.99, 1.05], 1.02, False),  # they do not agree
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 1.0, False),
        ([1.0, 1.0], [2.0, 2.0], 2.0, False),  # too few rounds
        ([1.0, 1.0, 1.0], [1.01, 1.2, 1.05], 1.05, False),  # less than half of the range
    ],
)
def test_a_difference_within_the_noise_is_not_claimed(direct, copy, median, certain) -> None:
    group = group_of(direct=direct, copy=copy)
    figure = group.ratio(group.row("direct"))
    assert figure.median == pytest.approx(median)
    pairs = [theirs / ours for ours, theirs in zip(direct, copy, strict=True)]
    assert (figure.low, figure.high) == (min(pairs), max(pairs))
    assert figure.certain == certain
    line = group.headline()
    assert line.startswith("read 1 MiB: direct x32 is ")
    claim = f"{figure.median:.2f} times as fast as a buffered read and a copy"
    assert (claim in line) == certain
    assert ("not measurably faster or slower than" in line) != certain
    assert f"(ratio {figure.low:.2f} to {figure.high:.2f} in {len(direct)} rounds)" in line


def test_figures_of_a_group() -> None:
    group = group_of(direct=[1.0, 3.0], copy=[2.0, 6.0])
    copy = group.row("copy")
    assert group.speed(copy) == (64 << 20) / 4.0
    assert group.cpu(copy) == 0.25 * 16
    assert group.ratio(copy) is None and group.ratio(copy, "mmap") is None
    assert group.ratio(copy, "direct").median == 0.5
    assert group_of(copy=[1.0]).headline() is None
    written = group_of("write", buffered=[1.0] * 3, copy=[2.0] * 3).headline()
    assert "2.00 times as fast as a copy and a buffered write" in written


def test_percentiles_by_nearest_rank() -> None:
    group = group_of(copy=[1.0])
    for count, expected in (
        (1000, {"p50": 500, "p99": 990, "p99.9": 999, "p100": 1000}),
        (100, {"p50": 50, "p99": 99, "p99.9": None, "p100": 100}),
        (3, {"p50": 2, "p99": None, "p99.9": None, "p100": 3}),
        (1, {"p50": None, "p99": None, "p99.9": None, "p100": 1}),
        (0, {"p50": None, "p99": None, "p99.9": None, "p100": None}),
    ):
        group.latencies["copy"] = array("d", range(count, 0, -1))
        assert group.percentiles("copy") == expected

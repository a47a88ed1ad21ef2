"""copy(): sizes, the pool, progress and order; the ends are in test_pipeline_ends.py."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dmabuf
from dmabuf import exporters
from dmabuf._ahead import piece
from dmabuf.pipeline import Copy, copy
from dmabuf.route import ALLOWED
from tests.support import assert_same, pattern, poison

BLOCK = 64 << 10
SIZE = 3 * BLOCK + 123
DATA = pattern(SIZE, 7)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No copy leaves a thread or descriptor; the suite as a whole is held to mappings, too."""
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before


SIZES = [0, 1, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5, 5 * BLOCK]


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_pools(size: int, blocks: int, tmp_path: Path) -> None:
    data = pattern(size, size)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(poison(BLOCK))
    record = copy(tmp_path / "a", tmp_path / "b", block_size=BLOCK, blocks=blocks, sync=True)
    assert_same((tmp_path / "b").read_bytes(), data, "the target")
    assert record.nbytes == size
    assert record.allocated <= blocks * BLOCK


def test_no_more_than_the_pool_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    allocate = exporters.allocate

    def counted(size: int, **how: object) -> dmabuf.Buffer:
        sizes.append(size)
        return allocate(size, **how)

    monkeypatch.setattr(exporters, "allocate", counted)
    (tmp_path / "a").write_bytes(bytes(100 * BLOCK))
    record = copy(tmp_path / "a", tmp_path / "b", block_size=BLOCK, blocks=3)
    assert sizes == [BLOCK] * 3
    assert record.allocated == 3 * BLOCK


@given(left=st.integers(1, 10**9), pages=st.integers(1, 4096))
def test_pieces_add_up_and_the_last_is_no_crumb(left: int, pages: int) -> None:
    block = pages * 4096
    left %= 20 * block + 1
    total, sizes = left, []
    while left:
        sizes.append(piece(left, block))
        left -= sizes[-1]
    assert sum(sizes) == total
    assert all(0 < size <= block for size in sizes)
    assert all(size % 4096 == 0 for size in sizes[:-1])
    if len(sizes) > 1:
        assert sizes[-1] >= min(1 << 20, block // 4) // 4096 * 4096


def test_the_tail_goes_by_the_route_of_the_rest(tmp_path: Path) -> None:
    """A few bytes alone could not go directly, and require= would refuse them."""
    size = 2 * BLOCK + 5
    (tmp_path / "a").write_bytes(pattern(size, 1))
    with dmabuf.allocate(BLOCK) as buffer, dmabuf.open(tmp_path / "a") as file:
        route = file.plan(buffer).route
        if route not in ALLOWED["zero-copy"]:
            pytest.skip("the temporary folder takes no O_DIRECT: set TMPDIR to a disk")
    record = copy(tmp_path / "a", tmp_path / "b", block_size=BLOCK, require="zero-copy")
    assert_same((tmp_path / "b").read_bytes(), pattern(size, 1), "the target")
    assert record.read.routes == {route: size}
    assert record.write.routes == {route: size}
    assert record.copied < 3 * 4096


def test_offsets_leave_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    (tmp_path / "b").write_bytes(poison(SIZE))
    copy(
        tmp_path / "a", tmp_path / "b", src_offset=1000, dst_offset=5000, size=70_000,
        block_size=BLOCK,
    )  # fmt: skip
    expected = bytearray(poison(SIZE))
    expected[5000:75_000] = DATA[1000:71_000]
    assert_same((tmp_path / "b").read_bytes(), bytes(expected), "the target")


def test_files_without_a_size() -> None:
    with dmabuf.allocate("64KiB") as buffer:
        record = copy("/proc/version", buffer)
        assert buffer.pread(record.nbytes, 0) == Path("/proc/version").read_bytes()
        path = "/sys/kernel/mm/transparent_hugepage/enabled"  # it tells 4096, and has 23
        if Path(path).exists():
            record = copy(path, buffer)
            assert buffer.pread(record.nbytes, 0) == Path(path).read_bytes()


def test_explicit_engine_stays_in_its_thread(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    with dmabuf.Engine() as engine:
        with (
            dmabuf.open(tmp_path / "a", engine=engine) as src,
            dmabuf.open(tmp_path / "b", "w", engine=engine) as dst,
        ):
            copy(src, dst, block_size=BLOCK)
        assert_same((tmp_path / "b").read_bytes(), DATA, "the target")


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(DATA)
    calls: list[tuple[int, int | None]] = []
    copy(tmp_path / "a", tmp_path / "b", progress=lambda *now: calls.append(now))
    assert calls[-1] == (SIZE, SIZE)
    calls.clear()
    monkeypatch.setattr("dmabuf.pipeline._TICK", 0)
    copy(tmp_path / "a", tmp_path / "b", progress=lambda *now: calls.append(now), block_size=BLOCK)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) >= 4
    assert {total for _, total in calls} == {SIZE}
    read, write = os.pipe()
    os.write(write, b"abc")
    os.close(write)
    calls.clear()
    copy(read, tmp_path / "b", progress=lambda *now: calls.append(now))
    os.close(read)
    assert calls[-1] == (3, 3)


def test_progress_is_called_ten_times_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    (tmp_path / "a").write_bytes(bytes(50 * BLOCK))
    calls: list[int] = []
    seen = lambda done, _total: calls.append(done)  # noqa: E731
    write = dmabuf.File.write_from

    def slow(*args: object, **how: object) -> dmabuf.Transfer:
        now[0] += 0.04  # a block takes so long
        return write(*args, **how)

    monkeypatch.setattr(dmabuf.File, "write_from", slow)
    copy(
        tmp_path / "a",
        tmp_path / "b",
        block_size=BLOCK,
        progress=seen,
    )
    assert len(calls) == pytest.approx(50 * 0.04 / 0.12, abs=2)


def test_a_stream_is_handed_on_at_once() -> None:
    """Source and target are one peer, who sends the next byte when he has got the last one."""
    ours, theirs = socket.socketpair()
    with ours, theirs, suppress(TimeoutError):
        theirs.settimeout(20)
        result: list[Copy] = []
        thread = threading.Thread(target=lambda: result.append(copy(ours, ours)))
        thread.start()
        for number in range(50):
            theirs.sendall(bytes([number]) * 3)
            got = b""
            while len(got) < 3:
                got += theirs.recv(3)
            assert got == bytes([number]) * 3
        theirs.shutdown(socket.SHUT_WR)
        thread.join()
    assert result[0].nbytes == 150


def test_fifos_opened_in_either_order(tmp_path: Path) -> None:
    """The peer opens the target first and the source later: waiting for a writer would hang."""
    source, target = tmp_path / "in", tmp_path / "out"
    os.mkfifo(source)
    os.mkfifo(target)
    got: list[bytes] = []

    def peer() -> None:
        with target.open("rb") as there, source.open("wb", buffering=0) as here:
            here.write(b"question")
            got.append(there.read(8))

    thread = threading.Thread(target=peer)
    thread.start()
    copy(source, target)
    thread.join()
    assert got == [b"question"]


def test_two_copies_share_the_rings(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    names = [tmp_path / str(number) for number in range(6)]
    threads = [
        threading.Thread(target=copy, args=(tmp_path / "a", name), kwargs={"block_size": BLOCK})
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert_same(name.read_bytes(), DATA, str(name))

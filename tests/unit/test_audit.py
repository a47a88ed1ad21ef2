"""Proof of arrival, where a completion is full-length and the bytes are wrong all the same."""

import errno
import fcntl
import os
import pickle
import threading
import tracemalloc
from array import array

import pytest

import dmabuf
from dmabuf import Route
from dmabuf.transfer import audit
from dmabuf.transfer.plan import AUDIT_OFF
from tests.support import Filter, assert_same, drop_cache, pattern, raises_errno
from tests.unit import lying
from tests.unit.lying import Lying, content, dma_buf

SIZE = 300 * 1024
FILE_OFFSET, OFFSET, NBYTES = 20 * 1024, 12 * 1024, 200 * 1024
WHERE = {"size": NBYTES, "file_offset": FILE_OFFSET, "buffer_offset": OFFSET}
DIRECTIONS = ("read", "write")


pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture
def engine():
    with Lying(backend="threads", queue_depth=4, block_size=8192) as engine:
        yield engine


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    os.sync()
    return path


@pytest.fixture
def buf():
    with dma_buf(SIZE) as buf:
        buf.pwrite(pattern(SIZE, 2), 0)
        yield buf


@pytest.fixture
def file(path, engine):
    with dmabuf.open(path, "r+", engine=engine) as file:
        yield file


def move(file, direction, buffer, **how):
    call = file.read_into if direction == "read" else file.write_from
    return call(buffer, **(WHERE | how))


def other(direction):
    return "write" if direction == "read" else "read"


# -- what is right


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_of_each_direction_and_then_samples(file, path, buf, direction, monkeypatch):
    there, here = path.read_bytes(), content(buf)
    first = move(file, direction, buf)
    assert first.route is Route.NATIVE
    assert first.audited.startswith("every byte of 200 KiB compared, read past the page cache")
    second = move(file, direction, buf)
    assert second.route is Route.NATIVE
    assert second.audited == "8 pages of 200 KiB compared, read past the page cache"
    monkeypatch.setattr(audit, "SHARE", 0)  # of the time
    third = move(file, direction, buf)
    assert third.audited == f"not audited: the first {direction} of fake on this device was"
    assert "every byte" in move(file, other(direction), buf).audited
    if direction == "read":
        expected = bytearray(here)
        expected[OFFSET : OFFSET + NBYTES] = there[FILE_OFFSET : FILE_OFFSET + NBYTES]
        assert_same(content(buf), bytes(expected), "the buffer, around the range too")
    else:
        expected = bytearray(there)
        expected[FILE_OFFSET : FILE_OFFSET + NBYTES] = here[OFFSET : OFFSET + NBYTES]
        assert_same(path.read_bytes(), bytes(expected), "the file, around the range too")


def test_another_exporter_is_another_pair_and_another_open_file_is_not(file, path, buf, engine):
    assert "every byte" in file.read_into(buf).audited
    with dma_buf(SIZE, exporter="another") as other:
        assert "every byte" in file.read_into(other).audited
    with dmabuf.open(path, engine=engine) as again, dma_buf(SIZE) as same:
        assert "8 pages" in again.read_into(same).audited


@pytest.mark.parametrize("where", [{"size": 0}, {"size": 4096, "file_offset": 1 << 40}])
def test_a_read_of_nothing_says_so(file, buf, where):
    for asked in ("first", "always"):
        assert file.read_into(buf, **where, audit=asked).audited == audit.NOTHING
    assert file.read_into(buf, **where, audit="off").audited == AUDIT_OFF


def test_a_stream_says_what_was_asked():
    reader, writer = os.pipe()
    os.write(writer, b"ab")
    with dmabuf.allocate(4096, exporter="memfd") as buf, dmabuf.open(reader) as file:
        assert "only the native route is" in file.read_into(buf, 1).audited
        assert file.read_into(buf, 1, audit="off").audited == AUDIT_OFF
    os.close(reader)
    os.close(writer)


def test_off_compares_nothing(file, buf, engine):
    engine.fault = lying.zeros
    transfer = file.read_into(buf, **WHERE, audit="off")
    assert transfer.audited == "not audited: audit='off'"
    engine.fault = None
    assert "every byte" in file.read_into(buf, **WHERE).audited


def test_first_does_not_act_on_other_routes(file, buf):
    for route in ("direct", "staged", "buffered"):
        for direction in DIRECTIONS:
            transfer = move(file, direction, buf, route=route)
            assert (
                transfer.audited == "not audited: only the native route is, unless audit='always'"
            )


@pytest.mark.parametrize("route", ["native", "direct", "staged", "buffered"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_always_compares_every_transfer_on_any_route(file, buf, engine, direction, route):
    for _ in range(2):
        assert "every byte" in move(file, direction, buf, route=route, audit="always").audited
    engine.fault, engine.routes = lying.last_byte, tuple(Route)
    with pytest.raises(dmabuf.IntegrityError) as caught:
        move(file, direction, buf, route=route, audit="always")
    assert caught.value.offset == FILE_OFFSET + NBYTES - 1
    assert caught.value.nbytes == NBYTES - 1


def test_always_compares_a_lone_small_request(path, buf):
    with dmabuf.open(path) as file:
        drop_cache(file.fileno())  # so that the first transfer shows that O_DIRECT is what it says
        file.read_into(buf)
        lone = file.read_into(buf, 4096, route="direct")
        assert "one small request" in lone.registration and "not audited" in lone.audited
        assert "every byte" in file.read_into(buf, 4096, route="direct", audit="always").audited


def test_the_end_of_the_file_within_the_range(file, path, buf):
    os.truncate(path, SIZE - 100)
    before = content(buf)
    transfer = file.read_into(buf, 64 * 1024, file_offset=SIZE - 8192, audit="always")
    assert transfer.nbytes == 8192 - 100 and "every byte" in transfer.audited
    assert content(buf)[8192 - 100 :] == before[8192 - 100 :]


def test_a_file_that_grows_and_may_not_be_read(tmp_path, buf, engine):
    with dmabuf.open(tmp_path / "new", "w", engine=engine) as file:
        transfer = file.write_from(buf, SIZE - 5)
    assert transfer.route is Route.NATIVE and "every byte of" in transfer.audited
    assert (tmp_path / "new").read_bytes() == content(buf)[: SIZE - 5]


# -- what is wrong


@pytest.mark.parametrize(
    ("direction", "fault", "kind"),
    [
        ("read", lying.nothing, "unchanged"),
        ("read", lying.zeros, "zeros"),
        ("read", lying.shifted, "shifted"),
        ("read", lying.foreign, "foreign"),
        ("read", lambda right, before: pattern(SIZE, 2)[OFFSET : OFFSET + NBYTES], "stale"),
        ("write", lying.nothing, "stale"),
        ("write", lying.zeros, "zeros"),
        ("write", lying.shifted, "shifted"),
        ("write", lying.foreign, "foreign"),
    ],
)
def test_a_completion_that_did_not_move_the_bytes(file, path, buf, engine, direction, fault, kind):
    engine.fault = fault
    with pytest.raises(dmabuf.IntegrityError, match=f"{kind}\\)") as caught:
        move(file, direction, buf)
    error = caught.value
    assert error.errno == errno.EIO and error.filename == str(path)
    assert error.offset == FILE_OFFSET and error.nbytes == 0
    assert max(error.counts, key=error.counts.get) == kind
    assert NBYTES * 0.99 < sum(error.counts.values()) <= NBYTES
    assert pickle.loads(pickle.dumps(error)).counts == error.counts
    for again in DIRECTIONS:  # the pair is marked, and its transfers take the next route
        transfer = move(file, again, buf)
        assert transfer.route is Route.DIRECT
        assert transfer.rejected[Route.NATIVE] == file.plan(buf, again).rejected[Route.NATIVE]
        assert "an audit found wrong bytes" in transfer.rejected[Route.NATIVE]
        assert kind in transfer.rejected[Route.NATIVE]
    with pytest.raises(dmabuf.RouteUnavailable, match="an audit found wrong bytes"):
        move(file, "read", buf, route="native")
    with dma_buf(SIZE, exporter="another") as unmarked:
        engine.fault = None
        assert file.read_into(unmarked).route is Route.NATIVE


def cut(right, before):
    return right[:70_001] + before[70_001:]


def late(right, before):
    """Return them 100 bytes late, as after a wrong offset in a scatter list."""
    return right[:100] + right[:-100]


def swapped(right, before):
    return right[8192:16384] + right[:8192] + right[16384:]


@pytest.mark.parametrize("route", ["native", "direct", "staged", "buffered"])
@pytest.mark.parametrize(
    ("direction", "fault", "first", "kinds"),
    [
        ("read", lying.nothing, 0, {"unchanged"}),
        ("read", cut, 70_001, {"partial", "unchanged"}),
        ("read", late, 100, {"shifted"}),
        ("read", swapped, 0, {"misdirected"}),
        ("read", lambda right, before: pattern(SIZE, 2)[OFFSET:][:NBYTES], 0, {"stale"}),
        ("write", lying.nothing, 0, {"stale"}),
        ("write", cut, 70_001, {"stale"}),
        ("write", late, 100, {"shifted"}),
        ("write", swapped, 0, {"misdirected"}),
    ],
)
def test_every_kind_on_every_route(
    file, path, buf, engine, route, direction, fault, first, kinds, caplog
):
    engine.fault, engine.routes = fault, tuple(Route)
    with pytest.raises(dmabuf.IntegrityError) as caught:
        move(file, direction, buf, route=route, audit="always")
    error = caught.value
    assert set(error.counts) == kinds
    # The poison is random: some of its bytes may be those that should have come.
    assert error.offset == FILE_OFFSET + error.nbytes and first <= error.nbytes < first + 16
    lines = error.report.splitlines()
    assert f"{direction} by the {route} route, threads, Linux {os.uname().release}" in lines[0]
    assert lines[1].startswith(f"exporter: fake, {SIZE} bytes in 1 dma-bufs")
    assert lines[2].startswith(f"device: {audit.device_of(file.fileno())}")
    assert lines[3] == f"range: {NBYTES} bytes, file offset {FILE_OFFSET}, buffer offset {OFFSET}"
    where = f": file offset {error.offset}, buffer offset {OFFSET + error.nbytes}"
    assert any(line.endswith(where) for line in lines), error.report
    assert any(line.startswith("poison: ") for line in lines) == (direction == "read")
    engine.fault = None
    if route == "buffered":  # there is no other
        assert move(file, direction, buf, route=route).route == route
        return
    assert error.report in caplog.text
    with pytest.raises(dmabuf.RouteUnavailable, match="an audit found wrong bytes"):
        move(file, direction, buf, route=route)
    assert move(file, direction, buf).route is not Route(route)


def test_bytes_that_went_to_another_place_of_the_buffer(file, buf, engine):
    def beside(right, before):
        os.pwrite(buf.slabs[0].fd, right, OFFSET + NBYTES + 512)
        return before

    engine.fault = beside
    with pytest.raises(dmabuf.IntegrityError, match="misdirected") as caught:
        move(file, "read", buf, size=40960, file_offset=4096)
    assert caught.value.counts.keys() == {"misdirected"}
    assert f"by {NBYTES + 512:+} bytes" in caught.value.report


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_later_transfer_that_moves_nothing(file, buf, engine, direction):
    assert "every byte" in move(file, direction, buf).audited
    if direction == "write":
        buf.pwrite(pattern(SIZE, 7), 0)
    engine.fault = lying.nothing
    with pytest.raises(dmabuf.IntegrityError) as caught:
        move(file, direction, buf)
    assert sum(caught.value.counts.values()) > 8 * 4096 * 0.99
    assert caught.value.nbytes == 0
    assert move(file, direction, buf).route is Route.DIRECT


def test_samples_of_many_segments_and_of_the_end_of_the_file(file, path, buf):
    os.truncate(path, SIZE - 100)
    assert "every byte" in file.read_into(buf).audited
    assert "8 pages" in file.read_into(buf, SIZE).audited
    audit.PAIRS.ledger("fake", file.target.device(), "read").moving += 1e9
    segments = [(at * 8192, at * 8192, 512 * (1 + at % 8)) for at in range(30)]
    flat = array("Q", [number for segment in segments for number in segment])
    before = bytearray(content(buf))
    there = path.read_bytes()
    assert "8 pages of" in file.read_segments(buf, flat).audited
    for at, start, size in segments:
        before[start : start + size] = there[at : at + size]
    assert_same(content(buf), bytes(before), "the buffer, around the samples too")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_file_that_cannot_be_read_again(file, path, buf, direction, monkeypatch):
    def refuse(_fd, views, _offset):
        views.clear()  # which the exception would hold
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        with raises_errno(
            errno.EIO, "cannot be read again: Input/output error", nbytes=0
        ) as caught:
            move(file, direction, buf)
    assert caught.value.filename == str(path)
    assert "every byte" in move(file, direction, buf).audited


def test_a_sample_has_eight_pages_or_all(file, buf):
    assert "every byte" in move(file, "read", buf).audited
    audit.PAIRS.ledger("fake", file.target.device(), "read").moving += 1e9
    for _ in range(100):
        assert move(file, "read", buf).audited.startswith("8 pages of 200 KiB")
    assert move(file, "read", buf, size=20 * 1024).audited.startswith("5 pages of 20 KiB")


def test_a_sample_ends_where_the_read_ends(file, buf):
    """Another program cuts the file during the read, and writes it again before the audit."""
    assert "every byte" in move(file, "read", buf).audited
    audit.PAIRS.ledger("fake", file.target.device(), "read").moving += 1e9
    with Filter(lambda completion: 0 if completion.offset >= 65536 else completion.result):
        transfer = file.read_into(buf, 128 << 10)
    assert transfer.nbytes == 65536
    assert "pages of 64 KiB compared" in transfer.audited


def test_how_often_samples_are_due():
    pairs = audit.Pairs()
    ledger = pairs.ledger("a", "b", "read")
    assert ledger.due()
    ledger.moving, ledger.sampling = 1.0, 0.03
    assert not pairs.ledger("a", "b", "read").due() and pairs.ledger("a", "b", "write").due()
    ledger.moving = 2.0
    assert ledger.due()
    ledger.busy = True
    assert not ledger.due()


def test_transfers_at_the_same_time_count_once():
    ledger = audit.Pairs().ledger("a", "b", "read")
    for begun, ended in ((1.0, 2.0), (1.5, 2.5), (2.0, 2.5), (4.0, 5.0)):
        ledger.ran(begun, ended)
    assert ledger.moving == 2.5


def test_one_byte_at_the_end_of_unaligned_segments(file, path, buf, monkeypatch, engine):
    segments = array("Q", [1, 5, 8191, 40960, 65536, 12288, 200000, 250000, 333])
    assert "every byte of" in file.read_segments(buf, segments).audited
    fd = os.open(path, os.O_RDWR)
    run = Lying.run

    def running(self, job):
        outcome = run(self, job)
        os.pwrite(buf.fileno(), bytes([content(buf)[250332] ^ 1]), 250332)
        return outcome

    monkeypatch.setattr(Lying, "run", running)
    try:
        with pytest.raises(dmabuf.IntegrityError) as caught:
            file.read_segments(buf, segments, audit="always")
    finally:
        os.close(fd)
    assert caught.value.offset == 200332
    assert caught.value.nbytes == 8191 + 12288 + 332
    assert caught.value.counts == {"foreign": 1}


def test_a_write_that_failed_its_audit_leaves_the_file_as_long_as_it_is_right(
    tmp_path, buf, engine
):
    def half(right, before):
        return right[: 128 * 1024] + bytes(len(right) - 128 * 1024)

    engine.fault = half
    with (
        dmabuf.open(tmp_path / "new", "w", engine=engine) as file,
        pytest.raises(dmabuf.IntegrityError, match="zeros"),
    ):
        file.write_from(buf)
    assert (tmp_path / "new").read_bytes() == content(buf)[: 128 * 1024]


def test_only_the_first_bytes_of_a_first_transfer(file, buf, engine, monkeypatch):
    monkeypatch.setattr(audit, "LIMIT", 64 * 1024)
    engine.fault = lying.last_byte
    for direction in DIRECTIONS:
        transfer = move(file, direction, buf)
        assert transfer.audited.startswith("every byte of 64 KiB compared")
        assert transfer.audited.endswith("200 KiB were moved")
    with pytest.raises(dmabuf.IntegrityError):
        move(file, "read", buf, audit="always")


def test_poison_stays_within_the_range(file, buf, engine):
    """What is beside it is written at no time, and read by nobody."""
    seen = []

    def looking(right, before):
        seen.append(content(buf))
        return before

    before = content(buf)
    engine.fault = looking
    with pytest.raises(dmabuf.IntegrityError):
        file.read_into(buf, 1801, file_offset=4096, buffer_offset=1024, route="native")
    for now in (*seen, content(buf)):
        assert now[:1024] == before[:1024]
        assert now[2825:] == before[2825:]
    assert seen


def test_the_cpu_touches_the_buffer_within_the_bracket(file, buf, kernel):
    kernel.calls.clear()
    file.read_into(buf)
    assert [call[1:] for call in kernel.calls] == [
        ("START", "RW"), ("END", "RW"), ("START", "R"), ("END", "R"),
    ]  # fmt: skip


def test_threads_may_all_be_first(path, engine):
    with dmabuf.open(path) as file:
        target = file.target
        pairs = audit.Pairs()

        def use():
            for number in range(200):
                pairs.ledger("a", str(number), "read").passed = True
                pairs.mark("a", str(number), "first")
                assert pairs.refusal("a", lambda: str(number), Route.NATIVE) == "first"  # noqa: B023

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pairs.ledger("a", "199", "read").passed
        assert not pairs.ledger("a", "199", "write").passed
        assert target.device() == audit.device_of(file.fileno())


def test_memory_is_bounded(tmp_path, engine):
    size = 24 << 20
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(size)
    with dma_buf(size) as buf, dmabuf.open(path, engine=engine) as file:
        tracemalloc.start()
        try:
            assert "24 MiB" in file.read_into(buf, audit="always").audited
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 12 << 20


# -- what cannot be compared


def test_memory_that_nothing_else_can_see(file, path):
    with dma_buf(SIZE, mapped=False) as far:
        transfer = file.read_into(far, 64 * 1024)
        assert transfer.audited.startswith("not audited: the CPU cannot map the buffer's memory")
        assert "not by the CPU" in transfer.audited
        before = content(far), path.read_bytes()
        for direction in DIRECTIONS:
            with pytest.raises(dmabuf.RouteUnavailable, match="audit='always' is impossible"):
                move(file, direction, far, audit="always")
        assert (content(far), path.read_bytes()) == before


def test_without_fences_the_cpu_stays_away(file, buf):
    transfer = file.read_into(buf, 64 * 1024, fence=False)
    assert transfer.route is Route.NATIVE and "fence=False" in transfer.audited
    with pytest.raises(dmabuf.RouteUnavailable, match="fence=False"):
        file.read_into(buf, 64 * 1024, fence=False, audit="always")
    assert "every byte" in file.read_into(buf, 64 * 1024).audited


def test_destinations_that_overlap(file, buf):
    segments = array("Q", [0, 4096, 8192, 40960, 8192, 8192])
    assert "destinations overlap" in file.read_segments(buf, segments).audited
    with pytest.raises(dmabuf.RouteUnavailable, match="destinations overlap"):
        file.read_segments(buf, segments, audit="always")
    segments = array("Q", [0, 4096, 4096, 0, 8192, 4096])  # the same bytes of the file twice
    assert "every byte" in file.read_segments(buf, segments).audited


def test_a_file_that_refuses_the_audit_s_o_direct_is_read_through_the_cache(file, buf, monkeypatch):
    real = os.preadv

    def refuse(fd, *how):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, *how)

    monkeypatch.setattr(os, "preadv", refuse)
    record = file.read_into(buf, audit="always")
    assert "through the page cache: the file refused an O_DIRECT read" in record.audited
    assert_same(content(buf), pattern(SIZE, 1), "the buffer")
    with file.target.reference() as reference, pytest.raises(ValueError, match="at most 1048576"):
        reference.read(0, (1 << 20) + 1)


def test_a_file_that_may_not_be_opened_again(file, buf, monkeypatch):
    opening = os.open

    def refusing(path, *how, **more):
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opening(path, *how, **more)

    file.plan(buf)
    monkeypatch.setattr(os, "open", refusing)
    transfer = file.write_from(buf)
    assert transfer.route is Route.NATIVE
    assert transfer.audited.startswith("not audited: the file cannot be opened again to read it")
    before = content(buf)
    with pytest.raises(dmabuf.RouteUnavailable, match="Permission denied"):
        file.read_into(buf, file_offset=4096, audit="always")
    assert content(buf) == before


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pipe_is_gone_by_then(buf, direction):
    ends = os.pipe()
    try:
        with dmabuf.open(ends[direction == "write"], direction[0]) as file:
            call = file.read_into if direction == "read" else file.write_from
            with raises_errno(errno.ESPIPE, "which a pipe does not allow"):
                call(buf, 100, audit="always")
    finally:
        for end in ends:
            os.close(end)


def test_a_word_that_means_nothing(file, buf):
    for direction in DIRECTIONS:
        with pytest.raises(ValueError, match="'first', 'always', 'off'"):
            move(file, direction, buf, audit="sometimes")

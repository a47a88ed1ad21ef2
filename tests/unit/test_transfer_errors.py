"""What becomes of a transfer when requests fail, come up short, or have to be issued again.

The results are made up at the core's seam, above real I/O on a real file, so each is exact.
"""

import errno
import os
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmabuf
from dmabuf import Engine, Route
from tests.core import lib
from tests.support import PAGE, Filter, assert_same, pattern, poison, raises_errno, whole

SIZE = 3 << 18
BLOCK = 64 << 10
ROUTES = ["direct", "staged", "buffered"]


@pytest.fixture(scope="module", params=["io_uring", "threads"])
def engine(request):
    backend = "auto" if request.param == "io_uring" else "threads"
    with Engine(queue_depth=4, block_size=BLOCK, backend=backend) as made:
        yield made


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors") / "file"
    path.write_bytes(pattern(SIZE, 1))
    return path


def unit_of(file):
    return max(file.target.direct().alignment.offset, 1)


def _fails_at(error, bad, size):
    """A filter for requests that touch [bad, bad + size)."""

    def judge(completion):
        touched = completion.offset < bad + size and bad < completion.offset + completion.size
        return -error if touched else completion.result

    return judge


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=6)
@given(st.integers(0, SIZE // 512 - 1), st.sampled_from([0, 1, 512, 4096, 70000]))
def test_a_bad_sector_is_named(path, engine, route, sector, start):
    with (
        dmabuf.open(path, engine=engine) as file,
        dmabuf.allocate(SIZE, exporter="memfd") as buffer,
    ):
        unit = unit_of(file)
        bad = sector * 512 // unit * unit
        where = {"file_offset": start, "buffer_offset": start % PAGE, "route": route}
        size = SIZE - 70000
        buffer.pwrite(poison(SIZE), 0)
        with Filter(_fails_at(errno.EIO, bad, unit)):
            if bad + unit <= start or bad >= start + size:
                assert file.read_into(buffer, size, **where).nbytes == size
                return
            with pytest.raises(OSError) as caught:
                file.read_into(buffer, size, **where)
        error = caught.value
        good = max(bad - start, 0)
        assert (error.errno, error.filename, error.nbytes) == (errno.EIO, str(path), good)
        assert f"at file offset {max(bad, start)}, after {good} bytes" in str(error)
        got = buffer.pread(good, start % PAGE)
        assert_same(got, pattern(SIZE, 1)[start : start + good], "what is whole")


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=6)
@given(st.integers(0, SIZE // PAGE - 1), st.sampled_from([0, 300_001, SIZE]))
def test_a_bad_sector_in_a_write(tmp_path_factory, engine, route, page, old):
    """The file keeps its old size or what is whole, whichever is larger."""
    path = tmp_path_factory.mktemp("bad") / "file"
    path.write_bytes(pattern(old, 2))
    bad = page * PAGE
    with (
        dmabuf.open(path, "r+", engine=engine) as file,
        dmabuf.allocate(SIZE, exporter="memfd") as buffer,
    ):
        buffer.pwrite(poison(SIZE), 0)
        with Filter(_fails_at(errno.EIO, bad, PAGE)), pytest.raises(OSError) as caught:
            file.write_from(buffer, route=route)
        fd = os.open(path, os.O_RDONLY)
        now = whole(fd)
        os.close(fd)
    good = caught.value.nbytes
    assert good == bad
    assert f"at file offset {good}, after {good} bytes" in str(caught.value)
    assert len(now) == max(old, good)
    assert_same(now[:good], poison(good), "what is whole")


@pytest.mark.parametrize("route", ROUTES)
def test_a_full_disk_in_the_middle(tmp_path, engine, buf, route):
    path = tmp_path / "file"
    path.write_bytes(b"old" * 1000)
    stop = 5 * BLOCK
    with (
        dmabuf.open(path, "r+", engine=engine) as file,
        Filter(_fails_at(errno.ENOSPC, stop, SIZE)),
        pytest.raises(OSError) as caught,
    ):
        file.write_from(buf, route=route)
    error = caught.value
    assert (error.errno, error.filename) == (errno.ENOSPC, str(path))
    assert error.nbytes == stop  # a request, not a sector: nothing is bisected
    assert_same(path.read_bytes(), poison(stop), "the file")


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("bad", [None, 9 * BLOCK + 4 * PAGE])
def test_a_bad_sector_fails_what_it_was_merged_with(tmp_path, engine, buf, verb, bad):
    """The block layer merges neighbours: all that fly with a bad request may fail, and are good."""
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    seen = set()

    def judge(completion):
        first, _ = completion.offset not in seen, seen.add(completion.offset)
        if bad is not None and completion.offset <= bad < completion.offset + completion.size:
            return -errno.EIO
        return -errno.EIO if first and completion.size == BLOCK else completion.result

    with dmabuf.open(path, "r+", engine=engine) as file, Filter(judge):
        move = file.read_into if verb == "read" else file.write_from
        if bad is None:
            assert move(buf).nbytes == SIZE
        else:
            with raises_errno(errno.EIO, nbytes=bad):
                move(buf)
    done = SIZE if bad is None else bad
    expected = pattern(SIZE, 1) if verb == "read" else poison(SIZE)
    assert_same(buf.pread(done, 0), expected[:done], "the buffer")
    assert_same(path.read_bytes()[:done], expected[:done], "the file")


def test_the_first_of_several_failures_counts(path, engine, buf):
    def judge(completion):
        return -errno.EIO if completion.offset // PAGE % 7 == 3 else completion.result

    with (
        dmabuf.open(path, engine=engine) as file,
        Filter(judge),
        pytest.raises(OSError) as caught,
    ):
        file.read_segments(buf, _pages(SIZE // PAGE, apart=1))
    assert caught.value.nbytes == 3 * PAGE


def _pages(count, apart=0):
    triples = [n for i in range(count) for n in (i * PAGE, (i ^ apart) * PAGE, PAGE)]
    return memoryview(b"".join(n.to_bytes(8, "little") for n in triples)).cast("Q")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EINTR])
@pytest.mark.parametrize("verb", ["read", "write"])
def test_again_is_issued_again(tmp_path, path, engine, buf, route, error, verb):
    tries = {}

    def judge(completion):
        tries[completion.offset] = tries.get(completion.offset, 0) + 1
        return -error if tries[completion.offset] <= 3 else completion.result

    if verb == "write":
        path = tmp_path / "sink"
        path.write_bytes(bytes(SIZE))
    with (
        dmabuf.open(path, "r" if verb == "read" else "r+", engine=engine) as file,
        Filter(judge),
    ):
        if verb == "read":
            transfer = file.read_into(buf, route=route)
        else:
            transfer = file.write_from(buf, route=route)
    assert (transfer.nbytes, transfer.reissues) == (SIZE, 3 * SIZE // BLOCK)
    assert transfer.requests == SIZE // BLOCK
    expected = pattern(SIZE, 1) if verb == "read" else poison(SIZE)
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")
    assert_same(path.read_bytes(), expected, "the file")


def test_again_for_ever_is_an_error(path, engine, buf):
    def judge(completion):
        return -errno.EAGAIN if completion.offset == 3 * BLOCK else completion.result

    with (
        dmabuf.open(path, engine=engine) as file,
        Filter(judge) as seam,
        pytest.raises(dmabuf.TransferError) as caught,
    ):
        file.read_into(buf)
    assert (caught.value.errno, caught.value.nbytes) == (errno.EAGAIN, 3 * BLOCK)
    assert 100 < len(seam.seen) < 1000


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=5)
@given(st.integers(PAGE, BLOCK), st.sampled_from([0, 1, 513, 4096]))
def test_short_reads_are_continued(path, engine, route, least, start):
    def judge(completion):
        return min(completion.result, max(least, completion.result // 2))

    with (
        dmabuf.open(path, engine=engine) as file,
        dmabuf.allocate(SIZE, exporter="memfd") as buffer,
        Filter(judge),
    ):
        size = 5 * BLOCK + 1
        buffer.pwrite(poison(SIZE), 0)
        where = {"file_offset": start, "buffer_offset": start}
        assert file.read_into(buffer, size, route=route, **where).nbytes == size
        expected = bytearray(poison(SIZE))
        expected[start : start + size] = pattern(SIZE, 1)[start : start + size]
        assert_same(buffer.pread(SIZE, 0), bytes(expected), "the buffer")


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=5)
@given(st.integers(8, BLOCK // 512), st.sampled_from([0, 1, 513, 4096]))
def test_short_writes_are_continued(tmp_path_factory, engine, route, least, start):
    path = tmp_path_factory.mktemp("short") / "file"
    path.write_bytes(pattern(SIZE, 2))

    def judge(completion):
        return min(completion.result, max(least * 512, completion.result // 2))

    with (
        dmabuf.open(path, "r+", engine=engine) as file,
        dmabuf.allocate(SIZE, exporter="memfd") as buffer,
        Filter(judge),
    ):
        buffer.pwrite(poison(SIZE), 0)
        size = 5 * BLOCK + 17
        where = {"file_offset": start, "buffer_offset": start}
        assert file.write_from(buffer, size, route=route, **where).nbytes == size
    expected = bytearray(pattern(SIZE, 2))
    expected[start : start + size] = poison(SIZE)[start : start + size]
    assert_same(path.read_bytes(), bytes(expected), "the file")


def test_memory_that_cannot_be_pinned_is_staged_and_remembered(path, engine, buf):
    def judge(completion):
        return -errno.EFAULT if completion.straight else completion.result

    with dmabuf.open(path, engine=engine) as file, Filter(judge):
        transfer = file.read_into(buf)
        assert (transfer.route, transfer.nbytes, transfer.copied) == (Route.STAGED, SIZE, SIZE)
        assert "EFAULT" in transfer.rejected[Route.DIRECT]
        assert 'allocate it with exporter="udmabuf" or "memfd"' in transfer.rejected[Route.DIRECT]
        assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")
        assert file.plan(buf).route is Route.STAGED
        with pytest.raises(dmabuf.RouteUnavailable, match="cannot pin") as caught:
            file.read_into(buf, require="zero-copy")
        assert (caught.value.errno, caught.value.filename) == (errno.EOPNOTSUPP, str(path))


def test_what_is_required_is_not_given_up_for_memory_that_cannot_be_pinned(path, engine):
    def judge(completion):
        return -errno.EFAULT if completion.straight else completion.result

    with dmabuf.open(path, engine=engine) as file, Filter(judge):
        for how in ({"require": "zero-copy"}, {"route": "direct"}):
            with (
                dmabuf.allocate(SIZE, exporter="memfd") as fresh,
                pytest.raises(dmabuf.RouteUnavailable, match="EFAULT"),
            ):
                file.read_into(fresh, **how)


def test_a_stated_alignment_that_is_refused_becomes_a_page(path, engine, buf, monkeypatch):
    def statx_dio(_fd, ret):
        ret[0], ret[1] = 4, 512
        return 0

    def judge(completion):
        coarse = not (completion.offset % PAGE or completion.size % PAGE)
        return completion.result if coarse else -errno.EINVAL

    monkeypatch.setattr(lib, "dmb_statx_dio", statx_dio)
    with dmabuf.open(path, engine=engine) as file, Filter(judge):
        transfer = file.read_into(buf, 3 * BLOCK + 512, file_offset=512, timeout=60)
        assert transfer.nbytes == 3 * BLOCK + 512
        assert transfer.route is Route.STAGED  # from 512 on, nothing matches a page in memory
        assert f"{PAGE} in the file, {PAGE} in memory" in transfer.rejected[Route.DIRECT]
    assert_same(buf.pread(3 * BLOCK + 512, 0), pattern(SIZE, 1)[512 : 3 * BLOCK + 1024], "buffer")


def test_o_direct_that_is_refused_altogether_becomes_buffered(path, engine, buf):
    def judge(completion):
        return -errno.EINVAL

    with dmabuf.open(path, engine=engine) as file:
        with Filter(judge), pytest.raises(OSError) as caught:
            file.read_into(buf)
        assert caught.value.errno == errno.EINVAL  # the buffered one was refused too
        transfer = file.read_into(buf)
        assert transfer.route is Route.BUFFERED
        assert "refused an aligned O_DIRECT request (EINVAL)" in transfer.rejected[Route.DIRECT]
        assert "refused an aligned O_DIRECT request (EINVAL)" in transfer.rejected[Route.STAGED]
        with pytest.raises(dmabuf.RouteUnavailable, match="EINVAL"):
            file.read_into(buf, require="uncached")
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")


def test_a_file_that_shrank_since_it_was_measured(tmp_path, engine, buf):
    """It is cut when the first request completes, of four that were issued by then."""
    path = tmp_path / "file"

    def judge(completion):
        os.truncate(path, SIZE // 2 + 100)
        return completion.result

    for route in ROUTES:
        path.write_bytes(pattern(SIZE, 1))
        buf.pwrite(poison(SIZE), 0)
        with dmabuf.open(path, engine=engine) as file, Filter(judge):
            transfer = file.read_into(buf, route=route)
        assert transfer.nbytes == SIZE // 2 + 100
        got = buf.pread(SIZE, 0)
        assert_same(got[: transfer.nbytes], pattern(SIZE, 1)[: transfer.nbytes], "what is left")


def test_a_file_that_grew_since_it_was_measured(tmp_path, engine, buf):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1)[: SIZE // 2 + 100])

    def judge(completion):
        with path.open("r+b") as other:
            other.write(pattern(SIZE, 1))
        return completion.result

    with dmabuf.open(path, engine=engine) as file, Filter(judge):
        transfer = file.read_into(buf, SIZE)
    assert transfer.nbytes >= SIZE // 2 + 100
    expected = pattern(SIZE, 1)[: transfer.nbytes] + poison(SIZE)[transfer.nbytes :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")


@pytest.mark.parametrize("route", ROUTES)
def test_segments_that_end_early_are_named(tmp_path, engine, buf, route):
    path = tmp_path / "file"
    path.write_bytes(pattern(10 * PAGE + 5, 1))
    with (
        dmabuf.open(path, engine=engine) as file,
        pytest.raises(dmabuf.ShortReadError) as caught,
    ):
        file.read_segments(buf, _pages(12), route=route)
    error = caught.value
    assert (error.index, error.nbytes) == (10, 10 * PAGE + 5)
    assert str(error) == f"{path} ends inside segment 10"
    assert isinstance(error, EOFError)
    expected = pattern(10 * PAGE + 5, 1) + poison(SIZE)[10 * PAGE + 5 :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")


@pytest.mark.parametrize("route", [None, "staged", "buffered"])
@pytest.mark.parametrize("at", [9 * PAGE, 11 * PAGE, 2**63 - SIZE])
def test_and_so_is_the_only_one(tmp_path, engine, buf, route, at):
    path = tmp_path / "file"
    path.write_bytes(pattern(10 * PAGE + 5, 1))
    with (
        dmabuf.open(path, engine=engine) as file,
        pytest.raises(dmabuf.ShortReadError, match=r"ends (inside|before) segment 0") as caught,
    ):
        file.read_segments(buf, array("Q", [at, 0, 2 * PAGE]), route=route)
    moved = pattern(10 * PAGE + 5, 1)[at:]
    assert (caught.value.index, caught.value.nbytes) == (0, len(moved))
    expected = moved + poison(SIZE)[len(moved) :]
    assert_same(buf.pread(SIZE, 0), expected, "the buffer")


def test_a_failing_write_of_segments_cuts_back_to_what_is_whole(tmp_path, engine, buf):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with (
        dmabuf.open(path, "r+", engine=engine) as file,
        Filter(_fails_at(errno.ENOSPC, 5 * PAGE, SIZE)),
        pytest.raises(OSError) as caught,
    ):
        file.write_segments(buf, _pages(12, apart=1))
    assert caught.value.nbytes == 5 * PAGE
    pages = [poison(SIZE)[at : at + PAGE] for at in range(0, 6 * PAGE, PAGE)]
    expected = b"".join(pages[i] for i in (1, 0, 3, 2, 5))
    assert_same(path.read_bytes(), expected, "the file")


def test_an_error_beside_another_write_cuts_off_nothing_of_it(tmp_path, engine, buf):
    """A write beyond ours finishes while ours fails: the file must not be cut back below it."""
    path = tmp_path / "file"
    with dmabuf.open(path, "w", engine=engine) as file:

        def judge(completion):
            if completion.offset >= SIZE:
                return completion.result
            if completion.offset == 0:
                with (
                    dmabuf.Engine(backend="threads", queue_depth=1) as own,
                    dmabuf.open(path, "r+", engine=own) as other,
                ):
                    other.write_from(buf, BLOCK, file_offset=SIZE)
            return -errno.ENOSPC

        with Filter(judge), pytest.raises(OSError) as caught:
            file.write_from(buf)
    assert caught.value.nbytes == 0
    data = path.read_bytes()
    assert len(data) == SIZE + BLOCK
    assert_same(data[SIZE:], poison(BLOCK), "the other write")


def test_a_file_that_somebody_else_made_longer_is_not_cut(tmp_path, engine, buf):
    path = tmp_path / "file"

    def judge(completion):
        if completion.offset == 0:
            with path.open("ab") as other:
                other.write(b"theirs")
        return -errno.ENOSPC

    with (
        dmabuf.open(path, "w", engine=engine) as file,
        Filter(judge),
        pytest.raises(OSError),
    ):
        file.write_from(buf)
    assert path.read_bytes()[SIZE:] == b"theirs"


def test_a_file_that_cannot_be_cut_back_hides_no_error(tmp_path, engine, buf, monkeypatch):
    """As on a filesystem whose device is gone."""

    def refusing(_fd, _size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with (
        dmabuf.open(tmp_path / "file", "w", engine=engine) as file,
        Filter(_fails_at(errno.ENOSPC, 5 * PAGE, SIZE)),
        raises_errno(
            errno.ENOSPC,
            nbytes=5 * PAGE,
            __notes__=["the file could not be cut back: Input/output error"],
        ),
    ):
        monkeypatch.setattr(os, "ftruncate", refusing)
        file.write_segments(buf, _pages(12, apart=1))


def test_a_write_far_past_the_end_that_fails_keeps_what_is_before_it(tmp_path, engine, buf):
    """The file stays long enough for others who write before the place of the failed write."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with dmabuf.open(path, "r+", engine=engine) as file:
        with Filter(lambda completion: -errno.ENOSPC), pytest.raises(OSError) as caught:
            file.write_from(buf, file_offset=SIZE)
        assert caught.value.nbytes == 0
        assert path.read_bytes() == b"old".ljust(SIZE, b"\0")
        fill_at = 2**63 - 1 - SIZE
        with raises_errno(errno.EFBIG, filename=str(path)) as caught:
            file.write_from(buf, file_offset=fill_at)
        assert caught.value.nbytes == 0 and "before this part was written" in str(caught.value)
    assert path.read_bytes() == b"old".ljust(SIZE, b"\0")


@pytest.mark.parametrize("require", ["any", "zero-copy"])
def test_a_file_that_was_emptied_since_it_was_measured(tmp_path, engine, buf, monkeypatch, require):
    path, real = tmp_path / "file", lib.dmb_job_run
    path.write_bytes(pattern(SIZE, 1))

    def run(*arguments):
        os.truncate(path, 0)
        return real(*arguments)

    monkeypatch.setattr(lib, "dmb_job_run", run)
    with dmabuf.open(path, engine=engine) as file:
        if require == "any":
            record = file.read_into(buf)
            assert (record.route, record.nbytes) == (Route.STAGED, 0)
            assert record.reason == "no whole block of it was in the file"
        else:
            with raises_errno(errno.EOPNOTSUPP, "but by the staged route", nbytes=0):
                file.read_into(buf, require=require)
    assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer")


def test_segments_that_cannot_be_measured(path, engine, buf, monkeypatch):
    monkeypatch.setattr(lib, "dmb_job_measure", lambda *_: -errno.ENOMEM)
    with (
        dmabuf.open(path, engine=engine) as file,
        raises_errno(errno.ENOMEM, "measuring the transfer", filename=str(path)),
    ):
        file.read_into(buf)
    assert_same(buf.pread(SIZE, 0), poison(SIZE), "the buffer")


def test_a_file_that_cannot_be_opened_again_goes_through_the_page_cache(
    path, engine, buf, monkeypatch
):
    real = os.open

    def refuse(name, *how):
        if str(name).startswith("/proc/self/fd/"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(name, *how)

    monkeypatch.setattr(os, "open", refuse)
    with dmabuf.open(path, engine=engine) as file:
        record = file.read_into(buf)
        assert record.route is Route.BUFFERED
        assert "Too many open files" in record.rejected[Route.DIRECT]
    assert_same(buf.pread(SIZE, 0), pattern(SIZE, 1), "the buffer")

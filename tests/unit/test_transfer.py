"""Transfers against os.pread and os.pwrite, every byte, by every route, each way by itself."""

import contextlib
import fcntl
import os
from array import array

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmabuf
from dmabuf import Engine, Route
from tests.support import (
    PAGE,
    assert_same,
    fill,
    pattern,
    poison,
    read_and_compare,
    whole,
    write_and_compare,
)

SIZE = (1 << 19) + 4096 + 137
BUFFER = 1 << 20
ROUTES = ["direct", "staged", "buffered"]

# Where things go wrong: at blocks, pages, requests and the end, and one byte beside each.
_LANDMARKS = [0, 512, 1024, PAGE, 2 * PAGE, 16384, 65536, 1 << 19, SIZE - SIZE % PAGE, SIZE]


def near(limit: int) -> st.SearchStrategy[int]:
    """A number up to the limit, most often at or beside a landmark."""
    beside = st.builds(
        lambda mark, by: min(max(mark + by, 0), limit),
        st.sampled_from(_LANDMARKS),
        st.sampled_from([-513, -512, -511, -2, -1, 0, 1, 2, 511, 512, 4095, 4096]),
    )
    return beside | st.integers(0, limit)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def buf():
    with dmabuf.allocate(BUFFER, exporter="memfd") as buffer:
        yield buffer


ENGINES = {
    "default": lambda: None,
    "own": lambda: Engine(queue_depth=7, block_size="16KiB"),
    "deep": lambda: Engine(queue_depth=64, block_size=4096),
    "one": lambda: Engine(queue_depth=1, block_size="64KiB"),
    "threads": lambda: Engine(queue_depth=5, block_size="16KiB", backend="threads"),
    "one thread": lambda: Engine(queue_depth=1, block_size="64KiB", backend="threads"),
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    made = ENGINES[request.param]()
    yield made
    if made is not None:
        made.close()


@pytest.fixture(scope="module")
def source(folder, engine):
    """(a File open for reading, a plain descriptor of the same) of SIZE known bytes."""
    path = folder / "source"
    path.write_bytes(pattern(SIZE, 1))
    fd = os.open(path, os.O_RDONLY)
    with dmabuf.open(path, engine=engine) as file:
        yield file, fd
    os.close(fd)


@pytest.fixture(scope="module")
def sink(folder, engine):
    path = folder / "sink"
    path.write_bytes(b"")
    fd = os.open(path, os.O_RDWR)
    with dmabuf.open(path, "r+", engine=engine) as file:
        yield file, fd
    os.close(fd)


@st.composite
def _ranges(draw):
    buffer_offset = draw(near(BUFFER))
    return draw(near(SIZE + 10000)), buffer_offset, draw(near(BUFFER - buffer_offset))


@settings(max_examples=18)
@given(_ranges(), st.sampled_from([None, *ROUTES]))
def test_read_is_pread(source, buf, where, route):
    file, fd = source
    file_offset, buffer_offset, size = where
    how = {"file_offset": file_offset, "buffer_offset": buffer_offset, "route": route}
    try:
        plan = file.plan(buf, size=size, **how)
    except dmabuf.RouteUnavailable:
        assert route == "direct"  # nothing of it can go straight
        return
    transfer = read_and_compare(file, fd, buf, size, **how)
    assert transfer.route is plan.route
    assert transfer.copied == (transfer.nbytes if plan.route != "direct" else transfer.copied)
    assert route in (None, plan.route)


@settings(max_examples=18)
@given(_ranges(), st.sampled_from([None, *ROUTES]), st.integers(0, SIZE), st.booleans())
def test_write_is_pwrite(sink, buf, where, route, old_size, sync):
    file, fd = sink
    file_offset, buffer_offset, size = where
    os.ftruncate(fd, 0)
    fill(fd, pattern(old_size, 2))
    how = {"file_offset": file_offset, "buffer_offset": buffer_offset, "route": route}
    try:
        plan = file.plan(buf, "write", size=size, **how)
    except dmabuf.RouteUnavailable:
        assert route in ("direct", "staged")
        return
    transfer = write_and_compare(file, fd, buf, size, sync=sync, **how)
    assert transfer.route is plan.route
    assert route in (None, plan.route)


@st.composite
def _segments(draw):
    count = draw(st.integers(0, 15))
    triples, position, slot = [], 0, 0
    for _ in range(count):
        size = draw(st.sampled_from([0, 1, 511, 512, 4096, 4097, 20000, 65536]))
        position += draw(st.sampled_from([0, 0, 1, 512, 3584, 4096]))
        slot += draw(st.sampled_from([0, 0, 1, 4, 512, 4096, 70000]))
        if position + size > SIZE or slot + size > BUFFER:
            break
        triples.append((position, slot, size))
        position += size
        slot += size
    return draw(st.permutations(triples))


def _as_flat(triples):
    return array("Q", [number for triple in triples for number in triple])


def _as_table(triples):
    return numpy.array(triples, dtype="u8").reshape(-1, 3)


@settings(max_examples=12)
@given(_segments(), st.sampled_from([None, *ROUTES]), st.sampled_from([_as_flat, _as_table]))
def test_read_segments_is_preadv(source, buf, triples, route, as_array):
    file, fd = source
    expected = bytearray(poison(BUFFER))
    for file_offset, buffer_offset, size in triples:
        expected[buffer_offset : buffer_offset + size] = os.pread(fd, size, file_offset)
    buf.pwrite(poison(BUFFER), 0)
    try:
        transfer = file.read_segments(buf, as_array(triples), route=route)
    except dmabuf.RouteUnavailable:
        assert route == "direct"
        return
    assert_same(buf.pread(BUFFER, 0), bytes(expected), f"the buffer after {transfer}")
    assert transfer.nbytes == sum(size for _, _, size in triples)
    assert route in (None, transfer.route)


@settings(max_examples=12)
@given(_segments(), st.sampled_from([None, *ROUTES]), st.sampled_from([_as_flat, _as_table]))
def test_write_segments_is_pwritev(sink, buf, triples, route, as_array):
    file, fd = sink
    os.ftruncate(fd, 0)
    old = pattern(1 << 18, 3)
    fill(fd, old)
    content = poison(BUFFER)
    buf.pwrite(content, 0)
    end = max([offset + size for offset, _, size in triples if size], default=0)
    expected = bytearray(old) + bytes(max(0, end - len(old)))
    for file_offset, buffer_offset, size in triples:
        expected[file_offset : file_offset + size] = content[buffer_offset : buffer_offset + size]
    try:
        transfer = file.write_segments(buf, as_array(triples), route=route)
    except dmabuf.RouteUnavailable:
        assert route in ("direct", "staged")
        assert_same(whole(fd), old, "the file after a refusal")
        return
    assert_same(whole(fd), bytes(expected), f"the file after {transfer}")
    assert transfer.nbytes == sum(size for _, _, size in triples)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [PAGE, 100])
@pytest.mark.parametrize("verb", ["read", "write"])
def test_segments_that_continue_each_other_are_one_request(source, sink, buf, route, size, verb):
    triples = [(PAGE + size * n, size * n, size) for n in range(64 * PAGE // size)]
    data, out = pattern(SIZE, 1), poison(BUFFER)
    file, fd = source if verb == "read" else sink
    buf.pwrite(out, 0)
    nbytes = len(triples) * size
    if verb == "read":
        record = file.read_segments(buf, _as_flat(triples), route=route)
        assert_same(buf.pread(nbytes, 0), data[PAGE : PAGE + nbytes], "the buffer")
    else:
        os.ftruncate(fd, 0)
        record = file.write_segments(buf, _as_flat(triples), route=route)
        assert_same(whole(fd), bytes(PAGE) + out[:nbytes], "the file")
    with dmabuf.allocate(BUFFER, exporter="memfd") as one:
        move = file.read_into if verb == "read" else file.write_from
        plain = move(one, nbytes, file_offset=PAGE, route=route, timeout=60)  # not alone
    assert (record.nbytes, record.requests) == (nbytes, plain.requests)
    assert record.route == plain.route == route


def test_routes_as_designed(source, buf):
    file, _ = source
    transfer = file.read_into(buf, 1 << 19)
    assert (transfer.route, transfer.copied) == (Route.DIRECT, 0)
    assert list(transfer.rejected) == [Route.NATIVE]
    assert transfer.reason == "the device writes into the pages behind the buffer"
    transfer = file.read_into(buf, 1 << 18, file_offset=1)
    assert transfer.route is Route.STAGED  # off by one in the file, not in memory
    assert "move the buffer offset" in transfer.rejected[Route.DIRECT]


@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC", "O_NOATIME"])
@pytest.mark.parametrize("way", ["direct", "staged", "lone", "copy"])
def test_a_descriptor_s_flags_hold_on_every_descriptor_of_ours(folder, buf, flag, direct, way):
    path, flags = folder / "flags", getattr(os, flag)
    path.write_bytes(pattern(BUFFER, 1))
    fd = os.open(path, os.O_RDWR | flags | direct)
    before = _flags_of_descriptors(path)
    with dmabuf.open(fd, "r+") as file:
        if way == "copy":
            dmabuf.copy(buf, file)
        for _ in range(1 + (way == "lone")):
            size = PAGE if way == "lone" else BUFFER
            file.write_from(buf, size, route="staged" if way == "staged" else "direct")
        ours = _flags_of_descriptors(path)[len(before) :]
    os.close(fd)
    assert any(one & os.O_DIRECT for one in ours)
    assert ours and all(one & flags == flags for one in ours)


def _flags_of_descriptors(path):
    """The flags of this process's descriptors of a file, in the order of their numbers."""
    numbers = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    found = []
    for number in numbers:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}") == str(path):
                found.append(fcntl.fcntl(number, fcntl.F_GETFL))
    return found

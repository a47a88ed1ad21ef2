"""Which route File.plan chooses, why each better one is passed over, and what the terms permit."""

import contextlib
import os
import pickle
import tempfile

import pytest

import dmabuf
from dmabuf import Plan, Route, RouteUnavailable, Terms
from tests import emulation
from tests.support import drop_cache, pattern
from tests.unit.lying import dma_buf

SIZE = 256 << 10
NATIVE, DIRECT, STAGED, BUFFERED = Route
ALLOWED = {
    "zero-copy": {NATIVE, DIRECT},
    "uncached": {NATIVE, DIRECT, STAGED},
    "any": set(Route),
}
SITUATIONS = {
    # what is asked for, the kind of buffer, and the routes that can be
    "whole blocks": ({}, "dma-buf", [NATIVE, DIRECT, STAGED, BUFFERED]),
    "memory off its alignment": ({"buffer_offset": 1, "size": 8192}, "dma-buf", [STAGED, BUFFERED]),
    "less than a block": ({"file_offset": 1, "size": 100}, "dma-buf", [STAGED, BUFFERED]),
    "no bytes": ({"size": 0}, "dma-buf", [DIRECT, STAGED, BUFFERED]),
    "not mappable": ({}, "far", [NATIVE]),
    "not mappable, with edges": ({"size": 8191}, "far", []),
    "no dma-buf": ({}, "memfd", [DIRECT, STAGED, BUFFERED]),
    "on tmpfs": ({}, "dma-buf", [BUFFERED]),
    "a pipe": ({}, "dma-buf", [BUFFERED]),
    "a kernel without": ({}, "dma-buf", [DIRECT, STAGED, BUFFERED]),
    "in the page cache": ({"prefer": "fastest"}, "dma-buf", [BUFFERED]),
}
OF_WRITES = {"less than a block": [BUFFERED]}
"""Where a write can go less ways: it may only write whole pages past the page cache."""


@pytest.fixture(params=SITUATIONS)
def situation(request, tmp_path):
    """(file for reading and writing, what is asked for, buffer, name)."""
    how, kind, _ = SITUATIONS[request.param]
    with contextlib.ExitStack() as stack:
        make = dmabuf.Engine if request.param == "a kernel without" else emulation.engine
        engine = stack.enter_context(make(backend="threads"))
        if kind == "memfd":
            buffer = stack.enter_context(dmabuf.allocate(SIZE, exporter="memfd"))
        else:
            buffer = stack.enter_context(dma_buf(SIZE, mapped=kind != "far"))
        path = tmp_path / "file"
        if request.param == "on tmpfs":
            path = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm")).name
        if request.param == "a pipe":
            os.mkfifo(path)
        else:
            with open(path, "wb") as plain:
                plain.write(pattern(SIZE, 1))
                plain.flush()
                drop_cache(plain.fileno())
        file = stack.enter_context(dmabuf.open(path, "r+", engine=engine))
        if request.param == "in the page cache":
            os.pread(file.fileno(), SIZE, 0)
        yield file, how, buffer, request.param


@pytest.mark.parametrize("direction", ["read", "write"])
def test_every_combination_of_terms(situation, direction):
    file, how, buffer, name = situation
    possible = SITUATIONS[name][2]
    if direction == "write":
        possible = OF_WRITES.get(name, possible)
    for require, allowed in ALLOWED.items():
        for forced in (None, *Route):
            routes = [route for route in possible if route in allowed and forced in (None, route)]
            terms = how | {"require": require, "route": forced}
            if not routes:
                with pytest.raises(RouteUnavailable) as caught:
                    file.plan(buffer, direction, **terms)
                assert caught.value.filename == file.name
                assert caught.value.route == forced
                continue
            plan = file.plan(buffer, direction, **terms)
            assert plan.route is routes[0]
            better = [] if forced else list(Route)[: list(Route).index(plan.route)]
            assert list(plan.rejected) == better
            assert all(plan.rejected.values()) and plan.reason


def test_terms_in_one_record(situation):
    file, how, buffer, name = situation
    if not SITUATIONS[name][2]:
        return
    terms = Terms(prefer=how.get("prefer", "zero-copy"))
    where = {key: value for key, value in how.items() if key != "prefer"}
    assert file.plan(buffer, **where, terms=terms) == file.plan(buffer, **how)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pattern(SIZE, 1))
    with dmabuf.open(path) as file:
        yield file


def test_the_error_names_each_cause(file, buf):
    with pytest.raises(RouteUnavailable) as caught:
        file.plan(buf, file_offset=1, size=8192, require="zero-copy")
    text = caught.value.strerror
    assert "require='zero-copy'" in text
    assert "native: the buffer is a memfd" in text and "direct: file offset and memory" in text
    assert "staged, buffered: require='zero-copy' does not permit it" in text
    with pytest.raises(RouteUnavailable, match="route='direct'"):
        file.plan(buf, file_offset=1, size=8192, route="direct")


@pytest.mark.parametrize("how", [{"require": "fast"}, {"route": "native?"}, {"route": 3}])
def test_unknown_words(file, buf, how):
    with pytest.raises(ValueError, match="one of"):
        file.plan(buf, **how)
    with pytest.raises(ValueError, match="one of"):
        Terms(**how)


def test_a_plan_is_a_frozen_record(buf):
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as there, dmabuf.open(there.name) as file:
        there.write(bytes(SIZE))
        there.flush()
        plan = file.plan(buf)
    with pytest.raises(AttributeError):
        plan.route = Route.DIRECT
    lines = str(plan).splitlines()
    assert lines[0] == "buffered: the kernel copies into the buffer's mapping"
    starts = ["  not native: the buffer", "  not direct: tmpfs", "  not staged: tmpfs"]
    assert [line.startswith(start) for line, start in zip(lines[1:], starts, strict=True)]
    assert pickle.loads(pickle.dumps(plan)) == plan == Plan(plan.route, plan.reason, plan.rejected)
    assert hash(plan) == hash(pickle.loads(pickle.dumps(plan)))


def test_routes_are_their_names():
    assert [str(route) for route in dmabuf.Route] == ["native", "direct", "staged", "buffered"]
    assert dmabuf.Route("direct") == "direct"

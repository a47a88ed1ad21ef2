"""The store of named buffers: what its clients see, over the socket."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.store import Store
from tests.serving import as_a_program, in_a_thread
from tests.support import assert_same, in_child, pattern

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with in_a_thread(path), dmabuf.store.connect(path) as store:
        yield store


def test_a_name_is_the_same_memory_for_all_who_open_it(store: Store) -> None:
    with store.create("frames", "1MiB", mode=0o640) as one, store.open("frames") as other:
        assert (one.size, one.mode, other.mode) == (SIZE, "rb+", "rb")
        assert_same(one.pread(SIZE, 0), bytes(SIZE), "a new buffer")
        one.pwrite(pattern(SIZE, 1), 0)
        assert_same(other.pread(SIZE, 0), pattern(SIZE, 1), "the other's view")
        with store.open("frames", "r+") as third:
            third.pwrite(b"third", SIZE - 5)
        assert one.pread(5, SIZE - 5) == other.pread(5, SIZE - 5) == b"third"


def test_what_is_said_of_a_name(store: Store) -> None:
    with store.create("b", 5000, mode=0o644):
        status = store.stat("b")
        assert status[:6] == ("b", 8192, 5000, 0o644, os.geteuid(), os.getegid())
        assert status.created_ns == status.changed_ns
        assert status.in_use
    assert not store.stat("b").in_use
    store.create("a", 1).close()
    assert [one.name for one in store.list()] == ["a", "b"]
    assert store.list()[1] == status._replace(in_use=None)


def test_a_name_goes_and_changes(store: Store) -> None:
    with store.create("one", SIZE) as buf:
        buf.pwrite(b"kept", 0)
        store.rename("one", "two")
        store.chmod("two", 0o604)
        store.truncate("two", 5)
        with pytest.raises(OSError) as caught:
            store.truncate("two", SIZE + 1)
        assert (caught.value.errno, store.stat("two").length) == (errno.EFBIG, 5)
        assert [one.name for one in store.list()] == ["two"]
        assert store.stat("two").mode == 0o604
        assert store.stat("two").changed_ns > store.stat("two").created_ns
        store.remove("two")
        assert store.list() == []
        with pytest.raises(FileNotFoundError) as caught:
            store.open("two")
        assert caught.value.filename == "two"
        assert buf.pread(4, 0) == b"kept"


REQUESTS = {
    "open": lambda store, number: store.open("x", "r+", number=number).close(),
    "truncate": lambda store, number: store.truncate("x", 5, number=number),
    "chmod": lambda store, number: store.chmod("x", 0o604, number=number),
    "chown": lambda store, number: store.chown("x", gid=os.getegid(), number=number),
    "utime": lambda store, number: store.utime("x", modified_ns=5, number=number),
    "rename": lambda store, number: store.rename("x", "y", number=number),
    "replace": lambda store, number: store.rename("z", "x", replace=number),
    "remove": lambda store, number: store.remove("x", number=number),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_request_may_be_for_the_buffer_that_was_looked_at_alone(store: Store, request_) -> None:
    store.create("z", 1).close()
    store.create("x", SIZE).close()
    looked_at = store.stat("x").number
    with store.create(None, SIZE) as newer:
        told = store.link(newer, "x")
    before = store.list()
    assert told in before
    with pytest.raises(OSError, match=f"has the number {looked_at}") as caught:
        request_(store, looked_at)
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, "x")
    assert store.list() == before
    request_(store, told.number)


_FILL = """
import sys, dmabuf.store
with dmabuf.store.connect(sys.argv[1]) as store, store.create("left", 4096) as buf:
    buf.pwrite(b"by a child", 0)
"""


def test_buffers_outlive_the_program_that_filled_them(path: Path) -> None:
    with as_a_program(path) as server:
        in_child(_FILL, path)
        with dmabuf.store.connect(path) as store, store.open("left") as buf:
            assert buf.pread(10, 0) == b"by a child"
            server.terminate()
            assert server.wait(timeout=30) == 0
            assert not path.exists()
            assert buf.pread(10, 0) == b"by a child"
            with pytest.raises(ConnectionError):
                store.list()

"""The store: content that grows, shrinks and has times of its own."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.store import Store
from tests.serving import in_a_thread
from tests.support import assert_same, pattern

SIZE = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    path = tmp_path / "store.sock"
    with in_a_thread(path), dmabuf.store.connect(path) as store:
        yield store


def test_a_name_grows_and_shrinks_by_other_memory_while_nobody_has_its_own(store: Store) -> None:
    store.create("grows", 5000, mode=0o640).close()
    before = store.stat("grows")
    with store.create(None, SIZE) as larger:
        larger.pwrite(pattern(SIZE, 2), 0)
        with store.open("grows"), pytest.raises(OSError, match="let go") as caught:
            store.swap(larger, "grows", SIZE - 1)
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(OSError, match="does not grow") as caught:
            store.swap(larger, "grows", SIZE + 1)
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(OSError, match="has the number") as caught:
            store.swap(larger, "grows", SIZE - 1, number=before.number + 1)
        assert caught.value.errno == errno.ESTALE
        told = store.swap(larger, "grows", SIZE - 1, number=before.number)
        with pytest.raises(ValueError, match="without a name"):
            store.swap(larger, "grows", 1)
    after = store.stat("grows")
    assert told == after._replace(in_use=None)
    assert (after.size, after.length) == (SIZE, SIZE - 1)
    assert (after.number, after.mode, after.created_ns) == (
        before.number, before.mode, before.created_ns,
    )  # fmt: skip
    assert after.modified_ns > before.modified_ns
    with store.open("grows") as again:
        assert_same(again.pread(SIZE, 0), pattern(SIZE, 2), "the other memory")
    assert (store.usage().charged, store.usage().names) == (SIZE, 1)


def test_the_times_of_the_content_are_told(store: Store) -> None:
    store.create("x", 1).close()
    store.utime("x", modified_ns=5)
    store.utime("x", accessed_ns=7)
    told = store.stat("x")
    assert (told.accessed_ns, told.modified_ns) == (7, 5)
    assert told.changed_ns > told.created_ns


def test_a_rename_may_be_one_that_replaces_nothing(store: Store) -> None:
    first = store.create("one", 1)
    other = store.create("two", 1)
    with first, other:
        with pytest.raises(FileExistsError) as caught:
            store.rename("one", "two", replace=False)
        assert caught.value.filename == "two"
        store.rename("one", "three", replace=False)
        assert [one.name for one in store.list()] == ["three", "two"]


def test_a_link_may_be_one_that_replaces_nothing(store: Store) -> None:
    with store.create("one", 1), store.create(None, SIZE) as buffer:
        with pytest.raises(FileExistsError) as caught:
            store.link(buffer, "one", replace=False)
        assert caught.value.filename == "one"
        assert [(one.name, one.length) for one in store.list()] == [("one", 1)]
        store.link(buffer, "two", replace=False)
        assert [(one.name, one.length) for one in store.list()] == [("one", 1), ("two", SIZE)]


def test_a_link_may_say_how_much_is_content(store: Store) -> None:
    store.create("one", 1).close()
    with store.create(None, SIZE) as buffer:
        with pytest.raises(OSError, match="does not grow") as caught:
            store.link(buffer, "one", length=SIZE + 1)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, "one")
        assert [(one.name, one.length) for one in store.list()] == [("one", 1)]
        store.link(buffer, "one", length=0)
        told = store.stat("one")
        assert (told.length, told.size) == (0, SIZE)
        assert told.modified_ns == told.changed_ns > told.created_ns


def test_what_was_opened_is_told_with_its_status(store: Store) -> None:
    store.create("one", 5000, mode=0o640).close()
    buffer, told = store.open_with_status("one", "r+")
    with buffer:
        assert told == store.stat("one")._replace(in_use=None)
        assert (buffer.size, buffer.mode) == (told.size, "rb+")


def test_what_gets_no_name_is_let_go_of(store: Store) -> None:
    buffer = store.create(None, SIZE)
    assert store.usage().charged == SIZE
    store.discard(buffer)
    assert buffer.closed
    assert (store.usage().charged, store.usage().names) == (0, 0)
    with pytest.raises(ValueError, match="without a name"):
        store.discard(buffer)

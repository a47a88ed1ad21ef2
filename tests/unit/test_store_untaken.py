"""The store: what was made for a create that does not come to be leaves neither name nor memory."""

import errno
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.store import Store, client, clients, memory
from tests.resources import held
from tests.serving import as_a_program, in_a_thread

SIZE = 1 << 16
names = pytest.mark.parametrize("name", [None, "named"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


def nothing_there(store: Store) -> None:
    assert store.list() == []
    assert store.usage()[::2] == (0, 0)


def works(store: Store) -> None:
    """The connection is as good as it was, and so are numbers."""
    with store.create("n", SIZE), store.create(None, SIZE) as other:
        store.link(other, "m")
    store.remove("n")
    store.remove("m")
    nothing_there(store)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_without_a_descriptor_left(path: Path) -> None:
    with as_a_program(path, "--max-memory", SIZE), dmabuf.store.connect(path) as store:
        for name in (None, "named", None, "named"):
            with no_descriptor_left(), pytest.raises(OSError, match="ulimit -n") as caught:
                store.create(name, SIZE)
            assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, name)
            nothing_there(store)
        store.create("kept", SIZE).close()
        with no_descriptor_left(), pytest.raises(OSError, match="ulimit -n") as caught:
            store.open("kept")
        assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, "kept")
        store.open("kept").close()


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with in_a_thread(path), dmabuf.store.connect(path) as store:
        store.list()  # so it was accepted, and its descriptor is there
        yield store


def refuse(*arguments: object, **how: object) -> None:
    raise OSError(errno.ENOMEM, "none left")


@names
def test_a_client_that_cannot_map_it(name, store: Store, monkeypatch) -> None:
    before = held()
    with monkeypatch.context() as patch:
        patch.setattr(client, "as_buffer", refuse)
        with pytest.raises(OSError, match="none left"):
            store.create(name, SIZE)
    nothing_there(store)
    # A thread of the server's closes its own.
    assert any(held() == before or time.sleep(0.02) for _ in range(500))
    works(store)


def test_what_others_put_under_that_name_meanwhile_stays(store: Store, path, monkeypatch) -> None:
    def replace_and_refuse(*arguments: object) -> None:
        with dmabuf.store.connect(path) as other, other.create(None, 5) as buffer:
            other.link(buffer, "named")
        refuse()

    with monkeypatch.context() as patch:
        real = client.as_buffer
        refusals = iter([replace_and_refuse])
        patch.setattr(
            client,
            "as_buffer",
            lambda *arguments: next(refusals, real)(*arguments),
        )
        with pytest.raises(OSError, match="none left"):
            store.create("named", SIZE)
    assert [(one.name, one.length) for one in store.list()] == [("named", 5)]
    assert store.usage().charged == store.stat("named").size


@names
def test_a_server_that_cannot_grant_it(name, store: Store, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(memory.Memory, "grant", refuse)
        with pytest.raises(OSError, match="granting it: none left"):
            store.create(name, SIZE)
    nothing_there(store)
    works(store)


@names
def test_a_client_that_is_gone_when_it_is_granted(name, store: Store, path, monkeypatch) -> None:
    with monkeypatch.context() as patch, dmabuf.store.connect(path) as other:
        patch.setattr(clients.Client, "send", refuse)
        with pytest.raises(ConnectionError):
            other.create(name, SIZE)
    nothing_there(store)
    works(store)


@pytest.mark.parametrize("name", [None, "linked", "named"])
def test_a_server_that_ended_has_nothing(name, path: Path) -> None:
    before = held()
    with in_a_thread(path):
        store = dmabuf.store.connect(path)
        with store.create(None if name == "linked" else name, SIZE) as buffer:
            if name == "linked":
                store.link(buffer, name)
    with store, pytest.raises(ConnectionError):
        store.list()
    assert held() == before


@names
def test_a_grant_that_the_kernel_does_not_send(name, store: Store, monkeypatch) -> None:
    """As where others of this user's have left so many descriptors unread."""
    send = clients.Client.send

    def sending(self: clients.Client, data: bytes, descriptors: list[int]) -> None:
        if descriptors:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        send(self, data, descriptors)

    with monkeypatch.context() as patch:
        patch.setattr(clients.Client, "send", sending)
        with pytest.raises(OSError) as caught:
            store.create(name, SIZE)
    assert caught.value.errno == errno.ETOOMANYREFS
    nothing_there(store)
    works(store)

"""The mount's requests, each a task, stopped where they cross."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from dmabuf.store import Store
from tests.mount_requests import CALLER, ROOT, Task, World, requests, run
from tests.support import assert_same, pattern

MUCH = pattern(6 << 20, 1)  # what is sealed in a thread


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with requests(tmp_path) as made:
        yield made


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Iterator[trio.Event]:
    """The next call of a method, which a thread makes, waits at its beginning until the block ends.

    The Event is set when it has come there.
    """
    came, go_on = trio.Event(), threading.Event()
    function = getattr(owner, name)

    def waiting(*arguments: object, **named: object) -> object:
        if threading.current_thread() is not threading.main_thread() and not came.is_set():
            trio.from_thread.run_sync(came.set)
            assert go_on.wait(20)
        return function(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, waiting)
        try:
            yield came
        finally:
            go_on.set()


def crossing(
    monkeypatch: pytest.MonkeyPatch, owner: object, method: str, first: Task, *then: Task
) -> None:
    """Begin ``first``, and the others one by one when a thread of it is in ``method``; end all."""

    async def body() -> None:
        async with trio.open_nursery() as nursery:
            with held(monkeypatch, owner, method) as came:
                nursery.start_soon(first)
                await came.wait()
                for task in then:
                    nursery.start_soon(task)
                    await wait_all_tasks_blocked(0.01)

    run(body)


def test_a_name_that_is_unlinked_while_it_is_sealed_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmabuf.mount.content import Growing

    async def closes() -> None:
        await world.put("x", MUCH)

    async def unlinks() -> None:
        await world.ask.unlink(ROOT, b"x", CALLER)

    crossing(monkeypatch, Growing, "become", closes, unlinks)
    assert world.store.list() == []
    assert world.files.listing() == []
    assert world.store.usage().charged == 0


def test_names_that_are_renamed_while_a_file_is_sealed_keep_their_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmabuf.mount.content import Growing

    async def before() -> None:
        await world.put("x", b"small")
        await world.put("y", b"Y" * 100)

    async def closes() -> None:
        fh = await world.open("x")
        await world.ask.write(fh, 0, MUCH)
        await world.close(fh)

    async def renames() -> None:
        await world.ask.rename(ROOT, b"x", ROOT, b"x.bak", 0, CALLER)
        await world.ask.rename(ROOT, b"y", ROOT, b"x", 0, CALLER)

    async def after() -> None:
        assert_same(await world.read("x.bak"), MUCH, "the file that was sealed")
        assert_same(await world.read("x"), b"Y" * 100, "the one that got its name")

    run(before)
    crossing(monkeypatch, Growing, "become", closes, renames)
    run(after)
    assert [status.name for status in world.store.list()] == ["x", "x.bak"]


@pytest.mark.parametrize("method", ["discard", "link", "stat", "swap"])
def test_a_file_keeps_its_size_and_inode_while_it_is_sealed(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen = []

    async def looks() -> None:
        found = await world.ask.lookup(ROOT, b"x", CALLER)
        ((name, node),) = world.files.listing()
        same = await world.ask.getattr(found.st_ino, CALLER)
        told = {found.st_size, same.st_size, node.size}
        seen.append((name, told, {found.st_ino, node.ino}))

    async def before() -> None:
        await world.put("x", b"small")

    async def closes() -> None:
        fh = await world.open("x") if method == "swap" else await world.create("x")
        await world.ask.write(fh, 0, MUCH[:5000])
        await world.ask.write(fh, 5000, MUCH[5000:])
        await looks()
        await world.ask.flush(fh)
        await looks()
        await world.ask.release(fh)

    if method == "swap":
        run(before)
    crossing(monkeypatch, Store, method, closes, looks)
    assert len(seen) == 3
    assert seen == [("x", {len(MUCH)}, seen[0][2])] * 3, seen
    assert len(seen[0][2]) == 1


def test_who_may_open_a_file_is_the_last_word_of_whoever_said_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        await world.put("x", b"small")
        fh = await world.open("x")
        await world.ask.write(fh, 0, bytes(5000))
        world.store.chmod("x", 0o640)
        await world.close(fh)
        assert world.store.stat("x").mode == 0o640

    async def chmod(mode: int) -> None:
        from pyfuse3 import EntryAttributes

        attributes = EntryAttributes()
        attributes.st_mode = mode
        await world.set("y", attributes, "mode")

    async def closes() -> None:
        fh = await world.create("y")
        await world.ask.write(fh, 0, MUCH)
        await chmod(0o640)
        await world.close(fh)

    async def changes() -> None:
        await chmod(0o600)

    run(body)
    crossing(monkeypatch, Store, "chmod", closes, changes)
    assert world.store.stat("y").mode == 0o600


def test_large_memory_that_is_being_made_holds_up_its_own_file_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmabuf.store.connection import Connection

    done = []
    unlinked = 0

    async def before() -> None:
        nonlocal unlinked
        await world.put("other", b"small")
        unlinked = await world.create("unlinked", b"growing")
        await world.ask.unlink(ROOT, b"unlinked", CALLER)

    async def large() -> None:
        await world.put("large", MUCH)
        done.append("large")

    async def small() -> None:
        await world.put("small", b"small")
        done.append("small")

    async def lets_go() -> None:
        await world.ask.release(unlinked)

    async def truncates() -> None:
        await world.truncate("other", 5000)

    async def looks() -> None:
        assert (await world.ask.lookup(ROOT, b"large", CALLER)).st_size == 0
        assert "small" in {name for name, _ in world.files.listing()}
        done.append("looked")

    run(before)
    crossing(monkeypatch, Connection, "_exchange", large, small, lets_go, truncates, looks)
    assert done[0] == "looked"
    assert sorted(done) == ["large", "looked", "small"]
    sizes = {status.name: status.length for status in world.store.list()}
    assert sizes == {"large": len(MUCH), "other": 5000, "small": 5}
    assert world.store.usage().charged == len(MUCH) + 8192 + 4096


def test_after_a_device_was_waited_for_a_file_is_looked_at_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmabuf.mount.operations import Operations

    async def body() -> None:
        waits, over = [trio.Event()], trio.Event()

        async def device(asking: Operations, node: object, direction: str) -> bool:
            if not waits:
                return False
            waits.pop().set()
            await over.wait()
            return True

        waiting = waits[0]
        await world.put("x", b"12345678")
        fh = await world.open("x")
        monkeypatch.setattr(Operations, "_fences", device)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.ask.write, fh, 4, b"late")
            await waiting.wait()
            await world.truncate("x", 0)
            over.set()
        await world.close(fh)
        assert await world.read("x") == bytes(4) + b"late"

    run(body)

"""The mount's requests, each a task, stopped where they cross: no kernel is in between."""

import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import dmabuf.store
from dmabuf.store import Store
from tests.guards import demand
from tests.serving import in_a_thread
from tests.support import assert_same, pattern

CALLER = SimpleNamespace(uid=os.geteuid(), gid=os.getegid(), pid=0, umask=0)
ROOT = 1
MUCH = pattern(6 << 20, 1)  # what is sealed in a thread

Task = Callable[[], Awaitable[object]]


class World:
    """A store, and the requests of a mount of it."""

    def __init__(self, path: Path, store: Store) -> None:
        from dmabuf.mount.files import Files
        from dmabuf.mount.operations import Operations

        self.store = store
        self.said: list[str] = []
        self.files = Files(str(path))
        self.ask = Operations(self.files, shared=False, tell=self.said.append)

    async def create(self, name: str, data: bytes = b"") -> int:
        info, _ = await self.ask.create(ROOT, name.encode(), 0o644, os.O_RDWR, CALLER)
        await self.ask.write(info.fh, 0, data)
        return info.fh

    async def put(self, name: str, data: bytes) -> None:
        await self.close(await self.create(name, data))

    async def open(self, name: str, flags: int = os.O_RDWR) -> int:
        found = await self.ask.lookup(ROOT, name.encode(), CALLER)
        return (await self.ask.open(found.st_ino, flags, CALLER)).fh

    async def close(self, fh: int) -> None:
        try:
            await self.ask.flush(fh)
        finally:
            await self.ask.release(fh)

    async def truncate(self, name: str, length: int) -> None:
        from pyfuse3 import EntryAttributes

        attributes = EntryAttributes()
        attributes.st_size = length
        await self.set(name, attributes, "size")

    async def set(self, name: str, attributes: object, *fields: str) -> None:
        found = await self.ask.lookup(ROOT, name.encode(), CALLER)
        wanted = dict.fromkeys(("size", "mode", "uid", "gid", "atime", "mtime"), False)
        wanted |= dict.fromkeys(fields, True)
        chosen = SimpleNamespace(**{f"update_{name}": value for name, value in wanted.items()})
        await self.ask.setattr(found.st_ino, attributes, chosen, None, CALLER)

    async def read(self, name: str) -> bytes:
        fh = await self.open(name)
        try:
            return bytes(await self.ask.read(fh, 0, 1 << 30))
        finally:
            await self.ask.release(fh)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    demand("fuse", "pyfuse3")
    path = tmp_path / "store.sock"
    with in_a_thread(path), dmabuf.store.connect(path) as store:
        made = World(path, store)
        yield made
        made.files.close()


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Iterator[trio.Event]:
    """The next call of a method, which a thread makes, waits at its beginning until the block ends.

    The Event is set when it has come there.
    """
    came, go_on = trio.Event(), threading.Event()
    function = getattr(owner, name)

    def waiting(*arguments: object) -> object:
        if threading.current_thread() is not threading.main_thread() and not came.is_set():
            trio.from_thread.run_sync(came.set)
            assert go_on.wait(60)
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, waiting)
        try:
            yield came
        finally:
            go_on.set()


def run(body: Task) -> None:
    async def limited() -> None:
        with trio.fail_after(20):
            await body()

    trio.run(limited)


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


def test_what_was_cut_is_no_hole_although_others_kept_it_from_being_sealed(world: World) -> None:
    from pyfuse3 import FUSEError

    async def body() -> None:
        await world.put("x", b"old")
        fh = await world.open("x", os.O_RDWR | os.O_TRUNC)
        await world.ask.write(fh, 0, b"A" * 4000)
        with world.store.open("x"), pytest.raises(FUSEError):
            await world.truncate("x", 100)
        await world.ask.write(fh, 200, b"B")
        await world.close(fh)
        assert_same(await world.read("x"), b"A" * 100 + bytes(100) + b"B", "with a hole")

    run(body)


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

    async def closes() -> None:
        await world.put("y", MUCH)

    async def changes() -> None:
        from pyfuse3 import EntryAttributes

        attributes = EntryAttributes()
        attributes.st_mode = 0o600
        await world.set("y", attributes, "mode")

    run(body)
    crossing(monkeypatch, Store, "link", closes, changes)
    assert world.store.stat("y").mode == 0o600


def test_a_file_whose_owner_cannot_be_set_is_there_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyfuse3 import FUSEError

    def refused(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "as the store says it")

    async def body() -> None:
        monkeypatch.setattr(CALLER, "gid", os.getegid() + 1)
        monkeypatch.setattr(Store, "chown", refused)
        fh = await world.create("x", b"content")
        with pytest.raises(FUSEError) as caught:
            await world.ask.flush(fh)
        assert caught.value.errno == errno.EPERM
        assert bytes(await world.ask.read(fh, 0, 100)) == b"content"
        await world.ask.write(fh, 7, bytes(5000))
        await world.close(fh)
        assert await world.read("x") == b"content" + bytes(5000)

    run(body)


@pytest.mark.parametrize("size", [10, 9000], ids=["in place", "growing"])
def test_a_name_that_another_client_gave_away_is_left_alone(world: World, size: int) -> None:
    async def body() -> None:
        await world.put("x", b"old")
        fh = await world.open("x")
        with world.store.create(None, 1 << 20, mode=0o640) as newer:
            newer.pwrite(pattern(1 << 20, 2), 0)
            world.store.link(newer, "x")
        old = world.ask._handles[fh].node
        await world.ask.write(fh, 3, pattern(size, 3))
        world.files.chmod(old, 0o777)
        world.files.chown(old, os.geteuid(), os.getegid())
        world.files.utime(old, 1, 1)
        await world.ask.fsync(fh, False)
        assert_same(
            bytes(await world.ask.read(fh, 0, 1 << 20)), b"old" + pattern(size, 3), "the old file"
        )
        assert (await world.ask.getattr(old.ino, CALLER)).st_nlink == 0
        await world.close(fh)
        assert_same(await world.read("x"), pattern(1 << 20, 2), "the new one")
        status = world.store.stat("x")
        assert (status.length, status.mode) == (1 << 20, 0o640)
        assert status.modified_ns > 1

    run(body)


def test_a_file_that_another_client_removed_lives_while_it_is_open(world: World) -> None:
    async def body() -> None:
        await world.put("x", b"precious")
        fh = await world.open("x")
        world.store.remove("x")
        await world.ask.write(fh, 8, bytes(5000))
        assert_same(bytes(await world.ask.read(fh, 0, 9000)), b"precious" + bytes(5000), "it")
        await world.close(fh)
        assert world.store.list() == []

    run(body)


def test_a_file_that_another_client_renamed_is_written_under_its_new_name(world: World) -> None:
    async def body() -> None:
        await world.put("x", b"12345678")
        fh = await world.open("x")
        world.store.rename("x", "y")
        await world.ask.write(fh, 8, b"9")
        await world.ask.fsync(fh, False)
        assert world.store.stat("y").length == 9
        world.store.rename("y", "z")
        await world.ask.write(fh, 9, pattern(9000, 1))
        world.store.rename("z", "x")
        world.store.create("z", 1).close()
        await world.close(fh)
        assert_same(await world.read("x"), b"123456789" + pattern(9000, 1), "under its name")
        assert world.store.stat("z").length == 1

    run(body)


def test_memory_that_went_while_the_mount_looked_who_has_it_is_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyfuse3 import FUSEError

    from dmabuf.buffer import Buffer

    async def body() -> None:
        await world.put("x", b"12345678")
        fh = await world.open("x")
        buffer = world.ask._handles[fh].node.buffer
        close = Buffer.close

        def closes(closed: Buffer) -> None:
            if closed is buffer and "x" in {status.name for status in world.store.list()}:
                world.store.remove("x")
            close(closed)

        with monkeypatch.context() as patch:
            patch.setattr(Buffer, "close", closes)
            for _ in range(2):
                with pytest.raises(FUSEError) as caught:
                    await world.ask.write(fh, 0, bytes(5000))
                assert caught.value.errno == errno.ESTALE
        with pytest.raises(FUSEError):
            await world.ask.read(fh, 0, 8)
        await world.close(fh)

    run(body)


def test_a_file_is_one_however_often_its_directory_is_read(world: World) -> None:
    async def body() -> None:
        world.store.create("x", 100).close()
        first, second = [await world.ask.opendir(ROOT, CALLER) for _ in range(2)]
        await world.ask.releasedir(second)
        fh = await world.open("x")
        await world.ask.releasedir(first)
        again = await world.open("x")
        assert world.ask._handles[fh].node is world.ask._handles[again].node
        await world.close(fh)
        await world.close(again)

    run(body)


def test_times_that_the_store_cannot_keep_are_the_nearest_that_it_can(world: World) -> None:
    from pyfuse3 import EntryAttributes

    async def body() -> None:
        await world.put("x", b"old")
        times = EntryAttributes()
        times.st_atime_ns, times.st_mtime_ns = 10**19, -5
        await world.set("x", times, "atime", "mtime")
        status = world.store.stat("x")
        assert (status.accessed_ns, status.modified_ns) == (2**63 - 1, 0)
        fh = await world.open("x")
        await world.ask.write(fh, 0, b"n")
        await world.close(fh)
        assert world.store.stat("x").modified_ns > 0

    run(body)

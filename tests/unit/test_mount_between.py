"""What other clients do to a name between the mount's look at it and its request."""

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmabuf.store import Status
from dmabuf.store.connection import Connection
from tests.mount_requests import CALLER, ROOT, World, requests, run
from tests.support import assert_same, pattern

THEIRS = pattern(1 << 20, 2)
TIMES = {"accessed_ns": 10**18, "modified_ns": 10**18 + 1}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with requests(tmp_path) as made:
        yield made


def give(world: World, name: str) -> Status:
    """Another client gives a name to a buffer of its own."""
    with world.store.create(None, len(THEIRS), mode=0o640) as theirs:
        theirs.pwrite(THEIRS, 0)
        world.store.link(theirs, name)
    world.store.utime(name, **TIMES)
    return world.store.stat(name)


def untouched(world: World, told: Status) -> None:
    now = world.store.stat(told.name)
    assert now._replace(in_use=None) == told._replace(in_use=None)
    with world.store.open(told.name) as buffer:
        assert_same(buffer.pread(len(THEIRS), 0), THEIRS, "another's")


def just_before(monkeypatch: pytest.MonkeyPatch, op: str, act: Callable[[], None]) -> list[str]:
    """Do something when the next request of that kind is made, and before the store has it."""
    ask, done = Connection.ask, []

    def late(self: Connection, asked: str, **fields: object) -> object:
        if asked == op and not done:
            done.append(op)
            act()
        return ask(self, asked, **fields)

    monkeypatch.setattr(Connection, "ask", late)
    return done


async def chmod(world: World, fh: int) -> None:
    await world.set("x", SimpleNamespace(st_mode=0o604), "mode")


async def chown(world: World, fh: int) -> None:
    ours = SimpleNamespace(st_uid=os.geteuid(), st_gid=os.getegid())
    await world.set("x", ours, "uid", "gid")


async def utime(world: World, fh: int) -> None:
    await world.set("x", SimpleNamespace(st_atime_ns=5, st_mtime_ns=6), "atime", "mtime")


async def truncate(world: World, fh: int) -> None:
    await world.truncate("x", 2)


async def swap(world: World, fh: int) -> None:
    await world.ask.write(fh, 5, bytes(5000))
    await world.ask.flush(fh)


async def writes(world: World, fh: int) -> None:
    await world.ask.write(fh, 5, b"67")
    await world.ask.flush(fh)


CHANGES = [
    ("chmod", chmod, b"ours "),
    ("chown", chown, b"ours "),
    ("utime", utime, b"ours "),
    ("truncate", truncate, b"ou"),
    ("truncate", writes, b"ours 67"),
    ("utime", writes, b"ours 67"),
    ("swap", swap, b"ours " + bytes(5000)),
    ("open", swap, b"ours " + bytes(5000)),
]
NAMED = [f"{change.__name__} by {op}" for op, change, _ in CHANGES]


@pytest.mark.parametrize(("op", "change", "content"), CHANGES, ids=NAMED)
def test_a_file_whose_name_is_given_away_before_a_change_leaves_the_other_alone(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    change: Callable[[World, int], Awaitable[None]],
    content: bytes,
) -> None:
    from pyfuse3 import FUSEError

    theirs = []

    async def body() -> None:
        await world.put("x", b"ours ")
        fh = await world.open("x")
        done = just_before(monkeypatch, op, lambda: theirs.append(give(world, "x")))
        if op == "open":  # it asks for its own memory again, which is gone
            with pytest.raises(FUSEError) as caught:
                await change(world, fh)
            assert caught.value.errno == errno.ESTALE
            await world.ask.release(fh)
        else:
            await change(world, fh)
            assert bytes(await world.ask.read(fh, 0, 1 << 20)) == content
            await world.close(fh)
        assert done == [op]

    run(body)
    untouched(world, *theirs)
    assert [status.name for status in world.store.list()] == ["x"]


@pytest.mark.parametrize(("op", "change", "content"), CHANGES, ids=NAMED)
def test_a_file_that_is_renamed_before_a_change_is_changed_under_its_new_name(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    change: Callable[[World, int], Awaitable[None]],
    content: bytes,
) -> None:
    theirs = []

    def renames() -> None:
        world.store.rename("x", "y")
        theirs.append(give(world, "x"))

    async def body() -> None:
        await world.put("x", b"ours ")
        fh = await world.open("x")
        done = just_before(monkeypatch, op, renames)
        await change(world, fh)
        await world.close(fh)
        assert done == [op]
        assert await world.read("y") == content

    run(body)
    untouched(world, *theirs)
    status = world.store.stat("y")
    assert status.length == len(content)
    assert status.mode == (0o604 if change is chmod else 0o644)
    if change is utime:
        assert (status.accessed_ns, status.modified_ns) == (5, 6)


def test_what_is_opened_is_what_was_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyfuse3 import FUSEError

    async def body() -> None:
        await world.put("x", b"ours")
        theirs = []
        just_before(monkeypatch, "open", lambda: theirs.append(give(world, "x")))
        with pytest.raises(FUSEError) as caught:
            await world.open("x", os.O_RDWR | os.O_TRUNC)
        assert caught.value.errno == errno.ESTALE
        untouched(world, *theirs)

    run(body)


@pytest.mark.parametrize("length", [10, len(THEIRS)], ids=["shorter", "longer"])
def test_a_file_that_others_change_before_it_is_opened_has_the_length_of_its_new_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    def swaps() -> None:
        with world.store.create(None, length) as new:
            new.pwrite(THEIRS[:length], 0)
            world.store.swap(new, "x", length)

    async def body() -> None:
        await world.put("x", bytes(100_000))
        done = just_before(monkeypatch, "open", swaps)
        fh = await world.open("x", os.O_RDONLY)
        assert done == ["open"]
        assert bytes(await world.ask.read(fh, 0, 2 * len(THEIRS))) == THEIRS[:length]
        await world.ask.release(fh)

    run(body)


async def removes(world: World) -> None:
    await world.ask.unlink(ROOT, b"x", CALLER)


async def renames(world: World) -> None:
    await world.ask.rename(ROOT, b"x", ROOT, b"y", 0, CALLER)


async def replaces(world: World) -> None:
    await world.ask.rename(ROOT, b"z", ROOT, b"x", 0, CALLER)


@pytest.mark.parametrize(
    ("op", "change", "names"),
    [
        ("remove", removes, "xz"),
        ("rename", renames, "xz"),
        ("rename", replaces, "xz"),
        ("rename", replaces, "z"),
    ],
    ids=["removed", "renamed", "replaced", "taken"],
)
def test_a_name_that_is_given_away_before_it_is_removed_or_renamed_stays(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    change: Callable[[World], Awaitable[None]],
    names: str,
) -> None:
    from pyfuse3 import FUSEError

    theirs = []

    async def body() -> None:
        for name in names:
            await world.put(name, b"ours")
        done = just_before(monkeypatch, op, lambda: theirs.append(give(world, "x")))
        with pytest.raises(FUSEError) as caught:
            await change(world)
        assert (caught.value.errno, done) == (errno.ESTALE, [op])
        assert await world.read("z") == b"ours"

    run(body)
    untouched(world, *theirs)
    assert [status.name for status in world.store.list()] == ["x", "z"]


def test_a_name_that_became_another_users_before_the_mount_looked_is_refused(
    world: World,
) -> None:
    """As the kernel refuses what is another's in a sticky directory: it looked before that."""
    from pyfuse3 import FUSEError

    someone = SimpleNamespace(uid=os.geteuid() + 1001, gid=1001, pid=0, umask=0)

    async def body() -> None:
        theirs = give(world, "x")
        await world.put("y", b"y")
        attempts = [
            lambda: world.ask.unlink(ROOT, b"x", someone),
            lambda: world.ask.rename(ROOT, b"x", ROOT, b"z", 0, someone),
            lambda: world.ask.rename(ROOT, b"y", ROOT, b"x", 0, someone),
        ]
        fh = await world.create("new")
        attempts.append(lambda: world.ask.unlink(ROOT, b"new", someone))
        for attempt in attempts:
            with pytest.raises(FUSEError) as caught:
                await attempt()
            assert caught.value.errno == errno.EPERM
        await world.close(fh)
        untouched(world, theirs)
        assert [status.name for status in world.store.list()] == ["new", "x", "y"]

    run(body)


def test_a_name_that_another_client_made_since_the_kernel_looked_is_looked_at_again(
    world: World,
) -> None:
    from pyfuse3 import FUSEError

    async def body() -> None:
        theirs = give(world, "x")
        for flags, number in ((0, errno.ESTALE), (os.O_EXCL, errno.EEXIST)):
            with pytest.raises(FUSEError) as caught:
                await world.ask.create(ROOT, b"x", 0o644, os.O_WRONLY | flags, CALLER)
            assert caught.value.errno == number
        untouched(world, theirs)

    run(body)

"""What other clients of the store do to files that the mount has open."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmabuf.store import Store
from tests.mount_requests import CALLER, ROOT, World, requests, run
from tests.support import assert_same, pattern


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with requests(tmp_path) as made:
        yield made


def test_what_was_cut_is_no_hole_although_others_kept_it_from_being_sealed(world: World) -> None:
    from pyfuse3 import FUSEError

    async def body() -> None:
        await world.put("x", b"old")
        fh = await world.open("x", os.O_RDWR | os.O_TRUNC)
        await world.ask.write(fh, 0, b"A" * 8000)
        with world.store.open("x"), pytest.raises(FUSEError):
            await world.truncate("x", 5000)
        await world.ask.write(fh, 6000, b"B")
        await world.close(fh)
        assert_same(await world.read("x"), b"A" * 5000 + bytes(1000) + b"B", "with a hole")

    run(body)


def test_a_file_whose_owner_cannot_be_set_is_there_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyfuse3 import FUSEError

    def refused(*arguments: object, **named: object) -> None:
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


def test_a_file_that_finds_no_memory_to_be_one_buffer_in_says_so(world: World) -> None:
    from pyfuse3 import FUSEError

    async def body() -> None:
        await world.put("other", bytes(30 << 20))
        fh = await world.create("x")
        for at in range(20):
            await world.ask.write(fh, at << 20, bytes(1 << 20))
        with pytest.raises(FUSEError) as caught:
            await world.close(fh)
        assert caught.value.errno == errno.ENOSPC

    run(body)
    assert world.said[-1].startswith("x: it cannot become one buffer of 20 MiB: 20 MiB are more ")
    assert [status.name for status in world.store.list()] == ["other"]
    assert world.store.usage().charged == 30 << 20


def test_what_others_open_before_it_is_sealed_gets_the_content_where_it_fits(
    world: World,
) -> None:
    from pyfuse3 import FUSEError

    async def body() -> None:
        await world.put("x", b"old content")
        inode = (await world.ask.lookup(ROOT, b"x", CALLER)).st_ino
        fh = await world.open("x", os.O_RDWR | os.O_TRUNC)
        await world.ask.write(fh, 0, b"new")
        with world.store.open("x") as others:
            await world.close(fh)
            assert others.pread(3, 0) == b"new"
            status = world.store.stat("x")
            assert (status.length, status.size) == (3, 4096)
            assert world.store.usage().charged == 4096
            assert await world.read("x") == b"new"
        fh = await world.open("x", os.O_RDWR | os.O_TRUNC)
        await world.ask.write(fh, 0, bytes(4097))
        with world.store.open("x"):
            with pytest.raises(FUSEError) as caught:
                await world.close(fh)
            assert caught.value.errno == errno.EBUSY
        assert await world.read("x") == b"new"
        assert (await world.ask.lookup(ROOT, b"x", CALLER)).st_ino == inode

    run(body)

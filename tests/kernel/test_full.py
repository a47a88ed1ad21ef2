"""A disk that fills, and bad blocks, in the middle of large transfers and copies side by side."""

import contextlib
import errno
import functools
import os
import subprocess
from pathlib import Path

import anyio
import pytest

import dmabuf
from dmabuf import aio
from dmabuf.cli import main
from tests import support
from tests.guards import needs, since
from tests.kernel.conftest import null_blk, small
from tests.support import assert_same, drop_cache, fill, poison, together, wait_until, whole
from tests.writers import WRITERS

MIB = 1 << 20
PART = 2 * MIB
WORKERS = 8

pattern = functools.cache(support.pattern)

everything = needs("udmabuf", "io_uring", "ext4", "null_blk")


@pytest.fixture
def buf():
    with dmabuf.allocate(WORKERS * PART, exporter="udmabuf") as buffer:
        yield buffer


# -- a disk that fills


def leave(folder, room):
    """Take all of a filesystem but `room` bytes."""
    status = os.statvfs(folder)
    with (folder / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, status.f_bfree * status.f_frsize - room)


@everything
@pytest.mark.parametrize("filesystem", ["ext4", "tmpfs"])
@pytest.mark.parametrize("how", ["threads", "asyncio"])
def test_writers_of_one_file(filesystem, how, buf, tmp_path):
    """Each grows the file by its part, where not all fit: those that do not take nothing along."""
    data = pattern(WORKERS * PART, 51)
    buf.pwrite(data, 0)
    errors = {}

    def judge(number, error):
        assert error.errno == errno.ENOSPC
        assert error.filename == str(path)
        assert 0 <= error.nbytes < PART
        errors[number] = error

    def write(number):
        at = number * PART
        try:
            assert file.write_from(buf, PART, file_offset=at, buffer_offset=at).nbytes == PART
        except OSError as error:
            judge(number, error)

    async def all_of_them():
        async with await aio.open(path, "w") as out, anyio.create_task_group() as group:

            async def write(number):
                at = number * PART
                try:
                    await out.write_from(buf, PART, file_offset=at, buffer_offset=at)
                except OSError as error:
                    judge(number, error)

            for number in range(WORKERS):
                group.start_soon(write, number)

    with small(filesystem, tmp_path) as folder:
        leave(folder, 5 * PART // 2)
        path = folder / "file"
        if how == "threads":
            with dmabuf.open(path, "w") as file:
                together(write)
        else:
            anyio.run(all_of_them)
        assert errors
        whole_ones = [number for number in range(WORKERS) if number not in errors]
        got = path.read_bytes()
        ends = [number * PART + PART for number in whole_ones]
        ends += [number * PART + error.nbytes for number, error in errors.items() if error.nbytes]
        assert len(got) == max(ends, default=0)
        for number in range(WORKERS):
            size = errors[number].nbytes if number in errors else PART
            at = number * PART
            assert_same(got[at : at + size], data[at : at + size], f"part {number}")


@everything
@pytest.mark.parametrize("filesystem", ["ext4", "tmpfs"])
@pytest.mark.parametrize("sized", [True, False])
def test_copies(filesystem, sized, tmp_path):
    """Three where two fit, beside one to a disk with room.

    Where the size is known all of it or nothing; from a pipe as much as fits is left whole.
    """
    data = pattern(PART, 52)
    source = tmp_path / "source"
    source.write_bytes(data)
    errors = {}
    with small(filesystem, tmp_path) as folder:
        leave(folder, 2 * PART + PART // 2)
        targets = [*(folder / f"t{number}" for number in range(3)), tmp_path / "t3"]

        def copy(number):
            with contextlib.ExitStack() as stack:
                what = source if sized else stack.enter_context(piped(source))
                try:
                    dmabuf.copy(what, targets[number])
                except OSError as error:
                    errors[number] = error

        together(copy, 4)
        assert errors and 3 not in errors
        for number, target in enumerate(targets):
            there = target.read_bytes() if target.exists() else b""
            if number not in errors:
                assert_same(there, data, "a copy that was unharmed")
                continue
            error = errors[number]
            assert (error.errno, error.filename) == (errno.ENOSPC, str(target))
            assert error.nbytes == 0 if sized else error.nbytes < PART
            assert_same(there, data[: error.nbytes], "what is whole")


@everything
@pytest.mark.parametrize("name", [*WRITERS, "cp of a stream"])
def test_a_new_file_of_which_nine_tenths_fit(name, tmp_path):
    """The old one stays, and all of the room."""
    old, new = pattern(PART // 8 + 1, 55), pattern(PART + 1, 56)
    source = tmp_path / "stream"
    source.write_bytes(new)
    with small("ext4", tmp_path) as folder:
        path = folder / "files" / "target"
        path.parent.mkdir()
        writer = WRITERS.get(name, WRITERS["cp"])
        writer.write(path, old)
        os.sync()
        leave(folder, PART * 9 // 10)
        before = os.statvfs(folder).f_bfree
        if name in WRITERS:
            with pytest.raises(OSError) as caught:
                writer.write(path, new)
            assert caught.value.errno in (errno.ENOSPC, None)  # `cp` printed it
        else:
            with piped(source) as stream:
                assert main(["cp", f"/proc/self/fd/{stream}", str(path)]) == 1
        assert_same(writer.read(path), old, "the old file")
        assert not [one for one in os.listdir(path.parent) if one.startswith(".")]
        wait_until(lambda: os.statvfs(folder).f_bfree >= before, "all of the room")


@contextlib.contextmanager
def piped(source):
    """A descriptor that a file's bytes come out of."""
    with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as cat:
        yield cat.stdout.fileno()
        cat.stdout.close()  # it may have more to say
        cat.kill()


# -- bad blocks

partial = since((6, 15), "null_blk does a part of a request that meets a bad block")
BAD = {2: MIB - 512 * 95, 5: MIB + 512 * 77}
"""By worker: where in its part a block is bad."""


@pytest.fixture
def bad(request):
    """A disk of 512-byte blocks, two of them bad; it may do a part of a request that fails."""
    partial = {"badblocks_partial_io": 1} if request.param else {}
    with null_blk("dmabuf-full", WORKERS * PART, blocksize=512, **partial) as path:
        fd = os.open(path, os.O_RDWR)
        fill(fd, pattern(WORKERS * PART, 53))
        drop_cache(fd)
        marks = Path("/sys/kernel/config/nullb/dmabuf-full/badblocks")
        for number, at in BAD.items():
            sector = (number * PART + at) // 512
            marks.write_text(f"+{sector}-{sector}")
        yield path, fd
        os.close(fd)


def heal():
    """No block is bad any more: what the disk holds is to be seen."""
    marks = Path("/sys/kernel/config/nullb/dmabuf-full/badblocks")
    for number, at in BAD.items():
        sector = (number * PART + at) // 512
        marks.write_text(f"-{sector}-{sector}")


@everything
@pytest.mark.parametrize(
    ("bad", "how"),
    [(False, "threads"), pytest.param(True, "threads", marks=partial), (False, "asyncio")],
    ids=["threads", "threads-partial", "asyncio"],
    indirect=["bad"],
)
@pytest.mark.parametrize("route", ["direct", "staged"])
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_bad_blocks_under_many(bad, buf, how, route, write):
    """Of all the transfers on one File, two meet a bad block: each names its own."""
    path, fd = bad
    old, new = pattern(WORKERS * PART, 53), pattern(WORKERS * PART, 54)
    buf.pwrite(new if write else poison(WORKERS * PART), 0)
    errors, done = {}, []

    def arguments(number):
        at = number * PART
        return {"file_offset": at, "buffer_offset": at, "route": route}

    if how == "threads":
        with dmabuf.open(path, "r+") as file:

            def move(number):
                try:
                    (file.write_from if write else file.read_into)(buf, PART, **arguments(number))
                    done.append(number)
                except OSError as error:
                    errors[number] = error

            together(move)
    else:

        async def main():
            async with await aio.open(path, "r+") as file, anyio.create_task_group() as group:

                async def move(number):
                    call = file.write_from if write else file.read_into
                    try:
                        await call(buf, PART, **arguments(number))
                        done.append(number)
                    except OSError as error:
                        errors[number] = error

                for number in range(WORKERS):
                    group.start_soon(move, number)

        anyio.run(main)
    assert set(errors) == set(BAD) and len(done) == WORKERS - len(BAD)
    heal()
    drop_cache(fd)
    now = whole(fd) if write else buf.pread(WORKERS * PART, 0)
    wanted = new if write else old
    for number in range(WORKERS):
        at = number * PART
        if number not in BAD:
            assert_same(now[at : at + PART], wanted[at : at + PART], f"part {number}")
            continue
        error, bad_at = errors[number], BAD[number]
        assert (error.errno, error.filename) == (errno.EIO, path)
        assert error.nbytes == bad_at
        assert f"at file offset {at + bad_at}," in str(error)
        assert_same(
            now[at : at + bad_at], wanted[at : at + bad_at], f"before the bad block {number}"
        )
        if write:
            assert_same(now[at + bad_at :][:512], old[at + bad_at :][:512], "the bad block")


@everything
@pytest.mark.parametrize("bad", [False], indirect=True)
def test_copies_beside_a_bad_block(bad, tmp_path):
    """All parts at once, to files: the error's nbytes is the length of what is left."""
    path, _ = bad
    old, errors = pattern(WORKERS * PART, 53), {}

    def copy(number):
        try:
            dmabuf.copy(path, tmp_path / f"t{number}", src_offset=number * PART, size=PART)
        except OSError as error:
            errors[number] = error

    together(copy)
    assert set(errors) == set(BAD)
    for number in range(WORKERS):
        at, size = number * PART, PART
        if number in BAD:
            size = errors[number].nbytes
            assert size == BAD[number]
            assert f"file offset {at + size}," in str(errors[number])
        assert_same((tmp_path / f"t{number}").read_bytes(), old[at : at + size], f"part {number}")

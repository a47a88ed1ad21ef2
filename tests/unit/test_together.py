"""Threads and processes on one Buffer and one file at once: every byte is compared."""

import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

import dmabuf
from dmabuf import aio
from tests import forking
from tests.support import PATIENCE, assert_same, drop_cache, pattern, poison, together

WORKERS = 4
PART = (512 << 10) + 1000
SIZE = WORKERS * PART
ROUNDS = 4
ROUTES = (None, "staged", "buffered", "direct")


def work(file, buffer, number):
    """Bring a part in, change it in the buffer, write it out; each round by another route.

    Neighbours' parts meet within pages and blocks.
    """
    at = number * PART
    where = {"file_offset": at, "buffer_offset": at}
    for round_ in range(ROUNDS):
        route = ROUTES[(number + round_) % len(ROUTES)]
        before = pattern(SIZE, 1)[at : at + PART] if not round_ else content(number, round_ - 1)
        buffer.pwrite(poison(PART), at)
        assert file.read_into(buffer, PART, route=route, **where).nbytes == PART
        assert_same(buffer.pread(PART, at), before, f"round {round_} of {number}: read")
        buffer.pwrite(content(number, round_), at)
        assert file.write_from(buffer, PART, route=route, **where).nbytes == PART


def content(number, round_):
    return pattern(PART, 100 * number + round_)


def check(path, buffer):
    last = b"".join(content(number, ROUNDS - 1) for number in range(WORKERS))
    with path.open("rb") as file:
        drop_cache(file.fileno())
        assert_same(file.read(), last, "the medium")
    assert_same(buffer.pread(SIZE, 0), last, "the buffer")


def test_threads(cold_path, buf):
    with dmabuf.open(cold_path, "r+") as file:
        together(lambda number: work(file, buf, number), WORKERS)
    check(cold_path, buf)


@pytest.mark.parametrize("route", [None, "staged", "buffered"])
@pytest.mark.parametrize("old", [0, SIZE])
def test_writers_of_a_file_that_grows(tmp_path, buf, route, old):
    """Their ranges meet inside pages, and the file grows under each of them."""
    path = tmp_path / "file"
    path.write_bytes(pattern(old, 2))
    with dmabuf.open(path, "r+") as file:

        def write(number):
            at = number * PART
            transfer = file.write_from(buf, PART, file_offset=at, buffer_offset=at, route=route)
            assert transfer.nbytes == PART

        together(write, WORKERS)
    assert_same(path.read_bytes(), poison(SIZE), "the file")


def test_writers_that_fail_take_nothing_from_those_that_do_not(tmp_path, buf):
    """Odd ones are refused before they begin, by a file offset that no file has."""
    path = tmp_path / "file"
    with dmabuf.open(path, "w") as file:

        def write(number):
            at = number * PART
            if number % 2:
                with pytest.raises(OSError):
                    file.write_from(buf, PART, file_offset=2**63 - 1 - PART)
            else:
                file.write_from(buf, PART, file_offset=at, buffer_offset=at)

        for _ in range(5):
            together(write, WORKERS)
    data = path.read_bytes()
    assert len(data) == SIZE - PART
    for number in range(0, WORKERS, 2):
        at = number * PART
        assert_same(data[at : at + PART], poison(SIZE)[at : at + PART], f"part {number}")


def test_threads_and_event_loops(cold_path, buf):
    """Half of the workers in two loops, of their own threads; File and engine are a loop's own."""

    async def flying(number):
        at = number * PART
        where = {"file_offset": at, "buffer_offset": at}
        async with await aio.open(cold_path, "r+") as file:
            for round_ in range(ROUNDS):
                route = ROUTES[(number + round_) % len(ROUTES)]
                buf.pwrite(poison(PART), at)
                await file.read_into(buf, PART, route=route, **where)
                before = content(number, round_ - 1) if round_ else pattern(SIZE, 1)[at : at + PART]
                assert_same(buf.pread(PART, at), before, f"round {round_} of {number}: read")
                buf.pwrite(content(number, round_), at)
                await file.write_from(buf, PART, route=route, **where)

    def run(number):
        if number < WORKERS // 2:
            work(shared, buf, number)
        else:
            anyio.run(flying, number, backend=("asyncio", "trio")[number % 2])

    with dmabuf.open(cold_path, "r+") as shared:
        together(run, WORKERS)
    check(cold_path, buf)


def test_tasks_of_one_loop(cold_path, buf):
    """On one aio.File, each with a part; they pass each other at every await."""

    async def one(file, number):
        at = number * PART
        where = {"file_offset": at, "buffer_offset": at}
        for round_ in range(ROUNDS):
            buf.pwrite(content(number, round_), at)
            await file.write_from(buf, PART, route=ROUTES[(number + round_) % 4], **where)
            buf.pwrite(poison(PART), at)
            await file.read_into(buf, PART, route=ROUTES[(number * 3 + round_) % 4], **where)
            assert_same(buf.pread(PART, at), content(number, round_), f"part {number}")

    async def main():
        async with await aio.open(cold_path, "r+") as file, anyio.create_task_group() as group:
            for number in range(WORKERS):
                group.start_soon(one, file, number)

    anyio.run(main)
    check(cold_path, buf)


def test_forked_processes(cold_path, buf):
    """Children of a process whose threads are at work; they open the file, and share the buffer."""

    def in_child(number):
        def child():
            with dmabuf.open(cold_path, "r+") as own:
                work(own, buf, number)

        forking.in_child(child)

    with dmabuf.open(cold_path, "r+") as file:

        def run(number):
            work(file, buf, number) if number % 2 else in_child(number)

        together(run, WORKERS)
    check(cold_path, buf)


_OTHER = """
import mmap, os, sys
import dmabuf
from dmabuf.memory import Buffer, Slab
from tests.unit.test_together import work

memory, path, number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with dmabuf.open(path, "r+") as file:
    size = os.fstat(memory).st_size
    with Buffer([Slab(memory, 0, size)], mmap.mmap(memory, size), exporter="memfd",
                reason="handed over", is_dmabuf=False) as buffer:
        work(file, buffer, number)
"""


def test_programs_that_were_handed_the_memory(cold_path):
    """fork and exec: each maps the memory anew, and has rings and files of its own."""
    pages = -(-SIZE // 4096) * 4096
    memory = os.memfd_create("shared", os.MFD_CLOEXEC)
    os.ftruncate(memory, pages)
    root = Path(__file__).parents[2]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", _OTHER, str(memory), str(cold_path), str(number)],
            pass_fds=[memory],
            cwd=root,
        )
        for number in range(WORKERS)
    ]
    assert [program.wait(PATIENCE) for program in programs] == [0] * WORKERS
    last = b"".join(content(number, ROUNDS - 1) for number in range(WORKERS))
    assert_same(os.pread(memory, SIZE, 0), last, "the memory")
    os.close(memory)
    with cold_path.open("rb") as file:
        drop_cache(file.fileno())
        assert_same(file.read(), last, "the medium")

"""The mount beside an ordinary file system: the same calls, at random, have the same results."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Mounted
from tests.support import together

NAMES = ("a", "b", "c", "d")
STEPS = 300


class Side:
    """One of the two directories, with what is open in it."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.open: list[int] = []

    def do(self, call: str, *arguments: object) -> object:
        """The result of a call, or its errno."""
        try:
            return getattr(self, call)(*arguments)
        except OSError as error:
            return error.errno

    def path(self, name: str) -> Path:
        return self.folder / (self.prefix + name)

    def opens(self, name: str, flags: int) -> None:
        self.open.append(os.open(self.path(name), flags, 0o644))

    def closes(self, at: int) -> None:
        os.close(self.open.pop(at))

    def reads(self, at: int, offset: int, size: int) -> bytes:
        return os.pread(self.open[at], size, offset)

    def writes(self, at: int, offset: int, data: bytes) -> int:
        return os.pwrite(self.open[at], data, offset)

    def appends(self, at: int, data: bytes) -> int:
        os.lseek(self.open[at], 0, os.SEEK_END)
        return os.write(self.open[at], data)

    def resizes(self, at: int, size: int) -> None:
        os.ftruncate(self.open[at], size)

    def truncates(self, name: str, size: int) -> None:
        os.truncate(self.path(name), size)

    def renames(self, name: str, to: str) -> None:
        os.rename(self.path(name), self.path(to))

    def unlinks(self, name: str) -> None:
        os.unlink(self.path(name))

    def contents(self) -> dict[str, bytes]:
        return {
            name: self.path(name).read_bytes() for name in NAMES if self.path(name).exists()
        } | {str(at): os.pread(fd, 1 << 24, 0) for at, fd in enumerate(self.open)}

    def states(self) -> list[tuple[int, int]]:
        told = [os.fstat(fd) for fd in self.open]
        return [(one.st_size, one.st_nlink) for one in told]


def steps(seed: int) -> Iterator[tuple[object, ...]]:
    """Calls at random; those on open files say which with a number that is taken modulo."""
    rng = random.Random(seed)

    def size() -> int:
        return rng.choice((0, 1, 100, 4095, 4096, 4097, 9000, 70000, 300000, (1 << 20) + 5))

    for _ in range(STEPS):
        kind, name, at = rng.random(), rng.choice(NAMES), rng.randrange(1 << 16)
        if kind < 0.15:
            flags = os.O_RDWR | rng.choice((0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC,
                                            os.O_CREAT | os.O_TRUNC, os.O_APPEND))  # fmt: skip
            yield "opens", name, flags
        elif kind < 0.25:
            yield "closes", at
        elif kind < 0.40:
            yield "reads", at, size(), size()
        elif kind < 0.65:
            yield "writes", at, size(), rng.randbytes(size())
        elif kind < 0.75:
            yield "appends", at, rng.randbytes(size())
        elif kind < 0.83:
            yield "resizes", at, size()
        elif kind < 0.88:
            yield "truncates", name, size()
        elif kind < 0.95:
            yield "renames", name, rng.choice(NAMES)
        else:
            yield "unlinks", name


@pytest.mark.parametrize("seed", range(3))
def test_the_same_calls_have_the_same_results(world: Mounted, tmp_path: Path, seed: int) -> None:
    _compare(world, tmp_path, seed)
    assert os.listdir(world.path) == []


def test_processes_beside_each_other(world: Mounted, tmp_path: Path) -> None:
    def work(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        _compare(world, folder, 100 + number)

    together(work, 4)
    assert os.listdir(world.path) == []


def _compare(world: Mounted, folder: Path, seed: int) -> None:
    ours, theirs = Side(world.path, f"{seed}-"), Side(folder, f"{seed}-")
    try:
        for number, (call, *arguments) in enumerate(steps(seed)):
            if call in ("closes", "reads", "writes", "appends", "resizes"):
                if not theirs.open:
                    continue
                arguments[0] %= len(theirs.open)
            expected, got = theirs.do(call, *arguments), ours.do(call, *arguments)
            assert got == expected, (seed, number, call, arguments[:2])
            assert ours.states() == theirs.states(), (seed, number, call, arguments[:2])
            if number % 20 == 0:
                assert ours.contents() == theirs.contents(), (seed, number, call)
        assert ours.contents() == theirs.contents(), seed
    finally:
        for side in (ours, theirs):
            for fd in side.open:
                os.close(fd)
            for name in NAMES:
                side.path(name).unlink(missing_ok=True)

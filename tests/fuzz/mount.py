"""The mount beside an ordinary file system: the same calls, at random, have the same results."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.mounting import Mounted, mounted
from tests.support import wait_until

NAMES = ("a", "b", "c", "d")
_ON_OPEN_FILES = ("closes", "reads", "writes", "appends", "resizes", "copies", "sends")


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

    def copies(self, at: int, offset: int, size: int) -> int:
        """Copy in the kernel to the last open file, which may be the same."""
        return os.copy_file_range(self.open[at], self.open[-1], size, offset, offset + (1 << 21))

    def sends(self, at: int, offset: int, size: int) -> bytes:
        """Read through a pipe."""
        read, write = os.pipe()
        try:
            sent = os.splice(self.open[at], write, min(size, 65536), offset_src=offset)
            return os.read(read, sent) if sent else b""
        finally:
            os.close(read)
            os.close(write)

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

    def close(self) -> None:
        while self.open:
            os.close(self.open.pop())


def steps(rng: random.Random, count: int) -> Iterator[tuple[object, ...]]:
    """Calls at random; those on open files say which with a number that is taken modulo."""

    def size() -> int:
        return rng.choice((0, 1, 100, 4095, 4096, 4097, 9000, 70000, 300000, (1 << 20) + 5))

    for _ in range(count):
        kind, name, at = rng.random(), rng.choice(NAMES), rng.randrange(1 << 16)
        if kind < 0.15:
            flags = os.O_RDWR | rng.choice((0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC,
                                            os.O_CREAT | os.O_TRUNC, os.O_APPEND))  # fmt: skip
            yield "opens", name, flags
        elif kind < 0.25:
            yield "closes", at
        elif kind < 0.36:
            yield "reads", at, size(), size()
        elif kind < 0.38:
            yield "copies", at, size(), size()
        elif kind < 0.40:
            yield "sends", at, size(), size()
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


def compare(world: Mounted, folder: Path, rng: random.Random, prefix: str, count: int = 300) -> int:
    """Make calls on the mount and in a folder, and compare; return how many were made.

    At the end what the store holds under each name is compared too.
    """
    ours, theirs = Side(world.path, prefix), Side(folder, prefix)
    made = 0
    try:
        for number, (call, *arguments) in enumerate(steps(rng, count)):
            if call in _ON_OPEN_FILES:
                if not theirs.open:
                    continue
                arguments[0] %= len(theirs.open)
            expected, got = theirs.do(call, *arguments), ours.do(call, *arguments)
            made += 1
            about = (prefix, number, call, arguments[:2])
            assert got == expected, (*about, got, expected)
            assert ours.states() == theirs.states(), about
            if number % 20 == 0:
                assert ours.contents() == theirs.contents(), about
        ours.close()
        theirs.close()
        left = theirs.contents()
        assert ours.contents() == left, prefix
        _compare_stored(world, prefix, left)
    finally:
        for side in (ours, theirs):
            side.close()
            for name in NAMES:
                side.path(name).unlink(missing_ok=True)
    return made


def _compare_stored(world: Mounted, prefix: str, left: dict[str, bytes]) -> None:
    """Compare with the store, to which a last close is reported after close(2) has returned."""
    for name, data in left.items():
        wait_until(
            lambda name=name, data=data: world.store.stat(prefix + name).length == len(data),
            f"{prefix}{name} of {len(data)} bytes in the store",
        )
        with world.store.open(prefix + name, "r") as buffer:
            assert buffer.pread(len(data), 0) == data, (prefix, name)


@contextlib.contextmanager
def mount_target() -> Iterator[Callable[[random.Random], int]]:
    """Yield a target that makes calls on a mount and beside it, and returns their number."""
    with contextlib.ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        (top / "model").mkdir()
        world = stack.enter_context(mounted(top))
        numbers = itertools.count()
        yield lambda dice: compare(world, top / "model", dice, f"{next(numbers)}-", 60)

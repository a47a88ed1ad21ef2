"""Models that processes share, in a store that `load` starts: helpers of the tests.

`python -m tests.sharing --count 500` kills loaders, workers and the store at random moments while
processes load models and compare every byte.
"""

import argparse
import contextlib
import functools
import mmap
import os
import random
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from dmabuf.store import Store, connect
from tests.support import PATIENCE, pattern, wait_until

STEPS = [
    f"{when} {name}"
    for name in ("reserve", "create", "link", "open")
    for when in ("before", "after")
]
"""Moments of a load that makes a model; "fill" is the middle of reading the file."""
STEPS.insert(4, "fill")


def servers(socket: Path) -> list[int]:
    """Return the processes that serve at a socket."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"serve" in words and os.fsencode(socket) in words:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(folder.name)] if state != "Z" else []
    return found


def kill_servers(socket: Path) -> None:
    """Kill the store at a socket, if there is one, and wait until it is gone."""
    killed = servers(socket)
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not {*killed} & {*servers(socket)}, "the end of the store")


def act_at(step: str, act: Callable[[], object]) -> Callable[[int, int | None], None]:
    """Have `act` run once at a step of the next load in this process; return its `progress`.

    Call it in a child, or undo it by :func:`undisturbed`.
    """
    when, _, name = step.partition(" ")
    acted: list[bool] = []

    def once() -> None:
        if not acted:
            acted.append(True)
            act()

    def progress(done: int, total: int | None) -> None:
        if step == "fill":
            once()

    if name:
        method = getattr(Store, name)

        def replacement(*arguments: object, **how: object) -> object:
            if when == "before":
                once()
            result = method(*arguments, **how)
            if when == "after":
                once()
            return result

        setattr(Store, name, replacement)
    return progress


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what `act_at` did, at the end of the block."""
    before = {name: getattr(Store, name) for name in ("reserve", "create", "link", "open")}
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Store, name, method)


class Child:
    """A forked process that works until it has said so, then waits to be ended."""

    def __init__(self, work: Callable[[Callable[[bytes], None]], object]) -> None:
        """Start it; `work` gets a function that tells the parent something."""
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the parent's threads
            self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reading)
                kept = work(lambda told: os.write(writing, told + b"\n"))
                signal.pause()
                del kept
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        os.close(writing)
        self._reading, self._read = reading, b""

    def told(self) -> bytes:
        """Return what it tells next."""
        while b"\n" not in self._read:
            assert select.select([self._reading], [], [], PATIENCE)[0], "the child tells nothing"
            more = os.read(self._reading, 4096)
            assert more, "the child has ended"
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        os.kill(self.pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL
        self.close()

    def close(self) -> None:
        """Close what it tells by; it has ended."""
        os.close(self._reading)


# -- the soak

_TENSOR = 3_000_000
_MODELS = 4


@functools.cache
def _expected(number: int) -> bytes:
    return pattern(_TENSOR, number)


class Worker:
    """A process that loads one model after the other, until it is killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Start it."""
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._work(folder, random.Random(seed))
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    @property
    def loads(self) -> tuple[int, int]:
        """How many models it has compared, and how many of them it has read from the file."""
        compared, read = struct.unpack_from("QQ", self._memory)
        return compared, read

    def _work(self, folder: Path, dice: random.Random) -> None:
        from dmabuf import safetensors

        compared = read = 0
        while True:
            number = dice.randrange(_MODELS)
            path, socket = folder / f"{number}.safetensors", folder / "s"
            model = safetensors.load(path, framework="np", shared=socket)
            for _ in range(dice.randrange(1, 4)):
                if bytes(model.raw("t")) != _expected(number):
                    raise AssertionError(f"{path}: wrong bytes, {model.transfers}")
            compared, read = compared + 1, read + bool(model.transfers)
            struct.pack_into("QQ", self._memory, 0, compared, read)

    def kill(self) -> bool:
        """Kill it; return whether it was running."""
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL


def soak(count: int, seed: int, folder: Path) -> None:
    """Kill a process `count` times; raise AssertionError if a worker has ended by itself."""
    import numpy
    import safetensors.numpy

    dice, socket = random.Random(seed), folder / "s"
    for number in range(_MODELS):
        tensors = {"t": numpy.frombuffer(_expected(number), "u1")}
        safetensors.numpy.save_file(tensors, folder / f"{number}.safetensors")
    workers = [Worker(folder, seed + number) for number in range(4)]
    killed = {"worker": 0, "store": 0}
    compared = read = 0
    try:
        for number in range(count):
            time.sleep(dice.uniform(0, 0.2))
            if dice.random() < 0.07:
                killed["store"] += len(servers(socket))
                kill_servers(socket)
            else:
                worker = workers.pop(dice.randrange(len(workers)))
                assert worker.kill(), "a worker has ended by itself"
                killed["worker"] += 1
                compared, read = compared + worker.loads[0], read + worker.loads[1]
                workers.append(Worker(folder, seed + 100 + number))
        before = [one.loads[0] for one in workers]
        wait_until(
            lambda: all(one.loads[0] > old + 3 for one, old in zip(workers, before, strict=True))
        )
    finally:
        ended = [one.pid for one in workers if not one.kill()]
        assert not ended, "a worker has ended by itself"
        compared += sum(one.loads[0] for one in workers)
        read += sum(one.loads[1] for one in workers)
    with connect(socket) as store:
        wait_until(lambda: all(one.cached for one in store.list()))
        wait_until(lambda: store.usage().names == len(store.list()) <= _MODELS)
        assert not any(store.stat(one.name).in_use for one in store.list())
    kill_servers(socket)
    print(f"killed {killed}; {compared} models compared, {read} of them read from a file")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        soak(options.count, options.seed, Path(name))
    sys.exit(0)

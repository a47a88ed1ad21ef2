"""Models that processes share, in a store that `load` starts: helpers of the tests."""

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from dmabuf.store import Store
from tests.support import wait_until

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
    for pid in servers(socket):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not servers(socket), "the end of the store")


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
            finally:
                os._exit(99)
        os.close(writing)
        self._told = os.fdopen(reading, "rb")

    def told(self) -> bytes:
        """Return what it tells next."""
        line = self._told.readline()
        assert line, "the child has ended"
        return line[:-1]

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        os.kill(self.pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL
        self._told.close()

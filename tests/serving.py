"""A store that serves for a test: in a thread of this process, or as the program."""

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from dmabuf.store import place
from dmabuf.store.server import Server


@contextlib.contextmanager
def in_a_thread(path: Path | str, max_memory: int = 64 << 20) -> Iterator[Server]:
    """The server; its loop runs in a thread until the block ends."""
    with place.listening(str(path)) as listener, serving(Server(listener, max_memory)) as server:
        yield server


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """A server whose loop runs in a thread until the block ends."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def as_a_program(path: Path | str, *options: object, **how: object) -> Iterator[subprocess.Popen]:
    """`dmabuf serve`, once it listens; at the end SIGTERM, unless it is gone already."""
    command = [sys.executable, "-m", "dmabuf.cli", "serve", "--socket", path, *options]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, **how)
    try:
        said = [process.stderr.readline()]
        while not said[-1].startswith("serving at "):  # a kernel without marks is told of
            assert said[-1], "".join(said)
            said.append(process.stderr.readline())
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        process.stderr.close()


class Loop:
    """The server's, one call at a time."""

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()

    def later(self, what: Callable[..., None], *arguments: object) -> None:
        self._calls.put(lambda: what(*arguments))

    def next(self) -> None:
        self._calls.get(timeout=30)()

    def until(self, done: Callable[[], object]) -> None:
        while not done():
            self.next()

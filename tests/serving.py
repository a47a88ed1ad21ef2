"""A store that serves for a test, and what may come between it and its client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from dmabuf.store import Server, listening
from tests.support import PATIENCE


@contextlib.contextmanager
def in_a_thread(path: Path | str, max_memory: int = 64 << 20) -> Iterator[Server]:
    """A server whose loop runs in a thread until the block ends."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            failed.append(error)

    with listening(str(path)) as listener:
        server = Server(listener, max_memory)
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
    """`dmabuf serve`, once it listens; SIGTERM at the end, unless it has ended."""
    command = [sys.executable, "-m", "dmabuf.cli", "serve", "--socket", path, *options]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, **how)
    try:
        first = process.stderr.readline()
        assert first.startswith("serving at "), first + process.stderr.read()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=PATIENCE)
        process.stderr.close()


@contextlib.contextmanager
def for_every_user(path: Path | str, *options: object) -> Iterator[subprocess.Popen]:
    """`dmabuf serve` on a socket that every user may connect to."""
    with as_a_program(path, *options) as process:
        os.chmod(path, 0o666)
        yield process


class Between:
    """A socket between a client and its store, where a test acts just before a request."""

    def __init__(self, path: Path, store: Path) -> None:
        self._store, self._acts = store, dict[str, Callable[[], object]]()
        self._every: Callable[[], object] | None = None
        self.done: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def reset(self) -> None:
        """Forget what was to be done, and what was."""
        self._acts.clear()
        self.done.clear()

    def before(self, op: str, act: Callable[[], object]) -> None:
        """Act once, just before the store gets the next request of this operation."""
        self._acts[op] = act

    def around_each(self, act: Callable[[], object]) -> None:
        """Act before and after every request."""
        self._every = act

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=[client]).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as store:
            with contextlib.suppress(OSError):
                store.connect(str(self._store))
                while request := client.recv(4096):
                    op = json.loads(request)["op"]
                    act = self._acts.pop(op, None)
                    if act is not None:
                        act()
                        self.done.append(op)
                    if self._every is not None:
                        self._every()
                    store.send(request)
                    reply, fds, _, _ = socket.recv_fds(store, 1 << 16, 253)
                    if self._every is not None:
                        self._every()
                    socket.send_fds(client, [reply], fds)
                    for fd in fds:
                        os.close(fd)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()


@contextlib.contextmanager
def served_by(path: Path, store: Path) -> Iterator[Between]:
    """A Between at ``path`` until the block ends."""
    between = Between(path, store)
    try:
        yield between
    finally:
        between.close()

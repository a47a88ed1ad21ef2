"""Servers of the store that are restarted, and clients that work meanwhile.

`python -m tests.restarting --count 1000` restarts servers of each kind in turn.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dmabuf.store
from tests.serving import as_a_program
from tests.support import wait_until

_START = """
import fcntl, os, sys
given = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 500) for fd in sys.argv[1].split(",")]
for index, fd in enumerate(given):
    os.dup2(fd, 3 + index, inheritable=True)
os.closerange(3 + len(given), 1024)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "dmabuf.cli", "serve", *sys.argv[2:]])
"""


class Systemd:
    """What systemd does for a server: its listening socket and its descriptor store."""

    def __init__(self, path: Path, room: int = 1000) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen()
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(f"{path}.notify")
        self.stored: dict[str, int] = {}
        self._environment = os.environ | {"NOTIFY_SOCKET": f"{path}.notify", "FDSTORE": str(room)}
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        self._ready.clear()
        descriptors = [self.listener.fileno(), *self.stored.values()]
        names = {
            "LISTEN_FDS": str(len(descriptors)),
            "LISTEN_FDNAMES": ":".join(["dmabuf.socket", *self.stored]),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", _START, ",".join(map(str, descriptors))],
            env=self._environment | names, pass_fds=descriptors, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._ready.wait(100)
        return process

    def restart(self, number: int = signal.SIGTERM) -> None:
        """End the server by a signal and start another."""
        self.process.send_signal(number)
        assert self.process.wait(timeout=100) == (0 if number == signal.SIGTERM else -number)
        self._flush()
        self.process = self._start()

    def _flush(self) -> None:
        """Wait until everything that the server sent has been read."""
        self._ready.clear()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"READY=1", self.notified.getsockname())
        assert self._ready.wait(100)

    def _read(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.notified, 4096, 253)
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTORE" in fields:
                assert fields["FDNAME"] not in self.stored and fields["FDPOLL"] == "0"
                (self.stored[fields["FDNAME"]],) = descriptors
            elif "FDSTOREREMOVE" in fields:
                os.close(self.stored.pop(fields["FDNAME"]))
            elif fields == {"READY": "1"}:
                self._ready.set()
            else:
                return

    def close(self) -> None:
        """End the server, and forget what it stored."""
        self.process.terminate()
        self.process.wait(timeout=100)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"END=1", self.notified.getsockname())
        self._reader.join()
        for fd in self.stored.values():
            os.close(fd)
        self.notified.close()
        self.listener.close()


class Replacing:
    """A server that the next one replaces."""

    def __init__(self, path: Path) -> None:
        self._path, self._stack = path, contextlib.ExitStack()
        self.process = self._stack.enter_context(as_a_program(path))

    def restart(self) -> None:
        """Start a server that takes over from the running one, which then ends by itself."""
        before, self._before = self.process, self._stack
        self._stack = contextlib.ExitStack()
        self.process = self._stack.enter_context(as_a_program(self._path, "--replace"))
        assert before.wait(timeout=100) == 0
        self._before.close()

    def close(self) -> None:
        """End the server."""
        self._stack.close()


class Killed(Systemd):
    """A server of systemd that is killed each time."""

    def restart(self, number: int = signal.SIGKILL) -> None:
        """Kill the server and start another."""
        super().restart(number)


KINDS = {"replace": Replacing, "systemd": Systemd, "killed": Killed}


class Client:
    """A thread that fills, names, checks, changes and removes buffers until it is stopped.

    A request may fail only where the server is killed; ``interrupted`` counts those.
    """

    NAMES = 8

    def __init__(self, path: Path, number: int) -> None:
        self._path, self._number = path, number
        self.expected: dict[str, tuple[int, int]] = {}  # the buffer's number and its length
        self.done = self.interrupted = 0
        self.error: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with dmabuf.store.connect(self._path) as store:
                while not self._stopping.is_set():
                    try:
                        self._step(store)
                        self.done += 1
                    except (ConnectionError, FileNotFoundError) as error:
                        if isinstance(error, FileNotFoundError) and not self.interrupted:
                            raise
                        self.interrupted += 1
        except BaseException as error:
            self.error = error

    def _step(self, store: dmabuf.store.Store) -> None:
        name = f"{self._number}-{self.done + self.interrupted}"
        with store.create(None, 5000) as buffer:
            buffer.pwrite(name.encode(), 0)
            status = store.link(buffer, name, length=len(name))
        self.expected[name] = status.number, len(name)
        store.chmod(name, 0o640)
        self.check(store)
        if len(self.expected) > self.NAMES:
            oldest = next(iter(self.expected))
            del self.expected[oldest]
            store.remove(oldest)

    def check(self, store: dmabuf.store.Store) -> None:
        """Compare what the store has with what was put there."""
        for name, (number, length) in self.expected.items():
            buffer, status = store.open_with_status(name, number=number)
            with buffer:
                assert status.length == length
                assert buffer.pread(length, 0) == name.encode()

    def stop(self) -> None:
        """End the thread; raise its error."""
        self._stopping.set()
        self._thread.join()
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def busy(path: Path, count: int = 3) -> Iterator[list[Client]]:
    """Clients that work until the block ends; what they put is then compared once more."""
    clients = [Client(path, number) for number in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.stop()
    with dmabuf.store.connect(path) as store:
        for client in clients:
            client.check(store)
        wait_until(lambda: store.usage().names == len(store.list()), "no buffers without names")


def at_work(clients: list[Client]) -> None:
    """Wait until each client has done something more."""
    before = [client.done for client in clients]
    wait_until(
        lambda: all(
            client.done > count or client.error
            for client, count in zip(clients, before, strict=True)
        ),
        "every client at work",
    )


def soak(kind: str, count: int) -> None:
    """Restart a server while clients work; raise AssertionError if a name or its bytes are lost."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder, "s")
        with contextlib.closing(KINDS[kind](path)) as server, busy(path) as clients:
            for _ in range(count):
                at_work(clients)
                server.restart()
            at_work(clients)
    if kind != "killed":
        assert not any(client.interrupted for client in clients)
    buffers, failed = sum(one.done for one in clients), sum(one.interrupted for one in clients)
    print(
        f"{kind}: {count} restarts in {time.monotonic() - begun:.0f} s; {len(clients)} clients "
        f"named {buffers} buffers, {failed} requests were interrupted; no name was lost",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    count = parser.parse_args().count
    for number, kind in enumerate(KINDS):
        soak(kind, (count + number) // len(KINDS))

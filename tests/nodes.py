"""Nodes that serve for a test, clients that speak the protocol by hand, and nodes that lie."""

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from dmabuf import remote
from tests.serving import in_a_thread

HELLO = b"dmabuf-remote/1".ljust(24) + b"\n"
_HEADER = struct.Struct("!II")


@contextlib.contextmanager
def node(
    folder: Path, address: str = "127.0.0.1:0", max_memory: int = 64 << 20, **how: object
) -> Iterator[remote.Listener]:
    """A node with a store, which serves the files of a folder from this process."""
    with (
        in_a_thread(folder.parent / "store.sock", max_memory) as server,
        remote.serving(address, folder, store=server, **how) as listener,
    ):
        yield listener


def certificates(
    folder: Path, name: str, authority: str = "authority", host: str = "127.0.0.1"
) -> remote.Certificates:
    """Certificates for a host, signed by an authority, which is made where it is missing."""

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 7]
    root, rest = folder / authority, folder / name
    if not root.with_suffix(".pem").exists():
        paths = ["-keyout", root.with_suffix(".key"), "-out", root.with_suffix(".pem")]
        openssl(*new, "-x509", "-subj", f"/CN={authority}", *paths)
    paths = ["-keyout", rest.with_suffix(".key"), "-out", rest.with_suffix(".pem")]
    openssl(
        *new, "-x509", "-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{host}",
        "-addext", "basicConstraints=critical,CA:FALSE",
        "-CA", root.with_suffix(".pem"), "-CAkey", root.with_suffix(".key"), *paths,
    )  # fmt: skip
    return remote.Certificates(
        str(rest.with_suffix(".pem")), str(rest.with_suffix(".key")), str(root.with_suffix(".pem"))
    )


class Peer:
    """An end of a connection that sends and receives by hand."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(120)

    @classmethod
    def of(cls, address: str, hello: bytes = HELLO) -> "Peer":
        """A client of a node, once greetings are exchanged."""
        host, _, port = address.rpartition(":")
        made = cls(socket.create_connection((host, int(port))))
        made.socket.sendall(hello)
        assert made.take(len(HELLO)) == HELLO
        return made

    def take(self, size: int) -> bytes:
        """Receive exactly so many bytes."""
        found = b""
        while len(found) < size:
            part = self.socket.recv(size - len(found))
            if not part:
                raise EOFError
            found += part
        return found

    def send(self, **fields: object) -> None:
        text = json.dumps(fields).encode()
        self.socket.sendall(_HEADER.pack(len(text), 0) + text)

    def send_data(self, data: bytes) -> None:
        self.socket.sendall(_HEADER.pack(0, len(data)) + data)

    def receive(self) -> dict | bytes:
        """Receive the next message."""
        text, data = _HEADER.unpack(self.take(8))
        return json.loads(self.take(text)) if text else self.take(data)

    def ask(self, **fields: object) -> dict:
        self.send(**fields)
        return self.receive()

    def ended(self) -> bool:
        """Wait for the other end to close the connection."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(1 << 20):
                pass
        return True

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


@contextlib.contextmanager
def lying_node(behave: Callable[[Peer], None], hello: bytes = HELLO) -> Iterator[str]:
    """The address of a node that greets one client, reads its greeting, and then misbehaves."""

    def run() -> None:
        with contextlib.suppress(OSError, EOFError):
            connection, _ = listener.accept()
            with Peer(connection) as peer:
                peer.socket.sendall(hello)
                peer.take(len(HELLO))
                behave(peer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def relay(address: str, most: int, act: Callable[[], object]) -> Iterator[str]:
    """An address through which clients reach a node, until it has sent so many bytes: then act.

    The connection ends then, and no other one is accepted.
    """
    passed, threads = 0, list[threading.Thread]()

    def forward(client: socket.socket) -> None:
        nonlocal passed
        host, _, port = address.rpartition(":")
        with client, socket.create_connection((host, int(port))) as there:
            while passed <= most:
                for one in select.select([client, there], [], [])[0]:
                    data = one.recv(1 << 16)
                    if not data:
                        return
                    (there if one is client else client).sendall(data)
                    passed += len(data) if one is there else 0
            listener.shutdown(socket.SHUT_RDWR)
            act()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=forward, args=[listener.accept()[0]]))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            for one in threads:
                one.join()


def pumps() -> list[int]:
    """The pumps of this process, the oldest first: that of a node in it, then its client's."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
            command = Path("/proc", pid, "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and b"dmabuf.remote.pump" in command:
            found.append((int(fields[19]), int(pid)))
    return [pid for _, pid in sorted(found)]


def url_of(path: Path) -> str:
    """The URL of a node at a Unix socket."""
    return f"dmabuf://{str(path).replace('/', '%2F')}"


def sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and their sizes."""
    return {name: os.stat(folder / name).st_size for name in sorted(os.listdir(folder))}

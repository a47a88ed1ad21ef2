"""What the store granted and nobody reads: it counts as its user's, and others get theirs."""

import contextlib
import errno
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf.store
from dmabuf.store import clients, memory, place, protocol
from dmabuf.store.names import Peer
from dmabuf.store.protocol import Grant
from dmabuf.store.server import Server
from tests.serving import serving
from tests.unit.test_store_users import SERVE

_OPEN = protocol.pack_request("open", name="n", mode="r", trusted=False, number=None)


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder, "store.sock")


class Unreading:
    """A client that does not read what it is told until it is asked to."""

    def __init__(self, stack: contextlib.ExitStack, path: Path) -> None:
        self.socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.socket.settimeout(30)
        self.socket.connect(str(path))

    def ask(self, until: int = select.POLLIN) -> None:
        self.socket.send(_OPEN)
        told = select.poll()
        told.register(self.socket, until)
        assert told.poll(30_000)

    def be_ended(self) -> None:
        """By what nobody sends before having read the last reply."""
        self.ask(select.POLLRDHUP)

    def read(self) -> int:
        """How many descriptors came. Raises Refusal."""
        data, fds, _, _ = socket.recv_fds(self.socket, protocol.REPLY_BYTES, 253)
        for fd in fds:
            os.close(fd)
        protocol.parse_reply(data)
        return len(fds)

    def is_refused(self) -> None:
        with pytest.raises(protocol.Refusal, match="close those connections") as caught:
            self.read()
        assert caught.value.errno == errno.ETOOMANYREFS


def test_no_user_has_more_under_way_than_is_left_for_others(path: Path, monkeypatch) -> None:
    """Of 64 that may be, with 20 in each grant."""
    users = iter([0, 1, 1, 1, 2])
    granted = Grant("dma-buf", 20, False, True), [0] * 20, None
    monkeypatch.setattr(clients, "_peer", lambda connection: Peer(next(users), 0))
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(place.listening(str(path)))
        stack.enter_context(serving(Server(listener, 4096, descriptors=64)))
        with dmabuf.store.connect(path) as store:
            store.create("n", 4096, exporter="memfd", mode=0o666).close()
        monkeypatch.setattr(memory.Memory, "grant", lambda *_, **how: granted)
        one, two, three = (Unreading(stack, path) for _ in range(3))
        one.ask()
        two.ask()
        two.is_refused()
        one.be_ended()  # which changes nothing
        two.ask()
        two.is_refused()
        other = Unreading(stack, path)
        other.ask()
        assert other.read() == 20
        assert one.read() == 20
        two.ask()
        two.socket.close()  # unread
        three.ask()
        assert three.read() == 20


# An unprivileged server that all may connect to, as one of systemd's with SocketMode=0666.
_SERVE = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))" + SERVE.replace(
    "    server = ", "    os.chmod(sys.argv[1], 0o666)\n    server = "
)
_LEAVE_UNREAD = """
import contextlib, os, sys
from pathlib import Path
from dmabuf.store import protocol
from tests.unit.test_store_unread import Unreading
os.setgroups([]); os.setresgid(4005, 4005, 4005); os.setresuid(4006, 4006, 4006)

def leave_unread():
    left.append(Unreading(stack, Path(sys.argv[1])))
    left[-1].ask()
    left[-1].be_ended()

left = []
with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):  # turned away
        while len(left) < 200:
            leave_unread()
    try:
        left[-1].read()
    except protocol.Refusal as refusal:
        print(refusal.errno, refusal.text, flush=True)
    sys.stdin.readline()
    left.pop().socket.close()
    left.pop(0).socket.close()
    leave_unread()
    print(left[-1].read(), flush=True)
"""


@contextlib.contextmanager
def program(source: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", source, path, str(1 << 20)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be any user")
def test_a_user_who_leaves_all_unread_has_none_refused_to_others(path: Path) -> None:
    """The kernel lets a server without privileges have as many under way as open: here 128."""
    with program(_SERVE, path) as server:
        assert server.stdout.readline() == "serving\n"
        with dmabuf.store.connect(path) as store:
            store.create("n", 4096, exporter="memfd", mode=0o666).close()
            with program(_LEAVE_UNREAD, path) as leaving:
                said = leaving.stdout.readline()
                for _ in range(3):
                    store.open("n").close()
                assert said.startswith(f"{errno.EUSERS} the store has as many clients")
                assert "until they are closed or read to the end" in said
                leaving.stdin.write("\n")
                leaving.stdin.flush()
                assert leaving.stdout.readline() == "1\n", "one was closed, and one may come"

"""A node and its clients: each gets messages that the other never sends, and goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import dmabuf
from dmabuf import remote
from tests.nodes import HELLO, node
from tests.support import pattern, poison

Mutate = Callable[[random.Random, bytes], bytes]

SIZE = 100_000
DATA = pattern(SIZE, 3)
PLACE, ROOM = 4096, 10_000
"""Where in its buffer a client reads to."""
_VALUES = (
    0, 1, 2, -1, 5000, 2**62, 2**63, 1.5, True, False, None, "", "x", "a.bin", "a/b", "..",
    "\ud800", "any", [], {}, [[0, 100]], [[0, 2**62]], [["x", 5000]], [[5, 1], [9, 2**63 - 1]],
)  # fmt: skip
_TERMS = {"require": "any", "route": None, "prefer": "zero-copy", "sync": False}
_MOVE = {"file": 1, "segments": [[0, 100]], "whole": False, "checksum": 0, "terms": _TERMS}
_REQUESTS: tuple[dict[str, object], ...] = (
    {"op": "open", "path": "a.bin", "mode": "r"},
    {"op": "open", "path": "new", "mode": "replace"},
    {"op": "size", "file": 1},
    {"op": "flush", "file": 1},
    {"op": "close", "file": 1},
    {"op": "commit", "file": 2, "sync": False},
    {"op": "plan", "file": 1, "direction": "read", "offset": 0, "size": 9, "terms": _TERMS},
    {"op": "read", **_MOVE},
    {"op": "write", **_MOVE, "file": 2},
    {"op": "fetch", "names": [["x", 5000], ["none", 1]], "checksum": 100},
    {"op": "publish", "name": "x", "size": 3, "mode": 0o600, "replace": True, "checksum": 0},
    {"op": "remove", "name": "y"},
    {"op": "ls", "after": ""},
    {"op": "none"},
)
_SIDE = {
    "nbytes": 100, "route": "direct", "reason": "", "rejected": {}, "registered": False,
    "requests": 1, "reissues": 0, "copied": 0, "seconds": 0.5,
}  # fmt: skip
_ERROR = {
    "kind": "OSError", "errno": 5, "text": "no", "path": "a.bin", "nbytes": 0,
    "file_offset": None, "index": None,
}  # fmt: skip
_REPLIES: tuple[dict[str, object], ...] = (
    {"file": 1},
    {"size": 100, "modified_ns": 1},
    {"nbytes": 100, "side": _SIDE, "checksum": ""},
    {"error": _ERROR},
    {"names": [100, _ERROR]},
    {"names": []},
    {"names": [{"name": "x"}]},
    {"route": "direct", "reason": "", "rejected": {}},
    {"go": True},
    {"wait": True},
)


def _packed(dice: random.Random, fields: dict[str, object], mutated: Mutate) -> bytes:
    """Return a message, of which some field is often wrong, with its header."""
    made = {
        name: dice.choice(_VALUES) if dice.random() < 0.1 else value
        for name, value in fields.items()
    }
    raw = json.dumps(made).encode()
    if dice.random() < 0.2:
        raw = mutated(dice, raw)
    header = len(raw).to_bytes(4) + bytes(4)
    return (mutated(dice, header) if dice.random() < 0.05 else header) + raw


def _data(dice: random.Random) -> bytes:
    size = dice.choice((1, 3, 50, 100, 101))
    return bytes(4) + size.to_bytes(4) + b"x" * (size - (dice.random() < 0.1))


def _messages(
    dice: random.Random, templates: tuple[dict[str, object], ...], mutated: Mutate
) -> bytes:
    return b"".join(
        _data(dice) if dice.random() < 0.3 else _packed(dice, dice.choice(templates), mutated)
        for _ in range(dice.randrange(1, 8))
    )


class _Faults(logging.Handler):
    """Keeps what the node logs of its own faults."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(self.format(record))


@contextlib.contextmanager
def _faults() -> Iterator[list[str]]:
    log, handler = logging.getLogger("dmabuf"), _Faults()
    log.addHandler(handler)  # which also keeps what is logged from standard error
    try:
        yield handler.found
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def node_target(mutated: Mutate) -> Iterator[Callable[[random.Random], None]]:
    """Yield a target that sends messages to a real node, with a good client beside it."""
    with contextlib.ExitStack() as stack:
        faults = stack.enter_context(_faults())
        top = stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))
        folder = Path(top, "served")
        folder.mkdir()
        (folder / "a.bin").write_bytes(DATA)
        listener = stack.enter_context(node(folder, f"unix:{top}/node.sock"))
        good = stack.enter_context(remote.connect(listener.address))
        buffer = stack.enter_context(dmabuf.allocate(SIZE, exporter="memfd"))
        good.publish("x", buffer, 5000)
        tried = 0

        def attempt(dice: random.Random) -> None:
            nonlocal tried
            tried += 1
            opening = b"" if dice.random() < 0.3 else _packed(dice, _REQUESTS[0], mutated)
            with socket.socket(socket.AF_UNIX) as bad:
                bad.settimeout(30)
                bad.connect(f"{top}/node.sock")
                with contextlib.suppress(ConnectionError):
                    bad.sendall(HELLO + opening + _messages(dice, _REQUESTS, mutated))
                    bad.shutdown(socket.SHUT_WR)
                    while bad.recv(1 << 16):
                        pass
            assert not faults, faults.pop()
            if tried % 16 == 0:
                with good.open("a.bin") as file:
                    assert file.read_into(buffer, audit="always").nbytes <= file.size
                good.publish("x", buffer, 5000)
                assert good.fetch("x", buffer).nbytes == 5000
                for status in good.ls():
                    good.remove(status.name) if status.name != "x" else None
                for name in os.listdir(folder):
                    os.unlink(folder / name) if name != "a.bin" else None

        yield attempt


@contextlib.contextmanager
def client_target(mutated: Mutate) -> Iterator[Callable[[random.Random], None]]:
    """Yield a target in which a client reads the replies of a node that lies."""
    with contextlib.ExitStack() as stack:
        top = stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{top}/node.sock")
        listener.listen()
        answers: SimpleQueue[bytes | None] = SimpleQueue()

        def answer() -> None:
            while (answered := answers.get()) is not None:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(ConnectionError):
                    connection.sendall(HELLO + answered)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        stack.callback(thread.join)
        stack.callback(answers.put, None)
        buffer = stack.enter_context(dmabuf.allocate(PLACE + ROOM + 4096, exporter="memfd"))
        before = poison(buffer.size)

        def attempt(dice: random.Random) -> None:
            buffer.pwrite(before, 0)
            opening = _packed(dice, _REPLIES[0], mutated) if dice.random() < 0.7 else b""
            answers.put(opening + _messages(dice, _REPLIES, mutated))
            where, audit = {"buffer_offset": PLACE}, dice.choice(("first", "off", "always"))
            with remote.connect(f"unix:{top}/node.sock", timeout=30) as there:
                with contextlib.suppress(OSError, ValueError, EOFError):
                    if not opening:
                        there.ls()
                        there.fetch_many([("x", PLACE, 100), ("y", PLACE + 100, 50)], buffer)
                        there.publish("x", buffer, 100)
                    for mode in ("r", "r+"):
                        file = there.open("a.bin", mode)
                        file.read_into(buffer, 100, audit=audit, **where)
                        assert file.size >= 0 and file.plan(buffer)
                        file.write_from(buffer, 100, audit=audit, **where)
            after = buffer.pread(buffer.size, 0)
            assert after[:PLACE] == before[:PLACE]
            assert after[PLACE + 150 :] == before[PLACE + 150 :]

        yield attempt

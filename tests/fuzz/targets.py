"""The targets. Each takes the dice and tries one input; it raises where the answer is wrong.

Those of `BYTES` make their input first, as bytes. corpus.py keeps inputs of them that reach code
which no other one reaches, and one of three attempts changes such an input instead of making one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

import dmabuf
import dmabuf.store
from dmabuf.inspect import kernel_text
from dmabuf.kernel import proc
from dmabuf.safetensors import header
from dmabuf.store import protocol
from tests.fuzz import corpus
from tests.fuzz.commands import check_line, commands_target, make_line
from tests.fuzz.mount import mount_target
from tests.fuzz.nodes import client_target, node_target
from tests.serving import in_a_thread

Try = Callable[[random.Random], int | None]
"""Returns the number of inputs that it tried, where that is not 1."""

# -- bytes

_PIECES = [
    b"{}",
    b"[]",
    b'"',
    b",",
    b":",
    b"null",
    b"true",
    b"-1",
    b"1e9",
    b"0",
    b"18446744073709551616",
]
_PIECES += [b"\x00", b"\xff", b"\\ud800", b"\\n", b" ", b"NaN", b"2", b'"U8"', b"\n\t", b"{", b"}"]


def mutated(dice: random.Random, data: bytes) -> bytes:
    """Return bytes with a few changes: pieces put in, taken out, doubled, replaced."""
    for _ in range(dice.choice((0, 1, 1, 2, 4))):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + dice.choice((0, 1, 1, 2, 8)))
        new = dice.choice((*_PIECES[:], data[at:end] * 2, bytes([dice.randrange(256)]), b""))
        data = data[:at] + new + data[end:]
    return data


# -- headers of safetensors files

NUMBERS = (0, 1, 2, 3, 4, 5, 8, -1, 2**31, 2**63, 2**64 - 1, 2**64, 1.0, True, None, "3")


def _entry(dice: random.Random, at: int) -> tuple[object, int]:
    dtype = dice.choice((*header.BITS, "u8", "", None, 1, "U8", "U8", "F32", "F4"))
    shape: object = [dice.choice((0, 1, 2, 3)) for _ in range(dice.randrange(3))]
    bits = header.BITS.get(str(dtype), 8)
    for length in shape:  # type: ignore[attr-defined]
        bits *= length
    offsets: object = [at, at + bits // 8]
    if dice.random() < 0.3:
        shape = dice.choice((shape, [dice.choice(NUMBERS)], dice.choice(NUMBERS)))
    if dice.random() < 0.2:
        offsets = [dice.choice(NUMBERS) for _ in range(dice.choice((1, 2, 2, 2, 3)))]
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    if dice.random() < 0.1:
        entry.pop(dice.choice(list(entry)))
    if dice.random() < 0.1:
        entry["more"] = dice.choice(({}, [], 1.5, None, "x"))
    return entry, at + bits // 8


def make_header(dice: random.Random) -> bytes:
    """Return the number of bytes of data after a header, in two bytes, and the header."""
    made: dict[str, object] = {}
    end = 0
    for _ in range(dice.randrange(4)):
        made[dice.choice(("a", "b", "é", "", "__metadata__"))], end = _entry(dice, end)
    if dice.random() < 0.2:
        made["__metadata__"] = dice.choice(({}, {"a": "b"}, None, {"a": 1}, [], {"dtype": "U8"}))
    raw = json.dumps(made, ensure_ascii=dice.random() < 0.5).encode()
    raw = mutated(dice, raw) if dice.random() < 0.5 else raw
    size = max(0, end + dice.choice((0, 0, 0, 0, 1, -1)))
    return min(size, 65535).to_bytes(2) + raw


def check_header(made: bytes) -> None:
    """Compare the verdict on a header with that of the safetensors package."""
    raw, data = made[2:], bytes(int.from_bytes(made[:2]))
    mine: object
    try:
        entries, _ = header.parse(raw, 8 + len(raw) + len(data))
        mine = {name: (one.dtype, list(one.shape), one.nbytes) for name, one in entries.items()}
    except ValueError as error:
        mine = str(error)
    other = their_verdict(raw, data)
    if isinstance(mine, dict) and isinstance(other, str):
        # JSON that only Python's parser takes, as docs/guides/models.md lists it: written again
        other = their_verdict(json.dumps(json.loads(raw)).encode(), data)
    if isinstance(mine, str) and isinstance(other, dict):
        listed = "unknown dtype" in mine or "lacks a known dtype" in mine
        assert listed, f"only the package takes {raw!r}: {mine}"
    else:
        assert isinstance(mine, str) or mine == other, f"{raw!r}: {mine} and {other}"


def their_verdict(raw: bytes, data: bytes) -> object:
    try:
        found = safetensors.deserialize(len(raw).to_bytes(8, "little") + raw + data)
    except safetensors.SafetensorError as error:
        return str(error)
    return {name: (one["dtype"], one["shape"], len(one["data"])) for name, one in found}


# -- messages of the store

VALUES = (
    0,
    1,
    -1,
    2**62,
    2**63,
    1.5,
    True,
    False,
    None,
    "",
    "x",
    "a/b",
    "..",
    "\ud800",
    [],
    {},
    "r",
)
_RESULTS = [
    protocol.pack_result(grant={"kind": "memfd"}, number=1),
    protocol.pack_error(protocol.Refusal(errno.ENOENT, "there is no such buffer", "x")),
]


def request(dice: random.Random) -> bytes:
    """Return a request, of which some field is often wrong."""
    op = dice.choice(list(protocol.OPERATIONS))
    message = {"op": op, "name": "x", "size": 4096, "mode": 0o600, "exporter": "memfd"}
    message = {name: message.get(name, dice.choice(VALUES)) for name in protocol.OPERATIONS[op]}
    for name in message:
        if dice.random() < 0.2:
            message[name] = dice.choice(VALUES)
    raw = json.dumps(message | {"op": op}).encode()
    return mutated(dice, raw) if dice.random() < 0.5 else raw


def make_message(dice: random.Random) -> bytes:
    """Return a request or a reply."""
    return request(dice) if dice.random() < 0.7 else mutated(dice, dice.choice(_RESULTS))


def check_message(raw: bytes) -> None:
    """Parse a message as a request and as a reply: nothing but Refusal may be raised."""
    with contextlib.suppress(protocol.Refusal):
        found = protocol.parse_request(raw)
        assert found.fields.keys() == protocol.OPERATIONS[found.op].keys()
    with contextlib.suppress(protocol.Refusal):
        assert isinstance(protocol.parse_reply(raw), dict)


# -- what the kernel writes

_LABELS = "ab\n\t: )(\\é0123456789"


def make_kernel_text(dice: random.Random) -> bytes:
    """Parse what the kernel would write with hostile labels, exactly; return garbage of it."""
    label = "".join(dice.choice(_LABELS) for _ in range(dice.randrange(31)))
    made, wanted = [], {}
    for number in range(dice.randrange(3)):
        devices = tuple(dice.choice(("0000:01:00.0", "vkms")) for _ in range(dice.randrange(3)))
        name = label if dice.random() < 0.7 else None
        inode = dice.randrange(1, 10**8)
        shown = name if name is not None else "<none>"
        made.append(
            f"{4096 * number:08d}\t{2:08x}\t{0o100000:08x}\t{1:08d}\tudmabuf\t{inode:08d}\t"
            f"{shown}\n\tAttached Devices:\n"
            + "".join(f"\t{device}\n" for device in devices)
            + f"Total {len(devices)} devices attached\n\n"
        )
        wanted[inode] = kernel_text.Entry(inode, 4096 * number, "udmabuf", name, 1, devices)
    text = "\nDma-buf Objects:\nsize\tflags\tmode\tcount\texp_name\tino\tname\n" + "".join(made)
    if label != "<none>":
        assert kernel_text.entries(text) == wanted, text
    info = f"pos:\t0\nino:\t7\nsize:\t4096\ncount:\t2\nexp_name:\tudmabuf\nname:\t{label}\n"
    assert proc.parse_fdinfo(info) == proc.DmabufInfo("udmabuf", label, 7, 4096, 2), info
    line = f"12 ({label}) S 1 " + " ".join(["0"] * 40)
    state = kernel_text.status(line)
    assert state is not None and state.command == label, line
    return mutated(dice, mutated(dice, (text + info + line).encode()))


def check_kernel_text(raw: bytes) -> None:
    """Parse text that no kernel writes: nothing may be raised."""
    garbage = raw.decode(errors="replace")
    kernel_text.entries(garbage)
    kernel_text.mappings(garbage)
    kernel_text.status(garbage)
    proc.parse_fdinfo(garbage)


# -- DLPack capsules


@functools.cache
def _shared() -> dmabuf.Buffer:
    return dmabuf.allocate(4096, exporter="memfd")


def try_capsules(dice: random.Random) -> None:
    """Make capsules and arrays of a Buffer, use some, drop them in any order, and close it."""
    buffer = dmabuf.allocate(4096, exporter="memfd") if dice.random() < 0.1 else _shared()
    held: list[object] = []
    for _ in range(dice.randrange(6)):
        what = dice.randrange(4)
        if what == 0:
            held.append(buffer.__dlpack__())
        elif what == 1:
            held.append(np.from_dlpack(buffer))
        elif what == 2 and held:
            held.pop(dice.randrange(len(held)))
        else:
            with contextlib.suppress(ValueError, TypeError, BufferError, OSError, OverflowError):
                held.append(
                    buffer.asarray(dice.choice(("u1", "f4", "O", "", "U0")), dice.choice(NUMBERS))
                )
    if buffer is _shared():
        return
    try:
        buffer.close()
    except BufferError:
        assert held
        held.clear()
        buffer.close()


# -- a server of the store, with a good client beside the bad ones


@contextlib.contextmanager
def store_target() -> Iterator[Try]:
    """Yield a target that sends messages to a real server."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder, "store.sock")
        quiet = contextlib.redirect_stderr(io.StringIO())  # the server logs each hand-over
        with quiet, in_a_thread(path, 16 << 20), dmabuf.store.connect(path) as good:
            good.list()
            tried = 0

            def attempt(dice: random.Random) -> None:
                nonlocal tried
                tried += 1
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bad:
                    bad.settimeout(30)
                    bad.connect(str(path))
                    for _ in range(dice.randrange(1, 8)):
                        send(dice, bad)
                if tried % 16 == 0:
                    with good.create("works", 4096) as buffer, good.open("works") as again:
                        buffer.pwrite(b"yes", 0)
                        assert again.pread(3, 0) == b"yes"
                    good.remove("works")
                    for status in good.list():
                        good.remove(status.name)

            yield attempt


def send(dice: random.Random, bad: socket.socket) -> None:
    """Send one message, at times with descriptors; read the reply, or not."""
    raw = request(dice) or b"x"
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(dice.choice((0, 0, 0, 1, 3)))]
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        socket.send_fds(bad, [raw], fds)
        if dice.random() < 0.8:
            _, got, _, _ = socket.recv_fds(bad, 1 << 16, 253)
            fds += got
    for fd in fds:
        os.close(fd)


@dataclass(frozen=True)
class Bytes:
    """A target whose inputs are bytes."""

    make: Callable[[random.Random], bytes]
    check: Callable[[bytes], None]

    def with_kept(self, kept: list[bytes]) -> Try:
        """Return attempts, of which some change an input that was kept."""

        def attempt(dice: random.Random) -> None:
            again = kept and dice.random() < 0.3
            self.check(mutated(dice, dice.choice(kept)) if again else self.make(dice))

        return attempt


BYTES = {
    "headers": Bytes(make_header, check_header),
    "messages": Bytes(make_message, check_message),
    "kernel text": Bytes(make_kernel_text, check_kernel_text),
    "command lines": Bytes(make_line, check_line),
}


def _bytes_target(name: str) -> contextlib.AbstractContextManager[Try]:
    return contextlib.nullcontext(BYTES[name].with_kept(corpus.kept(name)))


TARGETS: dict[str, Callable[[], contextlib.AbstractContextManager[Try]]] = {
    **{name: functools.partial(_bytes_target, name) for name in BYTES},
    "capsules": lambda: contextlib.nullcontext(try_capsules),
    "commands": commands_target,
    "store": store_target,
    "node": lambda: node_target(mutated),
    "clients of nodes": lambda: client_target(mutated),
    "mount": mount_target,
}

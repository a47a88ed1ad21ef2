"""Refusals and failures in the soak; neither may leave anything behind."""

import errno
import os
from array import array
from typing import TYPE_CHECKING, Any

import pytest

import dmabuf
from dmabuf import ClosedError, RouteUnavailable, ShortReadError
from tests.soak.world import BLOCK, LIMIT, noise
from tests.support import Filter

if TYPE_CHECKING:
    from tests.soak.work import Soak


def refused(soak: "Soak") -> None:
    """Pass bad input of a random kind; nothing may change."""
    target, memory = soak.pick()
    file, buffer = soak.file(target), memory.buffer
    pipe = os.pipe()

    def read_only() -> None:
        with dmabuf.open(target.path) as opened:
            opened.write_from(buffer, BLOCK)

    def viewed() -> None:
        with buffer.map("r"):
            buffer.close()

    bad: list[tuple[Any, Any]] = [
        (ValueError, lambda: file.read_into(buffer, memory.size + 1)),
        (ValueError, lambda: file.read_into(buffer, 1, buffer_offset=-1)),
        (ValueError, lambda: file.write_from(buffer, 1, file_offset=1 << 63)),
        (ValueError, lambda: file.write_segments(buffer, array("Q", [0, 0, 2, 1, 2, 2]))),
        (ValueError, lambda: file.read_segments(buffer, array("Q", [0, memory.size, 1]))),
        (TypeError, lambda: file.read_segments(buffer, [1, 2, 3])),
        (ValueError, lambda: file.read_into(buffer, 1, route="other")),
        (RouteUnavailable, lambda: file.read_into(buffer, 3, file_offset=1, require="zero-copy")),
        (ClosedError, lambda: file.read_into(soak.closed, 1)),
        (OSError, read_only),
        (BufferError, viewed),
        (ValueError, lambda: dmabuf.allocate(0)),
        (OSError, lambda: dmabuf.allocate("100TiB")),
        (OSError, lambda: dmabuf.from_fd(pipe[0])),
        (OSError, lambda: dmabuf.open(os.path.dirname(target.path))),
        (FileNotFoundError, lambda: dmabuf.open("/nonexistent/file")),
        (OSError, lambda: dmabuf.copy(file, target.path)),
        (OSError, lambda: _of_a_pipe(pipe[0], buffer, file_offset=1)),
        (TimeoutError, lambda: _of_a_pipe(pipe[0], buffer, timeout=0.0)),
    ]
    if target.block > 1:
        bad.append((OSError, lambda: file.write_from(buffer, 1000)))
    number = soak.dice.randrange(len(bad))
    try:
        with pytest.raises(bad[number][0]):
            bad[number][1]()
    finally:
        for end in pipe:
            os.close(end)
    target.check(("refused", number), 0, BLOCK)
    memory.check(("refused", number))


def _of_a_pipe(fd: int, buffer: dmabuf.Buffer, **how: Any) -> None:
    with dmabuf.open(fd) as file:
        file.read_into(buffer, 1, **how)


def failing(soak: "Soak") -> None:
    """Put an error, EAGAIN or a short result in the middle of a transfer."""
    soak.dice.choice([_injected, _injected, _injected, _short, _broken_pipe, _full])(soak)


def _injected(soak: "Soak") -> None:
    """Return EIO for one or two requests, or EAGAIN or short results for some."""
    target, memory = soak.pick()
    file, dice = soak.file(target), soak.dice
    offset, start, size = soak.place_write(target, memory)
    what, left = dice.choice(["EIO", "EAGAIN", "short"]), dice.randint(1, 3)
    later = dice.randrange(3)

    def answer(done: Any) -> int:
        nonlocal left, later
        later -= 1
        if later >= 0 or left <= 0 or done.result <= BLOCK:
            return int(done.result)
        left -= 1
        if what == "short":
            return int(done.result) // 2 // BLOCK * BLOCK or BLOCK
        return -errno.EIO if what == "EIO" else -errno.EAGAIN

    write = dice.random() < 0.5
    if not write:
        size = max(0, min(size, len(target.model) - offset))
    memory.put(data := noise(dice, size), start)
    where = {"file_offset": offset, "buffer_offset": start, "audit": "off"}
    call = file.write_from if write else file.read_into
    wanted = data if write else bytes(target.model[offset : offset + size])
    sure = size
    with Filter(answer):
        try:
            assert call(memory.buffer, size, **where).nbytes == size
        except OSError as error:
            assert what == "EIO" and error.errno == errno.EIO, error
            sure = error.nbytes  # type: ignore[attr-defined]
    told = what, write, target.name, size, where
    if write:
        target.settle(offset, wanted, sure, told)
        memory.check(told)
    else:
        memory.settle(start, wanted, sure, told)


def _short(soak: "Soak") -> None:
    """Read a segment that ends past the end of the file."""
    target = soak.dice.choice([target for target in soak.targets if target.grows])
    memory = soak.dice.choice(soak.memories)
    end, half = len(target.model), memory.size // 2
    segments = array("Q", [max(0, end - half), 0, min(half, end), end, half, half])
    memory.put(noise(soak.dice, memory.size), 0)
    wanted = bytes(target.model[max(0, end - half) :])
    with pytest.raises(ShortReadError) as caught:
        soak.file(target).read_segments(memory.buffer, segments)
    assert caught.value.index == 1
    memory.settle(0, wanted, 0, "a short read")


def _broken_pipe(soak: "Soak") -> None:
    memory = soak.dice.choice(soak.memories)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with dmabuf.open(writer, "w") as file, pytest.raises(BrokenPipeError) as caught:
            file.write_from(memory.buffer)
        assert caught.value.nbytes == 0  # type: ignore[attr-defined]
    finally:
        os.close(writer)
    memory.check("a broken pipe")


def _full(soak: "Soak") -> None:
    """Transfer past the end of a device."""
    devices = [target for target in soak.targets if not target.grows and target.ends]
    if not devices:
        return
    target, memory = soak.dice.choice(devices), soak.dice.choice(soak.memories)
    size = min(memory.size, LIMIT)
    offset = LIMIT - soak.dice.choice([0, 1, size - 1])
    memory.put(data := noise(soak.dice, size), 0)
    with pytest.raises(OSError) as caught:
        soak.file(target).write_from(memory.buffer, size, file_offset=offset)
    assert caught.value.errno == errno.ENOSPC
    sure = caught.value.nbytes  # type: ignore[attr-defined]
    target.settle(offset, data[: LIMIT - offset], min(sure, LIMIT - offset), "a full device")
    memory.check("a full device")

"""vivid's test picture: what it is set to, and the bytes that each frame has to have."""

import contextlib
import ctypes
import fcntl
import itertools
import os
from collections.abc import Iterator

from linuxpy.video import raw

from dmabuf.devices import v4l2
from tests.guards import vivid_node

SINGLE, MULTI, CONTIGUOUS = (str(vivid_node("vid-cap", number)) for number in range(3))
OUTPUT, METADATA = str(vivid_node("vid-out")), str(vivid_node("meta-cap"))
NO_TEXT, STILL, MOVE_RIGHT = 2, 3, 5  # of the menus below
WIDTH, HEIGHT = 640, 360

_NEXT_CONTROL = 0x80000000


@contextlib.contextmanager
def picture(node: str, movement: int = STILL) -> Iterator[None]:
    """Colour bars without the text that counts frames, moving or not."""
    fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        controls = _controls(fd)
        wanted = {
            "Test Pattern": 0,
            "OSD Text Mode": NO_TEXT,
            "Horizontal Movement": movement,
            "Vertical Movement": STILL,
        }
        try:
            for name, value in wanted.items():
                _set(fd, controls[name].id, value)
            yield
        finally:
            for name in wanted:
                _set(fd, controls[name].id, controls[name].default_value)
    finally:
        os.close(fd)


def _controls(fd: int) -> dict[str, raw.v4l2_queryctrl]:
    found, last = {}, 0
    with contextlib.suppress(OSError):  # past the last
        while True:
            control = raw.v4l2_queryctrl(id=last | _NEXT_CONTROL)
            fcntl.ioctl(fd, raw.IOC.QUERYCTRL, control)
            found[control.name.decode()] = control
            last = control.id
    return found


def _set(fd: int, number: int, value: int) -> None:
    fcntl.ioctl(fd, raw.IOC.S_CTRL, raw.v4l2_control(id=number, value=value))


def reference(fourcc: str, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """The still picture, by plain read(2) of the camera: no dma-buf has part in it."""
    with picture(SINGLE):
        with v4l2.capture(SINGLE, format=fourcc, width=width, height=height) as camera:
            size = camera.format.planes[0].size
        fd = os.open(SINGLE, os.O_RDWR | os.O_CLOEXEC)
        try:
            data = os.read(fd, size)
        finally:
            os.close(fd)
    assert len(data) == size and len(set(data)) > 1
    return data


def skipped(node: str, count: int) -> int:
    """How many of some frames vivid itself leaves out, for a program that looks at none.

    In the format and at the rate that it is set to, by plain mmap streaming.
    """
    kind = {"type": raw.BufType.VIDEO_CAPTURE, "memory": raw.Memory.MMAP}
    item, numbers = raw.v4l2_buffer(**kind), []
    fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        asked = raw.v4l2_requestbuffers(**kind, count=8)
        fcntl.ioctl(fd, raw.IOC.REQBUFS, asked)
        for item.index in range(asked.count):
            fcntl.ioctl(fd, raw.IOC.QBUF, item)
        fcntl.ioctl(fd, raw.IOC.STREAMON, ctypes.c_int(raw.BufType.VIDEO_CAPTURE))
        while len(numbers) < count:
            fcntl.ioctl(fd, raw.IOC.DQBUF, item)
            numbers.append(item.sequence)
            fcntl.ioctl(fd, raw.IOC.QBUF, item)
    finally:
        os.close(fd)
    return numbers[-1] - numbers[0] + 1 - len(set(numbers))


class Moving:
    """Colour bars that move: each frame is the reference, turned by some pixels."""

    def __init__(self, still: bytes, width: int, pixel: int = 3) -> None:
        self.line = width * pixel
        self.pixel = pixel
        lines = {still[at : at + self.line] for at in range(0, len(still), self.line)}
        assert len(lines) == 1, "every line is the same"
        (self.first,) = lines
        self.count = len(still) // self.line
        self.turned = {self._turn(by): by for by in range(width)}
        assert len(self.turned) == width, "and no two turns of it are"

    def _turn(self, by: int) -> bytes:
        cut = self.line - by * self.pixel
        return self.first[cut:] + self.first[:cut]

    def turn_of(self, frame: bytes) -> int:
        """By how many pixels a frame is turned; every byte of it has to fit."""
        first = frame[: self.line]
        assert first in self.turned, "the first line is no turn of the reference"
        wrong = [
            number
            for number in range(self.count)
            if frame[number * self.line : (number + 1) * self.line] != first
        ]
        assert not wrong and len(frame) == self.line * self.count, f"lines {wrong[:5]} differ"
        return self.turned[first]

    def check(self, frames: list[tuple[bytes, int]]) -> None:
        """Frames in order, each with the number of those lost before it."""
        turns = [self.turn_of(frame) for frame, _ in frames]
        width = self.line // self.pixel
        steps = [(b - a) % width for a, b in itertools.pairwise(turns)]
        smooth = {step for step, (_, lost) in zip(steps, frames[1:], strict=True) if not lost}
        # On a busy machine each frame may come after a loss: then there is no step to compare.
        assert len(smooth) <= 1 and smooth != {0}, f"each is one step on: {steps}"

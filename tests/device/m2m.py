"""What a memory-to-memory driver makes of an input: MMAP buffers, plain ioctls, no dma-buf.

Nothing of the package takes part, so that its results can be compared with these.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from linuxpy.video import raw

INTO, OUT = raw.BufType.VIDEO_OUTPUT, raw.BufType.VIDEO_CAPTURE
MULTI = {INTO: raw.BufType.VIDEO_OUTPUT_MPLANE, OUT: raw.BufType.VIDEO_CAPTURE_MPLANE}
HFLIP = 0x00980914


def node(name: str) -> str:
    """The node of a driver by its name in sysfs, such as "stateful-encoder"."""
    for path in Path("/sys/class/video4linux").glob("*/name"):
        if path.read_text().strip() == name:
            return f"/dev/{path.parent.name}"
    return f"/dev/no-{name}"


def fourcc(name: str) -> int:
    return int.from_bytes(name.encode(), "little")


def pictures(width: int, height: int, count: int, nbytes: int) -> list[bytes]:
    """Pictures of `nbytes` bytes, no two alike: a pattern that moves, with some noise."""
    rng = np.random.default_rng(width * height)
    noise = rng.integers(0, 24, nbytes, dtype=np.uint8)
    steps = np.arange(nbytes) % width // 3 + np.arange(nbytes) // width
    return [((steps + 7 * n) % 200 + np.roll(noise, n)).astype(np.uint8).tobytes()
            for n in range(count)]  # fmt: skip


class Side:
    """One queue of the driver, with buffers in its own memory."""

    def __init__(self, fd: int, kind: int) -> None:
        self.fd, self.kind, self.maps = fd, kind, []
        self.item = raw.v4l2_buffer

    def format(self, name: str | None, width: int = 0, height: int = 0) -> None:
        form = raw.v4l2_format(type=self.kind)
        fcntl.ioctl(self.fd, raw.IOC.G_FMT, form)
        if name is not None:
            form.fmt.pix.pixelformat = fourcc(name)
        form.fmt.pix.width = width or form.fmt.pix.width
        form.fmt.pix.height = height or form.fmt.pix.height
        form.fmt.pix.sizeimage = form.fmt.pix.bytesperline = 0
        fcntl.ioctl(self.fd, raw.IOC.S_FMT, form)
        self.size = form.fmt.pix.sizeimage

    def prepare(self, count: int = 3) -> None:
        asked = raw.v4l2_requestbuffers(type=self.kind, memory=raw.Memory.MMAP, count=count)
        fcntl.ioctl(self.fd, raw.IOC.REQBUFS, asked)
        for index in range(asked.count):
            item = self._item(index)
            fcntl.ioctl(self.fd, raw.IOC.QUERYBUF, item)
            self.maps.append(mmap.mmap(self.fd, item.length, offset=item.m.offset))
            if self.kind == OUT:
                self.maps[-1][:] = b"\xa5" * item.length
                fcntl.ioctl(self.fd, raw.IOC.QBUF, item)

    def on(self) -> None:
        fcntl.ioctl(self.fd, raw.IOC.STREAMON, ctypes.c_int(self.kind))

    def put(self, data: bytes, index: int = 0) -> None:
        self.maps[index][: len(data)] = data
        item = self._item(index)
        item.bytesused = len(data)
        fcntl.ioctl(self.fd, raw.IOC.QBUF, item)

    def get(self) -> bytes:
        item = self._item(0)
        fcntl.ioctl(self.fd, raw.IOC.DQBUF, item)
        assert not item.flags & raw.BufferFlag.ERROR
        if self.kind == INTO:
            return b""
        data = self.maps[item.index][: item.bytesused]
        fcntl.ioctl(self.fd, raw.IOC.QBUF, self._item(item.index))
        return data

    def _item(self, index: int) -> raw.v4l2_buffer:
        return raw.v4l2_buffer(type=self.kind, memory=raw.Memory.MMAP, index=index)


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[Side, Side]]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    sides = Side(fd, INTO), Side(fd, OUT)
    try:
        yield sides
    finally:
        for side in sides:
            for one in side.maps:
                one.close()
        os.close(fd)


def process(
    path: str, frames: list[bytes], into: tuple[str, int, int], out: str, flip: bool = False
) -> list[bytes]:
    """One output for each input, by an encoder or a converter."""
    with opened(path) as (source, target):
        if flip:
            fcntl.ioctl(source.fd, raw.IOC.S_CTRL, raw.v4l2_control(id=HFLIP, value=1))
        target.format(out, *into[1:])
        source.format(*into)
        for side in (source, target):
            side.prepare()
            side.on()
        found = []
        for frame in frames:
            source.put(frame)
            found.append(target.get())
            source.get()
        return found


def decode(path: str, packets: list[bytes], out: str | None = None) -> list[bytes]:
    """One picture for each packet, by a stateful decoder; all of one size."""
    with opened(path) as (source, target):
        wanted = raw.v4l2_event_subscription(type=raw.EventType.SOURCE_CHANGE)
        fcntl.ioctl(source.fd, raw.IOC.SUBSCRIBE_EVENT, wanted)
        source.format(None)
        source.prepare()
        source.on()
        source.put(packets[0])
        poll = select.poll()
        poll.register(source.fd, select.POLLPRI)
        assert poll.poll(60_000)
        fcntl.ioctl(source.fd, raw.IOC.DQEVENT, raw.v4l2_event())
        target.format(out)
        target.prepare()
        target.on()
        found = []
        for packet in packets[1:]:
            found.append(target.get())
            source.get()
            source.put(packet)
        return [*found, target.get()]

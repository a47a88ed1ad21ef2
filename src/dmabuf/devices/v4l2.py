"""Cameras and codecs: frames of V4L2 devices straight in Buffers. Needs ``dmabuf[v4l2]``.

    >>> from dmabuf.devices import v4l2
    >>> with v4l2.capture("/dev/video0", format="YUYV", width=640, height=480) as camera:
    ...     for frame in camera:
    ...         with frame:
    ...             head = frame.buffer.pread(16, 0)

The driver writes into dma-bufs: Buffers that it imports (V4L2_MEMORY_DMABUF), or its own memory,
exported as Buffers (VIDIOC_EXPBUF, ``exporter="driver"``). The buffer of a frame returns to the
driver when the frame is released. While all frames are held, the driver has no buffer to fill and
drops frames; ``lost`` counts them by the gaps in the sequence numbers.

Encoders, decoders and converters are opened by :func:`codec`.

V4L2 does not use the fences of a dma-buf: a buffer is queued only after the fences of its other
users have signalled. Facts are from Documentation/userspace-api/media/v4l and videobuf2.
"""

from __future__ import annotations

import errno
import math
import os
import select
from collections.abc import Callable, Sequence
from fractions import Fraction

from dmabuf.devices.codec import Codec, Input, codec
from dmabuf.devices.frames import Color, Format, Frame, Plane, PlaneFormat
from dmabuf.devices.video import Node, Queue, Ring, Stream
from dmabuf.errors import os_error
from dmabuf.kernel import fence
from dmabuf.memory import Buffer
from dmabuf.sizes import as_int

__all__ = [
    "Camera",
    "Codec",
    "Color",
    "Format",
    "Frame",
    "Input",
    "Plane",
    "PlaneFormat",
    "capture",
    "codec",
]

_HALF = 1 << 31  # a sequence number that appears to advance by more has restarted


def capture(
    device: str | os.PathLike[str],
    *,
    buffers: int | Sequence[Buffer] | Sequence[Sequence[Buffer]] = 4,
    exporter: str = "udmabuf",
    huge_pages: bool | str | int = False,
    format: str | None = None,  # noqa: A002 - the usual name
    width: int | None = None,
    height: int | None = None,
    fps: float | Fraction | None = None,
    timeout: float | None = 5.0,
) -> Camera:
    """Open a camera, queue its buffers, and return an iterator over its frames.

    A call that raises leaves the camera as it was: its format and rate are restored.

    Args:
        device: the node, such as "/dev/video0".
        buffers: the number of frames to make room for, which the driver may change; or Buffers of
            the caller, one for each frame (or a sequence with one for each plane). Each must be a
            dma-buf of one slab, large enough for its plane. The caller still closes them.
        exporter: what allocates the buffers: "udmabuf" (zero-copy to files), a dma-heap, or
            "driver" for the driver's own memory.
        huge_pages: as for `dmabuf.allocate`; also for devices that need contiguous memory.
        format: the four characters of the pixel format, such as "YUYV". The default for this and
            the next three is the current setting of the device.
        width: pixels.
        height: lines.
        fps: frames a second; a rate within 1 % is accepted.
        timeout: seconds to wait for each frame; None waits without limit.

    Raises:
        OSError: there is no such device or no permission; the node is not a camera (ENODEV) or is
            in use (EBUSY); the camera lacks the format, size or rate, or a buffer is too small
            (EINVAL); the driver cannot import the memory.
        ImportError: linuxpy is not installed.
        ValueError: fewer than one buffer, or a size, rate or timeout that is not positive.
    """
    fence.check_timeout(timeout)
    given = None if isinstance(buffers, int) else [_row(one) for one in buffers]
    count = as_int(buffers, "buffers") if given is None else len(given)
    if count < 1:
        raise ValueError(f"invalid buffers {buffers!r}: use at least one")
    if not isinstance(format, str | None):
        raise TypeError(f"invalid format {format!r}: use four characters, such as 'YUYV'")
    width = None if width is None else as_int(width, "width")
    height = None if height is None else as_int(height, "height")
    for name, value in (("width", width), ("height", height), ("fps", fps)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"invalid {name} {value!r}: use a positive, finite number")
    node = Node(os.fspath(device))
    restore: Callable[[], object] = bool  # nothing to restore yet
    try:
        queue = _capture_queue(node)
        if (format, width, height, fps) != (None, None, None, None):
            restore = queue.settings()
        if (format, width, height) != (None, None, None):
            queue.set_format(format, width, height)
        if fps is not None:
            queue.set_fps(fps)
        return Camera(node, queue, count, given, exporter, huge_pages, timeout)
    except BaseException:
        restore()
        os.close(node.fd)
        raise


def _capture_queue(node: Node) -> Queue:
    caps = node.raw.Capability
    if node.caps & caps.VIDEO_CAPTURE_MPLANE:
        kind = "VIDEO_CAPTURE_MPLANE"
    elif node.caps & caps.VIDEO_CAPTURE:
        kind = "VIDEO_CAPTURE"
    else:
        text = f"capture: this node of {node.card!r} has no frames; use another, by v4l2-ctl"
        raise os_error(errno.ENODEV, text, node.path)
    if not node.caps & caps.STREAMING:
        text = f"capture: {node.card!r} has read() only, not streaming I/O with buffers"
        raise os_error(errno.EOPNOTSUPP, text, node.path)
    return Queue(node, kind, "capture", "exporter='driver'")


def _row(one: Buffer | Sequence[Buffer]) -> tuple[Buffer, ...]:
    return (one,) if isinstance(one, Buffer) else tuple(one)


class Camera(Stream):
    """An iterator over frames, by ``for`` and ``async for``; made by :func:`capture`.

    The first request for a frame starts the stream. Several threads may iterate; each frame is
    returned to one of them. After a fork the child can only close its copy.
    """

    def __init__(
        self,
        node: Node,
        queue: Queue,
        count: int,
        given: list[tuple[Buffer, ...]] | None,
        exporter: str,
        huge_pages: bool | str | int,
        timeout: float | None,
    ) -> None:
        """Take over the node, which the caller closes if this raises; for :func:`capture`."""
        super().__init__(node, timeout)
        self._queue = queue
        self._streaming = False
        self._last: int | None = None
        self.format = queue.format()
        """The format in use."""
        self.lost = 0
        """The number of frames lost so far."""
        self._ring = Ring(queue, self.format, timeout, self._turn)
        try:
            self._ring.make(count, given, exporter, huge_pages)
            self._opened()
            self._ring.push_all()
        except BaseException:
            self._closed = True
            self._ring.end()
            self._ring.release()
            raise

    @property
    def buffers(self) -> tuple[tuple[Buffer, ...], ...]:
        """The buffers of each frame, one for each plane."""
        return self._ring.rows

    def __iter__(self) -> Camera:
        return self

    def __next__(self) -> Frame:
        """Wait for the next frame.

        Raises:
            TimeoutError: no frame arrived in time.
            OSError: the driver failed; ENODEV where the camera was unplugged.
            ClosedError: the camera is closed.
        """
        return self._await(self._take, lambda: select.POLLIN, self._late)

    def __aiter__(self) -> Camera:
        return self

    async def __anext__(self) -> Frame:
        """Wait for the next frame in an asyncio or trio event loop. Needs ``dmabuf[aio]``.

        Raises what ``next`` raises, and ImportError where anyio is not installed.
        """
        try:
            import anyio
            import anyio.lowlevel

            from dmabuf.aio import ready
        except ImportError as error:
            text = f"frames in an event loop need anyio ({error}): pip install dmabuf[aio]"
            raise ImportError(text, name="anyio") from error
        self.check_open()
        await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(self._timeout):
            while (frame := self._take()) is None:
                await ready(self._node.fd)
            return frame
        raise self._late()

    def _take(self) -> Frame | None:
        """Return a frame if one is ready, starting the stream first if necessary."""
        with self._turn:
            self.check_open()
            self._ring.push_dropped()
            if not self._streaming:
                self._queue.on()
                self._streaming = True
            filled = self._ring.take()
            if filled is None:
                return None
            gap = 0 if self._last is None else (filled.sequence - self._last - 1) % (1 << 32)
            lost = gap if gap < _HALF else 0
            self._last = filled.sequence
            self.lost += lost
            ends = self._give_back, self._ring.dropped.add
            return Frame(self.path, self.format, self.buffers[filled.number], filled, lost, *ends)

    def _late(self) -> OSError:
        text = f"wait for a frame: none arrived within {self._timeout:g} s; "
        if self._ring.waits:
            text += "check the signal or trigger, or give a larger timeout="
        else:
            text += f"all {len(self.buffers)} buffers are held: release() frames, or ask for more"
        return os_error(errno.ETIMEDOUT, text, self.path)

    def _give_back(self, index: int) -> None:
        if not self.forked:
            self._ring.give_back(index)

    def _stop(self) -> None:
        self._ring.end()

    def _release(self) -> None:
        self._ring.release()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.format}, {len(self.buffers)} buffers"
        return f"<dmabuf.Camera {self.path} {self.card!r} {state}>"

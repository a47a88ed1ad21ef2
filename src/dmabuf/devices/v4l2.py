"""Cameras: frames of a V4L2 device straight into Buffers. Needs `pip install dmabuf[v4l2]`.

    >>> from dmabuf.devices import v4l2
    >>> with v4l2.capture("/dev/video0", format="YUYV", width=640, height=480) as camera:
    ...     for frame in camera:
    ...         with frame:
    ...             head = frame.buffer.pread(16, 0)

The device writes into dma-bufs: our own, which the driver imports (V4L2_MEMORY_DMABUF), or the
driver's own, handed out as Buffers (VIDIOC_EXPBUF, `exporter="driver"`). A frame's buffer goes back
to the driver when the frame is released, not before: while all of them are held the camera has
nowhere to put a frame, drops it, and `lost` counts it by the gap in the sequence.

V4L2 knows nothing of the fences of a dma-buf. So a buffer is handed to the driver when the fences
of those that still use it have signalled, and a frame is there when the driver says that it is
whole. The CPU's access goes through the Buffer, and so within the bracket, as always.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction

from dmabuf import _process, exporters, fence
from dmabuf.buffer import Buffer
from dmabuf.devices._v4l2 import Format, Node, PlaneFormat, problem_with
from dmabuf.devices._v4l2_frame import Frame, Plane
from dmabuf.errors import BusyError, ClosedError, Uncopyable, os_error
from dmabuf.sizes import as_int

__all__ = ["Camera", "Format", "Frame", "Plane", "PlaneFormat", "capture"]

_SLICE = 0.1
"""Seconds of one wait: a signal that comes just before it ends it no later."""

_HALF = 1 << 31
"""A sequence number that seems to go on by more than this has begun anew."""


def capture(
    device: str | os.PathLike[str],
    *,
    buffers: int | Sequence[Buffer] | Sequence[Sequence[Buffer]] = 4,
    exporter: str = "udmabuf",
    huge_pages: bool | str | int = False,
    format: str | None = None,  # noqa: A002 - what everyone calls it
    width: int | None = None,
    height: int | None = None,
    fps: float | Fraction | None = None,
    timeout: float | None = 5.0,
) -> Camera:
    """Open a camera, hand it buffers, and iterate over its frames.

    Args:
        device: the node, such as "/dev/video0".
        buffers: how many frames to have room for, which the driver may make more or fewer; or your
            own Buffers, one a frame (a sequence of them, one a plane, for formats of several
            planes), which stay yours. Each is a dma-buf of one slab that holds what the driver may
            write.
        exporter: what makes them: "udmabuf" (zero-copy to files by the `direct` route), a dma-heap,
            or "driver" for the driver's own memory.
        huge_pages: as for `dmabuf.allocate`; also for devices that need memory in one piece.
        format: the pixel format's four characters, such as "YUYV"; by default, as for the next
            three, what the device is set to.
        width: pixels.
        height: lines.
        fps: frames a second; what the device has within a hundredth of it will do.
        timeout: seconds to wait for each frame; None waits for ever.

    Raises:
        OSError: no such device, no permission, no camera (ENODEV), in use (EBUSY); a format, size
            or rate that it lacks, a buffer too small for the format (EINVAL); memory that the
            driver cannot import. Nothing is left behind.
        ImportError: linuxpy is not installed.
        ValueError: less than one buffer, or less than no time.
    """
    fence.check_timeout(timeout)
    given = None if isinstance(buffers, int) else _rows(buffers)
    count = as_int(buffers, "buffers") if given is None else len(given)
    if count < 1:
        raise ValueError(f"buffers={buffers!r}: one at least")
    if not isinstance(format, str | None):
        raise TypeError(f"format={format!r}: the four characters of one, such as 'YUYV'")
    for name, value in (("width", width), ("height", height), ("fps", fps)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: more than 0, and finite")
    node = Node(device)
    try:
        if (format, width, height) != (None, None, None):
            node.set_format(format, width, height)
        if fps is not None:
            node.set_fps(fps)
        return Camera(node, count, given, exporter, huge_pages, timeout)
    except BaseException:
        os.close(node.fd)
        raise


def _rows(buffers: Sequence[Buffer] | Sequence[Sequence[Buffer]]) -> list[tuple[Buffer, ...]]:
    return [(one,) if isinstance(one, Buffer) else tuple(one) for one in buffers]


class Camera(Uncopyable, instead="open it again where it is needed"):
    """Frames as they come, by `for` and by `async for`; made by :func:`capture`.

    The stream starts with the first frame that is asked for. Safe to use from several threads, each
    of which gets frames of its own. After fork the child's copy can only be closed.
    """

    _closed = True  # until __init__ is through

    def __init__(
        self,
        node: Node,
        count: int,
        given: list[tuple[Buffer, ...]] | None,
        exporter: str,
        huge_pages: bool | str | int,
        timeout: float | None,
    ) -> None:
        """Takes over the node where it succeeds; for :func:`capture`."""
        self._node = node
        self._pid = _process.pid
        self._timeout = timeout
        self._memory = "MMAP" if exporter == "driver" and given is None else "DMABUF"
        self._turn = threading.Condition()
        self._waiting: set[int] = set()  # the threads that do
        self._streaming = False
        self._last: int | None = None
        self._queued: set[int] = set()
        self._left: set[int] = set()  # of frames that nobody has, with memory that somebody has
        self.path = node.path
        """The device node."""
        self.card = node.card
        """What the device calls itself."""
        self.driver = node.driver
        """The kernel driver's name."""
        self.format = node.format()
        """What it delivers."""
        self.lost = 0
        """Frames lost so far."""
        self._made: list[Buffer] = []
        try:
            if given is not None:
                self._check(given)
            got = node.request(count, self._memory)
            if given is not None and got != count:
                text = f"needs {got} buffers and not {count}: give it as many"
                raise os_error(errno.EINVAL, text, self.path)
            made = given or [self._make(index, exporter, huge_pages) for index in range(got)]
            self.buffers: tuple[tuple[Buffer, ...], ...] = tuple(made)
            """The memory of the frames, by plane."""
            self._closed = False
            for index in range(got):
                self._queue(index)
        except BaseException:
            self._closed = True
            node.stop(self._memory)
            self._let_go()
            self._close_made()
            raise

    def _check(self, given: list[tuple[Buffer, ...]]) -> None:
        seen = set()
        for index, row in enumerate(given):
            if len(row) != len(self.format.planes):
                text = (
                    f"a frame of {self.format} takes {len(self.format.planes)} buffers, one a "
                    f"plane, and frame {index} was given {len(row)}"
                )
                raise os_error(errno.EINVAL, text, self.path)
            for buffer, plane in zip(row, self.format.planes, strict=True):
                problem = problem_with(buffer, plane.size, self.format)
                if problem is None and id(buffer) in seen:
                    problem = "was given twice"
                if problem is not None:
                    raise os_error(errno.EINVAL, f"buffer {index} {problem}", self.path)
                seen.add(id(buffer))

    def _make(self, index: int, exporter: str, huge_pages: bool | str | int) -> tuple[Buffer, ...]:
        row = []
        for number, plane in enumerate(self.format.planes):
            if self._memory == "MMAP":
                fd = self._node.export(index, number)
                try:
                    buffer = exporters.from_fd(fd)
                finally:
                    os.close(fd)
            else:
                name = f"{os.path.basename(self.path)[:16]} frame {index}.{number}"
                buffer = exporters.allocate(
                    plane.size, exporter=exporter, huge_pages=huge_pages, name=name
                )
            self._made.append(buffer)
            if (problem := problem_with(buffer, plane.size, self.format)) is not None:
                text = f"a buffer by exporter={exporter!r} {problem}"
                raise os_error(errno.EINVAL, text, self.path)
            row.append(buffer)
        return tuple(row)

    def _queue(self, index: int) -> None:
        """Hand a frame's memory to the driver, which holds it from then on."""
        row = self.buffers[index]
        held: list[Buffer] = []
        try:
            for buffer in row:
                buffer._lend()
                held.append(buffer)
            fence.wait([b.slabs[0].fd for b in row], "write", self._timeout, path=self.path)
            with self._turn:
                if not self._closed:
                    self._node.queue(index, self._memory, row)
                    self._queued.add(index)
                    held.clear()
        finally:
            for buffer in held:
                buffer._release()

    # -- frames

    def __iter__(self) -> Camera:
        return self

    def __next__(self) -> Frame:
        """Wait for the next frame.

        Raises:
            TimeoutError: none came in time.
            OSError: the driver's; ENODEV where the camera was unplugged.
            ClosedError: after close.
        """
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        with self._waiter():
            while (frame := self._take()) is None:
                left = _SLICE if deadline is None else min(_SLICE, deadline - time.monotonic())
                if left <= 0:
                    raise self._late()
                self._node.wait(left)
        return frame

    def __aiter__(self) -> Camera:
        return self

    async def __anext__(self) -> Frame:
        """As `next`, in an asyncio or trio event loop. Needs anyio: `pip install dmabuf[aio]`."""
        try:
            import anyio
            import anyio.lowlevel

            from dmabuf._waits import readable
        except ImportError as error:
            text = f"frames in an event loop need anyio ({error}): pip install dmabuf[aio]"
            raise ImportError(text, name="anyio") from error
        self._check_open()
        await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(self._timeout):
            while (frame := self._take()) is None:
                await readable(self._node.fd, "read")
            return frame
        raise self._late()

    def _take(self) -> Frame | None:
        """The next frame that is there, None where none is."""
        with self._turn:
            self._check_open()
            self._take_back()
            if not self._streaming:
                self._node.start()
                self._streaming = True
            filled = self._node.take(self._memory)
            if filled is None:
                return None
            self._queued.discard(filled.number)
            for buffer in self.buffers[filled.number]:
                buffer._release()
            gap = 0 if self._last is None else (filled.sequence - self._last - 1) % (1 << 32)
            lost = gap if gap < _HALF else 0
            self._last = filled.sequence
            self.lost += lost
            return Frame(self, filled, lost)

    @contextmanager
    def _waiter(self) -> Iterator[None]:
        self._check_open()  # without the lock, which a fork may have left taken
        me = threading.get_ident()
        with self._turn:
            self._check_open()
            self._waiting.add(me)
        try:
            yield
        finally:
            with self._turn:
                self._waiting.discard(me)
                self._turn.notify_all()

    def _late(self) -> OSError:
        text = f"no frame came within {self._timeout:g} s"
        if not self._queued:
            text += f": all {len(self.buffers)} are held, so the driver has no buffer to fill; "
            text += "release() them, or ask for more buffers"
        else:
            text += ": is there a signal, or a trigger it waits for? timeout= gives it more"
        return os_error(errno.ETIMEDOUT, text, self.path)

    def _give_back(self, index: int) -> None:
        if self._pid == _process.pid and not self._closed:
            self._queue(index)

    def _dropped(self, index: int) -> None:
        """A frame went without being released: what uses its memory may go on a little longer."""
        self._left.add(index)  # atomic, and at any time: the collector's calls come as they like

    def _take_back(self) -> None:
        for index in list(self._left):
            with suppress(BusyError):
                if not fence.pending([b.slabs[0].fd for b in self.buffers[index]], "write"):
                    self._queue(index)
                    self._left.discard(index)

    # -- the end

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this camera is closed")
        if self._pid != _process.pid:
            raise ClosedError("this camera is that of the process which forked this one")

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Stop the stream, and close the device and the buffers that were not given; can be again.

        When it returns the device writes no more. Frames that are held lose their memory with it,
        but for buffers that were given. An iteration in another thread ends with ClosedError.

        Raises:
            BufferError: a view of a buffer exists, which then stays open; all else is closed.
        """
        if self._pid != _process.pid:
            if not self._closed:
                self._closed = True
                os.close(self._node.fd)
        else:
            with self._turn:
                closing, self._closed = not self._closed, True
                if closing:
                    self._node.stop(self._memory)
                    while self._waiting - {threading.get_ident()}:
                        self._turn.wait()
                    os.close(self._node.fd)
                    self._let_go()
        self._close_made()

    def _let_go(self) -> None:
        for index in self._queued:
            for buffer in self.buffers[index]:
                buffer._release()
        self._queued.clear()

    def _close_made(self) -> None:
        first: BufferError | None = None
        for buffer in self._made:
            try:
                buffer.close()
            except BufferError as error:
                first = first or error
        if first is not None:
            raise first

    def __enter__(self) -> Camera:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            with suppress(BufferError):
                self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.format}, {len(self.buffers)} buffers"
        return f"<dmabuf.Camera {self.path} {self.card!r} {state}>"

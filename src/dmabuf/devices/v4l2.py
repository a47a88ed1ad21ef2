"""Cameras: capture frames of a V4L2 device straight into Buffers. Needs ``dmabuf[v4l2]``.

    >>> from dmabuf.devices import v4l2
    >>> with v4l2.capture("/dev/video0", format="YUYV", width=640, height=480) as camera:
    ...     for frame in camera:
    ...         with frame:
    ...             head = frame.buffer.pread(16, 0)

The driver writes into dma-bufs: Buffers that it imports (V4L2_MEMORY_DMABUF), or its own memory,
exported as Buffers (VIDIOC_EXPBUF, ``exporter="driver"``). The buffer of a frame returns to the
driver when the frame is released. While all frames are held, the driver has no buffer to fill and
drops frames; ``lost`` counts them by the gaps in the sequence numbers.

V4L2 does not use the fences of a dma-buf: a buffer is queued only after the fences of its other
users have signalled. Facts are from Documentation/userspace-api/media/v4l and videobuf2.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any

from dmabuf.devices import lifetime
from dmabuf.devices.frames import (
    Color,
    Filled,
    Format,
    Frame,
    Plane,
    PlaneFormat,
    resolve_color,
)
from dmabuf.devices.lifetime import DeviceHandle
from dmabuf.devices.node import Fixes, call, open_node
from dmabuf.errors import BusyError, ClosedError, os_error
from dmabuf.kernel import fence
from dmabuf.memory import Buffer, allocate, from_fd
from dmabuf.sizes import as_int, format_size

__all__ = ["Camera", "Color", "Format", "Frame", "Plane", "PlaneFormat", "capture"]

_MAJOR = 81  # of every V4L2 node (Documentation/admin-guide/devices.txt)
_BIG_ENDIAN = 1 << 31
_MOST_PLANES = 8  # VIDEO_MAX_PLANES
_CLOCKS = {0x2000: "monotonic", 0x4000: "copied"}  # V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC, _COPY
_FPS_TOLERANCE = Fraction(1, 100)
_SLICE = 0.1  # seconds of one wait: a signal just before a wait is delayed by no more
_PAUSE = 0.002  # seconds before poll(2) is called again after an error
_HALF = 1 << 31  # a sequence number that appears to advance by more has restarted
_NODES = "/dev/video0 or similar (v4l2-ctl --list-devices)"


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
        raise ValueError(f"buffers={buffers!r}: at least one is needed")
    if not isinstance(format, str | None):
        raise TypeError(f"format={format!r}: four characters are needed, such as 'YUYV'")
    width = None if width is None else as_int(width, "width")
    height = None if height is None else as_int(height, "height")
    for name, value in (("width", width), ("height", height), ("fps", fps)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: a positive, finite number is needed")
    node = _Node(os.fspath(device))
    restore: Callable[[], object] = bool  # nothing to restore yet
    try:
        if (format, width, height, fps) != (None, None, None, None):
            restore = node.settings()
        if (format, width, height) != (None, None, None):
            node.set_format(format, width, height)
        if fps is not None:
            node.set_fps(fps)
        return Camera(node, count, given, exporter, huge_pages, timeout)
    except BaseException:
        restore()
        os.close(node.fd)
        raise


def _row(one: Buffer | Sequence[Buffer]) -> tuple[Buffer, ...]:
    return (one,) if isinstance(one, Buffer) else tuple(one)


class Camera(DeviceHandle):
    """An iterator over frames, by ``for`` and ``async for``; made by :func:`capture`.

    The first request for a frame starts the stream. Several threads may iterate; each frame is
    returned to one of them. After a fork the child can only close its copy.
    """

    def __init__(
        self,
        node: _Node,
        count: int,
        given: list[tuple[Buffer, ...]] | None,
        exporter: str,
        huge_pages: bool | str | int,
        timeout: float | None,
    ) -> None:
        """Take over the node, which the caller closes if this raises; for :func:`capture`."""
        self._node = node
        self._timeout = timeout
        self._memory = "MMAP" if exporter == "driver" and given is None else "DMABUF"
        self._turn = threading.Condition()
        self._waiting: set[int] = set()  # identifiers of the threads that wait for a frame
        self._streaming = False
        self._last: int | None = None
        self._queued: set[int] = set()
        self._dropped: set[int] = set()  # of frames that were not released, to be queued later
        self._made: list[Buffer] = []
        self.buffers: tuple[tuple[Buffer, ...], ...] = ()
        """The buffers of each frame, one for each plane."""
        self.path = node.path
        """The device node."""
        self.card = node.card
        """The name that the device reports."""
        self.driver = node.driver
        """The name of the kernel driver."""
        self.format = node.format()
        """The format in use."""
        self.lost = 0
        """The number of frames lost so far."""
        try:
            if given is not None:
                self._check(given)
            got = node.request(count, self._memory)
            if given is not None and got != count:
                text = f"capture: the driver needs {got} buffers, not {count}; pass that many"
                raise os_error(errno.EINVAL, text, self.path)
            rows = given or [self._make(index, exporter, huge_pages) for index in range(got)]
            self.buffers = tuple(rows)
            self._opened()
            for index in range(got):
                self._queue(index)
        except BaseException:
            self._closed = True
            node.stop(self._memory)
            self._take_back_all()
            self._close_made()
            raise

    def _check(self, given: list[tuple[Buffer, ...]]) -> None:
        planes, seen = self.format.planes, set()
        for index, row in enumerate(given):
            if len(row) != len(planes):
                text = f"capture: a frame of {self.format} takes {len(planes)} buffers, one for "
                text += f"each plane; frame {index} was given {len(row)}"
                raise os_error(errno.EINVAL, text, self.path)
            for buffer, plane in zip(row, planes, strict=True):
                problem = _problem_with(buffer, plane.size, self.format)
                if problem is None and id(buffer) in seen:
                    problem = "was given twice"
                if problem is not None:
                    raise os_error(errno.EINVAL, f"capture: buffer {index} {problem}", self.path)
                seen.add(id(buffer))

    def _make(self, index: int, exporter: str, huge_pages: bool | str | int) -> tuple[Buffer, ...]:
        row = []
        for number, plane in enumerate(self.format.planes):
            if self._memory == "MMAP":
                fd = self._node.export(index, number)
                try:
                    buffer = from_fd(fd)
                finally:
                    os.close(fd)
            else:
                name = f"{os.path.basename(self.path)[:16]} frame {index}.{number}"
                buffer = allocate(plane.size, exporter=exporter, huge_pages=huge_pages, name=name)
            self._made.append(buffer)
            if (problem := _problem_with(buffer, plane.size, self.format)) is not None:
                text = f"capture: a buffer by exporter={exporter!r} {problem}"
                raise os_error(errno.EINVAL, text, self.path)
            row.append(buffer)
        return tuple(row)

    def _queue(self, index: int) -> None:
        """Queue the buffers of a frame; the driver holds them until it returns them."""
        row = self.buffers[index]
        try:
            for buffer in row:
                lifetime.lend(buffer, self)
            fence.wait([one.slabs[0].fd for one in row], "write", self._timeout, path=self.path)
            with self._turn:
                if not self._closed:
                    self._queued.add(index)  # first: an interrupt may follow the driver's call
                    try:
                        self._node.queue(index, self._memory, row)
                    except OSError:
                        self._queued.discard(index)
                        raise
        finally:
            if index not in self._queued:
                self._take_back(row)

    def _take_back(self, row: tuple[Buffer, ...]) -> None:
        for buffer in row:
            lifetime.take_back(buffer, self)

    def __iter__(self) -> Camera:
        return self

    def __next__(self) -> Frame:
        """Wait for the next frame.

        Raises:
            TimeoutError: no frame arrived in time.
            OSError: the driver failed; ENODEV where the camera was unplugged.
            ClosedError: the camera is closed.
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
            self._queue_dropped()
            if not self._streaming:
                self._node.start()
                self._streaming = True
            filled = self._node.take(self._memory)
            if filled is None:
                return None
            self._queued.discard(filled.number)
            row = self.buffers[filled.number]
            self._take_back(row)
            gap = 0 if self._last is None else (filled.sequence - self._last - 1) % (1 << 32)
            lost = gap if gap < _HALF else 0
            self._last = filled.sequence
            self.lost += lost
            ends = self._give_back, self._dropped.add
            return Frame(self.path, self.format, row, filled, lost, *ends)

    @contextmanager
    def _waiter(self) -> Iterator[None]:
        self.check_open()  # before the lock, which a fork may have copied in the locked state
        me = threading.get_ident()
        with self._turn:
            self.check_open()
            self._waiting.add(me)
        try:
            yield
        finally:
            with self._turn:
                self._waiting.discard(me)
                self._turn.notify_all()

    def _late(self) -> OSError:
        text = f"wait for a frame: none arrived within {self._timeout:g} s; "
        if self._queued:
            text += "check the signal or trigger, or give a larger timeout="
        else:
            text += f"all {len(self.buffers)} buffers are held: release() frames, or ask for more"
        return os_error(errno.ETIMEDOUT, text, self.path)

    def _give_back(self, index: int) -> None:
        if not self._closed and not self.forked:
            self._queue(index)

    def _queue_dropped(self) -> None:
        for index in list(self._dropped):
            with suppress(BusyError):
                if not fence.pending([one.slabs[0].fd for one in self.buffers[index]], "write"):
                    self._queue(index)
                    self._dropped.discard(index)

    def close(self) -> None:
        """Stop the stream, and close the device and the buffers that :func:`capture` made.

        When it returns, the device does not write any more. Frames that are held lose their memory,
        except for buffers of the caller. An iteration in another thread ends with ClosedError.
        Closing again does nothing.

        Raises:
            BufferError: a view of a buffer exists; that buffer stays open, all else is closed.
        """
        if self.forked:
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
                    self._take_back_all()
        self._close_made()

    def _take_back_all(self) -> None:
        """Take back every buffer; the stream has stopped, so the device writes no more."""
        self._queued.clear()
        for row in self.buffers:
            self._take_back(row)

    def _close_made(self) -> None:
        first: BufferError | None = None
        for buffer in self._made:
            try:
                buffer.close()
            except BufferError as error:
                first = first or error
        if first is not None:
            raise first

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.format}, {len(self.buffers)} buffers"
        return f"<dmabuf.Camera {self.path} {self.card!r} {state}>"


def _problem_with(buffer: Buffer, size: int, form: Format) -> str | None:
    """Return why a driver cannot use a buffer for a plane of ``size`` bytes, None if it can."""
    if lifetime.check_buffer(buffer).closed:
        raise ClosedError("capture: a buffer is closed")
    if not buffer.is_dmabuf:
        return "is a memfd, not a dma-buf; allocate with exporter='udmabuf'"
    if len(buffer.slabs) != 1:
        return f"has {len(buffer.slabs)} slabs; a plane needs one"
    if not lifetime.descriptor_writable(buffer):
        return "has a read-only descriptor; the device writes into it"
    if buffer.size < size:
        return f"has {buffer.size} bytes; a plane of {form} takes {size}"
    return None


# -- the device node


class _Node:
    """An open, non-blocking capture node. Each method issues one ioctl or a few.

    The structures are linuxpy's. An OSError has the errno of the kernel, the path and the fix.
    """

    def __init__(self, path: str) -> None:
        try:
            from linuxpy.video import raw
        except ImportError as error:
            text = f"dmabuf.devices.v4l2 needs linuxpy ({error}): pip install dmabuf[v4l2]"
            raise ImportError(text, name="linuxpy") from error
        self._raw: Any = raw
        self.path = path
        self.fd = open_node(path, os.O_NONBLOCK, _MAJOR, "video", _NODES, "video")
        try:
            self._identify()
        except BaseException:
            os.close(self.fd)
            raise

    def _call(self, name: str, argument: Any, what: str, fixes: Fixes | None = None) -> Any:
        """Issue VIDIOC_``name``, and return its structure; ``what`` begins the error message."""
        call(self.fd, self._raw.IOC[name], argument, what, self.path, fixes)
        return argument

    def _identify(self) -> None:
        raw, caps = self._raw, self._raw.Capability
        found = self._call(
            "QUERYCAP", raw.v4l2_capability(), "query", {errno.ENOTTY: "not a V4L2 device"}
        )
        self.card = found.card.decode(errors="replace")
        self.driver = found.driver.decode(errors="replace")
        has = found.device_caps if found.capabilities & caps.DEVICE_CAPS else found.capabilities
        if has & caps.VIDEO_CAPTURE_MPLANE:
            self._multi, self._type = True, raw.BufType.VIDEO_CAPTURE_MPLANE
        elif has & caps.VIDEO_CAPTURE:
            self._multi, self._type = False, raw.BufType.VIDEO_CAPTURE
        else:
            text = f"capture: this node of {self.card!r} has no frames; use another, by v4l2-ctl"
            raise os_error(errno.ENODEV, text, self.path)
        if not has & caps.STREAMING:
            text = f"capture: {self.card!r} has read() only, not streaming I/O with buffers"
            raise os_error(errno.EOPNOTSUPP, text, self.path)

    # -- format and rate

    def settings(self) -> Callable[[], None]:
        """Read the format and rate, and return a function that restores them."""
        form, rate = self._get_format(), self._get_rate()

        def restore() -> None:
            for name, argument in (("S_FMT", form), ("S_PARM", rate)):
                with suppress(OSError):  # the device is gone, or in use and unchanged
                    if argument is not None:
                        self._call(name, argument, "restore the settings")

        return restore

    def _get_format(self) -> Any:
        return self._call("G_FMT", self._raw.v4l2_format(type=self._type), "get the format")

    def _get_rate(self) -> Any:
        """Return the v4l2_streamparm, None where the driver has no rate."""
        with suppress(OSError):
            return self._call("G_PARM", self._raw.v4l2_streamparm(type=self._type), "get the rate")
        return None

    def _pix(self, what: Any) -> Any:
        return what.fmt.pix_mp if self._multi else what.fmt.pix

    def format(self) -> Format:
        pix, rate = self._pix(self._get_format()), self._get_rate()
        planes = pix.plane_fmt[: pix.num_planes] if self._multi else [pix]
        fourcc = _fourcc_text(pix.pixelformat)
        return Format(
            fourcc,
            pix.width,
            pix.height,
            tuple(PlaneFormat(plane.sizeimage, plane.bytesperline) for plane in planes),
            None if rate is None else _fps(rate.parm.capture.timeperframe),
            resolve_color(self._color(pix), fourcc),
        )

    def _color(self, pix: Any) -> Color:
        raw = self._raw
        numbers = (pix.colorspace, pix.ycbcr_enc, pix.quantization, pix.xfer_func)
        kinds = (raw.Colorspace, raw.YcbcrEncoding, raw.Quantization, raw.XferFunc)
        names = []
        for number, kind in zip(numbers, kinds, strict=True):
            known = number in [one.value for one in kind]
            names.append(kind(number).name.lower().strip("_") if known else str(number))
        return Color(*names)

    def _formats(self) -> list[str]:
        item = self._raw.v4l2_fmtdesc(type=self._type)
        found = []
        with suppress(OSError):  # EINVAL after the last
            while True:
                self._call("ENUM_FMT", item, "list the formats")
                found.append(_fourcc_text(item.pixelformat))
                item.index += 1
        return found

    def set_format(self, name: str | None, width: int | None, height: int | None) -> None:
        asked = self._get_format()
        pix = self._pix(asked)
        if name is not None:
            number, known = _fourcc_number(name), self._formats()
            if number is None or _fourcc_text(number) not in known:
                text = f"set the format: no format {name!r}; it has {', '.join(known)}"
                raise os_error(errno.EINVAL, text, self.path)
            pix.pixelformat = number
        wanted = (pix.pixelformat, width or pix.width, height or pix.height)
        pix.width, pix.height = wanted[1:]  # ctypes keeps the lower 32 bits
        for plane in pix.plane_fmt if self._multi else [pix]:
            plane.bytesperline = plane.sizeimage = 0
        for name in ("TRY_FMT", "S_FMT"):
            try:
                self._call(name, asked, "set the format")
            except OSError as error:
                if (name, error.errno) == ("TRY_FMT", errno.ENOTTY):
                    continue
                raise
            got = (pix.pixelformat, pix.width, pix.height)
            if got != wanted:
                one, other = (f"{w}x{h} {_fourcc_text(code)}" for code, w, h in (wanted, got))
                text = f"set the format: it has no {one}; the nearest is {other}"
                raise os_error(errno.EINVAL, text, self.path)

    def set_fps(self, fps: float | Fraction) -> None:
        wanted = Fraction(fps).limit_denominator(1 << 16)
        rate = self._raw.v4l2_streamparm(type=self._type)
        per_frame = rate.parm.capture.timeperframe
        per_frame.numerator, per_frame.denominator = wanted.denominator, wanted.numerator
        fixes = {errno.ENOTTY: "it has one rate only; leave fps= out"}
        self._call("S_PARM", rate, "set the frame rate", fixes)
        got = _fps(per_frame)
        if got is None or abs(got - wanted) > wanted * _FPS_TOLERANCE:
            have = "another rate" if got is None else f"{float(got):.6g}"
            text = f"set the frame rate: it cannot deliver {float(wanted):.6g} frames a second; "
            raise os_error(errno.EINVAL, f"{text}the nearest is {have}", self.path)

    # -- buffers

    def request(self, count: int, memory: str) -> int:
        """Reserve places for ``count`` frames in "MMAP" or "DMABUF"; return how many there are."""
        asked = self._raw.v4l2_requestbuffers(
            type=self._type, memory=self._raw.Memory[memory], count=count
        )
        fixes = {errno.EINVAL: "it does not import dma-bufs; use exporter='driver'"}
        what = f"request {count} buffers"
        return int(self._call("REQBUFS", asked, what, fixes if memory == "DMABUF" else None).count)

    def export(self, index: int, plane: int) -> int:
        """Return the driver's own memory as a dma-buf, which the caller closes."""
        asked = self._raw.v4l2_exportbuffer(
            type=self._type, index=index, plane=plane, flags=os.O_RDWR | os.O_CLOEXEC
        )
        none = "it does not export its memory; use another exporter="
        fixes = dict.fromkeys((errno.ENOTTY, errno.EINVAL), none)
        return int(self._call("EXPBUF", asked, "export a buffer of the driver", fixes).fd)

    def queue(self, index: int, memory: str, buffers: tuple[Buffer, ...]) -> None:
        item, planes = self._item(memory)
        item.index = index
        what = f"queue buffer {index}"
        if memory == "DMABUF":
            for place, buffer in zip(planes, buffers, strict=False):
                place.m.fd, place.length = buffer.slabs[0].fd, buffer.size
            what = f"import buffer {index} ({format_size(buffers[0].size)} of "
            what += f"{buffers[0].exporter}) into {self.driver}"
        fixes = {
            errno.EFAULT: "it needs contiguous memory; use huge_pages=True or exporter='driver'",
            errno.EINVAL: "it refuses such memory; use exporter='driver'",
            errno.EIO: "its hardware cannot reach such memory; use exporter='driver'",
        }
        self._call("QBUF", item, what, fixes)

    def take(self, memory: str) -> Filled | None:
        """Return the next frame that is ready; None if there is none."""
        item, planes = self._item(memory)
        try:
            self._call("DQBUF", item, "take a frame", {errno.EIO: "the driver ended the stream"})
        except BlockingIOError:
            return None
        flags = self._raw.BufferFlag
        clock = _CLOCKS.get(item.flags & flags.TIMESTAMP_MASK, "unknown")
        taken = item.timestamp.secs * 1_000_000_000 + item.timestamp.usecs * 1000
        spans = []
        for one in planes[: item.length] if self._multi else planes:
            offset = one.data_offset if self._multi else 0
            spans.append((offset, max(0, one.bytesused - offset)))
        return Filled(
            item.index,
            item.sequence,
            taken,
            clock,
            time.time_ns() - time.monotonic_ns() + taken if clock == "monotonic" else None,
            bool(item.flags & flags.ERROR),
            tuple(spans),
        )

    def _item(self, memory: str) -> tuple[Any, Any]:
        """Return a v4l2_buffer and its planes; of a single-planar one the plane is itself."""
        item = self._raw.v4l2_buffer(type=self._type, memory=self._raw.Memory[memory])
        if not self._multi:
            return item, [item]
        planes = (self._raw.v4l2_plane * _MOST_PLANES)()
        item.m.planes, item.length = planes, _MOST_PLANES
        return item, planes

    # -- the stream

    def start(self) -> None:
        fixes = {
            errno.ENOSPC: "the bus lacks bandwidth; ask for a smaller or slower format",
            errno.EPIPE: "the formats of its media pipeline do not match; use media-ctl",
        }
        self._call("STREAMON", ctypes.c_int(self._type), "start the stream", fixes)

    def stop(self, memory: str) -> None:
        """Stop the stream and free the buffers; on return the device does not write any more."""
        with suppress(OSError):  # ENODEV: the device is gone
            self._call("STREAMOFF", ctypes.c_int(self._type), "stop the stream")
        with suppress(OSError):  # EBUSY: exported buffers are in use, and end with the descriptor
            self.request(0, memory)

    def wait(self, seconds: float) -> None:
        """Return when a frame may be ready, or after ``seconds``."""
        # POLLERR is not an error of the stream: vb2_fop_poll also reports it where a signal or
        # io_uring task work interrupts the wait for the driver's lock. take() raises real errors.
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        for _, events in poll.poll(seconds * 1000):
            if not events & select.POLLIN:
                time.sleep(min(seconds, _PAUSE))


def _fps(per_frame: Any) -> Fraction | None:
    if not per_frame.numerator or not per_frame.denominator:
        return None
    return Fraction(per_frame.denominator, per_frame.numerator)


def _fourcc_text(number: int) -> str:
    """Return the name of a pixel format."""
    text = (number & ~_BIG_ENDIAN).to_bytes(4, "little").decode("latin-1")
    return text + "-BE" if number & _BIG_ENDIAN else text.rstrip(" ")


def _fourcc_number(text: str) -> int | None:
    """Return the number of a pixel format, None for an invalid name."""
    name = text.removesuffix("-BE").ljust(4)
    if len(name) != 4 or not name.isascii():
        return None
    return int.from_bytes(name.encode(), "little") | (_BIG_ENDIAN if text.endswith("-BE") else 0)

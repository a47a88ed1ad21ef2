"""V4L2 nodes, for cameras and codecs: queues of buffers that a driver fills or reads.

A Node is an open descriptor. A Queue of it issues the ioctls for one direction. A Ring has the
Buffers of a queue that the driver fills. A Stream is the handle that a program has of all these.
Facts are from Documentation/userspace-api/media/v4l and videobuf2.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any, TypeVar

from dmabuf.devices import lifetime
from dmabuf.devices.frames import Color, Filled, Format, PlaneFormat, resolve_color
from dmabuf.devices.lifetime import DeviceHandle
from dmabuf.devices.node import Fixes, call, open_node
from dmabuf.errors import ClosedError, os_error
from dmabuf.kernel import fence
from dmabuf.memory import Buffer, allocate, from_fd
from dmabuf.sizes import format_size

__all__ = ["Node", "Queue", "Ring", "Stream"]

_MAJOR = 81  # of every V4L2 node (Documentation/admin-guide/devices.txt)
_BIG_ENDIAN = 1 << 31
_MOST_PLANES = 8  # VIDEO_MAX_PLANES
_CLOCKS = {0x2000: "monotonic", 0x4000: "copied"}  # V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC, _COPY
_FPS_TOLERANCE = Fraction(1, 100)
_SLICE = 0.1  # seconds of one wait: a signal just before a wait is delayed by no more
_PAUSE = 0.002  # seconds before poll(2) is called again after an error
_NODES = "/dev/video0 or similar (v4l2-ctl --list-devices)"

_Found = TypeVar("_Found")


class Stream(DeviceHandle):
    """A node that streams, the threads that wait for it, and its end.

    A subclass implements :meth:`_stop` and :meth:`_release`, and holds ``_turn`` while it changes
    what several threads use.
    """

    def __init__(self, node: Node, timeout: float | None) -> None:
        self._node = node
        self._timeout = timeout
        self._turn = threading.Condition()
        self._waiting: set[int] = set()  # identifiers of the threads that wait
        self.path = node.path
        """The device node."""
        self.card = node.card
        """The name that the device reports."""
        self.driver = node.driver
        """The name of the kernel driver."""

    def _await(
        self,
        attempt: Callable[[], _Found | None],
        events: Callable[[], int],
        late: Callable[[], OSError],
    ) -> _Found:
        """Return the first result of ``attempt`` that is not None; raise ``late()`` after a time.

        ``events`` returns those of poll(2) after which another attempt may succeed.
        """
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        with self._waiter():
            while (found := attempt()) is None:
                left = _SLICE if deadline is None else min(_SLICE, deadline - time.monotonic())
                if left <= 0:
                    raise late()
                self._node.wait(left, events())
        return found

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

    def close(self) -> None:
        """Stop the stream, and close the device and the buffers that were made for it.

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
                    self._stop()
                    while self._waiting - {threading.get_ident()}:
                        self._turn.wait()
                    os.close(self._node.fd)
        self._release()

    def _stop(self) -> None:
        """Stop the device, which then writes no more; with the lock held."""
        raise NotImplementedError

    def _release(self) -> None:
        """Close what was made for the device; is called by each close()."""
        raise NotImplementedError


class Ring:
    """The Buffers of a capture queue: each is the driver's, or that of a frame that is held.

    ``lock`` is held while the driver's queue changes; it is that of the Stream.
    """

    def __init__(
        self, queue: Queue, form: Format, timeout: float | None, lock: threading.Condition
    ) -> None:
        self._queue, self._form, self._timeout, self._lock = queue, form, timeout, lock
        self._open = True
        self._retired = False
        self._memory = "DMABUF"
        self._queued: set[int] = set()
        self._made: dict[int, list[Buffer]] = {}
        self.dropped: set[int] = set()
        """Frames that were not released, to be queued by :meth:`push_dropped`."""
        self.rows: tuple[tuple[Buffer, ...], ...] = ()
        """The buffers of each frame, one for each plane."""

    @property
    def waits(self) -> bool:
        """Whether the driver has a buffer to fill."""
        return bool(self._queued)

    def make(
        self,
        count: int,
        given: list[tuple[Buffer, ...]] | None,
        exporter: str,
        huge_pages: bool | str | int,
    ) -> None:
        """Reserve ``count`` places and get a buffer for each. On an error call :meth:`end`."""
        if exporter == "driver" and given is None:
            self._memory = "MMAP"
        if given is not None:
            self._check(given)
        got = self._queue.request(count, self._memory)
        if given is not None and got != count:
            text = f"{self._queue.use}: the driver needs {got} buffers, not {count}; pass that many"
            raise os_error(errno.EINVAL, text, self._queue.path)
        rows = given or [self._make(index, exporter, huge_pages) for index in range(got)]
        self.rows = tuple(rows)

    def _check(self, given: list[tuple[Buffer, ...]]) -> None:
        planes, seen, path = self._form.planes, set(), self._queue.path
        use = self._queue.use
        for index, row in enumerate(given):
            if len(row) != len(planes):
                text = f"{use}: a frame of {self._form} takes {len(planes)} buffers, one for "
                text += f"each plane; frame {index} was given {len(row)}"
                raise os_error(errno.EINVAL, text, path)
            for buffer, plane in zip(row, planes, strict=True):
                problem = problem_with(buffer, plane.size, self._form)
                if problem is None and id(buffer) in seen:
                    problem = "was given twice"
                if problem is not None:
                    raise os_error(errno.EINVAL, f"{use}: buffer {index} {problem}", path)
                seen.add(id(buffer))

    def _make(self, index: int, exporter: str, huge_pages: bool | str | int) -> tuple[Buffer, ...]:
        row = self._made[index] = []
        for number, plane in enumerate(self._form.planes):
            if self._memory == "MMAP":
                fd = self._queue.export(index, number)
                try:
                    buffer = from_fd(fd)
                finally:
                    os.close(fd)
            else:
                buffer = make_buffer(
                    self._queue.path, f"{index}.{number}", plane.size, exporter, huge_pages
                )
            row.append(buffer)
            if (problem := problem_with(buffer, plane.size, self._form)) is not None:
                text = f"{self._queue.use}: a buffer by exporter={exporter!r} {problem}"
                raise os_error(errno.EINVAL, text, self._queue.path)
        return tuple(row)

    def push_all(self) -> None:
        """Queue the buffers of every frame that is neither queued nor held."""
        for index in range(len(self.rows)):
            self.push(index)

    def push(self, index: int) -> None:
        """Queue the buffers of a frame; the driver holds them until it returns them."""
        row = self.rows[index]
        try:
            for buffer in row:
                lifetime.lend(buffer, self)
            fds = [one.slabs[0].fd for one in row]
            fence.wait(fds, "write", self._timeout, path=self._queue.path)
            with self._lock:
                if self._open:
                    self._queued.add(index)  # first: an interrupt may follow the driver's call
                    try:
                        self._queue.queue(index, self._memory, row)
                    except OSError:
                        self._queued.discard(index)
                        raise
        finally:
            if index not in self._queued:
                self._take_back(row)

    def give_back(self, index: int) -> None:
        """Queue the buffers of a frame that was held; close them after :meth:`retire`."""
        if self._open:
            self.push(index)
        elif self._retired:
            self._close([index])

    def push_dropped(self) -> None:
        """Give back the frames that nothing refers to, once nobody uses their memory."""
        for index in list(self.dropped):
            with suppress(BufferError):
                if not fence.pending([one.slabs[0].fd for one in self.rows[index]], "write"):
                    self.give_back(index)
                    self.dropped.discard(index)

    def take(self) -> Filled | None:
        """Return the next frame that is ready, whose buffers are the program's from then on."""
        filled = self._queue.take(self._memory)
        if filled is not None:
            self._queued.discard(filled.number)
            self._take_back(self.rows[filled.number])
        return filled

    def _take_back(self, row: tuple[Buffer, ...]) -> None:
        for buffer in row:
            lifetime.take_back(buffer, self)

    def off(self) -> list[int]:
        """Stop the queue, and return the numbers of the frames that the driver had."""
        self._queue.off()
        mine = sorted(self._queued)
        self._queued.clear()
        for index in mine:
            self._take_back(self.rows[index])
        return mine

    def retire(self) -> None:
        """Stop the queue and free its places; memory of frames that are held closes with them."""
        self.dropped.update(self.off())
        self._queue.request(0, self._memory)
        self._open, self._retired = False, True
        self.push_dropped()

    def end(self) -> None:
        """Stop the queue, whatever the device answers; the memory is the device's until it closes.

        Once the descriptor is closed, :meth:`release` ends the use of the buffers.
        """
        self._open = False
        with suppress(OSError):  # ENODEV: the device is gone
            self._queue.off()
        with suppress(OSError):  # EBUSY: exported buffers are in use, and end with the descriptor
            self._queue.request(0, self._memory)

    def release(self) -> None:
        """Take back all buffers, and close those that were made; raise BufferError for a view."""
        self._queued.clear()
        for row in self.rows:
            self._take_back(row)
        self._close(list(self._made))

    @property
    def released(self) -> bool:
        """Whether all buffers that were made are closed."""
        return all(buffer.closed for row in self._made.values() for buffer in row)

    def _close(self, indices: Sequence[int]) -> None:
        first: BufferError | None = None
        for buffer in (one for index in indices for one in self._made.get(index, ())):
            try:
                buffer.close()
            except BufferError as error:
                first = first or error
        if first is not None:
            raise first


def make_buffer(
    path: str, number: str, size: int, exporter: str, huge_pages: bool | str | int
) -> Buffer:
    """Return a new Buffer for a frame of the node."""
    name = f"{os.path.basename(path)[:16]} frame {number}"
    return allocate(size, exporter=exporter, huge_pages=huge_pages, name=name)


def problem_with(buffer: Buffer, size: int, form: Format, written: bool = True) -> str | None:
    """Return why a driver cannot use a buffer for a plane of ``size`` bytes, None if it can.

    ``written`` is True if the driver writes into it.
    """
    if lifetime.check_buffer(buffer).closed:
        raise ClosedError("use a buffer for frames: it is closed")
    if not buffer.is_dmabuf:
        return "is a memfd, not a dma-buf; allocate with exporter='udmabuf'"
    if len(buffer.slabs) != 1:
        return f"has {len(buffer.slabs)} slabs; a plane needs one"
    if written and not lifetime.descriptor_writable(buffer):
        return "has a read-only descriptor; the device writes into it"
    if buffer.size < size:
        return f"has {buffer.size} bytes; a plane of {form} takes {size}"
    return None


# -- the device node


class Node:
    """An open, non-blocking V4L2 node.

    The structures are linuxpy's. An OSError has the errno of the kernel, the path and the fix.
    """

    def __init__(self, path: str) -> None:
        try:
            from linuxpy.video import raw
        except ImportError as error:
            text = f"dmabuf.devices.v4l2 needs linuxpy ({error}): pip install dmabuf[v4l2]"
            raise ImportError(text, name="linuxpy") from error
        self.raw: Any = raw
        self.path = path
        self.fd = open_node(path, os.O_NONBLOCK, _MAJOR, "video", _NODES, "video")
        try:
            found = self.call(
                "QUERYCAP", raw.v4l2_capability(), "query", {errno.ENOTTY: "not a V4L2 device"}
            )
        except BaseException:
            os.close(self.fd)
            raise
        self.card = found.card.decode(errors="replace")
        self.driver = found.driver.decode(errors="replace")
        known = found.capabilities & raw.Capability.DEVICE_CAPS
        self.caps: int = found.device_caps if known else found.capabilities
        """What the node can do, as V4L2_CAP_ flags."""

    def call(self, name: str, argument: Any, what: str, fixes: Fixes | None = None) -> Any:
        """Issue VIDIOC_``name``, and return its structure; ``what`` begins the error message."""
        call(self.fd, self.raw.IOC[name], argument, what, self.path, fixes)
        return argument

    def wait(self, seconds: float, events: int) -> None:
        """Return when one of the poll(2) ``events`` may have occurred, or after ``seconds``."""
        # POLLERR is not an error of the stream: vb2_fop_poll also reports it where a signal or
        # io_uring task work interrupts the wait for the driver's lock. take() raises real errors.
        poll = select.poll()
        poll.register(self.fd, events)
        for _, found in poll.poll(seconds * 1000):
            if not found & events:
                time.sleep(min(seconds, _PAUSE))


class Queue:
    """One direction of a node: its format and its buffers. Each method issues one ioctl or a few.

    ``kind`` is V4L2's name of the type of buffers, such as "VIDEO_CAPTURE". ``use`` is what the
    program does, and ``other`` the memory for drivers that cannot import a buffer: for errors.
    """

    def __init__(self, node: Node, kind: str, use: str, other: str) -> None:
        self._node, self._raw, self._other = node, node.raw, other
        self.use = use
        self._multi = kind.endswith("_MPLANE")
        self._type = node.raw.BufType[kind]
        self.path = node.path

    # -- format and rate

    def settings(self) -> Callable[[], None]:
        """Read the format and rate, and return a function that restores them."""
        form, rate = self._get_format(), self._get_rate()

        def restore() -> None:
            for name, argument in (("S_FMT", form), ("S_PARM", rate)):
                with suppress(OSError):  # the device is gone, or in use and unchanged
                    if argument is not None:
                        self._node.call(name, argument, "restore the settings")

        return restore

    def _get_format(self) -> Any:
        return self._node.call("G_FMT", self._raw.v4l2_format(type=self._type), "get the format")

    def _get_rate(self) -> Any:
        """Return the v4l2_streamparm, None where the driver has no rate."""
        rate = self._raw.v4l2_streamparm(type=self._type)
        with suppress(OSError):
            return self._node.call("G_PARM", rate, "get the rate")
        return None

    def _pix(self, what: Any) -> Any:
        return what.fmt.pix_mp if self._multi else what.fmt.pix

    def format(self) -> Format:
        """Return the format in use."""
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

    def _color_kinds(self) -> tuple[tuple[str, Any], ...]:
        raw = self._raw
        return (
            ("colorspace", raw.Colorspace),
            ("ycbcr_enc", raw.YcbcrEncoding),
            ("quantization", raw.Quantization),
            ("xfer_func", raw.XferFunc),
        )

    def _color(self, pix: Any) -> Color:
        names = []
        for field, kind in self._color_kinds():
            number = getattr(pix, field)
            known = number in [one.value for one in kind]
            names.append(kind(number).name.lower().strip("_") if known else str(number))
        return Color(*names)

    def formats(self) -> dict[str, bool]:
        """Return the names of the pixel formats, and whether each is compressed."""
        item = self._raw.v4l2_fmtdesc(type=self._type)
        found = {}
        with suppress(OSError):  # EINVAL after the last
            while True:
                self._node.call("ENUM_FMT", item, "list the formats")
                compressed = bool(item.flags & self._raw.ImageFormatFlag.COMPRESSED)
                found[_fourcc_text(item.pixelformat)] = compressed
                item.index += 1
        return found

    def set_format(
        self, name: str | None, width: int | None, height: int | None, color: Color | None = None
    ) -> None:
        """Set the format; None keeps what is set. Raises OSError where the driver has another."""
        asked = self._get_format()
        pix = self._pix(asked)
        if name is not None:
            number, known = _fourcc_number(name), self.formats()
            if number is None or _fourcc_text(number) not in known:
                text = f"set the format: no format {name!r}; it has {', '.join(known)}"
                raise os_error(errno.EINVAL, text, self.path)
            pix.pixelformat = number
        wanted = (pix.pixelformat, width or pix.width, height or pix.height)
        pix.width, pix.height = wanted[1:]  # ctypes keeps the lower 32 bits
        for plane in pix.plane_fmt if self._multi else [pix]:
            plane.bytesperline = plane.sizeimage = 0
        if color is not None:
            names = (color.space, color.encoding, color.quantization, color.transfer)
            for (field, kind), one in zip(self._color_kinds(), names, strict=True):
                numbers = {k.name.lower().strip("_"): k.value for k in kind}
                setattr(pix, field, numbers.get(one, int(one) if one.isdecimal() else 0))
        for name in ("TRY_FMT", "S_FMT"):
            try:
                self._node.call(name, asked, "set the format")
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
        """Set the rate, in frames a second."""
        wanted = Fraction(fps).limit_denominator(1 << 16)
        rate = self._raw.v4l2_streamparm(type=self._type)
        per_frame = rate.parm.capture.timeperframe
        per_frame.numerator, per_frame.denominator = wanted.denominator, wanted.numerator
        fixes = {errno.ENOTTY: "it has one rate only; leave fps= out"}
        self._node.call("S_PARM", rate, "set the frame rate", fixes)
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
        fixes = {errno.EINVAL: f"it does not import dma-bufs; use {self._other}"}
        what = f"request {count} buffers"
        fixing = fixes if memory == "DMABUF" else None
        return int(self._node.call("REQBUFS", asked, what, fixing).count)

    def export(self, index: int, plane: int) -> int:
        """Return the driver's own memory as a dma-buf, which the caller closes."""
        asked = self._raw.v4l2_exportbuffer(
            type=self._type, index=index, plane=plane, flags=os.O_RDWR | os.O_CLOEXEC
        )
        none = "it does not export its memory; use another exporter="
        fixes = dict.fromkeys((errno.ENOTTY, errno.EINVAL), none)
        return int(self._node.call("EXPBUF", asked, "export a buffer of the driver", fixes).fd)

    def queue(
        self,
        index: int,
        memory: str,
        buffers: tuple[Buffer, ...],
        spans: Sequence[tuple[int, int]] = (),
        timestamp_ns: int = 0,
    ) -> None:
        """Queue buffers; of those that the driver reads, ``spans`` has (offset, bytes) of each."""
        item, planes = self._item(memory)
        item.index = index
        item.timestamp.secs, rest = divmod(timestamp_ns // 1000, 1_000_000)
        item.timestamp.usecs = rest
        what = f"queue buffer {index}"
        if memory == "DMABUF":
            for place, buffer in zip(planes, buffers, strict=False):
                place.m.fd, place.length = buffer.slabs[0].fd, buffer.size
            what = f"import buffer {index} ({format_size(buffers[0].size)} of "
            what += f"{buffers[0].exporter}) into {self._node.driver}"
        for place, (offset, nbytes) in zip(planes, spans, strict=False):
            place.bytesused = offset + nbytes
            if self._multi:
                place.data_offset = offset
        fixes = {
            errno.EFAULT: f"it needs contiguous memory; use huge_pages=True or {self._other}",
            errno.EINVAL: f"it refuses such memory; use {self._other}",
            errno.EIO: f"its hardware cannot reach such memory; use {self._other}",
        }
        self._node.call("QBUF", item, what, fixes)

    def take(self, memory: str) -> Filled | None:
        """Return the next buffer that the driver is done with; None if there is none.

        Raises BrokenPipeError after the last frame of a codec that was drained.
        """
        item, planes = self._item(memory)
        fixes = {
            errno.EIO: "the driver ended the stream",
            errno.EPIPE: "the last frame was taken",
        }
        try:
            self._node.call("DQBUF", item, "take a frame", fixes)
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
            bool(item.flags & flags.KEYFRAME),
            bool(item.flags & flags.LAST),
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

    def on(self) -> None:
        """Start the stream."""
        fixes = {
            errno.ENOSPC: "the bus lacks bandwidth; ask for a smaller or slower format",
            errno.EPIPE: "the formats of its media pipeline do not match; use media-ctl",
        }
        self._node.call("STREAMON", ctypes.c_int(self._type), "start the stream", fixes)

    def off(self) -> None:
        """Stop the stream; on return the device does not use any buffer, and none is queued."""
        self._node.call("STREAMOFF", ctypes.c_int(self._type), "stop the stream")


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

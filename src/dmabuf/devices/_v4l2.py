"""A V4L2 capture node: its ioctls, with linuxpy's structures, and errors that say what to do.

Facts are from Documentation/userspace-api/media/v4l and drivers/media/common/videobuf2.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from dmabuf import _uapi
from dmabuf.buffer import Buffer
from dmabuf.errors import ClosedError, os_error
from dmabuf.sizes import format_size

VIDEO_MAJOR = 81
"""The major number of every V4L2 node (Documentation/admin-guide/devices.txt)."""

_BIG_ENDIAN = 1 << 31
_VIDEO_MAX_PLANES = 8
_PAUSE = 0.002
"""Seconds before poll(2) is asked again after an error."""
_FPS_TOLERANCE = Fraction(1, 100)
_CLOCKS = {0x2000: "monotonic", 0x4000: "copied"}
"""V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC and _COPY; 0 is unknown."""


class PlaneFormat(NamedTuple):
    """One plane of a frame: the bytes it may take, and those from one line to the next."""

    size: int
    bytes_per_line: int


@dataclass(frozen=True, slots=True)
class Format:
    """What a camera delivers."""

    fourcc: str
    """The pixel format as V4L2 names it, such as "YUYV", "NV12" or "Y16 -BE"."""
    width: int
    height: int
    planes: tuple[PlaneFormat, ...]
    """One, but for the multi-planar formats, whose planes are in a buffer each."""
    fps: Fraction | None
    """Frames a second, None where the device does not say."""

    def __str__(self) -> str:
        rate = "" if self.fps is None else f" at {float(self.fps):.6g} fps"
        return f"{self.width}x{self.height} {self.fourcc}{rate}"


class Filled(NamedTuple):
    """What VIDIOC_DQBUF tells of a frame; `planes` are (bytes used, offset of the first)."""

    number: int
    sequence: int
    timestamp_ns: int
    clock: str
    error: bool
    planes: tuple[tuple[int, int], ...]


def fourcc_text(number: int) -> str:
    """A pixel format's name."""
    text = (number & ~_BIG_ENDIAN).to_bytes(4, "little").decode("latin-1")
    return text + "-BE" if number & _BIG_ENDIAN else text.rstrip(" ")


def _fourcc_number(text: str) -> int | None:
    """A pixel format's number, None for what can be no name."""
    name = text.removesuffix("-BE").ljust(4)
    if len(name) != 4 or not name.isascii():
        return None
    return int.from_bytes(name.encode(), "little") | (_BIG_ENDIAN if text.endswith("-BE") else 0)


def _structures() -> Any:
    try:
        from linuxpy.video import raw
    except ImportError as error:
        text = f"dmabuf.devices.v4l2 needs linuxpy ({error}): pip install dmabuf[v4l2]"
        raise ImportError(text, name="linuxpy") from error
    return raw


class Node:
    """An open capture node. Its descriptor does not block."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.raw = _structures()
        self.path = os.fspath(path)
        self.fd = _open(self.path)
        try:
            self._identify()
        except BaseException:
            os.close(self.fd)
            raise

    def _ask(self, request: int, argument: Any) -> Any:
        while True:
            try:
                _uapi.ioctl(self.fd, request, argument)
            except InterruptedError:
                continue
            return argument

    def _fail(self, error: OSError, what: str, fixes: dict[int, str] | None = None) -> OSError:
        number = error.errno or errno.EIO
        known = {
            errno.EBUSY: "another program is using it",
            errno.ENODEV: "the device is gone",
        } | (fixes or {})
        return os_error(number, f"{what}: {known.get(number, os.strerror(number))}", self.path)

    def _identify(self) -> None:
        raw = self.raw
        try:
            found = self._ask(raw.IOC.QUERYCAP, raw.v4l2_capability())
        except OSError as error:
            what = "asking what kind of video device it is"
            raise self._fail(error, what, {errno.ENOTTY: "it is none"}) from None
        self.card = found.card.decode(errors="replace")
        self.driver = found.driver.decode(errors="replace")
        caps = raw.Capability
        has = found.device_caps if found.capabilities & caps.DEVICE_CAPS else found.capabilities
        if has & caps.VIDEO_CAPTURE_MPLANE:
            self.multi, self.type = True, raw.BufType.VIDEO_CAPTURE_MPLANE
        elif has & caps.VIDEO_CAPTURE:
            self.multi, self.type = False, raw.BufType.VIDEO_CAPTURE
        else:
            kinds = {
                "an output": caps.VIDEO_OUTPUT | caps.VIDEO_OUTPUT_MPLANE,
                "a codec's or scaler's": caps.VIDEO_M2M | caps.VIDEO_M2M_MPLANE,
                "a metadata": caps.META_CAPTURE | caps.META_OUTPUT,
            }
            kind = next((kind for kind, bits in kinds.items() if has & bits), "no camera's")
            text = f"{kind} node of {self.card!r}, which has no frames to capture"
            raise os_error(errno.ENODEV, text, self.path)
        if not has & caps.STREAMING:
            text = f"{self.card!r} has no streaming I/O, only read(): no buffer can be handed to it"
            raise os_error(errno.EOPNOTSUPP, text, self.path)

    # -- the format

    def formats(self) -> Iterator[str]:
        """The names of the pixel formats that it has."""
        item = self.raw.v4l2_fmtdesc(type=self.type)
        with suppress(OSError):  # EINVAL past the last
            while True:
                yield fourcc_text(self._ask(self.raw.IOC.ENUM_FMT, item).pixelformat)
                item.index += 1

    def set_format(self, name: str | None, width: int | None, height: int | None) -> None:
        """Change the format, to exactly what is asked for or not at all."""
        raw, asked = self.raw, self._get_format()
        pix = self._pix(asked)
        if name is not None:
            number, known = _fourcc_number(name), list(self.formats())
            if number is None or fourcc_text(number) not in known:
                text = f"has no format {name!r}: it has {', '.join(known)}"
                raise os_error(errno.EINVAL, text, self.path)
            pix.pixelformat = number
        wanted = (pix.pixelformat, width or pix.width, height or pix.height)
        pix.width, pix.height = wanted[1:]  # of which ctypes takes the lower 32 bits
        planes = pix.plane_fmt if self.multi else [pix]
        for plane in planes:
            plane.bytesperline = plane.sizeimage = 0
        try:
            self._ask(raw.IOC.TRY_FMT, asked)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise self._fail(error, "trying the format") from None
        else:
            self._check_same(wanted, pix)
        try:
            self._ask(raw.IOC.S_FMT, asked)
        except OSError as error:
            raise self._fail(error, "setting the format") from None
        self._check_same(wanted, pix)

    def _check_same(self, wanted: tuple[int, int, int], pix: Any) -> None:
        got = (pix.pixelformat, pix.width, pix.height)
        if got != wanted:
            one, other = (f"{w}x{h} {fourcc_text(number)}" for number, w, h in (wanted, got))
            text = f"cannot deliver {one}, the nearest is {other}: ask for what it has"
            raise os_error(errno.EINVAL, text, self.path)

    def set_fps(self, fps: float | Fraction) -> None:
        """Change the frame rate, to what is asked for or near it."""
        raw, wanted = self.raw, Fraction(fps).limit_denominator(1 << 16)
        parameters = raw.v4l2_streamparm(type=self.type)
        per_frame = parameters.parm.capture.timeperframe
        per_frame.numerator, per_frame.denominator = wanted.denominator, wanted.numerator
        try:
            self._ask(raw.IOC.S_PARM, parameters)
        except OSError as error:
            fixes = {errno.ENOTTY: "it has one rate only: leave fps out"}
            raise self._fail(error, "setting the frame rate", fixes) from None
        got = _rate(per_frame)
        if got is None or abs(got - wanted) > wanted * _FPS_TOLERANCE:
            have = "another rate" if got is None else f"{float(got):.6g}"
            text = f"cannot deliver {float(wanted):.6g} frames a second here, but {have}"
            raise os_error(errno.EINVAL, text, self.path)

    def format(self) -> Format:
        """The format as it is set."""
        pix = self._pix(self._get_format())
        planes = pix.plane_fmt[: pix.num_planes] if self.multi else [pix]
        return Format(
            fourcc_text(pix.pixelformat),
            pix.width,
            pix.height,
            tuple(PlaneFormat(plane.sizeimage, plane.bytesperline) for plane in planes),
            self._fps(),
        )

    def _get_format(self) -> Any:
        try:
            return self._ask(self.raw.IOC.G_FMT, self.raw.v4l2_format(type=self.type))
        except OSError as error:
            raise self._fail(error, "asking for its format") from None

    def _pix(self, what: Any) -> Any:
        return what.fmt.pix_mp if self.multi else what.fmt.pix

    def _fps(self) -> Fraction | None:
        parameters = self.raw.v4l2_streamparm(type=self.type)
        try:
            self._ask(self.raw.IOC.G_PARM, parameters)
        except OSError:
            return None
        return _rate(parameters.parm.capture.timeperframe)

    # -- buffers

    def request(self, count: int, memory: str) -> int:
        """Have `count` places for frames, in "MMAP" or "DMABUF"; how many there are then."""
        asked = self.raw.v4l2_requestbuffers(
            type=self.type, memory=self.raw.Memory[memory], count=count
        )
        try:
            self._ask(self.raw.IOC.REQBUFS, asked)
        except OSError as error:
            fixes = {errno.EINVAL: "it takes no dma-bufs: use exporter='driver'"}
            raise self._fail(
                error, f"asking for {count} buffers", fixes if memory == "DMABUF" else None
            ) from None
        return int(asked.count)

    def export(self, index: int, plane: int) -> int:
        """The driver's own memory as a dma-buf: its descriptor, the caller's to close."""
        asked = self.raw.v4l2_exportbuffer(
            type=self.type, index=index, plane=plane, flags=os.O_RDWR | os.O_CLOEXEC
        )
        try:
            return int(self._ask(self.raw.IOC.EXPBUF, asked).fd)
        except OSError as error:
            fixes = {
                errno.ENOTTY: "it has no VIDIOC_EXPBUF: use another exporter",
                errno.EINVAL: "it exports none: use another exporter",
            }
            raise self._fail(error, "exporting a buffer of its own", fixes) from None

    def queue(self, index: int, memory: str, buffers: tuple[Buffer, ...]) -> None:
        """Hand a frame's memory to the driver."""
        item, planes = self._item(memory)
        item.index = index
        if memory == "DMABUF":
            for place, buffer in zip(planes, buffers, strict=False):
                place.m.fd, place.length = buffer.slabs[0].fd, buffer.size
        try:
            self._ask(self.raw.IOC.QBUF, item)
        except OSError as error:
            first = buffers[0]
            what = f"handing it buffer {index}"
            if memory == "DMABUF":
                kind = f"{format_size(first.size)} from {first.exporter}"
                what = f"the driver refuses to import buffer {index} ({kind})"
            fixes = {
                errno.EFAULT: "it needs memory in one piece: huge_pages=True, or exporter='driver'",
                errno.EINVAL: "it takes no such memory: use exporter='driver'",
                errno.EIO: "its hardware cannot reach such memory: use exporter='driver'",
            }
            raise self._fail(error, what, fixes) from None

    def take(self, memory: str) -> Filled | None:
        """The next frame that is there, None where none is."""
        item, planes = self._item(memory)
        try:
            self._ask(self.raw.IOC.DQBUF, item)
        except BlockingIOError:
            return None
        except OSError as error:
            fixes = {errno.EIO: "the driver gave the stream up"}
            raise self._fail(error, "taking a frame", fixes) from None
        flags = self.raw.BufferFlag
        filled = planes[: item.length] if self.multi else planes
        return Filled(
            item.index,
            item.sequence,
            item.timestamp.secs * 1_000_000_000 + item.timestamp.usecs * 1000,
            _CLOCKS.get(item.flags & flags.TIMESTAMP_MASK, "unknown"),
            bool(item.flags & flags.ERROR),
            tuple((one.bytesused, one.data_offset if self.multi else 0) for one in filled),
        )

    def _item(self, memory: str) -> tuple[Any, Any]:
        """A v4l2_buffer, and what stands for each of its planes: itself where there is one only."""
        raw = self.raw
        item = raw.v4l2_buffer(type=self.type, memory=raw.Memory[memory])
        if not self.multi:
            return item, [item]
        planes = (raw.v4l2_plane * _VIDEO_MAX_PLANES)()
        item.m.planes, item.length = planes, _VIDEO_MAX_PLANES
        return item, planes

    # -- the stream

    def start(self) -> None:
        """VIDIOC_STREAMON."""
        try:
            self._ask(self.raw.IOC.STREAMON, self._type())
        except OSError as error:
            fixes = {
                errno.ENOSPC: "the bus has not the bandwidth: ask for a smaller or slower format",
                errno.EPIPE: "the links or formats of its media pipeline do not fit: media-ctl",
            }
            raise self._fail(error, "starting the stream", fixes) from None

    def stop(self, memory: str) -> None:
        """VIDIOC_STREAMOFF, and the buffers given back: when it returns the device writes none."""
        with suppress(OSError):  # ENODEV: it is gone
            self._ask(self.raw.IOC.STREAMOFF, self._type())
        with suppress(OSError):  # EBUSY where exported ones are in use: they go with the descriptor
            self.request(0, memory)

    def _type(self) -> Any:
        import ctypes

        return ctypes.c_int(self.type)

    def wait(self, seconds: float) -> None:
        """Until there may be a frame, or `seconds` are over.

        An error in poll's answer is not the stream's: vb2_fop_poll says so too where a signal, or
        io_uring's task work, comes while it waits for the driver's lock. `take` raises the others.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        for _, events in poll.poll(seconds * 1000):
            if not events & select.POLLIN:
                time.sleep(min(seconds, _PAUSE))


def _rate(per_frame: Any) -> Fraction | None:
    if not per_frame.numerator or not per_frame.denominator:
        return None
    return Fraction(per_frame.denominator, per_frame.numerator)


def _open(path: str) -> int:
    there = "cameras are /dev/video0 and so on (v4l2-ctl --list-devices)"
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise os_error(errno.ENOENT, f"{error.strerror}: {there}", path) from None
    if not stat.S_ISCHR(status.st_mode) or os.major(status.st_rdev) != VIDEO_MAJOR:
        raise os_error(errno.ENODEV, f"is no video device: {there}", path)
    try:
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        fixes = {
            errno.EACCES: "permission denied: join its group, often video, or be root",
            errno.EBUSY: "another program is using it",
        }
        number = error.errno or errno.EIO
        raise os_error(number, fixes.get(number, os.strerror(number)), path) from None


def problem_with(buffer: Buffer, size: int, form: Format) -> str | None:
    """Why a driver cannot be given a buffer for a plane of `size` bytes."""
    if not isinstance(buffer, Buffer):
        raise TypeError(f"a dmabuf.Buffer is needed, not {type(buffer).__name__}")
    if buffer.closed:
        raise ClosedError("the buffer is closed")
    if not buffer.is_dmabuf:
        return "is a memfd, which is no dma-buf and cannot be imported: exporter='udmabuf'"
    if len(buffer.slabs) != 1:
        return f"is {len(buffer.slabs)} dma-bufs, and a plane is one: have it made in one piece"
    if not buffer._descriptor_writable:
        return "is read-only, and the device writes into it"
    if buffer.size < size:
        return f"holds {buffer.size} bytes, and a plane of {form} takes {size}"
    return None

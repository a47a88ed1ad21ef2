"""Frames of cameras and the pixel formats: where the planes of a picture lie in its Buffers.

DRM and V4L2 name the same layouts differently: "RGB3" of V4L2 is "BG24" of DRM. DRM_FORMATS has
the planes of each format by DRM's name, V4L2_FORMATS by V4L2's. Facts are from <drm/drm_fourcc.h>,
<linux/videodev2.h> and Documentation/userspace-api/media/v4l.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from dmabuf.errors import BusyError, ClosedError, Uncopyable, os_error
from dmabuf.kernel import process
from dmabuf.memory import Buffer, import_optional

if TYPE_CHECKING:
    import numpy as np


# -- pixel formats


class PlaneRule(NamedTuple):
    """One plane of a format: a unit of ``nbytes`` for ``across`` x ``down`` pixels.

    As an array it has items of ``dtype``, and ``channels`` of them for each pixel.
    """

    nbytes: int
    across: int = 1
    down: int = 1
    dtype: str = "u1"
    channels: int = 1

    def row_bytes(self, width: int) -> int:
        """Return the bytes of one row without padding: the least stride."""
        return -(-width // self.across) * self.nbytes

    def rows(self, height: int) -> int:
        """Return the number of rows."""
        return -(-height // self.down)


Rules = tuple[PlaneRule, ...]


def _named(names: str, *rules: PlaneRule) -> dict[str, Rules]:
    return dict.fromkeys(names.split(), rules)


_BYTE, _WORD = PlaneRule(1), PlaneRule(2, dtype="<u2")

DRM_FORMATS: dict[str, Rules] = {
    **_named("C8 R8", _BYTE),
    **_named("RG16 BG16 XR15 XB15 RX15 BX15 AR15 AB15 RA15 BA15 XR12 AR12 R16", _WORD),
    **_named("GR88 RG88", PlaneRule(2, channels=2)),
    **_named("RG24 BG24", PlaneRule(3, channels=3)),
    **_named("XR24 XB24 RX24 BX24 AR24 AB24 RA24 BA24 AYUV XYUV", PlaneRule(4, channels=4)),
    **_named("XR30 XB30 RX30 BX30 AR30 AB30 RA30 BA30", PlaneRule(4, dtype="<u4")),
    **_named("GR32 RG32", PlaneRule(4, dtype="<u2", channels=2)),
    **_named("XR48 XB48 AR48 AB48", PlaneRule(8, dtype="<u2", channels=4)),
    **_named("XR4H XB4H AR4H AB4H", PlaneRule(8, dtype="<f2", channels=4)),
    **_named("YUYV YVYU UYVY VYUY", PlaneRule(4, 2, channels=2)),
    **_named("NV12 NV21", _BYTE, PlaneRule(2, 2, 2, channels=2)),
    **_named("NV16 NV61", _BYTE, PlaneRule(2, 2, 1, channels=2)),
    **_named("NV24 NV42", _BYTE, PlaneRule(2, channels=2)),
    **_named("P010 P012 P016", _WORD, PlaneRule(4, 2, 2, "<u2", 2)),
    **_named("YU12 YV12", _BYTE, *2 * [PlaneRule(1, 2, 2)]),
    **_named("YU16 YV16", _BYTE, *2 * [PlaneRule(1, 2, 1)]),
    **_named("YU24 YV24", *3 * [_BYTE]),
}
"""The planes of every known format of DRM, in the linear layout."""

_SAME = (
    *("NV12", "NV21", "NV16", "NV61", "NV24", "NV42", "YU12", "YV12", "YUYV", "YVYU", "UYVY"),
    *("VYUY", "P010", "XR24", "AR24", "XB24", "AB24", "BX24", "BA24", "RX24", "RA24", "XR15"),
    *("AR15", "XR12", "AR12"),
)
DRM_NAMES = dict(zip(_SAME, _SAME, strict=True)) | {
    "RGB3": "BG24", "BGR3": "RG24", "GREY": "R8", "Y16": "R16", "RGBP": "RG16", "422P": "YU16",
    "NM12": "NV12", "NM21": "NV21", "NM16": "NV16", "NM61": "NV61", "YM12": "YU12",
    "YM21": "YV12", "YM16": "YU16", "YM61": "YV16", "YM24": "YU24", "YM42": "YV24",
}  # fmt: skip
"""DRM's name of the formats of V4L2, whether their planes share a buffer or not."""

_PIX_FMTS = {
    "RGB3": "rgb24", "BGR3": "bgr24", "GREY": "gray", "Y16": "gray16le", "RGBP": "rgb565le",
    "XR24": "bgr0", "AR24": "bgra", "XB24": "rgb0", "AB24": "rgba", "BX24": "0rgb",
    "BA24": "argb", "RX24": "0bgr", "RA24": "abgr", "XR15": "rgb555le", "AR15": "rgb555le",
    "YUYV": "yuyv422", "YVYU": "yvyu422", "UYVY": "uyvy422", "P010": "p010le",
    "NV12": "nv12", "NV21": "nv21", "NV16": "nv16", "NV24": "nv24", "NV42": "nv42",
    "NM12": "nv12", "NM21": "nv21", "NM16": "nv16", "YU12": "yuv420p", "YM12": "yuv420p",
    "422P": "yuv422p", "YM16": "yuv422p", "YM24": "yuv444p",
    "BA81": "bayer_bggr8", "GBRG": "bayer_gbrg8", "GRBG": "bayer_grbg8", "RGGB": "bayer_rggb8",
    "BYR2": "bayer_bggr16le", "GB16": "bayer_gbrg16le", "GR16": "bayer_grbg16le",
    "RG16": "bayer_rggb16le",
}  # fmt: skip

V4L2_FORMATS: dict[str, Rules] = {
    **{name: DRM_FORMATS[drm] for name, drm in DRM_NAMES.items()},
    **_named("BA81 GBRG GRBG RGGB", _BYTE),
    **_named("BG10 GB10 BA10 RG10 BG12 GB12 BA12 RG12 BG14 GB14 GR14 RG14", _WORD),
    **_named("BYR2 GB16 GR16 RG16 Y10 Y12 Y14", _WORD),
    **_named("pBAA pGAA pgAA pRAA Y10P", PlaneRule(5, 4)),
    **_named("pBCC pGCC pgCC pRCC", PlaneRule(3, 2)),
    **_named("pBEE pGEE pgEE pREE", PlaneRule(7, 4)),
    "Y16 -BE": (PlaneRule(2, dtype=">u2"),),
}
"""The planes of the formats of V4L2; of packed Bayer formats an array has the bytes of a row."""


def lay_out(rules: Rules, width: int, height: int, pitch: int) -> list[tuple[int, int]]:
    """Return the pitch and the rows of each plane, of which the first has ``pitch``."""
    (first, *others) = rules
    found = [(pitch, first.rows(height))]
    for rule in others:  # as many pixels in a row as the first plane has room for
        room = -(-pitch * rule.nbytes // (first.nbytes * rule.across))
        found.append((max(room, rule.row_bytes(width)), rule.rows(height)))
    return found


# -- frames


class PlaneFormat(NamedTuple):
    """One buffer of a format: its bytes at most, and the bytes from one line to the next."""

    size: int
    bytes_per_line: int


@dataclass(frozen=True, slots=True)
class Color:
    """How the numbers of a picture mean colours, by the names of V4L2 in lower case."""

    space: str
    """The primaries, as "rec709", "srgb", "smpte170m", "jpeg" or "raw"."""
    encoding: str
    """From R'G'B' to Y'CbCr, as "601" or "709"."""
    quantization: str
    """"full_range", or "lim_range" where 8-bit luma is from 16 to 235."""
    transfer: str
    """The transfer function, as "709" or "srgb"."""


@dataclass(frozen=True, slots=True)
class Format:
    """What a camera delivers."""

    fourcc: str
    """The pixel format as V4L2 names it, such as "YUYV", "NV12" or "Y16 -BE"."""
    width: int
    height: int
    planes: tuple[PlaneFormat, ...]
    """One, or one for each buffer of a multi-planar format."""
    fps: Fraction | None
    """Frames a second, None where the driver does not report a rate."""
    color: Color
    """The colours, where the driver reports "default" with the meaning that V4L2 gives it."""

    @property
    def pix_fmt(self) -> str | None:
        """FFmpeg's name of the pixel format, such as "nv12"; None where it has none."""
        return _PIX_FMTS.get(self.fourcc)

    def __str__(self) -> str:
        rate = "" if self.fps is None else f" at {float(self.fps):.6g} fps"
        return f"{self.width}x{self.height} {self.fourcc}{rate}"


class Plane(NamedTuple):
    """One plane of a frame: ``nbytes`` bytes of ``buffer`` from ``offset``."""

    buffer: Buffer
    offset: int
    nbytes: int
    """The bytes that the driver wrote, with the padding at the end of each row."""
    stride: int
    """Bytes from one row to the next."""
    rows: int
    row_bytes: int
    """Bytes of a row without padding. Compressed frames are one row of ``nbytes`` bytes."""


class Filled(NamedTuple):
    """A frame as VIDIOC_DQBUF reports it; ``spans`` has (offset, bytes) in each buffer."""

    number: int
    sequence: int
    timestamp_ns: int
    clock: str
    time_ns: int | None
    error: bool
    spans: tuple[tuple[int, int], ...]
    keyframe: bool = False
    last: bool = False


class Frame(Uncopyable, instead="copy its bytes, or write them to a file"):
    """A frame, held until :meth:`release`, which the ``with`` statement calls.

    After that the driver writes another frame into the buffer. A frame that nothing refers to is
    released automatically.
    """

    released = True  # until __init__ has finished

    def __init__(
        self,
        path: str,
        form: Format,
        row: Sequence[Buffer],
        filled: Filled,
        lost: int,
        give_back: Callable[[int], None],
        drop: Callable[[int], None],
    ) -> None:
        self._path, self._number = path, filled.number
        self._give_back, self._drop = give_back, drop
        self._views = WeakSet[_View]()
        self.format = form
        """The pixel format, size, rate and colours."""
        self.planes = _planes(form, row, filled.spans)
        """Where the bytes are: a Plane for each plane of the pixel format, as two for "NV12"."""
        self.sequence = filled.sequence
        """The driver's frame number, modulo 2**32; a missing number is a lost frame."""
        self.timestamp_ns = filled.timestamp_ns
        """When the frame was taken, in nanoseconds of ``clock``."""
        self.clock = filled.clock
        """"monotonic" (the clock of time.monotonic_ns), "copied" or "unknown"."""
        self.time_ns = filled.time_ns
        """The same in nanoseconds since 1970 (time.time_ns); None unless ``clock`` is monotonic."""
        self.error = filled.error
        """Whether the driver reports that some bytes may be wrong."""
        self.keyframe = filled.keyframe
        """Whether the driver marks the frame as one at which a decoder can begin."""
        self.lost = lost
        """The number of frames lost just before this one."""
        self.released = False
        """Whether the buffer was returned to the driver."""

    @property
    def width(self) -> int:
        """Pixels."""
        return self.format.width

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.format.height

    @property
    def stride(self) -> int:
        """Bytes from one row of the first plane to the next."""
        return self.planes[0].stride

    @property
    def buffer(self) -> Buffer:
        """The buffer of the first plane; nearly every driver puts the picture at its start."""
        return self.planes[0].buffer

    @property
    def nbytes(self) -> int:
        """The bytes of the picture, all planes together."""
        return sum(plane.nbytes for plane in self.planes)

    def asarray(self, plane: int = 0) -> np.ndarray[Any, Any]:
        """Return one plane of the picture as a NumPy array over the frame's memory: no copy.

        The shape is (rows, columns), or (rows, columns, channels) for pixels of several numbers:

        - RGB3, BGR3, XR24 ...: (height, width, 3 or 4), in the order of the memory.
        - YUYV and the like: (height, width, 2), luma and alternating chroma.
        - NV12 and the like: plane 0 is luma, plane 1 chroma with 2 channels. YU12: planes 0 to 2.
        - GREY, Y16, raw Bayer: (height, width). Packed Bayer such as pRAA: the bytes of each row.
        - Compressed and unknown formats: all bytes, in one dimension.

        The array is a CPU access that lasts as long as it does, and the frame cannot be released
        meanwhile (BusyError): delete the array, or keep a copy().

        Raises:
            ClosedError: the frame was released.
            IndexError: the format has no such plane.
            ImportError: NumPy is not installed.
            io.UnsupportedOperation: the CPU cannot map this memory.
        """
        numpy = import_optional("numpy", "Frame.asarray", "dmabuf[arrays]")
        if self.released:
            raise ClosedError(f"asarray: {self!r} was released; copy what you keep before that")
        if plane not in range(len(self.planes)):
            raise IndexError(f"{self.format.fourcc} has {len(self.planes)} planes; plane={plane!r}")
        part = self.planes[plane]
        size = part.stride * (part.rows - 1) + part.row_bytes
        memory = part.buffer.asarray("u1", size, part.offset)
        interface = dict(memory.__array_interface__)
        if self.format.fourcc in V4L2_FORMATS:
            rule = V4L2_FORMATS[self.format.fourcc][plane]
            item = numpy.dtype(rule.dtype).itemsize
            columns = part.row_bytes // (item * rule.channels)
            dimensions = 2 if rule.channels == 1 else 3
            interface["typestr"] = rule.dtype if item > 1 else "|u1"
            interface["shape"] = (part.rows, columns, rule.channels)[:dimensions]
            interface["strides"] = (part.stride, item * rule.channels, item)[:dimensions]
        view = _View(self, memory, interface)
        self._views.add(view)
        array: np.ndarray[Any, Any] = numpy.asarray(view)
        return array

    def release(self) -> None:
        """Return the buffer to the driver; releasing again does nothing.

        Waits for the fences of devices that use the buffer, at most the camera's ``timeout``.

        Raises:
            BusyError: the buffer is mapped, in a transfer, or an array over it exists; the frame
                stays held.
            TimeoutError: a device still uses the buffer; the frame stays held.
            OSError: the driver refuses the buffer.
        """
        if not self.released:
            if self._views:
                raise BusyError(f"release {self!r}: an array over it exists; delete it, or copy()")
            self._give_back(self._number)
            self.released = True

    def __enter__(self) -> Frame:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    @process.finalizer
    def __del__(self) -> None:
        if not self.released:
            self._drop(self._number)

    def __repr__(self) -> str:
        return f"<dmabuf.Frame {self.sequence} of {self._path}, {self.nbytes} bytes>"


class _View:
    """What an array of a frame is made over. It keeps the frame held, and the CPU access open."""

    def __init__(self, frame: Frame, memory: object, interface: dict[str, object]) -> None:
        self._keep = frame, memory
        self.__array_interface__ = interface


def _planes(
    form: Format, row: Sequence[Buffer], spans: Sequence[tuple[int, int]]
) -> tuple[Plane, ...]:
    rules = V4L2_FORMATS.get(form.fourcc)
    if rules is None or len(row) not in (1, len(rules)):
        return tuple(
            Plane(buffer, offset, nbytes, nbytes, 1, nbytes)
            for buffer, (offset, nbytes) in zip(row, spans, strict=True)
        )
    least = [rule.row_bytes(form.width) for rule in rules]
    pitches = [max(a.bytes_per_line, b) for a, b in zip(form.planes, least, strict=False)]
    if len(row) == 1:  # the planes follow one another
        placed = lay_out(rules, form.width, form.height, pitches[0])
    else:
        placed = [(p, rule.rows(form.height)) for p, rule in zip(pitches, rules, strict=True)]
    found, at = [], 0
    for number, ((stride, rows), row_bytes) in enumerate(zip(placed, least, strict=True)):
        if len(row) > 1 or not number:
            buffer, (at, nbytes) = row[number], spans[number]
            end = at + nbytes
        nbytes = max(0, min(stride * rows, end - at))
        found.append(Plane(buffer, at, nbytes, stride, rows, row_bytes))
        at += stride * rows
    return tuple(found)


def drm_name(frame: Frame) -> str:
    """Return DRM's name of a frame's pixel format. Raises OSError where there is none (EINVAL)."""
    name = DRM_NAMES.get(frame.format.fourcc)
    if name is None:
        text = f"DRM has no format {frame.format.fourcc}; capture another, such as NV12 or XR24"
        raise os_error(errno.EINVAL, text)
    return name


_ENCODINGS = {"rec709": "709", "dci_p3": "709", "bt2020": "bt2020", "smpte240m": "smpte240m"}
_TRANSFERS = {
    "oprgb": "oprgb", "smpte240m": "smpte240m", "dci_p3": "dci_p3", "srgb": "srgb",
    "jpeg": "srgb", "raw": "none",
}  # fmt: skip


def resolve_color(color: Color, fourcc: str) -> Color:
    """Replace "default" by what it means (V4L2_MAP_..._DEFAULT of <linux/videodev2.h>)."""
    space, encoding = color.space, color.encoding
    quantization, transfer = color.quantization, color.transfer
    if encoding == "default":
        encoding = _ENCODINGS.get(space, "601")
    if quantization == "default":
        is_luma = fourcc[0] in "YNUVPM4" or fourcc == "GREY"
        quantization = "lim_range" if is_luma and space != "jpeg" else "full_range"
    if transfer == "default":
        transfer = _TRANSFERS.get(space, "709")
    return Color(space, encoding, quantization, transfer)

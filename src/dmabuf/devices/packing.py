"""Frames as the bytes of a file: as the camera wrote them, without padding, as Y4M, or as PNG."""

from __future__ import annotations

import errno
import io
from typing import TYPE_CHECKING, Any, NamedTuple

from dmabuf.devices.frames import DRM_NAMES, Color, Format, Frame
from dmabuf.errors import os_error
from dmabuf.memory import Buffer, allocate, import_optional

if TYPE_CHECKING:
    import numpy as np

    Arrays = list[np.ndarray[Any, Any]]

_SUBSAMPLING = {
    "R8": "mono",
    **dict.fromkeys(("NV12", "NV21", "YU12", "YV12"), "420jpeg"),
    **dict.fromkeys(("NV16", "NV61", "YU16", "YV16", "YUYV", "YVYU", "UYVY", "VYUY"), "422"),
    **dict.fromkeys(("NV24", "NV42", "YU24", "YV24"), "444"),
}
"""The colour space of Y4M for pixel formats, by DRM's names."""

_RGB = {"BG24": "RGB", "RG24": "BGR", "XR24": "BGR", "AR24": "BGR", "XB24": "RGB", "AB24": "RGB"}
"""The first three bytes of a pixel."""


class Piece(NamedTuple):
    """A range of a Buffer to write, and the planes in it: (offset from the start, size, stride)."""

    buffer: Buffer
    offset: int
    nbytes: int
    planes: list[tuple[int, int, int]]


class Packer:
    """Makes the pieces of each frame for a container: "raw", "packed", "y4m" or "png".

    Raw frames are written from where they are, and packed ones too where their rows have no
    padding. Else the CPU gathers the bytes in a Buffer of the packer.
    """

    def __init__(self, container: str) -> None:
        """Raise ImportError if a library for the container is missing."""
        self.container = container
        self._gathered: Buffer | None = None
        if container == "png":
            import_optional("PIL.Image", "record of .png", "dmabuf[png]")
        if container in ("png", "y4m"):
            import_optional("numpy", f"record of .{container}", "dmabuf[arrays]")

    def check(self, fourcc: str) -> None:
        """Raise OSError (EINVAL) if the container cannot hold a format."""
        name = DRM_NAMES.get(fourcc)
        known = self.container in ("raw", "packed") or name in _SUBSAMPLING
        if self.container == "png":
            known = known or name in _RGB or fourcc in ("MJPG", "JPEG")
        if not known:
            text = f"record: cannot make {self.container} of {fourcc}; "
            raise os_error(errno.EINVAL, f"{text}try --format YUYV or NV12, or a raw file")

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._gathered is not None:
            self._gathered.close()

    def pieces(self, frame: Frame, is_first: bool) -> tuple[list[Piece], int]:
        """Return what to write of a frame, and the number of bytes that the CPU copied for it."""
        if self.container == "png":
            return self._gather(_png(frame), [])
        if self.container == "y4m":
            header = _header(frame.format) if is_first else b""
            return self._gather(header + b"FRAME\n", planar(frame))
        padded = any(plane.rows > 1 and plane.stride > plane.row_bytes for plane in frame.planes)
        if self.container == "packed" and padded:
            return self._gather(b"", [frame.asarray(n) for n in range(len(frame.planes))])
        found: list[Piece] = []
        for plane in frame.planes:
            last = found[-1] if found else None
            if last and last.buffer is plane.buffer and last.offset + last.nbytes == plane.offset:
                last.planes.append((last.nbytes, plane.nbytes, plane.stride))
                found[-1] = last._replace(nbytes=last.nbytes + plane.nbytes)
            else:
                shape = (0, plane.nbytes, plane.stride)
                found.append(Piece(plane.buffer, plane.offset, plane.nbytes, [shape]))
        return found, 0

    def _gather(self, head: bytes, arrays: Arrays) -> tuple[list[Piece], int]:
        total = len(head) + sum(array.nbytes for array in arrays)
        if self._gathered is None or self._gathered.size < total:
            if self._gathered is not None:
                self._gathered.close()
            self._gathered = allocate(total, exporter="memfd", name="packed frame")
        self._gathered.pwrite(head, 0)
        planes, at = [], len(head)
        for array in arrays:
            self._gathered.asarray(array.dtype, array.shape, at)[...] = array
            planes.append((at, array.nbytes, array.nbytes // len(array)))
            at += array.nbytes
        return [Piece(self._gathered, 0, total, planes)], total


def planar(frame: Frame) -> Arrays:
    """Return Y, U and V of a frame as arrays over its memory; Y alone of a grey one."""
    name = DRM_NAMES[frame.format.fourcc]
    first = frame.asarray(0)
    if name == "R8":
        return [first]
    if name in ("YUYV", "YVYU", "UYVY", "VYUY"):
        luma = name.index("Y")
        chroma = first[..., 1 - luma]
        first, found = first[:, : frame.width, luma], [chroma[:, 0::2], chroma[:, 1::2]]
    elif name.startswith("NV"):
        pairs = frame.asarray(1)
        found = [pairs[..., 0], pairs[..., 1]]
    else:
        found = [frame.asarray(1), frame.asarray(2)]
    v_first = name in ("YVYU", "VYUY", "NV21", "NV61", "NV42") or name.startswith("YV")
    return [first, *(reversed(found) if v_first else found)]


def _header(form: Format) -> bytes:
    rate = (form.fps.numerator, form.fps.denominator) if form.fps else (0, 0)
    levels = "FULL" if form.color.quantization == "full_range" else "LIMITED"
    text = f"YUV4MPEG2 W{form.width} H{form.height} F{rate[0]}:{rate[1]} I? A1:1 "
    text += f"C{_SUBSAMPLING[DRM_NAMES[form.fourcc]]} XCOLORRANGE={levels}\n"
    return text.encode()


def _png(frame: Frame) -> bytes:
    from PIL import Image

    name = DRM_NAMES.get(frame.format.fourcc)
    if name is None:
        picture = Image.open(io.BytesIO(frame.asarray().tobytes())).convert("RGB")
    elif name == "R8":
        picture = Image.fromarray(frame.asarray())
    elif name in _RGB:
        array = frame.asarray()[..., :3]
        picture = Image.fromarray((array if _RGB[name] == "RGB" else array[..., ::-1]).copy())
    else:
        picture = Image.fromarray(_rgb(planar(frame), frame.format.color))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _rgb(planes: Arrays, color: Color) -> np.ndarray[Any, Any]:
    """Return Y'CbCr of 8 bits as R'G'B' (ITU-R BT.601, BT.709 or BT.2020)."""
    import numpy as np

    y, u, v = (plane.astype(np.float32) for plane in planes)
    rows, columns = y.shape
    for axis, length in enumerate((rows, columns)):
        if u.shape[axis] < length:
            u, v = (np.repeat(one, 2, axis) for one in (u, v))
    u, v = (one[:rows, :columns] - 128 for one in (u, v))
    if color.quantization == "lim_range":
        y, u, v = (y - 16) * (255 / 219), u * (255 / 224), v * (255 / 224)
    known = {"709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
    kr, kb = known.get(color.encoding, (0.299, 0.114))
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.stack([red, green, blue], axis=-1).round().clip(0, 255).astype(np.uint8)

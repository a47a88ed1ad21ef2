"""A picture in shared memory: the Buffer, and all that a device has to know of its layout."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from dmabuf.buffer import Buffer
from dmabuf.devices._drm_formats import FORMATS, LINEAR, PlaneRule
from dmabuf.errors import Uncopyable, os_error
from dmabuf.sizes import as_int

_LARGEST = (1 << 32) - 1  # every number in struct drm_mode_fb_cmd2


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of a picture: `offset` is that of its first byte in the buffer, `pitch` the bytes
    from one row to the next."""

    buffer: Buffer
    offset: int
    pitch: int


@dataclass(frozen=True, slots=True)
class Image(Uncopyable, instead="make it again from its Buffer"):
    """A picture in one Buffer or, by planes, in several; checked when it is made.

    Made by :func:`dmabuf.devices.drm.image` over memory of yours, and by `Card.dumb`. It can be
    used in a `with` statement, which closes its buffers at the end.

    Raises what :func:`dmabuf.devices.drm.image` raises.
    """

    width: int
    """Pixels."""
    height: int
    """Rows of pixels."""
    format: str
    """The four characters of <drm/drm_fourcc.h>, such as "XR24" or "NV12"."""
    planes: tuple[Plane, ...]
    """Where its bytes are."""
    modifier: int | None = None
    """How the pixels are arranged: 0 in rows, None what the driver takes for granted."""

    def __post_init__(self) -> None:
        rules = rules_of(self.format)
        _check_sides(self.width, self.height)
        if self.modifier is not None and not 0 <= self.modifier < 1 << 64:
            raise ValueError(f"modifier={self.modifier!r}: 64 bits, as <drm/drm_fourcc.h> has them")
        if len(self.planes) != len(rules):
            text = f"{self.format} has {len(rules)} planes, and {len(self.planes)} were given"
            raise os_error(errno.EINVAL, text)
        for index, (plane, rule) in enumerate(zip(self.planes, rules, strict=True)):
            self._check(index, plane, rule)

    def _check(self, index: int, plane: Plane, rule: PlaneRule) -> None:
        least, rows = rule.least_pitch(self.width), rule.rows(self.height)
        problem = None
        if not 0 <= plane.offset <= _LARGEST or not 0 < plane.pitch <= _LARGEST:
            raise ValueError(f"plane {index}: offset={plane.offset}, pitch={plane.pitch}")
        if self.modifier not in (None, LINEAR):
            return  # how many bytes tiles take is for the driver to say
        if plane.pitch < least:
            problem = f"a row of {self.width} pixels takes {least} bytes, and the pitch is "
            problem += f"{plane.pitch}: leave it out for the least"
        elif plane.buffer.size < (end := plane.offset + plane.pitch * (rows - 1) + least):
            problem = f"its {rows} rows of {plane.pitch} bytes from offset {plane.offset} end at "
            problem += f"{end}, and the buffer holds {plane.buffer.size} bytes: allocate a larger"
        if problem is not None:
            text = f"{self.width}x{self.height} {self.format}, plane {index}: {problem}"
            raise os_error(errno.EINVAL, text)

    @property
    def buffer(self) -> Buffer:
        """The buffer of the first plane, and mostly of all."""
        return self.planes[0].buffer

    @property
    def pitch(self) -> int:
        """Bytes from one row of the first plane to the next."""
        return self.planes[0].pitch

    def close(self) -> None:
        """Close the buffers of the planes; raises what Buffer.close does."""
        for plane in self.planes:
            plane.buffer.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.format}"


def rules_of(name: str) -> tuple[PlaneRule, ...]:
    """A format's planes; OSError(EINVAL) for one that is not known."""
    if name not in FORMATS:
        text = f"unknown pixel format {name!r}: known are {', '.join(sorted(FORMATS))}"
        raise os_error(errno.EINVAL, text)
    return FORMATS[name]


def _check_sides(width: int, height: int) -> None:
    for side, value in (("width", width), ("height", height)):
        if not 0 < as_int(value, side) <= _LARGEST:
            raise ValueError(f"{side}={value!r}: 1 or more, in pixels")


def image(
    buffer: Buffer,
    width: int,
    height: int,
    format: str = "XR24",  # noqa: A002 - what everyone calls it
    *,
    pitch: int | None = None,
    offset: int = 0,
    modifier: int | None = None,
) -> Image:
    """A picture in a Buffer, its planes one after the other.

    Args:
        buffer: its memory; `dmabuf.devices.drm.size` tells how much it takes.
        width: pixels.
        height: rows.
        format: four characters as in <drm/drm_fourcc.h>.
        pitch: bytes from one row to the next, of the first plane; the others' follow from it. By
            default the least. Displays may want a multiple of 64 or 256.
        offset: bytes before the first pixel.
        modifier: how the pixels are arranged: 0 (DRM_FORMAT_MOD_LINEAR), a driver's own, or None
            for what the driver takes for granted.

    Raises:
        OSError: EINVAL, a format that is not known, or a buffer too small for the picture.
        ValueError: a number out of bounds.
    """
    planes, end = [], offset
    for each, rows in _lay_out(width, height, format, pitch):
        planes.append(Plane(buffer, end, each))
        end += each * rows
    return Image(width, height, format, tuple(planes), modifier)


def size(
    width: int,
    height: int,
    format: str = "XR24",  # noqa: A002
    *,
    pitch: int | None = None,
) -> int:
    """Bytes that :func:`image` takes, from its offset on. Raises what that raises."""
    return sum(pitch * rows for pitch, rows in _lay_out(width, height, format, pitch))


def _lay_out(width: int, height: int, name: str, pitch: int | None) -> list[tuple[int, int]]:
    """The pitch and the rows of each plane."""
    rules = rules_of(name)
    _check_sides(width, height)
    pitch = rules[0].least_pitch(width) if pitch is None else as_int(pitch, "pitch")
    (first, *others), found = rules, [(pitch, rules[0].rows(height))]
    for rule in others:  # as many pixels a row as the first has room for, and all that there are
        room = -(-pitch * rule.nbytes // (first.nbytes * rule.across))
        found.append((max(room, rule.least_pitch(width)), rule.rows(height)))
    return found

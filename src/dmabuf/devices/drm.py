"""Displays and GPUs by Linux's DRM: their memory as Buffers, and Buffers on a screen.

    >>> from dmabuf.devices import drm
    >>> buffer = dmabuf.allocate(drm.size(640, 480), exporter="udmabuf")
    >>> with dmabuf.open("picture.raw") as file:
    ...     transfer = file.read_into(buffer, drm.size(640, 480))
    >>> with drm.Card("/dev/dri/card0") as card:
    ...     with card.framebuffer(drm.image(buffer, 640, 480)) as framebuffer:
    ...         card.show(framebuffer)

Memory is imported and exported by PRIME, DRM's name for dma-bufs. GEM handles are numbers that
belong to one open node: two imports of one dma-buf return the same handle, and one GEM_CLOSE ends
both. Facts are from Documentation/gpu and drivers/gpu/drm.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple, overload

from dmabuf._core import address_of
from dmabuf.devices.frames import DRM_FORMATS, Frame, PlaneRule, Rules, drm_name, lay_out
from dmabuf.devices.lifetime import DeviceHandle, check_buffer
from dmabuf.devices.node import Fixes, call, failure, open_node
from dmabuf.errors import Uncopyable, os_error
from dmabuf.kernel import uapi
from dmabuf.memory import Buffer, from_fd
from dmabuf.sizes import as_int, format_size

__all__ = ["Card", "Framebuffer", "Handle", "Image", "Mode", "Output", "Plane", "image", "size"]

_NODES = "/dev/dri/card0, /dev/dri/renderD128 or similar"
_MOST = (1 << 32) - 1  # of every number in struct drm_mode_fb_cmd2
_TYPE_PREFERRED = 1 << 3
_CONNECTORS = (
    *("Unknown", "VGA", "DVI-I", "DVI-D", "DVI-A", "Composite", "SVIDEO", "LVDS", "Component"),
    *("DIN", "DP", "HDMI-A", "HDMI-B", "TV", "eDP", "Virtual", "DSI", "DPI", "Writeback", "SPI"),
    "USB",
)
"""The names of the connector types, as the kernel spells them (drm_connector.c)."""


# -- pictures: pixel formats and where their planes lie


def _rules_of(name: str) -> Rules:
    if name not in DRM_FORMATS:
        text = f"unknown pixel format {name!r}: known are {', '.join(sorted(DRM_FORMATS))}"
        raise os_error(errno.EINVAL, text)
    return DRM_FORMATS[name]


def _fourcc_number(name: str) -> int:
    return int.from_bytes(name.ljust(4).encode("ascii"), "little")


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of a picture: its first byte is at ``offset``, its rows are ``pitch`` apart."""

    buffer: Buffer
    offset: int
    pitch: int


@dataclass(frozen=True, slots=True)
class Image(Uncopyable, instead="make another one of the same planes"):
    """A picture in one Buffer, or one Buffer for each plane. The layout is checked when it is made.

    Made by :func:`image` and ``Card.dumb``, or by hand for planes in several Buffers. A ``with``
    statement closes the buffers at its end. Raises what :func:`image` raises.
    """

    width: int
    """Pixels."""
    height: int
    """Rows of pixels."""
    format: str
    """The four characters of <drm/drm_fourcc.h>, such as "XR24" or "NV12"."""
    planes: tuple[Plane, ...]
    """Where the bytes are."""
    modifier: int | None = None
    """The arrangement of the pixels: 0 for linear rows, None for the default of the driver."""

    def __post_init__(self) -> None:
        rules = _rules_of(self.format)
        _check_sides(self.width, self.height)
        if self.modifier is not None and not 0 <= self.modifier < 1 << 64:
            raise ValueError(f"invalid modifier {self.modifier!r}: use a number of 64 bits")
        if len(self.planes) != len(rules):
            text = f"{self.format} has {len(rules)} planes, {len(self.planes)} were given"
            raise os_error(errno.EINVAL, text)
        for index, (plane, rule) in enumerate(zip(self.planes, rules, strict=True)):
            self._check(index, plane, rule)

    def _check(self, index: int, plane: Plane, rule: PlaneRule) -> None:
        buffer = check_buffer(plane.buffer)
        if not 0 <= plane.offset <= _MOST or not 0 < plane.pitch <= _MOST:
            text = f"invalid offset {plane.offset} or pitch {plane.pitch}: use 32 bits"
            raise ValueError(f"plane {index}: {text}")
        if self.modifier not in (None, 0):
            return  # the driver checks the size of other layouts
        least, rows = rule.row_bytes(self.width), rule.rows(self.height)
        end = plane.offset + plane.pitch * (rows - 1) + least
        what = f"{self}, plane {index}"
        if plane.pitch < least:
            text = f"{what}: pitch {plane.pitch} is less than the {least} bytes of a row"
            raise os_error(errno.EINVAL, text)
        if buffer.size < end:
            text = f"{what}: it ends at byte {end}, the buffer has {buffer.size}; allocate a larger"
            raise os_error(errno.EINVAL, text)

    @property
    def buffer(self) -> Buffer:
        """The buffer of the first plane, usually of all."""
        return self.planes[0].buffer

    @property
    def pitch(self) -> int:
        """The bytes from one row of the first plane to the next."""
        return self.planes[0].pitch

    def close(self) -> None:
        """Close the buffers of the planes; raises what Buffer.close raises."""
        for plane in self.planes:
            plane.buffer.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.format}"


def _check_sides(width: int, height: int) -> None:
    for side, value in (("width", width), ("height", height)):
        if not 0 < as_int(value, side) <= _MOST:
            raise ValueError(f"invalid {side} {value!r}: use 1 or more pixels")


@overload
def image(frame: Frame, /) -> Image: ...
@overload
def image(
    buffer: Buffer,
    width: int,
    height: int,
    format: str = "XR24",
    *,
    pitch: int | None = None,
    offset: int = 0,
    modifier: int | None = None,
) -> Image: ...
def image(
    buffer: Buffer | Frame,
    width: int | None = None,
    height: int | None = None,
    format: str = "XR24",  # noqa: A002
    *,
    pitch: int | None = None,
    offset: int = 0,
    modifier: int | None = None,
) -> Image:
    """Describe a frame of a camera, or a picture in a Buffer, its planes one after the other.

    Args:
        buffer: a ``v4l2.Frame``, which needs no other argument and whose buffers stay the camera's;
            or the memory, and :func:`size` returns how much a picture takes.
        width: pixels.
        height: rows.
        format: four characters as in <drm/drm_fourcc.h>.
        pitch: bytes from one row of the first plane to the next, from which the pitches of the
            others follow. The default is the least; displays may need a multiple of 64 or 256.
        offset: bytes before the first pixel.
        modifier: the arrangement of the pixels: 0 (DRM_FORMAT_MOD_LINEAR), a value of the driver,
            or None for the default of the driver.

    Raises:
        OSError: EINVAL, an unknown format, or a buffer too small for the picture.
        ValueError: a number out of range.
    """
    if isinstance(buffer, Frame):
        planes = tuple(Plane(one.buffer, one.offset, one.stride) for one in buffer.planes)
        return Image(buffer.width, buffer.height, drm_name(buffer), planes)
    if width is None or height is None:
        raise TypeError("image: width= and height= are needed with a Buffer")
    made, end = [], offset
    for each, rows in _lay_out(width, height, format, pitch):
        made.append(Plane(buffer, end, each))
        end += each * rows
    return Image(width, height, format, tuple(made), modifier)


def size(
    width: int,
    height: int,
    format: str = "XR24",  # noqa: A002
    *,
    pitch: int | None = None,
) -> int:
    """Return the bytes that :func:`image` takes from its offset. Raises the same errors."""
    return sum(pitch * rows for pitch, rows in _lay_out(width, height, format, pitch))


def _lay_out(width: int, height: int, name: str, pitch: int | None) -> list[tuple[int, int]]:
    """Return the pitch and the rows of each plane."""
    rules = _rules_of(name)
    _check_sides(width, height)
    pitch = rules[0].row_bytes(width) if pitch is None else as_int(pitch, "pitch")
    return lay_out(rules, width, height, pitch)


# -- cards and what they make


class Mode(NamedTuple):
    """A size and rate of a display."""

    width: int
    height: int
    hz: int
    preferred: bool
    raw: bytes
    """The kernel's struct drm_mode_modeinfo."""

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Output(NamedTuple):
    """A connector, to which a display may be connected."""

    name: str
    """As in /sys/class/drm: "HDMI-A-1"."""
    connected: bool
    """Whether a display is connected."""
    modes: tuple[Mode, ...]
    """The modes of the display, the best first."""
    connector: int
    """The kernel's number of the connector."""
    crtcs: tuple[int, ...]
    """The numbers of the CRTCs that can drive it, the current one first."""


class Card(DeviceHandle):
    """An open DRM node: a display, a GPU, or a render node of one.

    Opening a Card takes no display from another program; :meth:`show` does. Thread-safe. After a
    fork the child can only close its copy. Closing a Card closes its handles and framebuffers;
    Buffers stay open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a node such as "/dev/dri/card0" or "/dev/dri/renderD128".

        Raises:
            OSError: there is no such node or no permission; it is not a DRM device (ENODEV).
        """
        self._node = _Node(os.fspath(path))
        self._lock = threading.RLock()
        self._handles: dict[int, int] = {}  # how many Handles have each number
        self._exported: set[int] = set()  # numbers of the caller, which only close_handle() closes
        self._shown: dict[int, tuple[int, int]] = {}  # by connector: the CRTC, the framebuffer
        self.path = self._node.path
        """The device node."""
        self.driver = self._node.driver
        """The name of the kernel driver."""
        self._opened()

    def fileno(self) -> int:
        """Return the descriptor of the node, for ioctls of the driver; it stays the Card's."""
        self.check_open()
        return self._node.fd

    # -- memory

    def dumb(
        self,
        width: int,
        height: int,
        format: str = "XR24",  # noqa: A002 - the usual name
        *,
        name: str | None = None,
    ) -> Image:
        """Allocate a picture in memory of the device; every driver of a display can.

        The Buffer alone keeps the memory. The driver chooses the pitch. ``name`` labels the buffer
        as in :func:`dmabuf.from_fd`.

        Raises:
            OSError: the format is unknown or has several planes (EINVAL); the driver or node makes
                no dumb buffers; there is not enough memory.
            ValueError: a side of less than one pixel.
        """
        self.check_open()
        rules = _rules_of(format)
        if len(rules) > 1 or rules[0].across > 1:
            text = f"make a dumb buffer: {format} is not one plane of whole pixels; use allocate()"
            raise os_error(errno.EINVAL, text, self.path)
        _check_sides(width, height)
        with self._lock:
            self.check_open()
            handle, pitch = self._node.create_dumb(width, height, 8 * rules[0].nbytes)
            try:
                buffer = self._export(handle, name)
            finally:
                self._node.close_handle(handle)
        try:
            return image(buffer, width, height, format, pitch=pitch)
        except BaseException:
            buffer.close()
            raise

    def export(self, handle: int, *, name: str | None = None) -> Buffer:
        """Return the memory of a GEM handle, made by an ioctl of the driver, as a Buffer.

        The caller still owns the handle (:meth:`close_handle`); the Buffer does not need it.

        Raises:
            OSError: there is no such handle (ENOENT), or the driver does not export it.
        """
        number = _handle_number(handle)
        with self._lock:
            self.check_open()
            buffer = self._export(number, name)
            if number not in self._handles:
                self._exported.add(number)
            return buffer

    def _export(self, handle: int, name: str | None) -> Buffer:
        fd = self._node.export(handle)
        try:
            return from_fd(fd, name=name)
        finally:
            os.close(fd)

    def close_handle(self, handle: int) -> None:
        """Close a GEM handle of the caller. Raises OSError."""
        with self._lock:
            self.check_open()
            number = _handle_number(handle)
            if number in self._handles:
                text = f"close GEM handle {number}: a Handle uses it; close that one"
                raise os_error(errno.EBUSY, text, self.path)
            self._node.close_handle(number)
            self._exported.discard(number)

    def handle(self, buffer: Buffer) -> Handle:
        """Import a Buffer as a GEM handle of this node, which lasts until the Handle is closed.

        The kernel has one number for one dma-buf on one node; the last Handle closes it.

        Raises:
            OSError: the driver refuses the memory (ENODEV, EIO, EINVAL ...); the buffer is not one
                dma-buf (EOPNOTSUPP).
            ClosedError: the buffer or the card is closed.
        """
        with self._lock:
            return Handle(self, self._import(buffer), self._release)

    def _import(self, buffer: Buffer) -> int:
        self.check_open()
        slabs, text = check_buffer(buffer).slabs, ""
        if not buffer.is_dmabuf:
            text = f'a {buffer.exporter} is not a dma-buf; allocate with exporter="udmabuf"'
        elif len(slabs) > 1:
            text = f"it has {len(slabs)} slabs, a GEM handle is one; {buffer.reason}"
        if text:
            raise os_error(errno.EOPNOTSUPP, f"import a buffer: {text}", self.path)
        kind = f"{format_size(buffer.size)} of {buffer.exporter}"
        number = self._node.import_fd(slabs[0].fd, kind)
        self._handles[number] = self._handles.get(number, 0) + 1
        return number

    def _release(self, number: int) -> None:
        if self.forked:  # before the lock, which may have been locked when the parent forked
            return
        with self._lock:
            if self.closed:
                return
            self._handles[number] -= 1
            if not self._handles[number]:
                del self._handles[number]
                if number not in self._exported:
                    self._node.close_handle(number)

    # -- displays

    def framebuffer(self, picture: Image) -> Framebuffer:
        """Make a framebuffer of a picture, which the displays of this card can show.

        It keeps the memory. Raises what :meth:`handle` raises, and OSError where the display lacks
        the format, modifier, size or pitch (EINVAL), or the card has no displays.
        """
        code = _fourcc_number(picture.format)
        with self._lock:
            used: list[int] = []
            try:
                for plane in picture.planes:
                    used.append(self._import(plane.buffer))
                rows = [
                    (number, plane.pitch, plane.offset)
                    for number, plane in zip(used, picture.planes, strict=True)
                ]
                number = self._node.add_framebuffer(picture, code, rows)
            finally:
                for handle in used:
                    self._release(handle)  # the framebuffer itself keeps the memory
            return Framebuffer(self, number, picture, self._forget, self._flush)

    def outputs(self) -> tuple[Output, ...]:
        """Return the connectors, what is connected, and the modes that the kernel knows.

        Raises:
            OSError: the device has no displays, or this is a render node.
        """
        with self._lock:
            self.check_open()
            return self._node.outputs()

    def show(self, framebuffer: Framebuffer, output: str | None = None) -> None:
        """Take the display, and show a framebuffer in a mode of exactly its size.

        ``output`` is the name of a connector, such as "HDMI-A-1"; the default is the first that is
        connected. The framebuffer is shown until it is closed or replaced.

        Raises:
            OSError: another program has the display (EBUSY or EACCES), nothing is connected
                (ENODEV), there is no mode of that size, or the driver refuses.
            ClosedError: the framebuffer or the card is closed.
        """
        with self._lock:
            self.check_open()
            framebuffer.check_open()
            if framebuffer.card is not self:
                raise ValueError("this framebuffer belongs to another Card: make one on this Card")
            self._node.take_master()
            try:
                self._show(framebuffer, output)
            finally:
                self._give_back()

    def _show(self, framebuffer: Framebuffer, name: str | None) -> None:
        found = self._node.outputs()
        wanted = [one for one in found if (one.connected if name is None else one.name == name)]
        if not wanted or not wanted[0].connected:
            which = "no display is connected" if name is None else f"no display at {name}"
            have = ", ".join(one.name for one in found) or "none"
            raise os_error(errno.ENODEV, f"show: {which}; its connectors are {have}", self.path)
        one, picture = wanted[0], framebuffer.image
        modes = [m for m in one.modes if (m.width, m.height) == (picture.width, picture.height)]
        if not modes:
            have = ", ".join(dict.fromkeys(map(str, one.modes))) or "none"
            text = (
                f"show: {one.name} has no mode of {picture.width}x{picture.height}; it has {have}"
            )
            raise os_error(errno.EINVAL, text, self.path)
        taken = [crtc for where, (crtc, _) in self._shown.items() if where != one.connector]
        crtc = next((crtc for crtc in one.crtcs if crtc not in taken), None)
        if crtc is None:
            text = f"show: no CRTC is left to drive {one.name}; close a framebuffer"
            raise os_error(errno.EBUSY, text, self.path)
        self._node.set_crtc(crtc, one, framebuffer.number, modes[0], picture)
        self._shown[one.connector] = crtc, framebuffer.number

    def _give_back(self) -> None:
        if not self._shown:
            self._node.drop_master()

    def _flush(self, number: int) -> None:
        with self._lock:
            self.check_open()
            self._node.flush(number)

    def _forget(self, number: int) -> None:
        if self.forked:
            return
        with self._lock:
            if self.closed:
                return
            with suppress(OSError):  # the device is gone
                self._node.remove_framebuffer(number)
            self._shown = {at: one for at, one in self._shown.items() if one[1] != number}
            self._give_back()

    def close(self) -> None:
        """Close the node, its handles and its framebuffers. Closing again does nothing."""
        with nullcontext() if self.forked else self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._node.fd)

    def __repr__(self) -> str:
        return f"<dmabuf.Card {self.path} {'closed' if self._closed else self.driver}>"


class _Part(DeviceHandle):
    """What a Card makes: it ends with ``close``, with its Card, or with the process."""

    def __init__(self, card: Card, number: int, end: Callable[[int], None]) -> None:
        self.card = card
        """The Card that made it."""
        self.number = number
        """The kernel's number, on this node."""
        self._end = end
        self._opened()

    @property
    def closed(self) -> bool:
        """Whether it, or its card, was closed."""
        return self._closed or self.card.closed

    def close(self) -> None:
        """Return it to the kernel. Closing again does nothing."""
        if not self._closed:
            self._closed = True
            self._end(self.number)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.number} of {self.card.path}"
        return f"<dmabuf.{type(self).__name__} {state}>"


class Handle(_Part):
    """A GEM handle, ``number`` on ``card.fileno()``, for ioctls of the driver; by `Card.handle`."""


class Framebuffer(_Part):
    """A picture that a display can show; made by :meth:`Card.framebuffer`.

    Closing it turns off the display that shows it. The console or desktop returns when the card is
    closed.
    """

    def __init__(
        self,
        card: Card,
        number: int,
        picture: Image,
        end: Callable[[int], None],
        flush: Callable[[int], None],
    ) -> None:
        super().__init__(card, number, end)
        self._flush = flush
        self.image = picture
        """The picture."""

    def flush(self) -> None:
        """Report to the display that pixels have changed; some displays show a copy.

        Raises:
            OSError: the driver refuses.
            ClosedError: the framebuffer or the card is closed.
        """
        self.check_open()
        self._flush(self.number)


def _handle_number(handle: int) -> int:
    number = as_int(handle, "handle")
    if not 0 <= number < 1 << 32:
        raise ValueError(f"invalid handle {number}: use a GEM handle, a number of 32 bits")
    return number


# -- the node


class _Node:
    """An open DRM node. Each method is one ioctl or a few; an OSError has the path and the fix."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = open_node(path, 0, uapi.DRM_MAJOR, "DRM", _NODES, "video or render")
        try:
            self.driver = self._driver()
            # The first program to open a display's node is its master, and would exclude others.
            self.drop_master()
        except BaseException:
            os.close(self.fd)
            raise

    def _ask(
        self,
        request: int,
        layout: struct.Struct,
        *values: object,
        what: str = "",
        fixes: Fixes | None = None,
    ) -> tuple[int, ...]:
        """Issue an ioctl, and return its structure; ``what`` begins the error message."""
        data = bytearray(layout.pack(*values))
        call(self.fd, request, data, what, self.path, fixes)
        return layout.unpack(data)

    def _lacks(self, what: str) -> dict[int, str]:
        return dict.fromkeys((errno.EOPNOTSUPP, errno.ENOSYS), f"{self.driver} {what}")

    def _driver(self) -> str:
        name = bytearray(64)
        found = self._ask(
            uapi.DRM_IOCTL_VERSION, uapi.DRM_VERSION_STRUCT,
            0, 0, 0, 0, len(name), address_of(name), 0, 0, 0, 0,
            what="get the driver", fixes={errno.ENOTTY: "not a DRM device"},
        )  # fmt: skip
        return name[: found[4]].decode(errors="replace")

    # -- memory

    def create_dumb(self, width: int, height: int, bits: int) -> tuple[int, int]:
        found = self._ask(
            uapi.DRM_IOCTL_MODE_CREATE_DUMB, uapi.DRM_DUMB_STRUCT,
            height, width, bits, 0, 0, 0, 0,
            what=f"make a dumb buffer of {width}x{height}, {bits} bits a pixel",
            fixes=self._lacks("makes none; use dmabuf.allocate()")
            | {
                errno.EACCES: "a render node makes none; open /dev/dri/card0 or similar",
                errno.EINVAL: f"{self.driver} refuses that size, or {bits} bits a pixel",
                errno.ENOMEM: "not enough memory on the device",
            },
        )  # fmt: skip
        return found[4], found[5]

    def export(self, handle: int) -> int:
        """Return the memory of a handle as a dma-buf, which the caller closes."""
        return self._ask(
            uapi.DRM_IOCTL_PRIME_HANDLE_TO_FD, uapi.DRM_PRIME_STRUCT,
            handle, os.O_RDWR | os.O_CLOEXEC, -1,
            what=f"export GEM handle {handle}",
            fixes=self._lacks("does not export memory of this kind")
            | {errno.ENOENT: "no such handle on this node"},
        )[2]  # fmt: skip

    def import_fd(self, fd: int, kind: str) -> int:
        """Return the handle of a dma-buf; ``kind`` describes it in errors."""
        own = "use memory of the card, by dumb() or export()"
        codes = (errno.EOPNOTSUPP, errno.EIO, errno.EINVAL)
        fixes = dict.fromkeys(codes, f"it cannot reach such memory; {own}")
        fixes |= dict.fromkeys(
            (errno.ENODEV, errno.ENOSYS), f"it imports no memory of other devices; {own}"
        )
        fixes[errno.ENOMEM] = "not enough memory or address space"
        what = f"import {kind} into {self.driver}"
        request, layout = uapi.DRM_IOCTL_PRIME_FD_TO_HANDLE, uapi.DRM_PRIME_STRUCT
        return self._ask(request, layout, 0, 0, fd, what=what, fixes=fixes)[0]

    def close_handle(self, handle: int) -> None:
        fixes = {errno.EINVAL: "no such handle on this node"}
        request, layout = uapi.DRM_IOCTL_GEM_CLOSE, uapi.DRM_GEM_CLOSE_STRUCT
        self._ask(request, layout, handle, 0, what=f"close GEM handle {handle}", fixes=fixes)

    # -- displays

    def add_framebuffer(self, picture: Image, code: int, planes: list[tuple[int, int, int]]) -> int:
        """Return the number of a new framebuffer; ``planes`` has (handle, pitch, offset)."""
        rows = [*planes, *(4 - len(planes)) * [(0, 0, 0)]]
        modifier, sides = picture.modifier, (picture.width, picture.height)
        flags = 0 if modifier is None else uapi.DRM_MODE_FB_MODIFIERS
        layout = f"pitch {picture.pitch}"
        layout += "" if modifier is None else f" with modifier {modifier:#x}"
        refused = f"{self.driver} refuses the format, the size or {layout}"
        return self._ask(
            uapi.DRM_IOCTL_MODE_ADDFB2,
            uapi.DRM_FB2_STRUCT,
            *(0, *sides, code, flags),
            *(number for column in zip(*rows, strict=True) for number in column),
            *(modifier or 0 if handle else 0 for handle, _, _ in rows),
            what=f"make a framebuffer of {picture}",
            fixes=self._lacks("has no displays")
            | {errno.EACCES: _RENDER, errno.EINVAL: f"{refused}; try XR24, or a multiple of 256"},
        )[0]

    def remove_framebuffer(self, number: int) -> None:
        data = bytearray(struct.pack("=I", number))
        uapi.ioctl(self.fd, uapi.DRM_IOCTL_MODE_RMFB, data)

    def flush(self, number: int) -> None:
        request, layout = uapi.DRM_IOCTL_MODE_DIRTYFB, uapi.DRM_DIRTY_STRUCT
        try:
            self._ask(request, layout, number, 0, 0, 0, 0, what="flush a framebuffer")
        except OSError as error:
            if error.errno != errno.ENOSYS:  # a display that reads the memory all the time
                raise

    def outputs(self) -> tuple[Output, ...]:
        request, layout = uapi.DRM_IOCTL_MODE_GETRESOURCES, uapi.DRM_RESOURCES_STRUCT
        try:
            counts = self._ask(request, layout, *12 * [0])[4:8]
            arrays = [bytearray(4 * max(count, 1)) for count in counts]
            pointers = [0, *(address_of(array) for array in arrays[1:3]), 0]
            self._ask(request, layout, *pointers, 0, counts[1], counts[2], 0, 0, 0, 0, 0)
            crtcs, connectors = (
                struct.unpack_from(f"={counts[kind]}I", arrays[kind]) for kind in (1, 2)
            )
            return tuple(self._output(number, crtcs) for number in connectors)
        except OSError as error:
            fixes = self._lacks("has no displays") | {errno.EACCES: _RENDER}
            raise failure(error, "list the displays", self.path, fixes) from None

    def _output(self, number: int, crtcs: tuple[int, ...]) -> Output:
        request, layout = uapi.DRM_IOCTL_MODE_GETCONNECTOR, uapi.DRM_CONNECTOR_STRUCT
        rest = (0, number, 0, 0, 0, 0, 0, 0, 0)
        found = self._ask(request, layout, 0, 0, 0, 0, 0, 0, 0, *rest)  # without counts: probe it
        while True:  # the counts may have changed in between
            modes, _, encoders = found[4:7]
            raw = bytearray(uapi.DRM_MODE_STRUCT.size * max(modes, 1))
            ids = bytearray(4 * max(encoders, 1))
            found = self._ask(
                request, layout, address_of(ids), address_of(raw), 0, 0,
                max(modes, 1), 0, max(encoders, 1), *rest,
            )  # fmt: skip
            if found[4] <= max(modes, 1) and found[6] <= max(encoders, 1):
                break
        kind, step = found[9], uapi.DRM_MODE_STRUCT.size
        return Output(
            f"{_CONNECTORS[kind if kind < len(_CONNECTORS) else 0]}-{found[10]}",
            found[11] == uapi.DRM_MODE_CONNECTED,
            tuple(_mode(bytes(raw[at : at + step])) for at in range(0, step * found[4], step)),
            number,
            self._crtcs(struct.unpack_from(f"={found[6]}I", ids), found[7], crtcs),
        )

    def _crtcs(
        self, encoders: tuple[int, ...], current: int, crtcs: tuple[int, ...]
    ) -> tuple[int, ...]:
        driving: list[int] = []
        possible: list[int] = []
        for number in encoders:
            layout = uapi.DRM_ENCODER_STRUCT
            found = self._ask(uapi.DRM_IOCTL_MODE_GETENCODER, layout, number, 0, 0, 0, 0)
            driving += [found[2]] if number == current and found[2] else []
            possible += [crtc for bit, crtc in enumerate(crtcs) if found[3] >> bit & 1]
        return tuple(dict.fromkeys(driving + possible))

    def set_crtc(
        self, crtc: int, output: Output, framebuffer: int, mode: Mode, picture: Image
    ) -> None:
        ids = bytearray(struct.pack("=I", output.connector))
        refused = f"{self.driver} refuses {picture} at a pitch of {picture.pitch} bytes"
        self._ask(
            uapi.DRM_IOCTL_MODE_SETCRTC, uapi.DRM_CRTC_STRUCT,
            address_of(ids), 1, crtc, framebuffer, 0, 0, 0, 1, mode.raw,
            what=f"show a framebuffer on {output.name}",
            fixes={
                errno.EINVAL: f"{refused}; try another pitch or format",
                errno.ENOSPC: "the framebuffer is smaller than the mode",
                errno.EACCES: "another program has the display",
            },
        )  # fmt: skip

    def take_master(self) -> None:
        """Become the DRM master, the one program that may show framebuffers."""
        try:
            uapi.ioctl(self.fd, uapi.DRM_IOCTL_SET_MASTER, 0)
        except OSError as error:
            other = "another program has the display; leave the desktop, or use another display"
            fixes = dict.fromkeys((errno.EBUSY, errno.EACCES, errno.EINVAL), other)
            raise failure(error, "take the display", self.path, fixes) from None

    def drop_master(self) -> None:
        with suppress(OSError):
            uapi.ioctl(self.fd, uapi.DRM_IOCTL_DROP_MASTER, 0)


_RENDER = "a render node has no displays; open /dev/dri/card0 or similar"


def _mode(raw: bytes) -> Mode:
    found = uapi.DRM_MODE_STRUCT.unpack(raw)
    return Mode(found[1], found[6], found[11], bool(found[13] & _TYPE_PREFERRED), raw)

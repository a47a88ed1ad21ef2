"""A DRM device node: its ioctls, and errors that say what to do.

Facts are from Documentation/gpu and drivers/gpu/drm. Handles are numbers that belong to an open
node: importing one dma-buf twice gives the same handle, which one GEM_CLOSE ends for both.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from contextlib import suppress
from typing import NamedTuple

from dmabuf import _uapi
from dmabuf._mapping import address_of
from dmabuf.errors import os_error

_TYPE_PREFERRED = 1 << 3
_CONNECTORS = (
    *("Unknown", "VGA", "DVI-I", "DVI-D", "DVI-A", "Composite", "SVIDEO", "LVDS", "Component"),
    *("DIN", "DP", "HDMI-A", "HDMI-B", "TV", "eDP", "Virtual", "DSI", "DPI", "Writeback", "SPI"),
    "USB",
)
"""Names of the connector types, as the kernel and every tool spell them (drm_connector.c)."""


class Mode(NamedTuple):
    """A size and rate that a display can be driven with."""

    width: int
    height: int
    hz: int
    preferred: bool
    raw: bytes
    """The kernel's struct drm_mode_modeinfo."""

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Output(NamedTuple):
    """Where a display can be: a connector."""

    name: str
    """As in /sys/class/drm: "HDMI-A-1"."""
    connected: bool
    """Whether a display is there."""
    modes: tuple[Mode, ...]
    """What it can show, the best first."""
    connector: int
    """The kernel's number of it."""
    crtcs: tuple[int, ...]
    """The numbers of what can drive it, the one that does first."""


class Node:
    """An open DRM node. Each method is one ioctl or a few; OSErrors carry the path."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.fd = _open(self.path)
        try:
            self.driver = self._driver()
            # The first to open a display's node is its master, and others could not show anything.
            self.drop_master()
        except BaseException:
            os.close(self.fd)
            raise

    def ask(self, request: int, layout: struct.Struct, *values: object) -> tuple[int, ...]:
        """An ioctl, again for as long as it is interrupted; what its struct holds then."""
        data = bytearray(layout.pack(*values))
        while True:
            try:
                _uapi.ioctl(self.fd, request, data)
            except InterruptedError:
                continue
            return layout.unpack(data)

    def fail(self, error: OSError, what: str, fixes: dict[int, str] | None = None) -> OSError:
        """The error again, with what was attempted and what to do."""
        number = error.errno or errno.EIO
        known = {errno.ENODEV: "the device is gone"} | (fixes or {})
        return os_error(number, f"{what}: {known.get(number, os.strerror(number))}", self.path)

    def _driver(self) -> str:
        name = bytearray(64)
        try:
            found = self.ask(
                _uapi.DRM_IOCTL_VERSION, _uapi.DRM_VERSION_STRUCT,
                0, 0, 0, 0, len(name), address_of(name), 0, 0, 0, 0,
            )  # fmt: skip
        except OSError as error:
            fixes = {errno.ENOTTY: "it is no DRM device"}
            raise self.fail(error, "asking for its driver", fixes) from None
        return name[: found[4]].decode(errors="replace")

    # -- memory

    def create_dumb(self, width: int, height: int, bits: int) -> tuple[int, int]:
        """A new handle, and the bytes from one row to the next."""
        layout = _uapi.DRM_DUMB_STRUCT
        try:
            found = self.ask(
                _uapi.DRM_IOCTL_MODE_CREATE_DUMB, layout, height, width, bits, 0, 0, 0, 0
            )
        except OSError as error:
            none = f"{self.driver} makes no dumb buffers: allocate with dmabuf.allocate()"
            fixes = {
                errno.ENOSYS: none,
                errno.EOPNOTSUPP: none,
                errno.EACCES: "render nodes make none: open /dev/dri/card0 or so",
                errno.EINVAL: f"{self.driver} makes none of that size, or of {bits} bits a pixel",
                errno.ENOMEM: "not enough memory of the device's",
            }
            what = f"making a dumb buffer of {width}x{height}, {bits} bits a pixel"
            raise self.fail(error, what, fixes) from None
        return found[4], found[5]

    def export(self, handle: int) -> int:
        """A handle's memory as a dma-buf: its descriptor, the caller's to close."""
        flags = os.O_RDWR | os.O_CLOEXEC
        layout = _uapi.DRM_PRIME_STRUCT
        try:
            return self.ask(_uapi.DRM_IOCTL_PRIME_HANDLE_TO_FD, layout, handle, flags, -1)[2]
        except OSError as error:
            none = f"{self.driver} exports none of this kind"
            fixes = {
                errno.ENOENT: "there is no such handle on this node: handles of another open "
                "file are not valid here",
                errno.ENOSYS: none,
                errno.EOPNOTSUPP: none,
            }
            raise self.fail(error, f"exporting GEM handle {handle}", fixes) from None

    def import_fd(self, fd: int, kind: str) -> int:
        """The handle of a dma-buf on this node; `kind` describes it in errors."""
        layout = _uapi.DRM_PRIME_STRUCT
        try:
            return self.ask(_uapi.DRM_IOCTL_PRIME_FD_TO_HANDLE, layout, 0, 0, fd)[0]
        except OSError as error:
            own = "use memory of its own, by dumb() or export()"
            fixes = {
                errno.ENODEV: f"it imports no memory of others; {own}",
                errno.ENOSYS: f"it has no PRIME import; {own}",
                errno.EOPNOTSUPP: f"it cannot reach such memory; {own}",
                errno.EIO: f"its hardware cannot reach such memory; {own}",
                errno.EINVAL: f"it takes no such memory; {own}",
                errno.ENOMEM: "not enough memory or address space",
            }
            what = f"{self.driver} refuses to import {kind}"
            raise self.fail(error, what, fixes) from None

    def close_handle(self, handle: int) -> None:
        """GEM_CLOSE."""
        layout = _uapi.DRM_GEM_CLOSE_STRUCT
        try:
            self.ask(_uapi.DRM_IOCTL_GEM_CLOSE, layout, handle, 0)
        except OSError as error:
            fixes = {errno.EINVAL: "there is no such handle on this node"}
            raise self.fail(error, f"closing GEM handle {handle}", fixes) from None

    # -- displays

    def add_framebuffer(
        self,
        size: tuple[int, int],
        fourcc: int,
        planes: list[tuple[int, int, int]],
        modifier: int | None,
    ) -> int:
        """The number of a new framebuffer; `planes` are (handle, pitch, offset). Plain OSErrors."""
        rows = [*planes, *(4 - len(planes)) * [(0, 0, 0)]]
        modifiers = [modifier or 0 if handle else 0 for handle, _, _ in rows]
        return self.ask(
            _uapi.DRM_IOCTL_MODE_ADDFB2,
            _uapi.DRM_FB2_STRUCT,
            *(0, *size, fourcc, 0 if modifier is None else _uapi.DRM_MODE_FB_MODIFIERS),
            *(number for column in zip(*rows, strict=True) for number in column),
            *modifiers,
        )[0]

    def remove_framebuffer(self, number: int) -> None:
        """RMFB; what shows it goes dark."""
        data = bytearray(struct.pack("=I", number))
        _uapi.ioctl(self.fd, _uapi.DRM_IOCTL_MODE_RMFB, data)

    def flush(self, number: int) -> None:
        """DIRTYFB for the whole of it."""
        try:
            self.ask(_uapi.DRM_IOCTL_MODE_DIRTYFB, _uapi.DRM_DIRTY_STRUCT, number, 0, 0, 0, 0)
        except OSError as error:
            if error.errno != errno.ENOSYS:  # a display that reads the memory itself, all the time
                raise self.fail(error, "telling the display of new pixels") from None

    def formats(self) -> list[int]:
        """The numbers of the formats that some plane of the display has."""
        layout = _uapi.DRM_PLANES_STRUCT
        found: dict[int, None] = {}
        everything = (_uapi.DRM_CLIENT_CAP_UNIVERSAL_PLANES, 1)  # else overlays only
        self.ask(_uapi.DRM_IOCTL_SET_CLIENT_CAP, _uapi.DRM_CAP_STRUCT, *everything)
        _, count = self.ask(_uapi.DRM_IOCTL_MODE_GETPLANERESOURCES, layout, 0, 0)
        ids = bytearray(4 * count)
        where = address_of(ids) if count else 0
        _, count = self.ask(_uapi.DRM_IOCTL_MODE_GETPLANERESOURCES, layout, where, count)
        for (number,) in struct.iter_unpack("=I", ids):
            request, plane = _uapi.DRM_IOCTL_MODE_GETPLANE, _uapi.DRM_PLANE_STRUCT
            count = self.ask(request, plane, number, 0, 0, 0, 0, 0, 0)[5]
            if count:
                codes = bytearray(4 * count)
                self.ask(request, plane, number, 0, 0, 0, 0, count, address_of(codes))
                found |= dict.fromkeys(code for (code,) in struct.iter_unpack("=I", codes))
        return list(found)

    def outputs(self) -> tuple[Output, ...]:
        """Every connector, asked anew."""
        request, layout = _uapi.DRM_IOCTL_MODE_GETRESOURCES, _uapi.DRM_RESOURCES_STRUCT
        try:
            counts = self.ask(request, layout, *12 * [0])[4:8]
            arrays = [bytearray(4 * max(count, 1)) for count in counts]
            pointers = [0, *(address_of(array) for array in arrays[1:3]), 0]
            self.ask(request, layout, *pointers, 0, counts[1], counts[2], 0, 0, 0, 0, 0)
            crtcs, connectors = (
                struct.unpack_from(f"={counts[kind]}I", arrays[kind]) for kind in (1, 2)
            )
            return tuple(self._output(number, crtcs) for number in connectors)
        except OSError as error:
            none = f"{self.driver} has no displays"
            fixes = {errno.EOPNOTSUPP: none, errno.ENOSYS: none, errno.EACCES: _RENDER}
            raise self.fail(error, "asking for its displays", fixes) from None

    def _output(self, number: int, crtcs: tuple[int, ...]) -> Output:
        request, layout = _uapi.DRM_IOCTL_MODE_GETCONNECTOR, _uapi.DRM_CONNECTOR_STRUCT
        rest = (0, number, 0, 0, 0, 0, 0, 0, 0)
        found = self.ask(request, layout, 0, 0, 0, 0, 0, 0, 0, *rest)  # no counts: it is probed
        while True:  # it may have changed in between
            modes, _, encoders = found[4:7]
            size = _uapi.DRM_MODE_STRUCT.size
            raw, ids = bytearray(size * max(modes, 1)), bytearray(4 * max(encoders, 1))
            found = self.ask(
                request, layout, address_of(ids), address_of(raw), 0, 0,
                max(modes, 1), 0, max(encoders, 1), *rest,
            )  # fmt: skip
            if found[4] <= max(modes, 1) and found[6] <= max(encoders, 1):
                break
        kind = found[9]
        return Output(
            f"{_CONNECTORS[kind if kind < len(_CONNECTORS) else 0]}-{found[10]}",
            found[11] == _uapi.DRM_MODE_CONNECTED,
            tuple(_mode(bytes(raw[at : at + size])) for at in range(0, size * found[4], size)),
            number,
            self._crtcs(struct.unpack_from(f"={found[6]}I", ids), found[7], crtcs),
        )

    def _crtcs(
        self, encoders: tuple[int, ...], current: int, crtcs: tuple[int, ...]
    ) -> tuple[int, ...]:
        driving: list[int] = []
        possible: list[int] = []
        for number in encoders:
            layout = _uapi.DRM_ENCODER_STRUCT
            found = self.ask(_uapi.DRM_IOCTL_MODE_GETENCODER, layout, number, 0, 0, 0, 0)
            driving += [found[2]] if number == current and found[2] else []
            possible += [crtc for bit, crtc in enumerate(crtcs) if found[3] >> bit & 1]
        return tuple(dict.fromkeys(driving + possible))

    def set_crtc(self, crtc: int, connector: int, framebuffer: int, mode: Mode) -> None:
        """Show a framebuffer. Plain OSErrors."""
        ids = bytearray(struct.pack("=I", connector))
        self.ask(
            _uapi.DRM_IOCTL_MODE_SETCRTC, _uapi.DRM_CRTC_STRUCT,
            address_of(ids), 1, crtc, framebuffer, 0, 0, 0, 1, mode.raw,
        )  # fmt: skip

    def take_master(self) -> None:
        """Become the one who may show things."""
        try:
            _uapi.ioctl(self.fd, _uapi.DRM_IOCTL_SET_MASTER, 0)
        except OSError as error:
            other = "another program has the display: leave the desktop, or use a free one"
            fixes = {errno.EBUSY: other, errno.EACCES: f"{other}; or be root", errno.EINVAL: other}
            raise self.fail(error, "taking the display", fixes) from None

    def drop_master(self) -> None:
        """Let others show things, if we could."""
        with suppress(OSError):
            _uapi.ioctl(self.fd, _uapi.DRM_IOCTL_DROP_MASTER, 0)


_RENDER = "render nodes have no displays: open /dev/dri/card0 or so"


def _mode(raw: bytes) -> Mode:
    found = _uapi.DRM_MODE_STRUCT.unpack(raw)
    return Mode(found[1], found[6], found[11], bool(found[13] & _TYPE_PREFERRED), raw)


def _open(path: str) -> int:
    try:
        there = os.stat(path)
        if not stat.S_ISCHR(there.st_mode) or os.major(there.st_rdev) != _uapi.DRM_MAJOR:
            text = "is no DRM device: those are /dev/dri/card0, /dev/dri/renderD128 and so on"
            raise os_error(errno.ENODEV, text, path)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        fixes = {
            errno.ENOENT: "no such DRM device: those that are there are in /dev/dri",
            errno.ENXIO: "no such DRM device: the driver of this node is not loaded",
            errno.EACCES: "permission denied: join the group that owns it, often video or render, "
            "or be root",
        }
        if error.errno in fixes:
            raise os_error(error.errno, fixes[error.errno], path) from None
        raise

"""A fake display of DRM, in place of the ioctls of the package."""

import ctypes
import errno
import os
import struct

from dmabuf.devices import drm
from dmabuf.kernel import uapi

NODE = "/dev/dri/card0"
PITCH = 256
"""Bytes that the pitch of a dumb buffer is a multiple of."""


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def mode(width: int, height: int, hz: int, preferred: bool = False) -> bytes:
    numbers = [0, width, 0, 0, 0, 0, height, 0, 0, 0, 0, hz, 0, 8 if preferred else 0]
    return uapi.DRM_MODE_STRUCT.pack(*numbers, b"")


class FakeDrm:
    """A card with three connectors and two CRTCs, of which the first shows the console.

    ``errors`` has the errno with which an ioctl fails, by the name of its constant. Its dma-bufs
    are memfds, and a memory has one handle, as the kernel does it. ``other`` forwards the rest.
    """

    def __init__(self, other) -> None:
        self.other = other
        self.errors: dict[str, int] = {}
        self.handles: dict[int, int] = {}  # a descriptor of the memory, by number
        self.framebuffers: dict[int, tuple] = {}
        self.shown: dict[int, tuple] = {}  # by CRTC
        self.flushed: list[int] = []
        self.master = True
        self.modes = {
            31: [mode(640, 480, 60, preferred=True), mode(320, 240, 75)],
            32: [mode(640, 480, 50)],
            33: [],
        }
        self.plugged_meanwhile: list[bytes] = []
        """Modes that appear between the two questions for them."""
        self.names = {
            getattr(uapi, name): name for name in dir(uapi) if name.startswith("DRM_IOCTL_")
        }

    def install(self, monkeypatch) -> "FakeDrm":
        monkeypatch.setattr(uapi, "ioctl", self.ioctl)
        monkeypatch.setattr(
            drm, "open_node", lambda *_: os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        )
        return self

    def ioctl(self, fd: int, request: int, argument: object) -> object:
        name = self.names.get(request)
        if name is None:
            return self.other(fd, request, argument)
        if name in self.errors:
            fail(self.errors[name])
        answer = getattr(self, "_" + name.removeprefix("DRM_IOCTL_").lower())
        if not isinstance(argument, bytearray):
            return answer()
        layout = {
            "DRM_IOCTL_VERSION": uapi.DRM_VERSION_STRUCT,
            "DRM_IOCTL_GEM_CLOSE": uapi.DRM_GEM_CLOSE_STRUCT,
            "DRM_IOCTL_PRIME_HANDLE_TO_FD": uapi.DRM_PRIME_STRUCT,
            "DRM_IOCTL_PRIME_FD_TO_HANDLE": uapi.DRM_PRIME_STRUCT,
            "DRM_IOCTL_MODE_GETRESOURCES": uapi.DRM_RESOURCES_STRUCT,
            "DRM_IOCTL_MODE_SETCRTC": uapi.DRM_CRTC_STRUCT,
            "DRM_IOCTL_MODE_GETENCODER": uapi.DRM_ENCODER_STRUCT,
            "DRM_IOCTL_MODE_GETCONNECTOR": uapi.DRM_CONNECTOR_STRUCT,
            "DRM_IOCTL_MODE_DIRTYFB": uapi.DRM_DIRTY_STRUCT,
            "DRM_IOCTL_MODE_CREATE_DUMB": uapi.DRM_DUMB_STRUCT,
            "DRM_IOCTL_MODE_ADDFB2": uapi.DRM_FB2_STRUCT,
        }.get(name, struct.Struct("=I"))
        values = list(layout.unpack(argument))
        answer(values)
        argument[:] = layout.pack(*values)
        return 0

    # -- the device and its memory

    def _version(self, values):
        ctypes.memmove(values[5], b"fake-drm", 8)
        values[4] = 8

    def _set_master(self):
        self.master = True

    def _drop_master(self):
        self.master = False

    def _new_handle(self, fd: int) -> int:
        number = next(one for one in range(1, 100) if one not in self.handles)
        self.handles[number] = fd
        return number

    def _mode_create_dumb(self, values):
        height, width, bits = values[:3]
        values[5] = -(-width * bits // 8 // PITCH) * PITCH
        values[6] = -(-values[5] * height // 4096) * 4096
        fd = os.memfd_create("dumb")
        os.ftruncate(fd, values[6])
        values[4] = self._new_handle(fd)

    def _prime_handle_to_fd(self, values):
        if values[0] not in self.handles:
            fail(errno.ENOENT)
        values[2] = os.dup(self.handles[values[0]])

    def _prime_fd_to_handle(self, values):
        for number, fd in self.handles.items():
            if os.path.sameopenfile(fd, values[2]):
                values[0] = number
                return
        values[0] = self._new_handle(os.dup(values[2]))

    def _gem_close(self, values):
        if values[0] not in self.handles:
            fail(errno.EINVAL)
        os.close(self.handles.pop(values[0]))

    # -- displays

    def _mode_addfb2(self, values):
        _, width, height, code, flags, *planes = values
        assert all(number in self.handles for number in planes[:4] if number)
        values[0] = 50 + len(self.framebuffers)
        self.framebuffers[values[0]] = (width, height, code, flags, *planes)

    def _mode_rmfb(self, values):
        del self.framebuffers[values[0]]
        self.shown = {at: one for at, one in self.shown.items() if one[0] != values[0]}

    def _mode_dirtyfb(self, values):
        self.flushed.append(values[0])

    def _mode_getresources(self, values):
        crtcs, connectors = [41, 42], [*self.modes]
        for index, found in ((5, crtcs), (6, connectors)):
            if values[index] >= len(found) and values[index - 4]:
                self._put(values[index - 4], struct.pack(f"={len(found)}I", *found))
            values[index] = len(found)

    def _mode_getconnector(self, values):
        connector, modes = values[8], self.modes[values[8]]
        if values[4] and self.plugged_meanwhile:
            modes += self.plugged_meanwhile
            self.plugged_meanwhile = []
        encoders = [60 + connector] if connector != 33 else []
        if values[4] >= len(modes) and values[1]:
            self._put(values[1], b"".join(modes))
        if values[6] >= len(encoders) and values[0]:
            self._put(values[0], struct.pack(f"={len(encoders)}I", *encoders))
        values[4], values[6] = len(modes), len(encoders)
        values[7] = 91 if connector == 31 else 0  # the encoder that drives it
        values[9] = {31: 11, 32: 15, 33: 99}[connector]  # HDMI-A, Virtual, and an unknown type
        values[10] = connector - 30
        values[11] = 1 if modes else 2

    def _mode_getencoder(self, values):
        values[2], values[3] = (42 if values[0] == 91 else 0), 0b11

    def _mode_setcrtc(self, values):
        if not self.master:
            fail(errno.EACCES)
        pointer, count, crtc, framebuffer, *_, valid, raw = values
        assert (count, valid) == (1, 1) and framebuffer in self.framebuffers
        [connector] = struct.unpack("=I", ctypes.string_at(pointer, 4))
        self.shown[crtc] = framebuffer, connector, raw

    @staticmethod
    def _put(address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))
